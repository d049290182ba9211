"""CUDA graphs over a whole decoding step: embedding, layers, head and the draws in one launch.

A decoding step of a small model is hundreds of kernels of a few microseconds each; launched one by one the GPU waits for the
host. A graph is captured for each batch size and page-table width in powers of two, when it is first needed, and replayed
over static buffers. Rows beyond the batch are padding: length 1, their latent in the scrap page.

The host is not waited for either: where the device can draw every row (greedily, or by `drawing`), the next step's graph is
launched before this step's tokens are read, its input being this step's output on the device. If the engine then asks for
those rows, they are on their way already; rows that it no longer wants (an answer that ended) were computed for nothing, and
what they wrote lies beyond their tokens, in pages of their own, where the stream's order lets a later owner write over it.
With drafts (`verification`) a step's length is known only when it is done, and nothing is begun ahead.

What cannot be captured (a format whose product waits for the host) is remembered by its size, and the runner computes
steps of that size and more eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.engine.drawing import FIELDS, REDO, draw, fields
from rorqual.engine.replay import Replay, pinned
from rorqual.engine.scheduler import Job, Slice
from rorqual.engine.verification import Verification
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.transformer import Transformer
from rorqual.ops.most_likely import most_likely

log = logging.getLogger(__name__)

MAX_ROWS = 256
REST = 64
"""Steps that the host draws in after one that the device could not: such requests come again."""


class Decoded(NamedTuple):
    """best: the most likely token of each row, -1 where its numbers are not finite. logits [B, V] on the device, or None
    where only the tokens were asked for; the next step overwrites them."""

    best: list[int]
    logits: Tensor | None = None


class Place(NamedTuple):
    """A row of a step: the job, the position of the token that goes in, and the page that holds it (a job that was
    preempted and computed again has others)."""

    job: Job
    position: int
    page: int

    @classmethod
    def of(cls, job: Job, position: int, page_size: int) -> Place:
        return cls(job, position, job.pages[position // page_size])


class _Graph:
    """One captured step. drawn: rows draw by their own parameters (`fields`, fp64 [B, 5]), else each takes its best token.
    inputs: one int64 buffer, so that one copy fills it: tokens, positions, slots and lengths [B] each, the rows of the last
    step that the tokens come from [B], then the page table [B, width]. Two host buffers take turns, since a copy may still
    be under way when the next step is written."""

    def __init__(self, model: Transformer, latents: Tensor, batch: int, width: int, drawn: bool, pool: Any) -> None:
        self.batch, self.width, self.drawn, self.turn = batch, width, drawn, 0
        self.fields = [pinned(batch * FIELDS, latents.device, torch.float64).view(batch, -1) for _ in range(2)]
        self.params = self.fields[0].to(latents.device, copy=True)
        self.hosts = [pinned((5 + width) * batch, latents.device) for _ in range(2)]
        self.answers = [pinned(batch, latents.device) for _ in range(2)]
        self.model, self.latents = model, latents
        self._pretend(self.hosts[0], len(latents[0]), latents.shape[2] * width)
        self.inputs = self.hosts[0].to(latents.device, copy=True)
        self.replay = Replay(self._step, latents.device, pool)
        self.logits, self.told = self.replay.outputs

    def _pretend(self, host: Tensor, pages: int, length: int) -> None:
        """A step by which to choose how it is captured: rows of different tokens that read as many keys as there can be, of
        whosever pages. They write to the scrap page."""
        numbers, table = self._parts(host)
        numbers[0] = torch.arange(self.batch) * 7919 % self.model.cfg.vocab_size
        numbers[1], numbers[3] = length - 1, length
        table[:] = (torch.arange(table.numel()) % pages).view_as(table)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions, slots, lengths, sources [5, B], and the table."""
        return buffer[: 5 * self.batch].view(5, -1), buffer[5 * self.batch :].view(self.batch, -1)

    def _step(self) -> tuple[Tensor, ...]:
        (tokens, positions, slots, lengths, _), table = self._parts(self.inputs)
        cache = LatentPages(self.latents, table, slots[:, None], lengths)
        h_BD = self.model.hidden(tokens[:, None], Batch(positions[:, None], cache=cache))[0][:, 0]
        logits_BV = self.model.head(h_BD)
        if self.drawn:
            return logits_BV, draw(logits_BV, self.params)
        # What is not finite in a hidden state is not finite in its logits.
        return logits_BV, most_likely(logits_BV)

    def launch(self, places: Sequence[Place], page_size: int, tokens: Sequence[int] | _Ahead) -> _Ahead:
        """Start a step, and the copy of its answer to the host. tokens: what goes in, or the step that draws it (and of
        whose rows these places are the next)."""
        self.turn ^= 1
        host, n = self.hosts[self.turn], len(places)
        numbers, table = (part.numpy() for part in self._parts(host))
        numbers[:3, n:], numbers[3, n:], numbers[4, n:] = 0, 1, 0
        table[n:, 0] = 0
        for i, (job, position, page) in enumerate(places):
            numbers[1:4, i] = position, page * page_size + position % page_size, position + 1
            used = position // page_size + 1
            table[i, :used] = job.pages[:used]
        if self.drawn:
            told = self.fields[self.turn].numpy()
            told[n:] = 0.0
            for i, (job, position, _) in enumerate(places):
                told[i] = fields(job.request.params, job.seed, position + 1)
            self.params.copy_(self.fields[self.turn], non_blocking=True)
        if isinstance(tokens, _Ahead):
            rows = {id(place.job): row for row, place in enumerate(tokens.places)}
            numbers[4, :n] = [rows[id(place.job)] for place in places]
            self.inputs.copy_(host, non_blocking=True)
            (into, *_, sources), _ = self._parts(self.inputs)
            # What is not a token (a fault, found when the answer is read) must not index the embedding.
            torch.index_select(tokens.graph.told.clamp(min=0), 0, sources, out=into)
        else:
            numbers[0, :n] = tokens
            self.inputs.copy_(host, non_blocking=True)
        self.replay()
        answer = self.answers[self.turn]
        answer.copy_(self.told, non_blocking=True)
        done = torch.cuda.Event() if self.inputs.is_cuda else None
        if done:
            done.record()
        return _Ahead(self, list(places), answer, done)


