"""Quantised checkpoints as plain fp32 ones, read a second time from the description of the formats alone.

A peer that is to check how rorqual reads FP8 or packed integers must not be fed by rorqual's own reader, and none of the
local peers can read every format itself (transformers on a CPU refuses or mis-scales FP8 blocks at a ragged edge). So
this file is deliberately a stranger: it uses the safetensors package and numpy and imports nothing of `ops` or of the
loader. What it knows:

- FP8: `X.weight` holds E4M3 codes (sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN, there is
  no infinity), `X.weight_scale_inv` one scale for each 128 x 128 block, counted from the upper left, so that blocks at
  the right and lower edge may be smaller. Value = code times scale.
- pack-quantized: `X.weight_packed` holds int32 words along the inputs, the first code in the lowest bits, each code
  offset by half its range; `X.weight_scale` one scale for each group of inputs; `X.weight_shape` the true shape.

Everything else is copied as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.errors import CheckpointError

Floats = npt.NDArray[np.float32]
_BESIDES = (".weight_scale_inv", ".weight_scale", ".weight_shape")
_MAX_FILE_BYTES = 2_000_000_000


def is_quantised(directory: Path) -> bool:
    """Whether any weight is stored with scales."""
    return any(name.endswith((".weight_scale_inv", ".weight_packed")) for name in _places(directory))


def write_plain(directory: Path, target: Path) -> None:
    """The model of `directory` as plain safetensors in `target`, an existing empty directory; config and tokenizer
    files come along. Raises CheckpointError for a naming or a format this file does not know."""
    places = _places(directory)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    bits, group = _packing(config.pop("quantization_config", None) or {})
    pending: dict[str, Tensor] = {}
    index: dict[str, str] = {}

    def flush() -> None:
        if pending:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(pending, target / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(pending, file))
            pending.clear()

    for name, value in _plain_tensors(places, bits, group):
        pending[name] = value
        if sum(t.nbytes for t in pending.values()) > _MAX_FILE_BYTES:
            flush()
    flush()
    body = json.dumps({"metadata": {}, "weight_map": index})
    (target / "model.safetensors.index.json").write_text(body, encoding="utf-8")
    write_config(config, target)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (directory / file).is_file():
            shutil.copyfile(directory / file, target / file)


def write_config(config: dict[str, Any], target: Path) -> None:
    """As other engines know this architecture: by the name deepseek_v3, without code of its own."""
    known = {k: v for k, v in config.items() if k != "auto_map"}
    known |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (target / "config.json").write_text(json.dumps(known), encoding="utf-8")


def _places(directory: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found.update(dict.fromkeys(handle.keys(), file))
    if found and "model.embed_tokens.weight" not in found and "model.embed_tokens.weight_packed" not in found:
        raise CheckpointError(
            f"{directory} does not use the released tensor names, which other engines need",
            remedy="rorqual convert it first",
        )
    return found


def _packing(quantization: dict[str, Any]) -> tuple[int, int]:
    """Bits and group of packed integers, from the first group of the configuration."""
    groups = list((quantization.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") if groups else None) or {}
    return int(weights.get("num_bits") or 4), int(weights.get("group_size") or 32)


def _plain_tensors(places: dict[str, Path], bits: int, group: int) -> Iterator[tuple[str, Tensor]]:
    def read(name: str) -> Tensor:
        if name not in places:
            raise CheckpointError(f"the checkpoint lacks {name}", remedy="copy the missing shards")
        with safe_open(places[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    for name in places:
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            words = read(name).numpy()
            scale = read(f"{module}.weight_scale").float().numpy()
            columns = scale.shape[-1] * group
            if f"{module}.weight_shape" in places:
                columns = int(read(f"{module}.weight_shape")[-1])
            yield f"{module}.weight", torch.from_numpy(unpacked(words, scale, bits, group, columns))
        elif kind == "weight" and f"{name}_scale_inv" in places:
            codes = read(name).view(torch.uint8).numpy()
            yield name, torch.from_numpy(from_blocks(codes, read(f"{name}_scale_inv").float().numpy()))
        elif not name.endswith(_BESIDES):
            yield name, read(name).contiguous()


def e4m3_values() -> Floats:
    """What each of the 256 codes stands for."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(code < 128, value, -value).astype(np.float32)


def from_blocks(codes: npt.NDArray[np.uint8], scale: Floats, block: int = 128) -> Floats:
    """E4M3 codes [out, in] and their scales [ceil(out / block), ceil(in / block)] as fp32."""
    rows, columns = codes.shape
    if scale.shape != (-(-rows // block), -(-columns // block)):
        raise CheckpointError(
            f"a weight of {rows} x {columns} cannot have {scale.shape[0]} x {scale.shape[1]} block scales",
            remedy="the checkpoint is damaged: quantise it again",
        )
    spread = np.repeat(np.repeat(scale, block, 0)[:rows], block, 1)[:, :columns]
    return e4m3_values()[codes] * spread


def unpacked(words: npt.NDArray[np.int32], scale: Floats, bits: int, group: int, columns: int) -> Floats:
    """int32 words [out, ...] and scales [out, in / group] as fp32 [out, columns]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    signed = codes.reshape(len(words), -1).astype(np.int64) - 2 ** (bits - 1)
    value = signed[:, :columns].astype(np.float32) * np.repeat(scale, group, -1)[:, :columns]
    return np.ascontiguousarray(value, dtype=np.float32)
