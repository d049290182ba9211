"""A decoding step's small operations around its attention as few launches: norms, absorbed queries, merged values.

With one or two dozen tokens a step every kernel reads its weights and multiplies almost nothing, and what a step waits for
is the number of kernels: a few microseconds each, whatever they do.

Inference only. The order of additions depends on shapes alone, never on the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton.overlap import begin, options


@triton.jit
def _add_norm_kernel(x, y, weight, total, out, width, eps, stride_x, stride_y, BLOCK: tl.constexpr):
    begin()
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x0 = tl.load(x + row * stride_x + at, mask=inside, other=0.0)
    y0 = tl.load(y + row * stride_y + at, mask=inside, other=0.0)
    both = (x0.to(tl.float32) + y0.to(tl.float32)).to(x0.dtype)
    tl.store(total + row * width + at, both, mask=inside)
    x32 = both.to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32) / width + eps)).to(x0.dtype)
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0).to(x0.dtype)
    tl.store(out + row * width + at, scaled.to(x0.dtype), mask=inside)


def add_norm(x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its `ops.rms_norm`, both [N, D] in x's dtype, in one launch."""
    N, D = x_ND.shape
    total, out = torch.empty(2, N, D, dtype=x_ND.dtype, device=x_ND.device)
    block = triton.next_power_of_2(D)
    _add_norm_kernel[(N,)](
        x_ND, y_ND, weight_D, total, out, D, eps, x_ND.stride(0), y_ND.stride(0),
        BLOCK=block, num_warps=4 if block <= 2048 else 8, **options(),
    )  # fmt: skip
    return total, out


