"""Checkpoints that are broken on purpose, one for each rule of `rorqual lint`, from one tiny model.

    python -m tests.broken --write docs/lint.md     # the table of rules, and what lint says about a few of these
    python -m tests.broken --out DIR                # the broken directories themselves

A breaker starts from a sound directory (`BASES`), changes what its rule is about, and nothing else. Where a fault
cannot come alone, `COMPANIONS` says what comes with it and why.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint import save_model
from rorqual.checkpoint.lint import RULES
from rorqual.checkpoint.shards import INDEX, Planned, Shard, find_shards, write_index, write_shard
from rorqual.config import ModelConfig
from rorqual.data.tokenizer import train_tokenizer
from rorqual.ops.fp8 import Fp8Blocks
from rorqual.ops.packed import PackedIntegers
from tests.parity import YARN, build

Tensors = dict[str, Tensor]
DROP = object()
"""In a change of config.json: take the key away."""
LAYER = "model.layers.1."
EXPERT = f"{LAYER}mlp.experts.0.up_proj."
WORDS = "the whale swims under ice and takes in a whole sea of krill keeps what feeds it sings dives far"
SOUND = ModelConfig(
    vocab_size=320, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=512,
    qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, intermediate_size=128, moe_intermediate_size=128,
    n_routed_experts=8, num_experts_per_tok=2, rope_scaling=YARN, max_position_embeddings=2560, pad_token_id=2,
)  # fmt: skip

# Companions: rule -> what fires with it, and why it must.
COMPANIONS: dict[str, dict[str, str]] = {
    "dense-layers-beyond": {
        "tensors-missing": "layers that now count as dense lack dense weights",
        "tensors-unknown": "and their experts have no place",
    },
    "embedding-packed-tied": {
        "embedding-packed": "the same embedding",
        "tied-without-head": "a tied model stores no head",
    },
    "mtp-several": {"mtp-depth": "modules at layers 3 and 4"},
    "mtp-q-lora-null": {"mtp-depth": "the module at layer 3"},
    "fp8-widths": {"fp8-ragged": "a width that is no multiple of 128 is ragged too"},
}


# ---- sound directories --------------------------------------------------------------------------------------------


def _model(folder: Path, name: str, **changes: Any) -> Path:
    directory = folder / name
    save_model(build(SOUND.replace(**changes), 3), directory, dtype=torch.bfloat16)
    _tokenizer().save(directory)
    return directory


@functools.cache
def _tokenizer() -> Any:
    words = WORDS.split()
    text = " ".join(words[(i * i + 3 * i) % len(words)] for i in range(3000))
    return train_tokenizer([text, " ".join(sorted(words))], SOUND.vocab_size)


def _fp8(folder: Path, name: str, **changes: Any) -> Path:
    directory = _model(folder, name, **changes)
    form = Fp8Blocks()

    def quantise(tensors: Tensors) -> None:
        for weight in [n for n in tensors if n.endswith(("_proj.weight", "_mqa.weight")) and "eh_proj" not in n]:
            parts = form.pack(tensors.pop(weight))
            tensors.update({f"{weight.removesuffix('weight')}{part}": value for part, value in parts.items()})

    _tensors(directory, quantise)
    _config(directory, quantization_config=form.describe([]))
    return directory


def _int4(folder: Path, name: str, also: tuple[str, ...] = (), **changes: Any) -> Path:
    directory = _model(folder, name, **changes)
    form = PackedIntegers(4)
    plain: list[str] = []

    def quantise(tensors: Tensors) -> None:
        for weight in [n for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]:
            module = weight.removesuffix(".weight")
            linear = weight.endswith(("_proj.weight", "_mqa.weight")) and tensors[weight].shape[-1] % 32 == 0
            if not linear and module not in also:
                plain.append(module)
                continue
            value = tensors.pop(weight)
            parts = form.pack(value) | {"weight_shape": torch.tensor(value.shape, dtype=torch.int64)}
            tensors.update({f"{module}.{part}": part_value for part, part_value in parts.items()})

    _tensors(directory, quantise)
    _config(directory, quantization_config=form.describe(plain))
    return directory


BASES: dict[str, Callable[[Path, str], Path]] = {
    "sound": _model,
    "two-shards": lambda folder, name: _two_shards(folder, name),
    "mtp": functools.partial(_model, num_nextn_predict_layers=1),
    "mtp-two": functools.partial(_model, num_nextn_predict_layers=2),
    "mtp-null": functools.partial(_model, num_nextn_predict_layers=1, q_lora_rank=None),
    "tied": functools.partial(_model, tie_word_embeddings=True),
    "dense": functools.partial(_model, first_k_dense_replace=3),
    "many-experts": functools.partial(_model, n_routed_experts=40),
    "narrow-latent": functools.partial(_model, kv_lora_rank=256),
    "odd-heads": functools.partial(_model, v_head_dim=60),
    "fp8": _fp8,
    "fp8-narrow": functools.partial(_fp8, moe_intermediate_size=64),
    "int4": _int4,
    "int4-embedding": functools.partial(_int4, also=("model.embed_tokens",)),
    "int4-tied": functools.partial(_int4, also=("model.embed_tokens",), tie_word_embeddings=True),
    "int4-head": functools.partial(_int4, also=("lm_head",)),
    "int4-odd": functools.partial(_int4, moe_intermediate_size=48),
}


def _two_shards(folder: Path, name: str) -> Path:
    directory = folder / name
    save_model(build(SOUND, 3), directory, dtype=torch.bfloat16, max_shard_bytes=1_500_000)
    _tokenizer().save(directory)
    return directory


# ---- ways to break ------------------------------------------------------------------------------------------------


def _json(directory: Path, file: str, **changes: Any) -> None:
    path = directory / file
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is DROP:
            content.pop(key, None)
        else:
            content[key] = value
    path.unlink()
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _config(directory: Path, **changes: Any) -> None:
    _json(directory, "config.json", **changes)


def _tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a directory; what is left is written as one shard with its index."""
    files = find_shards(directory)
    tensors = {name: Shard(file).tensor(name).clone() for name, file in files.items()}
    change(tensors)
    for file in set(files.values()):
        file.unlink()
    (directory / INDEX).unlink()
    _write(directory, "model.safetensors", tensors)


