"""What `rorqual lint` looks at, and what a rule is.

A `Subject` is a model directory read once: config.json as it stands, the index, the headers of all shards, the
tokenizer's files. Whatever cannot be read becomes a problem under the id of the rule that reports it, never an
exception, because a linter that stops at the first fault hides the others. No tensor is read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rorqual.checkpoint.demo import DEMO_FILE
from rorqual.checkpoint.shards import INDEX, Entry, read_header
from rorqual.errors import CheckpointError

ENGINES = ("transformers", "vLLM", "SGLang", "llama.cpp", "rorqual")
SEVERITIES = ("error", "warning", "note")
Severity = Literal["error", "warning", "note"]
Config = dict[str, Any]
PARTS = ("weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx")
MTP_ONLY = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
LEFTOVERS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok",
)  # fmt: skip
OPTIONAL = {
    "q_lora_rank": None, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 4096,
}  # fmt: skip
MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")
MAY_BE_NULL = ("q_lora_rank", "n_group", "topk_group", "n_shared_experts", "num_nextn_predict_layers")
LIMITS = {"num_hidden_layers": 1000, "num_nextn_predict_layers": 100, "n_routed_experts": 4096}
"""Beyond these a number is a slip: every tensor it calls for would be listed."""
MODEL_TYPES = ("deepseek_v3", "kimi_k2")
Needs = Literal["nothing", "config", "sizes", "headers", "whole"]
"""What must be readable before a rule can say anything: config.json; its sizes; every header; sizes and headers."""


@dataclass(frozen=True)
class Rule:
    """One fault. `check` returns what is wrong here with its numbers, or None. `repair` mends a config in place."""

    id: str
    severity: Severity
    engines: tuple[str, ...]
    wrong: str
    fix: str
    needs: Needs
    check: Callable[[Subject], str | None]
    repair: Callable[[Config, Subject], None] | None = None


class Sizes(NamedTuple):
    """The sizes of a config, defaults filled in."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None
    n_shared_experts: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    num_nextn_predict_layers: int
    max_position_embeddings: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def per_group(self) -> int:
        return self.n_routed_experts // self.n_group


