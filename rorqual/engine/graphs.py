"""CUDA graphs over a whole decoding step: embedding, layers, head and the greedy choice in one launch.

A decoding step of a small model is hundreds of kernels of a few microseconds each; launched one by one the GPU waits for the
host. A graph is captured for each batch size and page-table width in powers of two, when it is first needed, and replayed
over static buffers. Rows beyond the batch are padding: length 1, their latent in the scrap page.

What cannot be captured (a format whose product waits for the host) is remembered, and the runner computes eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.scheduler import Slice
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.transformer import Transformer

log = logging.getLogger(__name__)

MAX_BATCH = 256


class Decoded(NamedTuple):
    """hidden [B, D] and logits [B, V] on the device; best: the most likely token of each row; sound: whether its numbers
    are finite."""

    hidden: Tensor
    logits: Tensor
    best: list[int]
    sound: list[bool]


class _Graph:
    """One captured step. inputs: one int64 buffer, so that one copy fills it: tokens, positions, slots and lengths [B] each,
    then the page table [B, width]."""

    def __init__(self, model: Transformer, latents: Tensor, batch: int, width: int, pool: Any) -> None:
        self.batch, self.width = batch, width
        self.host = torch.zeros((4 + width) * batch, dtype=torch.int64, pin_memory=True)
        self.numbers, self.table = self._parts(self.host)
        self.numbers[3] = 1
        self.inputs = self.host.to(latents.device)
        self.model, self.latents = model, latents
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and workspaces taken before the capture
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.hidden, self.logits, self.told = self._step()

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions, slots, lengths [4, B], and the table."""
        return buffer[: 4 * self.batch].view(4, -1), buffer[4 * self.batch :].view(self.batch, -1)

    def _step(self) -> tuple[Tensor, Tensor, Tensor]:
        (tokens, positions, slots, lengths), table = self._parts(self.inputs)
        cache = LatentPages(self.latents, table, slots[:, None], lengths)
        h_BD = self.model.hidden(tokens[:, None], Batch(positions[:, None], cache=cache))[0][:, 0]
        logits_BV = self.model.head(h_BD)
        top, best = logits_BV.max(-1)
        sound = h_BD.isfinite().all(-1) & top.isfinite()
        return h_BD, logits_BV, torch.where(sound, best, -1)

    def replay(self) -> None:
        self.inputs.copy_(self.host, non_blocking=True)
        self.graph.replay()


class DecodeGraphs:
    """latents: the runner's cache, whose address the graphs keep."""

    def __init__(self, model: Transformer, latents: Tensor, page_size: int) -> None:
        self.model, self.latents, self.page_size = model, latents, page_size
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[int, int], _Graph] = {}
        self.usable = True

    def run(self, slices: Sequence[Slice]) -> Decoded | None:
        """One token for each slice (of one token, without drafts). None where no graph can be had."""
        if not self.usable or len(slices) > MAX_BATCH:
            return None
        size = self.page_size
        used = [s.start // size + 1 for s in slices]
        graph = self._graph(_power(len(slices)), _power(max(used)))
        if graph is None:
            return None
        numbers, table = graph.numbers.numpy(), graph.table.numpy()
        numbers[:, len(slices) :] = np.array([[0], [0], [0], [1]])
        table[len(slices) :, 0] = 0
        for i, (s, n) in enumerate(zip(slices, used, strict=True)):
            slot = s.job.pages[n - 1] * size + s.start % size
            numbers[:, i] = s.job.tokens[s.start], s.start, slot, s.start + 1
            table[i, :n] = s.job.pages[:n]
        graph.replay()
        n = len(slices)
        best = graph.told[:n].tolist()  # waits for the device
        return Decoded(graph.hidden[:n], graph.logits[:n], best, [b >= 0 for b in best])

    def _graph(self, batch: int, width: int) -> _Graph | None:
        key = batch, width
        if key not in self.graphs:
            try:
                self.graphs[key] = _Graph(self.model, self.latents, batch, width, self.pool)
            except Exception as error:  # whatever it is, decoding goes on without
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.warning(
                    "decoding steps cannot be captured as CUDA graphs, they run eagerly: %s: %s",
                    type(error).__name__,
                    error,
                )
                self.usable = False
                torch.cuda.synchronize()
                return None
            log.debug("captured a decoding step of %d rows, %d pages", batch, width)
        return self.graphs[key]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
