"""What `rorqual bench` times: our own work and transformers' on the same weights and tokens."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.model.transformer import Transformer
from rorqual.plan.count import forward_flops_per_token, parts, totals
from rorqual.train.config import DataConfig, RunConfig, Source
from rorqual.train.hardware import peak_flops
from rorqual.train.pretrain import build_model
from rorqual.train.trainer import Trainer


class Training:
    """Our training step on random rows."""

    def __init__(
        self, cfg: ModelConfig, device: str, batch: int, micro_batch: int, seq_len: int, compile: bool
    ) -> None:
        on_gpu = device.startswith("cuda")
        run = RunConfig(
            out="", data=DataConfig(train=(Source("random"),), seq_len=seq_len, mask_documents=False, packing="stream"),
            steps=1_000_000, batch=batch, micro_batch=micro_batch, model="bench", device=device,
            dtype="bfloat16" if on_gpu else "float32", compile=compile,
        )  # fmt: skip
        self.trainer = Trainer(run, _model(run, cfg, device))
        shape = (batch, seq_len + 1 + cfg.num_nextn_predict_layers)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, cfg.vocab_size, shape, dtype=np.int64)
        self.rows = Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))
        self.n = 0

    def step(self) -> None:
        self.trainer.step(self.n, lambda start, count: self.rows)
        self.n += 1


def _model(run: RunConfig, cfg: ModelConfig, device: str) -> Transformer:
    return build_model(run, cfg, torch.device(device))


class PeerTraining:
    """transformers' DeepseekV3ForCausalLM: the same configuration, its own loss, fused AdamW; on a GPU in bf16 with
    grouped_mm experts, on a CPU in fp32. It trains no MTP module, so compare configurations without one."""

    def __init__(self, cfg: ModelConfig, device: str, batch: int, seq_len: int) -> None:
        on_gpu = device.startswith("cuda")
        self.model = peer_model(cfg, torch.bfloat16 if on_gpu else torch.float32, device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, cfg.vocab_size, (batch, seq_len), device=device)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peer_model(cfg: ModelConfig, dtype: torch.dtype, device: str, source: str | None = None) -> Any:
    """transformers' model of a configuration (random weights) or of a directory."""
    import transformers

    transformers.logging.set_verbosity_error()
    options = {"attn_implementation": "sdpa"}
    if device.startswith("cuda"):
        options["experts_implementation"] = "grouped_mm"
    if source is not None:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        return loaded.to(device)
    keys = {k: v for k, v in cfg.to_json().items() if k not in ("architectures", "model_type", "quantization_config")}
    peer = transformers.DeepseekV3ForCausalLM._from_config(transformers.DeepseekV3Config(**keys), **options)
    return peer.to(device, dtype)


class Generation:
    """Our engine core on random prompts of token ids. Prefill: seconds until every prompt has its first token; decode:
    from there to the last, scaled to `new` tokens."""

    def __init__(self, cfg: ModelConfig, source: str, device: str, batch: int, prompt: int, new: int) -> None:
        from rorqual.engine.load import load_core
        from rorqual.engine.settings import EngineSettings

        self.batch, self.prompt, self.new, self.vocab = batch, prompt, new, cfg.vocab_size
        self.folder = tempfile.TemporaryDirectory()
        if not Path(source).is_dir():
            torch.manual_seed(0)
            save_model(Transformer(cfg), self.folder.name + "/model")
            source = self.folder.name + "/model"
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        settings = EngineSettings(source, dtype=dtype, device=device, max_num_seqs=batch, prefix_cache=False)
        self.core = load_core(settings)
        self.seed = 0

    def run(self) -> float:
        from rorqual.engine.api import Request, SamplingParams

        self.seed += 1
        params = SamplingParams(temperature=0, max_tokens=self.new, ignore_eos=True)
        ids = np.random.default_rng(self.seed).integers(2, self.vocab, (self.batch, self.prompt)).tolist()
        start = time.perf_counter()
        for i, row in enumerate(ids):
            self.core.add(Request(str(i), tuple(row), params))
        begun: set[str] = set()
        while len(begun) < self.batch:
            begun |= {out.request_id for out in self.core.step() if out.token_ids}
        first = time.perf_counter()
        left = 0
        while self.core.busy:
            left += sum(len(out.token_ids) for out in self.core.step())
        if self.new == 1:
            return first - start
        return (time.perf_counter() - first) * self.new * self.batch / left


class PeerGeneration:
    """transformers' generate, timed the same way."""

    def __init__(self, cfg: ModelConfig, source: str, device: str, batch: int, prompt: int, new: int) -> None:
        self.batch, self.prompt, self.new, self.vocab, self.device = batch, prompt, new, cfg.vocab_size, device
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = peer_model(cfg, dtype, device, source if Path(source).is_dir() else None).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 1
        self.seed = 0

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
        rng = np.random.default_rng(self.seed)
        ids = torch.from_numpy(rng.integers(2, self.vocab, (self.batch, self.prompt))).to(self.device)
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new, min_new_tokens=self.new,
            do_sample=False, stopping_criteria=StoppingCriteriaList([Clock()]),
        )  # fmt: skip
        if self.new == 1:
            return ticks[0] - start
        return (ticks[-1] - ticks[0]) * self.new / (self.new - 1)


def generation_bound(cfg: ModelConfig, kind: str, device: str, batch: int, prompt: int, new: int) -> tuple[float, str]:
    """Tokens/s that the hardware allows: operations over the matrix rate for prefill; for decode the weights a step
    must read (distinct experts under uniform routing, no embedding table) and the cache, over measured bandwidth."""
    where = torch.device(device)
    if kind == "prefill":
        peak, source = peak_flops(where)
        return peak / forward_flops_per_token(cfg, prompt), source
    size = 2 if where.type == "cuda" else 4
    total, _ = totals(cfg)
    routed = next(p for p in parts(cfg) if p.name == "routed experts")
    distinct = 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
    embedding = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    weights = (total - routed.total - embedding + routed.total * distinct) * size
    cache = batch * (prompt + new / 2) * cfg.num_hidden_layers * cfg.cache_dim * size
    rate = read_bandwidth(where, int(weights))
    return batch / ((weights + cache) / rate), f"bytes a step must read at {rate / 1e9:.0f} GB/s, measured here"


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
