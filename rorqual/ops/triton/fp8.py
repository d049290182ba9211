"""Products with block-scaled FP8 weights in Triton: one kernel for a linear layer and for all routed experts.

Rows are sorted by expert (a linear layer is one expert) and cut into tiles of BLOCK_M rows of one expert. Each program
computes a tile of y^T = W x^T: the weight is the left operand because a matrix unit wants 64 or more rows of it while
decoding has few tokens; expanded weights go from registers straight into it. The k-loop steps by 128, the width of a
scale block, and scales each block's product in fp32, so that a weight is never rounded after scaling. With two
halves (gate and up) the SwiGLU is applied before anything is written.

The reduction over k is one fixed loop, so a row's result does not depend on the rows beside it for a given BLOCK_M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.formats import Parts
from rorqual.ops.fp8 import quantize_tiles

BLOCK = 128


@triton.jit
def _tile(
    x, x_scale, w, w_scale, source, in_range, n, first, last, k_size, n_size,
    stride_x, stride_xs, stride_w, stride_ws,
    PLAIN: tl.constexpr, DYNAMIC: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc[n, m] = sum of w[n, k] x[m, k] over the k of blocks first..last-1, scaled block by block unless PLAIN."""
    k = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_rows = x + source[:, None] * stride_x + k[None, :]
    w_rows = w + n[:, None].to(tl.int64) * stride_w + k[None, :]
    w_scales = w_scale + tl.min(n, 0) // 128 * stride_ws
    for block in range(first, last):
        at = block * 128
        if EVEN_K:
            x_tile = tl.load(x_rows + at, mask=in_range[:, None], other=0.0)
            w_tile = tl.load(w_rows + at, mask=(n < n_size)[:, None], other=0.0)
        else:
            inside = (at + k < k_size)[None, :]
            x_tile = tl.load(x_rows + at, mask=in_range[:, None] & inside, other=0.0)
            w_tile = tl.load(w_rows + at, mask=(n < n_size)[:, None] & inside, other=0.0)
        if not PLAIN:
            scale = tl.load(w_scales + block)
        if PLAIN:
            acc = tl.dot(w_tile.to(x_tile.dtype), tl.trans(x_tile), acc, input_precision="ieee")
        elif DYNAMIC:
            token_scale = tl.load(x_scale + source * stride_xs + block, mask=in_range, other=0.0)
            acc += tl.dot(w_tile, tl.trans(x_tile)) * (scale * token_scale)[None, :]
        elif EXACT:
            acc += tl.dot(w_tile.to(tl.float32), tl.trans(x_tile), input_precision="ieee") * scale
        else:
            acc += tl.dot(w_tile.to(x_tile.dtype), tl.trans(x_tile)) * scale
    return acc


