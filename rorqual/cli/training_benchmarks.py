"""What `rorqual bench train` times: our step, transformers' and torchtitan's, on the same configuration and random tokens.

No peer trains an MTP module here: compare configurations without one.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.cli.benchmarks import peer_model
from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.errors import BackendUnavailable
from rorqual.model.precision import train_in_fp8
from rorqual.model.transformer import Transformer
from rorqual.train.config import DataConfig, OptimConfig, RunConfig, Source
from rorqual.train.limits import OutOfMemory, out_of_memory
from rorqual.train.trainer import Trainer

TORCHTITAN = "0.2.2"
"""Its model's arguments change from version to version; this is the one that is compared with."""


class Steps(Protocol):
    def step(self) -> None:
        """One training step; may return before the device is done."""


def with_memory(make: Callable[[], Steps], device: torch.device) -> tuple[Steps, int | None] | None:
    """What `make` makes after two steps, and the most memory that took beyond what was in use before (None on a CPU, where
    one engine's cannot be told from another's). None where it does not fit."""
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        made = make()
        made.step()
        made.step()
    except OutOfMemory as error:
        if not out_of_memory(error):
            raise
        return None
    return made, torch.cuda.max_memory_allocated() - before if on_gpu else None


class Training:
    """Our training step. precision: fp32, bf16 or fp8 over fp32 weights, the last also with a backend of its products
    after a slash; moments: AdamW's."""

    def __init__(
        self, cfg: ModelConfig, device: torch.device, batch: int, micro_batch: int, seq_len: int, precision: str,
        compile: bool, graph: bool, moments: str,
    ) -> None:  # fmt: skip
        precision, _, backend = precision.partition("/")
        narrow = precision != "fp32"
        run = RunConfig(
            out="", data=DataConfig(train=(Source("random"),), seq_len=seq_len, mask_documents=False, packing="stream"),
            steps=1_000_000, batch=batch, micro_batch=micro_batch, model="bench", device=str(device), compile=compile,
            graph=graph and device.type == "cuda" and not compile,
            dtype="bfloat16" if narrow else "float32", precision=precision,  # type: ignore[arg-type]
            optim=OptimConfig(moments=moments),  # type: ignore[arg-type]
        )  # fmt: skip
        torch.manual_seed(0)
        model = Transformer(cfg, device=device, compute_dtype=torch.bfloat16 if narrow else None)
        if precision == "fp8":
            train_in_fp8(model, backend or "auto")
        self.trainer = Trainer(run, model)
        shape = (batch, seq_len + 1 + cfg.num_nextn_predict_layers)
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape, dtype=np.int64)
        self.rows = Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))
        self.n = 0

    def step(self) -> None:
        self.trainer.step(self.n, lambda start, count: self.rows)
        self.n += 1


def peers(cfg: ModelConfig, device: torch.device, batch: int, seq_len: int) -> dict[str, Callable[[], Steps]]:
    """Those that are installed here, by name."""
    found: dict[str, Callable[[], Steps]] = {}
    if find_spec("transformers"):
        found["transformers"] = lambda: TransformersTraining(cfg, device, batch, seq_len)
    try:
        torchtitan_is = version("torchtitan") == TORCHTITAN
    except PackageNotFoundError:
        torchtitan_is = False
    if torchtitan_is and device.type == "cuda":
        for name, dtype in (("bf16", torch.bfloat16), ("fp32 + autocast", None)):
            found[f"torchtitan {name}"] = lambda dtype=dtype: TorchtitanTraining(  # type: ignore[misc]
                cfg, device, batch, seq_len, dtype
            )
    return found


