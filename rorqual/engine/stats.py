"""What the engine counts: one record for the engine, one tally per request. Plain numbers, no clock of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rorqual.engine.api import RequestStats
from rorqual.engine.scheduler import Job

Phase = Literal["queue", "prefill", "decode"]


@dataclass(slots=True)
class StepStats:
    """One step: requests computed, tokens by kind (of prompts, one per decoding request, drafts checked), new tokens,
    the seconds of the forward with its sampling, and of drafting; and the bytes of weights and cache that the forward
    had to read (0 where the runner does not know)."""

    requests: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    new_tokens: int = 0
    run_s: float = 0.0
    draft_s: float = 0.0
    read_bytes: float = 0.0


@dataclass(slots=True)
class EngineStats:
    """Counts since the start, in tokens unless the name says otherwise; waiting to pages_published are the present
    state (pages_free includes idle published ones; pages_used are those of running requests). cache_hit and cache_miss
    split the prompts of admitted requests; drafted and accepted are the drafts checked and those that stood;
    draft_depth is how many were drafted per token in the last step; decode_bytes and decode_run_s are those of steps that
    only decoded, whose bound is the memory's bandwidth; last is the last step; restarts is the supervisor's, whose counts
    otherwise begin again with each engine."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    new_tokens: int = 0
    run_s: float = 0.0
    draft_s: float = 0.0
    preemptions: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    disk_hit_tokens: int = 0
    accepted: int = 0
    draft_depth: int = 0
    decode_bytes: float = 0.0
    decode_run_s: float = 0.0
    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages_free: int = 0
    pages_published: int = 0
    last: StepStats = field(default_factory=StepStats)
    restarts: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Of admitted requests."""
        return self.cache_hit_tokens + self.cache_miss_tokens

    @property
    def cache_usage(self) -> float:
        """Share of the latent cache that running requests hold."""
        return self.pages_used / max(1, self.pages_used + self.pages_free)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that stood; 0 before the first."""
        return self.accepted / max(1, self.draft_tokens)

    def of_bound(self, bandwidth: float) -> float:
        """How fast decoding steps read, as a share of `bandwidth` (bytes/s); 0 where either is unknown."""
        return self.decode_bytes / self.decode_run_s / bandwidth if self.decode_run_s and bandwidth else 0.0

    def add(self, step: StepStats) -> None:
        self.steps += 1
        self.prefill_tokens += step.prefill_tokens
        self.decode_tokens += step.decode_tokens
        self.draft_tokens += step.draft_tokens
        self.new_tokens += step.new_tokens
        self.run_s += step.run_s
        self.draft_s += step.draft_s
        if step.prefill_tokens == 0:
            self.decode_bytes += step.read_bytes
            self.decode_run_s += step.run_s
        self.last = step


@dataclass(slots=True)
class Tally:
    """A request's account while it lives. since: the time up to which its seconds are assigned."""

    since: float
    seconds: dict[Phase, float] = field(default_factory=lambda: {"queue": 0.0, "prefill": 0.0, "decode": 0.0})
    phase: Phase = "queue"
    steps: int = 0
    preemptions: int = -1  # as of the last step; -1 before the first
    disk_tokens: int = 0
    pages: int = 0
    drafted: int = 0
    accepted: int = 0

    def spend(self, until: float, phase: Phase) -> None:
        self.seconds[phase] += until - self.since
        self.since, self.phase = until, phase

    def step(self, job: Job, begin: float, end: float, phase: Phase, drafted: int) -> None:
        """The job was computed from begin to end; between steps of a running job the time counts to what it does."""
        if self.preemptions != job.preemptions:
            self.spend(begin, "queue")
            self.preemptions = job.preemptions
        self.spend(end, phase)
        self.steps += 1
        self.pages = max(self.pages, len(job.pages))
        self.drafted += drafted

    def close(self, job: Job, now: float) -> RequestStats:
        """The job ends now, before its pages are taken from it."""
        self.spend(now, self.phase if job.pages else "queue")
        cached = job.cached_tokens or 0
        return RequestStats(
            self.seconds["queue"],
            self.seconds["prefill"],
            self.seconds["decode"],
            self.steps,
            job.preemptions,
            cached,
            min(self.disk_tokens, cached),
            self.pages,
            self.drafted,
            self.accepted,
        )
