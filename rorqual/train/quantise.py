"""Quantisation-aware training: the forward sees the weights as they will be stored.

While it is on, each step writes the rounded weights into the parameters, computes gradients with them, and puts the
exact weights back before the update: the straight-through estimator, without a word of it in the network. Rounded is
what `rorqual convert` would round, by the same code, so that what is trained for is what is shipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rorqual.checkpoint.convert import FORMATS, is_quantised
from rorqual.checkpoint.names import released_places
from rorqual.model.transformer import Transformer
from rorqual.ops.formats import WeightFormat
from rorqual.ops.packed import GROUP, PackedIntegers, quantize_groups
from rorqual.train.config import QuantiseConfig
from rorqual.train.schedule import Timeline

AT_ONCE = 1 << 26
"""Elements rounded together: bounds the memory of a step, not its result."""


class ShippedWeights:
    """One model's; nothing where it is off."""

    def __init__(self, cfg: QuantiseConfig, model: Transformer, timeline: Timeline) -> None:
        self.form: WeightFormat | None = FORMATS[cfg.to] if cfg.to else None
        self.timeline, self.begin = timeline, 1 - cfg.fraction
        self.weights = [] if self.form is None else _weights(model, self.form, cfg.embeddings)

    def on(self, step: int) -> bool:
        """Whether this step sees rounded weights."""
        return self.form is not None and self.timeline.fraction(step) > self.begin + 1e-12

    @contextmanager
    def during(self, step: int) -> Iterator[None]:
        """Rounded weights inside, from the first quantised step on; the exact ones again outside, whatever happens."""
        if self.form is None or not self.on(step):
            yield
            return
        exact = [weight.detach().clone() for weight in self.weights]
        try:
            with torch.no_grad():
                self._round(self.form)
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self.weights, exact, strict=True):
                    weight.copy_(value)

    def _round(self, form: WeightFormat) -> None:
        if not isinstance(form, PackedIntegers):
            for weight in self.weights:
                weight.copy_(form.dense(form.pack(weight), weight.dtype))
            return
        # Groups of inputs lie next to one another, so many weights round as one: a model of small experts has thousands of
        # them, and on a GPU launching their kernels one by one would take longer than the arithmetic.
        for weights in _batches(self.weights):
            groups = torch.cat([w.reshape(-1, GROUP) for w in weights])
            codes, scale = quantize_groups(groups, form.bits)
            rounded = (codes.float() * scale.float()).split([w.numel() // GROUP for w in weights])
            for weight, part in zip(weights, rounded, strict=True):
                weight.copy_(part.view(weight.shape))


def _batches(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Of at most AT_ONCE elements each, or one weight."""
    batch: list[Tensor] = []
    size = 0
    for weight in weights:
        if batch and size + weight.numel() > AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(weight)
        size += weight.numel()
    if batch:
        yield batch


def _weights(model: Transformer, form: WeightFormat, embeddings: bool) -> list[Tensor]:
    """What `form` will store, as views of the parameters. Groups lie along the input, so a stack of experts rounds as one;
    FP8's blocks do not, and each matrix is rounded by itself."""
    found: dict[tuple[int, str, str], Tensor] = {}
    for name, place in released_places(model):
        if not is_quantised(name, form, embeddings):
            continue
        if isinstance(form, PackedIntegers):
            if place.shape[-1] % GROUP == 0:
                found[(id(place.module), place.attribute, "")] = place.whole.detach()
        else:
            found[(id(place.module), place.attribute, name)] = place.view.detach()
    return list(found.values())
