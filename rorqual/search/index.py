"""The local index: one SQLite file with documents, their passages and an FTS5 index over them.

SQLite was chosen over tantivy after measuring both (docs/search.md). tantivy is faster and smaller and finds as well; but
reading and extracting files takes most of the time, 37 ms for a query over 100,000 passages is nothing beside an answer,
and SQLite keeps documents, their stamps and their words in one transaction and needs no dependency. A file written in
write-ahead mode is whole after any kill, and a server reads while the command line writes.

The FTS table is contentless: it holds the inverted lists only, the words stand once, in `passage`. To take a passage
out of it SQLite wants the words that went in, and they are computed again from there. So the file knows which
analysis made it (`user_version`), and another version refuses it instead of damaging it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rorqual.errors import DataError
from rorqual.search.api import Result
from rorqual.search.extract import Document
from rorqual.search.passages import FTS, RANK, connect, split
from rorqual.search.words import match_query, spaced

VERSION = 1
Kind = Literal["folder", "page", "own"]

_SCHEMA = f"""
CREATE TABLE source (
  id INTEGER PRIMARY KEY, place TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, added TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
  finished TEXT, removed INTEGER NOT NULL DEFAULT 0);
CREATE TABLE document (
  id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES source, place TEXT NOT NULL, stamp TEXT NOT NULL,
  title TEXT NOT NULL, date TEXT NOT NULL, UNIQUE (source, place));
CREATE TABLE passage (
  id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES document, heading TEXT NOT NULL, text TEXT NOT NULL);
CREATE INDEX passage_document ON passage (document);
CREATE VIRTUAL TABLE fts USING {FTS};
PRAGMA user_version = {VERSION};
"""
_HITS = f"""
SELECT document.title, document.place, document.date, passage.heading, passage.text
FROM (SELECT rowid, {RANK.format(table="fts")} AS score FROM fts WHERE fts MATCH ? ORDER BY score LIMIT ?) AS hit
JOIN passage ON passage.id = hit.rowid JOIN document ON document.id = passage.document ORDER BY hit.score, passage.id
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was added. `finished` is when it was last gone through to the end (UTC), None if it never was."""

    place: str
    kind: Kind
    finished: str | None
    documents: int
    passages: int


@dataclass(frozen=True, slots=True)
class Hit:
    """One passage that matches, with its document's title, place and date."""

    title: str
    place: str
    date: str
    heading: str
    text: str


