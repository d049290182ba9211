"""What `rorqual bench` times: our own work and transformers' on the same weights and tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from rorqual.checkpoint import save_model
from rorqual.checkpoint.convert import FORMATS, is_quantised
from rorqual.cli.serving import Served
from rorqual.config import ModelConfig, models_dir
from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.settings import EngineSettings
from rorqual.errors import BackendUnavailable
from rorqual.model.quantised import quantise
from rorqual.model.transformer import Transformer
from rorqual.plan.count import forward_flops_per_token, parts, totals
from rorqual.train.hardware import peak_flops


def peer_model(cfg: ModelConfig, dtype: torch.dtype, device: str, source: str | None = None) -> Any:
    """transformers' model of a configuration (random weights) or of a directory. Raises BackendUnavailable for one that it
    cannot load."""
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"attn_implementation": "sdpa"}
    if device.startswith("cuda"):
        options["experts_implementation"] = "grouped_mm"
    if source is not None:
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        except Exception as error:  # a packed embedding fails deep inside
            remedy = "leave it out with --no-peer, or `rorqual convert --to bf16`"
            raise BackendUnavailable(f"transformers cannot load {source}: {error}", remedy=remedy) from error
        return loaded.to(device)
    keys = {k: v for k, v in cfg.to_json().items() if k not in ("architectures", "model_type", "quantization_config")}
    peer = transformers.DeepseekV3ForCausalLM._from_config(transformers.DeepseekV3Config(**keys), **options)
    return peer.to(device, dtype)


class Work(NamedTuple):
    """What the engines generate: `batch` random prompts of `prompt` ids, `new` greedy tokens after each."""

    batch: int
    prompt: int
    new: int

    def seconds(self, prefill: float, decode: float) -> float:
        """Prefill: until every prompt has its first token. Decode: from there to the last, scaled to `new` tokens."""
        return prefill if self.new == 1 else decode * self.new / (self.new - 1)


class Weights:
    """One checkpoint for every engine: a directory, a bundled model, or a preset's random weights by seed, in bf16, drawn
    on `device`. A preset is written to disk when somebody reads it from there (`path`)."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        self.device = device
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self._given = Path(model) if Path(model).is_dir() else models_dir() / model
        self.preset = None if self._given.is_dir() else model
        self.cfg = ModelConfig.load(self.preset or self._given)

    def make_room(self, positions: int) -> None:
        """Random weights take contexts of any length: let them be so long."""
        if self.preset is not None and positions > self.cfg.max_position_embeddings:
            self.cfg = self.cfg.replace(max_position_embeddings=positions)

    @cached_property
    def path(self) -> Path:
        if self.preset is None:
            return self._given
        self.folder = self.folder or tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "model"
        torch.manual_seed(0)
        save_model(Transformer(self.cfg, dtype=torch.bfloat16, device=self.device), path)
        return path

    def gguf(self, kind: str) -> Path:
        from rorqual.checkpoint.gguf import export_gguf
        from rorqual.checkpoint.source import Source

        self.folder = self.folder or tempfile.TemporaryDirectory()
        file = Path(self.folder.name) / f"{kind}.gguf"
        if not file.exists():
            export_gguf(Source.open(self.path), file, kind)
        return file


def engine(
    weights: Weights,
    device: str,
    max_num_seqs: int,
    dtype: str,
    threads: int,
    speculation: int | Literal["auto"] = 0,
    **settings: Any,
) -> EngineCore:
    """Our engine core. threads: on a CPU, 0 for what is fastest. A preset's weights are made where they are needed.
    settings: `EngineSettings`' others."""
    from rorqual.engine.load import build_core, load_core

    on_gpu = device.startswith("cuda") and weights.preset is not None
    told = EngineSettings(
        "" if on_gpu else str(weights.path), dtype, device, max_num_seqs=max_num_seqs, speculation=speculation,
        threads=threads or "auto", **{"prefix_cache": False, **settings},
    )  # fmt: skip
    if not on_gpu:
        return load_core(told)
    torch.manual_seed(0)
    form = FORMATS.get(dtype)
    model = Transformer(weights.cfg, dtype=getattr(torch, "bfloat16" if form else dtype), device=device).eval()
    if form:
        experts = "experts.gate_up", "experts.down"
        quantise(model, form, lambda path: path.endswith(experts) or is_quantised(f"{path}.weight", form))
    return build_core(model, told, name=str(weights.preset), eos_token_ids=weights.cfg.eos_token_ids)


class Generation:
    """Our engine core on random prompts of token ids."""

    def __init__(
        self, weights: Weights, device: str, work: Work, dtype: str, threads: int, deterministic: bool = False,
        overlap: bool = True, **settings: Any,
    ) -> None:  # fmt: skip
        self.work, self.vocab, self.overlap = work, weights.cfg.vocab_size, overlap
        told = {"deterministic": deterministic or "auto", **settings}
        self.core = engine(weights, device, work.batch, dtype, threads, **told)
        self.seed = 0

    def run(self) -> float:
        if self.overlap:
            return self._run()
        from rorqual.ops.triton.overlap import overlapping

        with overlapping(False):
            return self._run()

    def _run(self) -> float:
        self.seed += 1
        work = self.work
        params = SamplingParams(temperature=0, max_tokens=work.new, ignore_eos=True)
        ids = np.random.default_rng(self.seed).integers(2, self.vocab, (work.batch, work.prompt)).tolist()
        start = time.perf_counter()
        for i, row in enumerate(ids):
            self.core.add(Request(str(i), tuple(row), params))
        begun: set[str] = set()
        while len(begun) < work.batch:
            begun |= {out.request_id for out in self.core.step() if out.token_ids}
        first = time.perf_counter()
        left = 0
        while self.core.busy:
            left += sum(len(out.token_ids) for out in self.core.step())
        if work.new == 1:
            return first - start
        # Short prompts have begun to decode while long ones were read: what is left is what was timed.
        return (time.perf_counter() - first) * work.new * work.batch / left


