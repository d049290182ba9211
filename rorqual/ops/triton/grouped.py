"""What stands between the grouped products of routed experts in training: rows to experts, SwiGLU and its gradient with the
gates' among it, and rows back to tokens (`ops.triton.experts.combine`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gather_kernel(x, slot, out, stride_x, M, K, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    at = tl.load(slot + m, mask=m < M, other=-1).to(tl.int64)[:, None]
    rows = tl.load(x + tl.maximum(at, 0) // K * stride_x + d, mask=(d < D) & (at >= 0), other=0)
    tl.store(out + m[:, None] * D + d, rows, mask=(d < D) & (m < M)[:, None])


def gather_rows(x_ND: Tensor, slot_M: Tensor, top_k: int) -> Tensor:
    """The row of each place's token: [M, D]; zeros where a place has no slot (-1)."""
    M, D = len(slot_M), x_ND.shape[1]
    assert x_ND.stride(1) == 1
    out = torch.empty(M, D, dtype=x_ND.dtype, device=x_ND.device)
    if M:
        block = min(1024, triton.next_power_of_2(D))
        _gather_kernel[(triton.cdiv(M, 4), triton.cdiv(D, block))](
            x_ND, slot_M, out, x_ND.stride(0), M, top_k, D, ROWS=4, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _gated_backward_kernel(gu, dh, slot, gates, dgu, hg, dgates, F: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    inside = f < F
    at = tl.load(slot + m).to(tl.int64)
    gate = tl.load(gates + at)
    g0 = tl.load(gu + m * 2 * F + f, mask=inside, other=0.0)
    u = tl.load(gu + m * 2 * F + F + f, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + m * F + f, mask=inside, other=0.0).to(tl.float32)
    g = g0.to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    h = ((g * s).to(g0.dtype).to(tl.float32) * u).to(g0.dtype).to(tl.float32)  # as the forward rounded it
    tl.store(dgates + at, tl.sum(d * h))
    tl.store(hg + m * F + f, (gate * h).to(hg.dtype.element_ty), mask=inside)
    d *= gate
    tl.store(dgu + m * 2 * F + f, (d * u * s * (1.0 + g * (1.0 - s))).to(dgu.dtype.element_ty), mask=inside)
    tl.store(dgu + m * 2 * F + F + f, (d * g * s).to(dgu.dtype.element_ty), mask=inside)


def gated_backward(gu_M2F: Tensor, dh_MF: Tensor, slot_M: Tensor, gates_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From gate and up as projected and dh = d out W_down *before* the gates: (gradient of gate and up [M, 2F], h times its
    gate [M, F], which W_down's gradient needs, and the gradient of the gates [N, K])."""
    M, F = dh_MF.shape
    dgu, hg = torch.empty_like(gu_M2F), torch.empty_like(dh_MF)
    dgates = torch.empty_like(gates_NK)
    if M:
        block = triton.next_power_of_2(F)
        _gated_backward_kernel[(M,)](
            gu_M2F, dh_MF, slot_M, gates_NK, dgu, hg, dgates, F=F, BLOCK=block, num_warps=4 if block <= 2048 else 8
        )
    return dgu, hg, dgates


@triton.jit
def _gate_rows_kernel(dout, y, slot, gates, dy, dgates, K, D, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    at = tl.load(slot + m).to(tl.int64)
    real = at >= 0
    gate = tl.load(gates + at, mask=real, other=0.0)
    dot = 0.0
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        grad = tl.load(dout + tl.maximum(at, 0) // K * D + d, mask=(d < D) & real, other=0.0).to(tl.float32)
        value = tl.load(y + m * D + d, mask=(d < D) & real, other=0.0).to(tl.float32)
        dot += tl.sum(grad * value)
        tl.store(dy + m * D + d, (gate * grad).to(dy.dtype.element_ty), mask=d < D)
    tl.store(dgates + at, dot, mask=real)


def gate_rows(dout_ND: Tensor, y_MD: Tensor, slot_M: Tensor, gates_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each place's row, dout of its token times its gate [M, D] (zeros where there is no slot), and of the
    gates [N, K]. dout and y contiguous."""
    dy, dgates = torch.empty_like(y_MD), torch.empty_like(gates_NK)
    M, D = y_MD.shape
    _gate_rows_kernel[(M,)](
        dout_ND, y_MD, slot_M, gates_NK, dy, dgates, gates_NK.shape[1], D, BLOCK=min(2048, triton.next_power_of_2(D)),
        num_warps=4,
    )  # fmt: skip
    return dy, dgates
