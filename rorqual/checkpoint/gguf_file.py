"""Writing a GGUF file that survives being killed, and checking one that is finished.

A large model takes an hour to convert and a machine may go away in that hour. The file grows as `NAME.part` beside a
small journal: one line for each finished tensor with the hash of its bytes, flushed to disk after the tensor is. Whoever
starts again keeps the longest run of tensors whose bytes still have their hash, and goes on behind it; the result is
the same file, byte for byte. The journal's first line is a fingerprint of everything that decides those bytes, so that
a conversion of another checkpoint, or to another type, never goes on from this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rorqual.errors import BackendUnavailable, CheckpointError

ALIGNMENT = 32
"""The format's default: header and tensors end on multiples of it."""
_PIECE = 1 << 24


class Block(NamedTuple):
    """One tensor of the file: how many bytes it has, and a function that yields them in order."""

    name: str
    nbytes: int
    pieces: Callable[[], Iterator[bytes]]


def write_resumable(
    target: Path,
    header: bytes,
    blocks: Sequence[Block],
    fingerprint: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write header and blocks to `target`, which appears when it is whole; goes on where an earlier call was killed.

    `progress` is called with (bytes done, bytes in all) after each tensor. Raises CheckpointError where the place
    cannot be written.
    """
    part, journal = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.journal")
    header += bytes(-len(header) % ALIGNMENT)
    starts, size = [], len(header)
    for block in blocks:
        starts.append(size)
        size += padded(block.nbytes)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hashes = _resume(part, journal, header, blocks, starts, fingerprint)
        done = len(hashes)
        with part.open("r+b" if done else "w+b") as file, _new_journal(journal, fingerprint, hashes) as log:
            if not done:
                file.write(header)
            file.truncate(starts[done] if done < len(blocks) else size)
            file.seek(0, os.SEEK_END)
            for index in range(done, len(blocks)):
                digest = _write(file, blocks[index])
                _flush(file)
                log.write(_line({"tensor": index, "sha256": digest}))
                _flush(log)
                if progress is not None:
                    progress(starts[index] + padded(blocks[index].nbytes), size)
            if file.tell() != size:
                raise CheckpointError(
                    f"{part} has {file.tell():,} bytes, not {size:,}", remedy="remove it, start again"
                )
        part.replace(target)
        _flush_directory(target.parent)
        journal.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror or error}", remedy="check space and permissions, then go on"
        ) from error


def padded(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


def verify_gguf(path: str | Path) -> int:
    """The number of tensors of a finished file whose header and size agree. Raises CheckpointError if they do not."""
    path = Path(path)
    gguf = gguf_package()
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}", remedy="name a .gguf file")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or no GGUF file: {error}", remedy="export it again") from error
    end = max((int(t.data_offset) + padded(int(t.n_bytes)) for t in tensors), default=0)
    if not tensors or end != path.stat().st_size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, its header gives it {end:,}", remedy="export it again"
        )
    return len(tensors)


def gguf_package() -> Any:
    """The `gguf` package. Raises BackendUnavailable with what to install."""
    try:
        import gguf
    except ImportError:
        raise BackendUnavailable("GGUF files need the gguf package", remedy="pip install 'gguf>=0.17'") from None
    return gguf


def _write(file: BinaryIO, block: Block) -> str:
    digest, written = hashlib.sha256(), 0
    for piece in block.pieces():
        file.write(piece)
        digest.update(piece)
        written += len(piece)
    assert written == block.nbytes, block
    file.write(bytes(-written % ALIGNMENT))
    return digest.hexdigest()


def _resume(
    part: Path, journal: Path, header: bytes, blocks: Sequence[Block], starts: Sequence[int], fingerprint: str
) -> list[str]:
    """Hashes of the leading tensors that `part` holds already; none if it belongs to another conversion."""
    if not (part.is_file() and journal.is_file()):
        return []
    first, *rest = _read_journal(journal) or [{}]
    kept: list[str] = []
    with part.open("rb") as file:
        if first.get("fingerprint") != fingerprint or file.read(len(header)) != header:
            return []
        for index, line in enumerate(rest[: len(blocks)]):
            file.seek(starts[index])
            if line.get("tensor") != index or line.get("sha256") != _hash_of(file, blocks[index].nbytes):
                break
            kept.append(line["sha256"])
        if kept and part.stat().st_size < starts[len(kept) - 1] + padded(blocks[len(kept) - 1].nbytes):
            kept.pop()
    return kept


def _read_journal(journal: Path) -> list[dict[str, Any]]:
    """Its whole lines: the last one may have been cut off."""
    lines = []
    for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return lines


def _hash_of(file: BinaryIO, nbytes: int) -> str:
    digest = hashlib.sha256()
    while nbytes and (piece := file.read(min(nbytes, _PIECE))):
        digest.update(piece)
        nbytes -= len(piece)
    return "" if nbytes else digest.hexdigest()


def _new_journal(journal: Path, fingerprint: str, hashes: Sequence[str]) -> BinaryIO:
    """Replaced as a whole, so that it is never shorter than what it vouches for."""
    fresh = journal.with_name(f"{journal.name}.new")
    lines: list[dict[str, Any]] = [{"fingerprint": fingerprint}]
    lines += [{"tensor": i, "sha256": h} for i, h in enumerate(hashes)]
    file = fresh.open("wb")
    file.write(b"".join(_line(line) for line in lines))
    _flush(file)
    fresh.replace(journal)
    _flush_directory(journal.parent)
    return file


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
