"""The engine itself, synchronous: requests go in, `step()` computes one batch and returns the news.

It joins a scheduler (decides), a runner (computes and draws) and the bookkeeping of endings. It knows neither tensors
nor processes: tests drive it with a runner of ten lines, `llm` calls it directly, `process` puts it into a child.

Speculation: a slice may carry drafts, guesses at the tokens after its last. The runner draws one token after the last
and one after each draft; draws are taken in order up to the first that differs from its draft. A draw depends on the
tokens before it, the seed and the position alone, so the answer is the same token by token with drafts and without,
and its distribution is the model's. The latents of drafts that fell are overwritten when their positions come.

Grammars: the runner asks for masks when it needs them. Where it waits for a device, they are computed meanwhile in a
thread; on a CPU at once, because waking a thread takes longer than most masks do, and takes it from the forward.

Disk: before a step is planned, pages are read from it, and after it offered to it (`engine.tier`).

Every request that `add` accepted ends with exactly one output that has a finish reason, whatever happens:
 - a token that stops it, its grammar's end, its length, or `abort`;
 - a fault in one row (logits that are not numbers) ends that request with an error, and a request that forbids every
   token, or whose grammar gives up, with one that is the request's own;
 - an exception in the runner ends every request of that step with an error;
 - but where the device's memory is exhausted, the cache shrinks, what ran goes back to the queue and is computed again,
   and only a request that no longer fits into the cache ends with an error.
After a fault the pages that were being written are wiped: a stale NaN would reach later owners of the page even
through masked attention, since 0 * NaN is NaN. If wiping fails too, the device is gone and the exception is the
caller's. Drafting and the disk are optional: a failure there is logged and switches them off.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from rorqual.engine.api import EngineInfo, FinishReason, Grammar, Output, Request, TokenLogprob, check_request
from rorqual.engine.disk import DiskCache
from rorqual.engine.scheduler import Job, Scheduler, Slice
from rorqual.engine.speculation import Controller
from rorqual.engine.stats import EngineStats, Phase, StepStats, Tally
from rorqual.engine.tier import DiskTier
from rorqual.errors import CapacityError, ConfigError, RequestError, RorqualError

log = logging.getLogger(__name__)

Masks = Callable[[], Sequence[Sequence[Any]]]


class Draw(NamedTuple):
    """What a position came to. token_id: None if there is a fault, which says why its slice cannot be used; asked: whether
    the request itself made it so (it forbids every token), and nothing has failed."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    fault: str | None = None
    asked: bool = False


class OutOfMemory(Exception):
    """The device has no memory left for a step; nothing of it counts."""


class Runner(Protocol):
    """Computes a step. `engine.runner.ModelRunner` is the real one.

    draft_depth: most drafts a token can be given, 0 if it cannot draft; page_bytes: what `read_page` returns; read_bytes:
    weights and cache that `run` has had to read so far (0 if it does not count); on_device: whether `run` mostly waits for a
    device, so that this process has time meanwhile.
    """

    draft_depth: int
    page_bytes: int
    read_bytes: float
    on_device: bool

    def run(self, plan: Sequence[Slice], masks: Masks | None) -> list[list[Draw]]:
        """Per slice, in order: 1 + len(drafts) draws if it samples, none if it does not, one with a fault if its
        rows cannot be used. masks: per slice one grammar mask per draw, or none; to be called after the forward; None
        if no slice has a grammar. Raises OutOfMemory."""
        ...

    def draft(self, done: Sequence[tuple[Slice, int]], depth: int) -> list[tuple[int, ...]]:
        """Up to `depth` (at least 1) tokens that may follow each job's, which have grown by the given number since
        `run`; () after a prompt's chunk (0 new tokens), which is here for the drafter to see. Steps may be left out."""
        ...

    def wipe(self, pages: Sequence[int]) -> None:
        """Make the content of these pages, and of the scrap page, harmless."""
        ...

    def shrink(self) -> int:
        """After OutOfMemory: give memory back. Returns how many pages are left, empty ones, the scrap page among them; 0
        where there is nothing to give, and nothing has changed."""
        ...

    def read_page(self, page: int) -> bytes:
        """The page's content, complete."""
        ...

    def write_page(self, page: int, data: bytes) -> None:
        """Restore what `read_page` returned, into any page."""
        ...


