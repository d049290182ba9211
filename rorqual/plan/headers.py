"""What a checkpoint directory holds, from its index and the headers of its shards: names, dtypes, bytes; no tensor is
read and nothing heavy is imported, so this answers at once for a terabyte.

A safetensors file begins with the length of its header (eight bytes, little-endian), then the header as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import CheckpointError

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True)
class Weights:
    """names: of all tensors. dtypes: name -> the format's word for it ("BF16", "F8_E4M3"), empty where only an index
    was found. nbytes: of all tensors, None where nothing says it."""

    names: frozenset[str]
    dtypes: dict[str, str]
    nbytes: int | None

    def stored_dtype(self) -> str | None:
        """What the embedding is stored in, else what most tensors are: a checkpoint's own precision."""
        if "model.embed_tokens.weight" in self.dtypes:
            return self.dtypes["model.embed_tokens.weight"]
        return Counter(self.dtypes.values()).most_common(1)[0][0] if self.dtypes else None

    def has(self, ending: str) -> bool:
        return any(name.endswith(ending) for name in self.names)


def read_weights(directory: Path) -> Weights:
    """From the headers of the shards where they are all there, else from the index alone; empty where there is neither.

    Raises CheckpointError naming a damaged file, or a shard the index names and the directory lacks among others that
    are there.
    """
    index = _index(directory)
    files = sorted(set(index["weight_map"].values())) if index else [p.name for p in _shards(directory)]
    present = [name for name in files if (directory / name).is_file()]
    if index and not present:
        total = index.get("metadata", {}).get("total_size")
        return Weights(frozenset(index["weight_map"]), {}, int(total) if isinstance(total, int | float) else None)
    if missing := sorted(set(files) - set(present)):
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}", remedy="copy the missing shards")
    dtypes: dict[str, str] = {}
    nbytes = 0
    for name in files:
        for tensor, dtype, size in read_header(directory / name):
            dtypes[tensor] = dtype
            nbytes += size
    return Weights(frozenset(dtypes), dtypes, nbytes if files else None)


def read_header(shard: Path) -> Iterator[tuple[str, str, int]]:
    """(name, dtype, bytes) of every tensor of a safetensors file. Raises CheckpointError for a damaged one."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, shard.stat().st_size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, str(entry["dtype"]), int(end) - int(begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{shard} is truncated or damaged: {error}", remedy="copy the shard again") from None


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _index(directory: Path) -> dict[str, Any] | None:
    file = directory / INDEX
    if not file.is_file():
        return None
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(index["weight_map"], dict):
            raise TypeError("weight_map is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}", remedy="copy the checkpoint again") from None
    return dict(index)
