"""What `rorqual bench soak` does: random traffic on a simulated clock, and an account of requests, pages and memory."""

from __future__ import annotations

import gc
import heapq
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import FinishReason, Grammar, Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.errors import CapacityError

FLAT = 0.02, 2**26
"""Memory is flat if from the second fifth on it grows by no more than this share, or these bytes."""


class Traffic(NamedTuple):
    """rate: requests a second; step_s: seconds that a step takes, both simulated; prompts and answers are drawn
    log-uniformly up to `prompt` and `new` tokens."""

    seconds: float
    rate: float
    step_s: float
    prompt: int
    new: int
    vocab: int
    seed: int

    @classmethod
    def of(cls, cfg: ModelConfig, minutes: float, rate: float, step_s: float, seed: int) -> Traffic:
        longest = min(cfg.max_position_embeddings, 1536)
        return cls(60 * minutes, rate, step_s, longest * 2 // 3, longest // 3, cfg.vocab_size, seed)

    @property
    def longest(self) -> int:
        return self.prompt + self.new


class _Client:
    """Everybody who sends requests, by one seed."""

    def __init__(self, core: EngineCore, traffic: Traffic, grammars: bool) -> None:
        self.core, self.traffic, self.grammars = core, traffic, grammars
        self.random = random.Random(traffic.seed)
        self.shared = [self._tokens(traffic.prompt // 2) for _ in range(3)]
        self.next = self.random.expovariate(traffic.rate)
        self.aborts: list[tuple[float, str]] = []
        self.sent: Counter[str] = Counter()
        self.ends: dict[str, list[FinishReason]] = {}
        self.tokens = self.refused = self.steps = 0
        self.errors: list[str] = []

    def arrive(self, now: float) -> None:
        """Send what is due, and go away from what is not worth waiting for."""
        while self.next <= now:
            self._send()
            self.next += self.random.expovariate(self.traffic.rate)
        while self.aborts and self.aborts[0][0] <= now:
            self.core.abort(heapq.heappop(self.aborts)[1])

    def step(self) -> None:
        self.steps += 1
        for out in self.core.step():
            self.tokens += len(out.token_ids)
            if out.finish_reason:
                self.ends.setdefault(out.request_id, []).append(out.finish_reason)
            if out.error:
                self.errors.append(str(out.error))

    def _send(self) -> None:
        r, name = self.random, str(self.sent.total() + self.refused)
        prompt = self._tokens(self._length(self.traffic.prompt))
        if r.random() < 0.3:
            prompt = (*r.choice(self.shared), *prompt)[: self.traffic.prompt]
        kind = r.choices(["greedy", "sampled", "grammar"], [5, 5, 1 if self.grammars else 0])[0]
        params = SamplingParams(
            temperature=0.0 if kind == "greedy" else 1.0,
            top_p=r.choice([1.0, 0.9]),
            top_k=r.choice([0, 0, 40]),
            seed=r.getrandbits(32),
            max_tokens=self._length(self.traffic.new),
            logprobs=r.choice([None, None, None, 2]),
            repetition_penalty=r.choice([1.0, 1.0, 1.1]),
            ignore_eos=r.random() < 0.5,
            grammar=Grammar("regex", "[a-z ]{1,40}") if kind == "grammar" else None,
        )
        try:
            self.core.add(Request(name, prompt, params, r.choice([0, 0, 0, 1]), r.choice(["", "", "tenant"])))
        except CapacityError:
            self.refused += 1
            return
        self.sent[name] += 1
        if r.random() < 0.1:
            heapq.heappush(self.aborts, (self.next + r.expovariate(0.5), name))

    def _tokens(self, n: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(2, self.traffic.vocab), k=n))

    def _length(self, most: int) -> int:
        return max(1, round(math.exp(self.random.uniform(0.0, math.log(most)))))


def soak(
    core: EngineCore, traffic: Traffic, grammars: bool, device: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record, with `faults` found, and a row for each fifth."""
    client = _Client(core, traffic, grammars)
    begin, now = time.perf_counter(), 0.0
    fifths: list[dict[str, Any]] = []
    pool = core.scheduler.pool
    for part in range(1, 6):
        end = traffic.seconds * part / 5
        while now < end:
            client.arrive(now)
            if core.busy:
                client.step()
                now += traffic.step_s
            else:
                now = min(end, max(now, client.next))
        while core.busy:
            client.step()
        pool = core.scheduler.pool
        fifths.append(
            {
                "fifth": part, "requests": client.sent.total(), "steps": client.steps, "tokens": client.tokens,
                "leaked pages": pool.usable - pool.available, "memory bytes": _memory(device),
                "seconds": time.perf_counter() - begin,
            }
        )  # fmt: skip
    stats = core.stats
    record = {
        "requests": client.sent.total(), "refused": client.refused, "tokens": client.tokens, "steps": client.steps,
        "finish_reasons": dict(Counter(str(r) for ends in client.ends.values() for r in ends)),
        "preemptions": stats.preemptions, "cache_hit_tokens": stats.cache_hit_tokens,
        "drafted": stats.draft_tokens, "accepted": stats.accepted, "faults": _faults(client, fifths),
    }  # fmt: skip
    return record, fifths


def _faults(client: _Client, fifths: list[dict[str, Any]]) -> list[str]:
    faults = [f"request {name} ended {len(client.ends.get(name, []))} times" for name in client.sent
              if len(client.ends.get(name, [])) != 1]  # fmt: skip
    faults += [f"error: {error}" for error in client.errors[:5]]
    faults += [f"{row['leaked pages']} pages leaked in fifth {row['fifth']}" for row in fifths if row["leaked pages"]]
    second, last = fifths[1]["memory bytes"], fifths[-1]["memory bytes"]
    if last - second > max(FLAT[0] * second, FLAT[1]):
        faults.append(f"memory grew from {second} to {last} bytes")
    return faults


def _memory(device: str) -> int:
    """What the allocator has given out on a GPU; the process's resident set elsewhere."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096
