"""Launch commands for other engines: what vLLM, SGLang and llama.cpp need to be told to serve *this* checkpoint, why,
and what they would refuse or get wrong without a word.

Everything is read from the directory: config.json for the shapes, the shards' headers for what is really stored.
Rules that come from an engine's limits rather than from arithmetic name the engine's part they come from.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig
from rorqual.plan import count
from rorqual.plan.headers import Weights, read_weights

GPUS_GB = (80, 141)
USABLE = 0.8
"""The share of a GPU that weights may take: the rest is cache, activations, graphs."""
HOST_GPUS = 8
FAST_LATENT = (512, 64)
"""The latent and rotary widths that the fast MLA kernels are compiled for."""
HEAD_IP = "${HEAD_IP:?set it to the address of host 0}"


@dataclass(frozen=True)
class GPUs:
    """How many GPUs of one size the weights need, and a split that works: tensor times pipeline parallel."""

    memory_gb: float
    needed: int
    tensor_parallel: int
    pipeline_parallel: int

    @property
    def total(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def hosts(self) -> int:
        return math.ceil(self.total / HOST_GPUS)


@dataclass
class Launch:
    """One engine. `refused` says why it cannot serve this checkpoint; there are no commands then."""

    engine: str
    endpoint: str
    commands: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refused: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model directory as the launch commands see it. depth: MTP modules whose weights are there."""

    path: Path
    cfg: ModelConfig
    raw: dict[str, Any]
    weights: Weights
    form: str
    nbytes: int
    depth: int

    @property
    def block(self) -> int | None:
        """What every split width must be a multiple of, for quantised weights."""
        if self.form == "fp8":
            size = (self.cfg.quantization_config or {}).get("weight_block_size") or [count.FP8_BLOCK]
            return int(size[0])
        return count.INT_GROUP if self.form == "compressed-tensors" else None


def open_checkpoint(directory: Path) -> Checkpoint:
    """Raises ConfigError or CheckpointError."""
    directory = directory.resolve()
    cfg = ModelConfig.load(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = read_weights(directory)
    first = cfg.num_hidden_layers
    depth = sum(
        f"model.layers.{first + k}.eh_proj.weight" in weights.names for k in range(cfg.num_nextn_predict_layers)
    )
    form = _form(cfg, raw, weights)
    nbytes = weights.nbytes
    if nbytes is None:
        known: dict[str, count.Form] = {"fp8": "fp8", "compressed-tensors": "int4", "fp32": "fp32"}
        nbytes = count.stored_bytes(cfg, known.get(form, "bf16"), copies=True)
    return Checkpoint(directory, cfg, raw, weights, form, nbytes, depth)


def _form(cfg: ModelConfig, raw: dict[str, Any], weights: Weights) -> str:
    """How the weights are stored: the quantisation method config.json names, else a plain precision."""
    if cfg.quantization_config is not None:
        return str(cfg.quantization_config.get("quant_method", "unknown"))
    plain = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "float32": "fp32", "float16": "fp16"}
    stored = weights.stored_dtype() or raw.get("torch_dtype") or raw.get("dtype")
    return plain.get(str(stored), "bf16")


# ---- arithmetic of splits -------------------------------------------------------------------------------------------


