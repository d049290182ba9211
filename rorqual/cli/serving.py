"""What `rorqual bench serve` and `rorqual bench mtp` measure: the engine under mixed traffic, and drafting."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.native_runner import NativeRunner


class Traffic(NamedTuple):
    """`requests` requests at once; prompt and answer lengths are drawn log-uniformly between their ends."""

    requests: int = 64
    prompt: tuple[int, int] = (16, 1024)
    new: tuple[int, int] = (16, 256)

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        rng = np.random.default_rng(seed)

        def draw(least: int, most: int) -> list[int]:
            return np.exp(rng.uniform(math.log(least), math.log(most), self.requests)).round().astype(int).tolist()

        return list(zip(draw(*self.prompt), draw(*self.new), strict=True))


class Served(NamedTuple):
    """seconds: from the first request to the last token; steps_s: the same forwards back to back, with nothing between
    them; first_s and gap_s: of each request, until its first token, and between two outputs; tokens: generated."""

    seconds: float
    steps_s: float | None
    tokens: int
    prompt_tokens: int
    steps: int
    first_s: list[float]
    gap_s: list[float]


class Serve(Protocol):
    def __call__(self, seed: int, until: float) -> Served | None:
        """The traffic of a seed; None where it would have gone on after `until` (of the performance counter)."""
        ...


def serve(core: EngineCore, traffic: Traffic, seed: int, until: float = math.inf) -> Served | None:
    """All requests at once through the engine, then every forward it made once more without the engine. None where that is
    not done by `until`; the engine is left empty."""
    rng = np.random.default_rng(seed)
    requests = [
        Request(str(i), tuple(rng.integers(2, core.info.vocab_size, prompt).tolist()),
                SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))
        for i, (prompt, new) in enumerate(traffic.lengths(seed))
    ]  # fmt: skip
    record = _Record(core)
    start = time.perf_counter()
    for request in requests:
        core.add(request)
    last: dict[str, float] = {}
    first_s: list[float] = []
    gap_s: list[float] = []
    tokens = steps = 0
    while core.busy:
        outputs = core.step()
        now, steps = time.perf_counter(), steps + 1
        for out in outputs:
            if out.token_ids:
                tokens += len(out.token_ids)
                (gap_s if out.request_id in last else first_s).append(now - last.get(out.request_id, start))
                last[out.request_id] = now
        if now > until:
            record.stop()
            _drop(core, requests)
            return None
    seconds = time.perf_counter() - start
    total = sum(len(r.prompt) for r in requests)
    return Served(seconds, record.replay(), tokens, total, steps, first_s, gap_s)


def _drop(core: EngineCore, requests: list[Request]) -> None:
    for request in requests:
        core.abort(request.id)
    while core.busy:
        core.step()


def rounds(
    engines: Mapping[str, Serve], most: int, seconds: float, twice: bool, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """A row for each engine over whole rounds, and how many those are: `most`, or what `seconds` (0: no bound) allow. twice:
    the same requests once before they count."""
    until = time.perf_counter() + seconds if seconds else math.inf
    served: dict[str, list[Served]] = {name: [] for name in engines}
    news: dict[str, list[float]] = {name: [] for name in engines}
    for seed in range(1, most + 1):
        done: dict[str, Served] = {}
        for name, run in engines.items():
            new = run(seed, until) if twice else None
            again = run(seed, until) if new or not twice else None
            if again is None:
                say(f"round {seed}, {name}: cut short, the time is up")
                break
            rate, done[name] = again.tokens / again.seconds, again
            if new:
                news[name].append(new.tokens / new.seconds)
            first = f"; {news[name][-1]:,.0f} when its shapes were new" if new else ""
            say(f"round {seed}, {name}: {rate:,.0f} tokens/s in {again.seconds:.1f} s{first}")
        if len(done) < len(engines):
            break
        for name, one in done.items():
            served[name].append(one)
    count = len(served[next(iter(engines))])
    if not count:
        return [], 0
    rows = [summary(name, runs, served["rorqual"]) for name, runs in served.items()]
    for row, firsts in zip(rows, news.values(), strict=True):
        if firsts:
            row["tokens/s when new"] = statistics.median(firsts[:count])
    return rows, count


def summary(name: str, runs: list[Served], ours: list[Served]) -> dict[str, Any]:
    """An engine's row: medians over rounds; the last column is what our rate is of this one's in the same round."""

    def middle(pick: Callable[[Served], float]) -> float:
        return statistics.median(map(pick, runs))

    def centile(values: list[float], share: int) -> float:
        return 1000 * statistics.quantiles(values, n=100, method="inclusive")[share - 1]

    def rate(run: Served) -> float:
        return run.tokens / run.seconds

    return {
        "engine": name,
        "tokens/s": middle(rate),
        "prompt tokens/s": middle(lambda s: s.prompt_tokens / s.seconds),
        "steps": middle(lambda s: s.steps),
        "time / forwards": middle(lambda s: s.seconds / (s.steps_s or math.nan)) if runs[0].steps_s else None,
        "first token ms, median": middle(lambda s: centile(s.first_s, 50)),
        "first token ms, p99": middle(lambda s: centile(s.first_s, 99)),
        "next token ms, median": middle(lambda s: centile(s.gap_s, 50)),
        "next token ms, p99": middle(lambda s: centile(s.gap_s, 99)),
        "rorqual / this": statistics.median(rate(a) / rate(b) for a, b in zip(ours, runs, strict=True)),
    }


class _Record:
    """Keeps what a native runner's model was asked for, to ask it again."""

    def __init__(self, core: EngineCore) -> None:
        runner = core.runner
        self.model = runner.model if isinstance(runner, NativeRunner) else None
        self.calls: list[Callable[[], object]] = []
        if self.model is not None:
            for name in ("forward", "logits"):
                self._watch(name, getattr(self.model, name))

    def _watch(self, name: str, call: Callable[..., torch.Tensor]) -> None:
        def watched(*arguments: Any) -> torch.Tensor:
            self.calls.append(lambda: call(*arguments))
            return call(*arguments)

        setattr(self.model, name, watched)

    def stop(self) -> None:
        if self.model is not None:
            for name in ("forward", "logits"):
                delattr(self.model, name)

    def replay(self) -> float | None:
        """Seconds of all of it back to back; records no more."""
        self.stop()
        if self.model is None:
            return None
        with torch.inference_mode():
            start = time.perf_counter()
            for call in self.calls:
                call()
            return time.perf_counter() - start