@triton.jit
def _queries_kernel(
    q, w_uk, cos, sin, out, T, stride_q, stride_wh, stride_wn, stride_angle,
    H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C of one head's queries in the latent space, for TOKENS tokens; the first program of a head also rotates their
    rotary parts."""
    h = tl.program_id(1)
    n, c = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    pair = tl.arange(0, BLOCK_R)
    w = tl.load(
        w_uk + h * stride_wh + n[:, None] * stride_wn + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0
    ).to(tl.float32)
    begin()
    for i in tl.static_range(TOKENS):
        t = (tl.program_id(0) * TOKENS + i).to(tl.int64)
        there = t < T
        mine = q + t * stride_q + h * (N + R)
        to = out + (t * H + h) * (C + R)
        nope = tl.load(mine + n, mask=(n < N) & there, other=0.0)
        latent = tl.sum(nope.to(tl.float32)[:, None] * w, 0)
        tl.store(to + c, latent.to(out.dtype.element_ty), mask=(c < C) & there)
        if tl.program_id(2) == 0:
            real = (pair < R // 2) & there
            even = tl.load(mine + N + 2 * pair, mask=real, other=0.0).to(tl.float32)
            odd = tl.load(mine + N + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
            a = tl.load(cos + t * stride_angle + pair, mask=real, other=0.0)
            b = tl.load(sin + t * stride_angle + pair, mask=real, other=0.0)
            tl.store(to + C + 2 * pair, (even * a - odd * b).to(out.dtype.element_ty), mask=real)
            tl.store(to + C + 2 * pair + 1, (odd * a + even * b).to(out.dtype.element_ty), mask=real)


def together(tokens: int) -> int:
    """How many tokens share a program that holds a tile of weights: all processors busy first, then fewer reads."""
    return 1 if tokens <= 8 else 8


def absorbed_queries(q_NX: Tensor, w_uk_HNC: Tensor, cos_NR: Tensor, sin_NR: Tensor, rope_dim: int) -> Tensor:
    """Queries as projected [T, H * (N + R)] -> what attends to the latents, [T, H, C + R]: q_nope W_UK, and q_rope rotated
    by its token's angles (cos and sin [T, R/2] fp32). w_uk [H, N, C] may be a slice of kv_b."""
    T, (H, N, C) = len(q_NX), w_uk_HNC.shape
    assert q_NX.shape[1] == H * (N + rope_dim) and q_NX.stride(1) == w_uk_HNC.stride(2) == 1
    out = torch.empty(T, H, C + rope_dim, dtype=q_NX.dtype, device=q_NX.device)
    block_c, tokens = min(64, triton.next_power_of_2(C)), together(T)
    _queries_kernel[(triton.cdiv(T, tokens), H, triton.cdiv(C, block_c))](
        q_NX, w_uk_HNC, cos_NR, sin_NR, out, T, q_NX.stride(0), w_uk_HNC.stride(0), w_uk_HNC.stride(1), cos_NR.stride(0),
        H=H, N=N, R=rope_dim, C=C, TOKENS=tokens, BLOCK_N=triton.next_power_of_2(N),
        BLOCK_R=triton.next_power_of_2(rope_dim // 2), BLOCK_C=block_c, num_warps=4, **options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["width", "splits"])
def _values_kernel(
    part, lse, lengths, w_uv, out, width, splits, stride_wh, stride_wu,
    H: tl.constexpr, C: tl.constexpr, U: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, MERGED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One head of one row: the splits' parts merged, rounded as they would be stored, and BLOCK_U rows of W_UV applied."""
    begin()
    t, h = tl.program_id(0), tl.program_id(1)
    row = (t * H + h).to(tl.int64)
    c, s = tl.arange(0, BLOCK_C), tl.arange(0, MERGED)
    u = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    last = tl.cdiv(tl.minimum(tl.load(lengths + t).to(tl.int32), width * PAGE), SPLIT)
    largest, total = float("-inf"), 0.0
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, last, MERGED):
        at, there = row * splits + start + s, start + s < last
        lse_s = tl.load(lse + at, mask=there, other=float("-inf"))
        part_sc = tl.load(part + at[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        now = tl.maximum(largest, tl.max(lse_s, 0))
        fade, weight = tl.exp2(largest - now), tl.exp2(lse_s - now)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(part_sc * weight[:, None], 0)
        largest = now
    o = (acc / tl.where(total > 0, total, 1.0)).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(
        w_uv + h * stride_wh + u[:, None] * stride_wu + c[None, :], mask=(u < U)[:, None] & (c < C)[None, :], other=0.0
    )
    tl.store(out + row * U + u, tl.sum(w.to(tl.float32) * o[None, :], 1).to(out.dtype.element_ty), mask=u < U)


def merged_values(
    part: Tensor, lse: Tensor, lengths_N: Tensor, w_uv_HUC: Tensor, dtype: torch.dtype, keys: int, page: int, split: int,
    block: int | None = None,
) -> Tensor:  # fmt: skip
    """Attended latents in parts (`ops.triton.mla.parts`: [T, H, splits, C] and [T, H, splits], fp32) -> values [T, H, U].
    keys: how many the page table has room for. block: values of a program; None: by the number of rows."""
    (T, H, splits, C), U = part.shape, w_uv_HUC.shape[1]
    assert w_uv_HUC.shape == (H, U, C) and w_uv_HUC.stride(2) == 1
    out = torch.empty(T, H, U, dtype=dtype, device=part.device)
    block_u = min(block or (32 if T <= 8 else 64), triton.next_power_of_2(U))
    _values_kernel[(T, H, triton.cdiv(U, block_u))](
        part, lse, lengths_N, w_uv_HUC, out, keys // page, splits, w_uv_HUC.stride(0), w_uv_HUC.stride(1),
        H=H, C=C, U=U, PAGE=page, SPLIT=split, MERGED=8,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_U=block_u, num_warps=4, **options(),
    )  # fmt: skip
    return out


@triton.jit
def _best_kernel(logits, top, best, V, stride, BLOCK: tl.constexpr):
    begin()
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + n * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    unsound = (x != x) | (x == float("inf"))
    value = tl.max(tl.where(unsound, float("inf"), x), 0)
    place = n * tl.num_programs(1) + block
    tl.store(top + place, value)
    tl.store(best + place, tl.min(tl.where(x == value, at, V), 0))


@triton.jit
def _told_kernel(top, best, told, blocks, V, BLOCK: tl.constexpr):
    begin()
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(top + n * blocks + i, mask=i < blocks, other=float("-inf"))
    largest = tl.max(value, 0)
    index = tl.load(best + n * blocks + i, mask=i < blocks, other=V)
    first = tl.min(tl.where(value == largest, index, V), 0)
    sound = (largest < float("inf")) & (largest > float("-inf"))
    tl.store(told + n, tl.where(sound, first, -1).to(tl.int64))


def most_likely(logits_NV: Tensor) -> Tensor:
    """`ops.most_likely` in two launches; a row is cut into blocks, or few multiprocessors would read it."""
    (N, V), block = logits_NV.shape, 4096
    blocks = triton.cdiv(V, block)
    top = torch.empty(N, blocks, dtype=torch.float32, device=logits_NV.device)
    best = torch.empty(N, blocks, dtype=torch.int32, device=logits_NV.device)
    told = torch.empty(N, dtype=torch.int64, device=logits_NV.device)
    _best_kernel[(N, blocks)](logits_NV, top, best, V, logits_NV.stride(0), BLOCK=block, num_warps=8, **options())
    _told_kernel[(N,)](top, best, told, blocks, V, BLOCK=triton.next_power_of_2(blocks), num_warps=1, **options())
    return told