def tensor_parallel_sizes(cfg: ModelConfig, block: int | None = None, most: int = 64) -> list[int]:
    """The sizes that divide heads and feed-forward widths, with every part a multiple of `block` where weights are
    quantised by blocks. (Gate and up are merged into one matrix, so their widths must be so even unsplit.)"""
    widths = [cfg.moe_intermediate_size, cfg.n_shared_experts * cfg.moe_intermediate_size]
    if cfg.first_k_dense_replace:
        widths.append(cfg.intermediate_size)
    per_head = [cfg.qk_head_dim, cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.v_head_dim]

    def works(t: int) -> bool:
        if (t > HOST_GPUS and t % HOST_GPUS) or cfg.num_attention_heads % t or any(w % t for w in widths):
            return False
        parts = [w // t for w in widths]
        if t > 1:
            parts += [cfg.num_attention_heads // t * w for w in per_head]
        return block is None or all(p % block == 0 for p in parts)

    return [t for t in range(1, most + 1) if works(t)]


def gpus_for(nbytes: int, memory_gb: float, sizes: Sequence[int]) -> GPUs:
    """The smallest split whose GPUs hold the weights; pipeline stages where tensor parallelism alone cannot."""
    needed = math.ceil(nbytes / (USABLE * memory_gb * 1e9))
    if fits := [t for t in sizes if t >= needed]:
        return GPUs(memory_gb, needed, fits[0], 1)

    def staged(tensor: int) -> GPUs:
        stages = math.ceil(needed / tensor)
        while tensor * stages > HOST_GPUS and tensor * stages % HOST_GPUS:
            stages += 1  # hosts must hold equally many
        return GPUs(memory_gb, needed, tensor, stages)

    # Stages between hosts, splits inside one: as few GPUs as possible, then as few stages.
    wide = [t for t in sizes if t >= min(HOST_GPUS, max(sizes))]
    return min(map(staged, wide), key=lambda g: (g.total, g.pipeline_parallel))


# ---- the engines ----------------------------------------------------------------------------------------------------


def plan(directory: Path, gpu_gb: float = GPUS_GB[0]) -> dict[str, Any]:
    """Facts and launches as plain data. Raises ConfigError or CheckpointError."""
    c = open_checkpoint(directory)
    sizes = tensor_parallel_sizes(c.cfg, c.block)
    split = gpus_for(c.nbytes, gpu_gb, sizes) if sizes else None
    launches = [_vllm(c, split), _sglang(c, split), _llama_cpp(c)]
    return {
        "model": str(c.path),
        "weights": c.form,
        "weight_bytes": c.nbytes,
        "weight_bytes_are": "counted" if c.weights.nbytes is not None else "estimated: no weights here",
        "mtp_modules": c.depth,
        "context": c.cfg.max_position_embeddings,
        "cache_bytes_per_token": count.cache_bytes_per_token(c.cfg),
        "tensor_parallel_sizes": sizes,
        "gpus": {
            f"{gb:g}": {"needed": g.needed, "tensor_parallel": g.tensor_parallel, "pipeline_parallel": g.pipeline_parallel}
            for gb in sorted({*GPUS_GB, gpu_gb})
            if sizes and (g := gpus_for(c.nbytes, gb, sizes))
        },
        "engines": [vars(launch) for launch in launches],
        "notes": _notes(c),
    }  # fmt: skip


def _vllm(c: Checkpoint, split: GPUs | None) -> Launch:
    launch = Launch("vLLM", "http://127.0.0.1:8000/v1")
    if (refused := _refused(c, split)) or split is None:
        launch.refused = refused
        return launch
    words = [
        ["vllm", "serve", str(c.path)],
        ["--served-model-name", c.path.name],
        ["--max-model-len", str(c.cfg.max_position_embeddings)],
        ["--tensor-parallel-size", str(split.tensor_parallel)],
    ]
    _common(c, launch, split)
    if split.pipeline_parallel > 1:
        words.append(["--pipeline-parallel-size", str(split.pipeline_parallel)])
    if c.form == "fp32":
        words.append(["--dtype", "bfloat16"])
        launch.reasons.append("--dtype bfloat16: the weights are stored in fp32, MLA kernels take 16 bits")
    if _latent(c.cfg) != FAST_LATENT:
        words.append(["--attention-backend", "TRITON_MLA"])
        launch.reasons.append(f"TRITON_MLA: {_odd_latent(c.cfg)}; the Triton kernel takes any")
    if c.depth and split.pipeline_parallel == 1:
        draft = {"method": "mtp", "num_speculative_tokens": 1}
        words.append(["--speculative-config", json.dumps(draft, separators=(",", ":"))])
        launch.reasons.append("--speculative-config: the MTP module drafts one token a step")
    if c.depth and split.pipeline_parallel > 1:
        launch.warnings.append("MTP stays off: speculative decoding does not go with pipeline stages")
    _foreign_code(c, words, launch)
    for host in range(split.hosts):
        more = [] if split.hosts == 1 else [["--nnodes", str(split.hosts)], ["--node-rank", str(host)]]
        more += [] if split.hosts == 1 else [["--master-addr", HEAD_IP]]
        more += [["--headless"]] if host else []
        launch.commands.append(shell([*words, *more]))
    return launch


def _sglang(c: Checkpoint, split: GPUs | None) -> Launch:
    launch = Launch("SGLang", "http://127.0.0.1:30000/v1")
    if (refused := _refused(c, split, packed_embedding=False)) or split is None:
        launch.refused = refused
        return launch
    cfg = c.cfg
    words = [
        ["python3", "-m", "sglang.launch_server"],
        ["--model-path", str(c.path)],
        ["--served-model-name", c.path.name],
        ["--context-length", str(cfg.max_position_embeddings)],
        ["--tp", str(split.tensor_parallel)],
    ]
    _common(c, launch, split)
    if split.pipeline_parallel > 1:
        words.append(["--pp-size", str(split.pipeline_parallel)])
    if c.form == "fp32":
        words.append(["--dtype", "bfloat16"])
        launch.reasons.append("--dtype bfloat16: the weights are stored in fp32, MLA kernels take 16 bits")
    if _latent(cfg) != FAST_LATENT:
        words.append(["--attention-backend", "triton"])
        launch.reasons.append(f"--attention-backend triton: {_odd_latent(cfg)}; the Triton kernel takes any")
    if c.depth == 1 == cfg.num_nextn_predict_layers and split.pipeline_parallel == 1:
        words += [
            ["--speculative-algorithm", "EAGLE"], ["--speculative-num-steps", "3"],
            ["--speculative-eagle-topk", "1"], ["--speculative-num-draft-tokens", "4"],
        ]  # fmt: skip
        launch.reasons.append("EAGLE flags: that is how SGLang drafts with the MTP module, chained three deep")
    elif c.depth:
        why = "wants num_nextn_predict_layers 1" if c.depth > 1 else "does not go with pipeline stages here"
        launch.warnings.append(f"MTP stays off: its drafting {why}")
    if (per_group := cfg.n_routed_experts // cfg.n_group) > 32:
        launch.warnings.append(
            f"{per_group} experts a group: the fused router kernel (moe_fused_gate) takes at most 32; releases before "
            "mid-2026 fall back to a slower path, and aiter on AMD GPUs stops at long prefills"
        )
    _foreign_code(c, words, launch)
    for host in range(split.hosts):
        more = [] if split.hosts == 1 else [["--nnodes", str(split.hosts)], ["--node-rank", str(host)]]
        more += [] if split.hosts == 1 else [["--dist-init-addr", f"{HEAD_IP}:5000"]]
        launch.commands.append(shell([*words, *more]))
    return launch


def _llama_cpp(c: Checkpoint) -> Launch:
    cfg = c.cfg
    launch = Launch("llama.cpp", "http://127.0.0.1:8080/v1")
    if (fault := _mislabelled(c)) is not None:
        launch.refused = fault
        return launch
    if cfg.topk_group == cfg.n_group > 1:
        launch.refused = (
            f"topk_group = n_group = {cfg.n_group}: it asserts that fewer groups are kept than there are. All groups kept "
            "is no restriction: n_group = topk_group = 1 in config.json means the same network"
        )
        return launch
    gguf = c.path.with_name(f"{c.path.name}.gguf")
    launch.commands = [
        shell([["rorqual", "convert", str(c.path), str(gguf), "--to", "gguf"]]),
        shell([
            ["llama-server", "--model", str(gguf)], ["--alias", c.path.name],
            ["--ctx-size", str(cfg.max_position_embeddings)], ["--parallel", "1"], ["--jinja"],
        ]),
    ]  # fmt: skip
    launch.reasons.append("it reads GGUF only; rorqual writes it with the keys this architecture needs")
    launch.reasons.append("--parallel 1: the whole context for one request; N slots share what --ctx-size reserves")
    launch.reasons.append("--jinja: the chat template of the tokenizer, not a built-in one")
    if cfg.q_lora_rank is None:
        launch.reasons.append("no query latent: the file says attention.q_lora_rank 0, without which it does not load")
    scaling = cfg.rope_scaling or {}
    if scaling and not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        launch.warnings.append(
            "rope_scaling lacks mscale or mscale_all_dim: llama.cpp then scales attention otherwise than the Python "
            "engines and the answers differ; write both keys"
        )
    if c.depth:
        need = "needs a query latent" if cfg.q_lora_rank is None else "is new there (August 2026) and takes one module"
        launch.warnings.append(f"no MTP drafting in this command: it {need}; the model serves without")
    return launch


# ---- what they share ------------------------------------------------------------------------------------------------


def _latent(cfg: ModelConfig) -> tuple[int, int]:
    return cfg.kv_lora_rank, cfg.qk_rope_head_dim


def _odd_latent(cfg: ModelConfig) -> str:
    return f"the latent is {cfg.kv_lora_rank} + {cfg.qk_rope_head_dim}, the fast MLA kernels are built for 512 + 64"


def _refused(c: Checkpoint, split: GPUs | None, packed_embedding: bool = True) -> str | None:
    """Why a GPU engine cannot serve it, if so. packed_embedding: whether it reads one."""
    if (fault := _mislabelled(c)) is not None:
        return fault
    tied = c.cfg.tie_word_embeddings and not any(name.startswith("lm_head.") for name in c.weights.names)
    dense = f"{c.path}-bf16"
    convert = ["rorqual", "convert", str(c.path), dense, "--to", "bf16", *(["--untie"] if tied else [])]
    first = f"first `{shell([convert])}`, then `{shell([['rorqual', 'handoff', dense]])}`"
    if tied and c.weights.names:
        return f"the embedding is the head too, and its class of this architecture ties none; {first}"
    if not packed_embedding and "model.embed_tokens.weight_packed" in c.weights.names:
        return f"the embedding is packed, which it does not read; {first}"
    if split is None:
        return (
            f"no tensor-parallel size works, 1 included: with {c.form} weights every feed-forward width must be a "
            f"multiple of {c.block}; {first}"
        )
    return None


def _mislabelled(c: Checkpoint) -> str | None:
    """config.json and the weights must tell the same story: engines build their layers from the former."""
    fix = f"`{shell([['rorqual', 'lint', str(c.path), '--fix']])}`"
    marks = {"fp8": ".weight_scale_inv", "compressed-tensors": ".weight_packed"}
    mark = marks.get(c.form)
    if c.weights.names and mark and not c.weights.has(mark):
        return f"config.json says {c.form}, but no tensor is called *{mark}: drop quantization_config ({fix})"
    for form, ending in marks.items():
        if c.cfg.quantization_config is None and c.weights.has(ending):
            return f"the weights are {form} (*{ending}), but config.json has no quantization_config ({fix})"
    return None


def _common(c: Checkpoint, launch: Launch, split: GPUs) -> None:
    """Reasons and warnings that hold for both GPU engines."""
    cfg = c.cfg
    whole = count.cache_bytes_per_token(cfg) * cfg.max_position_embeddings
    launch.reasons.append(
        f"context {cfg.max_position_embeddings:,}: max_position_embeddings; one such sequence takes {_gb(whole)} of bf16 "
        "cache, on every GPU of a tensor-parallel group, because MLA's latent is not split by heads"
    )
    stages = f" x {split.pipeline_parallel} pipeline stages" if split.pipeline_parallel > 1 else ""
    launch.reasons.append(
        f"{split.tensor_parallel}-way tensor parallel{stages}: {_gb(c.nbytes)} of weights fill {split.needed} x "
        f"{split.memory_gb:g} GB at {USABLE:.0%}; sizes that divide this model: "
        f"{', '.join(map(str, tensor_parallel_sizes(cfg, c.block)))}"
    )
    if split.hosts > 1:
        launch.reasons.append(f"{split.hosts} hosts of {HOST_GPUS} GPUs: one command on each, HEAD_IP set on all")
    if cfg.quantization_config is not None:
        launch.reasons.append(f"no --quantization flag: the engine reads {c.form} from config.json")
    if c.form == "fp8" and cfg.q_lora_rank is not None and cfg.q_lora_rank % count.FP8_BLOCK:
        launch.warnings.append(
            f"q_lora_rank {cfg.q_lora_rank} is no multiple of {count.FP8_BLOCK}: q_a and kv_a are merged into one FP8 "
            "matrix and the second would begin inside a block; serve this model in bf16"
        )
    if c.depth < cfg.num_nextn_predict_layers and c.weights.names:
        launch.warnings.append(
            f"config.json promises {cfg.num_nextn_predict_layers} MTP modules, the weights hold {c.depth}: drafting with "
            "the missing ones would fail"
        )
    if not c.weights.names:
        launch.warnings.append(
            "there are no weights in this directory: the precision is what config.json says, MTP stays off"
        )
    if not any((c.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        launch.warnings.append("there is no tokenizer in this directory: name one with --tokenizer or --tokenizer-path")


def _foreign_code(c: Checkpoint, words: list[list[str]], launch: Launch) -> None:
    if c.raw.get("model_type") == "kimi_k2":
        words.append(["--trust-remote-code"])
        launch.reasons.append("--trust-remote-code: Kimi's tokenizer is Python code in the checkpoint; read it first")


def _notes(c: Checkpoint) -> list[str]:
    """KTransformers serves through SGLang; its kt-kernel takes block FP8 and bf16 experts as they are stored."""
    if c.form not in ("fp8", "bf16") or _latent(c.cfg) != FAST_LATENT or _mislabelled(c):
        return []
    method = {"fp8": "FP8", "bf16": "BF16"}[c.form]
    return [
        "KTransformers: where GPU memory is short and the CPU has AVX-512, its SGLang keeps routed experts in main memory: "
        f"the SGLang command with --tp 1 --kt-method {method} --kt-weight-path {shlex.quote(str(c.path))}, and "
        "--kt-cpuinfer (cores) and --kt-num-gpu-experts as the machine allows"
    ]


def _gb(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"


def shell(words: Sequence[Sequence[str]]) -> str:
    """Groups of words as one command for bash, a group a line. HEAD_IP stays a variable, everything else is literal."""

    def quoted(word: str) -> str:
        return f'"{word}"' if word.startswith(HEAD_IP) else shlex.quote(word)

    return " \\\n  ".join(" ".join(map(quoted, group)) for group in words)
