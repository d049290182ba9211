"""How far rows of logits are from what they should say, and the gradient of that, formed at once.

A row's target is a teacher's distribution, given by its logits, or one word. The loss is KL(p || q) = sum p (log p - log q),
forward: the student must cover what the teacher might say; where p is one word, it is that word's cross-entropy. The
gradient in the student's logits is q - p.

It is all memory traffic, over the largest tensors of a training step: plainly a dozen passes, most of them in fp32. `triton`
reads both logits twice, in their dtype, and writes the gradient over the student's (`ops.triton.divergence`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

Divergence = Callable[[Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
divergence_backends: Backends[Divergence] = Backends("divergence")

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error of losses and gradient, relative to the reference's in fp32 (Frobenius norms), by the logits' dtype: in bf16
the gradient is rounded."""


@divergence_backends.register("reference")
def divergence_reference(
    logits_NV: Tensor, teacher_NW: Tensor, words_N: Tensor | None, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """weights[n] * KL(p[n] || softmax(logits[n])) in fp32; the gradient in the logits is then rounded to their dtype."""
    log_q, p = logits_NV.log_softmax(-1, dtype=torch.float32), teacher_NW.softmax(-1, dtype=torch.float32)
    if missing := logits_NV.shape[1] - teacher_NW.shape[1]:
        p = F.pad(p, (0, missing))
    if words_N is not None:  # only the rows concerned: a whole table of words would cost as much as the teacher's
        own_M = (words_N >= 0).nonzero().squeeze(1)
        p.index_fill_(0, own_M, 0.0)
        p[own_M, words_N[own_M]] = 1.0
    losses = (torch.xlogy(p, p) - p * log_q).sum(-1) * weights_N
    return losses, ((log_q.exp() - p) * weights_N[:, None]).to(logits_NV.dtype)


@divergence_backends.register("triton", triton_missing)
def divergence_triton(
    logits_NV: Tensor, teacher_NW: Tensor, words_N: Tensor | None, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The same; the gradient lies where the logits were. A row of weight 0 is not read."""
    from rorqual.ops.triton.divergence import divergence_and_slope_

    words = None if words_N is None else words_N.contiguous()
    return divergence_and_slope_(logits_NV, teacher_NW, words, weights_N.contiguous()), logits_NV


def divergence_and_slope_(
    logits_NV: Tensor, teacher_NW: Tensor, words_N: Tensor | None, weights_N: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(weighted divergences in nats, fp32 [N]; their gradient in the logits, in the logits' dtype). The logits themselves
    are lost. W <= V: what the teacher has no column for, it never says. words, int64: the one that is right, or -1 where
    the teacher is asked; weights fp32. Raises BackendUnavailable for a named backend that cannot run here."""
    if backend == "auto":
        backend = "triton" if logits_NV.is_cuda and triton_missing() is None else "reference"
    return divergence_backends.get(backend)(logits_NV, teacher_NW, words_N, weights_N)
