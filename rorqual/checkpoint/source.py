"""A checkpoint on disk as released weights, whatever its naming and storage: for the loader and for every converter.

Two namings are read: the released one, and that of DeepSeek's demo (`wq_a`, `w1`, one file a rank, tensor-parallel
slices). Three storages: plain, FP8 blocks, packed integers; recognised weight by weight from the tensors that are
there, because configurations lie. Opening reads headers alone; values come one at a time through a memory map, of
which at most two are held.
"""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.checkpoint.demo import DEMO_FILE, demo_config, released_name
from rorqual.checkpoint.shards import Entry, Shard, find_shards
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops.formats import WeightFormat
from rorqual.ops.fp8 import BLOCK, E4M3, Fp8Blocks, Scheme
from rorqual.ops.packed import PackedIntegers

log = logging.getLogger(__name__)
OPEN_SHARDS = 2
"""Shards mapped at a time, so that a conversion never holds more than these."""
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALES = ("weight_scale_inv", "weight_scale")


class Piece(NamedTuple):
    """One stored tensor: a file and the name it has there."""

    file: Path
    name: str


class Weight(NamedTuple):
    """A logical weight: how it is stored, and the tensors (by released suffix) that store it."""

    form: WeightFormat | None
    parts: Mapping[str, str]


