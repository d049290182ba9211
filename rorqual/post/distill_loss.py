"""The divergence from a teacher over the whole vocabulary, without its logits ever standing in memory whole.

Logits of a training step would be the largest tensors by far: 65,536 positions by 49,152 words, twice. Here they exist
for `chunk` positions at a time. The gradient of the loss in a position's logits is q - p, so it is formed at once, pushed
back through the head, and forgotten; what is kept for the backward pass is as large as the hidden states and the head.

The loss is KL(p || q) = sum p (log p - log q), forward: the student must cover what the teacher might say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Callable[[slice], Tensor]
"""Rows of the step -> what the student should say there: probabilities [n, V or fewer] in fp32; missing columns are 0."""


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int) -> Tensor:
        wants_h, wants_head = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h_ND) if wants_h else None
        grad_head = torch.zeros_like(head_VD) if wants_head else None
        head, total = head_VD.to(h_ND.dtype), torch.zeros((), device=h_ND.device)
        for start in range(0, len(h_ND), chunk):
            rows = slice(start, min(start + chunk, len(h_ND)))
            log_q = F.linear(h_ND[rows], head).float().log_softmax(-1)
            p = target(rows)
            log_q_p = log_q[:, : p.shape[1]]
            total += (weights_N[rows] * (torch.xlogy(p, p) - p * log_q_p).sum(-1)).sum()
            slope = log_q.exp_()
            slope[:, : p.shape[1]] -= p
            slope = (slope * weights_N[rows, None]).to(h_ND.dtype)
            if grad_h is not None:
                grad_h[rows] = slope @ head
            if grad_head is not None:
                grad_head += slope.T @ h_ND[rows]
        ctx.save_for_backward(grad_h, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_h, grad_head = ctx.saved_tensors
        return (
            None if grad_h is None else grad_h * grads[0].to(grad_h.dtype),
            None if grad_head is None else grad_head * grads[0],
            None,
            None,
            None,
        )


def divergence(h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int) -> Tensor:
    """Weighted sum over positions of KL(target || softmax(h head^T)), in nats; differentiable in h and head.

    A target that puts everything on one word makes it that word's cross-entropy."""
    total: Tensor = _ChunkedDivergence.apply(h_ND, head_VD, weights_N, target, chunk)  # type: ignore[no-untyped-call]
    return total


def spoken(target_N: Tensor, vocab: int) -> Target:
    """The words that really follow, [N] int64."""

    def probabilities(rows: slice) -> Tensor:
        return F.one_hot(target_N[rows], vocab).float()

    return probabilities


def taught(h_ND: Tensor, project: Callable[[Tensor], Tensor]) -> Target:
    """A teacher's distribution from its hidden states [N, D] and its head."""

    def probabilities(rows: slice) -> Tensor:
        with torch.no_grad():
            return project(h_ND[rows]).float().softmax(-1)

    return probabilities


def either(first: Target, second: Target, choose_first_N: Tensor) -> Target:
    """Row by row one of two targets over the same vocabulary."""

    def probabilities(rows: slice) -> Tensor:
        a, b = first(rows), second(rows)
        width = max(a.shape[1], b.shape[1])
        a, b = (F.pad(t, (0, width - t.shape[1])) for t in (a, b))
        return torch.where(choose_first_N[rows, None], a, b)

    return probabilities
