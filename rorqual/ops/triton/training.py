"""Small operations of a training step, forward and backward, one kernel each (`ops.training` makes gradients of them).

What a step does between its matrix products moves memory and nothing else, so each kernel reads its inputs once and writes
its outputs once; what a backward can compute again from its inputs (a norm's factor, a SwiGLU) is not kept. Gradients of
norm weights are summed by each program over its own rows and then over programs, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 132 * 8
"""That a loop over rows is spread over: eight for each multiprocessor of an H100."""


def _strips(rows: int) -> tuple[int, int]:
    """(programs, rows of each)."""
    per = max(1, triton.cdiv(rows, PROGRAMS))
    return triton.cdiv(rows, per), per


@triton.jit
def _normed_grad(x, dy, w, width, eps):
    """(gradient of the row, normed row times dy) of a row in fp32; dy and w are 0 beyond its end."""
    r = tl.rsqrt(tl.sum(x * x) / width + eps)
    normed = x * r
    g = dy * w
    return r * (g - normed * (tl.sum(g * normed) / width)), normed


@triton.jit
def _norm_backward_kernel(
    x, weight, dy, add, dx, dw, rows, width, eps, per, stride_x, stride_dy, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * per
    for i in range(first, tl.minimum(first + per, rows)):
        row = tl.cast(i, tl.int64)
        x0 = tl.load(x + row * stride_x + at, mask=inside, other=0.0)
        dy0 = tl.load(dy + row * stride_dy + at, mask=inside, other=0.0).to(tl.float32)
        grad, normed = _normed_grad(x0.to(tl.float32), dy0, w, width, eps)
        acc += dy0 * normed.to(x0.dtype).to(tl.float32)
        if ADD:
            grad += tl.load(add + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * width + at, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * width + at, acc, mask=inside)


def norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of `ops.rms_norm`, x and dy [M, D]: (dx in x's dtype, plus add [M, D] where given; dw fp32)."""
    rows, width = x.shape
    programs, per = _strips(rows)
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _norm_backward_kernel[(programs,)](
        x, weight, dy, add, dx, dw, rows, width, eps, per, x.stride(0), dy.stride(0), ADD=add is not None, BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return dx, dw.sum(0)


@triton.jit
def _swiglu_backward_kernel(
    gate, up, dh, dgate, dup, width, stride_g, stride_u, stride_h, stride_d, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * stride_g + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * stride_h + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dgate + row * stride_d + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * stride_d + at, (d * g * s).to(dup.dtype.element_ty), mask=inside)


def swiglu_backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) * up, all [M, F] with F contiguous."""
    rows, width = gate.shape
    dgate, dup = torch.empty(2, rows, width, dtype=gate.dtype, device=gate.device)
    if rows:
        block = min(1024, triton.next_power_of_2(width))
        _swiglu_backward_kernel[(rows, triton.cdiv(width, block))](
            gate, up, dh, dgate, dup, width, gate.stride(0), up.stride(0), dh.stride(0), width, BLOCK=block, num_warps=4
        )
    return dgate, dup


@triton.jit
def _turn(even, odd, a, b, BACK: tl.constexpr):
    """A pair by its angle, or back by it."""
    if BACK:
        return even * a + odd * b, odd * a - even * b
    return even * a - odd * b, odd * a + even * b


@triton.jit
def _rotate_kernel(
    q,
    cos,
    sin,
    T,
    H,
    N: tl.constexpr,
    R: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    h, r, pair = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, 2 * BLOCK_R), tl.arange(0, BLOCK_R)
    inside = (h < H)[:, None] & (r < R)[None, :]
    at = q + (n * H + h)[:, None] * (N + R) + N + r[None, :]
    even, odd = tl.split(tl.load(at, mask=inside, other=0.0).to(tl.float32).reshape(BLOCK_H, BLOCK_R, 2))
    a = tl.load(cos + n % T * (R // 2) + pair, mask=pair < R // 2, other=0.0)[None, :]
    b = tl.load(sin + n % T * (R // 2) + pair, mask=pair < R // 2, other=0.0)[None, :]
    first, second = _turn(even, odd, a, b, BACK)
    turned = tl.join(first, second).reshape(BLOCK_H, 2 * BLOCK_R)
    tl.store(at, turned.to(q.dtype.element_ty), mask=inside)


def rotate_queries_(q_NX: Tensor, cos_TR: Tensor, sin_TR: Tensor, heads: int, back: bool) -> None:
    """The rotary part of each head of q [N, H * (nope + R)], contiguous, turned in place by its token's angles
    (`ops.rope.rotate`), or back. Row n is token n % T; cos and sin [T, R/2] fp32, contiguous."""
    R = 2 * cos_TR.shape[-1]
    assert q_NX.is_contiguous()
    block = min(16, triton.next_power_of_2(heads))
    _rotate_kernel[(len(q_NX), triton.cdiv(heads, block))](
        q_NX, cos_TR, sin_TR, len(cos_TR), heads, N=q_NX.shape[1] // heads - R, R=R, BACK=back, BLOCK_H=block,
        BLOCK_R=triton.next_power_of_2(R // 2), num_warps=2,
    )  # fmt: skip


@triton.jit
def _latent_kernel(
    kv, weight, cos, sin, c_kv, k_rope, T, eps, C: tl.constexpr, HALF: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at, pair = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    inside, real = at < C, pair < HALF
    row = kv + n * (C + 2 * HALF)
    x = tl.load(row + at, mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32) / C + eps)).to(x.dtype)
    scaled = normed * tl.load(weight + at, mask=inside, other=0.0).to(x.dtype)
    tl.store(c_kv + n * C + at, scaled.to(x.dtype), mask=inside)
    even = tl.load(row + C + 2 * pair, mask=real, other=0.0).to(tl.float32)
    odd = tl.load(row + C + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
    a = tl.load(cos + n % T * HALF + pair, mask=real, other=0.0)
    b = tl.load(sin + n % T * HALF + pair, mask=real, other=0.0)
    first, second = _turn(even, odd, a, b, False)
    tl.store(k_rope + n * 2 * HALF + 2 * pair, first.to(x.dtype), mask=real)
    tl.store(k_rope + n * 2 * HALF + 2 * pair + 1, second.to(x.dtype), mask=real)


def latent(kv_NX: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """What `model.mla.MLA.latent` joins: the normed latent [N, C] and the rotated shared key [N, R]; kv contiguous."""
    C, half = len(weight_C), cos_TR.shape[-1]
    c_kv = torch.empty(len(kv_NX), C, dtype=kv_NX.dtype, device=kv_NX.device)
    k_rope = torch.empty(len(kv_NX), 2 * half, dtype=kv_NX.dtype, device=kv_NX.device)
    _latent_kernel[(len(kv_NX),)](
        kv_NX, weight_C, cos_TR, sin_TR, c_kv, k_rope, len(cos_TR), eps, C=C, HALF=half,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip
    return c_kv, k_rope


@triton.jit
def _latent_backward_kernel(
    kv, weight, cos, sin, dc, dk, dkv, dw, rows, T, eps, per, C: tl.constexpr, HALF: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    at, pair = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    inside, real = at < C, pair < HALF
    w = tl.load(weight + at, mask=inside, other=0.0).to(kv.dtype.element_ty).to(tl.float32)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(0) * per
    for i in range(first, tl.minimum(first + per, rows)):
        n = tl.cast(i, tl.int64)
        x0 = tl.load(kv + n * (C + 2 * HALF) + at, mask=inside, other=0.0)
        dy = tl.load(dc + n * C + at, mask=inside, other=0.0).to(tl.float32)
        grad, normed = _normed_grad(x0.to(tl.float32), dy, w, C, eps)
        acc += dy * normed.to(x0.dtype).to(tl.float32)
        to = dkv + n * (C + 2 * HALF)
        tl.store(to + at, grad.to(x0.dtype), mask=inside)
        even = tl.load(dk + n * 2 * HALF + 2 * pair, mask=real, other=0.0).to(tl.float32)
        odd = tl.load(dk + n * 2 * HALF + 2 * pair + 1, mask=real, other=0.0).to(tl.float32)
        a = tl.load(cos + n % T * HALF + pair, mask=real, other=0.0)
        b = tl.load(sin + n % T * HALF + pair, mask=real, other=0.0)
        left, right = _turn(even, odd, a, b, True)
        tl.store(to + C + 2 * pair, left.to(x0.dtype), mask=real)
        tl.store(to + C + 2 * pair + 1, right.to(x0.dtype), mask=real)
    tl.store(dw + tl.program_id(0) * C + at, acc, mask=inside)


def latent_backward(
    kv_NX: Tensor, weight_C: Tensor, eps: float, cos_TR: Tensor, sin_TR: Tensor, dc_NC: Tensor, dk_NR: Tensor
) -> tuple[Tensor, Tensor]:
    """Of `latent`: (dkv [N, C + R], dw fp32), from contiguous gradients."""
    rows, C, half = len(kv_NX), len(weight_C), cos_TR.shape[-1]
    programs, per = _strips(rows)
    dkv = torch.empty_like(kv_NX)
    dw = torch.empty(programs, C, dtype=torch.float32, device=kv_NX.device)
    _latent_backward_kernel[(programs,)](
        kv_NX, weight_C, cos_TR, sin_TR, dc_NC, dk_NR, dkv, dw, rows, len(cos_TR), eps, per, C=C, HALF=half,
        BLOCK_C=triton.next_power_of_2(C), BLOCK_R=triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip
    return dkv, dw.sum(0)


@triton.jit
def _keys_backward_kernel(
    dk, dv, dkv, drope, H, stride_kn, stride_kh, stride_vn, stride_vh,
    N: tl.constexpr, R: tl.constexpr, U: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    nope, r, u = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_U)
    acc = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        mine = (h < H)[:, None]
        keys, to = dk + n * stride_kn + h[:, None] * stride_kh, dkv + (n * H + h)[:, None] * (N + U)
        rope = tl.load(keys + N + r[None, :], mask=mine & (r < R)[None, :], other=0.0)
        acc += tl.sum(rope.to(tl.float32), 0)
        in_n, in_u = mine & (nope < N)[None, :], mine & (u < U)[None, :]
        tl.store(to + nope[None, :], tl.load(keys + nope[None, :], mask=in_n, other=0.0), mask=in_n)
        values = dv + n * stride_vn + h[:, None] * stride_vh + u[None, :]
        tl.store(to + N + u[None, :], tl.load(values, mask=in_u, other=0.0), mask=in_u)
    tl.store(drope + n * R + r, acc.to(drope.dtype.element_ty), mask=r < R)


def keys_backward(dk_SHX: Tensor, dv_SHU: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Of `ops.triton.fused.expanded_keys` and the values beside: gradients of kv [S, H, nope + U] and of the shared rotary
    key [S, R], summed over heads in fp32."""
    (S, H, X), U = dk_SHX.shape, dv_SHU.shape[2]
    assert dk_SHX.stride(2) == dv_SHU.stride(2) == 1
    dkv = torch.empty(S, H, nope + U, dtype=dk_SHX.dtype, device=dk_SHX.device)
    drope = torch.empty(S, X - nope, dtype=dk_SHX.dtype, device=dk_SHX.device)
    _keys_backward_kernel[(S,)](
        dk_SHX, dv_SHU, dkv, drope, H, dk_SHX.stride(0), dk_SHX.stride(1), dv_SHU.stride(0), dv_SHU.stride(1),
        N=nope, R=X - nope, U=U, BLOCK_H=min(16, triton.next_power_of_2(H)), BLOCK_N=triton.next_power_of_2(nope),
        BLOCK_R=triton.next_power_of_2(X - nope), BLOCK_U=triton.next_power_of_2(U), num_warps=4,
    )  # fmt: skip
    return dkv, drope
