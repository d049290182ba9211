"""The divergence from a teacher over the whole vocabulary, without its logits ever standing in memory whole.

Logits of a training step would be the largest tensors by far: 65,536 positions by 49,152 words, twice. Here they exist
for `chunk` positions at a time. The gradient of the loss in a position's logits is q - p, so it is formed at once, pushed
back through the head, and forgotten; what is kept for the backward pass is as large as the hidden states and the head.

What lies between the matrix products is memory traffic over [chunk, V], ten passes where written plainly; compiled, it
is two or three. Compiled code wants one shape, so the last chunk is padded then, with rows of weight 0.

The loss is KL(p || q) = sum p (log p - log q), forward: the student must cover what the teacher might say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Callable[[slice], Tensor]
"""Rows of the step -> what the student should say there: probabilities [n, V or fewer] in fp32; missing columns are 0."""


def _slope(logits_NV: Tensor, p_NW: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted sum of the rows' divergences, its gradient in the logits, in their dtype)."""
    log_q = logits_NV.log_softmax(-1, dtype=torch.float32)
    missing = logits_NV.shape[1] - p_NW.shape[1]
    wanted = F.pad(p_NW, (0, missing)) if missing else p_NW
    each_N = (torch.xlogy(wanted, wanted) - wanted * log_q).sum(-1)
    slope = (log_q.exp() - wanted) * weights_N[:, None]
    return (each_N * weights_N).sum(), slope.to(logits_NV.dtype)


@cache
def _compiled_slope() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_slope, dynamic=False)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int, compiled: bool
    ) -> Tensor:
        wants_h, wants_head = ctx.needs_input_grad[:2]
        grad_h = torch.empty_like(h_ND) if wants_h else None
        grad_head = torch.zeros_like(head_VD) if wants_head else None
        head, total = head_VD.to(h_ND.dtype), torch.zeros((), device=h_ND.device)
        slope_of = _compiled_slope() if compiled else _slope
        for start in range(0, len(h_ND), chunk):
            rows = slice(start, min(start + chunk, len(h_ND)))
            n, p = rows.stop - rows.start, target(rows)
            h, weights = h_ND[rows], weights_N[rows]
            if compiled and n < chunk:
                h, p, weights = (
                    F.pad(h, (0, 0, 0, chunk - n)),
                    F.pad(p, (0, 0, 0, chunk - n)),
                    F.pad(weights, (0, chunk - n)),
                )
            divergence, slope = slope_of(F.linear(h, head), p, weights)
            total += divergence
            if grad_h is not None:
                grad_h[rows] = (slope @ head)[:n]
            if grad_head is not None:
                grad_head += slope.T @ h
        ctx.save_for_backward(grad_h, grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_h, grad_head = ctx.saved_tensors
        return (
            None if grad_h is None else grad_h * grads[0].to(grad_h.dtype),
            None if grad_head is None else grad_head * grads[0],
            None,
            None,
            None,
            None,
        )


def divergence(
    h_ND: Tensor, head_VD: Tensor, weights_N: Tensor, target: Target, chunk: int, compiled: bool = False
) -> Tensor:
    """Weighted sum over positions of KL(target || softmax(h head^T)), in nats; differentiable in h and head.

    A target that puts everything on one word makes it that word's cross-entropy."""
    total: Tensor = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        h_ND, head_VD, weights_N, target, chunk, compiled
    )
    return total


def taught(h_ND: Tensor, project: Callable[[Tensor], Tensor]) -> Target:
    """A teacher's distribution from its hidden states [N, D] and its head."""

    def probabilities(rows: slice) -> Tensor:
        with torch.no_grad():
            return project(h_ND[rows]).softmax(-1, dtype=torch.float32)

    return probabilities


def either(words_N: Tensor, own_N: Tensor, vocab: int, teacher: Target) -> Target:
    """The word itself, int64, where `own` is true, and the teacher's distribution elsewhere. Only the rows concerned are
    touched: a whole table of words would cost as much as the teacher's."""
    own_M = own_N.nonzero().squeeze(1)
    places = own_M.tolist()

    def probabilities(rows: slice) -> Tensor:
        p = teacher(rows)
        chosen_M = own_M[bisect_left(places, rows.start) : bisect_left(places, rows.stop)]
        if len(chosen_M):
            p = F.pad(p, (0, vocab - p.shape[1])) if p.shape[1] < vocab else p
            p.index_fill_(0, chosen_M - rows.start, 0.0)
            p[chosen_M - rows.start, words_N[chosen_M]] = 1.0
        return p

    return probabilities