class TransformersTraining:
    """DeepseekV3ForCausalLM, its own loss, fused AdamW; on a GPU in bf16 with grouped_mm experts, on a CPU in fp32."""

    def __init__(self, cfg: ModelConfig, device: torch.device, batch: int, seq_len: int) -> None:
        on_gpu = device.type == "cuda"
        self.model = peer_model(cfg, torch.bfloat16 if on_gpu else torch.float32, str(device))
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, cfg.vocab_size, (batch, seq_len), device=device)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class TorchtitanTraining:
    """torchtitan's DeepSeek-V3 model, compiled in the pieces in which its trainer compiles it, with fused AdamW. dtype: of
    everything, or None for fp32 weights under bf16 autocast."""

    def __init__(
        self, cfg: ModelConfig, device: torch.device, batch: int, seq_len: int, dtype: torch.dtype | None
    ) -> None:
        model_class, arguments = _torchtitan(cfg, seq_len)
        torch.manual_seed(0)
        with device:
            model = model_class(arguments)
        with torch.no_grad():
            model.init_weights(buffer_device=device)
        angles = model.freqs_cis  # complex: not converted
        self.model = model.to(dtype) if dtype else model
        self.model.freqs_cis = angles
        torch._dynamo.config.capture_scalar_outputs = True
        for block in self.model.layers.values():
            if not block.moe_enabled:
                block.compile()
                continue
            for part in (block.attention, block.attention_norm, block.ffn_norm, block.moe.router):
                part.compile()
            block.moe.shared_experts.compile()
            block.moe.experts.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, cfg.vocab_size, (batch, seq_len), device=device)
        self.targets, self.autocast, self.device = self.ids.roll(-1, 1).flatten(), dtype is None, device.type
        self.loss = torch.compile(_loss)

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            logits = self.model(self.ids)
        self.loss(logits, self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _loss(logits_BTV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_N)


def _torchtitan(cfg: ModelConfig, seq_len: int) -> tuple[Any, Any]:
    """(model class, arguments) of torchtitan's network in our configuration. Raises BackendUnavailable where it has no such
    network."""
    with _Stubs():
        moe = import_module("torchtitan.models.moe")
        args = import_module("torchtitan.models.deepseek_v3.model.args")
        network = import_module("torchtitan.models.deepseek_v3.model.model")
    if cfg.num_nextn_predict_layers or cfg.n_group > 1 or cfg.rope_scaling:
        raise BackendUnavailable("torchtitan is compared without MTP, groups and YaRN", remedy="--no-peer")
    experts = moe.MoEArgs(
        num_experts=cfg.n_routed_experts, num_shared_experts=cfg.n_shared_experts, top_k=cfg.num_experts_per_tok,
        score_func="sigmoid", route_norm=cfg.norm_topk_prob, route_scale=cfg.routed_scaling_factor,
        score_before_experts=False, use_grouped_mm=True, load_balance_coeff=1e-3,
    )  # fmt: skip
    arguments = args.DeepSeekV3ModelArgs(
        vocab_size=cfg.vocab_size, dim=cfg.hidden_size, inter_dim=cfg.intermediate_size, norm_eps=cfg.rms_norm_eps,
        moe_inter_dim=cfg.moe_intermediate_size, n_layers=cfg.num_hidden_layers, n_heads=cfg.num_attention_heads,
        n_dense_layers=cfg.first_k_dense_replace, q_lora_rank=cfg.q_lora_rank or 0, kv_lora_rank=cfg.kv_lora_rank,
        qk_nope_head_dim=cfg.qk_nope_head_dim, qk_rope_head_dim=cfg.qk_rope_head_dim, v_head_dim=cfg.v_head_dim,
        max_seq_len=seq_len, moe_args=experts,
    )  # fmt: skip
    arguments.moe_impl = "standard"
    return network.DeepSeekV3Model, arguments


class _Stubs:
    """Inside, torchtitan's trainer and whatever it needs that is not installed import as empty stand-ins: its model uses
    none of it, but cannot be imported without."""

    NAMES = (
        "torchdata", "datasets", "tyro", "tomli", "torchao", "wandb", "torchtitan.hf_datasets", "torchtitan.components",
        "torchtitan.distributed", "torchtitan.config",
    )  # fmt: skip

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)
        # The package's own __init__ imports the trainer.
        models = find_spec("torchtitan.models")
        assert models is not None and models.submodule_search_locations
        package = types.ModuleType("torchtitan.models.deepseek_v3")
        package.__path__ = [str(Path(models.submodule_search_locations[0]) / "deepseek_v3")]
        sys.modules[package.__name__] = package

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == stub or name.startswith(f"{stub}.") for stub in self.NAMES):
            return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing to run."""
