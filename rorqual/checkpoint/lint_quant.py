"""Lint rules about quantised weights: FP8 blocks of 128 x 128 and packed integers (compressed-tensors).

Scales are the one thing of which values are read, tensor by tensor: a NaN, a zero or a negative scale spoils a whole
block without a word.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.lint_subject import ENGINES, Config, Rule, Subject, listed
from rorqual.checkpoint.shards import Entry, Shard
from rorqual.ops.fp8 import BLOCK

LOADERS = ("transformers", "vLLM", "SGLang", "rorqual")
GPU = ("vLLM", "SGLang")
BUILDERS = ("transformers", "vLLM", "SGLang")
"""Who makes quantised layers from config.json; rorqual and llama.cpp go by the tensors."""
OTHERS = ("vLLM", "SGLang", "llama.cpp", "rorqual")
SCALES = ("weight_scale_inv", "weight_scale")
FP8_CONFIG = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip
_PLAIN_FP8 = re.compile(r"(embed_tokens|lm_head|mlp\.gate|eh_proj|shared_head\.head|norm)\.weight$")
_PLAIN_PACKED = re.compile(r"(mlp\.gate|eh_proj|norm)\.weight$")
_LINEAR = re.compile(r"(_proj|_mqa|lm_head)\.weight$")


# ---- FP8 ----------------------------------------------------------------------------------------------------------


def _scaled(s: Subject) -> list[str]:
    """FP8 matrices that have their scales."""
    return [name for name in s.fp8 if "weight_scale_inv" in s.weights[name]]


def _stale(s: Subject) -> str | None:
    if not s.raw.get("quantization_config") or s.packed or s.fp8:
        return None
    if any("weight_scale_inv" in parts for parts in s.weights.values()):
        return None
    return f"quantization_config says {s.quantization.get('quant_method')!r}, no tensor is quantised"


def _drop_config(config: Config, s: Subject) -> None:
    config.pop("quantization_config", None)


def _fp8_unsaid(s: Subject) -> str | None:
    if not s.fp8 or s.quantization.get("quant_method") == "fp8":
        return None
    return f"{len(s.fp8):,} FP8 tensors, quantization_config is {s.raw.get('quantization_config')!r}: {listed(s.fp8)}"


def _say_fp8(config: Config, s: Subject) -> None:
    if not s.packed and s.fp8:
        config["quantization_config"] = dict(FP8_CONFIG)


def _scale_missing(s: Subject) -> str | None:
    lost = [name for name in s.fp8 if "weight_scale_inv" not in s.weights[name]]
    return f"{len(lost):,} without weight_scale_inv: {listed(lost)}" if lost else None


def _scale_orphan(s: Subject) -> str | None:
    fp8, packed, out = set(s.fp8), set(s.packed), []
    for name, parts in s.weights.items():
        base = name.removesuffix(".weight")
        alone = "weight_scale_inv" in parts and name not in fp8
        out += [f"{base}.weight_scale_inv"] if alone else []
        out += [f"{base}.{p}" for p in ("weight_scale", "weight_shape") if p in parts and name not in packed]
    return f"{len(out):,} scales of nothing quantised: {listed(out)}" if out else None


def _grid(s: Subject) -> str | None:
    wrong = []
    for name in _scaled(s):
        shape, grid = s.weights[name]["weight"].shape, s.weights[name]["weight_scale_inv"].shape
        if (wanted := _blocks(shape)) != grid:
            wrong.append(f"{name} {list(shape)} has scales {list(grid)}, not {list(wanted)}")
    return f"{len(wrong):,}: {listed(wrong, 2)}" if wrong else None


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // BLOCK) for n in shape)


def _scale_dtype(s: Subject) -> str | None:
    odd = [
        f"{n}_scale_inv {e.dtype}" for n in _scaled(s) if (e := s.weights[n]["weight_scale_inv"]).dtype != torch.float32
    ]
    return f"{len(odd):,}: {listed(odd)}" if odd else None


def _fp8_plain(s: Subject) -> str | None:
    wrong = [name for name in s.fp8 if _PLAIN_FP8.search(name)]
    return f"{len(wrong):,}: {listed(wrong)}" if wrong else None


def _block_size(s: Subject) -> str | None:
    if s.quantization.get("quant_method") != "fp8":
        return None
    block = s.quantization.get("weight_block_size")
    return None if block == [BLOCK, BLOCK] else f"weight_block_size is {block!r}"


def _write_block_size(config: Config, s: Subject) -> None:
    """Only where the scales are those of 128 x 128."""
    if _scaled(s) and _grid(s) is None:
        config["quantization_config"] = {**s.quantization, "weight_block_size": [BLOCK, BLOCK]}


def _ue8m0(s: Subject) -> str | None:
    if s.quantization.get("scale_fmt") != "ue8m0":
        return None
    odd = [name for name, value in _scales(s) if bool((torch.frexp(value)[0].abs() != 0.5).any())]
    return (
        f"scale_fmt is ue8m0, {len(odd):,} tensors have scales that are no powers of two: {listed(odd)}"
        if odd
        else None
    )


def _drop_scale_fmt(config: Config, s: Subject) -> None:
    config["quantization_config"] = {k: v for k, v in s.quantization.items() if k != "scale_fmt"}


def _ragged(s: Subject) -> str | None:
    shapes = {name: s.weights[name]["weight"].shape for name in _scaled(s)}
    odd = [f"{name} {list(shape)}" for name, shape in shapes.items() if any(n % BLOCK for n in shape)]
    return f"{len(odd):,} have a side that is no multiple of {BLOCK}: {listed(odd)}" if odd else None


def _widths(s: Subject) -> str | None:
    if not s.fp8:
        return None
    z = s.size()
    merged = {
        "q_lora_rank": z.q_lora_rank, "moe_intermediate_size": z.moe_intermediate_size,
        "intermediate_size": z.intermediate_size if z.first_k_dense_replace else None,
    }  # fmt: skip
    odd = [f"{name} {width}" for name, width in merged.items() if width and width % BLOCK]
    return f"{listed(odd)}: no multiple of {BLOCK}" if odd else None


# ---- values of scales ---------------------------------------------------------------------------------------------


def _scales(s: Subject) -> Iterator[tuple[str, Tensor]]:
    """Every scale tensor in fp32, one at a time, shard by shard."""
    by_file: dict[str, list[tuple[str, Entry]]] = {}
    for name, entry in s.entries.items():
        if name.endswith(SCALES) and entry.nbytes:
            by_file.setdefault(s.where[name], []).append((name, entry))
    for file, tensors in by_file.items():
        shard = Shard(s.directory / file)
        for name, entry in sorted(tensors, key=lambda item: item[1].begin):
            if entry.dtype.is_floating_point:
                yield name, shard.view(entry).float()
        shard.close()


def _bad_scales(test: Callable[[Tensor], Tensor]) -> Callable[[Subject], str | None]:
    def check(s: Subject) -> str | None:
        bad = [f"{name} ({int(n)} of {value.numel()})" for name, value in _scales(s) if (n := test(value).sum())]
        return f"{len(bad):,} tensors: {listed(bad)}" if bad else None

    return check


# ---- packed integers ----------------------------------------------------------------------------------------------


def _group(s: Subject) -> Mapping[str, Any]:
    """The weights of the one configuration group."""
    groups = s.quantization.get("config_groups")
    groups = groups if isinstance(groups, Mapping) else {}
    first: Any = next(iter(groups.values()), {})
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _targets(s: Subject) -> list[str]:
    groups = s.quantization.get("config_groups")
    groups = groups if isinstance(groups, Mapping) else {}
    return [str(t) for g in groups.values() if isinstance(g, Mapping) for t in g.get("targets") or []]


def _packed_unsaid(s: Subject) -> str | None:
    if not s.packed or s.quantization.get("quant_method") == "compressed-tensors":
        return None
    return f"{len(s.packed):,} packed tensors, quantization_config is {s.raw.get('quantization_config')!r}"


def _packed_config(s: Subject) -> str | None:
    q = s.quantization
    if q.get("quant_method") != "compressed-tensors" or not s.packed:
        return None
    wanted = {"type": "int", "symmetric": True, "strategy": "group"}
    group, groups = _group(s), q.get("config_groups")
    odd = [f"{k} {group.get(k)!r}" for k, v in wanted.items() if group.get(k) != v]
    odd += [f"num_bits {group.get('num_bits')!r}"] if group.get("num_bits") not in (4, 8) else []
    odd += [] if _size(group.get("group_size")) else [f"group_size {group.get('group_size')!r}"]
    odd += [f"format {q.get('format')!r}"] if q.get("format") != "pack-quantized" else []
    odd += [f"{len(groups)} config_groups"] if isinstance(groups, Mapping) and len(groups) > 1 else []
    return listed(odd, 4) if odd else None


def _size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _packed_incomplete(s: Subject) -> str | None:
    parts = ("weight_scale", "weight_shape")
    lost = [f"{n.removesuffix('weight')}{p}" for n in s.packed for p in parts if p not in s.weights[n]]
    return f"{len(lost):,} absent: {listed(lost)}" if lost else None


def _packed_shape(s: Subject) -> str | None:
    """[out, in * bits / 32] int32, for the shape that the config makes."""
    bits: Any = _group(s).get("num_bits")
    wrong = []
    if not _size(bits):
        return None
    for name in s.packed:
        packed, shape = s.weights[name]["weight_packed"], s.expected.get(name)
        if shape is None or len(shape) != 2:
            continue
        wanted = (shape[0], math.ceil(shape[1] * bits / 32))
        if packed.shape != wanted or packed.dtype != torch.int32:
            wrong.append(f"{name}_packed {list(packed.shape)} {packed.dtype}, not {list(wanted)} torch.int32")
    return f"{len(wrong):,}: {listed(wrong, 2)}" if wrong else None


def _packed_scale_shape(s: Subject) -> str | None:
    group: Any = _group(s).get("group_size")
    wrong = []
    if not _size(group):
        return None
    for name in s.packed:
        scale, shape = s.weights[name].get("weight_scale"), s.expected.get(name)
        if scale is None or shape is None or len(shape) != 2:
            continue
        if scale.shape != (wanted := (shape[0], math.ceil(shape[1] / group))):
            wrong.append(f"{name}_scale {list(scale.shape)}, not {list(wanted)}")
    return f"{len(wrong):,}: {listed(wrong, 2)}" if wrong else None


def _packed_plain(s: Subject) -> str | None:
    wrong = [name for name in s.packed if _PLAIN_PACKED.search(name)]
    return f"{len(wrong):,}: {listed(wrong)}" if wrong else None


def _ignored(s: Subject) -> Callable[[str], bool]:
    """Whether a module is on the ignore list, which holds names and `re:` patterns."""
    entries = [str(item) for item in s.quantization.get("ignore") or []]
    exact = {item for item in entries if not item.startswith("re:")}
    patterns = []
    for item in entries:
        if item.startswith("re:"):
            try:
                patterns.append(re.compile(item[3:]))
            except re.error:
                patterns.append(re.compile(fnmatch.translate(item[3:])))
    return lambda module: module in exact or any(p.match(module) for p in patterns)


def _both_ways(s: Subject) -> tuple[list[str], list[str]]:
    """Modules that are packed and ignored, and projections that are plain and not ignored."""
    ignored = _ignored(s)
    packed = [n.removesuffix(".weight") for n in s.packed]
    plain = [n.removesuffix(".weight") for n in s.plain if _LINEAR.search(n) and not n.endswith("eh_proj.weight")]
    return [n for n in packed if ignored(n)], [n for n in plain if not ignored(n)]


def _packed_ignored(s: Subject) -> str | None:
    wrong = _both_ways(s)[0] if s.packed else []
    return f"{len(wrong):,} packed, yet on the ignore list: {listed(wrong)}" if wrong else None


def _plain_not_ignored(s: Subject) -> str | None:
    if not s.packed or "Linear" not in _targets(s):
        return None
    wrong = _both_ways(s)[1]
    return f"{len(wrong):,} plain, not on the ignore list: {listed(wrong)}" if wrong else None


def _write_ignore(config: Config, s: Subject) -> None:
    """The list that the stored tensors say, name by name."""
    plain = [n for n in s.plain if len(s.weights[n]["weight"].shape) == 2 and n.endswith(".weight")]
    block = {**s.quantization, "ignore": [n.removesuffix(".weight") for n in plain]}
    config["quantization_config"] = block


def _mixed_experts(s: Subject) -> str | None:
    """transformers stacks a layer's experts: packed ones it expands, plain ones beside them it does not find."""
    packed, plain = ({_EXPERT.sub(r"\1\2", n) for n in names if _EXPERT.match(n)} for names in (s.packed, s.plain))
    mixed = sorted({p.rpartition(".")[0] for p in packed} & {p.rpartition(".")[0] for p in plain})
    return f"experts partly packed, partly plain in {len(mixed)} layers: {listed(mixed)}" if mixed else None