@dataclass
class Subject:
    """problems: rule id -> what was found while opening. entries and where: tensor -> header entry, file name."""

    directory: Path
    raw: Config
    problems: Mapping[str, list[str]]
    entries: Mapping[str, Entry] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    index: Mapping[str, str] | None = None
    total_size: Any = None
    side: Mapping[str, Config] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def problem(self, rule: str) -> str | None:
        found = self.problems.get(rule)
        return listed(found) if found else None

    @property
    def demo(self) -> bool:
        """Whether this is the naming of DeepSeek's own inference code."""
        return any(DEMO_FILE.fullmatch(name) for name in self.files) or ("dim" in self.raw and "n_layers" in self.raw)

    def has(self, needs: Needs) -> bool:
        config = bool(self.raw) and not self.demo and not self.other_architecture
        headers = not self.demo and bool(self.entries) and not any(self.problems.get(rule) for rule in DAMAGE)
        return {
            "nothing": True,
            "config": config,
            "sizes": config and self.sizes is not None,
            "headers": headers,
            "whole": config and headers and self.sizes is not None,
        }[needs]

    @property
    def other_architecture(self) -> bool:
        return self.raw.get("model_type", "deepseek_v3") not in MODEL_TYPES

    @cached_property
    def sizes(self) -> Sizes | None:
        """None where a size is missing or is no size."""
        if any(True for _ in self.bad_sizes()):
            return None
        values: dict[str, Any] = {k: v if (v := self.raw.get(k)) is not None else d for k, d in OPTIONAL.items()}
        return Sizes(**{k: self.raw[k] for k in REQUIRED}, **values)

    def size(self) -> Sizes:
        """For rules that need sizes."""
        assert self.sizes is not None
        return self.sizes

    def bad_sizes(self) -> Iterator[str]:
        for key in (*REQUIRED, *OPTIONAL):
            value = self.raw.get(key)
            if value is None and (key in MAY_BE_NULL or (key in OPTIONAL and key not in self.raw)):
                continue
            if key in REQUIRED and key not in self.raw:
                yield key
            elif not isinstance(value, int) or isinstance(value, bool):
                yield f"{key} = {value!r}"
            elif not (0 if key in MAY_BE_ZERO else 1) <= value <= LIMITS.get(key, 2**40):
                yield f"{key} = {value}"

    # ---- weights ------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[str, dict[str, Entry]]:
        """Logical weight -> its stored parts: `X.weight_packed` and `X.weight_scale` belong to `X.weight`."""
        out: dict[str, dict[str, Entry]] = {}
        for name, entry in self.entries.items():
            base, _, last = name.rpartition(".")
            if last in PARTS:
                out.setdefault(f"{base}.weight", {})[last] = entry
            else:
                out.setdefault(name, {})["weight"] = entry
        return out

    @cached_property
    def packed(self) -> list[str]:
        return [name for name, parts in self.weights.items() if "weight_packed" in parts]

    @cached_property
    def fp8(self) -> list[str]:
        return [name for name, parts in self.weights.items() if "weight" in parts and is_fp8(parts["weight"])]

    @cached_property
    def plain(self) -> list[str]:
        quantised = {*self.packed, *self.fp8}
        return [name for name, parts in self.weights.items() if name not in quantised and "weight" in parts]

    @property
    def quantization(self) -> Config:
        block = self.raw.get("quantization_config")
        return dict(block) if isinstance(block, Mapping) else {}

    @property
    def tied(self) -> bool:
        return self.raw.get("tie_word_embeddings") is True

    @cached_property
    def by_layer(self) -> dict[int, set[str]]:
        """Layer index -> its logical weights, named from inside the layer."""
        out: dict[int, set[str]] = {}
        for name in self.weights:
            if found := re.match(r"model\.layers\.(\d+)\.(.+)", name):
                out.setdefault(int(found[1]), set()).add(found[2])
        return out

    @cached_property
    def mtp_layers(self) -> list[int]:
        """Layers from num_hidden_layers on that hold something only an MTP module has."""
        first = self.size().num_hidden_layers
        return sorted(i for i, names in self.by_layer.items() if i >= first and names & set(MTP_ONLY))

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every weight this config needs, MTP modules as many as promised, with its shape."""
        return dict(expected(self.size(), self.tied))


DAMAGE = ("shard-damaged", "shard-missing", "shared-bytes", "index-damaged")


def expected(s: Sizes, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The architecture in closed form: (released name, shape)."""
    yield "model.embed_tokens.weight", (s.vocab_size, s.hidden_size)
    for layer in range(s.num_hidden_layers + s.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}."
        if layer >= s.num_hidden_layers:
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}{norm}.weight", (s.hidden_size,)
            yield f"{prefix}eh_proj.weight", (s.hidden_size, 2 * s.hidden_size)
        yield from _block(prefix, s, layer >= s.first_k_dense_replace)
    yield "model.norm.weight", (s.hidden_size,)
    if not tied:
        yield "lm_head.weight", (s.vocab_size, s.hidden_size)


