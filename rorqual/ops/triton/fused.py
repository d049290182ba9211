"""Small operations as one kernel each: what a decoding step on a GPU would otherwise spend dozens of launches on.

Inference only (no gradients). Each repeats the arithmetic of its reference (`ops.rms_norm`, `ops.rope`, `ops.router`,
`model.mla.MLA.latents`), roundings included; tests compare them on random inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton.overlap import begin, options


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
    begin()
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
        rows, weight, out, width, eps, rows.stride(0), BLOCK=block, num_warps=4 if block <= 2048 else 8, **options()
    )
    return out.view(x.shape)


@triton.jit
def _swiglu_kernel(gate, up, out, width, stride_g, stride_u, BLOCK: tl.constexpr):
    begin()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * stride_g + at, mask=at < width, other=0.0)
    u = tl.load(up + row * stride_u + at, mask=at < width, other=0.0)
    g32 = g.to(tl.float32)
    tl.store(out + row * width + at, (g32 / (1.0 + tl.exp(-g32))).to(g.dtype) * u, mask=at < width)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one kernel, [..., F] each with F contiguous (halves of one tensor, say)."""
    width = gate.shape[-1]
    g, u = gate.reshape(-1, width), up.reshape(-1, width)
    out = torch.empty(g.shape, dtype=gate.dtype, device=gate.device)
    if len(g):
        block = min(1024, triton.next_power_of_2(width))
        _swiglu_kernel[(len(g), triton.cdiv(width, block))](
            g, u, out, width, g.stride(0), u.stride(0), BLOCK=block, num_warps=4, **options()
        )
    return out.view(gate.shape)


@triton.jit
def _latents_kernel(
    kv, weight, cos, sin, pages, slots, eps, stride_kv, stride_angle, stride_slot,
    C: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    begin()
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
        C=C, HALF=half, BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(half), num_warps=1, **options(),
    )  # fmt: skip


@triton.jit
def _rotate_kernel(q, cos, sin, stride_q, stride_angle, H, N: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr,
                   BLOCK_R: tl.constexpr):  # fmt: skip
    begin()
    n = tl.program_id(0).to(tl.int64)
    h, pair = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_R)
    inside = (h < H)[:, None] & (pair < R // 2)[None, :]
    at = q + n * stride_q + (h * (N + R) + N)[:, None] + 2 * pair[None, :]
    even = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(cos + n * stride_angle + pair, mask=pair < R // 2, other=0.0)[None, :]
    b = tl.load(sin + n * stride_angle + pair, mask=pair < R // 2, other=0.0)[None, :]
    tl.store(at, (even * a - odd * b).to(q.dtype.element_ty), mask=inside)
    tl.store(at + 1, (odd * a + even * b).to(q.dtype.element_ty), mask=inside)


def rotate_queries_(q_NX: Tensor, cos_NR: Tensor, sin_NR: Tensor, heads: int) -> Tensor:
    """The rotary part of each head of q [N, H * (nope + R)] rotated by its token's angles (`ops.rope.rotate`), in place."""
    R = 2 * cos_NR.shape[-1]
    nope = q_NX.shape[1] // heads - R
    block = min(16, triton.next_power_of_2(heads))
    _rotate_kernel[(len(q_NX), triton.cdiv(heads, block))](
        q_NX, cos_NR, sin_NR, q_NX.stride(0), cos_NR.stride(0), heads, N=nope, R=R, BLOCK_H=block,
        BLOCK_R=triton.next_power_of_2(R // 2), num_warps=2, **options(),
    )  # fmt: skip
    return q_NX


@triton.jit
def _keys_kernel(kv, rope, k, H, stride_kv, stride_rope, NU: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
                 BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    to = k + ((s * H + h) * (N + R))[:, None]
    inside = (h < H)[:, None] & (n < N)[None, :]
    tl.store(to + n[None, :], tl.load(kv + s * stride_kv + (h * NU)[:, None] + n[None, :], mask=inside), mask=inside)
    shared = tl.load(rope + s * stride_rope + r, mask=r < R, other=0.0)
    tl.store(
        to + N + r[None, :],
        shared[None, :] + tl.zeros((BLOCK_H, 1), shared.dtype),
        mask=(h < H)[:, None] & (r < R)[None, :],
    )


def expanded_keys(kv_SHX: Tensor, k_rope_SR: Tensor, nope: int) -> Tensor:
    """Every head's key: the first `nope` numbers of kv [S, H, N + U], then the rotary key [S, R] shared by all heads
    -> [S, H, N + R]."""
    (S, H, X), R = kv_SHX.shape, k_rope_SR.shape[1]
    assert kv_SHX.stride(1) == X and kv_SHX.stride(2) == k_rope_SR.stride(1) == 1
    k = torch.empty(S, H, nope + R, dtype=kv_SHX.dtype, device=kv_SHX.device)
    block = min(16, triton.next_power_of_2(H))
    _keys_kernel[(S, triton.cdiv(H, block))](
        kv_SHX, k_rope_SR, k, H, kv_SHX.stride(0), k_rope_SR.stride(0), NU=X, N=nope, R=R, BLOCK_H=block,
        BLOCK_N=triton.next_power_of_2(nope), BLOCK_R=triton.next_power_of_2(R), num_warps=4,
    )  # fmt: skip
    return k


@triton.jit
def _route_kernel(
    logits, bias, gates, chosen, scores, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, KEPT: tl.constexpr, K: tl.constexpr,
    NORMALISE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    begin()
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
        num_warps=1, **options(),
    )  # fmt: skip
    return gates, chosen, scores
