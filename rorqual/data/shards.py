"""Token shards: documents as ids on disk, read through memory maps.

A directory holds `index.json` and, per shard, `.tokens` (uint16 where the vocabulary allows, else uint32),
`.offsets` (int64 starts of the documents, and the end) and, only if something in it is not to be learned,
`.mask` (uint8, 1 = learn this token as a target). All little-endian, no headers: numpy, C or a text editor's
hex view read them.

A shard appears under its name only when it is whole and on the disk (temporary name, fsync, rename), and the
index is written last, so what has an index is complete. Opening checks every file's size, which is what
truncation and half a copy change; `verify` reads everything and checks sums. Left out: compression (the maps
are the point) and an own shuffle (that is `packing`, which can change its mind without rewriting a terabyte).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rorqual.errors import DataError

FORMAT = 1
REMEDY = "run `rorqual data prepare` again"
RENEW = REMEDY + " with --overwrite"
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of an index. checksums: CRC-32 by file suffix; a missing "mask" means that all tokens are
    learned."""

    name: str
    documents: int
    tokens: int
    learned: int
    checksums: dict[str, int]

    def sizes(self, item: int) -> dict[str, int]:
        """Bytes of each of its files, for tokens of `item` bytes."""
        sizes = {"tokens": self.tokens * item, "offsets": (self.documents + 1) * 8, "mask": self.tokens}
        return {suffix: sizes[suffix] for suffix in self.checksums}


@dataclass(frozen=True, slots=True)
class Meta:
    """What the ids mean: size of the vocabulary, hash of the tokenizer, and the ids that packing needs."""

    vocab_size: int
    tokenizer: str
    eos_id: int
    pad_id: int

    @property
    def dtype(self) -> str:
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"


