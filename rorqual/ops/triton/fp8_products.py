"""Products of FP8 operands with scales, in Triton: dense, of rows grouped by expert, and an expert's weight gradient.

Operands are contiguous along the sum, which steps by 128, the width of a scale: each step's product is scaled in fp32 and
added in fp32, so that the matrix units never add more than 128 products in their own narrow sums (DeepSeek-V3 section
3.3.2). Rows of experts are padded to whole tiles of 128, each of one expert: a program asks its tile's expert and nothing
is ragged. Launch shapes depend on shapes alone and every sum is in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton.fp8_train import TILE, Quantised

PROCESSORS = 132
"""An H100's multiprocessors."""


@triton.jit
def _product_kernel(
    a, sa, b, sb, c, expert, M, N, K, steps, stride_a, stride_sa, stride_b, stride_be, stride_sb, stride_sbk, stride_sbe,
    stride_split, E,
    BLOCKS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Programs next to each other share rows and columns: GROUP row tiles go through all columns together.
    per = GROUP * tiles_n
    first = tl.program_id(0) // per * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + tl.program_id(0) % per % size
    tile_n = tl.program_id(0) % per // size
    e = 0
    if GROUPED:
        e = tl.load(expert + tile_m)
    if e < E:
        e64 = tl.cast(e, tl.int64)
        m, n, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 128)
        a_rows = a + m.to(tl.int64)[:, None] * stride_a + k[None, :]
        b_rows = b + e64 * stride_be + n.to(tl.int64)[:, None] * stride_b + k[None, :]
        in_m, in_n = m < M, n < N
        if BLOCKS:
            b_scales = sb + e64 * stride_sbe + (tile_n * BLOCK_N // 128) * stride_sb
        else:
            b_scales = sb + n * stride_sb
        begin = tl.program_id(1) * steps
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.range(begin, tl.minimum(begin + steps, tl.cdiv(K, 128)), num_stages=STAGES):
            at = i * 128
            if EVEN:
                a_tile = tl.load(a_rows + at, mask=in_m[:, None], other=0.0)
                b_tile = tl.load(b_rows + at, mask=in_n[:, None], other=0.0)
            else:
                inside = (at + k < K)[None, :]
                a_tile = tl.load(a_rows + at, mask=in_m[:, None] & inside, other=0.0)
                b_tile = tl.load(b_rows + at, mask=in_n[:, None] & inside, other=0.0)
            a_scale = tl.load(sa + i * stride_sa + m, mask=in_m, other=0.0)
            part = tl.dot(a_tile, tl.trans(b_tile))
            if BLOCKS:
                acc += part * (a_scale * tl.load(b_scales + i * stride_sbk))[:, None]
            else:
                acc += part * a_scale[:, None] * tl.load(b_scales + i * stride_sbk, mask=in_n, other=0.0)[None, :]
        to = c + tl.program_id(1).to(tl.int64) * stride_split + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, acc.to(c.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def product(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype, tile_expert: Tensor | None = None) -> Tensor:
    """a [M, K] in tiles along K times b^T -> [M, N] in dtype. b [N, K] in blocks, or in tiles along K; with tile_expert
    (int32, one for each 128 rows of a; E for none, whose rows are not written) b is a stack [E, N, K] in blocks."""
    (a_codes, a_scale), (b_codes, b_scale) = a, b
    (M, K), N, grouped = a_codes.shape, b_codes.shape[-2], tile_expert is not None
    assert a_codes.stride(1) == b_codes.stride(-1) == 1 and a_scale.stride(0) == 1 and (blocks or not grouped)
    steps, splits = triton.cdiv(K, TILE), 1
    programs = triton.cdiv(M, TILE) * triton.cdiv(N, TILE)
    while not grouped and programs * splits < PROCESSORS and steps // (2 * splits) >= 8:
        splits *= 2
    out = torch.empty(splits, M, N, dtype=dtype if splits == 1 else torch.float32, device=a_codes.device)
    stack_b, stack_s = (b_codes.stride(0), b_scale.stride(0)) if grouped else (0, 0)
    _product_kernel[(programs, splits)](
        a_codes, a_scale, b_codes, b_scale, out, a_scale if tile_expert is None else tile_expert, M, N, K,
        triton.cdiv(steps, splits), a_codes.stride(0), a_scale.stride(1), b_codes.stride(-2), stack_b,
        b_scale.stride(-2), b_scale.stride(-1), stack_s, M * N, len(b_codes) if grouped else 1,
        BLOCKS=blocks, GROUPED=grouped, EVEN=K % TILE == 0, BLOCK_M=TILE, BLOCK_N=TILE, GROUP=8, STAGES=3, num_warps=8,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(dtype)


@triton.jit
def _weight_gradient_kernel(
    a, sa, b, sb, c, ends, N, K, M, stride_sa, stride_sb,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, 128)
    in_n, in_k = n < N, k < K
    last = tl.load(ends + e)
    first = tl.load(ends + e - 1, mask=e > 0, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    a_rows, b_rows = a + n.to(tl.int64)[:, None] * M + m[None, :], b + k.to(tl.int64)[:, None] * M + m[None, :]
    for i in tl.range(first, last, num_stages=STAGES):
        a_tile = tl.load(a_rows + i * 128, mask=in_n[:, None], other=0.0)
        b_tile = tl.load(b_rows + i * 128, mask=in_k[:, None], other=0.0)
        a_scale = tl.load(sa + i * stride_sa + n, mask=in_n, other=0.0)
        b_scale = tl.load(sb + i * stride_sb + k, mask=in_k, other=0.0)
        acc += tl.dot(a_tile, tl.trans(b_tile)) * a_scale[:, None] * b_scale[None, :]
    to = c + (e.to(tl.int64) * N + n)[:, None] * K + k[None, :]
    tl.store(to, acc.to(c.dtype.element_ty), mask=in_n[:, None] & in_k[None, :])


def weight_gradient(a: Quantised, b: Quantised, tile_ends: Tensor, dtype: torch.dtype) -> Tensor:
    """a [N, M] and b [K, M] in tiles along M, where expert e has the tiles tile_ends[e - 1] .. tile_ends[e] - 1 (int32 [E])
    -> [E, N, K]: each expert's a b^T over its own tiles."""
    (a_codes, a_scale), (b_codes, b_scale) = a, b
    (N, M), K, E = a_codes.shape, len(b_codes), len(tile_ends)
    assert a_codes.is_contiguous() and b_codes.is_contiguous() and M % TILE == 0
    out = torch.empty(E, N, K, dtype=dtype, device=a_codes.device)
    _weight_gradient_kernel[(triton.cdiv(N, TILE) * triton.cdiv(K, TILE), E)](
        a_codes, a_scale, b_codes, b_scale, out, tile_ends, N, K, M, a_scale.stride(1), b_scale.stride(1),
        BLOCK_N=TILE, BLOCK_K=TILE, STAGES=3, num_warps=8,
    )  # fmt: skip
    return out
