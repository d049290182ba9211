"""`rorqual convert`: a checkpoint of one storage into another, as a stream.

The whole output is planned from headers (names, shapes, dtypes, shards) before the first value is read; then it is
written shard by shard and tensor by tensor, so that memory holds one tensor and two mapped shards of the source,
whatever the model's size. Every finished shard is flushed, hashed and noted in a journal; a conversion that was killed
goes on from there, after the finished shards have been read again and their SHA-256 compared. The directory gets its
name when it is whole. `SHA256SUMS` in the result is checked by `sha256sum -c`, and by the next conversion that reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.hf import MAX_SHARD_BYTES, check, move_into_place, plain_modules, write_side_files
from rorqual.checkpoint.shards import Planned, plan_shards, shard_names, write_index, write_json, write_shard
from rorqual.checkpoint.source import Source, layer_of
from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError
from rorqual.ops.formats import WeightFormat
from rorqual.ops.fp8 import Fp8Blocks
from rorqual.ops.packed import GROUP, PackedIntegers

SUMS = "SHA256SUMS"
JOURNAL = "convert.json"
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMATS: dict[str, WeightFormat] = {"fp8": Fp8Blocks(), "int8": PackedIntegers(8), "int4": PackedIntegers(4)}
TARGETS = (*PLAIN, *FORMATS)
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")
_LINEARS = ("_proj.weight", "kv_a_proj_with_mqa.weight")

Progress = Callable[[int, int], None]
"""Bytes written, bytes in all."""


@dataclass(frozen=True)
class Conversion:
    """What will be written: file -> its tensors, the configuration, and where each tensor's values come from."""

    files: Mapping[str, list[Planned]]
    cfg: ModelConfig
    makers: Mapping[str, tuple[str, str]]
    form: WeightFormat | None
    dtype: torch.dtype
    kept_plain: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(t.nbytes for planned in self.files.values() for t in planned)


def is_quantised(name: str, form: WeightFormat | None, embeddings: bool = True) -> bool:
    """Whether a released weight is stored in `form`: the projections of attention and feed-forward, and for integers
    the embedding and the head; never router, norms, eh_proj or correction bias."""
    if form is None:
        return False
    if isinstance(form, PackedIntegers) and name.endswith(_EMBEDDINGS):
        return embeddings
    return name.endswith(_LINEARS) and not name.endswith("eh_proj.weight")


