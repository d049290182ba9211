"""The loss over the vocabulary from hidden states, without ever holding all logits.

Logits of T tokens over V words in fp32, their softmax and its gradient are the largest tensors of a small model's step: at
16,384 tokens and 129,280 words 8.5 GB each. `chunked` makes them a few rows at a time and takes the gradients of hidden
states and head at once, in the forward; the backward only scales them. That costs no more products than the plain form, and
the memory of one chunk. `triton` does the same with larger chunks of 16-bit logits, which one kernel turns into their own
gradients where they lie (`ops.triton.cross_entropy`), and so does `native` in fp32 on a CPU. Left out: caching the softmax
statistics for a second pass, which would save nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.ops.native import training as native
from rorqual.ops.training import product32
from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
cross_entropy_backends: Backends[Loss] = Backends("cross entropy")

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error of the loss and of each gradient, relative to the reference's (Frobenius norms), by the dtype of h. In bf16
the gradient of the logits is rounded before it is multiplied, as autograd does in the plain form."""

CHUNK_BYTES = 1 << 26
"""Of fp32 logits that exist at once."""
FUSED_ROWS = 4096
"""Rows of logits in h's dtype that exist at once in `triton`, enough to fill a GPU's products: 0.84 GB at 102,400 words in
16 bits."""


@cross_entropy_backends.register("reference")
def cross_entropy_reference(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """sum_n weights[n] * -log softmax(h[n] head^T)[targets[n]], logits rounded to h's dtype, the rest in fp32."""
    logits_NV = F.linear(h_ND, head_VD.to(h_ND.dtype)).float()
    return (F.cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        head = head_VD.to(h_ND.dtype)
        V = head.shape[0]
        dh = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        rows = max(1, CHUNK_BYTES // (4 * V))
        for start in range(0, len(h_ND), rows):
            part = slice(start, start + rows)
            logits = F.linear(h_ND[part], head).float()
            targets, weights = targets_N[part, None], weights_N[part, None]
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, targets)) * weights).sum()
            if dh is None and dhead is None:
                continue
            slope = logits.sub_(lse).exp_()
            slope.scatter_add_(1, targets, torch.full_like(lse, -1.0))
            slope = slope.mul_(weights).to(h_ND.dtype)
            if dh is not None:
                dh[part] = slope @ head
            if dhead is not None:
                dhead += (slope.T @ h_ND[part]).float()
        ctx.save_for_backward(dh, dhead)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, dhead = ctx.saved_tensors
        scale = grads[0]
        return (
            None if dh is None else dh * scale.to(dh.dtype),
            None if dhead is None else (dhead * scale).to(ctx.head_dtype),
            None,
            None,
        )


@cross_entropy_backends.register("chunked")
def cross_entropy_chunked(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """The same, at most CHUNK_BYTES of logits at a time; gradients with respect to h and head alone."""
    return _Chunked.apply(h_ND, head_VD, targets_N, weights_N)  # type: ignore[no-untyped-call]


class _Fused(_Chunked):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        from rorqual.ops.triton.cross_entropy import loss_and_slope_

        head = head_VD.to(h_ND.dtype)
        dh = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        dhead: Tensor | None = None
        losses = []
        for start in range(0, len(h_ND), FUSED_ROWS):
            part = slice(start, start + FUSED_ROWS)
            logits = F.linear(h_ND[part], head)
            wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
            losses.append(loss_and_slope_(logits, targets_N[part], weights_N[part], wanted).sum())
            if dh is not None:
                torch.mm(logits, head, out=dh[part])
            if ctx.needs_input_grad[1]:
                dhead = product32(logits.T, h_ND[part], dhead)
        ctx.save_for_backward(dh, dhead)
        ctx.head_dtype = head_VD.dtype
        return torch.stack(losses).sum() if losses else h_ND.new_zeros((), dtype=torch.float32)


class _Native(_Chunked):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        V = head_VD.shape[0]
        dh = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        losses = h_ND.new_empty(len(h_ND))
        rows = min(max(1, CHUNK_BYTES // (4 * V)), len(h_ND))
        room = h_ND.new_empty(rows, V)  # for all chunks: the system hands out new memory more slowly than it is written
        for start in range(0, len(h_ND), max(1, rows)):
            part = slice(start, start + rows)
            logits = torch.mm(h_ND[part], head_VD.T, out=room[: len(h_ND) - start])
            losses[part] = native.loss_and_slope_(logits, targets_N[part], weights_N[part])
            if dh is not None:
                torch.mm(logits, head_VD, out=dh[part])
            if dhead is not None:
                dhead.addmm_(logits.T, h_ND[part])
        ctx.save_for_backward(dh, dhead)
        ctx.head_dtype = head_VD.dtype
        return losses.sum()


@cross_entropy_backends.register("native", native.native_missing)
def cross_entropy_native(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """The same in fp32 on a CPU, a chunk of logits made into its own gradient where it lies; else `chunked`."""
    if not native.takes(h_ND, head_VD):
        return cross_entropy_chunked(h_ND, head_VD, targets_N, weights_N)
    return _Native.apply(h_ND.contiguous(), head_VD, targets_N, weights_N)  # type: ignore[no-untyped-call]


@cross_entropy_backends.register("triton", triton_missing)
def cross_entropy_triton(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """The same, logits in h's dtype and at most FUSED_ROWS rows of them."""
    h_ND, targets_N, weights_N = h_ND.contiguous(), targets_N.contiguous(), weights_N.contiguous()
    return _Fused.apply(h_ND, head_VD, targets_N, weights_N)  # type: ignore[no-untyped-call]


def cross_entropy(h_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, backend: str = "auto") -> Tensor:
    """Weighted sum of next-token losses in nats, an fp32 scalar. h [N, D] of any float dtype, head [V, D] (fp32 master or
    narrower), targets int64, weights fp32. Raises BackendUnavailable for a named backend that cannot run here."""
    if backend == "auto":
        if native.takes(h_ND, head_VD):
            backend = "native"
        else:
            backend = "triton" if h_ND.is_cuda and triton_missing() is None else "chunked"
    return cross_entropy_backends.get(backend)(h_ND, head_VD, targets_N, weights_N)