@dataclass
class Source:
    """Opened by `Source.open`; `names` are the released names of the logical weights."""

    directory: Path
    cfg: ModelConfig
    weights: dict[str, Weight]
    pieces: dict[str, tuple[Piece, ...]]
    split_dims: Mapping[str, int] = field(default_factory=dict)
    _shards: OrderedDict[Path, Shard] = field(default_factory=OrderedDict)
    _headers: dict[Path, Mapping[str, Entry]] = field(default_factory=dict)
    _entries: dict[str, Entry] = field(default_factory=dict)
    """Of each stored tensor's first piece."""

    @classmethod
    def open(cls, directory: str | Path, scheme: Scheme | None = "weight_only") -> Source:
        """scheme: how FP8 weights will be multiplied; None is what the config asks for. Reads no values.

        Raises CheckpointError naming file or tensor, ConfigError for another architecture.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"there is no model directory {directory}", remedy="name a directory")
        raw = _read_config(directory)
        if ranks := sorted(directory.glob("model*-mp*.safetensors")):
            pieces, dims, headers = _demo_pieces(directory, ranks)
        else:
            pieces, dims, headers = _released_pieces(find_shards(directory)), {}, {}
        cfg = ModelConfig.from_released(raw, where=str(directory / "config.json"))
        source = cls(directory, cfg, {}, pieces, dims, _headers=headers)
        source._find_entries()
        source.weights = source._recognise(scheme)
        source.cfg = _without_promised_mtp(cfg, source.weights)
        return source

    # ---- what is there ------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """Released name of every quantised weight -> its format."""
        return {name: weight.form for name, weight in self.weights.items() if weight.form is not None}

    def entry(self, tensor: str) -> Entry:
        """The header entry of a stored tensor (of its first piece)."""
        return self._entries[tensor]

    def stored_shape(self, tensor: str) -> tuple[int, ...]:
        shape = self._entries[tensor].shape
        if len(pieces := self.pieces[tensor]) == 1:
            return shape
        dim, slices = self.split_dims[tensor], [self._header(p.file)[p.name] for p in pieces]
        rest = [(*e.shape[:dim], *e.shape[dim + 1 :], e.dtype) for e in slices]
        if any(other != rest[0] or len(e.shape) <= dim for e, other in zip(slices, rest, strict=True)):
            shapes = ", ".join(str(list(e.shape)) for e in slices)
            raise CheckpointError(f"the ranks' slices of {tensor} do not fit: {shapes}", remedy="copy them again")
        return (*shape[:dim], sum(e.shape[dim] for e in slices), *shape[dim + 1 :])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a logical weight, [out, in] for a matrix."""
        form, parts = self.weights[name]
        if form is None:
            return self.stored_shape(name)
        meta = {
            k: torch.empty(self.stored_shape(t), dtype=self.entry(t).dtype, device="meta") for k, t in parts.items()
        }
        return form.shape(meta)

    def dtype(self, name: str) -> torch.dtype:
        """As stored; of a quantised weight, its codes'."""
        return self.entry(next(iter(self.weights[name].parts.values()))).dtype

    # ---- values -------------------------------------------------------------------------------------------------

    def raw(self, tensor: str) -> Tensor:
        """A stored tensor, as a view of its map (joined, where ranks split it). Raises CheckpointError for bad scales."""
        pieces = [self._shard(piece.file).tensor(piece.name) for piece in self.pieces[tensor]]
        value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.split_dims[tensor])
        if tensor.endswith(SCALES):
            value = value.float() if value.dtype == torch.float8_e8m0fnu else value
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"{self.pieces[tensor][0].file}: {tensor} holds NaN or infinite scales",
                    remedy="the checkpoint is damaged: copy or quantise it again",
                )
        return value

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A logical weight as plain numbers."""
        form, parts = self.weights[name]
        if form is None:
            return self.raw(name).to(dtype)
        return form.dense({suffix: self.raw(tensor) for suffix, tensor in parts.items()}, dtype)

    def stacked(self, tensors: Sequence[str], like: Tensor) -> Tensor | None:
        """`like` [groups, ...] as one view of a map, when these tensors (in the order of its memory, an equal number
        for each group) lie side by side in one shard at an even step; None when they do not. Nothing is copied."""
        pieces = [piece for tensor in tensors for piece in self.pieces[tensor]]
        files = [piece.file for piece in pieces]
        if len(pieces) != len(tensors) or files.count(files[0]) != len(files):
            return None
        entries = [self.entry(tensor) for tensor in tensors]
        groups, size = like.shape[0], like.dtype.itemsize
        per = len(tensors) // groups
        heads = [e.begin for e in entries[::per]]
        step = heads[1] - heads[0] if groups > 1 else sum(e.nbytes for e in entries)
        even = all(head == heads[0] + i * step for i, head in enumerate(heads))
        adjacent = all(e.end == after.begin for i, (e, after) in enumerate(pairwise(entries), 1) if i % per)
        if not (even and adjacent and step > 0 and all(e.dtype == like.dtype for e in entries)):
            return None
        if step % size or heads[0] % size:
            return None
        inner = list(torch.empty(like.shape[1:], device="meta").stride())
        return self._shard(files[0]).strided(like.dtype, heads[0], like.shape, [step // size, *inner])

    # ---- inside -------------------------------------------------------------------------------------------------

    def _find_entries(self) -> None:
        """Raises CheckpointError where an index names a tensor that its shard lacks."""
        for tensor, (piece, *_) in self.pieces.items():
            if (entry := self._header(piece.file).get(piece.name)) is None:
                raise CheckpointError(
                    f"{piece.file} lacks {piece.name}, which the index places there", remedy="copy the shard again"
                )
            self._entries[tensor] = entry

    def _header(self, file: Path) -> Mapping[str, Entry]:
        if file not in self._headers:
            self._headers[file] = self._shard(file).entries
        return self._headers[file]

    def _shard(self, file: Path) -> Shard:
        if file in self._shards:
            self._shards.move_to_end(file)
            return self._shards[file]
        while len(self._shards) >= OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        self._shards[file] = Shard(file, self._headers.get(file))
        return self._shards[file]

    def _recognise(self, scheme: Scheme | None) -> dict[str, Weight]:
        """Logical weights from stored tensors. Raises CheckpointError for a storage that would be misread."""
        fp8, packed = _fp8(self.cfg, scheme), _packed(self.cfg)
        weights: dict[str, Weight] = {}
        for tensor in self.pieces:
            base, _, suffix = tensor.rpartition(".")
            if suffix in (*SCALES, "weight_shape"):
                continue
            if suffix == "weight_packed":
                form = self._packed_form(base, packed)
                parts = {s: f"{base}.{s}" for s in ("weight_packed", "weight_scale")}
                weights[f"{base}.weight"] = Weight(form, parts)
            elif suffix in ("weight_zero_point", "weight_g_idx"):
                raise CheckpointError(f"{tensor}: asymmetric and reordered integers are not read", remedy=_TO_BF16)
            elif self.entry(tensor).dtype == E4M3:
                self._check_grid(tensor)
                weights[tensor] = Weight(fp8, {"weight": tensor, "weight_scale_inv": f"{tensor}_scale_inv"})
            elif f"{tensor}_scale_inv" in self.pieces or f"{tensor}_scale" in self.pieces:
                raise CheckpointError(f"{tensor} has scales, but is {self.entry(tensor).dtype}", remedy=_TO_BF16)
            elif self.entry(tensor).dtype not in VALUES:
                raise CheckpointError(
                    f"{self.pieces[tensor][0].file}: {tensor} is {self.entry(tensor).dtype} without scales",
                    remedy="that is no released storage: copy or convert the checkpoint again",
                )
            else:
                weights[tensor] = Weight(None, {"weight": tensor})
        return weights

    def _check_grid(self, tensor: str) -> None:
        scale = f"{tensor}_scale_inv"
        file = self.pieces[tensor][0].file
        if scale not in self.pieces:
            raise CheckpointError(f"{file}: {tensor} is FP8 without {scale}", remedy="copy the checkpoint again")
        if len(shape := self.stored_shape(tensor)) != 2:
            raise CheckpointError(f"{file}: {tensor} is FP8 and no matrix: {list(shape)}", remedy=_TO_BF16)
        out, width = shape
        grid = (-(-out // BLOCK), -(-width // BLOCK))
        if self.stored_shape(scale) != grid:
            raise CheckpointError(
                f"{file}: {scale} is {list(self.stored_shape(scale))}, a [{out}, {width}] weight needs {list(grid)}",
                remedy="blocks of 128 x 128 are read",
            )

    def _packed_form(self, base: str, form: PackedIntegers | None) -> PackedIntegers:
        if form is None:
            raise CheckpointError(f"{base}.weight_packed needs its quantization_config", remedy="restore config.json")
        if f"{base}.weight_scale" not in self.pieces:
            raise CheckpointError(f"{base}.weight_packed has no weight_scale", remedy="copy the checkpoint again")
        packed, scales = self.entry(f"{base}.weight_packed"), self.entry(f"{base}.weight_scale")
        if len(packed.shape) != 2 or packed.dtype != torch.int32 or not scales.dtype.is_floating_point:
            raise CheckpointError(f"{base}.weight_packed is no int32 matrix with float scales", remedy=_TO_BF16)
        out, words = self.stored_shape(f"{base}.weight_packed")
        width = words * 32 // form.bits
        scale = (out, width // form.group)
        if width % form.group or self.stored_shape(f"{base}.weight_scale") != scale:
            raise CheckpointError(
                f"{base}.weight_scale is {list(self.stored_shape(f'{base}.weight_scale'))}, {form.bits} bits in groups "
                f"of {form.group} need {list(scale)}", remedy="config.json and weights must be of one model",
            )  # fmt: skip
        return replace(form, scale_dtype=scales.dtype)


_TO_BF16 = "dequantise it to bf16 with the tool that wrote it"


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no config.json", remedy="copy the model's config.json there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}", remedy="restore the file") from None
    if not (isinstance(raw, dict) and "dim" in raw and "n_layers" in raw):
        return raw
    try:
        return demo_config(raw)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds the demo's arguments, one of them no number: {error}") from None


def _released_pieces(files: Mapping[str, Path]) -> dict[str, tuple[Piece, ...]]:
    return {name: (Piece(file, name),) for name, file in files.items()}


def _demo_pieces(
    directory: Path, ranks: Sequence[Path]
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, int], dict[Path, Mapping[str, Entry]]]:
    """The demo's files: what every rank has whole is taken from the first, slices are joined, experts collected."""
    matches = [m for file in ranks if (m := DEMO_FILE.fullmatch(file.name))]
    count = int(matches[0][2]) if matches else 0
    if sorted(int(m[1]) for m in matches) != list(range(count)):
        raise CheckpointError(
            f"{directory} does not hold the files of all {count} ranks",
            remedy="copy the missing model*-mp*.safetensors",
        )
    pieces: dict[str, tuple[Piece, ...]] = {}
    dims: dict[str, int] = {}
    headers: dict[Path, Mapping[str, Entry]] = {}
    for rank in range(count):
        file = directory / f"model{rank}-mp{count}.safetensors"
        headers[file] = Shard(file).entries
        for name in headers[file]:
            released, dim = released_name(name)
            if dim is not None:
                dims[released] = dim
                pieces[released] = (*pieces.get(released, ()), Piece(file, name))
            else:
                pieces.setdefault(released, (Piece(file, name),))
    return pieces, dims, headers