def plan(
    source: Source, to: str, *, scale_fmt: str | None = None, embeddings: bool = True, untie: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:  # fmt: skip
    """The output of a conversion to one of TARGETS, from headers alone. untie: a tied embedding is stored as the head,
    too. Raises CheckpointError for an unknown target."""
    if to not in TARGETS:
        raise CheckpointError(f"cannot convert to {to!r}", remedy=f"choose {', '.join(TARGETS)} or gguf")
    if scale_fmt not in (None, "ue8m0"):
        raise CheckpointError(f"scale_fmt {scale_fmt!r} is unknown", remedy="choose ue8m0 or leave it out")
    form = Fp8Blocks(scale_fmt=scale_fmt) if to == "fp8" else FORMATS.get(to)
    dtype = PLAIN.get(to, torch.bfloat16)
    planned: list[Planned] = []
    makers: dict[str, tuple[str, str]] = {}
    ragged = []
    untied = untie and source.cfg.tie_word_embeddings
    origins = {"lm_head.weight": "model.embed_tokens.weight"} if untied else {}
    for name in sorted({*source.names, *origins}, key=_order):
        if name.endswith("rotary_emb.inv_freq"):  # some converters left it; it follows from the config
            continue
        origin, base = origins.get(name, name), name.rpartition(".")[0]
        shape = source.shape(origin)
        wanted = is_quantised(name, form, embeddings)
        if wanted and isinstance(form, PackedIntegers) and shape[-1] % GROUP:
            ragged.append(name)
            wanted = False
        if wanted and form is not None:
            parts = {suffix: (d, s) for suffix, (s, d) in form.parts(shape).items()}
            if isinstance(form, PackedIntegers):
                parts["weight_shape"] = (torch.int64, (2,))
            for suffix, (part_dtype, part_shape) in parts.items():
                planned.append(Planned(f"{base}.{suffix}", part_dtype, part_shape))
                makers[f"{base}.{suffix}"] = (origin, suffix)
        else:
            keep = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            planned.append(Planned(name, keep, shape))
            makers[name] = (origin, "")
    shards = plan_shards(planned, max_shard_bytes)
    quantization = None if form is None else form.describe(plain_modules(planned))
    cfg = source.cfg.replace(
        quantization_config=quantization, tie_word_embeddings=source.cfg.tie_word_embeddings and not untied
    )
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    return Conversion(files, cfg, makers, form, dtype, tuple(ragged))


def _order(name: str) -> tuple[Any, ...]:
    """File order: embedding, layers by number, norm and head; experts by number, gate and up side by side before down."""
    layer = layer_of(name)
    place = 0 if "embed_tokens" in name and layer is None else 1 if layer is not None else 2
    numbers = [int(word) if word.isdigit() else -1 for word in name.split(".")[3:]]
    expert = next((n for n in numbers if n >= 0), -1)
    which = next((i for i, word in enumerate(("gate_proj", "up_proj", "down_proj")) if word in name), 3)
    return (place, layer or 0, ".mlp.experts." in name, expert, which, name)


def convert(
    src: str | Path, dst: str | Path, to: str, *, scale_fmt: str | None = None, embeddings: bool = True,
    untie: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """Write checkpoint `src` as directory `dst` in the storage `to`; resumes what a killed call left beside `dst`.

    Raises CheckpointError for a source that is damaged (its SHA256SUMS are checked if it has them), for values that
    cannot be quantised, and where dst exists or cannot be written; what was written so far stays and is resumed from.
    """
    src, dst = Path(src), Path(dst)
    if os.path.lexists(dst):
        raise CheckpointError(f"{dst} exists", remedy="choose another name or remove it")
    source = Source.open(src)
    check(source)
    conversion = plan(
        source, to, scale_fmt=scale_fmt, embeddings=embeddings, untie=untie, max_shard_bytes=max_shard_bytes
    )
    building = dst.with_name(f".{dst.name}.converting")
    try:
        building.mkdir(parents=True, exist_ok=True)
        journal = _Journal(building, _fingerprint(source, conversion, to))
        verify_sums(src)
        written = 0
        for file, tensors in conversion.files.items():
            if not journal.whole(file):
                values = _values(source, conversion, tensors, written, progress)
                temporary = building / f"{file}.part"
                digest = write_shard(temporary, tensors, values)
                temporary.replace(building / file)
                journal.note(file, digest)
            written += sum(t.nbytes for t in tensors)
            if progress is not None:
                progress(written, conversion.total_bytes)
        _finish(building, dst, src, conversion, journal.sums)
    except OSError as error:
        raise CheckpointError(f"cannot write {dst}: {error}", remedy="check space; the next call goes on") from error
    return conversion


def _values(
    source: Source, conversion: Conversion, tensors: list[Planned], written: int, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of one shard's tensors, weight by weight: a weight's parts are made once, and none is kept."""
    weights: dict[str, list[Planned]] = {}
    for tensor in tensors:
        weights.setdefault(conversion.makers[tensor.name][0], []).append(tensor)
    for name in sorted(weights, key=_order):
        wanted = [(conversion.makers[t.name][1], t) for t in weights[name]]
        packed = any(suffix not in ("", "weight_shape") for suffix, _ in wanted)
        parts = _pack(source, conversion.form, name) if packed else {}
        for suffix, tensor in wanted:
            if suffix == "":
                yield tensor.name, source.dense(name, tensor.dtype)
            elif suffix == "weight_shape":
                yield tensor.name, torch.tensor(source.shape(name), dtype=torch.int64)
            else:
                yield tensor.name, parts[suffix]
            written += tensor.nbytes
            if progress is not None:
                progress(written, conversion.total_bytes)


def _pack(source: Source, form: WeightFormat | None, name: str) -> dict[str, Tensor]:
    assert form is not None
    if (weight := source.weights[name]).form == form:  # stored so already: the bytes pass through
        wanted = form.parts(source.shape(name))
        return {suffix: source.raw(tensor).to(wanted[suffix][1]) for suffix, tensor in weight.parts.items()}
    try:
        return form.pack(source.dense(name))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}", remedy="the source is damaged: copy it again") from None


def _finish(building: Path, dst: Path, src: Path, conversion: Conversion, sums: Mapping[str, str]) -> None:
    write_index(building, conversion.files)
    write_side_files(conversion.cfg, building, conversion.dtype, src)
    text = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
    (building / SUMS).write_text(text, encoding="ascii")
    if os.path.lexists(dst):  # whoever took the name meanwhile keeps what is there
        raise CheckpointError(f"{dst} exists by now", remedy=f"move it away and call again; the work is in {building}")
    for leftover in building.glob("*.part"):
        leftover.unlink(missing_ok=True)
    move_into_place(building, dst)
    (dst / JOURNAL).unlink(missing_ok=True)  # last: without it the shards would not be known


class _Journal:
    """Which shards of this very conversion are on disk, and their hashes."""

    def __init__(self, building: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = building / JOURNAL, fingerprint
        self.sums: dict[str, str] = {}
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = {}
        if isinstance(old, dict) and old.get("fingerprint") == fingerprint:
            self.sums = dict(old["sums"])
        else:
            for stale in building.iterdir():
                stale.unlink()

    def whole(self, file: str) -> bool:
        """Whether a noted shard still has the bytes that were noted."""
        path = self.path.parent / file
        if file in self.sums and path.is_file() and sha256(path) == self.sums[file]:
            return True
        self.sums.pop(file, None)
        return False

    def note(self, file: str, digest: str) -> None:
        self.sums[file] = digest
        temporary = self.path.with_suffix(".tmp")
        write_json(temporary, {"fingerprint": self.fingerprint, "sums": self.sums})
        temporary.replace(self.path)
        handle = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _fingerprint(source: Source, conversion: Conversion, to: str) -> str:
    """Of everything that decides the output: the plan, the configuration, and the source files' sizes and times."""
    files = sorted({piece.file for pieces in source.pieces.values() for piece in pieces})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    plans = [(file, [(t.name, str(t.dtype), t.shape) for t in ts]) for file, ts in conversion.files.items()]
    text = json.dumps([to, stats, plans, conversion.cfg.to_json()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sums(directory: Path) -> bool:
    """Check a directory's SHA256SUMS; False where it has none. Raises CheckpointError naming the file that differs."""
    path = directory / SUMS
    if not path.is_file():
        return False
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged: it is no text", remedy="copy it again, or remove it") from None
    for line in lines:
        digest, _, file = line.partition(" ")
        file = file.lstrip(" *")
        if Path(file).name != file or not (directory / file).is_file():
            raise CheckpointError(f"{path} names {file}, which is not there", remedy="copy the missing file")
        if sha256(directory / file) != digest:
            raise CheckpointError(f"{directory / file} is not what {SUMS} says", remedy="copy the file again")
    return True
