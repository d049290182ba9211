"""Full-text search over titles and messages.

On SQLite an FTS5 table holds the words (`search/words.py` says what a word is, Chinese, Japanese and Korean included); its
row is a message's number, or minus a chat's for its title. All words must be in one message or title, the last letters of
each may be missing. On PostgreSQL, and where SQLite has no FTS5, every text of the owner is looked through with ILIKE:
right, and slow in a long history.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, and_, or_, select, text

from rorqual.search.words import spaced, words
from rorqual.serve.chats.shapes import utf16
from rorqual.serve.chats.tables import CHATS, MESSAGES

SNIPPET = 160
_REMOVE = text("DELETE FROM chat_words WHERE rowid = :row")
_FOUND = text("SELECT rowid FROM chat_words WHERE chat_words MATCH :asked ORDER BY rowid DESC LIMIT 20000")


def indexes(connection: Connection) -> bool:
    """Whether there is an index of words."""
    if connection.dialect.name != "sqlite":
        return False
    return bool(connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'chat_words'")).scalar())


def put(connection: Connection, rows: Iterable[tuple[int, str]]) -> None:
    """Replace what the index has under these numbers."""
    rows = list(rows)
    if not rows or not indexes(connection):
        return
    connection.execute(_REMOVE, [{"row": row} for row, _ in rows])
    if said := [{"row": row, "body": spaced(body)} for row, body in rows if body]:
        connection.execute(text("INSERT INTO chat_words (rowid, body) VALUES (:row, :body)"), said)


def remove(connection: Connection, rows: Iterable[int]) -> None:
    many = [{"row": row} for row in rows]
    if many and indexes(connection):
        connection.execute(_REMOVE, many)


def find(connection: Connection, owner: str, query: str) -> dict[int, tuple[str, str | None]]:
    """Chats that match, by number, each with the text that does and its message's id (None: the title)."""
    asked = words(query)[:32]
    if not asked:
        return {}
    joined = MESSAGES.join(CHATS, MESSAGES.c.chat == CHATS.c.n)
    messages = select(MESSAGES.c.chat, MESSAGES.c.id, MESSAGES.c.content).select_from(joined)
    titles = select(CHATS.c.n, CHATS.c.title).where(CHATS.c.owner == owner)
    messages = messages.where(CHATS.c.owner == owner).order_by(MESSAGES.c.n)
    if indexes(connection):
        match = " AND ".join(f'"{word}"*' for word in asked)
        rows = [row[0] for row in connection.execute(_FOUND, {"asked": match})]
        found = [*_by_number(connection, messages, MESSAGES.c.n, [row for row in rows if row > 0])]
        titled = [*_by_number(connection, titles, CHATS.c.n, [-row for row in rows if row < 0])]
    else:
        plain = [re.sub(r"([\\%_])", r"\\\1", part) for part in query.split()]
        contains = [MESSAGES.c.content.ilike(f"%{part}%", escape="\\") for part in plain]
        found = list(connection.execute(messages.where(and_(*contains))))
        titled = list(
            connection.execute(titles.where(and_(*(CHATS.c.title.ilike(f"%{p}%", escape="\\") for p in plain))))
        )
    hits: dict[int, tuple[str, str | None]] = {row[0]: (row[2], row[1]) for row in found}
    return hits | {row[0]: (row[1], None) for row in titled}


def _by_number(connection: Connection, statement: Any, column: Any, numbers: list[int]) -> Iterable[Any]:
    for first in range(0, len(numbers), 500):  # SQLite bounds the variables of one statement
        yield from connection.execute(statement.where(or_(column.in_(numbers[first : first + 500]))))


def snippet(body: str, query: str) -> tuple[str, list[list[int]]]:
    """A piece of the text around the first word found, and where in it the words are (UTF-16)."""
    parts = sorted({*re.findall(r"\w+", query)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, parts)) or r"(?!)", re.IGNORECASE)
    first = pattern.search(body)
    at = max(0, first.start() - SNIPPET // 3) if first else 0
    if at:
        at = body.find(" ", at, at + 20) + 1 or at
    piece = body[at : at + SNIPPET].replace("\n", " ")
    return piece, [[utf16(piece, m.start()), utf16(piece, m.end())] for m in pattern.finditer(piece)]