def mtp(core: EngineCore, plain: EngineCore, prompts: list[tuple[int, ...]], new: int) -> dict[str, float]:
    """The same greedy requests one after another, with one draft a step and without.

    Returns acceptance a, the costs of drafting and of verifying in units of a plain step, the speed-up they allow,
    (1 + a) / (1 + c_draft + c_verify), and the one that was measured.
    """
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    seconds: dict[str, list[float]] = {"drafted": [], "plain": []}
    for core_ in (core, plain):  # warm up
        _generate(core_, prompts[0], params)
    before = {id(c): c.stats for c in (core, plain)}
    for prompt in prompts:
        for name, core_ in (("drafted", core), ("plain", plain)):
            seconds[name].append(_generate(core_, prompt, params))
    with_drafts, without = (_difference(c.stats, before[id(c)]) for c in (core, plain))
    step = without["run_s"] / without["steps"]
    a = with_drafts["accepted"] / max(1, with_drafts["draft_tokens"])
    draft = with_drafts["draft_s"] / with_drafts["steps"] / step
    verify = with_drafts["run_s"] / with_drafts["steps"] / step - 1
    allowed = (1 + a) / (1 + draft + verify)
    measured = statistics.median(p / d for d, p in zip(seconds["drafted"], seconds["plain"], strict=True))
    return {
        "acceptance": a, "draft": draft, "verify": verify, "allowed": allowed, "measured": measured,
        "of_allowed": measured / allowed, "plain_tokens_per_s": new / statistics.median(seconds["plain"]),
        "drafted_tokens_per_s": new / statistics.median(seconds["drafted"]),
    }  # fmt: skip


def _difference(after: Any, before: Any) -> dict[str, float]:
    names = ("steps", "draft_tokens", "accepted", "run_s", "draft_s")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def _generate(core: EngineCore, prompt: tuple[int, ...], params: SamplingParams) -> float:
    """Seconds from the first token to the last."""
    core.add(Request("bench", prompt, params))
    begun = None
    while core.busy:
        if any(out.token_ids for out in core.step()) and begun is None:
            begun = time.perf_counter()
    assert begun is not None
    return time.perf_counter() - begun
