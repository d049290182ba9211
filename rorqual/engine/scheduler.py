"""Who computes how many tokens in the next step. Decisions only: no tensors, no sampling, no clock.

One rule covers everything: a job has tokens, some of which are computed (their latents are in the cache); a step is a
list of slices (job, start, count), and a job whose last token is computed gets another one. A running job lacks one
token (decoding) or many (its prompt, or what a preemption threw away); both are the same case with another count.

 - Every decoding job gets its token in every step, whatever else there is to do: a long prompt slows others down by
   one chunk, it never stops them.
 - Prompts share what is left of the token budget, in order of arrival, in chunks that end at page borders; at least
   one page goes to them even when decoding alone uses up the budget.
 - A job is admitted with pages for all its tokens, so that prompts never compete half way, and only while one page is
   left for every running job, so that it is not thrown out again at once. Decoding takes one page more at a time.
   When none is left, the latest arrival is preempted: it loses its pages, keeps its tokens, and goes back to the
   front of the queue. The earliest job is never a victim, and any admitted job fits alone, so every job ends.

Left out: priorities, and swapping pages out instead of recomputing them (recomputing finds most of them published).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rorqual.engine.api import Request
from rorqual.engine.pages import PagePool
from rorqual.errors import CapacityError, PromptTooLong


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way. tokens: prompt and what was generated; computed: how many of them are in the cache;
    keys: of the full computed pages, chained (see `pages`); cached_tokens: prompt tokens found in the cache
    when it was first admitted."""

    request: Request
    arrival: int
    seed: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int | None = None

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute tokens start .. start + count - 1 of a job; its pages have room for them."""

    job: Job
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether this reaches the job's last token, so that the next one can be drawn."""
        return self.start + self.count == len(self.job.tokens)


class Scheduler:
    """max_num_seqs: jobs running at once; max_batched_tokens: the budget of a step; max_waiting: the queue's bound;
    max_model_len: prompt and completion, cut to what the cache can hold for one job alone."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_model_len: int,
        max_num_seqs: int = 32,
        max_batched_tokens: int = 512,
        max_waiting: int = 1024,
    ) -> None:
        self.pool = pool
        self.max_model_len = min(max_model_len, pool.usable * pool.page_size)
        self.max_num_seqs, self.max_batched_tokens, self.max_waiting = (
            max_num_seqs,
            max_batched_tokens,
            max_waiting,
        )
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # by arrival
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

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
        self.waiting.append(job)
        return job

    def schedule(self) -> list[Slice]:
        """The next step. Decoding slices come first, each part in order of arrival."""
        plan = self._decode()
        budget = max(self.pool.page_size, self.max_batched_tokens - len(plan))
        for job in self.running:
            if job.missing > 1 and budget > 0:
                budget -= self._chunk(job, budget, plan)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            job = self.waiting[0]
            if not self._admit(job):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._chunk(job, budget, plan)
        return plan

    def computed(self, slice_: Slice) -> None:
        """The slice was computed without fault: its full pages may be shared from now on."""
        job, size = slice_.job, self.pool.page_size
        job.computed = slice_.start + slice_.count
        for i in range(len(job.keys), job.computed // size):
            parent = job.keys[-1] if job.keys else self.pool.root
            job.keys.append(self.pool.publish(job.pages[i], parent, job.tokens[i * size : (i + 1) * size]))

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
        plan: list[Slice] = []
        for job in list(self.running):
            if job.pages and job.missing == 1 and self._make_room(job):
                plan.append(Slice(job, job.computed, 1))
        return plan

    def _make_room(self, job: Job) -> bool:
        """A page for the job's next token, from the latest arrivals if need be. False: the job itself was the
        latest. Victims come after `job`, so nothing already in the plan is undone."""
        while len(job.pages) < self.pool.pages_for(len(job.tokens)):
            taken = self.pool.take(1)
            if taken is not None:
                job.pages += taken
                continue
            victim = self.running.pop()
            self._drop_pages(victim)
            self.waiting.appendleft(victim)
            if victim is job:
                return False
        return True

    def _admit(self, job: Job) -> bool:
        """Take what the cache has of the job's tokens and fresh pages for the rest, or nothing at all."""
        pages, keys = self.pool.match(job.tokens)
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
        job.pages, job.keys, job.computed = [], [], 0