def _block(prefix: str, s: Sizes, routed: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, heads, attention = s.hidden_size, s.num_attention_heads, f"{prefix}self_attn."
    yield f"{prefix}input_layernorm.weight", (d,)
    yield f"{prefix}post_attention_layernorm.weight", (d,)
    if s.q_lora_rank is None:
        yield f"{attention}q_proj.weight", (heads * s.qk_head_dim, d)
    else:
        yield f"{attention}q_a_proj.weight", (s.q_lora_rank, d)
        yield f"{attention}q_a_layernorm.weight", (s.q_lora_rank,)
        yield f"{attention}q_b_proj.weight", (heads * s.qk_head_dim, s.q_lora_rank)
    yield f"{attention}kv_a_proj_with_mqa.weight", (s.kv_lora_rank + s.qk_rope_head_dim, d)
    yield f"{attention}kv_a_layernorm.weight", (s.kv_lora_rank,)
    yield f"{attention}kv_b_proj.weight", (heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)
    yield f"{attention}o_proj.weight", (d, heads * s.v_head_dim)
    if not routed:
        yield from _mlp(f"{prefix}mlp.", d, s.intermediate_size)
        return
    yield f"{prefix}mlp.gate.weight", (s.n_routed_experts, d)
    yield f"{prefix}mlp.gate.e_score_correction_bias", (s.n_routed_experts,)
    for expert in range(s.n_routed_experts):
        yield from _mlp(f"{prefix}mlp.experts.{expert}.", d, s.moe_intermediate_size)
    yield from _mlp(f"{prefix}mlp.shared_experts.", d, s.n_shared_experts * s.moe_intermediate_size)


def _mlp(prefix: str, d: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (width, d)
    yield f"{prefix}up_proj.weight", (width, d)
    yield f"{prefix}down_proj.weight", (d, width)


def is_fp8(entry: Entry) -> bool:
    return str(entry.dtype).startswith("torch.float8_e4m3") or str(entry.dtype).startswith("torch.float8_e5m2")


def is_number(value: object) -> bool:
    """An int or a finite float; JSON's true is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def listed(items: Iterable[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# ---- opening ------------------------------------------------------------------------------------------------------


def open_subject(directory: Path, progress: Callable[[int], None] | None = None) -> Subject:
    """Reads the directory. `progress` is told how many shards are done. Raises CheckpointError if there is none."""
    if not directory.is_dir():
        raise CheckpointError(f"there is no model directory {directory}", remedy="name a directory")
    problems: dict[str, list[str]] = {}
    raw = _read_object(directory / "config.json", "config-missing", "config-not-json", problems)
    index, total = _read_index(directory, problems)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    entries: dict[str, Entry] = {}
    where: dict[str, str] = {}
    for done, file in enumerate(files, 1):
        unused = index is not None and file not in index.values()
        for name, entry in _header(directory / file, problems).items():
            if name in where and not unused and not DEMO_FILE.fullmatch(file):
                problems.setdefault("tensor-twice", []).append(f"{name} in {where[name]} and {file}")
            elsewhere = name in where and index is not None and index.get(name) == where[name]
            if not unused and not elsewhere:
                entries[name], where[name] = entry, file
        if progress is not None:
            progress(done)
    if index is not None and (missing := sorted(set(index.values()) - set(files))):
        problems["shard-missing"] = missing
    side = {
        name: _read_object(directory / name, "", f"{name.split('.')[0].replace('_', '-')}-damaged", problems)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        if (directory / name).is_file()
    }
    return Subject(directory, raw, problems, entries, where, index, total, side, tuple(files))


def _read_object(path: Path, missing: str, damaged: str, problems: dict[str, list[str]]) -> Config:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems[missing] = [f"{path.name} is not there"]
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems[damaged] = [f"{path.name}: {error}"]
        return {}
    if not isinstance(value, dict) or not value:
        problems[damaged] = [f"{path.name} holds {'an empty object' if value == {} else type(value).__name__}"]
        return {}
    return value


def _read_index(directory: Path, problems: dict[str, list[str]]) -> tuple[dict[str, str] | None, Any]:
    if not (directory / INDEX).is_file():
        return None, None
    raw = _read_object(directory / INDEX, "", "index-damaged", problems)
    weight_map, metadata = raw.get("weight_map"), raw.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        problems.setdefault("index-damaged", [f"{INDEX} has no weight_map from names to files"])
        return None, None
    if outside := sorted({file for file in weight_map.values() if Path(file).name != file}):
        problems["index-damaged"] = [f"{INDEX} names files outside its directory: {listed(outside)}"]
        return None, None
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _header(path: Path, problems: dict[str, list[str]]) -> dict[str, Entry]:
    try:
        return read_header(path)
    except CheckpointError as error:
        rule = "shared-bytes" if "share bytes" in str(error) else "shard-damaged"
        problems.setdefault(rule, []).append(str(error.args[0]).replace(f"{path.parent}/", ""))
        return {}
