"""Lint rules about files and tensors: is everything there, once, in the shape the config makes it, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from rorqual.checkpoint.demo import DEMO_FILE
from rorqual.checkpoint.lint_subject import (
    COPIES,
    ENGINES,
    LEFTOVERS,
    Config,
    Rule,
    Subject,
    expected,
    listed,
)
from rorqual.checkpoint.shards import DTYPES, INDEX

BIAS = "mlp.gate.e_score_correction_bias"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LOADERS = ("transformers", "vLLM", "SGLang", "llama.cpp")
OTHERS = ("vLLM", "SGLang", "llama.cpp", "rorqual")
_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")


def _problem(rule: str) -> Callable[[Subject], str | None]:
    return lambda s: s.problem(rule)


# ---- files --------------------------------------------------------------------------------------------------------


def _weights_missing(s: Subject) -> str | None:
    if s.files or s.index is not None:
        return None
    return "no *.safetensors file" + (f", only pickles: {listed(_pickles(s))}" if _pickles(s) else "")


def _pickles(s: Subject) -> list[str]:
    skip = ("training_args.bin", "optimizer.pt", "scheduler.pt")
    return sorted(p.name for pattern in PICKLES for p in s.directory.glob(pattern) if p.name not in skip)


def _pickles_beside(s: Subject) -> str | None:
    return listed(_pickles(s)) if s.files and _pickles(s) else None


def _index_missing(s: Subject) -> str | None:
    if s.index is not None or s.problems.get("index-damaged") or s.demo or not s.files:
        return None
    return None if s.files == ("model.safetensors",) else f"{listed(s.files)} without {INDEX}"


def _unused_files(s: Subject) -> str | None:
    if s.index is None or s.demo:
        return None
    unused = sorted(set(s.files) - set(s.index.values()))
    return f"{listed(unused)}: not named by {INDEX}" if unused else None


def _not_in_index(s: Subject) -> str | None:
    if s.index is None:
        return None
    lost = [f"{name} ({s.where[name]})" for name in s.entries if name not in s.index]
    return f"{len(lost):,} stored, not in {INDEX}: {listed(lost)}" if lost else None


def _not_in_shard(s: Subject) -> str | None:
    if s.index is None:
        return None
    lost = [f"{n} ({f})" for n, f in s.index.items() if s.where.get(n) != f]
    return f"{len(lost):,} in {INDEX}, not in the shard it names: {listed(lost)}" if lost else None


def _total_size(s: Subject) -> str | None:
    if s.index is None or s.total_size is None:
        return None
    total = sum(entry.nbytes for entry in s.entries.values())
    return None if s.total_size == total else f"total_size {s.total_size!r}, the tensors have {total:,} bytes"


def _demo(s: Subject) -> str | None:
    ranks = [name for name in s.files if DEMO_FILE.fullmatch(name)]
    return (listed(ranks) or "config.json has dim and n_layers") if s.demo else None


# ---- what is there ------------------------------------------------------------------------------------------------


def _absent(s: Subject) -> Iterator[str]:
    """Expected weights that are not stored in any form."""
    return (name for name in s.expected if name not in s.weights)


def _inside(name: str) -> tuple[int | None, str]:
    """(layer, name inside the layer) of a released name."""
    found = re.match(r"model\.layers\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _layers_missing(s: Subject) -> str | None:
    lost = [i for i in range(s.size().num_hidden_layers) if i not in s.by_layer]
    return (
        f"{len(lost)} of {s.size().num_hidden_layers} layers have no tensor: {listed(map(str, lost))}" if lost else None
    )


def _layers_surplus(s: Subject) -> str | None:
    more = _surplus_layers(s)
    if not more:
        return None
    return f"num_hidden_layers is {s.size().num_hidden_layers}, but layers {listed(map(str, sorted(more)))} are stored"


def _surplus_layers(s: Subject) -> set[int]:
    """Stored layers that are neither the model's nor anything of an MTP module."""
    z = s.size()
    promised = range(z.num_hidden_layers, z.num_hidden_layers + z.num_nextn_predict_layers)
    return {i for i in s.by_layer if i >= z.num_hidden_layers and i not in promised and i not in s.mtp_layers}