@triton.jit
def _rows_kernel(
    x, x_scale, w, w_scale, y, gather, tile_expert, tile_begin, row_end,
    total_rows, experts, k_size, n_size, blocks_per_split,
    stride_x, stride_xs, stride_we, stride_wh, stride_w, stride_se, stride_sh, stride_ws, stride_y, stride_split,
    ONE: tl.constexpr, GATED: tl.constexpr, GATHER: tl.constexpr,
    PLAIN: tl.constexpr, DYNAMIC: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if ONE:
        expert = tile * 0
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_range = rows < total_rows
    else:
        expert = tl.load(tile_expert + tile)
        rows = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        in_range = rows < tl.load(row_end + tl.minimum(expert, experts - 1))
    if expert < experts:
        source = rows.to(tl.int64)
        if GATHER:
            source = tl.load(gather + rows, mask=in_range, other=0).to(tl.int64)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.program_id(2) * blocks_per_split
        last = tl.minimum(first + blocks_per_split, tl.cdiv(k_size, 128))
        w += expert.to(tl.int64) * stride_we
        w_scale += expert.to(tl.int64) * stride_se
        acc = _tile(
            x, x_scale, w, w_scale, source, in_range, n, first, last, k_size, n_size,
            stride_x, stride_xs, stride_w, stride_ws, PLAIN, DYNAMIC, EXACT, EVEN_K, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if GATED:
            up = _tile(
                x, x_scale, w + stride_wh, w_scale + stride_sh, source, in_range, n, first, last, k_size, n_size,
                stride_x, stride_xs, stride_w, stride_ws, PLAIN, DYNAMIC, EXACT, EVEN_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            acc = acc * tl.sigmoid(acc) * up
        place = y + tl.program_id(2) * stride_split + rows.to(tl.int64)[:, None] * stride_y + n[None, :]
        tl.store(place, tl.trans(acc).to(y.dtype.element_ty), mask=in_range[:, None] & (n < n_size)[None, :])


@triton.jit
def _quantize_kernel(x, codes, scales, rows, k_size, stride_x, stride_s, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (m < rows)[:, None] & (k < k_size)[None, :]
    value = tl.load(x + m.to(tl.int64)[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    scale = tl.where(largest > 0, tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38), 1.0)
    value = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    tl.store(codes + m.to(tl.int64)[:, None] * k_size + k[None, :], value.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + m.to(tl.int64) * stride_s + tl.program_id(1), scale, mask=m < rows)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.fp8.quantize_tiles` of a matrix [M, K] in one pass: the same codes and scales, to the bit."""
    rows, k_size = x.shape
    codes = torch.empty(rows, k_size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, triton.cdiv(k_size, BLOCK), dtype=torch.float32, device=x.device)
    block_m = 16 if rows > 16 else 1
    grid = (triton.cdiv(rows, block_m), triton.cdiv(k_size, BLOCK))
    _quantize_kernel[grid](x, codes, scales, rows, k_size, x.stride(0), scales.stride(0), BLOCK_M=block_m)
    return codes, scales


@triton.jit
def _expand_kernel(codes, scales, out, n_size, k_size, stride_s, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = n.to(tl.int64)[:, None] * k_size + k[None, :]
    inside = (n < n_size)[:, None] & (k < k_size)[None, :]
    scale = tl.load(scales + tl.program_id(0) * BLOCK_N // 128 * stride_s + tl.program_id(1))
    value = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def expand(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.fp8.dequantize_blocks` of one contiguous matrix [N, K] in one pass, the same to the bit."""
    n_size, k_size = codes.shape
    out = torch.empty(n_size, k_size, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(n_size, 32), triton.cdiv(k_size, BLOCK))
    _expand_kernel[grid](codes, scale, out, n_size, k_size, scale.stride(0), BLOCK_N=32)
    return out


class Tiling(NamedTuple):
    """Launch parameters. splits: parts of the k-loop that run side by side and are added afterwards, in order."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def tiling(rows_per_expert: float, shape: Sequence[int], tiles: int, gated: bool) -> Tiling:
    """By measurement on an H100 and an H200: while rows are few, what counts is that enough programs read weights."""
    n_size, k_size = shape
    programs = triton.cdiv(n_size, 64) * max(1, tiles)
    blocks = triton.cdiv(k_size, BLOCK)
    splits = 1
    while not gated and splits < 8 and programs * splits < 264 and blocks // (2 * splits) >= 3:
        splits *= 2
    return Tiling(_block_m(rows_per_expert), 64, splits, 4, 3)


def launch(
    x: Tensor, codes: Tensor, scale: Tensor | None, tiles: tuple[Tensor, Tensor, Tensor] | None, gather: Tensor | None,
    rows: int, dynamic: bool, how: Tiling,
) -> Tensor:  # fmt: skip
    """codes [E, halves, N, K], scale [E, halves, GN, GK] -> [rows, N], SwiGLU applied where there are two halves.
    scale None: the codes are plain weights. tiles None: one expert, every row its."""
    experts, halves, n_size, k_size = codes.shape
    tile_expert, tile_begin, row_end = tiles or (None, None, None)
    count = triton.cdiv(rows, how.block_m) if tile_expert is None else tile_expert.numel()
    shape, dtype = ((rows, n_size), x.dtype) if how.splits == 1 else ((how.splits, rows, n_size), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    plain = scale is None
    scale = codes if scale is None else scale  # a pointer that is never read
    out_dtype, x_scale, exact = x.dtype, scale, x.dtype == torch.float32
    if dynamic:
        # Triton's interpreter rounds to FP8 wrongly where a carry reaches the exponent (3.8).
        x, x_scale = quantize_rows(x) if x.is_cuda else quantize_tiles(x)
    blocks = triton.cdiv(k_size, BLOCK)
    _rows_kernel[(triton.cdiv(n_size, how.block_n), count, how.splits)](
        x, x_scale, codes, scale, y, gather, tile_expert, tile_begin, row_end,
        rows, experts, k_size, n_size, triton.cdiv(blocks, how.splits),
        x.stride(0), x_scale.stride(-2), codes.stride(0), codes.stride(1), codes.stride(2),
        scale.stride(0), scale.stride(1), scale.stride(2), y.stride(-2), rows * n_size,
        ONE=tiles is None, GATED=halves == 2, GATHER=gather is not None, PLAIN=plain, DYNAMIC=dynamic,
        EXACT=exact, EVEN_K=k_size % BLOCK == 0, BLOCK_M=how.block_m, BLOCK_N=how.block_n,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return y if how.splits == 1 else y.sum(0).to(out_dtype)


def _block_m(rows_per_expert: float) -> int:
    return next((m for m in (16, 32, 64) if rows_per_expert <= m), 128)


def _tiles(counts_E: Tensor, rows: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert and first row of every tile, and each expert's end, all int32; surplus tiles name expert E. No tile count
    comes back to the host: at most one tile a row, and one ragged tile an expert."""
    experts = counts_E.numel()
    end_E = counts_E.cumsum(0)
    tile_end_E = ((counts_E + block_m - 1) // block_m).cumsum(0)
    tile = torch.arange(min(rows, rows // block_m + experts), device=counts_E.device)
    expert = torch.searchsorted(tile_end_E, tile, right=True)
    known = expert.clamp_max(experts - 1)
    first = tile_end_E[known] - (counts_E[known] + block_m - 1) // block_m
    begin = end_E[known] - counts_E[known] + (tile - first) * block_m
    return expert.to(torch.int32), begin.to(torch.int32), end_E.to(torch.int32)


def fp8_rows(x: Tensor, codes: Tensor, scale: Tensor, dynamic: bool, how: Tiling | None = None) -> Tensor:
    """x [..., K] times one weight, codes [N, K] with scale [ceil(N/128), ceil(K/128)] -> [..., N] in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    rows = flat.shape[0]
    how = how or tiling(rows, codes.shape, triton.cdiv(rows, _block_m(rows)), gated=False)
    y = launch(flat, codes[None, None], scale[None, None], None, None, rows, dynamic, how)
    return y.view(*x.shape[:-1], -1)


def fp8_experts(
    x_ND: Tensor, gate_up: Parts, down: Parts, gates_NK: Tensor, chosen_NK: Tensor, dynamic: bool
) -> Tensor:
    """The routed experts of `ops.experts`; gate_up [E, 2, F, D], down [E, D, F]. A token's slots are added in order."""
    K, experts = chosen_NK.shape[1], down["weight"].shape[0]
    flat_M = chosen_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = (flat_M[:, None] == torch.arange(experts, device=x_ND.device)).sum(0)
    rows = flat_M.numel()
    per, likely = rows / experts, min(rows, experts)
    shapes = gate_up["weight"].shape[2:], down["weight"].shape[1:]
    first, second = (tiling(per, shape, likely, gated) for shape, gated in zip(shapes, (True, False), strict=True))
    tiles = _tiles(counts_E, rows, first.block_m)
    token_M = (order_M // K).to(torch.int32)
    h = launch(x_ND, gate_up["weight"], gate_up["weight_scale_inv"], tiles, token_M, rows, dynamic, first)
    y = launch(h, down["weight"][:, None], down["weight_scale_inv"][:, None], tiles, None, rows, dynamic, second)
    y_NKD = torch.empty_like(y).index_copy_(0, order_M, y).view(*chosen_NK.shape, -1)
    return (y_NKD.float() * gates_NK[..., None]).sum(1).to(x_ND.dtype)