class Matcher(Protocol):
    """One request's state in its grammar."""

    @property
    def stopped(self) -> bool:
        """The text is complete."""
        ...

    def masks(self, drafts: Sequence[int]) -> Sequence[Any]:
        """What may be drawn now and after each draft (anything from the first draft on that cannot follow)."""
        ...

    def accept(self, token: int) -> object: ...


class GrammarCompiler(Protocol):
    def matcher(self, grammar: Grammar) -> Matcher:
        """Raises RequestError for a grammar that cannot be compiled."""
        ...


@dataclass(slots=True)
class _Live:
    """An accepted request that has not ended."""

    job: Job
    tally: Tally
    matcher: Matcher | None


class EngineCore:
    """Not thread-safe: one thread calls add, abort and step. clock: seconds, for statistics and for measuring whether
    speculation pays. Raises ConfigError for a draft depth that the runner does not have."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        *,
        grammar_compiler: GrammarCompiler | None = None,
        speculation: int | Literal["auto"] = "auto",
        disk: DiskCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert info.max_model_len <= scheduler.max_model_len, "the cache must hold one request of full length"
        self.runner, self.scheduler, self.info = runner, scheduler, info
        self.grammar_compiler, self.clock = grammar_compiler, clock
        self._tier = DiskTier(disk, runner, scheduler, self._restored)
        if speculation != "auto" and speculation > runner.draft_depth:
            most = f"at most {runner.draft_depth}" if runner.draft_depth else "no"
            raise ConfigError(f"this model and its backend can draft {most} tokens", remedy="leave speculation out")
        depth = min(1, runner.draft_depth) if speculation == "auto" else speculation
        self.speculation = Controller(depth, measured=speculation == "auto")
        self._stats = EngineStats()
        self._live: dict[str, _Live] = {}
        self._news: list[Output] = []  # endings that happened between steps
        self._worker = ThreadPoolExecutor(1, "grammar") if grammar_compiler and runner.on_device else None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._news)

    @property
    def has_room(self) -> bool:
        """Whether `add` would find a place in the queue."""
        return len(self.scheduler.waiting) < self.scheduler.max_waiting

    @property
    def stats(self) -> EngineStats:
        """A copy as of now."""
        pool = self.scheduler.pool
        return replace(
            self._stats,
            preemptions=self.scheduler.preemptions,
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_used=pool.usable - pool.available,
            pages_free=pool.available,
            pages_published=pool.published,
        )

    @property
    def disk(self) -> DiskCache | None:
        """None where there is none, and after it has failed."""
        return self._tier.disk

    def add(self, request: Request) -> None:
        """Raises RequestError (PromptTooLong, CapacityError) when the request cannot run; nothing is kept then."""
        check_request(request, self.info)
        if request.id in self._live:
            raise RequestError(f"a request called {request.id!r} is running", param="id")
        matcher = self._matcher(request.params.grammar)
        seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
        self._live[request.id] = _Live(self.scheduler.add(request, seed), Tally(self.clock()), matcher)

    def abort(self, request_id: str) -> None:
        """Free what the request holds, now. Its last output comes with the next step. Unknown ids pass: the
        request may have ended while the abort was on its way."""
        if live := self._live.get(request_id):
            self._news.append(self._end(live, FinishReason.ABORT))

    def close(self) -> None:
        """End the threads; pages on their way to the disk still get there. Nothing may be called afterwards."""
        if self._worker:
            self._worker.shutdown()
        self._tier.close()

    def step(self) -> list[Output]:
        """Compute one batch. Returns what is new, at most one output per request."""
        news, self._news = self._news, []
        self._tier.load()
        plan = self.scheduler.schedule()
        if not plan:
            assert self.scheduler.idle or self.scheduler.waiting[0].loading, "jobs are waiting and none can run"
            return news
        lives = [self._live[s.job.request.id] for s in plan]
        begin, read = self.clock(), self.runner.read_bytes
        results: list[list[Draw]] | None = None
        try:
            results = self._run(plan, lives)
        except OutOfMemory as error:
            log.error("a step of %d requests does not fit into memory: %s", len(plan), error)
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan))
            return news + self._fail(lives, f"{type(error).__name__}: {error}")
        if results is None:  # only now that nothing holds the failed step's tensors
            return news + self._shrink(lives)
        step = self._account(plan, lives, begin, self.clock())
        step.read_bytes = self.runner.read_bytes - read
        faulty: list[tuple[_Live, _Fault]] = []
        done: list[tuple[Slice, int]] = []
        published: list[int] = []
        for live, slice_, draws in zip(lives, plan, results, strict=True):
            try:
                output = self._advance(live, slice_, draws, published)
            except _Fault as fault:
                faulty.append((live, fault))
                continue
            if output:
                news.append(output)
            if output is None or output.finish_reason is None:
                done.append((slice_, len(output.token_ids) if output else 0))
        for live, why in faulty:
            if why.asked:
                refusal = RequestError(f"this request cannot go on: {why}", remedy="forbid less, or let it end earlier")
                news.append(self._end(live, FinishReason.ERROR, error=refusal))
                continue
            log.error("request %s failed: %s", live.job.request.id, why)
            news += self._fail([live], str(why))
        step.new_tokens = sum(len(o.token_ids) for o in news)
        fits = self._draft(done, step)
        self._tier.store(published)
        return news if fits else news + self._shrink([])

    def _shrink(self, lives: Sequence[_Live]) -> list[Output]:
        """Go on with a smaller cache; where that cannot be, these requests fail."""
        pages = self.runner.shrink()
        if not pages:
            self.speculation = Controller(0)
            return self._fail(lives, "the device's memory is exhausted, and the cache cannot be smaller")
        self.scheduler.restart(pages)
        limit = self.scheduler.max_model_len
        size = self.scheduler.pool.page_size
        self.info = replace(
            self.info, max_model_len=min(limit, self.info.max_model_len), cache_tokens=(pages - 1) * size
        )
        log.warning("the cache has shrunk to %d tokens, steps to %d; what ran is computed again",
                    self.info.cache_tokens, self.scheduler.max_batched_tokens)  # fmt: skip
        error = CapacityError(
            f"memory ran out, and the cache was cut to {limit} tokens: too few for this request",
            remedy="shorten the prompt or max_tokens, or give the engine more memory",
        )
        return [
            self._end(live, FinishReason.ERROR, error=error)
            for live in list(self._live.values())
            if self.scheduler.length(live.job) > limit
        ]

    def _run(self, plan: Sequence[Slice], lives: Sequence[_Live]) -> list[list[Draw]]:
        asked = [(x.matcher, s.drafts) if x.matcher and s.samples else None for x, s in zip(lives, plan, strict=True)]
        if not any(asked):
            return self.runner.run(plan, None)
        faults: dict[int, Draw] = {}
        future = self._worker.submit(_masks, asked, faults) if self._worker else None
        try:
            results = self.runner.run(plan, future.result if future else lambda: _masks(asked, faults))
        finally:
            if future:
                wait([future])  # nothing may touch the matchers meanwhile
        for i, fault in faults.items():
            results[i] = [fault]
        return results

    def _advance(self, live: _Live, s: Slice, draws: Sequence[Draw], published: list[int]) -> Output | None:
        """The slice is computed: add its draws to the job, up to the first that differs from its draft or ends the
        request. None if it drew nothing. Raises _Fault."""
        job = live.job
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        accepted = 0
        for i, draw in enumerate(draws):
            if draw.fault:  # one after a draft that fell means nothing: a grammar allows no token there
                raise _Fault(draw.fault, draw.asked)
            assert draw.token_id is not None
            job.tokens.append(draw.token_id)
            tokens.append(draw.token_id)
            if draw.logprob:
                logprobs.append(draw.logprob)
            stands = s.drafts[i : i + 1] == (draw.token_id,)
            accepted += stands
            reason = self._reason(live, draw.token_id)
            if reason or not stands:
                break
        live.tally.accepted += accepted
        self._stats.accepted += accepted
        published += self.scheduler.computed(s, accepted)
        if reason:
            return self._end(live, reason, tuple(tokens), tuple(logprobs))
        return Output(job.request.id, tuple(tokens), tuple(logprobs), job.cached_tokens or 0) if tokens else None

    def _reason(self, live: _Live, token: int) -> FinishReason | None:
        """Whether the job ends with this token, its newest."""
        job, params = live.job, live.job.request.params
        if token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos):
            return FinishReason.STOP
        if live.matcher:
            try:
                live.matcher.accept(token)
            except Exception as error:
                raise _Fault(f"its grammar failed: {error}", asked=isinstance(error, RequestError)) from error
            if live.matcher.stopped:
                return FinishReason.STOP
        if job.generated == params.max_tokens or len(job.tokens) >= self.info.max_model_len:
            return FinishReason.LENGTH
        return None

    def _draft(self, done: Sequence[tuple[Slice, int]], step: StepStats) -> bool:
        """Ask for drafts for the next step, if they pay. The step is complete then and is counted. Returns whether memory
        sufficed."""
        begin = self.clock()
        decoding = step.prefill_tokens == 0
        depth = self.speculation.choose(step.requests, fresh=not decoding)
        fits = True
        if depth and done:
            try:
                drafts = self.runner.draft(done, depth)
            except OutOfMemory as error:
                log.error("drafts for %d requests do not fit into memory: %s", len(done), error)
                fits, drafts = False, []
            except Exception:
                log.exception("drafting failed: the engine goes on without speculation")
                self.speculation, drafts = Controller(0), []
            for (slice_, new), guess in zip(done, drafts, strict=bool(drafts)):
                job = slice_.job
                room = self.info.max_model_len - len(job.tokens)
                if job.request.params.max_tokens:
                    room = min(room, job.request.params.max_tokens - job.generated)
                # The draw after the last draft is one token more.
                job.drafts = tuple(guess[: room - 1]) if new else ()
        step.draft_s = self.clock() - begin
        if decoding and bool(depth) == bool(step.draft_tokens):  # else the step did half of one arm, half of the other
            self.speculation.observe(step.requests, bool(depth), step.run_s + step.draft_s, step.new_tokens)
        self._stats.draft_depth = depth
        self._stats.add(step)
        return fits

    def _account(self, plan: Sequence[Slice], lives: Sequence[_Live], begin: float, end: float) -> StepStats:
        """What was computed between these times, before the draws are added to the jobs' tokens."""
        tokens: dict[Phase, int] = {"prefill": 0, "decode": 0}
        for live, s in zip(lives, plan, strict=True):
            phase: Phase = "decode" if s.count == 1 and s.samples and s.job.generated else "prefill"
            tokens[phase] += s.count
            if live.tally.steps == 0:
                self._stats.cache_hit_tokens += s.job.cached_tokens or 0
                self._stats.cache_miss_tokens += len(s.job.request.prompt) - (s.job.cached_tokens or 0)
            live.tally.step(s.job, begin, end, phase, len(s.drafts))
        drafts = sum(len(s.drafts) for s in plan)
        return StepStats(len(plan), tokens["prefill"], tokens["decode"], drafts, run_s=end - begin)

    def _restored(self, job: Job) -> None:
        """A page of the job's prompt was read from disk."""
        size = self.scheduler.pool.page_size
        self._stats.disk_hit_tokens += size
        if job.cached_tokens is None:
            self._live[job.request.id].tally.disk_tokens += size

    def _matcher(self, grammar: Grammar | None) -> Matcher | None:
        if grammar is None:
            return None
        if self.grammar_compiler is None:
            raise RequestError(
                "this engine has no grammar compiler, so it cannot constrain the output", param="grammar"
            )
        try:
            return self.grammar_compiler.matcher(grammar)
        except RequestError:
            raise
        except Exception as error:  # no compiler installed, no tokenizer: this request's misfortune, nobody else's
            raise RequestError(f"the output cannot be constrained: {error}", param="grammar") from error

    def _fail(self, lives: Sequence[_Live], fault: str) -> list[Output]:
        pages = self.scheduler.private_pages(live.job for live in lives)
        remedy = "try again; if it happens again, the log has the details"
        error = RorqualError(f"the model failed to compute this request: {fault}", remedy=remedy)
        outputs = [self._end(live, FinishReason.ERROR, error=error) for live in lives]
        self.runner.wipe(pages)
        return outputs

    def _end(
        self,
        live: _Live,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        error: Exception | None = None,
    ) -> Output:
        job = live.job
        del self._live[job.request.id]
        stats = live.tally.close(job, self.clock())
        self.scheduler.remove(job)
        return Output(job.request.id, tokens, logprobs, job.cached_tokens or 0, reason, error, stats)


class _Fault(Exception):
    """One request cannot go on. asked: see `Draw`."""

    def __init__(self, why: str, asked: bool = False) -> None:
        super().__init__(why)
        self.asked = asked


def _masks(asked: Sequence[tuple[Matcher, tuple[int, ...]] | None], faults: dict[int, Draw]) -> list[Sequence[Any]]:
    """Per slice its grammar's masks; in `faults`, by slice, what went wrong."""
    rows: list[Sequence[Any]] = []
    for i, ask in enumerate(asked):
        rows.append(())
        if ask:
            try:
                rows[i] = ask[0].masks(ask[1])
            except Exception as error:
                faults[i] = Draw(fault=f"its grammar failed: {error}", asked=isinstance(error, RequestError))
    return rows