def _experts(s: Subject) -> tuple[list[str], list[str]]:
    """Routed experts that are wholly absent, and those beyond n_routed_experts."""
    z, absent, surplus = s.size(), [], []
    for layer, names in sorted(s.by_layer.items()):
        found = {int(m[1]) for name in names if (m := _EXPERT.match(name))}
        if layer >= z.first_k_dense_replace and (found or layer < z.num_hidden_layers):
            absent += [f"layer {layer} expert {e}" for e in range(z.n_routed_experts) if e not in found]
            surplus += [f"layer {layer} expert {e}" for e in sorted(found) if e >= z.n_routed_experts]
    return absent, surplus


def _experts_missing(s: Subject) -> str | None:
    absent, _ = _experts(s)
    return (
        f"{len(absent):,} of n_routed_experts {s.size().n_routed_experts} absent: {listed(absent)}" if absent else None
    )


def _experts_surplus(s: Subject) -> str | None:
    _, surplus = _experts(s)
    return (
        f"{len(surplus):,} beyond n_routed_experts {s.size().n_routed_experts}: {listed(surplus)}" if surplus else None
    )


def _bias_missing(s: Subject) -> str | None:
    layers = [
        i for name in _absent(s) if (i := _inside(name)[0]) is not None and name.endswith(BIAS) and i in s.by_layer
    ]
    layers = [i for i in layers if i < s.size().num_hidden_layers]
    return f"{len(layers)} layers lack {BIAS}: {listed(map(str, layers))}" if layers else None


def _lost(s: Subject, counts: Callable[[int | None, str], bool]) -> str | None:
    """Absent tensors that count, those of experts that are gone altogether aside."""
    gone = {(layer, e) for text in _experts(s)[0] for layer, e in [_numbers(text)]}
    lost = []
    for name in _absent(s):
        layer, inside = _inside(name)
        expert = _EXPERT.match(inside)
        if counts(layer, inside) and not (expert and (layer, int(expert[1])) in gone) and name != "lm_head.weight":
            lost.append(name)
    return f"{len(lost):,} absent: {listed(lost)}" if lost else None


def _tensors_missing(s: Subject) -> str | None:
    """What no finer rule tells."""
    layers = s.size().num_hidden_layers
    return _lost(s, lambda i, inside: i is None or (i in s.by_layer and i < layers and inside != BIAS))


def _numbers(text: str) -> tuple[int, int]:
    first, second = map(int, re.findall(r"\d+", text))
    return first, second


def _mtp_missing(s: Subject) -> str | None:
    z = s.size()
    lost = [
        i for i in range(z.num_hidden_layers, z.num_hidden_layers + z.num_nextn_predict_layers) if i not in s.by_layer
    ]
    if not lost:
        return None
    return f"num_nextn_predict_layers is {z.num_nextn_predict_layers}, but layer {listed(map(str, lost))} is not stored"


def _mtp_unpromised(s: Subject) -> str | None:
    z = s.size()
    more = [i for i in s.mtp_layers if i >= z.num_hidden_layers + z.num_nextn_predict_layers]
    if not more:
        return None
    return f"layer {listed(map(str, more))} is an MTP module, num_nextn_predict_layers is {z.num_nextn_predict_layers}"


def _count_mtp(config: Config, s: Subject) -> None:
    """As many as follow the layers without a gap."""
    first, count = s.size().num_hidden_layers, 0
    while first + count in s.by_layer and first + count in s.mtp_layers:
        count += 1
    config["num_nextn_predict_layers"] = count


def _mtp_incomplete(s: Subject) -> str | None:
    layers = s.size().num_hidden_layers
    return _lost(s, lambda i, _: i is not None and i >= layers and i in s.by_layer)


