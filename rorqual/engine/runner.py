"""From a planned step to tensors, through the model, to the draws of each slice, and on to drafts.

A step becomes few forwards (`inputs`): slices of one token, with their drafts, together in rows form, and prompt chunks of
similar length together as [B, T] (`prompts`). Only positions that draw go through the head, all of them in one
multiplication. On a GPU decoding slices go through captured graphs (`graphs`, with drafts `verification`).

Drafts come from the model's MTP module: it reads the hidden state at a position and the token after it, and keeps latents
of its own in the same pages, behind the layers'; chained drafts feed its output back. A position whose step was not
drafted after leaves a gap there, which can cost acceptance and nothing else.

`fixed` computes everything in rows form, prompts too: with products and attention that do not depend on the number of rows
(`model.fixed`) a token's numbers follow from the tokens before it alone, to the bit. Logits are sampled on the CPU then,
where `sampler` promises the same.

The latent cache is one tensor [layers, pages, page_size, C + R], zeroed once: attention multiplies masked places by 0,
and 0 times whatever an uninitialised page holds may be NaN. Left out: grouping across page-table widths (a short chunk
computes masked attention over its longest mate's pages).
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.engine.core import Draw, Masks, OutOfMemory
from rorqual.engine.graphs import DecodeGraphs
from rorqual.engine.inputs import Span, as_chunk, as_rows, pieces
from rorqual.engine.prompts import Prompts
from rorqual.engine.sampler import Row, is_greedy, is_simple, sample
from rorqual.engine.scheduler import Slice
from rorqual.model.transformer import Transformer
from rorqual.ops.attention import attend_pages_missing

log = logging.getLogger(__name__)

FAULT = "its hidden states are not finite numbers"
PADDING = 0.75
"""Chunks share a forward when the shortest has at least this share of the longest's tokens."""
DEPTH = 3
"""Most drafts that are chained."""
ROWS_BYTES = 2**29
"""Bound on what attention in rows form keeps of its splits: longer contexts are read with fewer rows at once."""


class _Kept(NamedTuple):
    """A forward of the last step: its slices, and the hidden states of their tokens, [N, D] in rows form or [B, T, D]."""

    slices: list[Slice]
    h: Tensor


