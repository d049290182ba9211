"""Where documents come from: text, JSONL, Parquet, data sets, here or in an object store, in one fixed order.

A text file (.txt .md .rst) is one document. A line of JSONL or a row of Parquet is one: `{"text": ".."}`, or
`{"messages": [..]}` for a conversation. Other keys are ignored, so that data sets can keep their annotations. Text and
lines may be packed with xz or gz. A folder stands for all such files below it, by sorted path. An input may be an address
that fsspec opens (`s3://bucket/corpus/*.parquet`) or a Hugging Face data set (`datasets:NAME@SPLIT`). A record's place
(file number, record number) is enough to go on from there later.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from rorqual.data import places
from rorqual.errors import DataError

TEXT = (".txt", ".md", ".rst")
LINES = (".jsonl",)
ROWS = (".parquet",)
PACKED = (".xz", ".gz")
SUPPORTED = "supported are " + " ".join((*TEXT, *LINES, *ROWS)) + ", text also with " + " or ".join(PACKED)
Kind = Literal["text", "lines", "rows", "dataset"]
Skip = Literal["empty", "undecodable", "bad"]


@dataclass(frozen=True, slots=True)
class Source:
    """One input file (a path or an address) or data set; `name` is its path below the input that was given."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """One document or the reason why there is none. `place`: file and line, for people."""

    file: int
    number: int
    place: str
    text: str = ""
    messages: tuple[Any, ...] | None = None
    skip: Skip | None = None
    problem: str = ""

    @property
    def characters(self) -> int:
        """Characters of its text, or of its messages' texts."""
        said = (m.get("content") for m in self.messages or () if isinstance(m, dict))
        return len(self.text) + sum(len(content) for content in said if isinstance(content, str))


def list_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """All files of the inputs, folders searched. Raises DataError for what does not exist or is of no known
    kind."""
    sources: list[Source] = []
    for given in inputs:
        path = Path(given)
        if str(given).startswith(places.DATASET):
            sources.append(Source(str(given), str(given)))
        elif places.is_address(str(given)):
            files = [Source(*found) for found in places.expand(str(given))]
            sources += [f for f in files if _kind(f.name)]
        elif path.is_dir():
            found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
            below = sorted((file.relative_to(path).as_posix(), file) for file in found if _kind(file.name))
            sources += [Source(str(file), name) for name, file in below]
        elif not path.is_file():
            raise DataError(f"{path} does not exist", remedy="name files or folders")
        elif _kind(path.name) is None:
            raise DataError(f"{path} is of no known kind", remedy=SUPPORTED)
        else:
            sources.append(Source(str(path), path.name))
    if not sources:
        raise DataError("the inputs hold no files that can be read", remedy=SUPPORTED)
    return sources


def read_records(sources: Sequence[Source], file: int = 0, number: int = 0) -> Iterator[Record]:
    """Every record from record `number` of file `file` on. Raises DataError for a file that cannot be
    read."""
    for f in range(file, len(sources)):
        source = sources[f]
        first = number if f == file else 0
        kind = _kind(source.path)
        try:
            if kind == "dataset":
                yield from _rows(places.dataset_rows(source.path, first), f, source)
                continue
            with _open(source.path) as stream:
                if kind == "lines":
                    yield from _lines(stream, f, first, source)
                elif kind == "rows":
                    yield from _rows(places.parquet_rows(stream, first), f, source)
                elif first == 0:
                    yield _document(stream.read(), f, source)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            remedy = "check that the file is whole and readable"
            raise DataError(f"{source.path} cannot be read: {error}", remedy=remedy) from error


def _kind(path: str) -> Kind | None:
    if path.startswith(places.DATASET):
        return "dataset"
    name = PurePosixPath(path).name if places.is_address(path) else Path(path).name
    if name.startswith("."):
        return None
    suffixes = [s.lower() for s in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "text" if last in TEXT else "lines" if last in LINES else "rows" if last in ROWS else None


def _open(path: str) -> IO[bytes]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    opener = openers.get(PurePosixPath(path).suffix.lower())
    if opener is None:
        return places.open_binary(path)
    unpacked: IO[bytes] = opener(places.open_binary(path) if places.is_address(path) else path, "rb")
    return unpacked


def _rows(rows: Iterator[tuple[int, dict[str, Any]]], file: int, source: Source) -> Iterator[Record]:
    try:
        for number, row in rows:
            yield _from_json(row, file, number, f"{source.path}:{number + 1}")
    except DataError as error:
        if source.path in str(error):
            raise
        raise DataError(f"{source.path}: {error}") from error


def _document(content: bytes, file: int, source: Source) -> Record:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Record(file, 0, source.path, skip="undecodable", problem=str(error))
    return Record(file, 0, source.path, text, skip=None if text.strip() else "empty")


def _lines(stream: IO[bytes], file: int, first: int, source: Source) -> Iterator[Record]:
    for number, line in enumerate(stream):
        if number < first or not line.strip():
            continue
        place = f"{source.path}:{number + 1}"
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield Record(file, number, place, skip="bad", problem=f"no valid JSON: {error}")
            continue
        yield _from_json(value, file, number, place)


def _from_json(value: object, file: int, number: int, place: str) -> Record:
    text = value.get("text") if isinstance(value, dict) else None
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and text is None:
        return Record(file, number, place, messages=tuple(messages))
    if not isinstance(text, str) or messages is not None:
        problem = 'neither {"text": "..."} nor {"messages": [...]}'
        return Record(file, number, place, skip="bad", problem=problem)
    return Record(file, number, place, text, skip=None if text.strip() else "empty")


def texts(inputs: Sequence[str | Path], limit: int) -> Iterator[str]:
    """Plain text of every document, of conversations message by message, until `limit` characters: for a
    tokenizer.

    Raises DataError for a line that is neither text nor a conversation.
    """
    left = limit
    for record in read_records(list_sources(inputs)):
        if record.skip == "bad":
            raise DataError(f"{record.place}: {record.problem}", remedy="mend or remove that line")
        said = [
            m.get(k) for m in record.messages or () if isinstance(m, dict) for k in ("reasoning_content", "content")
        ]
        for text in [record.text] if record.messages is None else said:
            if isinstance(text, str) and text:
                yield text[:left]
                left -= len(text)
            if left <= 0:
                return