class LocalIndex:
    """Opens or makes the file. One object may be used from several threads, one at a time inside."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError for a file that is no index or another version's, BackendUnavailable without FTS5."""
        self._lock = threading.RLock()
        try:
            if str(path) != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = connect(str(path))
            version = self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{path} cannot be used as an index: {error}", remedy="name another place") from error
        if version != VERSION:
            self._db.close()
            raise DataError(
                f"{path} was made by another version of rorqual", remedy="delete it and add its sources again"
            )

    def _prepare(self) -> int:
        """The version of the file, which is made if it is empty."""
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version not in (0, VERSION):
            return version
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self.batch():  # two processes may start together
            if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in filter(str.strip, _SCHEMA.split(";\n")):
                    self._db.execute(statement)
        return VERSION

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What is done inside is there as a whole afterwards, or not at all."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ---- writing --------------------------------------------------------------------------------------------------

    def begin(self, place: str, kind: Kind) -> int:
        """The source's id, for the calls below; until `finish`, the list shows it as incomplete."""
        with self._lock:
            self._db.execute(
                "INSERT INTO source (place, kind) VALUES (?, ?) ON CONFLICT (place) "
                "DO UPDATE SET kind = excluded.kind, finished = NULL, removed = 0",
                (place, kind),
            )
            return int(self._db.execute("SELECT id FROM source WHERE place = ?", (place,)).fetchone()[0])

    def finish(self, source: int) -> None:
        with self._lock:
            self._db.execute("UPDATE source SET finished = CURRENT_TIMESTAMP WHERE id = ?", (source,))

    def stamps(self, source: int) -> dict[str, str]:
        """Place to stamp of every document it has: what need not be read again."""
        with self._lock:
            return dict(self._db.execute("SELECT place, stamp FROM document WHERE source = ?", (source,)).fetchall())

    def stamps_of(self, place: str) -> dict[str, str]:
        """The same for a source that may not exist or never was finished: then it has none."""
        with self._lock:
            found = self._db.execute(
                "SELECT id FROM source WHERE place = ? AND finished IS NOT NULL", (place,)
            ).fetchone()
            return self.stamps(found[0]) if found else {}

    def put(self, source: int, place: str, stamp: str, document: Document | None) -> None:
        """Adds or replaces a document. None remembers that there was nothing to read at this stamp."""
        passages = split(document.text) if document else []
        title, date = (document.title, document.date) if document else ("", "")
        with self._lock:
            self.drop(source, place)
            row = self._db.execute(
                "INSERT INTO document (source, place, stamp, title, date) VALUES (?, ?, ?, ?, ?)",
                (source, place, stamp, title, date),
            ).lastrowid
            for p in passages:
                values = (row, p.heading, p.text)
                new = self._db.execute(
                    "INSERT INTO passage (document, heading, text) VALUES (?, ?, ?)", values
                ).lastrowid
                self._db.execute(
                    "INSERT INTO fts (rowid, title, body) VALUES (?, ?, ?)", (new, *_indexed(title, p.heading, p.text))
                )

    def drop(self, source: int, place: str) -> None:
        """Takes a document out, if it is there."""
        with self._lock:
            found = self._db.execute(
                "SELECT id, title FROM document WHERE source = ? AND place = ?", (source, place)
            ).fetchone()
            if found is None:
                return
            number, title = found
            old = self._db.execute("SELECT id, heading, text FROM passage WHERE document = ?", (number,)).fetchall()
            for row, heading, text in old:
                values = (row, *_indexed(title, heading, text))
                self._db.execute("INSERT INTO fts (fts, rowid, title, body) VALUES ('delete', ?, ?, ?)", values)
            self._db.execute("DELETE FROM passage WHERE document = ?", (number,))
            self._db.execute("DELETE FROM document WHERE id = ?", (number,))

    def remove(self, place: str) -> bool:
        """Takes a source out with all its documents; False if there is none. The project's own documentation stays known
        as removed, so that it does not come back by itself."""
        with self.batch():
            found = self._db.execute("SELECT id, kind FROM source WHERE place = ? AND NOT removed", (place,)).fetchone()
            if found is None:
                return False
            for document in self.stamps(found[0]):
                self.drop(found[0], document)
            if found[1] == "own":
                self._db.execute("UPDATE source SET removed = 1 WHERE id = ?", (found[0],))
            else:
                self._db.execute("DELETE FROM source WHERE id = ?", (found[0],))
        return True

    # ---- reading --------------------------------------------------------------------------------------------------

    def was_removed(self, place: str) -> bool:
        with self._lock:
            return self._db.execute("SELECT 1 FROM source WHERE place = ? AND removed", (place,)).fetchone() is not None

    def entries(self) -> list[Entry]:
        """What was added, in that order. Documents without text do not count."""
        sql = """SELECT place, kind, finished,
            (SELECT count(*) FROM document WHERE source = source.id
                AND EXISTS (SELECT 1 FROM passage WHERE passage.document = document.id)),
            (SELECT count(*) FROM passage JOIN document ON document.id = passage.document WHERE document.source = source.id)
            FROM source WHERE NOT removed ORDER BY id"""
        with self._lock:
            return [Entry(*row) for row in self._db.execute(sql)]

    def search(self, query: str, count: int = 10) -> list[Hit]:
        """The best passages, at most `count`."""
        asked = match_query(query)
        if not asked:
            return []
        with self._lock:
            return [Hit(*row) for row in self._db.execute(_HITS, (asked, count))]


class LocalProvider:
    """The index as a search provider: a result is a document with its matching passages, so nothing is fetched."""

    name = "local"

    def __init__(self, index: LocalIndex) -> None:
        self._index = index

    async def search(self, query: str, count: int) -> list[Result]:
        hits = await asyncio.to_thread(self._index.search, query, 4 * count)
        by_document: dict[str, list[Hit]] = {}
        for hit in hits:
            by_document.setdefault(hit.place, []).append(hit)
        return [_result(found) for found in list(by_document.values())[:count]]


def _result(hits: Sequence[Hit]) -> Result:
    best = hits[0]
    return Result(best.title or best.place, best.place, best.text[:200], "\n\n".join(h.text for h in hits), best.date)


def _indexed(title: str, heading: str, text: str) -> tuple[str, str]:
    return spaced(f"{title} {heading}"), spaced(text)