def _mtp_depth(s: Subject) -> str | None:
    layers = s.size().num_hidden_layers
    return f"the MTP module is layer {s.mtp_layers[0]}, not 61" if s.mtp_layers and layers != 61 else None


def _mtp_several(s: Subject) -> str | None:
    count = s.size().num_nextn_predict_layers
    return f"num_nextn_predict_layers is {count}" if count > 1 else None


def _mtp_q_null(s: Subject) -> str | None:
    z = s.size()
    return (
        "MTP with q_lora_rank null" if z.q_lora_rank is None and z.num_nextn_predict_layers and s.mtp_layers else None
    )


# ---- head and embedding -------------------------------------------------------------------------------------------


def _head_missing(s: Subject) -> str | None:
    return "lm_head.weight is absent, tie_word_embeddings is not true" if "lm_head.weight" in _absent(s) else None


def _tie(config: Config, s: Subject) -> None:
    """Only where nothing is said: with false there, the head was lost, and tying would hide it."""
    config.setdefault("tie_word_embeddings", True)


def _head_beside_tie(s: Subject, same: bool) -> str | None:
    head, table = (s.entries.get(f"{n}.weight") for n in ("lm_head", "model.embed_tokens"))
    if not s.tied or head is None or table is None or (head.shape == table.shape) != same:
        return None
    return f"tie_word_embeddings is true, lm_head {list(head.shape)} is stored beside embed_tokens {list(table.shape)}"


def _tied_without_head(s: Subject) -> str | None:
    if not s.tied or "lm_head.weight" in s.weights:
        return None
    return "tie_word_embeddings is true and lm_head.weight is not stored"


# ---- shapes, dtypes, strangers ------------------------------------------------------------------------------------


def _shapes(s: Subject) -> str | None:
    wrong = []
    for name, shape in (*s.expected.items(), *_copies(s)):
        entry = s.weights.get(name, {}).get("weight")
        if entry is not None and entry.shape != shape:
            wrong.append(f"{name} {list(entry.shape)}, the config makes it {list(shape)}")
    return f"{len(wrong):,}: {listed(wrong, 2)}" if wrong else None


def _copies(s: Subject) -> Iterable[tuple[str, tuple[int, ...]]]:
    z = s.size()
    return [(f"model.layers.{i}.{name}", (z.vocab_size, z.hidden_size)) for i in s.mtp_layers for name in COPIES]


def _unknown(s: Subject) -> str | None:
    """What is stored and has no place, and is not told by a finer rule."""
    z, surplus = s.size(), _surplus_layers(s)
    deepest = max([z.num_hidden_layers - 1 + z.num_nextn_predict_layers, *s.mtp_layers])
    promised = z.num_nextn_predict_layers
    places = set(s.expected) | {name for name, _ in _copies(s)} | ({"lm_head.weight"} if s.tied else set())
    if deepest >= z.num_hidden_layers + promised:
        places |= {n for n, _ in expected(z._replace(num_nextn_predict_layers=deepest + 1 - z.num_hidden_layers), True)}
    strange = []
    for name in s.weights:
        layer, inside = _inside(name)
        expert = _EXPERT.match(inside)
        told = layer in surplus or (expert and int(expert[1]) >= z.n_routed_experts) or LEFTOVERS.search(name)
        if name not in places and not told:
            strange.append(name)
    return f"{len(strange):,} have no place: {listed(strange)}" if strange else None


def _leftovers(s: Subject) -> str | None:
    found = [name for name in s.entries if LEFTOVERS.search(name)]
    return f"{len(found):,}: {listed(found)}" if found else None


def _stored_dtype(s: Subject) -> torch.dtype | None:
    """What most plain matrices are stored in."""
    seen = Counter(s.weights[n]["weight"].dtype for n in s.plain if len(s.weights[n]["weight"].shape) == 2)
    return next((dtype for dtype, _ in seen.most_common() if dtype in _NAMES.values()), None)