_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+(\.\w+)\.weight$")


def _table(name: str) -> Callable[[Subject], str | None]:
    def check(s: Subject) -> str | None:
        found = [n for n in s.packed if n == name]
        return f"{listed(found)} is packed" if found else None

    return check


def _tied_table(s: Subject) -> str | None:
    return "model.embed_tokens is packed and tied" if s.tied and "model.embed_tokens.weight" in s.packed else None


RULES = (
    Rule("quantization-stale", "error", BUILDERS,
         "quantization_config was left over plain weights: engines build quantised layers", "remove the block",
         "whole", _stale, _drop_config),
    Rule("fp8-unsaid", "error", ("transformers", "vLLM", "SGLang", "llama.cpp"),
         "FP8 tensors without an fp8 quantization_config: scales are ignored", "write the block", "whole",
         _fp8_unsaid, _say_fp8),
    Rule("fp8-scale-missing", "error", ENGINES, "an FP8 tensor without its scales",
         "copy the missing shard; quantise again", "headers", _scale_missing),
    Rule("scale-orphan", "error", OTHERS, "scales whose tensor is not quantised",
         "remove them, or restore the quantised tensor", "headers", _scale_orphan),
    Rule("fp8-scale-grid", "error", ENGINES, "scales are not one for each block of 128 x 128", "quantise again",
         "headers", _grid),
    Rule("fp8-scale-dtype", "warning", ENGINES, "scales are not fp32", "convert them to fp32", "headers",
         _scale_dtype),
    Rule("scales-not-finite", "error", ENGINES, "scales are NaN or infinite",
         "the checkpoint is damaged: quantise again", "headers", _bad_scales(lambda v: ~torch.isfinite(v))),
    Rule("scales-not-positive", "error", ENGINES, "scales are zero or negative",
         "the checkpoint is damaged: quantise again", "headers", _bad_scales(lambda v: v <= 0)),
    Rule("fp8-plain-only", "error", BUILDERS,
         "router, norm, embedding, head or eh_proj in FP8: engines expect them plain", "store them in bf16",
         "headers", _fp8_plain),
    Rule("fp8-block-size", "error", LOADERS, "weight_block_size is not [128, 128]",
         "--fix writes [128, 128] where the scales are of that size; else quantise again", "whole", _block_size,
         _write_block_size),
    Rule("fp8-ue8m0", "error", GPU, "scale_fmt ue8m0 promises powers of two, and scales are none: they get rounded",
         "remove scale_fmt, or quantise with such scales", "headers", _ue8m0, _drop_scale_fmt),
    Rule("fp8-ragged", "warning", ("transformers",),
         "sides that are no multiple of 128 (V3's own 576 too): dequantising raises, or is wrong in silence",
         "convert to bf16 for transformers", "headers", _ragged),
    Rule("fp8-widths", "warning", GPU,
         "merged matrices must be multiples of 128 for FP8 blocks: loading or splitting fails",
         "serve bf16, or train with multiples of 128", "whole", _widths),
    Rule("packed-unsaid", "error", ENGINES, "packed integers without a compressed-tensors quantization_config",
         "restore the block", "whole", _packed_unsaid),
    Rule("packed-config", "error", ("rorqual",),
         "not the one compressed-tensors form that is read (symmetric int4/int8 groups)",
         "convert to bf16 with the tool that wrote it", "whole", _packed_config),
    Rule("packed-incomplete", "error", ENGINES, "packed tensors without scale or shape (rorqual needs no shape)",
         "copy the missing shard", "headers", _packed_incomplete),
    Rule("packed-shape", "error", ENGINES, "packed tensors are not [out, in * bits / 32] of int32", "quantise again",
         "whole", _packed_shape),
    Rule("packed-scale-shape", "error", ENGINES, "scales are not [out, in / group]", "quantise again", "whole",
         _packed_scale_shape),
    Rule("packed-plain-only", "error", BUILDERS, "router, norm or eh_proj packed: engines expect them plain",
         "store them in bf16", "headers", _packed_plain),
    Rule("packed-ignored", "error", BUILDERS, "packed modules stand on the ignore list", "take them off", "whole",
         _packed_ignored, _write_ignore),
    Rule("plain-not-ignored", "error", BUILDERS, "plain modules are missing from the ignore list", "put them on",
         "whole", _plain_not_ignored, _write_ignore),
    Rule("experts-mixed", "warning", ("transformers",),
         "transformers 5.23 leaves the plain ones among packed experts freshly initialised: wrong logits",
         "choose an expert width that is a multiple of 32, or keep the experts plain", "headers", _mixed_experts),
    Rule("embedding-packed", "warning", ("transformers", "SGLang"),
         "a packed embedding: transformers 5.23 raises, SGLang serves zeros in silence, vLLM reads it since June 2026",
         "store it plain for these", "headers", _table("model.embed_tokens.weight")),
    Rule("embedding-packed-tied", "warning", BUILDERS,
         "a packed embedding that is the head too: no released loader does that",
         "store a head of its own, or the embedding plain", "headers", _tied_table),
    Rule("head-packed", "warning", GPU,
         "a packed head: releases before March 2026 (vLLM) and summer 2026 (SGLang) do not load it",
         "store it plain for these", "headers", _table("lm_head.weight")),
)  # fmt: skip
