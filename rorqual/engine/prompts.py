"""Forwards of prompt chunks, and CUDA graphs of those whose shape comes again.

A forward of a small model over a short prompt is hundreds of kernels of a few microseconds, which a host launches one by one
in tens of milliseconds. What a chunk's forward does depends on its shape alone (rows, bucketed length and pages, whether it
begins its sequences), so a shape that is met a second time is captured and from then on one launch. Its numbers go to the
device in one copy.

Graphs of prompts have a memory pool of their own: in one with the decoding graphs' a replay could overwrite an answer that
the next step still takes its tokens from.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.engine.inputs import Shape, Span, as_chunk, bucket, chunk_batch, chunk_numbers
from rorqual.engine.replay import Replay, pinned
from rorqual.model.batch import Batch
from rorqual.model.transformer import Transformer

log = logging.getLogger(__name__)

MOST_TOKENS = 16384
"""Of a captured forward, padding included: what the graphs' pool must hold."""
MOST_GRAPHS = 256


class Computed(NamedTuple):
    """Hidden states [B, T, D] of a chunk (None where nobody keeps them), and those of each row's last token [B, D]."""

    h_BTD: Tensor | None
    ends_BD: Tensor


def compute(model: Transformer, tokens_BT: Tensor, batch: Batch, last_B: Tensor) -> Computed:
    """The forward of a chunk (`inputs.chunk_batch`)."""
    h_BTD = model.hidden(tokens_BT, batch)[0]
    return Computed(h_BTD, h_BTD[torch.arange(len(last_B), device=h_BTD.device), last_B])


class _Prompt:
    """kept: where the hidden states of all graphs go, [MOST_TOKENS, D], or None. An output of its own for each graph would
    be memory for good."""

    def __init__(self, model: Transformer, latents: Tensor, shape: Shape, pool: Any, kept: Tensor | None) -> None:
        self.shape, self.page_size = shape, latents.shape[2]
        self.host = pinned(shape.numbers, latents.device)
        self.inputs = self.host.to(latents.device, copy=True)
        self.copied: torch.cuda.Event | None = None
        self.kept = None if kept is None else kept[: shape.rows * shape.length].view(shape.rows, shape.length, -1)

        def step() -> tuple[Tensor]:
            computed = compute(model, *chunk_batch(self.inputs, shape, latents))
            if self.kept is not None and computed.h_BTD is not None:
                self.kept.copy_(computed.h_BTD)
            return (computed.ends_BD,)

        self.replay = Replay(step, latents.device, pool, both=False)

    def run(self, spans: Sequence[Span]) -> Computed:
        if self.copied is not None:
            self.copied.synchronize()  # the copy of the last numbers
        self.host.numpy()[:] = chunk_numbers(spans, self.shape, self.page_size)
        self.inputs.copy_(self.host, non_blocking=True)
        if self.inputs.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()
        self.replay()
        (ends_BD,) = self.replay.outputs
        return Computed(None if self.kept is None else self.kept.clone(), ends_BD.clone())


class Prompts:
    """buckets: lengths and pages are rounded up to few (`inputs.bucket`); captures: whether shapes that come again are
    captured; keeps: whether hidden states of all tokens are wanted. On a CPU nothing is captured and all else is the same,
    for tests."""

    def __init__(self, model: Transformer, latents: Tensor, buckets: bool, captures: bool, keeps: bool) -> None:
        self.model, self.latents, self.buckets = model, latents, buckets
        self.most = MOST_TOKENS if captures else 0
        self.pool = torch.cuda.graph_pool_handle() if captures and latents.is_cuda else None
        self.seen: set[Shape] = set()
        self.graphs: dict[Shape, _Prompt] = {}
        self.kept = latents.new_empty(self.most, model.cfg.hidden_size) if captures and keeps else None

    def run(self, spans: Sequence[Span]) -> Computed:
        """The spans' forward, side by side."""
        shape = Shape.of(spans, self.latents.shape[2], bucket if self.buckets else None)
        graph = self._graph(shape)
        if graph is not None:
            return graph.run(spans)
        return compute(self.model, *as_chunk(spans, self.latents, self.latents.shape[2], self.buckets))

    def _graph(self, shape: Shape) -> _Prompt | None:
        if shape in self.graphs:
            return self.graphs[shape]
        if shape.rows * shape.length > self.most or len(self.graphs) == MOST_GRAPHS:
            return None
        if shape not in self.seen:
            self.seen.add(shape)
            return None
        try:
            self.graphs[shape] = _Prompt(self.model, self.latents, shape, self.pool, self.kept)
        except Exception as error:  # whatever it is, prompts are computed without
            log.warning("a prompt of shape %s cannot be captured: %s: %s", shape, type(error).__name__, error)
            self.most = shape.rows * shape.length // 2
            if self.latents.is_cuda:
                torch.cuda.synchronize()
            return None
        return self.graphs[shape]
