"""Small operations as one kernel each: what a decoding step on a GPU would otherwise spend dozens of launches on.

Inference only (no gradients). Each repeats the arithmetic of its reference (`ops.rms_norm`, `ops.rope`, `ops.router`,
`model.mla.MLA.latents`), roundings included; tests compare them on random inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(row, weight, width, eps, BLOCK: tl.constexpr):
    """The normed row, rounded as the reference rounds: before the weight."""
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(row + at, mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    normed = x32 * tl.rsqrt(tl.sum(x32 * x32) / width + eps)
    scaled = normed.to(x.dtype) * tl.load(weight + at, mask=inside, other=0.0).to(x.dtype)
    return scaled.to(x.dtype), at, inside


@triton.jit
def _rms_norm_kernel(x, weight, out, width, eps, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    value, at, inside = _norm(x + row * stride_x, weight, width, eps, BLOCK)
    tl.store(out + row * width + at, value, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm.rms_norm` in one kernel; x [..., D] with D contiguous."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(len(rows),)](
        rows, weight, out, width, eps, rows.stride(0), BLOCK=block, num_warps=4 if block <= 2048 else 8
    )
    return out.view(x.shape)


@triton.jit
def _latents_kernel(
    kv, weight, cos, sin, pages, slots, eps, stride_kv, stride_angle, stride_slot,
    C: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    to = pages + tl.load(slots + n).to(tl.int64) * stride_slot
    value, at, inside = _norm(kv + n * stride_kv, weight, C, eps, BLOCK_C)
    tl.store(to + at, value.to(pages.dtype.element_ty), mask=inside)
    pair = tl.arange(0, BLOCK_R)
    real = pair < HALF
    key = kv + n * stride_kv + C + 2 * pair
    even = tl.load(key, mask=real, other=0.0)
    odd = tl.load(key + 1, mask=real, other=0.0)
    c = tl.load(cos + n * stride_angle + pair, mask=real, other=0.0)
    s = tl.load(sin + n * stride_angle + pair, mask=real, other=0.0)
    e32, o32 = even.to(tl.float32), odd.to(tl.float32)
    first, second = (e32 * c - o32 * s).to(even.dtype), (o32 * c + e32 * s).to(even.dtype)
    tl.store(to + C + 2 * pair, first.to(pages.dtype.element_ty), mask=real)
    tl.store(to + C + 2 * pair + 1, second.to(pages.dtype.element_ty), mask=real)


def write_latents(
    kv_NX: Tensor, weight_C: Tensor, eps: float, cos_NR: Tensor, sin_NR: Tensor, pages_PSX: Tensor, slots_N: Tensor
) -> None:
    """Normed latents and rotated keys of new tokens into their slots: kv [N, C + R] as projected, cos and sin [N, R/2] fp32,
    pages [pages, page_size, C + R], slots [N] (page * page_size + place)."""
    n, half = len(kv_NX), cos_NR.shape[-1]
    C = weight_C.shape[0]
    _latents_kernel[(n,)](
        kv_NX, weight_C, cos_NR, sin_NR, pages_PSX, slots_N, eps, kv_NX.stride(0), cos_NR.stride(0), pages_PSX.stride(1),
        C=C, HALF=half, BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


@triton.jit
def _rotate_kernel(x, cos, sin, out, heads, stride_n, stride_h, stride_angle, HALF: tl.constexpr, BLOCK: tl.constexpr):
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    real = pair < HALF
    at = x + n * stride_n + h * stride_h + 2 * pair
    even, odd = tl.load(at, mask=real, other=0.0), tl.load(at + 1, mask=real, other=0.0)
    c = tl.load(cos + n * stride_angle + pair, mask=real, other=0.0)
    s = tl.load(sin + n * stride_angle + pair, mask=real, other=0.0)
    e32, o32 = even.to(tl.float32), odd.to(tl.float32)
    to = out + (n * heads + h) * 2 * HALF + 2 * pair
    tl.store(to, (e32 * c - o32 * s).to(even.dtype), mask=real)
    tl.store(to + 1, (o32 * c + e32 * s).to(even.dtype), mask=real)


def rotate_heads(x_NHR: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """`ops.rope.rotate` of every head [N, H, R] (R contiguous) by its token's angles, cos and sin [N, R/2] fp32."""
    n, heads, width = x_NHR.shape
    out = torch.empty((n, heads, width), dtype=x_NHR.dtype, device=x_NHR.device)
    half = width // 2
    _rotate_kernel[(n, heads)](
        x_NHR, cos_NR, sin_NR, out, heads, x_NHR.stride(0), x_NHR.stride(1), cos_NR.stride(0),
        HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _route_kernel(
    logits, bias, gates, chosen, scores, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    index = g[:, None] * PER + p[None, :]
    real = (g < GROUPS)[:, None] & (p < PER)[None, :]
    x = tl.load(logits + n * E + index, mask=real, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-x))
    tl.store(scores + n * E + index, score, mask=real)
    low = -float("inf")
    choice = tl.where(real, score + tl.load(bias + index, mask=real, other=0.0), low)
    if KEPT < GROUPS:
        best = tl.max(choice, 1)
        first = tl.argmax(choice, 1)
        second = tl.max(tl.where(p[None, :] == first[:, None], low, choice), 1)
        total = tl.where(g < GROUPS, best + second, low)
        kept = tl.zeros((BLOCK_G,), tl.int32)
        for _ in tl.static_range(KEPT):
            top = tl.argmax(total, 0)
            kept = tl.where(g == top, 1, kept)
            total = tl.where(g == top, low, total)
        choice = tl.where((kept == 1)[:, None], choice, low)
    norm = 0.0
    for k in tl.static_range(K):
        top = tl.max(tl.max(choice, 1), 0)
        at = tl.min(tl.min(tl.where((choice == top) & real, index, E), 1), 0)
        at = tl.minimum(at, E - 1)  # logits that are not numbers choose nobody: stay inside the table
        hit = index == at
        gate = tl.sum(tl.sum(tl.where(hit, score, 0.0), 1), 0)
        choice = tl.where(hit, low, choice)
        norm += gate
        tl.store(chosen + n * K + k, at.to(tl.int64))
        tl.store(gates + n * K + k, gate)
    for k in tl.static_range(K):
        gate = tl.load(gates + n * K + k)
        if NORMALISE:
            gate = gate / (norm + 1e-20)
        tl.store(gates + n * K + k, gate * scale)


def route(
    logits_NE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.router.route` in one kernel. Of equal affinities the lower expert is chosen; choices come in falling order."""
    n, experts = logits_NE.shape
    gates = torch.empty((n, top_k), dtype=torch.float32, device=logits_NE.device)
    chosen = torch.empty((n, top_k), dtype=torch.int64, device=logits_NE.device)
    scores = torch.empty((n, experts), dtype=torch.float32, device=logits_NE.device)
    per = experts // n_group
    _route_kernel[(n,)](
        logits_NE.contiguous(), bias_E, gates, chosen, scores, scale, E=experts, GROUPS=n_group, PER=per, KEPT=topk_group,
        K=top_k, NORMALISE=normalise, BLOCK_G=triton.next_power_of_2(n_group), BLOCK_P=triton.next_power_of_2(per),
        num_warps=1,
    )  # fmt: skip
    return gates, chosen, scores
