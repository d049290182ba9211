"""From settings to a running core: the device, the model, and how large its cache may be.

The only file that looks at the machine. Whatever it decides for an "auto" is in `EngineInfo` and in one log line.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rorqual.checkpoint import load_model
from rorqual.config import ModelConfig, resolve_model
from rorqual.engine.api import PAGE_SIZE, EngineInfo, Grammar
from rorqual.engine.core import EngineCore, GrammarCompiler, Matcher, Runner
from rorqual.engine.disk import DiskCache
from rorqual.engine.memory import CudaMeter, cache_size, graph_bytes, longest_request, measured_room, memory_bytes
from rorqual.engine.pages import PagePool
from rorqual.engine.runner import ModelRunner, page_bytes
from rorqual.engine.scheduler import Scheduler
from rorqual.engine.settings import Auto, EngineSettings
from rorqual.errors import BackendUnavailable, CheckpointError, ConfigError
from rorqual.model.quantised import expand_absorbed
from rorqual.model.transformer import Transformer
from rorqual.ops.cores import physical_cores

if TYPE_CHECKING:
    from rorqual.ops.native.pack import Kind

log = logging.getLogger(__name__)

INTEGERS = ("int8", "int4")


def load_core(settings: EngineSettings) -> EngineCore:
    """Loads the model and makes an engine of it: on the CPU kernels where they can run, else on torch.

    Raises ConfigError, CheckpointError, BackendUnavailable.
    """
    path = resolve_model(settings.model)
    device = pick_device(settings.device)
    if device.type == "cpu" and settings.kernels != "torch":
        try:
            return _load_native(path, settings)
        except BackendUnavailable as error:
            if settings.kernels == "native" or settings.deterministic is True or settings.dtype in INTEGERS:
                raise
            log.warning("computing with torch, several times slower: %s", error)
    _refuse(settings)
    if settings.dtype in INTEGERS:
        raise BackendUnavailable(
            f"dtype {settings.dtype} is the CPU kernels' own",
            remedy=f"use `rorqual convert --to {settings.dtype}` first",
        )
    dtype: str | torch.dtype = settings.dtype
    if dtype == "auto" and device.type == "cpu" and 4 * stored_bytes(path) <= memory_bytes():
        # Most CPUs multiply bf16 at half the rate of fp32 or less; a model that would fill the memory stays as stored.
        dtype = torch.float32
    model = load_model(path, dtype=dtype, device=device)
    core = build_core(
        model,
        settings,
        name=path.name,
        eos_token_ids=eos_token_ids(path, model.cfg),
        **_extras(path, model.cfg, settings),
    )
    if device.type == "cpu":
        assert isinstance(core.runner, ModelRunner)
        set_threads(settings.threads, core.runner.idle_step, torch.set_num_threads)
    return core


def build_core(
    model: Transformer,
    settings: EngineSettings,
    *,
    name: str,
    eos_token_ids: tuple[int, ...],
    fingerprint: bytes = b"",
    **options: Any,
) -> EngineCore:
    """An engine around a model that is already in memory, computing with torch; it sees changes of the weights.
    options: `EngineCore`'s."""
    cfg, device = model.cfg, model.device
    _refuse(settings)
    if settings.cache_dir is not None and not fingerprint:
        raise ConfigError(
            "a model in memory cannot keep its cache on disk: nothing tells its weights from another's",
            remedy="leave cache_dir out",
        )
    dtype = model.compute_dtype or model.dtype
    if device.type == "cuda":
        expand_absorbed(model, dtype)
    fixed = settings.deterministic is True
    if fixed:
        make_fixed(model)

    def make(pages: int) -> ModelRunner:
        return ModelRunner(
            model, pages, PAGE_SIZE, eos_token_ids, drafts=settings.speculation != 0, fixed=fixed,
            prompt_graphs=settings.prompt_graphs,
        )  # fmt: skip

    budget, room = _room(model, settings, make)
    page = page_bytes(model, PAGE_SIZE, settings.speculation != 0)
    pages, max_model_len = cache_size(cfg, page, room, settings)
    facts = EngineInfo(
        model=name,
        max_model_len=max_model_len,
        vocab_size=cfg.vocab_size,
        eos_token_ids=eos_token_ids,
        cache_tokens=pages * PAGE_SIZE,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        deterministic=fixed,
    )
    identity = f"torch {name} {dtype} {device.type}{' fixed' * fixed}".encode() + fingerprint
    try:
        runner = make(pages + 1)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"a cache of {pages * PAGE_SIZE} tokens does not fit on {device}",
            remedy="lower cache_tokens or leave it out",
        ) from None
    return _assemble(runner, facts, settings, budget, identity, options)


