"""A model as a directory in the Hugging Face layout: config.json, generation_config.json, *.safetensors with an index.

What is saved here, transformers, vLLM, SGLang and the GGUF converter read; what they save is read here. A directory
appears whole or not at all: it is written beside its place and renamed. FP8 and four-bit weights are a later edition.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.checkpoint.names import released_tensors, shared_copies
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.model.transformer import Transformer

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    directory: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Transformer:
    """A Transformer in eval mode from a model directory. dtype "auto" keeps what the checkpoint stores.

    `options` go to Transformer (backends). Raises CheckpointError naming the file or tensor at fault, ConfigError
    for a config.json that is not this architecture.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"there is no model directory {directory}")
    cfg = ModelConfig.load(directory)
    if cfg.quantization_config is not None:
        raise CheckpointError(
            f"{directory} holds quantised weights ({cfg.quantization_config.get('quant_method')})",
            remedy="this edition reads bf16, fp16 and fp32 checkpoints: convert it to bf16 first",
        )
    files = tensor_files(directory)
    cfg = _without_promised_mtp(cfg, files)
    model = Transformer(
        cfg, dtype=_resolve_dtype(dtype, cfg, files), device=device, compute_dtype=compute_dtype, init=False, **options
    )
    _fill(model, files)
    return model.eval()


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the shards' own headers. Raises CheckpointError for what is missing."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}", remedy="copy the checkpoint again") from None
        missing = sorted({f for f in weight_map.values() if not (directory / f).is_file()})
        if missing:
            raise CheckpointError(f"{directory} lacks {', '.join(missing)}", remedy="copy the missing shards")
        return {name: directory / f for name, f in weight_map.items()}
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{directory} has no *.safetensors file", remedy="copy the checkpoint's weights there")
    return {name: shard for shard in shards for name in _names(_open(shard))}


def _open(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} is truncated or damaged: {error}", remedy="copy the shard again") from None


def _names(opened: Any) -> list[str]:
    """Tensor names of an open shard (it has keys() and is no mapping)."""
    return list(opened.keys())


def _without_promised_mtp(cfg: ModelConfig, files: Mapping[str, Path]) -> ModelConfig:
    """transformers writes num_nextn_predict_layers even where it dropped the MTP weights."""
    depth = sum(
        f"model.layers.{cfg.num_hidden_layers + k}.eh_proj.weight" in files for k in range(cfg.num_nextn_predict_layers)
    )
    if depth < cfg.num_nextn_predict_layers:
        log.warning("the config promises %d MTP modules, the checkpoint has %d", cfg.num_nextn_predict_layers, depth)
    return cfg.replace(num_nextn_predict_layers=depth)


def _resolve_dtype(dtype: torch.dtype | str, cfg: ModelConfig, files: Mapping[str, Path]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in DTYPES:
            raise CheckpointError(f"dtype {dtype!r} is unknown", remedy=f"choose auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if (file := files.get("model.embed_tokens.weight")) is not None:
        name: str = _open(file).get_slice("model.embed_tokens.weight").get_dtype()
        stored = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(name)
        if stored is not None:
            return stored
    return DTYPES.get(str(cfg.extra.get("torch_dtype", cfg.extra.get("dtype"))), torch.bfloat16)


@torch.no_grad()
def _fill(model: Transformer, files: Mapping[str, Path]) -> None:
    """Copy every released tensor into its view, one shard open at a time."""
    wanted = dict(released_tensors(model))
    copies = {name for name, _ in shared_copies(model)}
    copies |= {"lm_head.weight"} if model.cfg.tie_word_embeddings else set()
    if missing := sorted(set(wanted) - set(files)):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors, among them {missing[0]}",
            remedy="config.json and weights must be of one model; copy missing shards",
        )
    beyond = tuple(f"model.layers.{i}." for i in range(len(model.layers), len(model.layers) + 9))
    if extra := sorted(n for n in set(files) - set(wanted) - copies if not n.startswith(beyond)):
        raise CheckpointError(
            f"the checkpoint has {len(extra)} tensors this config has no place for, among them {extra[0]}",
            remedy="config.json and weights must be of one model",
        )
    for shard in sorted({files[name] for name in wanted}):
        opened = _open(shard)
        present = set(_names(opened))
        for name, view in wanted.items():
            if files[name] != shard:
                continue
            if name not in present:
                raise CheckpointError(f"{shard} lacks {name}, which the index places there")
            _copy(view, opened.get_tensor(name), name, shard)


def _copy(view: Tensor, stored: Tensor, name: str, shard: Path) -> None:
    if stored.shape != view.shape:
        raise CheckpointError(
            f"{name} in {shard.name} is {list(stored.shape)}, the config makes it {list(view.shape)}",
            remedy="config.json and weights must be of one model",
        )
    if stored.dtype not in DTYPES.values():
        raise CheckpointError(f"{name} in {shard.name} is stored as {stored.dtype}, which needs a quantised loader")
    view.copy_(stored)


def save_model(
    model: Transformer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    files_from: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` as a released-format directory, replacing one that is there, all or nothing.

    dtype: of the stored weights (None: as they are); correction biases are fp32 always. files_from: a directory whose
    tokenizer, template and generation files come along. Raises CheckpointError where the place cannot be written.
    """
    directory = Path(directory)
    building = directory.with_name(f".{directory.name}.writing")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        stored = _stored_tensors(model, dtype)
        _write_shards(stored, building, max_shard_bytes)
        _write_side_files(model, building, next(iter(stored.values())).dtype, files_from)
        _move_into_place(building, directory)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {error}", remedy="check space and permissions") from error


def _stored_tensors(model: Transformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    out = {}
    for name, view in [*released_tensors(model), *shared_copies(model)]:
        keep = name.endswith("e_score_correction_bias")
        out[name] = view.detach().to("cpu", None if keep else dtype).contiguous()
    return out


def _write_shards(stored: Mapping[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in stored.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        # Tensors that share storage (tied or stored again) must be separate in the file.
        shards[-1][name] = tensor.clone()
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors leaves its files to their owner alone
        _sync(directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in stored.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_side_files(model: Transformer, directory: Path, dtype: torch.dtype, files_from: str | Path | None) -> None:
    name = str(dtype).removeprefix("torch.")
    _write_json(directory / "config.json", {**model.cfg.to_json(), "torch_dtype": name})
    for file in SIDE_FILES:
        if files_from is not None and (source := Path(files_from) / file).is_file():
            shutil.copyfile(source, directory / file)
    if not (directory / "generation_config.json").is_file():
        ids = {"bos_token_id": model.cfg.bos_token_id, "eos_token_id": model.cfg.to_json()["eos_token_id"]}
        _write_json(directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.95})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _move_into_place(building: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    building.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
