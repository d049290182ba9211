"""The weights as a step multiplies by them: 16-bit copies of the fp32 matrices, made once a step instead of at every use.

Inside `in_place` the network holds the copies where its matrices are, so that forward and backward read half the bytes,
nothing is cast, and what waits for the backward is the copy that is there anyway. Gradients arrive in the copies' dtype, as
the products give them; a step of several micro-batches adds them up in fp32 (`fold`). Outside, the network holds its fp32
weights, and everything that looks at a model (checkpoints, averages, exports) sees those alone.

A copy is made anew where its weight was written since, by whomever: PyTorch counts writes. The optimiser's own kernel writes
weight and copy together, and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rorqual.model.layers import Linear
from rorqual.model.moe import RoutedExperts
from rorqual.model.transformer import Transformer


class _Place(NamedTuple):
    module: nn.Module
    name: str
    weight: nn.Parameter
    copy: nn.Parameter


class WorkingCopies:
    """Of every matrix that is multiplied plainly in `dtype`: linear layers and stacks of experts, not gates or embeddings,
    which compute in fp32, nor the head, whose gradients from several depths are added in fp32 (`ops.cross_entropy`), nor
    layers that multiply in FP8 and quantise the weight itself."""

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self._places = []
        head = getattr(model, "lm_head", None)
        for module in model.modules():
            if module is not head and isinstance(module, Linear | RoutedExperts) and module.is_plain:
                for name, weight in module.named_parameters(recurse=False):
                    copy = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)
                    self._places.append(_Place(module, name, weight, copy))
        self._versions = [p.weight._version for p in self._places]
        self._by_weight = {id(p.weight): p.copy for p in self._places}

    def of(self, weight: Tensor) -> nn.Parameter | None:
        """The copy of a weight, or None where it has none."""
        return self._by_weight.get(id(weight))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network holds the copies inside."""
        self.refresh()
        for place in self._places:
            setattr(place.module, place.name, place.copy)
        try:
            yield
        finally:
            for place in self._places:
                setattr(place.module, place.name, place.weight)

    @torch.no_grad()
    def refresh(self, everything: bool = False) -> None:
        """Copies of the weights that were written."""
        for i, place in enumerate(self._places):
            if everything or place.weight._version != self._versions[i]:
                place.copy.copy_(place.weight)
                self._versions[i] = place.weight._version

    def fold(self) -> None:
        """The copies' gradients into the weights' own, in fp32."""
        for place in self._places:
            if place.copy.grad is not None:
                if place.weight.grad is None:
                    place.weight.grad = place.copy.grad.to(place.weight.dtype)
                else:
                    place.weight.grad += place.copy.grad
                place.copy.grad = None