def _write(directory: Path, file: str, tensors: Tensors, index: bool = True) -> None:
    planned = sorted((Planned(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()), key=lambda p: -p.dtype.itemsize)
    write_shard(directory / file, planned, ((p.name, tensors[p.name]) for p in planned))
    if index:
        write_index(directory, {file: planned})


def _set(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Replace one tensor by a function of it."""

    def apply(directory: Path) -> None:
        _tensors(directory, lambda tensors: tensors.update({name: value(tensors[name])}))

    return apply


def _add(**new: Tensor) -> Callable[[Path], None]:
    return lambda directory: _tensors(directory, lambda tensors: tensors.update(new))


def _lose(*endings: str) -> Callable[[Path], None]:
    """Delete the tensors whose names end, or contain, so."""

    def apply(directory: Path) -> None:
        def change(tensors: Tensors) -> None:
            for name in [n for n in tensors if any(e in n for e in endings)]:
                del tensors[name]

        _tensors(directory, change)

    return apply


def _keys(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: _config(directory, **changes)


def _rope(**changes: Any) -> Callable[[Path], None]:
    """Both forms alike, each key changed or dropped."""

    def apply(directory: Path) -> None:
        new = {k: v for k, v in {**YARN, **changes}.items() if v is not DROP}
        theirs = {k: v for k, v in new.items() if k != "type"}
        _config(
            directory, rope_scaling=new, rope_parameters={"rope_type": new["type"], "rope_theta": 10000.0, **theirs}
        )

    return apply


def _quant(**changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        _config(directory, quantization_config={**raw["quantization_config"], **changes})

    return apply


def _remove(*patterns: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for pattern in patterns:
            for path in sorted(directory.glob(pattern)):
                path.unlink()

    return apply


def _text(file: str, text: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / file).unlink(missing_ok=True)
        (directory / file).write_text(text, encoding="utf-8")

    return apply


def _truncated(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-4096])


def _shared_bytes(directory: Path) -> None:
    shard = directory / "model.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    places = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"
    header[places[0]]["data_offsets"] = header[places[1]]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    shard.unlink()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _twice(directory: Path) -> None:
    norm = "model.norm.weight"
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    tensors = {n: Shard(second).tensor(n).clone() for n in Shard(second).entries}
    name = next(n for n in Shard(first).entries if n not in tensors and n != norm)
    tensors[name] = Shard(first).tensor(name).clone()
    second.unlink()
    _write(directory, second.name, tensors, index=False)
    raw = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    del raw["metadata"]["total_size"]
    _text(INDEX, json.dumps(raw))(directory)


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        raw = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        change(raw)
        _text(INDEX, json.dumps(raw))(directory)

    return apply


def _demo(directory: Path) -> None:
    _remove("*.safetensors", INDEX)(directory)
    _write(directory, "model0-mp1.safetensors", {"layers.0.attn.wq_a.weight": torch.zeros(4, 4)}, index=False)


def _extra_expert(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{LAYER}mlp.experts.0.")]:
            tensors[name.replace("experts.0.", "experts.8.")] = tensors[name].clone()

    _tensors(directory, change)


def _tied_of_other_shape(directory: Path) -> None:
    _set("lm_head.weight", lambda t: t[:-4].clone())(directory)
    _config(directory, tie_word_embeddings=True)


def _fp8_router(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = f"{LAYER}mlp.gate.weight"
        parts = Fp8Blocks().pack(tensors.pop(name))
        tensors.update({f"{LAYER}mlp.gate.{part}": value for part, value in parts.items()})

    _tensors(directory, change)


def _packed_router(directory: Path) -> None:
    def change(tensors: Tensors) -> None:
        value = tensors.pop(f"{LAYER}mlp.gate.weight")
        parts = PackedIntegers(4).pack(value) | {"weight_shape": torch.tensor(value.shape)}
        tensors.update({f"{LAYER}mlp.gate.{part}": part_value for part, part_value in parts.items()})

    _tensors(directory, change)
    _ignore(lambda names: [n for n in names if n != f"{LAYER}mlp.gate"])(directory)


def _ignore(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        _quant(ignore=change(raw["quantization_config"]["ignore"]))(directory)

    return apply


def _fewer_tokens(directory: Path) -> None:
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    del spec["model"]["vocab"][last]
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "".join(m).replace(" ", "") != last]
    _text("tokenizer.json", json.dumps(spec))(directory)


def _more_tokens(directory: Path) -> None:
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": SOUND.vocab_size, "content": "<|one more|>"})
    _text("tokenizer.json", json.dumps(spec))(directory)


def _tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: _json(directory, "tokenizer_config.json", **changes)


def _nothing(directory: Path) -> None:
    """The base is what the rule is about."""


_SCALE = f"{EXPERT}weight_scale_inv"
BREAKERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config-missing": ("sound", _remove("config.json")),
    "config-not-json": ("sound", _text("config.json", '{"model_type": ')),
    "config-other-architecture": ("sound", _keys(model_type="llama")),
    "config-incomplete": ("sound", _keys(kv_lora_rank=DROP)),
    "config-value": ("sound", _keys(kv_lora_rank="512")),
    "config-defaults": ("sound", _keys(routed_scaling_factor=DROP)),
    "model-type-missing": ("sound", _keys(model_type=DROP)),
    "architectures-wrong": ("sound", _keys(architectures=["DeepseekV2ForCausalLM"])),
    "model-type-kimi": ("sound", _keys(model_type="kimi_k2")),
    "auto-map-left": ("sound", _keys(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})),
    "scoring-func-missing": ("sound", _keys(scoring_func=DROP)),
    "topk-method-missing": ("sound", _keys(topk_method=DROP)),
    "moe-layer-freq-missing": ("sound", _keys(moe_layer_freq=DROP)),
    "architecture-value": ("sound", _keys(scoring_func="softmax")),
    "rope-parameters-only": ("sound", _keys(rope_scaling=DROP, rope_theta=DROP)),
    "rope-scaling-only": ("sound", _keys(rope_parameters=DROP)),
    "rope-contradiction": ("sound", _keys(rope_scaling={**YARN, "beta_fast": 16})),
    "rope-type-unknown": ("sound", _rope(type="linear")),
    "yarn-incomplete": ("sound", _rope(factor=DROP)),
    "yarn-mscale-missing": ("sound", _rope(mscale=DROP, mscale_all_dim=DROP)),
    "positions-beyond-yarn": ("sound", _keys(max_position_embeddings=4096)),
    "positions-below-yarn": ("sound", _keys(max_position_embeddings=1024)),
    "groups-uneven": ("sound", _keys(n_group=3)),
    "group-too-small": ("sound", _keys(n_group=8, topk_group=2)),
    "topk-group-beyond": ("sound", _keys(n_group=2, topk_group=3)),
    "groups-all-kept": ("sound", _keys(n_group=2, topk_group=2)),
    "topk-beyond-groups": ("sound", _keys(n_group=4, topk_group=1, num_experts_per_tok=3)),
    "group-too-large": ("many-experts", _nothing),
    "dense-layers-beyond": ("sound", _keys(first_k_dense_replace=4)),
    "no-moe-layers": ("dense", _nothing),
    "latent-width": ("narrow-latent", _nothing),
    "head-dim-padding": ("odd-heads", _nothing),
    "kv-heads": ("sound", _keys(num_key_value_heads=1)),
    "rms-norm-eps": ("sound", _keys(rms_norm_eps=1e-5)),
    "attention-bias": ("sound", _keys(attention_bias=True)),
    "hidden-act": ("sound", _keys(hidden_act="gelu")),
    "config-refused": ("sound", _keys(attention_dropout=0.1)),
    "weights-missing": ("sound", _remove("*.safetensors", INDEX)),
    "shard-damaged": ("two-shards", _truncated),
    "shard-missing": ("two-shards", _remove("model-00002-*")),
    "shared-bytes": ("sound", _shared_bytes),
    "index-damaged": ("two-shards", _text(INDEX, "{")),
    "index-missing": ("two-shards", _remove(INDEX)),
    "tensor-twice": ("two-shards", _twice),
    "files-unused": ("sound", lambda d: _write(d, "extra.safetensors", {"x": torch.zeros(2)}, index=False)),
    "pickles-beside": ("sound", _text("pytorch_model.bin", "")),
    "demo-naming": ("sound", _demo),
    "index-lacks-tensor": ("sound", _index(lambda raw: raw["weight_map"].pop("model.norm.weight"))),
    "shard-lacks-tensor": ("sound", _index(lambda raw: raw["weight_map"].update({"ghost": "model.safetensors"}))),
    "total-size": ("sound", _index(lambda raw: raw["metadata"].update(total_size=1))),
    "layers-missing": ("sound", _keys(num_hidden_layers=4)),
    "layers-surplus": ("sound", _keys(num_hidden_layers=2)),
    "experts-missing": ("sound", _lose(f"{LAYER}mlp.experts.5.")),
    "experts-surplus": ("sound", _extra_expert),
    "correction-bias-missing": ("sound", _lose("e_score_correction_bias")),
    "tensors-missing": ("sound", _lose(f"{LAYER}self_attn.o_proj.weight")),
    "mtp-missing": ("sound", _keys(num_nextn_predict_layers=1)),
    "mtp-unpromised": ("mtp", _keys(num_nextn_predict_layers=0)),
    "mtp-incomplete": ("mtp", _lose("hnorm.weight")),
    "mtp-depth": ("mtp", _nothing),
    "mtp-several": ("mtp-two", _nothing),
    "mtp-q-lora-null": ("mtp-null", _nothing),
    "head-missing": ("sound", _lose("lm_head.weight")),
    "tied-head-stored": ("sound", _keys(tie_word_embeddings=True)),
    "tied-head-shape": ("sound", _tied_of_other_shape),
    "tied-without-head": ("tied", _nothing),
    "tensor-shape": ("sound", _set(f"{EXPERT}weight", lambda t: t[:-1].clone())),
    "tensors-unknown": ("sound", _add(**{f"{LAYER}self_attn.k_norm.weight": torch.ones(8)})),
    "tensors-leftover": ("sound", _add(**{f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(32)})),
    "torch-dtype": ("sound", _keys(torch_dtype="float32")),
    "weight-dtype": ("sound", _set(f"{EXPERT}weight", lambda t: t.to(torch.int8))),
    "correction-bias-dtype": ("sound", _set(f"{LAYER}mlp.gate.e_score_correction_bias", lambda t: t.bfloat16())),
    "quantization-stale": ("sound", _keys(quantization_config=Fp8Blocks().describe([]))),
    "fp8-unsaid": ("fp8", _keys(quantization_config=DROP)),
    "fp8-scale-missing": ("fp8", _lose(_SCALE)),
    "scale-orphan": ("sound", _add(**{_SCALE: torch.ones(1, 1)})),
    "fp8-scale-grid": ("fp8", _set(_SCALE, lambda t: torch.ones(2, 2))),
    "fp8-scale-dtype": ("fp8", _set(_SCALE, lambda t: t.bfloat16())),
    "scales-not-finite": ("fp8", _set(_SCALE, lambda t: t * torch.inf)),
    "scales-not-positive": ("fp8", _set(_SCALE, lambda t: -t)),
    "fp8-plain-only": ("fp8", _fp8_router),
    "fp8-block-size": ("fp8", _quant(weight_block_size=[64, 64])),
    "fp8-ue8m0": ("fp8", _quant(scale_fmt="ue8m0")),
    "fp8-ragged": ("fp8", _nothing),
    "fp8-widths": ("fp8-narrow", _nothing),
    "packed-unsaid": ("int4", _keys(quantization_config=DROP)),
    "packed-config": ("int4", _quant(format="marlin-24")),
    "packed-incomplete": ("int4", _lose(f"{EXPERT}weight_shape")),
    "packed-shape": ("int4", _set(f"{EXPERT}weight_packed", lambda t: t[:, :-1].clone())),
    "packed-scale-shape": ("int4", _set(f"{EXPERT}weight_scale", lambda t: t[:, :-1].clone())),
    "packed-plain-only": ("int4", _packed_router),
    "packed-ignored": ("int4", _ignore(lambda names: [*names, f"{LAYER}self_attn.o_proj"])),
    "plain-not-ignored": ("int4", _ignore(lambda names: [n for n in names if n != "lm_head"])),
    "experts-mixed": ("int4-odd", _nothing),
    "embedding-packed": ("int4-embedding", _nothing),
    "embedding-packed-tied": ("int4-tied", _nothing),
    "head-packed": ("int4-head", _nothing),
    "tokenizer-missing": ("sound", _remove("tokenizer.json")),
    "tokenizer-damaged": ("sound", _text("tokenizer.json", "{")),
    "tokenizer-config-missing": ("sound", _remove("tokenizer_config.json")),
    "tokenizer-too-large": ("sound", _more_tokens),
    "tokenizer-padded": ("sound", _fewer_tokens),
    "token-id-beyond": ("sound", _keys(pad_token_id=999)),
    "token-ids-contradict": ("sound", _keys(eos_token_id=2)),
    "chat-template-missing": ("sound", _tokenizer_config(chat_template=DROP)),
    "add-bos-missing": ("sound", _tokenizer_config(add_bos_token=DROP)),
    "pre-tokenizer": ("sound", lambda d: _json(d, "tokenizer.json", pre_tokenizer={"type": "ByteLevel"})),
    "tokenizer-own-vocabulary": ("sound", _nothing),
    "generation-config-missing": ("sound", _remove("generation_config.json")),
}


def broken(folder: Path, only: set[str] | None = None) -> dict[str, Path]:
    """Rule id -> a directory under `folder` that is broken so. Sound ones stand beside them, under `sound/`."""
    out = {}
    for rule, (base, breaker) in BREAKERS.items():
        if only is None or rule in only:
            out[rule] = folder / "broken" / rule
            shutil.copytree(sound(folder, base), out[rule], copy_function=os.link)
            breaker(out[rule])
    return out


def sound(folder: Path, base: str) -> Path:
    """A sound directory, made once."""
    directory = folder / "sound" / base
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        BASES[base](directory.parent, base)
    return directory


# ---- the page -----------------------------------------------------------------------------------------------------

SHOWN = ("scoring-func-missing", "quantization-stale", "experts-missing", "scales-not-finite", "groups-all-kept")


def table() -> str:
    """All rules, as they stand in docs/lint.md."""
    rows = ["| rule | severity | affects | what is wrong | fix | `--fix` |", "|---|---|---|---|---|---|"]
    for rule in RULES:
        mends = "yes" if rule.repair is not None else ""
        engines = "all" if len(rule.engines) == 5 else ", ".join(rule.engines)
        cells = (f"`{rule.id}`", rule.severity, engines, rule.wrong, rule.fix, mends)
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def sample(folder: Path) -> str:
    """What the command prints about some of the broken directories."""
    import typer
    from typer.testing import CliRunner

    from rorqual.cli.lint import lint

    app = typer.Typer()
    app.command()(lint)
    out = []
    broken(folder, set(SHOWN))
    here = Path.cwd()
    os.chdir(folder)
    try:
        for rule in SHOWN:
            words = [f"broken/{rule}", *(["--fix"] if rule in ("scoring-func-missing", "groups-all-kept") else [])]
            result = CliRunner().invoke(app, words, env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"})
            text = "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())
            out.append(f"$ rorqual lint {' '.join(words)}\n{text}\n(status {result.exit_code})")
    finally:
        os.chdir(here)
    return "\n\n".join(out)


def page(folder: Path) -> str:
    return f"""# What `rorqual lint` knows

`rorqual lint DIR` reads config.json, the index, the headers of all shards, the tokenizer's files and the scales of
quantised weights, and says what is wrong, for whom, and what to do. It ends with status 1 if there is an error
(with `--engine NAME`, one that affects that engine). `--fix` writes `config.fixed.json` beside config.json, with
everything mended that a change of configuration can mend and every other key kept; `--fix-to FILE` chooses the place.
`--json` prints one object.

**error**: somebody computes something else, or cannot load it. **warning**: it is right, but an engine refuses it or
loses precision or speed. **note**: worth knowing.

Generated by `python -m tests.broken --write docs/lint.md`; every row has a checkpoint broken that way in
`tests/broken.py`.

{table()}

## What it looks like

The model is a tiny one (3 layers), broken on purpose.

```text
{sample(folder)}
```
"""


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Checkpoints broken on purpose, and what lint says of them.")
    parser.add_argument("--write", type=Path, help="write the page of rules there")
    parser.add_argument("--out", type=Path, help="make all broken directories there, and lint them")
    options = parser.parse_args()
    if options.write:
        with tempfile.TemporaryDirectory() as folder:
            options.write.write_text(page(Path(folder)), encoding="utf-8")
    if options.out:
        from rorqual.checkpoint.lint import lint

        for rule, directory in broken(options.out).items():
            print(f"{rule:28} {', '.join(lint(directory).ids)}")


if __name__ == "__main__":
    main()
