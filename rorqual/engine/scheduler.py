"""Who computes how many tokens in the next step. Decisions only: no tensors, no sampling, no clock.

One rule covers everything: a job has tokens, some of which are computed (their latents are in the cache); a step is a
list of slices (job, start, count), and a job whose last token is computed gets another one. A running job lacks one
token (decoding) or many (its prompt, or what a preemption threw away); both are the same case with another count.

 - Every decoding job gets its token in every step, whatever else there is to do: a long prompt slows others down by
   one chunk, it never stops them. Its drafts (`engine.speculation`) come along if the budget and the pages allow it:
   nobody is preempted for a guess.
 - Prompts share what is left of the token budget, in order of rank, in chunks that end at page borders; at least
   one page goes to them even when decoding alone uses up the budget.
 - A job is admitted with pages for all its tokens, so that prompts never compete half way, and only while one page is
   left for every running job, so that it is not thrown out again at once. Decoding takes one page more at a time.
   When none is left, the last in rank is preempted: it loses its pages, keeps its tokens, and goes back to its place
   in the queue. The first in rank is never a victim, and any admitted job fits alone, so every job ends.

Rank is priority (lower numbers first), then arrival. Who starves: among equals nobody, since the head of the queue is
never overtaken and neither its size nor what comes later delays it. A request of a higher number waits for as long as
lower ones keep arriving faster than they are served; that is what priorities are for. A waiting request never throws
out a running one: priority decides who starts, and who yields when pages run out.

Left out: swapping pages out instead of recomputing them (recomputing finds most of them published).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from rorqual.engine.api import Request
from rorqual.engine.pages import PagePool
from rorqual.errors import CapacityError, PromptTooLong

LEAST_BUDGET = 512
"""Tokens of a step; where memory runs out the budget is halved, but not below this."""


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way. tokens: prompt and what was generated; computed: how many of them are in the cache;
    keys: of the full computed pages, chained (see `pages`); drafts: guesses at the tokens that follow; cached_tokens:
    prompt tokens found in the cache when it was first admitted; loading: its pages are still being read from disk, so
    it is not admitted (None: nobody has looked there yet)."""

    request: Request
    arrival: int
    seed: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    drafts: tuple[int, ...] = ()
    computed: int = 0
    cached_tokens: int | None = None
    loading: bool | None = None
    preemptions: int = 0

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def rank(self) -> tuple[int, int]:
        return self.request.priority, self.arrival


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute tokens start .. start + count - 1 of a job, then its drafts; its pages have room for them."""

    job: Job
    start: int
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether this reaches the job's last token, so that the next one can be drawn: one draw after that token and
        one after each draft. True until the draws are added to the job's tokens."""
        return self.start + self.count == len(self.job.tokens)

    @property
    def tokens(self) -> list[int]:
        """The ids to compute, at positions start and up."""
        return [*self.job.tokens[self.start : self.start + self.count], *self.drafts]


