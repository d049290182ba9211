"""Whether drafting pays, by measurement.

A draft costs a pass of the drafting module and a longer forward, and saves a forward when it stands. Which side wins
depends on the machine, the batch and the text: with a mixture of experts two tokens read up to twice the experts, so
that on a CPU the longer forward may cost nearly as much as two. No formula decides this; the clock does.

For each batch size (in powers of two) both arms, drafting and plain, have a running estimate of seconds per token,
from steps that only decode. Both are tried at first; then the faster one runs, and the other gets a short trial now
and then. A trial's first steps count for nothing, since they still do the other arm's work.

A trial of drafting waits for a step that reads a prompt: the drafting module has seen nothing of what was generated
while it was off, and would guess worse than it can for requests that are long under way.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

TRIAL = 16
INTERVAL = 512
WARM_UP = 2
MEMORY = 1 / 8
"""Weight of the newest step in an estimate."""
OUTLIER = 3.0
"""A step of more than so many times the estimate's seconds counts as so many: someone else had the machine."""


@dataclass(slots=True)
class _Estimate:
    seconds: float = 0.0
    tokens: float = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        if not self.tokens:
            self.seconds, self.tokens = seconds, float(tokens)
        else:
            self.seconds += MEMORY * (min(seconds, OUTLIER * self.seconds) - self.seconds)
            self.tokens += MEMORY * (tokens - self.tokens)

    @property
    def rate(self) -> float:
        """Seconds per token."""
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class _Bucket:
    """on: the arm that runs; trial: whether it does for a trial; settle: steps to pass over, then left: steps until
    another arm is considered. The first trial is of plain decoding, after as many steps of drafting."""

    on: bool = True
    trial: bool = False
    settle: int = WARM_UP
    left: int = TRIAL
    arms: dict[bool, _Estimate] = field(default_factory=lambda: {True: _Estimate(), False: _Estimate()})

    def run(self, on: bool, *, trial: bool) -> None:
        self.settle = 0 if on == self.on else WARM_UP
        self.on, self.trial, self.left = on, trial, TRIAL if trial else INTERVAL


class Controller:
    """depth: drafts per request when drafting is on; measured False: it always is."""

    def __init__(self, depth: int, *, measured: bool = True) -> None:
        self.depth, self.measured = depth, measured
        self._buckets: defaultdict[int, _Bucket] = defaultdict(_Bucket)

    def choose(self, batch: int, *, fresh: bool = False) -> int:
        """How many tokens to draft for each of `batch` requests, now. fresh: the step read a prompt."""
        if not (self.measured and self.depth):
            return self.depth
        bucket = self._bucket(batch)
        if bucket.left <= 0:
            if bucket.trial:
                bucket.run(bucket.arms[True].rate < bucket.arms[False].rate, trial=False)
            elif bucket.on or fresh:
                bucket.run(not bucket.on, trial=True)
        return self.depth if bucket.on else 0

    def observe(self, batch: int, drafting: bool, seconds: float, tokens: int) -> None:
        """A step that only decoded `batch` requests took so many seconds for so many tokens, drafting or not."""
        bucket = self._bucket(batch)
        if drafting != bucket.on:
            return
        if bucket.settle:
            bucket.settle -= 1
            return
        bucket.left -= 1
        bucket.arms[drafting].add(seconds, tokens)

    def seconds_per_token(self, batch: int) -> tuple[float, float]:
        """The estimates with and without drafts, 0 where nothing is known."""
        arms = self._bucket(batch).arms
        return arms[True].rate, arms[False].rate

    def _bucket(self, batch: int) -> _Bucket:
        return self._buckets[batch.bit_length()]
