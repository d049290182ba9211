"""How large the latent cache may be.

On a CPU it gets a quarter of the RAM, which is only taken as pages are written. On a GPU what a step needs is measured:
before the cache is sized, the largest steps that the settings allow (a chunk of the token budget at the end of the longest
context; as many short prompts as run at once; a decoding step of all of them, with drafts) run over a cache of two pages,
and the cache gets what is left below their peak and a reserve. A budget whose step does not fit is halved first.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import PAGE_SIZE, Request, SamplingParams
from rorqual.engine.core import OutOfMemory, Runner
from rorqual.engine.graphs import MAX_ROWS
from rorqual.engine.scheduler import LEAST_BUDGET, Job, Slice
from rorqual.engine.settings import EngineSettings
from rorqual.errors import ConfigError

log = logging.getLogger(__name__)

RESERVE = 0.02
"""Of a GPU's memory, left to kernels, graphs and fragments beside what was measured."""


class Meter(Protocol):
    """What a device says about its memory, in bytes."""

    total: int

    def begin(self) -> None:
        """Give back what is cached and measure from here on."""
        ...

    def peak(self) -> int:
        """The most that was taken since `begin`, beyond what was taken then."""
        ...

    def free(self) -> int: ...


class CudaMeter:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = torch.cuda.mem_get_info(device)[1]
        self._before = 0

    def begin(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_reserved(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_reserved(self.device) - self._before

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]


def measured_room(
    make: Callable[[int], Runner], settings: EngineSettings, longest: int, budget: int, meter: Meter
) -> tuple[int, int]:
    """The token budget whose steps fit, and the bytes that are left for the cache. make: a runner of so many pages;
    longest: tokens of the longest request. Raises ConfigError where not even small steps fit."""
    while True:
        meter.begin()
        if _fits(make, settings, longest, budget):
            break
        if budget <= LEAST_BUDGET:
            raise ConfigError(
                f"a step of {budget} tokens does not fit beside the weights",
                remedy="use a smaller model or max_num_seqs",
            )
        budget = max(LEAST_BUDGET, budget // 2)
        log.warning("steps are cut to %d tokens, larger ones do not fit beside the weights", budget)
    peak = meter.peak()
    meter.begin()
    if settings.prompt_graphs and settings.deterministic is not True:  # their pool holds a step too
        peak *= 2
    room = meter.free() - peak - int(RESERVE * meter.total)
    log.info("the largest step takes %.2f GB, %.2f GB are left for the cache", peak / 1e9, room / 1e9)
    return budget, room


def _fits(make: Callable[[int], Runner], settings: EngineSettings, longest: int, budget: int) -> bool:
    """Whether the largest steps can be computed."""
    try:
        runner = make(2)
        wanted = 1 if settings.speculation == "auto" else settings.speculation
        depth = min(wanted, runner.draft_depth)
        for plan in _largest(settings, longest, budget, depth):
            runner.run(plan, None)
            if depth:
                for s in plan:
                    s.job.tokens.append(0)
                runner.draft([(s, 1) for s in plan], depth)
    except (OutOfMemory, torch.OutOfMemoryError):
        return False
    return True


def _largest(settings: EngineSettings, longest: int, budget: int, depth: int) -> Iterator[Sequence[Slice]]:
    """Steps that need as much memory as any; all their pages are page 1."""
    count = min(budget, longest - 1)
    yield [_slice(longest - 1 - count, count)]
    jobs = min(settings.max_num_seqs, budget)
    yield [_slice(0, min(longest - 1, max(1, budget // jobs))) for _ in range(jobs)]
    last = max(0, longest - 2 - depth)
    yield [_slice(last, 1, (0,) * depth) for _ in range(settings.max_num_seqs)]


def _slice(start: int, count: int, drafts: tuple[int, ...] = ()) -> Slice:
    tokens = [0] * (start + count)
    request = Request("", tuple(tokens[:-1]) or (0,), SamplingParams(temperature=1.0, top_p=0.9))
    job = Job(request, 0, 0, tokens)
    job.pages = [1] * ((start + count + len(drafts)) // PAGE_SIZE + 1)
    return Slice(job, start, count, drafts)


def graph_bytes(cfg: ModelConfig, settings: EngineSettings, max_model_len: int, itemsize: int, depth: int) -> int:
    """What captured steps keep for good: each its logits, for batches and page tables in powers of two, with and without
    draws on the device."""
    rows = min(MAX_ROWS, settings.max_num_seqs * (1 + depth))
    widths = max(1, max_model_len // PAGE_SIZE).bit_length() + 1
    return 4 * rows * widths * cfg.vocab_size * itemsize


def longest_request(cfg: ModelConfig, settings: EngineSettings) -> int:
    """Raises ConfigError for a length that the model has no positions for."""
    wanted = settings.max_model_len
    max_model_len = cfg.max_position_embeddings if wanted == "auto" else wanted
    if max_model_len > cfg.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {max_model_len} exceeds the model's {cfg.max_position_embeddings} positions",
            remedy="lower it or leave it out",
        )
    return max_model_len


def cache_size(cfg: ModelConfig, page_bytes: int, room: int, settings: EngineSettings) -> tuple[int, int]:
    """Pages to allocate within `room` bytes (the scrap page aside; as many as cache_tokens says, if it does), and the
    longest request. Raises ConfigError for sizes that do not fit."""
    max_model_len = longest_request(cfg, settings)
    if settings.cache_tokens != "auto":
        pages = -(-settings.cache_tokens // PAGE_SIZE)
    else:
        useful = settings.max_num_seqs * -(-max_model_len // PAGE_SIZE)
        pages = min(useful, room // page_bytes - 1)
        if pages < 1:
            raise ConfigError("no memory is left for a cache", remedy="use a smaller model or set cache_tokens")
    if pages * PAGE_SIZE < max_model_len:
        if settings.max_model_len != "auto":
            raise ConfigError(
                f"the cache holds {pages * PAGE_SIZE} tokens, fewer than max_model_len {max_model_len}",
                remedy="raise cache_tokens or lower max_model_len",
            )
        max_model_len = pages * PAGE_SIZE
    return pages, max_model_len


def memory_bytes() -> int:
    """RAM this process may use: the machine's, or its control group's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)
