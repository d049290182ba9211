"""Safetensors files: headers checked before a byte of data is touched, tensors as views of a memory map, shards written
as a stream.

The format is eight bytes of header length, a JSON header, and the data. It is read and written here rather than through
the safetensors package for three reasons: a damaged or hostile file must be refused by name before anything its header
claims is allocated; tensors that lie side by side in one map become one stacked tensor without a copy; and a shard is
written tensor by tensor, in an order of our choosing, so that a converter never holds one. Files are page-aligned
inside (the header is padded), which other readers accept: trailing spaces belong to the format.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.errors import CheckpointError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAP_NORESERVE = 0x4000
"""Linux's constant, which Python's mmap has not."""
_ALIGNMENT = 4096
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Entry(NamedTuple):
    """One tensor's place: begin and end are bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Shard:
    """One safetensors file. The header is read and checked at once, the data mapped when the first tensor is asked for."""

    def __init__(self, path: Path, entries: Mapping[str, Entry] | None = None) -> None:
        """entries: its header, where that was read already. Raises CheckpointError for a file that is missing,
        truncated, a pickle, or whose header cannot be true."""
        self.path = path
        self.entries = read_header(path) if entries is None else entries
        self._bytes: Tensor | None = None

    def tensor(self, name: str) -> Tensor:
        """A view of the memory map (private: writing to it changes memory, never the file). Raises CheckpointError."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path} lacks {name}, which the index places there", remedy="copy the shard again"
            )
        return self.view(self.entries[name])

    def view(self, entry: Entry) -> Tensor:
        return self.strided(entry.dtype, entry.begin, entry.shape, _contiguous(entry.shape))

    def strided(self, dtype: torch.dtype, begin: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """A view with strides (in elements) from byte `begin`; a copy where the file leaves the dtype unaligned."""
        if self._bytes is None:
            self._bytes = self._map()
        if math.prod(shape) == 0:
            return torch.empty(*shape, dtype=dtype)
        span = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize
        run = self._bytes[begin : begin + span]
        if begin % dtype.itemsize:
            run = run.clone()
        return run.view(dtype).as_strided(shape, strides, None)

    def _map(self) -> Tensor:
        """The file's bytes, private and writable. No swap is reserved for it (as torch.from_file would), so that a file
        may be larger than the memory."""
        flags = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}", remedy="check the file") from None
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def close(self) -> None:
        """Let go of the map; tensors that were handed out keep it alive."""
        self._bytes = None


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return strides[::-1] if shape else []


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor's dtype, shape and place, checked against the file's size. Reads the header and nothing else.

    Raises CheckpointError naming the file, the tensor where it is one's, and what to do.
    """
    again = "copy the shard again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            impossible = len(head) < 8 or length > min(size - 8, MAX_HEADER_BYTES)
            if impossible and head.startswith(_PICKLES):
                raise CheckpointError(
                    f"{path} is a pickle, not safetensors: loading it could run anything",
                    remedy="get the safetensors weights of this model",
                )
            if impossible:
                raise CheckpointError(
                    f"{path} is truncated or damaged: its header claims {length:,} bytes, the file has {size:,}",
                    remedy=again,
                )
            raw = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}", remedy=again) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON ({error})", remedy=again) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is damaged: its header is not an object", remedy=again)
    start = 8 + length
    entries = {n: _entry(path, n, value, start, size) for n, value in raw.items() if n != "__metadata__"}
    _check_overlap(path, entries)
    return entries


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    again = "copy the shard again"
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        sound = isinstance(dtype, str) and len(shape) <= 16 and set(map(type, numbers)) == {int}  # a bool is none
        sound = sound and min(numbers) >= 0 and max(numbers) < 2**63
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed", remedy=again) from None
    if (kind := DTYPES.get(dtype)) is None:
        raise CheckpointError(
            f"{path}: {name} is stored as {dtype!r}, which rorqual does not read", remedy="convert it to bf16 first"
        )
    claimed = math.prod(shape) * kind.itemsize
    if end - begin != claimed:
        raise CheckpointError(
            f"{path}: {name} {shape} {dtype} needs {claimed:,} bytes, its header gives it {end - begin:,}", remedy=again
        )
    if start + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {start + end:,} of a file of {size:,}", remedy=again
        )
    return Entry(kind, tuple(shape), start + begin, start + end)


def _check_overlap(path: Path, entries: Mapping[str, Entry]) -> None:
    before, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise CheckpointError(f"{path}: {name} and {before} share bytes", remedy="copy the shard again")
        before, end = name, entry.end


def find_shards(directory: Path) -> dict[str, Path]:
    """Tensor name -> file of a model directory, from its index or else from the shards' own headers.

    Raises CheckpointError for a damaged index, a missing shard, a tensor in two shards, or a directory of pickles.
    """
    index = directory / INDEX
    if index.is_file():
        return _read_index(directory, index)
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        pickles = sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
        if pickles:
            raise CheckpointError(
                f"{directory} has pickled weights only ({pickles[0].name}): loading them could run anything",
                remedy="get the safetensors weights of this model",
            )
        raise CheckpointError(f"{directory} has no *.safetensors file", remedy="copy the checkpoint's weights there")
    found: dict[str, Path] = {}
    for shard in shards:
        for name in read_header(shard):
            if name in found:
                raise CheckpointError(
                    f"{name} stands in {found[name].name} and in {shard.name}", remedy=f"remove one, or write {INDEX}"
                )
            found[name] = shard
    return found


def _read_index(directory: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {name: str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}", remedy="copy the checkpoint again") from None
    paths = {file: directory / file for file in sorted(set(names.values()))}
    if outside := [file for file, path in paths.items() if path.name != file]:
        raise CheckpointError(f"{index} names a file outside its directory: {outside[0]}", remedy="mend the index")
    if missing := [file for file, path in paths.items() if not os.path.isfile(path)]:  # noqa: PTH113
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}", remedy="copy the missing shards")
    return {name: paths[file] for name, file in names.items()}


# ---- writing ------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A tensor that will be written: all that its header entry needs."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(planned: Iterable[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Cut into shards of at most `max_shard_bytes`, in order; a tensor larger than that has a shard of its own.

    Within a shard the widest dtypes come first, so that every tensor is aligned; otherwise the order is kept.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(shard, key=lambda t: -t.dtype.itemsize) for shard in shards]


def shard_names(count: int) -> list[str]:
    """The released file names."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shard(path: Path, planned: Sequence[Planned], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Write one file, tensor by tensor, flushed to disk; returns its SHA-256.

    `tensors` yields (name, value) for each planned tensor once, in any order: each goes to its own place, so that
    what is made together (a weight's codes and scales) need not be kept until its turn.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in planned:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    left = {plan.name: plan for plan in planned}
    with path.open("w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            plan = left.pop(name)
            assert tensor.dtype == plan.dtype and tuple(tensor.shape) == plan.shape, plan
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        assert not left, left
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(directory: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    """The index of the given files."""
    total = sum(t.nbytes for planned in shards.values() for t in planned)
    weight_map = {t.name: file for file, planned in shards.items() for t in planned}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