def _room(model: Transformer, settings: EngineSettings, make: Callable[[int], ModelRunner]) -> tuple[int, int]:
    """The token budget of a step, and the bytes that the cache may have."""
    device, fixed = model.device, settings.deterministic is True
    budget = _budget(settings, device, fixed)
    if device.type != "cuda" or settings.cache_tokens != "auto":
        return budget, memory_bytes() // 4
    meter = CudaMeter(device)
    page = page_bytes(model, PAGE_SIZE, settings.speculation != 0)
    longest = min(longest_request(model.cfg, settings), max(2, meter.free() // page) * PAGE_SIZE)
    budget, room = measured_room(make, settings, longest, budget, meter)
    depth = 1 if settings.speculation == "auto" else settings.speculation
    itemsize = (model.compute_dtype or model.dtype).itemsize
    return budget, room - graph_bytes(model.cfg, settings, longest, itemsize, depth)


def _budget(settings: EngineSettings, device: torch.device, fixed: bool) -> int:
    """Tokens of a step. Where they are all computed in rows form, more would be no faster."""
    if settings.max_batched_tokens != "auto":
        return settings.max_batched_tokens
    if device.type != "cuda":
        return 512
    return 2048 if fixed else 16384


def make_fixed(model: Transformer) -> None:
    """Products and attention that do not depend on what else is computed (`model.fixed`), in place. Raises
    BackendUnavailable where they cannot be had."""
    if model.device.type != "cuda":
        raise BackendUnavailable(
            f"torch on {model.device} does not compute the same bits in every batch",
            remedy="on a CPU the compiled kernels do: leave kernels out",
        )
    from rorqual.model.fixed import fix

    fix(model)


def _refuse(settings: EngineSettings) -> None:
    """Raises BackendUnavailable for what torch cannot give."""
    if settings.kernels == "native":
        raise BackendUnavailable(
            "the CPU kernels compute models loaded from a directory, on a CPU", remedy="leave kernels out"
        )


def _load_native(path: Path, settings: EngineSettings) -> EngineCore:
    # Here, because compiling and loading them is for those who use them.
    from rorqual.engine.native import NativeModel, unsupported
    from rorqual.engine.native_runner import NativeRunner
    from rorqual.ops.native.build import library, library_file

    known = ("auto", "float32", "bfloat16", *INTEGERS)
    if settings.dtype not in known:
        raise ConfigError(
            f"dtype {settings.dtype!r} is not one of {', '.join(known)}",
            remedy='leave it at "auto" for a checkpoint that is stored in fp8',
        )
    library()
    cfg = ModelConfig.load(str(path))
    if reason := unsupported(cfg):
        raise BackendUnavailable(f"the CPU kernels do not take this model: {reason}", remedy="use kernels torch")
    extras = _extras(path, cfg, settings)
    page = (cfg.num_hidden_layers + cfg.num_nextn_predict_layers) * (-(-cfg.cache_dim // 16) * 16) * 4 * PAGE_SIZE
    pages, max_model_len = cache_size(cfg, page, memory_bytes() // 4, settings)
    torch.set_num_threads(1)  # what torch still does here is small
    source = load_model(path, device="cpu")
    eos = eos_token_ids(path, source.cfg)
    kind = None if settings.dtype == "auto" else cast("Kind", settings.dtype)
    model = NativeModel(source, kind=kind, max_positions=max_model_len)
    del source
    runner = NativeRunner(model, pages + 1, PAGE_SIZE, eos)
    set_threads(settings.threads, runner.idle_step, model.set_threads)
    model.probe()
    facts = EngineInfo(
        model=path.name,
        max_model_len=max_model_len,
        vocab_size=cfg.vocab_size,
        eos_token_ids=eos,
        cache_tokens=pages * PAGE_SIZE,
        device="cpu",
        dtype=model.name,
        bandwidth=model.bandwidth(),
        deterministic=True,
    )
    # The library's name is made of source, compiler and processor: other bits, other pages.
    identity = f"{library_file().name} {path.name} {settings.dtype} {model.name}".encode() + extras.pop("fingerprint")
    budget = _budget(settings, torch.device("cpu"), False)
    return _assemble(runner, facts, settings, budget, identity, extras)


def _assemble(
    runner: Runner, info: EngineInfo, settings: EngineSettings, budget: int, identity: bytes, options: dict[str, Any]
) -> EngineCore:
    pool = PagePool(info.cache_tokens // PAGE_SIZE + 1, identity=identity, prefix_cache=settings.prefix_cache)
    scheduler = Scheduler(
        pool,
        max_model_len=info.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=budget,
        max_waiting=settings.max_waiting,
        lookahead=isinstance(runner, ModelRunner) and runner.graphs is not None,
    )
    disk = None
    if settings.cache_dir is not None:
        disk = DiskCache(
            Path(settings.cache_dir),
            page_bytes=runner.page_bytes,
            identity=identity,
            capacity_bytes=settings.cache_disk_bytes,
        )
    log.info(
        "%s on %s in %s: context %d, cache %d tokens",
        info.model, info.device, info.dtype, info.max_model_len, info.cache_tokens,
    )  # fmt: skip
    return EngineCore(runner, scheduler, info, speculation=settings.speculation, disk=disk, **options)


def _extras(path: Path, cfg: ModelConfig, settings: EngineSettings) -> dict[str, Any]:
    """What the engine needs of the model's directory besides its weights."""
    return {
        "grammar_compiler": LazyCompiler(path / "tokenizer.json", cfg.vocab_size, eos_token_ids(path, cfg)),
        # Only what outlives the process must tell one set of weights from another.
        "fingerprint": fingerprint(path, cfg) if settings.cache_dir is not None else b"",
    }


class LazyCompiler:
    """`engine.grammar.GrammarCompiler`, built when the first request has a grammar: most servers never see one."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._arguments = tokenizer_file, vocab_size, eos_token_ids
        self._compiler: GrammarCompiler | None = None

    def matcher(self, grammar: Grammar) -> Matcher:
        if self._compiler is None:
            from rorqual.engine.grammar import GrammarCompiler as Compiler

            self._compiler = Compiler(*self._arguments)
        return self._compiler.matcher(grammar)


def fingerprint(path: Path, cfg: ModelConfig) -> bytes:
    """Of a model: its config, and its weights' headers, sizes and samples of their bytes. Copies have the same."""
    told = blake2b(json.dumps(cfg.to_json(), sort_keys=True).encode(), digest_size=16)
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        told.update(f"{size}".encode())
        with file.open("rb") as shard:
            head = shard.read(8)
            told.update(head + shard.read(min(int.from_bytes(head, "little"), size)))
            for i in range(32):
                shard.seek(size * i // 32)
                told.update(shard.read(1024))
    return told.digest()


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


def set_threads(threads: int | Auto, step: Callable[[], object], apply: Callable[[int], object]) -> None:
    """`apply` the number of threads; "auto" times `step` with 1, 2, 4, ... up to the physical cores.

    Counting cores is not enough: where others use them too, every parallel region waits for its slowest thread, and two
    threads can be a hundred times slower than one.
    """
    if threads != "auto":
        apply(threads)
        return
    most = physical_cores()
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    times: dict[int, float] = {}
    for count in counts:
        apply(count)
        step()
        runs, begin = 0, time.perf_counter()
        while runs < 20 and time.perf_counter() - begin < 0.25:
            step()
            runs += 1
        times[count] = (time.perf_counter() - begin) / runs
    best = min(counts, key=lambda count: times[count])
    apply(best)
    told = ", ".join(f"{count}: {1000 * seconds:.1f} ms" for count, seconds in times.items())
    log.info("%d threads, by the time of a decoding step (%s)", best, told)
