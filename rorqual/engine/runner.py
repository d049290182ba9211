"""From a planned step to tensors, through the model, to one draw per slice.

A step becomes few forwards: all slices of one token together as [B, 1], and prompt chunks of similar length together as
[B, T], padded at the end. Padding stands at position 0 and writes to the scrap page, so it changes nothing but the
shape. Only the last position of a slice goes through the head, and all of them in one multiplication. On a GPU single
tokens go through a captured graph (`graphs`).

The latent cache is one tensor [layers, pages, page_size, C + R], zeroed once: attention multiplies masked places by 0,
and 0 times whatever an uninitialised page holds may be NaN. Left out: grouping across page-table widths (a short chunk
computes masked attention over its longest mate's pages).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.core import Draw, Masks
from rorqual.engine.graphs import DecodeGraphs
from rorqual.engine.sampler import Row, is_greedy, sample
from rorqual.engine.scheduler import Slice
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.transformer import Transformer
from rorqual.ops.attention import attend_pages_missing

FAULT = "its hidden states are not finite numbers"
PADDING = 0.75
"""Chunks share a forward when the shortest has at least this share of the longest's tokens."""


class ModelRunner:
    """Owns the latent cache of `model`; satisfies `core.Runner`, without drafts. eos: ids that `min_tokens` holds back."""

    draft_depth = 0
    read_bytes = 0.0

    def __init__(self, model: Transformer, num_pages: int, page_size: int, eos: tuple[int, ...] = ()) -> None:
        cfg = model.cfg
        self.model, self.page_size, self.eos = model, page_size, eos
        shape = (cfg.num_hidden_layers, num_pages, page_size, cfg.cache_dim)
        self.latents = zeros(shape, model.compute_dtype or model.dtype, model.device)
        self.page_bytes = self.latents[:, 0].numel() * self.latents.itemsize
        self.on_device = self.latents.is_cuda
        self.graphs: DecodeGraphs | None = None
        if self.latents.is_cuda and not attend_pages_missing():
            self.graphs = DecodeGraphs(model, self.latents, page_size)

    @torch.inference_mode()
    def run(self, plan: Sequence[Slice], masks: Masks | None = None) -> list[list[Draw]]:
        """Computes every slice, draws a token where a slice ends its job. Faults are per slice."""
        draws: list[list[Draw]] = [[] for _ in plan]
        left = self._captured(plan, masks, draws) if self.graphs else list(range(len(plan)))
        if left:
            self._eagerly(plan, left, masks, draws)
        return draws

    def _captured(self, plan: Sequence[Slice], masks: Masks | None, draws: list[list[Draw]]) -> list[int]:
        """Enter the draws of the slices that a graph can compute; returns the others."""
        assert self.graphs is not None
        single = [i for i, s in enumerate(plan) if s.count == 1 and s.samples]
        if not single:
            self.graphs.ahead = None  # what is computed now may write over it
            return list(range(len(plan)))
        rows = self._rows(plan, single, None) if masks is None else []
        decoded = self.graphs.run([plan[i] for i in single], masks is None and all(map(is_greedy, rows)))
        if decoded is None:
            return list(range(len(plan)))
        drawn = [Draw(token) for token in decoded.best]
        if decoded.logits is not None:
            rows = rows or self._rows(plan, single, masks)
            if not all(map(is_greedy, rows)):
                drawn = sample(decoded.logits, rows)
        for i, draw, token in zip(single, drawn, decoded.best, strict=True):
            draws[i] = [draw if token >= 0 else Draw(fault=FAULT)]
        done = set(single)
        return [i for i in range(len(plan)) if i not in done]

    def _eagerly(
        self, plan: Sequence[Slice], which: Sequence[int], masks: Masks | None, draws: list[list[Draw]]
    ) -> None:
        """Compute these slices and enter their draws."""
        last: dict[int, Tensor] = {}
        for group in _groups(plan, which):
            h_BD = self._forward([plan[i] for i in group])
            last |= zip(group, h_BD, strict=True)
        h_ND = torch.stack([last[i] for i in which])
        # A fault anywhere in a slice reaches its last position through attention, so looking there is enough, and
        # looking at slices that draw nothing keeps faulty pages from being shared.
        sound = dict(zip(which, h_ND.isfinite().all(-1).tolist(), strict=True))
        for i in which:
            draws[i] = [] if sound[i] else [Draw(fault=FAULT)]
        drawing = [i for i in which if plan[i].samples and sound[i]]
        if drawing:
            # Stacking copies; when every slice draws, as in pure decoding, there is nothing to pick.
            h = h_ND if len(drawing) == len(which) else torch.stack([last[i] for i in drawing])
            rows = self._rows(plan, drawing, masks)
            for i, draw in zip(drawing, sample(self.model.head(h), rows), strict=True):
                draws[i] = [draw]

    def _rows(self, plan: Sequence[Slice], which: Sequence[int], masks: Masks | None) -> list[Row]:
        """What is wanted of these slices."""
        allowed = masks() if masks else None
        rows = []
        for i in which:
            job, mask = plan[i].job, allowed[i][0] if allowed and allowed[i] else None
            rows.append(Row(job.request.params, job.seed, job.tokens, len(job.request.prompt), mask, self.eos))
        return rows

    def wipe(self, pages: Sequence[int]) -> None:
        self.latents[:, [0, *pages]] = 0

    def draft(self, done: Sequence[tuple[Slice, int]], depth: int) -> list[tuple[int, ...]]:
        raise NotImplementedError

    def read_page(self, page: int) -> bytes:
        return self.latents[:, page].contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def write_page(self, page: int, data: bytes) -> None:
        stored = torch.frombuffer(bytearray(data), dtype=self.latents.dtype)
        self.latents[:, page] = stored.view(self.latents[:, page].shape).to(self.latents.device)

    @torch.inference_mode()
    def idle_step(self) -> None:
        """One decoding step over the scrap page, to warm up or to time."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
        self.model(zero, Batch(zero, cache=LatentPages(self.latents, zero, zero)))

    def _forward(self, slices: Sequence[Slice]) -> Tensor:
        """Hidden states of each slice's last token, [B, D]."""
        device = self.model.device
        T = max(s.count for s in slices)
        # Built on the host and moved at once: the shapes are small, launches are not.
        starts = torch.tensor([s.start for s in slices])[:, None]
        counts = torch.tensor([s.count for s in slices])[:, None]
        offsets = torch.arange(T)[None]
        real_BT = offsets < counts
        positions_BT = torch.where(real_BT, starts + offsets, 0)
        table_BP = self._page_table(slices)
        pages_BT = table_BP.gather(1, positions_BT // self.page_size)
        slots_BT = torch.where(
            real_BT, pages_BT * self.page_size + positions_BT % self.page_size, offsets % self.page_size
        )
        tokens_BT = torch.tensor([s.job.tokens[s.start : s.start + s.count] + [0] * (T - s.count) for s in slices])
        fresh = all(s.start == 0 for s in slices)
        cache = LatentPages(self.latents, table_BP.to(device), slots_BT.to(device), fresh=fresh)
        h_BTD, _ = self.model.hidden(tokens_BT.to(device), Batch(positions_BT.to(device), cache=cache))
        return h_BTD[torch.arange(len(slices), device=device), (counts[:, 0] - 1).to(device)]

    def _page_table(self, slices: Sequence[Slice]) -> Tensor:
        """[B, P]: the pages that hold each job's tokens up to the end of its slice, padded with the scrap page."""
        needed = [-(-(s.start + s.count) // self.page_size) for s in slices]
        width = max(needed)
        return torch.tensor(
            [s.job.pages[:n] + [0] * (width - n) for s, n in zip(slices, needed, strict=True)], dtype=torch.int64
        )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on CPU memory is only taken when a page is first written (calloc; torch fills at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _groups(plan: Sequence[Slice], which: Sequence[int]) -> Iterator[list[int]]:
    """Indices of slices that share a forward: single tokens, then chunks by falling length with little padding."""
    if single := [i for i in which if plan[i].count == 1]:
        yield single
    chunks = sorted((i for i in which if plan[i].count > 1), key=lambda i: -plan[i].count)
    while chunks:
        longest = plan[chunks[0]].count
        group = [i for i in chunks if plan[i].count >= PADDING * longest]
        yield group
        chunks = chunks[len(group) :]
