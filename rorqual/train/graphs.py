"""Forward and backward of a micro-batch as one CUDA graph.

A step is some two thousand kernels; a host that starts them one by one from Python takes longer over that than a GPU over
running them. Captured once, they are started together, and the host is free to prepare the optimiser's launches meanwhile.
Everything a graph reads lies where it lay at the capture: rows and factors are copied there, weights and their 16-bit
copies are updated in place anyway. Gradients come out at fixed places too and are handed over as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rorqual.train.loss import Targets

Micro = Callable[[Targets, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, counts, the MTP loss's weight, the rows' share of the step) -> (losses [3], loads [gates, E]), adding gradients to
the leaves'. The last two arguments are scalars."""
WARM_UP = 2
"""Plain runs before the capture: kernels are compiled and libraries choose theirs."""


class MicroGraph:
    """One of `micro` for rows of one shape. leaves: every parameter that may get a gradient."""

    def __init__(self, micro: Micro, leaves: Iterable[nn.Parameter], part: Targets, counts: Tensor) -> None:
        self._leaves = list(leaves)
        self._part, self._counts = Targets(*(t.clone() for t in part)), counts.clone()
        self._weight, self._share = torch.zeros(2, device=counts.device).unbind()
        stream = torch.cuda.Stream(counts.device)
        stream.wait_stream(torch.cuda.current_stream(counts.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                micro(self._part, self._counts, self._weight, self._share)
                self._drop()
        torch.cuda.current_stream(counts.device).wait_stream(stream)
        torch.cuda.empty_cache()  # the graph has memory of its own
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._losses, self._loads = micro(self._part, self._counts, self._weight, self._share)
        self._grads = [leaf.grad for leaf in self._leaves]
        self._drop()

    def _drop(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def run(self, part: Targets, counts: Tensor, weight: float, share: float, more: bool) -> tuple[Tensor, Tensor]:
        """The losses and loads of these rows. Leaves without a gradient are given the graph's own, which the next run will
        overwrite; `more`: others come, so they get copies, and those that have one are added to."""
        for mine, theirs in zip(self._part, part, strict=True):
            mine.copy_(theirs)
        self._counts.copy_(counts)
        self._weight.fill_(weight)
        self._share.fill_(share)
        self._graph.replay()
        for leaf, grad in zip(self._leaves, self._grads, strict=True):
            if grad is not None:
                if leaf.grad is None:
                    leaf.grad = grad.clone() if more else grad
                else:
                    leaf.grad += grad
        return self._losses.clone(), self._loads.clone()
