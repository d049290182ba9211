"""Quantising for FP8 training in Triton: one pass over memory, whatever comes out of it.

A program takes a tile of 128 x 128 numbers. From it come 1 x 128 tiles along the rows (for a product over channels), 1 x 128
tiles along the columns, written transposed (for the gradient of a weight, a product over tokens, because the matrix units
want FP8 operands contiguous along the sum), or one block of 128 x 128, as it lies and transposed (for a weight's two
products). What is read may itself be FP8 tiles: that is how kept activations are turned.

Scales of tiles lie with their rows contiguous ([M, G] of strides (1, M)), as cuBLAS wants them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
Quantised = tuple[Tensor, Tensor]


@triton.jit
def _over(value, divisor, inverse, ROUND: tl.constexpr):
    """The rounded quotient. A division for each number would cost more than the memory it comes from: a product with the
    divisor's inverse, itself rounded, and a step of correction (Markstein) are a division wherever the remainder is not
    below the smallest number. ROUND: Triton's interpreter, whose fused product rounds twice, divides."""
    if ROUND:
        quotient = tl.div_rn(value, divisor)
    else:
        near = value * inverse
        quotient = tl.fma(tl.fma(-near, divisor, value), inverse, near)
    return quotient


@triton.jit
def _scale(largest, POWER: tl.constexpr, ROUND: tl.constexpr):
    """`ops.fp8._scale` to the bit: the largest magnitude over 448, 1 where all is zero; rounded up to a power of two."""
    most = tl.full(largest.shape, 448.0, tl.float32)
    part = _over(largest, most, tl.full(largest.shape, 1 / 448, tl.float32), ROUND)
    part = tl.where(largest == float("inf"), largest, part)  # whose correction is not a number, and would not be seen
    scale = tl.where(largest > 0, tl.maximum(part, 1.1754943508222875e-38), 1.0)
    if POWER:
        bits = scale.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _codes(value, scale, POWER: tl.constexpr, ROUND: tl.constexpr):
    """value / scale, which conversion to E4M3 then takes as it is (it saturates). POWER: scale is a power of two. ROUND: by
    arithmetic, for Triton's interpreter, whose own conversion is wrong where a carry reaches the exponent (3.8): to three
    bits of mantissa, ties to even, below 2^-6 to steps of 2^-9."""
    wide = tl.broadcast_to(scale, value.shape)
    if ROUND:
        scaled = tl.minimum(tl.maximum(tl.div_rn(value, wide), -448.0), 448.0)
        bits = scaled.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (scaled * 512.0 + 12582912.0 - 12582912.0) / 512.0
        scaled = tl.where(tl.abs(scaled) < 0.015625, small, normal)
    elif POWER:
        scaled = value * (0x7F000000 - wide.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        scaled = _over(value, wide, tl.broadcast_to(inverse, value.shape), False)
    return scaled


@triton.jit
def _tile_kernel(
    x, x_scale, codes, scales, codes_t, scales_t, M, K, stride_x, stride_xs,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POWER: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    mb, kb = tl.program_id(0), tl.program_id(1)
    m, k = mb * 128 + tl.arange(0, 128), kb * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (k < K)[None, :]
    m64, k64 = m.to(tl.int64), k.to(tl.int64)
    value = tl.load(x + m64[:, None] * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(x_scale + kb * stride_xs + m, mask=m < M, other=0.0)[:, None]
    if ROWS:
        scale = _scale(tl.max(tl.abs(value), 1), POWER, ROUND)
        tl.store(
            codes + m64[:, None] * K + k[None, :],
            _codes(value, scale[:, None], POWER, ROUND).to(codes.dtype.element_ty),
            mask=inside,
        )
        tl.store(scales + kb * M + m, scale, mask=m < M)
    if COLUMNS:
        scale = _scale(tl.max(tl.abs(value), 0), POWER, ROUND)
        turned = tl.trans(_codes(value, scale[None, :], POWER, ROUND).to(codes_t.dtype.element_ty))
        tl.store(codes_t + k64[:, None] * M + m[None, :], turned, mask=(k < K)[:, None] & (m < M)[None, :])
        tl.store(scales_t + mb * K + k, scale, mask=k < K)


def _empty(M: int, K: int, device: torch.device) -> Quantised:
    """Codes [M, K] and scales [M, ceil(K/128)] with rows contiguous."""
    codes = torch.empty(M, K, dtype=E4M3, device=device)
    return codes, torch.empty(triton.cdiv(K, TILE), M, dtype=torch.float32, device=device).T


def _launch_tiles(
    source: Tensor, x_scale: Tensor | None, along: Quantised, across: Quantised, rows: bool, columns: bool, power: bool
) -> None:
    M, K = source.shape
    _tile_kernel[(triton.cdiv(M, TILE), triton.cdiv(K, TILE))](
        source, source if x_scale is None else x_scale, *along, *across, M, K, source.stride(0),
        0 if x_scale is None else x_scale.stride(1), SCALED=x_scale is not None, ROWS=rows, COLUMNS=columns,
        POWER=power, ROUND=not source.is_cuda, num_warps=8,
    )  # fmt: skip


def tiles(
    x: Tensor | Quantised, rows: bool, columns: bool, power: bool, launch: Callable[..., None] = _launch_tiles
) -> tuple[Quantised | None, Quantised | None]:
    """x [M, K] of any float dtype, or in tiles along K -> tiles along K, and of the transpose [K, M] along M, as asked.
    launch: of another kernel for the same."""
    source, x_scale = x if isinstance(x, tuple) else (x, None)
    (M, K), device = source.shape, source.device
    assert source.stride(1) == 1 and (x_scale is None or x_scale.stride(0) == 1)
    along, across = _empty(M, K, device) if rows else None, _empty(K, M, device) if columns else None
    if M:  # in the interpreter a pointer has to be one, also where it is not used
        launch(source, x_scale, along or (source, source), across or (source, source), rows, columns, power)
    return along, across


@triton.jit
def _block_kernel(w, codes, codes_t, scales, N, K, stride_we, GN, GK, ROUND: tl.constexpr):
    nb, kb, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, k = nb * 128 + tl.arange(0, 128), kb * 128 + tl.arange(0, 128)
    inside = (n < N)[:, None] & (k < K)[None, :]
    n64, k64 = n.to(tl.int64), k.to(tl.int64)
    value = tl.load(w + e * stride_we + n64[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    # The largest of the block once for each row and once for each column, and codes from either: on an H200 with Triton 3.6
    # every form that was tried here with one computation for both was wrong in some shape. Why is not known.
    rows = tl.max(tl.abs(value), 1)
    scale = _scale(tl.max(tl.broadcast_to(rows[None, :], (128, 128)), 1), False, ROUND)
    code = _codes(value, scale[:, None], False, ROUND).to(codes.dtype.element_ty)
    tl.store(codes + e * N * K + n64[:, None] * K + k[None, :], code, mask=inside)
    again = _scale(tl.max(tl.broadcast_to(rows[:, None], (128, 128)), 0), False, ROUND)
    turned = tl.trans(_codes(value, again[None, :], False, ROUND).to(codes.dtype.element_ty))
    where = codes_t + e * N * K + k64[:, None] * N + n[None, :]
    tl.store(where, turned, mask=(k < K)[:, None] & (n < N)[None, :])
    one = tl.arange(0, 128)
    tl.store(scales + (e * GN + nb) * GK + kb + one, scale, mask=one == 0)


def _launch_blocks(stack: Tensor, codes: Tensor, codes_t: Tensor, scales: Tensor) -> None:
    E, N, K = stack.shape
    _block_kernel[(*scales.shape[1:], E)](
        stack, codes, codes_t, scales, N, K, stack.stride(0), *scales.shape[1:], ROUND=not stack.is_cuda, num_warps=8
    )


def blocks(weight: Tensor, launch: Callable[..., None] = _launch_blocks) -> tuple[Quantised, Quantised]:
    """A weight [N, K], or a stack of them [E, N, K], in blocks of 128 x 128, and its transpose in the same codes. launch: of
    another kernel for the same."""
    stack = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    assert stack.is_contiguous()
    E, N, K = stack.shape
    codes = torch.empty(E, N, K, dtype=E4M3, device=weight.device)
    codes_t = torch.empty(E, K, N, dtype=E4M3, device=weight.device)
    scales = torch.empty(E, triton.cdiv(N, TILE), triton.cdiv(K, TILE), dtype=torch.float32, device=weight.device)
    launch(stack, codes, codes_t, scales)
    plain, turned = (codes, scales), (codes_t, scales.mT)
    if weight.dim() == 2:
        return (codes[0], scales[0]), (codes_t[0], scales[0].mT)
    return plain, turned


@triton.jit
def _swiglu_backward_kernel(
    gate, gate_scale, up, up_scale, dh, h, dgate, dup, M, F, stride_in, stride_out, ROWS: tl.constexpr
):
    m, f = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (f < F)[None, :]
    row, column = m.to(tl.int64)[:, None], f[None, :]
    at = tl.program_id(1) * M + m
    g = tl.load(gate + row * stride_in + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_in + column, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(gate_scale + at, mask=m < M, other=0.0)[:, None]
    u *= tl.load(up_scale + at, mask=m < M, other=0.0)[:, None]
    d = tl.load(dh + row * F + column, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(h + row * F + column, (g * s * u).to(h.dtype.element_ty), mask=inside)
    tl.store(
        dgate + row * stride_out + column, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside
    )
    tl.store(dup + row * stride_out + column, (d * g * s).to(dup.dtype.element_ty), mask=inside)


def swiglu_backward(gate: Quantised, up: Quantised, dh_MF: Tensor) -> tuple[Tensor, Tensor]:
    """From gate and up in tiles [M, F] and the gradient of h = silu(gate) up: h again, and the gradient of gate and up side
    by side [M, 2F], both in dh's dtype."""
    (M, F), dtype = dh_MF.shape, dh_MF.dtype
    assert dh_MF.is_contiguous() and gate[0].stride() == up[0].stride() and gate[1].stride(0) == up[1].stride(0) == 1
    h, dgu = torch.empty_like(dh_MF), torch.empty(M, 2 * F, dtype=dtype, device=dh_MF.device)
    if M:
        _swiglu_backward_kernel[(triton.cdiv(M, 16), triton.cdiv(F, TILE))](
            *gate, *up, dh_MF, h, dgu, dgu[:, F:], M, F, gate[0].stride(0), 2 * F, ROWS=16, num_warps=4
        )
    return h, dgu


@triton.jit
def _e5m6_kernel(x, out, M, K, stride_x, ROWS: tl.constexpr):
    m, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (m < M)[:, None] & (k < K)[None, :]
    row = m.to(tl.int64)[:, None]
    value = tl.load(x + row * stride_x + k[None, :], mask=inside, other=0.0).to(tl.float32)
    # Biased exponents of 2^e <= |x| < 2^(e + 1); the smallest normal number's for what lies below it.
    top = tl.maximum((tl.max(tl.abs(value), 1).to(tl.int32, bitcast=True) >> 23) & 255, 37)[:, None]
    mine = (value.to(tl.int32, bitcast=True) >> 23) & 255
    step = ((tl.maximum(mine, top - 29) - 6) << 23).to(tl.float32, bitcast=True)
    largest = (127 * ((top - 6) << 23).to(tl.float32, bitcast=True)).to(tl.float32)
    rounded = (tl.div_rn(value, step) + 12582912.0 - 12582912.0) * step
    rounded = tl.minimum(tl.maximum(rounded, -largest), largest)
    tl.store(out + row * K + k[None, :], rounded.to(out.dtype.element_ty), mask=inside)


def round_e5m6(x: Tensor) -> Tensor:
    """`ops.fp8_train.round_e5m6` of a matrix [M, K] in one pass; the same to the bit where a tile's largest magnitude is
    above 2^-90."""
    M, K = x.shape
    out = torch.empty(M, K, dtype=torch.bfloat16, device=x.device)
    if M:
        _e5m6_kernel[(triton.cdiv(M, 16), triton.cdiv(K, TILE))](x, out, M, K, x.stride(0), ROWS=16, num_warps=4)
    return out