class Writer:
    """Collects documents in memory and puts them on disk shard by shard. Not safe to share between
    threads."""

    def __init__(self, directory: str | Path, meta: Meta, shards: Sequence[Shard] = ()) -> None:
        """`shards`: those already complete, to go on after them; anything else left in the directory is
        removed.
        Raises DataError if one of them is missing or of another size."""
        self._directory = Path(directory)
        self._meta = meta
        self.shards = list(shards)
        self._tokens: list[npt.NDArray[np.generic]] = []
        self._masks: list[Bytes | None] = []
        self.pending_tokens = 0
        self._directory.mkdir(parents=True, exist_ok=True)
        _check_shards(self._directory, meta, self.shards)
        kept = {f"{shard.name}.{suffix}" for shard in self.shards for suffix in shard.checksums}
        for path in self._directory.iterdir():
            if path.name not in kept and (path.name.startswith("shard-") or path.name.startswith("index.json")):
                path.unlink()

    def add(self, ids: Sequence[int] | Ints, mask: Sequence[int] | Bytes | None = None) -> None:
        """One document; `mask` None means that all of it is learned. Raises DataError for ids outside the
        vocabulary."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0:
            raise DataError("a document without tokens cannot be stored")
        if tokens.min() < 0 or tokens.max() >= self._meta.vocab_size:
            raise DataError(f"token ids must be below the vocabulary size of {self._meta.vocab_size}")
        learn = None if mask is None else np.asarray(mask, dtype=np.uint8)
        if learn is not None and learn.shape != tokens.shape:
            raise DataError(f"a mask of {learn.size} entries does not fit a document of {tokens.size} tokens")
        self._tokens.append(tokens.astype(self._meta.dtype))
        self._masks.append(None if learn is None or learn.all() else learn)
        self.pending_tokens += tokens.size

    def close_shard(self) -> Shard | None:
        """Makes a shard of what was added since the last one; None if that is nothing."""
        if not self._tokens:
            return None
        tokens = np.concatenate(self._tokens)
        lengths = np.array([0, *(t.size for t in self._tokens)], dtype="<i8")
        parts = {"tokens": tokens.tobytes(), "offsets": lengths.cumsum(dtype="<i8").tobytes()}
        learned = tokens.size
        if any(mask is not None for mask in self._masks):
            pairs = zip(self._tokens, self._masks, strict=True)
            mask = np.concatenate([np.ones(t.size, np.uint8) if m is None else m for t, m in pairs])
            parts["mask"], learned = mask.tobytes(), int(mask.sum())
        name = f"shard-{len(self.shards):05d}"
        for suffix, content in parts.items():
            write_atomic(self._directory / f"{name}.{suffix}", content)
        sums = {suffix: zlib.crc32(content) for suffix, content in parts.items()}
        shard = Shard(name, len(self._tokens), tokens.size, learned, sums)
        self.shards.append(shard)
        self._tokens, self._masks, self.pending_tokens = [], [], 0
        return shard

    def finish(self) -> None:
        """Closes the last shard and writes the index: from here on the directory can be read."""
        self.close_shard()
        totals = {key: sum(getattr(s, key) for s in self.shards) for key in ("documents", "tokens", "learned")}
        index = {"format": FORMAT, "dtype": np.dtype(self._meta.dtype).name, **asdict(self._meta), **totals}
        index["shards"] = [asdict(shard) for shard in self.shards]
        write_atomic(self._directory / "index.json", json.dumps(index, indent=1).encode())


class Reader:
    """A finished shard directory. Positions are global: shard after shard, document after document.

    `starts` and `lengths` (int64, one entry a document) say where each document lies.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises DataError naming the file if one is missing, of the wrong size or not what the index
        says."""
        self.directory = Path(directory)
        self.meta, self.shards = _read_index(self.directory)
        _check_shards(self.directory, self.meta, self.shards)
        lengths = [self._lengths(shard) for shard in self.shards]
        self.lengths: Ints = np.concatenate([np.zeros(0, np.int64), *lengths])
        self.starts: Ints = np.cumsum(self.lengths) - self.lengths
        self.documents = int(self.lengths.size)
        self.tokens = int(self.lengths.sum())
        self.learned = sum(shard.learned for shard in self.shards)
        self._bases: Ints = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)
        self._tokens = [self._map(shard, "tokens", self.meta.dtype) for shard in self.shards]
        self._masks = [self._map(s, "mask", "u1") if "mask" in s.checksums else None for s in self.shards]

    def document(self, i: int) -> tuple[Ints, Bytes]:
        """Tokens and mask of document i."""
        return self.gather(self.starts[i : i + 1], self.lengths[i : i + 1])

    def gather(self, starts: Ints, lengths: Ints) -> tuple[Ints, Bytes]:
        """Tokens and mask of stretches, one after another. Each stretch must lie within one document."""
        total = int(lengths.sum())
        tokens, mask = np.empty(total, np.int64), np.ones(total, np.uint8)
        shard_of = np.searchsorted(self._bases, starts, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        borders = np.cumsum(lengths) - lengths
        sources = spans(starts[order], lengths[order])
        targets = spans(borders[order], lengths[order])
        per_shard = np.bincount(shard_of, weights=lengths, minlength=len(self.shards)).astype(np.int64)
        end = 0
        for s in np.flatnonzero(per_shard):
            begin, end = end, end + int(per_shard[s])
            inside, target = sources[begin:end] - self._bases[s], targets[begin:end]
            tokens[target] = self._tokens[s][inside]
            learn = self._masks[s]
            if learn is not None:
                mask[target] = learn[inside]
        return tokens, mask

    def verify(self) -> None:
        """Reads every file. Raises DataError naming the first whose checksum or ids are wrong."""
        for shard, tokens in zip(self.shards, self._tokens, strict=True):
            for suffix, expected in shard.checksums.items():
                path = self.directory / f"{shard.name}.{suffix}"
                if zlib.crc32(path.read_bytes()) != expected:
                    raise DataError(f"{path} is damaged: its checksum differs from the index", remedy=RENEW)
            if int(tokens.max(initial=0)) >= self.meta.vocab_size:
                raise DataError(f"{self.directory / shard.name}.tokens has ids outside the vocabulary", remedy=RENEW)

    def _lengths(self, shard: Shard) -> Ints:
        path = self.directory / f"{shard.name}.offsets"
        offsets = np.fromfile(path, dtype="<i8").astype(np.int64)
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != shard.tokens or (lengths <= 0).any():
            raise DataError(f"{path} is damaged: it does not cut {shard.tokens} tokens into documents", remedy=REMEDY)
        return lengths

    def _map(self, shard: Shard, suffix: str, dtype: str) -> npt.NDArray[np.unsignedinteger]:
        # A plain view: indexing a np.memmap object builds a new one each time, which costs more than the
        # gather.
        return np.memmap(self.directory / f"{shard.name}.{suffix}", dtype=dtype, mode="r").view(np.ndarray)


def spans(starts: Ints, lengths: Ints) -> Ints:
    """Concatenation of range(start, start + length) over all pairs, without a loop."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def write_atomic(path: Path, content: bytes) -> None:
    """Whole or not at all, also across a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # the rename itself lives in the directory
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_index(directory: Path) -> tuple[Meta, list[Shard]]:
    path = directory / "index.json"
    if not path.is_file():
        inner = [name for name in ("train", "val") if (directory / name / "index.json").is_file()]
        remedy = f"name {directory / inner[0]} instead" if inner else REMEDY
        raise DataError(f"{path} does not exist: no finished token shards are there", remedy=remedy)
    try:
        index = json.loads(path.read_text("utf-8"))
        if index["format"] != FORMAT:
            raise DataError(f"{path} has format {index['format']}, this version reads {FORMAT}", remedy=REMEDY)
        meta = Meta(index["vocab_size"], index["tokenizer"], index["eos_id"], index["pad_id"])
        return meta, [Shard(**shard) for shard in index["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy=REMEDY) from error


def _check_shards(directory: Path, meta: Meta, shards: Sequence[Shard]) -> None:
    """Raises DataError naming the first file that is missing or of another size than the index says."""
    item = np.dtype(meta.dtype).itemsize
    for shard in shards:
        for suffix, expected in shard.sizes(item).items():
            path = directory / f"{shard.name}.{suffix}"
            try:
                found = path.stat().st_size
            except FileNotFoundError:
                raise DataError(f"{path} is missing", remedy=REMEDY) from None
            if found != expected:
                raise DataError(f"{path} has {found} bytes instead of {expected}", remedy=REMEDY)