class Scheduler:
    """max_num_seqs: jobs running at once; max_batched_tokens: the budget of a step, drafts included; max_waiting: the
    queue's bound; max_model_len: prompt and completion, cut to what the cache can hold for one job alone; lookahead: a
    decoding job gets its next page one token early, if there is one, for a runner that begins the next step by itself."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_model_len: int,
        max_num_seqs: int = 32,
        max_batched_tokens: int = 512,
        max_waiting: int = 1024,
        lookahead: bool = False,
    ) -> None:
        self.pool, self.lookahead = pool, lookahead
        self.max_model_len = min(max_model_len, pool.usable * pool.page_size)
        self.max_num_seqs, self.max_batched_tokens, self.max_waiting = (
            max_num_seqs,
            max_batched_tokens,
            max_waiting,
        )
        self.waiting: list[Job] = []  # by rank
        self.running: list[Job] = []  # by rank
        self.preemptions = 0
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def next_up(self) -> list[Job]:
        """The jobs that the next step admits, pages and budget permitting."""
        return self.waiting[: self.max_num_seqs - len(self.running)]

    def add(self, request: Request, seed: int) -> Job:
        """Queue a request. Raises PromptTooLong if it can never fit, CapacityError if the queue is full."""
        total = len(request.prompt) + (request.params.max_tokens or 1)
        if total > self.max_model_len:
            raise PromptTooLong(
                f"prompt and completion need {total} tokens, the model and its cache hold {self.max_model_len}",
                remedy="shorten the prompt or max_tokens, or give the engine a larger cache",
            )
        if len(self.waiting) >= self.max_waiting:
            raise CapacityError(f"{len(self.waiting)} requests are waiting already", remedy="try again later")
        job = Job(request, self._arrivals, seed, list(request.prompt))
        self._arrivals += 1
        insort(self.waiting, job, key=_rank)
        return job

    def schedule(self) -> list[Slice]:
        """The next step. Decoding slices come first, each part in order of rank."""
        plan = self._decode()
        budget = max(self.pool.page_size, self.max_batched_tokens - sum(s.count + len(s.drafts) for s in plan))
        for job in self.running:
            if job.missing > 1 and budget > 0:
                budget -= self._chunk(job, budget, plan)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            job = self.waiting[0]
            if job.loading or not self._admit(job):
                break
            insort(self.running, self.waiting.pop(0), key=_rank)
            budget -= self._chunk(job, budget, plan)
        return plan

    def computed(self, slice_: Slice, accepted: int = 0) -> list[int]:
        """The slice was computed without fault, and the job's tokens now continue with `accepted` of its drafts: full
        pages may be shared from now on. Returns those newly published."""
        job, size = slice_.job, self.pool.page_size
        job.computed = slice_.start + slice_.count + accepted
        published = []
        for i in range(len(job.keys), job.computed // size):
            parent = job.keys[-1] if job.keys else self.pool.root(job.request.salt)
            job.keys.append(self.pool.publish(job.pages[i], parent, job.tokens[i * size : (i + 1) * size]))
            if self.pool.entry(job.pages[i]):
                published.append(job.pages[i])
        return published

    def restart(self, num_pages: int) -> None:
        """The cache was lost and has so many pages now, the scrap page among them: what ran goes back to the queue, to be
        computed again in steps of half the budget. Jobs that no longer fit (`length`) are the caller's to remove."""
        while self.running:
            self._preempt()
        self.pool = self.pool.resized(num_pages)
        self.max_model_len = min(self.max_model_len, self.pool.usable * self.pool.page_size)
        self.max_batched_tokens = max(min(self.max_batched_tokens, LEAST_BUDGET), self.max_batched_tokens // 2)

    def length(self, job: Job) -> int:
        """Tokens that the job must have room for, at least."""
        return max(len(job.request.prompt) + (job.request.params.max_tokens or 1), len(job.tokens) + 1)

    def remove(self, job: Job) -> None:
        """The job has ended, for whatever reason and in whatever state: it holds nothing any more."""
        if job in self.running:
            self.running.remove(job)
        else:
            self.waiting.remove(job)
        self._drop_pages(job)

    def private_pages(self, jobs: Iterable[Job]) -> list[int]:
        """Pages that only these jobs have written to: those not known to hold faultless content."""
        return [page for job in jobs for page in job.pages[len(job.keys) :]]

    def _decode(self) -> list[Slice]:
        ready = [job for job in list(self.running) if job.pages and job.missing == 1 and self._make_room(job)]
        spare = self.max_batched_tokens - len(ready)
        plan: list[Slice] = []
        for job in ready:
            plan.append(Slice(job, job.computed, 1, self._drafts(job, max(0, spare))))
            spare -= len(plan[-1].drafts)
            if self.lookahead and self.pool.pages_for(len(job.tokens) + 1) > len(job.pages):
                job.pages += self.pool.take(1) or []
        return plan

    def _make_room(self, job: Job) -> bool:
        """A page for the job's next token, from the last in rank if need be. False: the job itself was the
        last. Victims come after `job`, so nothing already in the plan is undone."""
        while len(job.pages) < self.pool.pages_for(len(job.tokens)):
            taken = self.pool.take(1)
            if taken is not None:
                job.pages += taken
                continue
            victim = self._preempt()
            if victim is job:
                return False
        return True

    def _preempt(self) -> Job:
        """The last in rank goes back to its place in the queue."""
        victim = self.running.pop()
        self._drop_pages(victim)
        victim.preemptions += 1
        self.preemptions += 1
        victim.loading = None
        insort(self.waiting, victim, key=_rank)
        return victim

    def _drafts(self, job: Job, spare: int) -> tuple[int, ...]:
        """The job's drafts, as many as the budget and the pages have room for."""
        drafts, job.drafts = job.drafts[:spare], ()
        lacking = self.pool.pages_for(len(job.tokens) + len(drafts)) - len(job.pages)
        if lacking > 0:
            job.pages += self.pool.take(lacking) or []
        return drafts[: len(job.pages) * self.pool.page_size - len(job.tokens)]

    def _admit(self, job: Job) -> bool:
        """Take what the cache has of the job's tokens and fresh pages for the rest, or nothing at all."""
        pages, keys = self.pool.match(job.tokens, job.request.salt)
        need = self.pool.pages_for(len(job.tokens)) - len(pages)
        room = self.pool.available - len(self.running)
        fresh = self.pool.take(need) if need <= room else None
        if fresh is None:
            self.pool.release(pages)
            return False
        job.pages, job.keys, job.computed = pages + fresh, keys, len(pages) * self.pool.page_size
        if job.cached_tokens is None:
            job.cached_tokens = job.computed
        return True

    def _chunk(self, job: Job, budget: int, plan: list[Slice]) -> int:
        """Plan as much of the job as the budget allows, up to its end or a page border. Returns the count."""
        end = len(job.tokens)
        if job.missing > budget:
            end = (job.computed + budget) // self.pool.page_size * self.pool.page_size
        count = max(0, end - job.computed)
        if count:
            plan.append(Slice(job, job.computed, count))
        return count

    def _drop_pages(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.keys, job.drafts, job.computed = [], [], (), 0


def _rank(job: Job) -> tuple[int, int]:
    return job.rank
