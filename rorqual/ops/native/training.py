"""The kernels of a training step on a CPU (`training.cpp`), on tensors, with as many threads as torch uses."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.errors import BackendUnavailable
from rorqual.ops.native import build


@cache
def native_missing() -> str | None:
    """Why the kernels cannot run here, or None. The first call may compile them."""
    try:
        build.library()
    except BackendUnavailable as error:
        return str(error)
    return None


@cache
def _pool(threads: int) -> int:
    """Kept for the process: starting threads at every call would cost more than many a kernel."""
    pool: int = build.library().rq_pool_open(threads)
    return pool


def pool() -> int:
    return _pool(torch.get_num_threads())


if hasattr(os, "register_at_fork"):  # a forked child has the pool's memory and none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def takes(*tensors: Tensor) -> bool:
    """Whether these are what the kernels work on: fp32 in memory of a CPU, outside of a compiler's tracing."""
    ours = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and type(t) in (Tensor, nn.Parameter) for t in tensors
    )
    return ours and not torch.compiler.is_compiling() and native_missing() is None


@torch.library.custom_op("rorqual::attend", mutates_args=())
def attend_op(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, U] and the log-sum-exp of scores [B, H, T]. An operation that dispatches, so that selective
    recomputation can keep what it returns."""
    B, H, T, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(B, H, T)
    told = _told(scale, visible, lse, q=q, k=k, v=v, out=out)
    build.library().rq_attend(pool(), told, 0)
    return out, lse


class Attend(torch.autograd.Function):
    """`ops.attention.attend_reference` in fp32, with its gradients, for as many queries as keys and widths that are
    multiples of 16. Scores exist a block of queries at a time; keys that a block does not see cost nothing."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTX: Tensor, k_BHTX: Tensor, v_BHTU: Tensor, scale: float, visible_BTT: Tensor | None
    ) -> Tensor:
        q, k, v = (_rows(t) for t in (q_BHTX, k_BHTX, v_BHTU))
        B, _, T, _ = q.shape
        if visible_BTT is not None:
            visible_BTT = visible_BTT.bool().expand(B, T, T).contiguous()
        out, lse = attend_op(q, k, v, scale, visible_BTT)
        ctx.save_for_backward(q, k, v, out, lse, visible_BTT)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, visible = ctx.saved_tensors
        dq, dk, dv = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
        dout = _rows(grads[0])
        told = _told(ctx.scale, visible, lse, q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)
        build.library().rq_attend(pool(), told, 1)
        return dq, dk, dv, None, None


def attends(q_BHTX: Tensor, k_BHSX: Tensor, v_BHSU: Tensor, scale: float) -> bool:
    """Whether `Attend` can compute this."""
    fits = q_BHTX.shape == k_BHSX.shape and k_BHSX.shape[:3] == v_BHSU.shape[:3] and scale > 0
    panels = q_BHTX.shape[-1] % build.PANEL == 0 == v_BHSU.shape[-1] % build.PANEL
    return fits and panels and takes(q_BHTX, k_BHSX, v_BHSU)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _told(scale: float, visible: Tensor | None, lse: Tensor, **heads: Tensor) -> build.Attention:
    """What a call is told; keeps the tensors alive."""
    told = build.Attention(lse=lse.data_ptr(), visible=None if visible is None else visible.data_ptr(), scale=scale)
    for name, x in heads.items():
        setattr(told, name, build.Heads(x.data_ptr(), *x.stride()[:3]))
    told.B, told.H, told.T, told.X = heads["q"].shape
    told.U = heads["v"].shape[-1]
    told.kept = visible, lse, heads
    return told


