"""Muon: momentum, orthogonalised by Newton-Schulz iterations (arXiv 2502.16982), for many matrices at once.

torch.optim.Muon does the same one matrix after another. A model of fine-grained experts has thousands of small matrices,
some thirty kernels each, so that launching them takes longer than the step's forward and backward; here matrices of one
shape are one batched product. The update of each is still its own: orthogonalising two as one is another update.

The step is scaled to AdamW's size, 0.2 * sqrt(max(rows, columns)), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
AT_ONCE = 1 << 26
"""Elements that are orthogonalised together: bounds the memory of a step, not its result."""


def orthogonalise(matrices_NAB: Tensor) -> Tensor:
    """Each matrix's singular values to about one; bf16, [N, A, B]."""
    a, b, c = COEFFICIENTS
    tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x = matrices_NAB.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """views: a function that gives a parameter's matrices as [n, A, B], of the parameter and of its gradient alike."""

    def __init__(
        self, views: Sequence[tuple[torch.nn.Parameter, tuple[slice, ...]]], momentum: float, weight_decay: float
    ) -> None:
        self._momentum, self._decay = momentum, weight_decay
        self._places = list(views)
        self._buffers: list[Tensor | None] = [None] * len(self._places)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Weights by the gradients of their parameters; parameters without one stay."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, (p, index) in enumerate(self._places):
            if p.grad is not None:
                A, B = p[index].shape[-2:]
                shapes.setdefault((A, B), []).append(i)
        for shape, members in shapes.items():
            for batch in self._batches(members, shape):
                self._update(batch, shape, lr)

    def _batches(self, members: list[int], shape: tuple[int, int]) -> list[list[int]]:
        batches: list[list[int]] = []
        size = AT_ONCE
        for i in members:
            p, index = self._places[i]
            numel = p[index].numel()
            if size + numel > AT_ONCE:
                batches.append([])
                size = 0
            batches[-1].append(i)
            size += numel
        return batches

    def _update(self, members: list[int], shape: tuple[int, int], lr: float) -> None:
        A, B = shape
        grads, weights = [], []
        for i in members:
            p, index = self._places[i]
            assert p.grad is not None
            grads.append(p.grad[index].reshape(-1, A, B))
            weights.append(p.data[index].view(-1, A, B) if p.ndim == 2 else p.data[index])
            if self._buffers[i] is None:
                self._buffers[i] = torch.zeros_like(grads[-1], memory_format=torch.contiguous_format)
        buffers = [b for i in members if (b := self._buffers[i]) is not None]
        torch._foreach_lerp_(buffers, grads, 1 - self._momentum)
        steps = torch._foreach_lerp(grads, buffers, self._momentum)
        update = orthogonalise(torch.cat(list(steps)))
        if self._decay:
            torch._foreach_mul_(weights, 1 - lr * self._decay)
        scale = -lr * 0.2 * max(A, B) ** 0.5
        parts = [u.to(w.dtype) for u, w in zip(update.split([len(w) for w in weights]), weights, strict=True)]
        torch._foreach_add_(weights, parts, alpha=scale)

    @property
    def numel_to_come(self) -> int:
        """Elements of momentum that the first step will allocate."""
        pairs = zip(self._places, self._buffers, strict=True)
        return sum(p[index].numel() for (p, index), buffer in pairs if buffer is None)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": list(self._buffers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError where the state is another's."""
        buffers = state["momentum"]
        if len(buffers) != len(self._places):
            raise ValueError(f"it holds the momentum of {len(buffers)} parameters, the run has {len(self._places)}")
        for i, (p, index) in enumerate(self._places):
            buffer = buffers[i]
            if buffer is not None and buffer.numel() != p[index].numel():
                raise ValueError("momentum of another shape")
            self._buffers[i] = None if buffer is None else buffer.to(p.device)
