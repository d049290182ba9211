"""An exponential average of the weights in host memory (DeepSeek-V3 section 3.2.3): an early look at the model after decay.

On a GPU the copy to the host runs beside the next step's forward and backward, on its own stream into pinned memory, and
is averaged in when the next one is due; the optimiser waits for the copy, never for the averaging. On a CPU both are one
pass. Correction biases are not averaged: they are a controller's state and belong to the newest weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rorqual.model.transformer import Transformer
from rorqual.train.config import EMAConfig


class WeightAverage:
    """fp32, on the host, starting as the weights themselves."""

    def __init__(self, cfg: EMAConfig, model: Transformer) -> None:
        self._model, self._every = model, cfg.every
        self._keep = cfg.decay**cfg.every
        cuda = model.device.type == "cuda"
        self._stream = torch.cuda.Stream(model.device) if cuda else None
        self._average = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters()}
        self._landing = {n: torch.empty_like(t, pin_memory=True) for n, t in self._average.items()} if cuda else {}
        self._landed: torch.cuda.Event | None = None

    def before_update(self) -> None:
        """The optimiser may not change what is still being copied."""
        if self._stream is not None:
            torch.cuda.current_stream(self._model.device).wait_stream(self._stream)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Take in the weights after `step` steps, where one is due."""
        if step % self._every:
            return
        if self._stream is None:
            self._blend(dict(self._model.named_parameters()))
            return
        self._settle()
        self._stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._stream):
            for name, p in self._model.named_parameters():
                self._landing[name].copy_(p.detach(), non_blocking=True)
            self._landed = self._stream.record_event()

    @torch.no_grad()
    def _blend(self, weights: dict[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.lerp_(weights[name].float(), 1 - self._keep)

    def _settle(self) -> None:
        """Average in the copy that is under way."""
        if self._landed is not None:
            self._landed.synchronize()
            self._landed = None
            self._blend(dict(self._landing))

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model holds the average inside; its own weights come back after."""
        self._settle()
        weights = {n: p.detach().cpu().clone() for n, p in self._model.named_parameters()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(weights)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self._model.named_parameters():
            p.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        self._settle()
        return self._average

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises KeyError where a weight is missing."""
        self._landed = None
        for name, average in self._average.items():
            average.copy_(state[name])