def _dtype(s: Subject) -> str | None:
    said = {k: v for k in ("torch_dtype", "dtype") if (v := s.raw.get(k)) is not None}
    stored = _stored_dtype(s)
    wrong = [f"{k} {v!r}" for k, v in said.items() if _NAMES.get(str(v).removeprefix("torch.")) != stored]
    return f"{listed(wrong)}, the matrices are {stored}" if wrong and stored is not None else None


def _write_dtype(config: Config, s: Subject) -> None:
    if (stored := _stored_dtype(s)) is not None:
        for key in ("torch_dtype", "dtype"):
            if config.get(key) is not None:
                config[key] = str(stored).removeprefix("torch.")


def _bias_dtype(s: Subject) -> str | None:
    low = [n for n, e in s.entries.items() if n.endswith(BIAS) and e.dtype != torch.float32]
    return f"{len(low)} stored in {s.entries[low[0]].dtype}: {listed(low)}" if low else None


def _integers(s: Subject) -> str | None:
    odd = [n for n in s.expected if (e := s.weights.get(n, {}).get("weight")) and e.dtype not in _FLOATS]
    shown = (f"{name} {s.weights[name]['weight'].dtype}" for name in odd)
    return f"{len(odd):,}: {listed(shown)}" if odd else None


_FLOATS = {dtype for name, dtype in DTYPES.items() if name in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")}

RULES = (
    Rule("weights-missing", "error", ENGINES, "no safetensors weights", "copy the weights; convert pickles elsewhere",
         "nothing", _weights_missing),
    Rule("shard-damaged", "error", ENGINES, "a shard is truncated, damaged or no safetensors file",
         "copy the shard again", "nothing", _problem("shard-damaged")),
    Rule("shard-missing", "error", ENGINES, "the index names a shard that is not there", "copy the missing shard",
         "nothing", _problem("shard-missing")),
    Rule("shared-bytes", "error", ENGINES, "two tensors of a shard share bytes", "write the shard again", "nothing",
         _problem("shared-bytes")),
    Rule("index-damaged", "error", ENGINES, "the index cannot be read", "copy the index again", "nothing",
         _problem("index-damaged")),
    Rule("index-missing", "error", LOADERS, "several shards, or one under another name, and no index",
         "write the index (save the model again), or name the one file model.safetensors", "nothing", _index_missing),
    Rule("tensor-twice", "error", ENGINES, "a tensor stands in two shards: which one counts depends on the reader",
         "remove one of them", "nothing", _problem("tensor-twice")),
    Rule("files-unused", "note", ENGINES, "safetensors files that the index does not name",
         "remove them if nothing needs them", "nothing", _unused_files),
    Rule("pickles-beside", "note", ENGINES, "pickled weights beside the safetensors: opening them can run anything",
         "remove them", "nothing", _pickles_beside),
    Rule("demo-naming", "note", LOADERS, "names of DeepSeek's own inference code, which only rorqual reads",
         "`rorqual convert` writes the released form", "nothing", _demo),
    Rule("index-lacks-tensor", "error", ("llama.cpp", "rorqual"),
         "tensors that the index does not list: strict readers stop", "write the index again", "headers",
         _not_in_index),
    Rule("shard-lacks-tensor", "error", ("llama.cpp", "rorqual"), "the index places tensors where they are not",
         "write the index again", "headers", _not_in_shard),
    Rule("total-size", "note", ENGINES, "total_size of the index is not the sum of the tensors",
         "write the index again", "headers", _total_size),
    Rule("layers-missing", "error", ENGINES, "whole layers are absent",
         "copy the missing shards, or correct num_hidden_layers", "whole", _layers_missing),
    Rule("layers-surplus", "error", ENGINES, "more layers are stored than the config has",
         "correct num_hidden_layers", "whole", _layers_surplus),
    Rule("experts-missing", "error", ENGINES, "routed experts are absent",
         "copy the missing shards, or correct n_routed_experts", "whole", _experts_missing),
    Rule("experts-surplus", "error", ENGINES, "more experts are stored than the config has",
         "correct n_routed_experts", "whole", _experts_surplus),
    Rule("correction-bias-missing", "error", ENGINES, "the router's correction bias is absent",
         "write zeros if it was trained without; else the checkpoint is damaged", "whole", _bias_missing),
    Rule("tensors-missing", "error", ENGINES, "weights are absent", "copy the missing shards, or correct the config",
         "whole", _tensors_missing),
    Rule("mtp-missing", "error", ("vLLM", "SGLang", "llama.cpp"),
         "MTP modules are promised and absent: drafting fails",
         "write the number that is stored (transformers writes 1 whatever it saved)", "whole", _mtp_missing,
         _count_mtp),
    Rule("mtp-unpromised", "error", ("vLLM", "SGLang"),
         "MTP weights are stored and not promised: loaders meet unknown names", "write num_nextn_predict_layers",
         "whole", _mtp_unpromised, _count_mtp),
    Rule("mtp-incomplete", "error", OTHERS, "an MTP module lacks weights", "copy the missing shards", "whole",
         _mtp_incomplete),
    Rule("mtp-depth", "warning", ("transformers",), "an MTP module not at layer 61: use_mtp looks for that number",
         "nothing in the checkpoint; without use_mtp it loads with a warning", "whole", _mtp_depth),
    Rule("mtp-several", "warning", ("SGLang",), "several MTP modules: SGLang drafts with exactly one",
         "serve without drafting, or store one", "whole", _mtp_several),
    Rule("mtp-q-lora-null", "warning", ("llama.cpp",), "MTP without q_lora_rank: llama.cpp's MTP loader wants it",
         "train with q_lora_rank, or drop MTP when converting", "whole", _mtp_q_null),
    Rule("head-missing", "error", ENGINES, "no lm_head, and embeddings are not tied",
         "write tie_word_embeddings true if it was tied", "whole", _head_missing, _tie),
    Rule("tied-head-stored", "warning", ENGINES, "tied, yet lm_head is stored too: some readers use it, some do not",
         "remove lm_head, or write tie_word_embeddings false (what vLLM and SGLang compute)", "whole",
         lambda s: _head_beside_tie(s, True)),
    Rule("tied-head-shape", "error", ENGINES, "tied, yet lm_head of another shape is stored",
         "write tie_word_embeddings false", "whole", lambda s: _head_beside_tie(s, False)),
    Rule("tied-without-head", "warning", ("vLLM", "SGLang"),
         "tied embeddings: their DeepSeek class never ties, so the head stays unset (vLLM refuses, SGLang does not notice)",
         "`rorqual convert --untie` stores the head a second time and writes tie_word_embeddings false", "whole",
         _tied_without_head),
    Rule("tensor-shape", "error", ENGINES, "shapes differ from what the config makes them",
         "correct the config, or copy the weights", "whole", _shapes),
    Rule("tensors-unknown", "error", OTHERS, "tensors that have no place: loaders stop at them",
         "remove them, or correct the config", "whole", _unknown),
    Rule("tensors-leftover", "note", ENGINES,
         "rotary tables of old exports: every loader skips them", "remove them", "headers",
         _leftovers),
    Rule("torch-dtype", "warning", ("transformers", "vLLM", "SGLang"),
         "torch_dtype is not what is stored: weights are cast", "write the stored dtype", "whole", _dtype,
         _write_dtype),
    Rule("weight-dtype", "error", ENGINES, "weights in a dtype that no loader computes with", "convert them to bf16",
         "whole", _integers),
    Rule("correction-bias-dtype", "warning", ENGINES,
         "the correction bias lost precision: experts near a tie are chosen otherwise",
         "store it in fp32 from the training state", "headers", _bias_dtype),
)  # fmt: skip
