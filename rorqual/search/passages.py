"""Passages: documents cut where they pause, and the ones that answer a question found by BM25.

The ranking is SQLite's FTS5, the same as the local index's: one analysis (`search/words.py`) and one formula for
both, no further dependency. bm25s and rank-bm25 were tried and are not better for the few hundred passages of one
turn; docs/search.md has the numbers. Its formula is the usual BM25 with k1 = 1.2 and b = 0.75.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rorqual.errors import BackendUnavailable
from rorqual.search.words import match_query, spaced

PASSAGE_CHARS = 900
FTS = "fts5(title, body, content='', tokenize='porter unicode61 remove_diacritics 2')"
RANK = "bm25({table}, 2.0, 1.0)"
"""A word of the title or heading counts twice."""

_BLOCK = re.compile(r"\n\s*\n|\n(?=#{1,6} )")
_HEADING = re.compile(r"#{1,6} +(.+?)[ #]*$", re.MULTILINE)
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document. `heading` is the nearest one above it."""

    heading: str
    text: str


def split(text: str, size: int = PASSAGE_CHARS) -> list[Passage]:
    """The document in passages of at most `size` characters: whole paragraphs together while they fit and no heading comes
    between, longer ones cut at the ends of sentences, at words where there are none."""
    out: list[Passage] = []
    heading, held = "", ""
    lone = False  # what is held is a heading, which says nothing that the next passage does not carry
    for block in _BLOCK.split(text):
        block = block.strip()
        top = _HEADING.match(block)
        if held and (top or len(held) + len(block) + 2 > size):
            if not lone:
                out.append(Passage(heading, held))
            held = ""
        if block:
            lone = top is not None and top.end() == len(block) <= size
        if top:
            heading = top[1].strip()[:200]
        *full, last = _cut(block, size) if len(block) > size else [block]
        for piece in full:
            out.append(Passage(heading, piece))
        held = f"{held}\n\n{last}" if held and last else held or last
    if held and not lone:
        out.append(Passage(heading, held))
    return out


def _cut(block: str, size: int) -> Iterator[str]:
    held = ""
    for sentence in _END.split(block):
        while len(sentence) > size:
            if held:
                yield held
                held = ""
            at = max(sentence.rfind(" ", size // 2, size), sentence.rfind("\n", size // 2, size))
            at = at if at > 0 else size
            yield sentence[:at].strip()
            sentence = sentence[at:].strip()
        if held and len(held) + len(sentence) + 1 > size:
            yield held
            held = ""
        held = f"{held} {sentence}" if held else sentence
    yield held


def connect(path: str) -> sqlite3.Connection:
    """A SQLite connection whose library has FTS5. Raises BackendUnavailable where it has not, sqlite3.Error for a path
    that cannot be opened."""
    with contextlib.closing(sqlite3.connect(":memory:")) as probe:
        try:
            probe.execute(f"CREATE VIRTUAL TABLE probe USING {FTS}")
        except sqlite3.OperationalError as error:
            raise BackendUnavailable(
                f"this Python's SQLite {sqlite3.sqlite_version} has no FTS5: {error}",
                remedy="use a Python whose sqlite3 was built with FTS5, as python.org's and Debian's are",
            ) from error
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)


def rank(passages: Sequence[tuple[str, str]], query: str) -> list[int]:
    """Positions of the (title, text) pairs that share a word with the query, best first."""
    asked = match_query(query)
    if not asked or not passages:
        return []
    with contextlib.closing(connect(":memory:")) as connection:
        connection.execute(f"CREATE VIRTUAL TABLE fts USING {FTS}")
        rows = ((i, spaced(title), spaced(text)) for i, (title, text) in enumerate(passages))
        connection.executemany("INSERT INTO fts(rowid, title, body) VALUES (?, ?, ?)", rows)
        sql = f"SELECT rowid FROM fts WHERE fts MATCH ? ORDER BY {RANK.format(table='fts')}, rowid"
        return [row[0] for row in connection.execute(sql, (asked,))]