class LlamaGeneration:
    """llama.cpp on the same weights, in a process of its own (`llama_worker`). kind: a GGUF type, or none where the
    weights cannot be exported to it. Raises BackendUnavailable without llama-cpp-python."""

    KINDS: ClassVar = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}

    def __init__(self, weights: Weights, work: Work, dtype: str, threads: int) -> None:
        python = llama_python()
        if python is None:
            raise BackendUnavailable("llama-cpp-python is not installed", remedy="`make interop` builds it in .peers")
        self.work, self.kind, self.seed = work, self.KINDS[dtype], 0
        context = work.batch * (work.prompt + work.new + 64)
        self.process = subprocess.Popen(
            [
                *(python, "-P", str(Path(__file__).with_name("llama_worker.py")), str(weights.gguf(self.kind))),
                *(str(threads), str(context), str(work.batch)),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def run(self) -> float:
        self.seed += 1
        answer = self._ask({**self.work._asdict(), "seed": self.seed})
        return self.work.seconds(answer["prefill"], answer["decode"])

    def serve(self, lengths: list[tuple[int, int]], seed: int) -> Served:
        """Requests of (prompt, new) tokens, all there at the start, batched continuously over `work.batch` sequences."""
        answer = self._ask({"serve": lengths, "seed": seed})
        new, prompt = (sum(both[i] for both in lengths) for i in (1, 0))
        return Served(answer["seconds"], None, new, prompt, answer["steps"], answer["first_s"], answer["gap_s"])

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BackendUnavailable("the llama.cpp worker ended")
        return dict(json.loads(line))


def llama_python() -> str | None:
    """A Python that has llama_cpp: $LLAMA_PYTHON, this one, or that of `make interop`."""
    if named := os.environ.get("LLAMA_PYTHON"):
        return named
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    built = Path(__file__).resolve().parents[2] / ".peers" / "bin" / "python"
    return str(built) if built.exists() else None


class PeerGeneration:
    """transformers' generate, timed the same way."""

    def __init__(self, weights: Weights, device: str, work: Work) -> None:
        self.work, self.vocab, self.device, self.seed = work, weights.cfg.vocab_size, device, 0
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = peer_model(weights.cfg, dtype, device, str(weights.path)).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 1

    def run(self) -> float:
        from transformers import StoppingCriteria, StoppingCriteriaList

        ticks: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                if input_ids.device.type == "cuda":
                    torch.cuda.synchronize()
                ticks.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        self.seed += 1
        work, rng = self.work, np.random.default_rng(self.seed)
        ids = torch.from_numpy(rng.integers(2, self.vocab, (work.batch, work.prompt))).to(self.device)
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new, min_new_tokens=work.new,
            do_sample=False, stopping_criteria=StoppingCriteriaList([Clock()]),
        )  # fmt: skip
        return work.seconds(ticks[0] - start, ticks[-1] - ticks[0])


class Threads:
    """Runs a torch peer with as many threads as is best for it, and gives torch back as it was."""

    def __init__(self, work: Callable[[], float], threads: int) -> None:
        self.work, self.threads = work, threads

    def run(self) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.work()
        finally:
            torch.set_num_threads(before)


BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 8.5 / 8, "int4": 4.5 / 8}
"""Of one stored weight, scales included."""


def generation_bound(cfg: ModelConfig, kind: str, device: str, work: Work, dtype: str) -> tuple[float, str]:
    """Tokens/s that the hardware allows: operations over the matrix rate for prefill; for decode the weights a step
    must read (distinct experts under uniform routing, no embedding table) and the cache, over measured bandwidth."""
    where = torch.device(device)
    if kind == "prefill":
        peak, source = peak_flops(where)
        return peak / forward_flops_per_token(cfg, work.prompt), source
    total, _ = totals(cfg)
    routed = next(p for p in parts(cfg) if p.name == "routed experts")
    distinct = 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** work.batch
    embedding = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    head = cfg.vocab_size * cfg.hidden_size
    multiplied = total - routed.total - embedding - head + routed.total * distinct
    weights = multiplied * BYTES[dtype] + head * (
        2.0 if dtype == "fp8" else BYTES[dtype]
    )  # FP8 leaves the head in bf16
    cached = work.batch * (work.prompt + work.new / 2) * cfg.num_hidden_layers * cfg.cache_dim
    cache = cached * (4 if where.type == "cpu" else 2)
    rate = read_bandwidth(where, int(weights))
    return work.batch / ((weights + cache) / rate), f"bytes a step must read at {rate / 1e9:.0f} GB/s, measured here"


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s of reading a buffer about as large as the weights, best of several."""
    n = max(size, 1 << 24) // 4
    x = torch.ones(n, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 4 * n / best