class _Ahead(NamedTuple):
    """A step under way."""

    graph: _Graph
    places: list[Place]
    answer: Tensor
    done: torch.cuda.Event | None

    def best(self) -> list[int]:
        """Waits for the step."""
        if self.done:
            self.done.synchronize()
        return self.answer[: len(self.places)].tolist()


class DecodeGraphs:
    """latents: the runner's cache, whose address the graphs keep. most: rows of the largest step that can be captured, as
    far as is known; draws: whether sampling can be. On a CPU nothing is captured and all else is the same, for tests."""

    def __init__(self, model: Transformer, latents: Tensor, page_size: int) -> None:
        self.model, self.latents, self.page_size = model, latents, page_size
        self.pool = torch.cuda.graph_pool_handle() if latents.is_cuda else None
        self.graphs: dict[tuple[str | int, ...], _Graph | Verification] = {}
        self.most = MAX_ROWS
        self.draws = True
        self.rest = 0  # steps in which the host draws
        self.ahead: _Ahead | None = None
        self.verified: Verification | None = None

    @property
    def usable(self) -> bool:
        return self.most > 0

    def forget(self) -> None:
        """Something else computes a step: what was begun for it is not wanted, what was left of the last is gone."""
        self.ahead = self.verified = None

    def verify(self, slices: Sequence[Slice], depth: int, simple: bool) -> tuple[list[list[int]], Tensor | None] | None:
        """One token for each slice and one after each of its drafts (at most `depth`): each row's token, or each row's best
        one and the logits for the host to draw from. simple: the device may draw. None where no graph can be had."""
        self.forget()
        last = max(s.start for s in slices) + 2 * depth
        batch, width = _power(len(slices)), _power(last // self.page_size + 1)
        alone, drawn = self._draws([s.job for s in slices], simple)

        def make() -> Verification:
            return Verification(self.model, self.latents, batch, width, depth, drawn, self.pool)

        step = self._made(("drafts", batch, width, depth, drawn), batch * (1 + depth), make)
        if step is None:
            return self.verify(slices, depth, simple) if drawn and not self.draws else None
        assert isinstance(step, Verification)
        self.verified = step
        told = step.run(slices, alone)
        if step.drafts is not None:
            return told, None
        self.rest = REST if alone else self.rest
        return told, step.rows(slices)

    def _draws(self, jobs: Sequence[Job], simple: bool) -> tuple[bool, bool]:
        """Whether the device draws all tokens of these jobs, and whether any of them is more than the best one."""
        if not any(job.request.params.temperature > 0 for job in jobs):
            return simple, False
        self.rest = max(0, self.rest - 1)
        alone = simple and self.draws and self.rest == 0
        return alone, alone

    def draft(self, done: Sequence[tuple[Slice, int]]) -> dict[int, list[int]]:
        """By id, the next drafts of those slices that the last step verified."""
        return self.verified.draft(done) if self.verified else {}

    def run(self, slices: Sequence[Slice], simple: bool) -> Decoded | None:
        """One token for each slice (of one token, without drafts). simple: nothing is wanted but tokens that the device may
        draw, so that the next step may begin. None where no graph can be had."""
        self.verified = None
        places = [Place.of(s.job, s.start, self.page_size) for s in slices]
        ahead, self.ahead = self.ahead, None
        alone, drawn = self._draws([s.job for s in slices], simple)
        if alone:
            told = self._alone(places, ahead)
            if told is None and not (drawn and not self.draws):
                return None
            if told is not None and REDO not in told:
                return Decoded(told)
            self.ahead, self.rest = None, REST
        step = self._launch(places, [p.job.tokens[p.position] for p in places], drawn=False)
        return Decoded(step.best(), step.graph.logits[: len(places)]) if step else None

    def _alone(self, places: list[Place], ahead: _Ahead | None) -> list[int] | None:
        """The tokens that the device draws, from the step that was begun ahead as far as it has them. The next is begun."""
        if ahead and ahead.places == places:
            self.ahead = self._go_on(ahead)
            return ahead.best()
        known = dict(zip(ahead.places, ahead.best(), strict=True)) if ahead else {}
        left = [place for place in places if place not in known]
        step = self._launch(left, [p.job.tokens[p.position] for p in left]) if left else None
        if left and step is None:
            return None
        if step is not None and len(left) == len(places):
            self.ahead = self._go_on(step)
            return step.best()
        if step is not None:
            known |= zip(left, step.best(), strict=True)
        told = [known[place] for place in places]
        self.ahead = self._begin(places, told)
        return told

    def _go_on(self, step: _Ahead) -> _Ahead | None:
        """The step after one that is under way."""
        places = self._next(step.places)
        return self._launch(places, step) if places else None

    def _begin(self, places: list[Place], drawn: list[int]) -> _Ahead | None:
        """The step after one that is done."""
        tokens = dict(zip((id(p.job) for p in places), drawn, strict=True))
        following = [p for p in self._next(places) if tokens[id(p.job)] >= 0]
        return self._launch(following, [tokens[id(p.job)] for p in following]) if following else None

    def _next(self, places: list[Place]) -> list[Place]:
        """Of rows that draw a token now, those that will go on as far as can be known, one position later."""
        following = []
        for job, position, _ in places:
            limit = job.request.params.max_tokens
            ends = limit is not None and position + 2 - len(job.request.prompt) >= limit
            if not ends and (position + 1) // self.page_size < len(job.pages):
                following.append(Place.of(job, position + 1, self.page_size))
        return following

    def _launch(self, places: list[Place], tokens: Sequence[int] | _Ahead, drawn: bool | None = None) -> _Ahead | None:
        """drawn: as `_Graph`; None for what the jobs ask for."""
        if drawn is None:
            drawn = any(place.job.request.params.temperature > 0 for place in places)
        batch, width = _power(len(places)), _power(max(place.position for place in places) // self.page_size + 1)

        def make() -> _Graph:
            return _Graph(self.model, self.latents, batch, width, drawn, self.pool)

        graph = self._made(("token", batch, width, drawn), batch, make)
        assert not isinstance(graph, Verification)
        return graph.launch(places, self.page_size, tokens) if graph else None

    def _made(
        self, key: tuple[str | int, ...], rows: int, make: Callable[[], _Graph | Verification]
    ) -> _Graph | Verification | None:
        if rows > self.most:
            return None
        if key not in self.graphs:
            try:
                self.graphs[key] = make()
            except Exception as error:  # whatever it is, decoding goes on without
                if _exhausted(error):
                    raise torch.OutOfMemoryError(str(error)) from None
                log.warning(
                    "a decoding step of %d rows cannot be captured as a CUDA graph %s: %s: %s",
                    *(rows, key, type(error).__name__, error),
                )
                if key[-1] is True and self.draws:
                    self.draws = False  # perhaps it is only the sampling
                else:
                    self.most = rows // 2
                if self.latents.is_cuda:
                    torch.cuda.synchronize()
                return None
            log.debug("captured a decoding step of %d rows: %s", rows, key)
        return self.graphs[key]


def _exhausted(error: BaseException | None) -> bool:
    """Whether memory was what failed: a capture that it breaks off may end with another error."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