def loss_and_slope_(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Losses [N], fp32: weight * -log softmax(logits)[target]; the logits become the losses' gradient by themselves. Raises
    IndexError for a target outside the vocabulary."""
    N, V = logits_NV.shape
    assert logits_NV.stride(1) == 1 and targets_N.shape == weights_N.shape == (N,)
    targets_N, weights_N = targets_N.long().contiguous(), weights_N.float().contiguous()
    if N and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < V:
        raise IndexError(f"a target is not in the vocabulary of {V}")
    losses = logits_NV.new_empty(N)
    build.library().rq_loss(
        pool(), logits_NV.data_ptr(), logits_NV.stride(0), V, N, targets_N.data_ptr(), weights_N.data_ptr(),
        losses.data_ptr(),
    )  # fmt: skip
    return losses


def adamw_(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, factor: Tensor | None, copy: Tensor | None,
) -> None:  # fmt: skip
    """`ops.adamw.adamw_reference` for contiguous fp32 weights and gradients, moments both fp32 or both bf16, copy bf16."""
    beta1, beta2 = betas
    told = build.Update(
        weight=weight.data_ptr(), grad=grad.data_ptr(), m=m.data_ptr(), v=v.data_ptr(),
        copy=None if copy is None else copy.data_ptr(), narrow=m.dtype == torch.bfloat16,
        factor=1.0 if factor is None else factor.item(), rate=lr / (1 - beta1**step), keep=1 - lr * decay,
        take1=1 - beta1, beta2=beta2, take2=1 - beta2, eps=eps, correction=1 - beta2**step,
    )  # fmt: skip
    build.library().rq_adamw(pool(), ctypes.byref(told), weight.numel())


# ---- between the products --------------------------------------------------------------------------------------------


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        h, F = torch.empty_like(gate), gate.shape[-1]
        build.library().rq_swiglu(pool(), gate.data_ptr(), up.data_ptr(), F, F, gate.numel() // F, h.data_ptr())
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d, F = grads[0].clone(memory_format=torch.contiguous_format), gate.shape[-1]
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        build.library().rq_swiglu_backward(
            pool(), gate.data_ptr(), up.data_ptr(), F, F, gate.numel() // F, None, d.data_ptr(), dgate.data_ptr(),
            dup.data_ptr(), F, None,
        )  # fmt: skip
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of equal shapes, for what `takes` says."""
    assert gate.shape == up.shape
    return _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, D = torch.empty_like(x), x.shape[-1]
        scales = x.new_empty(x.numel() // D)
        build.library().rq_norm(
            pool(), x.data_ptr(), weight.data_ptr(), eps, D, len(scales), y.data_ptr(), scales.data_ptr()
        )
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        dy, D, N = grads[0].contiguous(), x.shape[-1], len(scales)
        dx, parts = torch.empty_like(x), x.new_empty(-(-N // _SOME_ROWS), D)
        build.library().rq_norm_backward(
            pool(), x.data_ptr(), weight.data_ptr(), scales.data_ptr(), dy.data_ptr(), D, N, dx.data_ptr(),
            parts.data_ptr(),
        )  # fmt: skip
        return dx, parts.sum(0), None


_SOME_ROWS = 64
"""Of a kernel's task: as in training.cpp."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm.reference`, for what `takes` says."""
    assert weight.shape == x.shape[-1:]
    return _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


# ---- routed experts --------------------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    """Gate and up alone wait for the backward, besides the input: as `ops.training.experts`, whose plan this is."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor
    ) -> Tensor:
        (N, D), K, (E, _, F) = x_ND.shape, chosen_NK.shape[1], down_EDF.shape
        order_M = chosen_NK.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_NK.flatten(), minlength=E).tolist()
        place_NK = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(N * K)).view(N, K)
        row_M = order_M // K
        x_MD = _gathered(x_ND, row_M[:, None])
        gu_M2F, h_MF, y_MD = x_ND.new_empty(N * K, 2 * F), x_ND.new_empty(N * K, F), x_ND.new_empty(N * K, D)
        for e, rows in _parts(counts):
            torch.mm(x_MD[rows], gate_up_E2FD[e].T, out=gu_M2F[rows])
        build.library().rq_swiglu(pool(), gu_M2F.data_ptr(), gu_M2F[:, F:].data_ptr(), 2 * F, F, N * K, h_MF.data_ptr())
        for e, rows in _parts(counts):
            torch.mm(h_MF[rows], down_EDF[e].T, out=y_MD[rows])
        ctx.save_for_backward(x_MD, gate_up_E2FD, down_EDF, gates_NK, gu_M2F, order_M, row_M, place_NK)
        ctx.counts = counts
        return _gathered(y_MD, place_NK, gates_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gate_up, down, gates_NK, gu_M2F, order_M, row_M, place_NK = ctx.saved_tensors
        F = down.shape[2]
        dy_MD = _gathered(grads[0].contiguous(), row_M[:, None])
        d_MF = x_MD.new_empty(len(x_MD), F)
        for e, rows in _parts(ctx.counts):
            torch.mm(dy_MD[rows], down[e], out=d_MF[rows])
        dgu_M2F, gates_M, dgates_M = torch.empty_like(gu_M2F), gates_NK.flatten()[order_M], x_MD.new_empty(len(x_MD))
        build.library().rq_swiglu_backward(
            pool(), gu_M2F.data_ptr(), gu_M2F[:, F:].data_ptr(), 2 * F, F, len(x_MD), gates_M.data_ptr(),
            d_MF.data_ptr(), dgu_M2F.data_ptr(), dgu_M2F[:, F:].data_ptr(), 2 * F, dgates_M.data_ptr(),
        )  # fmt: skip
        needs = ctx.needs_input_grad
        ddown = torch.zeros_like(down) if needs[2] else None
        dgate_up = torch.zeros_like(gate_up) if needs[1] else None
        for e, rows in _parts(ctx.counts):
            if ddown is not None:
                torch.mm(dy_MD[rows].T, d_MF[rows], out=ddown[e])
            if dgate_up is not None:
                torch.mm(dgu_M2F[rows].T, x_MD[rows], out=dgate_up[e])
        dx = None
        if needs[0]:
            for e, rows in _parts(ctx.counts):  # where dy is no longer needed
                torch.mm(dgu_M2F[rows], gate_up[e], out=dy_MD[rows])
            dx = _gathered(dy_MD, place_NK)
        dgates = torch.empty_like(dgates_M).scatter_(0, order_M, dgates_M).view_as(gates_NK) if needs[3] else None
        return dx, dgate_up, ddown, dgates, None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    out, start = [], 0
    for e, count in enumerate(counts):
        if count:
            out.append((e, slice(start, start + count)))
        start += count
    return out


def _gathered(x_MD: Tensor, place_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """sum_k weights[n, k] * x[place[n, k]]."""
    N, K = place_NK.shape
    x_MD, place_NK, out_ND = x_MD.contiguous(), place_NK.contiguous(), x_MD.new_empty(N, x_MD.shape[1])
    build.library().rq_gather(
        pool(), x_MD.data_ptr(), place_NK.data_ptr(), None if weights_NK is None else weights_NK.data_ptr(), K,
        x_MD.shape[1], N, out_ND.data_ptr(),
    )  # fmt: skip
    return out_ND


def experts(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The op of `ops.experts`, for what `takes` says."""
    return _Experts.apply(x_ND, gate_up_E2FD, down_EDF, gates_NK.contiguous(), chosen_NK.contiguous())  # type: ignore[no-untyped-call]
