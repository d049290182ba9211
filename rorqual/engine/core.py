"""The engine itself, synchronous: requests go in, `step()` computes one batch and returns the news.

It joins a scheduler (decides), a runner (computes and draws) and the bookkeeping of endings. It knows neither tensors
nor processes: tests drive it with a runner of ten lines, `llm` calls it directly, `process` puts it into a child.

Every request that `add` accepted ends with exactly one output that has a finish reason, whatever happens:
 - a token that stops it, its length, or `abort`;
 - a fault in one row (logits that are not numbers) ends that request with an error;
 - an exception in the runner ends every request of that step with an error.
After a fault the pages that were being written are wiped: a stale NaN would reach later owners of the page even
through masked attention, since 0 * NaN is NaN. If wiping fails too, the device is gone and the exception is the
caller's.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rorqual.engine.api import EngineInfo, FinishReason, Output, Request, TokenLogprob, check_request
from rorqual.engine.scheduler import Job, Scheduler, Slice
from rorqual.errors import RequestError, RorqualError

log = logging.getLogger(__name__)


class Draw(NamedTuple):
    """What a slice came to. token_id: None unless the slice samples; fault: why its row cannot be used."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    fault: str | None = None


class Runner(Protocol):
    """Computes a step. `engine.runner.ModelRunner` is the real one."""

    def run(self, plan: Sequence[Slice]) -> list[Draw]:
        """One draw per slice, in order."""
        ...

    def wipe(self, pages: Sequence[int]) -> None:
        """Make the content of these pages, and of the scrap page, harmless."""
        ...


class EngineCore:
    """Not thread-safe: one thread calls add, abort and step."""

    def __init__(self, runner: Runner, scheduler: Scheduler, info: EngineInfo) -> None:
        assert info.max_model_len <= scheduler.max_model_len, "the cache must hold one request of full length"
        self.runner, self.scheduler, self.info = runner, scheduler, info
        self._jobs: dict[str, Job] = {}
        self._news: list[Output] = []  # endings that happened between steps

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._jobs or self._news)

    @property
    def has_room(self) -> bool:
        """Whether `add` would find a place in the queue."""
        return len(self.scheduler.waiting) < self.scheduler.max_waiting

    def add(self, request: Request) -> None:
        """Raises RequestError (PromptTooLong, CapacityError) when the request cannot run; nothing is kept then."""
        check_request(request, self.info)
        if request.id in self._jobs:
            raise RequestError(f"a request called {request.id!r} is running", param="id")
        seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
        self._jobs[request.id] = self.scheduler.add(request, seed)

    def abort(self, request_id: str) -> None:
        """Free what the request holds, now. Its last output comes with the next step. Unknown ids pass: the
        request may have ended while the abort was on its way."""
        if job := self._jobs.get(request_id):
            self._news.append(self._end(job, FinishReason.ABORT))

    def step(self) -> list[Output]:
        """Compute one batch. Returns what is new, at most one output per request."""
        news, self._news = self._news, []
        plan = self.scheduler.schedule()
        if not plan:
            assert self.scheduler.idle, "jobs are waiting and none can run"
            return news
        try:
            draws = self.runner.run(plan)
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan))
            return news + self._fail([s.job for s in plan], f"{type(error).__name__}: {error}")
        faulty = [(s.job, d.fault) for s, d in zip(plan, draws, strict=True) if d.fault]
        for slice_, draw in zip(plan, draws, strict=True):
            if draw.fault is None:
                self.scheduler.computed(slice_)
                if draw.token_id is not None:
                    news.append(self._advance(slice_.job, draw.token_id, draw.logprob))
        for job, fault in faulty:
            log.error("request %s failed: %s", job.request.id, fault)
            news += self._fail([job], fault)
        return news

    def _advance(self, job: Job, token: int, logprob: TokenLogprob | None) -> Output:
        job.tokens.append(token)
        logprobs = () if logprob is None else (logprob,)
        reason = self._reason(job, token)
        if reason is not None:
            return self._end(job, reason, (token,), logprobs)
        return Output(job.request.id, (token,), logprobs, job.cached_tokens or 0)

    def _reason(self, job: Job, token: int) -> FinishReason | None:
        params = job.request.params
        if token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        if job.generated == params.max_tokens or len(job.tokens) >= self.info.max_model_len:
            return FinishReason.LENGTH
        return None

    def _fail(self, jobs: Sequence[Job], fault: str | None) -> list[Output]:
        pages = self.scheduler.private_pages(jobs)
        remedy = "try again; if it happens again, the log has the details"
        error = RorqualError(f"the model failed to compute this request: {fault}", remedy=remedy)
        outputs = [self._end(job, FinishReason.ERROR, error=error) for job in jobs]
        self.runner.wipe(pages)
        return outputs

    def _end(
        self,
        job: Job,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: Exception | None = None,
    ) -> Output:
        del self._jobs[job.request.id]
        self.scheduler.remove(job)
        return Output(job.request.id, tokens, logprobs, job.cached_tokens or 0, reason, error)
