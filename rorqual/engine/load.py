"""From settings to a running core: the device, the model, and how large its cache may be.

The only file that looks at the machine. Whatever it decides for an "auto" is in `EngineInfo` and in one log line.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rorqual.checkpoint import load_model
from rorqual.config import ModelConfig, resolve_model
from rorqual.engine.api import EngineInfo
from rorqual.engine.core import EngineCore
from rorqual.engine.pages import PAGE_SIZE, PagePool
from rorqual.engine.runner import ModelRunner
from rorqual.engine.scheduler import Scheduler
from rorqual.engine.settings import Auto, EngineSettings
from rorqual.errors import BackendUnavailable, CheckpointError, ConfigError
from rorqual.model.transformer import Transformer

log = logging.getLogger(__name__)


def load_core(settings: EngineSettings) -> EngineCore:
    """Loads the model and makes an engine of it. Raises ConfigError, CheckpointError, BackendUnavailable."""
    path = resolve_model(settings.model)
    device = pick_device(settings.device)
    dtype: str | torch.dtype = settings.dtype
    if dtype == "auto" and device.type == "cpu" and 4 * stored_bytes(path) <= memory_bytes():
        # Most CPUs multiply bf16 at half the rate of fp32 or less; a model that would fill the memory stays as stored.
        dtype = torch.float32
    model = load_model(path, dtype=dtype, device=device)
    core = build_core(model, settings, name=path.name, eos_token_ids=eos_token_ids(path, model.cfg))
    if device.type == "cpu":
        assert isinstance(core.runner, ModelRunner)
        set_threads(settings.threads, core.runner.idle_step)
    return core


def build_core(
    model: Transformer, settings: EngineSettings, *, name: str, eos_token_ids: tuple[int, ...]
) -> EngineCore:
    """An engine around a model that is already in memory."""
    cfg, device = model.cfg, model.device
    wanted = settings.max_model_len
    max_model_len = cfg.max_position_embeddings if wanted == "auto" else wanted
    if max_model_len > cfg.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {max_model_len} exceeds the model's {cfg.max_position_embeddings} positions",
            remedy="lower it or leave it out",
        )
    dtype = model.compute_dtype or model.dtype
    pages = cache_pages(cfg, dtype.itemsize, device, settings, max_model_len)
    if pages * PAGE_SIZE < max_model_len:
        if wanted != "auto":
            raise ConfigError(
                f"the cache holds {pages * PAGE_SIZE} tokens, fewer than max_model_len {max_model_len}",
                remedy="raise cache_tokens or lower max_model_len",
            )
        max_model_len = pages * PAGE_SIZE
    budget = settings.max_batched_tokens
    if budget == "auto":
        budget = 4096 if device.type == "cuda" else 512
    pool = PagePool(pages + 1, identity=f"{name} {dtype}".encode(), prefix_cache=settings.prefix_cache)
    scheduler = Scheduler(
        pool,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=budget,
        max_waiting=settings.max_waiting,
    )
    info = EngineInfo(
        model=name,
        max_model_len=max_model_len,
        vocab_size=cfg.vocab_size,
        eos_token_ids=eos_token_ids,
        cache_tokens=pages * PAGE_SIZE,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
    log.info("%s on %s in %s: context %d, cache %d tokens", name, device, info.dtype, max_model_len, info.cache_tokens)
    return EngineCore(ModelRunner(model, pool.num_pages, PAGE_SIZE), scheduler, info)


def cache_pages(
    cfg: ModelConfig, itemsize: int, device: torch.device, settings: EngineSettings, max_model_len: int
) -> int:
    """Pages to allocate, the scrap page aside. Raises ConfigError if not even one fits."""
    if settings.cache_tokens != "auto":
        return -(-settings.cache_tokens // PAGE_SIZE)
    page_bytes = cfg.num_hidden_layers * cfg.cache_dim * itemsize * PAGE_SIZE
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - total // 10  # activations, and what the allocator keeps
    else:
        room = memory_bytes() // 4
    useful = settings.max_num_seqs * -(-max_model_len // PAGE_SIZE)
    pages = min(useful, room // page_bytes - 1)
    if pages < 1:
        raise ConfigError(
            f"no memory is left for a cache on {device}", remedy="use a smaller model or set cache_tokens"
        )
    return pages


def stored_bytes(path: Path) -> int:
    """Size of a model directory's weights on disk."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def pick_device(name: str) -> torch.device:
    """Raises BackendUnavailable for a GPU that is not there, ConfigError for a name torch does not know."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}", remedy="use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("torch sees no GPU here", remedy="use --device cpu")
    return device


def eos_token_ids(path: Path, cfg: ModelConfig) -> tuple[int, ...]:
    """What ends an answer: generation_config.json's word before config.json's, as everywhere."""
    file = path / "generation_config.json"
    if not file.is_file():
        return cfg.eos_token_ids
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError):
        raise CheckpointError(f"{file} is not a JSON object", remedy="restore the file or delete it") from None
    if ids is None:
        return cfg.eos_token_ids
    return (ids,) if isinstance(ids, int) else tuple(ids)


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


def set_threads(threads: int | Auto, step: Callable[[], object]) -> None:
    """torch's threads for this process; "auto" times `step` with 1, 2, 4, ... up to the physical cores.

    Counting cores is not enough: where others use them too, every parallel region waits for its slowest thread, and two
    threads can be a hundred times slower than one.
    """
    if threads != "auto":
        torch.set_num_threads(threads)
        return
    most = physical_cores()
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    times: dict[int, float] = {}
    for count in counts:
        torch.set_num_threads(count)
        step()
        runs, begin = 0, time.perf_counter()
        while runs < 20 and time.perf_counter() - begin < 0.25:
            step()
            runs += 1
        times[count] = (time.perf_counter() - begin) / runs
    best = min(counts, key=lambda count: times[count])
    torch.set_num_threads(best)
    told = ", ".join(f"{count}: {1000 * seconds:.1f} ms" for count, seconds in times.items())
    log.info("%d threads, by the time of a decoding step (%s)", best, told)


def physical_cores() -> int:
    """Cores this process may run on, siblings of one core counted once: a second hardware thread adds no arithmetic."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(file.read_text(encoding="ascii").strip())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))