def _without_promised_mtp(cfg: ModelConfig, names: Mapping[str, Weight]) -> ModelConfig:
    """transformers writes num_nextn_predict_layers even where it dropped the MTP weights."""
    depth = sum(
        f"model.layers.{cfg.num_hidden_layers + k}.eh_proj.weight" in names for k in range(cfg.num_nextn_predict_layers)
    )
    if depth < cfg.num_nextn_predict_layers:
        log.warning("the config promises %d MTP modules, the checkpoint has %d", cfg.num_nextn_predict_layers, depth)
    return cfg.replace(num_nextn_predict_layers=depth)


def _fp8(cfg: ModelConfig, scheme: Scheme | None) -> Fp8Blocks:
    quantization = cfg.quantization_config or {}
    if scheme is None:
        scheme = "dynamic" if quantization.get("activation_scheme") == "dynamic" else "weight_only"
    if (block := quantization.get("weight_block_size", [BLOCK, BLOCK])) != [BLOCK, BLOCK]:
        raise CheckpointError(f"FP8 blocks of {block} are not read", remedy="blocks of [128, 128] are")
    return Fp8Blocks(scheme, quantization.get("scale_fmt"))


def _packed(cfg: ModelConfig) -> PackedIntegers | None:
    """The one group of a compressed-tensors configuration. Raises CheckpointError for what would be misread."""
    quantization = cfg.quantization_config or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return None
    wanted = {"type": "int", "symmetric": True, "strategy": "group"}
    try:
        (group,) = (quantization.get("config_groups") or {}).values()
        weights = group["weights"]
        bits, size = weights["num_bits"], weights["group_size"]
        good = (
            all(weights.get(k) == v for k, v in wanted.items())
            and bits in (4, 8)
            and isinstance(size, int)
            and size > 0
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        good = False
    if not good or quantization.get("format") != "pack-quantized":
        raise CheckpointError(
            "of compressed-tensors, pack-quantized symmetric integers of 4 or 8 bits in groups are read",
            remedy=_TO_BF16,
        )
    return PackedIntegers(bits, size)


def layer_of(name: str) -> int | None:
    """The layer index in a released name."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
