"""What `rorqual bench profile` does: the engine's steps under torch's profiler, kernels summed by name."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.core import EngineCore

WARM_UP = 8
"""Steps before anything is measured: kernels are compiled and graphs captured in them."""


class Profile(NamedTuple):
    """kernels: by falling time, of one step; totals: microseconds of a step (wall: without the profiler)."""

    kernels: list[dict[str, Any]]
    totals: dict[str, Any]


def decoded(steps: int) -> int:
    """Steps that every sequence decodes: warm-up, measured without the profiler, and with it."""
    return 2 * (WARM_UP + steps) + 2


def profile(core: EngineCore, kind: str, batch: int, prompt: int, steps: int) -> Profile:
    """kind "decode": a step is one of the engine's with all sequences decoding; "prefill": all prompts, to their first
    tokens."""
    on_gpu = core.info.device.startswith("cuda")
    rng = np.random.default_rng(0)

    def add(new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        for i, row in enumerate(rng.integers(2, core.info.vocab_size, (batch, prompt)).tolist()):
            core.add(Request(str(i), tuple(row), params))

    def read() -> None:
        add(1)
        while core.busy:
            core.step()

    step: Callable[[], object] = read
    if kind == "decode":
        add(core.info.max_model_len - prompt)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= {out.request_id for out in core.step() if out.token_ids}
        step = core.step
    for _ in range(WARM_UP if kind == "decode" else 2):
        step()
    seconds = [_timed(step) for _ in range(steps)]
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = _gpu_kernels(profiler, steps) if on_gpu else _cpu_operators(profiler, steps)
    for id in [job.request.id for job in [*core.scheduler.running, *core.scheduler.waiting]]:
        core.abort(id)
    core.step()
    wall = 1e6 * statistics.median(seconds)
    busy = sum(row["us / step"] for row in kernels)
    for row in kernels:
        row["share"] = row["us / step"] / busy
    totals = {
        "wall_us": wall, "kernels_us": busy, "kernels / wall": busy / wall,
        "launches": sum(row["calls / step"] for row in kernels),
    }  # fmt: skip
    return Profile(kernels, totals)


def _timed(step: Callable[[], object]) -> float:
    # Not synchronised: a step that was begun ahead belongs to the next one, as it does when nobody looks.
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _gpu_kernels(profiler: Any, steps: int) -> list[dict[str, Any]]:
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiler.events():
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            sums[event.name][0] += 1
            sums[event.name][1] += event.time_range.elapsed_us()
    return _rows(sums, steps)


def _cpu_operators(profiler: Any, steps: int) -> list[dict[str, Any]]:
    return _rows({e.key: [e.count, e.self_cpu_time_total] for e in profiler.key_averages()}, steps)


def _rows(sums: dict[str, list[float]], steps: int) -> list[dict[str, Any]]:
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    return [{"kernel": k[:120], "calls / step": n / steps, "us / step": us / steps} for k, (n, us) in ranked]
