"""Near-duplicates and contamination out of a corpus, before it is tokenised.

A text is a copy where the Jaccard similarity of its word 5-grams with a text kept before reaches `near`: MinHash signatures
and locality-sensitive hashing (datasketch), then the signatures' own estimate, so that a chance collision of a band removes
nothing. The first of a family stays. A text is contaminated where it shares `WORDS` words in a row with an evaluation set
(whole items, where those are shorter), whatever their case and punctuation.

The output is one JSONL file, whole or not at all, with a second one that says what was left out, why and because of what.
Signatures are kept in memory: 1 KB for each kept document. Left out: several processes, and deduplication by substring.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rorqual.data.places import need
from rorqual.data.sources import Record, list_sources, read_records
from rorqual.errors import DataError

SHINGLE = 5
WORDS = 13
FEWEST = 5
"""Evaluation items shorter than this are not looked for: every text would contain them."""
PERMUTATIONS = 128
WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class CleanReport:
    """Documents by what became of them."""

    kept: int = 0
    near: int = 0
    contaminated: int = 0
    skipped: int = 0


def clean(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    near: float = 0.8,
    against: Sequence[str | Path] = (),
    progress: Callable[[int], None] | None = None,
) -> CleanReport:
    """Write what is kept to `out` (.jsonl, also .xz or .gz), and OUT.removed.jsonl. near 0 keeps copies. Raises DataError
    for unusable inputs, bad lines among them."""
    out = Path(out)
    forbidden = Forbidden(_texts(against))
    copies = Copies(near) if near else None
    counts = {"kept": 0, "near": 0, "contaminated": 0, "skipped": 0}
    with _whole(out) as keep, _whole(out.with_name(out.name + ".removed.jsonl")) as remove:
        for n, record in enumerate(read_records(list_sources(inputs)), 1):
            if record.skip == "bad":
                raise DataError(f"{record.place}: {record.problem}", remedy="mend or remove that line")
            verdict, because = _judge(record, forbidden, copies)
            counts[verdict] += 1
            if verdict == "kept":
                kept = {"text": record.text} if record.messages is None else {"messages": record.messages}
                keep.write((json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
            elif verdict != "skipped":
                remove.write((json.dumps({"place": record.place, "why": verdict, "of": because}) + "\n").encode())
            if progress is not None:
                progress(n)
    return CleanReport(**counts)


def _judge(record: Record, forbidden: Forbidden, copies: Copies | None) -> tuple[str, str]:
    """(what becomes of it, because of what)."""
    if record.skip is not None:
        return "skipped", ""
    words = words_of(text_of(record))
    if (phrase := forbidden.found_in(words)) is not None:
        return "contaminated", phrase
    if copies is not None and (first := copies.of(words, record.place)) is not None:
        return "near", first
    return "kept", ""


class Forbidden:
    """The phrases of evaluation sets."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._phrases: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words = words_of(text)
            size = min(WORDS, len(words))
            if size >= FEWEST:
                self._phrases.setdefault(size, set()).update(grams(words, size))

    def found_in(self, words: list[str]) -> str | None:
        """The first phrase that these words hold, if any."""
        for size, phrases in self._phrases.items():
            for gram in grams(words, size):
                if gram in phrases:
                    return " ".join(gram)
        return None


class Copies:
    """Remembers texts by signature and tells whether a new one is a copy."""

    def __init__(self, near: float) -> None:
        """Raises DataError where datasketch is not installed."""
        sketch = need("datasketch")
        self._near, self._signature = near, sketch.MinHash
        self._index = sketch.MinHashLSH(threshold=near, num_perm=PERMUTATIONS)
        self._known: dict[str, Any] = {}

    def of(self, words: list[str], place: str) -> str | None:
        """The place of the text that this is a copy of; None for a new one, which is remembered."""
        signature = self._signature(num_perm=PERMUTATIONS)
        size = min(SHINGLE, len(words))
        signature.update_batch([" ".join(g).encode("utf-8", "surrogatepass") for g in sorted(set(grams(words, size)))])
        for other in sorted(self._index.query(signature)):
            if signature.jaccard(self._known[other]) >= self._near:
                return str(other)
        self._index.insert(place, signature)
        self._known[place] = signature
        return None


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def grams(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    """Every run of `size` words; none for size 0."""
    for i in range(len(words) - size + 1 if size else 0):
        yield tuple(words[i : i + size])


def text_of(record: Record) -> str:
    """Of a conversation, what its messages say."""
    if record.messages is None:
        return record.text
    said = (m.get("content") for m in record.messages if isinstance(m, dict))
    return "\n".join(c for c in said if isinstance(c, str))


def _texts(inputs: Sequence[str | Path]) -> Iterator[str]:
    if inputs:
        for record in read_records(list_sources(inputs)):
            if record.skip is None:
                yield text_of(record)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when all is written."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(path.suffix, open)(temporary, "wb") as file:
            yield file
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