class ModelRunner:
    """Owns the latent cache of `model`; satisfies `core.Runner`. eos: ids that `min_tokens` holds back; drafts: whether to
    draft, where the model has an MTP module; fixed: rows form throughout, for a model that `model.fixed` has changed;
    prompt_graphs: see `EngineSettings`."""

    read_bytes = 0.0

    def __init__(
        self,
        model: Transformer,
        num_pages: int,
        page_size: int,
        eos: tuple[int, ...] = (),
        *,
        drafts: bool = True,
        fixed: bool = False,
        prompt_graphs: bool = False,
    ) -> None:
        self.model, self.page_size, self.eos, self.fixed = model, page_size, eos, fixed
        self.draft_depth = DEPTH if drafts and len(model.mtp) else 0
        self.page_bytes = page_bytes(model, page_size, drafts)
        self.on_device = self.buckets = model.device.type == "cuda"
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs = prompt_graphs
        self._kept: list[_Kept] = []
        self._depth = 0  # of the drafts that were asked for after the last step
        self._shrunk = 0
        self._allocate(num_pages)

    def _allocate(self, num_pages: int) -> None:
        cfg = self.model.cfg
        shape = (cfg.num_hidden_layers + (self.draft_depth > 0), num_pages, self.page_size, cfg.cache_dim)
        self.latents = zeros(shape, self.model.compute_dtype or self.model.dtype, self.model.device)
        if self.latents.is_cuda and not attend_pages_missing():
            self.graphs = DecodeGraphs(self.model, self.latents, self.page_size)
        captures = self.prompt_graphs and self.latents.is_cuda and not self.fixed and self._shrunk <= 2
        self.prompts = Prompts(self.model, self.latents, self.buckets, captures, self.draft_depth > 0)

    @torch.inference_mode()
    def run(self, plan: Sequence[Slice], masks: Masks | None = None) -> list[list[Draw]]:
        """Computes every slice, draws a token where a slice ends its job, and after each draft. Faults are per slice.
        Raises OutOfMemory."""
        self._kept = []
        depth, self._depth = self._depth, 0
        draws: list[list[Draw]] = [[] for _ in plan]
        try:
            left = self._captured(plan, masks, draws, depth) if self.graphs else list(range(len(plan)))
            if left:
                self._eagerly(plan, left, masks, draws)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from None
        return draws

    def _captured(self, plan: Sequence[Slice], masks: Masks | None, draws: list[list[Draw]], depth: int) -> list[int]:
        """Enter the draws of the slices that a graph can compute; returns the others."""
        assert self.graphs is not None
        every = list(range(len(plan)))
        decoding = [i for i in every if plan[i].count == 1 and plan[i].samples]
        if not decoding:
            self.graphs.forget()  # what is computed now may write over it
            return every
        slices = [plan[i] for i in decoding]
        # What holds of a slice's first draw holds of those after its drafts.
        on_device = is_greedy if self.fixed else is_simple
        simple = masks is None and all(on_device(self._row(s)) for s in slices)
        depth = max(depth, *(len(s.drafts) for s in slices))
        if depth:
            verified = self.graphs.verify(slices, depth, simple)
        else:
            decoded = self.graphs.run(slices, simple)
            verified = ([[token] for token in decoded.best], decoded.logits) if decoded else None
        if verified is None:
            self.graphs.forget()
            return every
        best, logits = verified
        if logits is None:
            drawn = iter([Draw(t) for s, row in zip(slices, best, strict=True) for t in row[: 1 + len(s.drafts)]])
        else:
            drawn = iter(self._sample(logits, self._rows(plan, decoding, masks)))
        for i, s, row in zip(decoding, slices, best, strict=True):
            finite = [token >= 0 for token in row[: 1 + len(s.drafts)]]
            mine = [draw if ok else Draw(fault=FAULT) for ok, draw in zip(finite, drawn, strict=False)]
            self._enter(s, mine, finite, draws, i)
        done = set(decoding)
        return [i for i in every if i not in done]

    def _eagerly(
        self, plan: Sequence[Slice], which: Sequence[int], masks: Masks | None, draws: list[list[Draw]]
    ) -> None:
        """Compute these slices and enter their draws."""
        ends: dict[int, Tensor] = {}  # by slice, the hidden states that may draw, [1 + drafts, D]
        for group in self._groups(plan, which):
            slices = [plan[i] for i in group]
            if self.fixed or slices[0].count == 1:
                h_ND = self._hidden_rows([_span(s) for s in slices])
                counts = [len(s.tokens) for s in slices]
                parts = zip(slices, h_ND.split(counts), strict=True)
                ends |= zip(group, (h[s.count - 1 :] for s, h in parts), strict=True)
                self._keep(slices, h_ND)
            else:
                computed = self.prompts.run([_span(s) for s in slices])
                ends |= zip(group, computed.ends_BD[:, None], strict=True)
                self._keep(slices, computed.h_BTD)
        # A fault anywhere in a slice reaches its last position through attention, so looking there is enough, and
        # looking at slices that draw nothing keeps faulty pages from being shared.
        flat = iter(torch.cat([ends[i] for i in which]).isfinite().all(-1).tolist())
        sound = {i: [next(flat) for _ in ends[i]] for i in which}
        drawing = [i for i in which if plan[i].samples and sound[i][0]]
        drawn: Iterator[Draw] = iter(())
        if drawing:
            h = torch.cat([ends[i] for i in drawing])
            drawn = iter(self._sample(self.model.head(h), self._rows(plan, drawing, masks)))
        for i in which:
            if not sound[i][0]:
                draws[i] = [Draw(fault=FAULT)]
            elif plan[i].samples:
                mine = [draw if ok else Draw(fault=FAULT) for ok, draw in zip(sound[i], drawn, strict=False)]
                self._enter(plan[i], mine, sound[i], draws, i)

    def _enter(self, s: Slice, mine: list[Draw], finite: list[bool], draws: list[list[Draw]], i: int) -> None:
        """The draws of slice i. A draft whose numbers are not finite may fall without anybody noticing: what it wrote must
        not stay in the page."""
        draws[i] = mine if finite[0] else [Draw(fault=FAULT)]
        for at in (s.start + j for j, ok in enumerate(finite) if j and not ok):
            self.latents[:, s.job.pages[at // self.page_size], at % self.page_size] = 0

    def _keep(self, slices: list[Slice], h: Tensor | None) -> None:
        if self.draft_depth and h is not None:
            self._kept.append(_Kept(slices, h))

    def _sample(self, logits_NV: Tensor, rows: Sequence[Row]) -> list[Draw]:
        return sample(logits_NV.cpu() if self.fixed else logits_NV, rows)

    def _rows(self, plan: Sequence[Slice], which: Sequence[int], masks: Masks | None) -> list[Row]:
        """What is wanted of each draw of these slices."""
        allowed = masks() if masks else None
        rows = []
        for i in which:
            for j in range(1 + len(plan[i].drafts)):
                rows.append(self._row(plan[i], j, allowed[i][j] if allowed and allowed[i] else None))
        return rows

    def _row(self, s: Slice, j: int = 0, mask: Any = None) -> Row:
        """What the draw after a slice's first j drafts depends on."""
        job = s.job
        before = [*job.tokens, *s.drafts[:j]] if j else job.tokens
        return Row(job.request.params, job.seed, before, len(job.request.prompt), mask, self.eos)

    @torch.inference_mode()
    def draft(self, done: Sequence[tuple[Slice, int]], depth: int) -> list[tuple[int, ...]]:
        """What was decoded ahead of the host has left no hidden states, and gets no drafts. Raises OutOfMemory."""
        self._depth = depth
        try:
            drafts = self.graphs.draft(done) if self.graphs else {}
            drafts |= self._draft_eagerly([(s, new) for s, new in done if id(s) not in drafts], depth)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from None
        finally:
            self._kept = []
        return [tuple(drafts.get(id(s), ())[:depth]) for s, _ in done]

    def _draft_eagerly(self, done: Sequence[tuple[Slice, int]], depth: int) -> dict[int, list[int]]:
        """The MTP module over what stands of the last step's forwards, then the chain. By id of the slice."""
        grown = {id(s): new for s, new in done}
        asking: list[Slice] = []
        lasts: list[Tensor] = []
        for kept in self._kept:
            mine = [s for s in kept.slices if id(s) in grown]
            if mine:
                h_BD = self._predict_kept(kept, mine, grown)
                growing = [k for k, s in enumerate(mine) if grown[id(s)]]
                asking += [mine[k] for k in growing]
                lasts.append(h_BD[growing])
        drafts: dict[int, list[int]] = {id(s): [] for s in asking}
        if not asking:
            return drafts
        h_BD = torch.cat(lasts)
        at = [s.start + _stands(s, grown) for s in asking]  # the newest token's position, not computed yet
        for link in range(depth):
            for s, guess in zip(asking, self.model.head(h_BD).argmax(-1).tolist(), strict=True):
                drafts[id(s)].append(guess)
            # The next link writes its latent at the newest token's position, where that has a page already.
            going = [k for k, s in enumerate(asking) if at[k] // self.page_size < len(s.job.pages)]
            if link + 1 == depth or not going:
                break
            asking, at, h_BD = [asking[k] for k in going], [at[k] for k in going], h_BD[going]
            spans = [Span([drafts[id(s)][-1]], p, s.job.pages) for s, p in zip(asking, at, strict=True)]
            h_BD = self._predict_rows(spans, h_BD)
            at = [p + 1 for p in at]
        return drafts

    def _predict_kept(self, kept: _Kept, mine: list[Slice], grown: dict[int, int]) -> Tensor:
        """The MTP module's output [B, D] at the last position that stands of each of these slices of a forward."""
        spans = []
        for s in mine:
            n = _stands(s, grown)
            spans.append(Span(s.job.tokens[s.start + 1 : s.start + 1 + n], s.start, s.job.pages))
        chosen = {id(s) for s in mine}
        if kept.h.ndim == 3:
            rows = [k for k, s in enumerate(kept.slices) if id(s) in chosen]
            tokens_BT, batch, last_B = as_chunk(spans, self.latents, self.page_size, self.buckets)
            h_BTD = kept.h[rows, : tokens_BT.shape[1]]
            out_BTD = self.model.predict_further(h_BTD, [tokens_BT], batch)[0][0]
            return out_BTD[torch.arange(len(mine), device=out_BTD.device), last_B]
        counts = [len(s.tokens) for s in kept.slices]
        lengths = {id(s): len(span.tokens) for s, span in zip(mine, spans, strict=True)}
        parts = zip(kept.slices, kept.h.split(counts), strict=True)
        h_ND = torch.cat([h[: lengths[id(s)]] for s, h in parts if id(s) in chosen])
        ends = np.cumsum([len(span.tokens) for span in spans]) - 1
        return self._predict_rows(spans, h_ND)[torch.from_numpy(ends).to(h_ND.device)]

    def _hidden_rows(self, spans: Sequence[Span]) -> Tensor:
        """Hidden states [N, D] of the spans' tokens, in rows form."""
        batches = (as_rows(piece, self.latents, self.page_size) for piece in pieces(spans, self._at_once(spans)))
        return torch.cat([self.model.hidden(tokens, batch)[0][:, 0] for tokens, batch in batches])

    def _predict_rows(self, spans: Sequence[Span], h_ND: Tensor) -> Tensor:
        """The MTP module's output [N, D] in rows form. spans: the tokens after those of `h_ND`, at the latter's places."""
        out, begin = [], 0
        for piece in pieces(spans, self._at_once(spans)):
            tokens_N1, batch = as_rows(piece, self.latents, self.page_size)
            h_N1D = h_ND[begin : begin + len(tokens_N1), None]
            out.append(self.model.predict_further(h_N1D, [tokens_N1], batch)[0][0][:, 0])
            begin += len(tokens_N1)
        return torch.cat(out)

    def _at_once(self, spans: Sequence[Span]) -> int:
        """Rows of one forward, so that attention's parts, fp32 [rows, H, splits, C], stay within bounds."""
        cfg = self.model.cfg
        splits = 1 + max(s.start + len(s.tokens) for s in spans) // 512
        return max(16, ROWS_BYTES // (4 * cfg.num_attention_heads * cfg.kv_lora_rank * splits))

    def _groups(self, plan: Sequence[Slice], which: Sequence[int]) -> Iterator[list[int]]:
        """Indices of slices that share a forward: those in rows form, then chunks by falling length with little padding."""
        if rows := [i for i in which if self.fixed or plan[i].count == 1]:
            yield rows
        chunks = sorted({*which} - {*rows}, key=lambda i: -plan[i].count)
        while chunks:
            longest = plan[chunks[0]].count
            group = [i for i in chunks if plan[i].count >= PADDING * longest]
            yield group
            chunks = chunks[len(group) :]

    def wipe(self, pages: Sequence[int]) -> None:
        self.latents[:, [0, *pages]] = 0

    def shrink(self) -> int:
        """A cache of three quarters, empty; graphs are captured anew, but not after the second time. Returns the pages,
        0 if none can be had."""
        pages = self.latents.shape[1] * 3 // 4
        if pages < 2:
            return 0
        self._shrunk += 1
        if self.latents.is_cuda:
            torch.cuda.synchronize()  # a step that was begun ahead may be under way
        self._kept, self.graphs = [], None
        self.latents = self.latents.new_empty(0, 0, 0, 0)
        self.prompts = Prompts(self.model, self.latents, self.buckets, False, False)
        while pages >= 2:
            gc.collect()
            if self.latents.is_cuda:
                torch.cuda.empty_cache()
            try:
                self._allocate(pages)
            except torch.OutOfMemoryError:
                pages = pages * 3 // 4
                continue
            if self._shrunk > 2:
                self.graphs = None
            return pages
        return 0

    def read_page(self, page: int) -> bytes:
        return self.latents[:, page].contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def write_page(self, page: int, data: bytes) -> None:
        stored = torch.frombuffer(bytearray(data), dtype=self.latents.dtype)
        self.latents[:, page] = stored.view(self.latents[:, page].shape).to(self.latents.device)

    @torch.inference_mode()
    def idle_step(self) -> None:
        """One decoding step over the scrap page, to warm up or to time."""
        tokens, batch = as_rows([Span([0], 0, [0])], self.latents, self.page_size)
        self.model(tokens, batch)


def page_bytes(model: Transformer, page_size: int, drafts: bool) -> int:
    """Of a page of the latent cache, with the MTP module's latents if it drafts."""
    dtype = model.compute_dtype or model.dtype
    layers = model.cfg.num_hidden_layers + (drafts and len(model.mtp) > 0)
    return layers * page_size * model.cfg.cache_dim * dtype.itemsize


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on CPU memory is only taken when a page is first written (calloc; torch fills at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _span(s: Slice) -> Span:
    return Span(s.tokens, s.start, s.job.pages)


def _stands(s: Slice, grown: dict[int, int]) -> int:
    """Positions of a slice whose hidden state stands, now that its job has grown."""
    return s.count + max(grown[id(s)] - 1, 0)
