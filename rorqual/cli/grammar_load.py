"""What `rorqual bench grammar` measures: decoding with a JSON schema against decoding without, by the same engine.

The schema's document never ends by itself (an array of objects without a limit), so both sides generate the same number of
tokens. Without a grammar the end is ignored. They take turns, and the ratio is of the same round.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from rorqual.engine.api import Grammar, Request, SamplingParams

if TYPE_CHECKING:
    from rorqual.engine.core import EngineCore

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "count": {"type": "integer", "minimum": 0, "maximum": 9999},
            "tags": {"type": "array", "items": {"enum": ["sea", "whale", "krill", "deep"]}, "maxItems": 3},
        },
        "required": ["name", "count", "tags"],
        "additionalProperties": False,
    },
}
ARMS = {"free": None, "json_schema": Grammar("json_schema", json.dumps(SCHEMA))}


class Rates(NamedTuple):
    """Tokens a second of the clock, and of the process's CPU time, which others on the machine disturb less."""

    per_s: float
    per_cpu_s: float


def decode(core: EngineCore, prompts: list[tuple[int, ...]], new: int, grammar: Grammar | None, seed: int) -> Rates:
    """After the first step, over all prompts at once."""
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=new, ignore_eos=True, grammar=grammar)
    for i, prompt in enumerate(prompts):
        core.add(Request(str(i), prompt, params))
    begun: set[str] = set()
    while len(begun) < len(prompts):
        begun |= {out.request_id for out in core.step() if out.token_ids}
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    while core.busy:
        tokens += sum(len(out.token_ids) for out in core.step())
    return Rates(tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu))


def compare(core: EngineCore, prompt: tuple[int, ...], batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Medians of both, and of the rounds' ratios."""
    rates: dict[str, list[Rates]] = {name: [] for name in ARMS}
    for seed in range(-1, rounds):
        for name, grammar in ARMS.items():
            rate = decode(core, [prompt] * batch, new, grammar, seed + 1)
            if seed >= 0:  # the first of each compiles and warms up
                rates[name].append(rate)
    pairs = list(zip(rates["json_schema"], rates["free"], strict=True))
    return {
        "batch": batch,
        **{f"{name} tokens/s": statistics.median(r.per_s for r in found) for name, found in rates.items()},
        "json_schema / free": statistics.median(a.per_s / b.per_s for a, b in pairs),
        "by CPU time": statistics.median(a.per_cpu_s / b.per_cpu_s for a, b in pairs),
    }
