"""The divergence from a teacher over the whole vocabulary, without its logits ever standing in memory whole.

Logits of a training step would be the largest tensors by far: 65,536 positions by 49,152 words, twice. Here they exist
for `chunk` positions at a time. The gradient of the loss in a position's logits is formed at once (`ops.divergence`), pushed
back through the head, and forgotten; what is kept for the backward pass is as large as the hidden states and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.divergence import divergence_and_slope_
from rorqual.ops.training import product32


@dataclass(frozen=True)
class Target:
    """What the student should say at N positions: softmax(project(h_ND)), a teacher's hidden states through its head, which
    may have fewer words than the student's. words, int64: the one that is right, or -1 where the teacher is asked; None:
    it is asked everywhere."""

    h_ND: Tensor
    project: Callable[[Tensor], Tensor]
    words_N: Tensor | None = None

    def among(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(the teacher's logits, the words) of some positions."""
        return self.project(self.h_ND[rows]), None if self.words_N is None else self.words_N[rows]


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int, backend: str
    ) -> Tensor:
        head, total = head_VD.to(h_ND.dtype), torch.zeros((), device=h_ND.device)
        grad_h = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        grad_head: Tensor | None = None
        for start in range(0, len(h_ND), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(h_ND[rows], head)
            losses, slope = divergence_and_slope_(logits, *target.among(rows), weights_N[rows], backend)
            del logits  # or the next chunk's would be made beside them
            total += losses.sum()
            if grad_h is not None:
                torch.mm(slope, head, out=grad_h[rows])
            if ctx.needs_input_grad[1]:
                grad_head = product32(slope.T, h_ND[rows], grad_head)
            del slope
        ctx.save_for_backward(grad_h, grad_head)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_h, grad_head = ctx.saved_tensors
        return (
            None if grad_h is None else grad_h * grads[0].to(grad_h.dtype),
            None if grad_head is None else (grad_head * grads[0]).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )


def divergence(
    h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int, backend: str = "auto"
) -> Tensor:
    """Weighted sum over positions of KL(target || softmax(h head^T)), in nats; differentiable in h and head.

    A target that puts everything on one word makes it that word's cross-entropy. backend: of `ops.divergence`."""
    total: Tensor = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        h_ND, head_VD, weights_N, target, chunk, backend
    )
    return total
