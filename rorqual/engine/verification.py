"""A decoding step with drafts, for a batch of fixed shape: verification and the next drafts, as two CUDA graphs.

Every sequence brings W = 1 + depth rows: its newest token and its drafts. `verify` computes all of them in rows form, with
head and draws, and finds out how many drafts stand. `guess` reads which tokens follow which rows, runs the MTP module over
the rows that stand, and drafts, link after link. Where the device can draw every row (greedily, or by `drawing`) both
graphs are launched at once and the host waits once; where the host draws, it tells `guess` what it drew.

Rows that are not there (a sequence with fewer drafts, padding of the batch) carry VOID as their token: they stand at
position 0 of the scrap page and their results are not looked at. A row whose numbers are not finite is void to `guess`, so
that nothing of it reaches the scrap page, which everybody's padding reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.drawing import FIELDS, REDO, draw, fields
from rorqual.engine.replay import Replay, pinned
from rorqual.engine.scheduler import Slice
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.transformer import Transformer
from rorqual.ops.most_likely import most_likely

VOID = -2


class Verification:
    """Static buffers, int64: inputs [4, B, W] (tokens, positions, slots, lengths) and the page table [B, width];
    follow [B, W + 1]: the token after each row, VOID where the row does not stand, and the last row that does. On the host:
    best [B, W], each row's token (-1 where its numbers are not finite), and guessed [B, depth], the drafts (-1 where
    there is none).
    """

    def __init__(
        self, model: Transformer, latents: Tensor, batch: int, width: int, depth: int, drawn: bool, pool: Any
    ) -> None:
        self.drawn = drawn
        self.fields = pinned(batch * (1 + depth) * FIELDS, latents.device, torch.float64).view(batch, 1 + depth, FIELDS)
        self.params = self.fields.to(latents.device, copy=True)
        self.model, self.latents, self.page_size = model, latents, latents.shape[2]
        self.batch, self.width, self.depth, self.W = batch, width, depth, 1 + depth
        self.host = pinned((4 * self.W + width) * batch, latents.device)
        self.after = pinned(batch * (self.W + 1), latents.device).view(batch, -1)
        self.best, self.guessed = (pinned(batch * n, latents.device).view(batch, n) for n in (self.W, depth))
        self._pretend()
        self.inputs = self.host.to(latents.device, copy=True)
        self.follow = self.after.to(latents.device, copy=True)
        self.verify = Replay(self._verify, latents.device, pool)
        self.guess = Replay(self._guess, latents.device, pool)
        self._clear()
        self.slices: list[Slice] = []
        self.drafts: list[list[int]] | None = None

    def rows(self, slices: Sequence[Slice]) -> Tensor:
        """The logits of the last step, a row for each draw of these slices."""
        at = [row * self.W + j for row, s in enumerate(slices) for j in range(1 + len(s.drafts))]
        return self.verify.outputs[1][at]

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        rows = 4 * self.batch * self.W
        return buffer[:rows].view(4, self.batch, self.W), buffer[rows:].view(self.batch, self.width)

    def _pretend(self) -> None:
        """A step by which to choose how it is captured: rows of different tokens that read as many keys as there can be. All
        their pages are the scrap page, and chained drafts, which find no page of their own, write there too."""
        self._clear()
        (tokens, positions, _, lengths), _ = self._parts(self.host)
        tokens[:] = (torch.arange(tokens.numel()) * 7919 % self.model.cfg.vocab_size).view_as(tokens)
        lengths[:] = self.width * self.page_size
        positions[:] = lengths - 1

    def _clear(self) -> None:
        (tokens, positions, slots, lengths), table = self._parts(self.host)
        tokens.fill_(VOID)
        lengths.fill_(1)
        for part in (positions, slots, table):
            part.zero_()

    @property
    def _row_tables(self) -> Tensor:
        table = self._parts(self.inputs)[1]
        return table[:, None].expand(-1, self.W, -1).flatten(0, 1)

    def _batch(self, positions: Tensor, slots: Tensor, lengths: Tensor, table: Tensor) -> Batch:
        return Batch(positions[:, None], cache=LatentPages(self.latents, table, slots[:, None], lengths))

    def _verify(self) -> tuple[Tensor, ...]:
        tokens, positions, slots, lengths = self._parts(self.inputs)[0]
        batch = self._batch(positions.flatten(), slots.flatten(), lengths.flatten(), self._row_tables)
        h_ND = self.model.hidden(tokens.clamp(min=0).view(-1, 1), batch)[0][:, 0]
        logits_NV = self.model.head(h_ND)
        if self.drawn:
            best = draw(logits_NV, self.params.flatten(0, 1))
        else:
            best = most_likely(logits_NV)
        best_BW = best.view(self.batch, self.W)
        last_B = (best_BW[:, :-1] == tokens[:, 1:]).long().cumprod(1).sum(1)
        stands = torch.arange(self.W, device=best_BW.device) <= last_B[:, None]
        self.follow[:, : self.W] = torch.where(stands & (best_BW >= 0), best_BW, VOID)
        self.follow[:, self.W] = last_B
        return h_ND, logits_NV, best_BW

    def _guess(self) -> tuple[Tensor, ...]:
        (tokens, positions, slots, lengths), table = self._parts(self.inputs)
        follow_BW, last_B = self.follow[:, : self.W], self.follow[:, self.W]
        real = (follow_BW >= 0) & (tokens != VOID)
        h_ND = self.verify.outputs[0]
        h_ND = self._predict(h_ND, follow_BW, positions, slots, lengths, self._row_tables, real)
        h_BD = h_ND.view(self.batch, self.W, -1)[torch.arange(self.batch, device=h_ND.device), last_B]
        real = real.gather(1, last_B[:, None])[:, 0]
        at = positions[:, 0] + last_B + 1
        drafts: list[Tensor] = []
        for link in range(self.depth):
            if link:
                # The link writes its latent at the newest token's position, where that has a page already.
                index = at // self.page_size
                page = table.gather(1, index.clamp(max=self.width - 1)[:, None])[:, 0]
                real = real & (index < self.width) & (page > 0) & (drafts[-1] >= 0)
                h_BD = self._predict(
                    h_BD, drafts[-1], at, page * self.page_size + at % self.page_size, at + 1, table, real
                )
                at = at + 1
            drafts.append(torch.where(real, most_likely(self.model.head(h_BD)), -1))
        return (torch.stack(drafts, 1),)

    def _predict(
        self, h: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor, lengths: Tensor, table: Tensor, real: Tensor
    ) -> Tensor:
        """The MTP module over rows; those that are not real are computed as padding."""
        ok = real.flatten()
        batch = self._batch(
            torch.where(ok, positions.flatten(), 0), torch.where(ok, slots.flatten(), 0),
            torch.where(ok, lengths.flatten(), 1), table,
        )  # fmt: skip
        h = torch.where(ok[:, None], h, 0.0)
        return self.model.predict_further(h[:, None], [tokens.clamp(min=0).view(-1, 1)], batch)[0][0][:, 0]

    def run(self, slices: Sequence[Slice], alone: bool) -> list[list[int]]:
        """Compute a step; every row's token, per sequence. alone: what the device draws is what is wanted, so the drafts are
        made too, unless a row must be drawn again (`drafts` is None then, and tokens mean no more than whether a row's
        numbers are finite). What is told holds until the next run."""
        self._fill(slices)
        self.slices, self.drafts = list(slices), None
        self.inputs.copy_(self.host, non_blocking=True)
        if self.drawn:
            self.params.copy_(self.fields, non_blocking=True)
        self.verify()
        self.best.copy_(self.verify.outputs[2], non_blocking=True)
        if alone:
            self._draft()
        self._wait()
        told = self.best[: len(slices)].tolist()
        if any(REDO in row for row in told):
            return [[token if token != REDO else 0 for token in row] for row in told]
        if alone:
            self.drafts = self._told()
        return told

    def draft(self, done: Sequence[tuple[Slice, int]]) -> dict[int, list[int]]:
        """By id of the slice, the drafts after what those of the last run have drawn; the others have ended."""
        drawn = {id(s): new for s, new in done}
        if self.drafts is None:
            self.after.fill_(VOID)
            self.after[:, self.W] = 0
            for row, s in enumerate(self.slices):
                if new := drawn.get(id(s), 0):
                    self.after[row, :new] = torch.tensor(s.job.tokens[s.start + 1 : s.start + 1 + new])
                    self.after[row, self.W] = new - 1
            self.follow.copy_(self.after, non_blocking=True)
            self._draft()
            self._wait()
            self.drafts = self._told()
        return {id(s): self.drafts[row] for row, s in enumerate(self.slices) if id(s) in drawn}

    def _draft(self) -> None:
        self.guess()
        self.guessed.copy_(self.guess.outputs[0], non_blocking=True)

    def _wait(self) -> None:
        if self.latents.is_cuda:
            torch.cuda.current_stream().synchronize()

    def _told(self) -> list[list[int]]:
        """The drafts of each sequence, up to the first that could not be made."""
        told = self.guessed[: len(self.slices)].tolist()
        return [list(takewhile(lambda token: token >= 0, row)) for row in told]

    def _fill(self, slices: Sequence[Slice]) -> None:
        self._clear()
        size = self.page_size
        numbers, table = (part.numpy() for part in self._parts(self.host))
        for row, s in enumerate(slices):
            pages = s.job.pages[: self.width]
            table[row, : len(pages)] = pages
            for j, token in enumerate(s.tokens):
                at = s.start + j
                numbers[:, row, j] = token, at, s.job.pages[at // size] * size + at % size, at + 1
                if self.drawn:
                    self.fields[row, j] = torch.tensor(fields(s.job.request.params, s.job.seed, at + 1))
