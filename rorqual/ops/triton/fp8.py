"""Products in tiles with stored weights in Triton: one kernel for a linear layer and for all routed experts, whether the
weights are plain, FP8 in blocks of 128 x 128, or packed integers in groups of 32.

Rows are sorted by expert (a linear layer is one expert) and cut into tiles of BLOCK_M rows of one expert. Each program
computes a tile of y^T = W x^T: the weight is the left operand because a matrix unit wants 64 or more rows of it while
decoding has few tokens; expanded weights go from registers straight into it. The k-loop steps by 128, the width of a
scale block, and scales each FP8 block's product in fp32, so that such a weight is never rounded after scaling; integers
are rounded to the activations' dtype, as `ops.packed` rounds them. With two halves (gate and up) the SwiGLU is applied
before anything is written.

The reduction over k is one fixed loop, so a row's result does not depend on the rows beside it for a given BLOCK_M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.formats import Weight
from rorqual.ops.fp8 import quantize_tiles
from rorqual.ops.triton.overlap import begin, options

BLOCK = 128


@triton.jit
def _tile(
    x, x_scale, w, w_scale, source, in_range, n, first, last, k_size, n_size,
    stride_x, stride_xs, stride_w, stride_ws,
    KIND: tl.constexpr, DYNAMIC: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc[n, m] = sum of w[n, k] x[m, k] over the k of blocks first..last-1; FP8 is scaled block by block, packed integers
    are expanded and rounded to x's dtype. KIND: `ops.formats.Weight.kind`."""
    PER: tl.constexpr = 32 // KIND if KIND >= 4 else 1
    WORDS: tl.constexpr = 128 // PER
    k = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_rows = x + source[:, None] * stride_x + k[None, :]
    w_rows = w + n[:, None].to(tl.int64) * stride_w + k[None, :]
    w_scales = w_scale + tl.min(n, 0) // 128 * stride_ws
    for block in range(first, last):
        at = block * 128
        if EVEN_K:
            x_tile = tl.load(x_rows + at, mask=in_range[:, None], other=0.0)
        else:
            x_tile = tl.load(x_rows + at, mask=in_range[:, None] & (at + k < k_size)[None, :], other=0.0)
        if KIND >= 4:
            word = block * WORDS + tl.arange(0, WORDS)
            inside = (n < n_size)[:, None] & (word * PER < k_size)[None, :]
            words = tl.load(w + n[:, None].to(tl.int64) * stride_w + word[None, :], mask=inside, other=0)
            group = w_scale + n[:, None].to(tl.int64) * stride_ws + (word // (32 // PER))[None, :]
            scales = tl.load(group, mask=inside, other=0.0).to(tl.float32)
            codes = (words[:, :, None] >> (KIND * tl.arange(0, PER))[None, None, :]) & (2**KIND - 1)
            values = (codes - 2 ** (KIND - 1)).to(tl.float32) * scales[:, :, None]
            w_tile = tl.reshape(values, (BLOCK_N, 128))
        elif EVEN_K:
            w_tile = tl.load(w_rows + at, mask=(n < n_size)[:, None], other=0.0)
        else:
            inside = (n < n_size)[:, None] & (at + k < k_size)[None, :]
            w_tile = tl.load(w_rows + at, mask=inside, other=0.0)
        if KIND == 1:
            scale = tl.load(w_scales + block)
        if KIND != 1:
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
    KIND: tl.constexpr, DYNAMIC: tl.constexpr, EXACT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin()
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
            stride_x, stride_xs, stride_w, stride_ws, KIND, DYNAMIC, EXACT, EVEN_K, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if GATED:
            up = _tile(
                x, x_scale, w + stride_wh, w_scale + stride_sh, source, in_range, n, first, last, k_size, n_size,
                stride_x, stride_xs, stride_w, stride_ws, KIND, DYNAMIC, EXACT, EVEN_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            acc = acc * tl.sigmoid(acc) * up
        place = y + tl.program_id(2) * stride_split + rows.to(tl.int64)[:, None] * stride_y + n[None, :]
        tl.store(place, tl.trans(acc).to(y.dtype.element_ty), mask=in_range[:, None] & (n < n_size)[None, :])


@triton.jit
def _quantize_kernel(x, codes, scales, rows, k_size, stride_x, stride_s, BLOCK_M: tl.constexpr):
    begin()
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
    _quantize_kernel[grid](x, codes, scales, rows, k_size, x.stride(0), scales.stride(0), BLOCK_M=block_m, **options())
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
    x: Tensor,
    weight: Weight,
    tiles: tuple[Tensor, Tensor, Tensor] | None,
    gather: Tensor | None,
    rows: int,
    how: Tiling,
) -> Tensor:
    """weight [E, halves, N, K] -> [rows, N], SwiGLU applied where there are two halves. tiles None: one expert, every row
    its."""
    codes, scale = weight.data, weight.scale
    experts, halves, n_size, _ = codes.shape
    k_size = x.shape[1]
    tile_expert, tile_begin, row_end = tiles or (None, None, None)
    count = triton.cdiv(rows, how.block_m) if tile_expert is None else tile_expert.numel()
    shape, dtype = ((rows, n_size), x.dtype) if how.splits == 1 else ((how.splits, rows, n_size), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    out_dtype, x_scale, exact = x.dtype, scale, x.dtype == torch.float32
    if weight.dynamic:
        # Triton's interpreter rounds to FP8 wrongly where a carry reaches the exponent (3.8).
        x, x_scale = quantize_rows(x) if x.is_cuda else quantize_tiles(x)
    blocks = triton.cdiv(k_size, BLOCK)
    _rows_kernel[(triton.cdiv(n_size, how.block_n), count, how.splits)](
        x, x_scale, codes, scale, y, gather, tile_expert, tile_begin, row_end,
        rows, experts, k_size, n_size, triton.cdiv(blocks, how.splits),
        x.stride(0), x_scale.stride(-2), codes.stride(0), codes.stride(1), codes.stride(2),
        scale.stride(0), scale.stride(1), scale.stride(2), y.stride(-2), rows * n_size,
        ONE=tiles is None, GATED=halves == 2, GATHER=gather is not None, KIND=weight.kind, DYNAMIC=weight.dynamic,
        EXACT=exact, EVEN_K=k_size % BLOCK == 0, BLOCK_M=how.block_m, BLOCK_N=how.block_n,
        num_warps=how.warps, num_stages=how.stages, **options(),
    )  # fmt: skip
    return y if how.splits == 1 else _added(y, out_dtype)


@triton.jit
def _added_kernel(part, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    begin()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(part + at, mask=at < size, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def _added(part: Tensor, dtype: torch.dtype) -> Tensor:
    """[splits, rows, N] fp32 -> [rows, N], the splits in order."""
    out = torch.empty(part.shape[1:], dtype=dtype, device=part.device)
    _added_kernel[(triton.cdiv(out.numel(), 1024),)](
        part, out, out.numel(), SPLITS=len(part), BLOCK=1024, num_warps=4, **options()
    )
    return out


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


def tile_rows(x: Tensor, weight: Weight, how: Tiling | None = None) -> Tensor:
    """x [..., K] times one stored matrix [N, K] -> [..., N] in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    rows, n_size = flat.shape[0], len(weight.data)
    how = how or tiling(rows, (n_size, x.shape[-1]), triton.cdiv(rows, _block_m(rows)), gated=False)
    y = launch(flat, weight.view((None, None)), None, None, rows, how)
    return y.view(*x.shape[:-1], -1)


def fixed_tiling(shape: Sequence[int], rows: int) -> Tiling:
    """For `tile_rows`, such that a row's bits depend neither on how many there are nor on where it stands: the k-loop is
    split by the weight's shape [N, K] alone, and how many rows share a tile changes no order of additions."""
    return tiling(1, shape, 1, gated=False)._replace(block_m=_block_m(rows))


def tile_experts(
    x_ND: Tensor, gate_up: Weight, down: Weight, gates_NK: Tensor, chosen_NK: Tensor, fixed: bool = False
) -> Tensor:
    """The routed experts of `ops.experts` for any number of tokens; gate_up [E, 2, F, D], down [E, D, F]. A token's slots
    are added in order. fixed: no split depends on the number of rows (`fixed_tiling`)."""
    from rorqual.ops.triton.experts import combine

    K, experts = chosen_NK.shape[1], down.data.shape[0]
    flat_M = chosen_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = (flat_M[:, None] == torch.arange(experts, device=x_ND.device)).sum(0)
    rows, D, width = flat_M.numel(), x_ND.shape[1], gate_up.data.shape[2]
    per, likely = rows / experts, min(rows, experts)
    first, second = (
        tiling(per, shape, likely, gated or fixed) for shape, gated in (((width, D), True), ((D, width), False))
    )
    tiles = _tiles(counts_E, rows, first.block_m)
    token_M = (order_M // K).to(torch.int32)
    h = launch(x_ND, gate_up, tiles, token_M, rows, first)
    y = launch(h, down.view((slice(None), None)), tiles, None, rows, second)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(rows, device=x_ND.device))
    return combine(y, place_M, gates_NK.contiguous())


@triton.jit
def _expand_packed_kernel(
    words, scales, out, rows, width, BITS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    PER: tl.constexpr = 32 // BITS
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (n < rows)[:, None] & (word * PER < width)[None, :]
    packed = tl.load(words + n[:, None] * (width // PER) + word[None, :], mask=inside, other=0)
    group = n[:, None] * (width // 32) + (word // (32 // PER))[None, :]
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    codes = (packed[:, :, None] >> (BITS * tl.arange(0, PER))[None, None, :]) & (2**BITS - 1)
    value = tl.reshape((codes - 2 ** (BITS - 1)).to(tl.float32) * scale[:, :, None], (BLOCK_N, WORDS * PER))
    k = tl.program_id(1) * WORDS * PER + tl.arange(0, WORDS * PER)
    place = out + n[:, None] * width + k[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=(n < rows)[:, None] & (k < width)[None, :])


def expand_packed(weight: Weight, dtype: torch.dtype) -> Tensor:
    """`ops.packed.PackedIntegers.dense` of contiguous words [..., in * bits / 32] in one pass -> [..., in], the same to the
    bit."""
    per = 32 // weight.kind
    *lead, words = weight.data.shape
    rows, width = weight.data.numel() // max(1, words), words * per
    out = torch.empty(*lead, width, dtype=dtype, device=weight.data.device)
    _expand_packed_kernel[(triton.cdiv(rows, 8), triton.cdiv(words, 32))](
        weight.data, weight.scale, out, rows, width, BITS=weight.kind, BLOCK_N=8, WORDS=32
    )
    return out
