"""Conversations in the database: every change is one transaction, every call knows whose conversations it may see.

The methods block, and are called in threads. What does not belong to the owner does not exist for them: NotFound either way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from rorqual.errors import NotFound, RequestError
from rorqual.serve.chats import words
from rorqual.serve.chats.shapes import (
    RESERVED,
    RUNNING,
    ChatPatch,
    ChatSettings,
    Message,
    NewChat,
    Turn,
    chat_json,
    title_of,
    utf16,
)
from rorqual.serve.chats.tables import ATTACHED, CHATS, FILES, MESSAGES
from rorqual.serve.database import connect, writing

LIST_LIMIT = 200


class ChatStore:
    """One database. Opened, and migrated, with the first call that needs it."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def engine(self) -> Engine:
        return connect(self._url)

    # ---- conversations ----------------------------------------------------------------------------------------------

    def recent(self, owner: str, query: str = "", before: str = "", limit: int = 50) -> dict[str, Any]:
        """Pinned ones first, then those that changed last. before: the `next` of an earlier answer."""
        with self.engine.connect() as connection:
            hits = words.find(connection, owner, query) if query.strip() else None
            chosen = select(CHATS).where(CHATS.c.owner == owner)
            order = (CHATS.c.pinned.desc(), CHATS.c.updated.desc(), CHATS.c.n.desc())
            # By position: pages of a list that moves meanwhile may repeat a chat, and never hide one that stood still.
            skip = int(before) if before.isdigit() else 0
            rows = connection.execute(chosen.order_by(*order)).mappings().all() if hits is not None else []
            if hits is not None:
                rows = [row for row in rows if row["n"] in hits][skip : skip + limit + 1]
            else:
                rows = connection.execute(chosen.order_by(*order).offset(skip).limit(limit + 1)).mappings().all()
            counts = self._counts(connection, [row["n"] for row in rows])
        chats = []
        for row in rows[:limit]:
            total, running = counts.get(row["n"], (0, 0))
            chat = {name: row[name] for name in ("id", "title", "pinned", "created", "updated")}
            chat |= {"model": row["settings"].get("model", ""), "messages": total, "running": bool(running)}
            if hits is not None:
                body, message = hits[row["n"]]
                piece, ranges = words.snippet(body, query)
                chat["match"] = {"text": piece, "ranges": ranges, "message": message}
            chats.append(chat)
        return {"chats": chats, "next": str(skip + limit) if len(rows) > limit else None}

    @staticmethod
    def _counts(connection: Connection, chats: Sequence[int]) -> dict[int, tuple[int, int]]:
        running = func.sum(func.cast(MESSAGES.c.status == RUNNING, MESSAGES.c.n.type))
        counted = select(MESSAGES.c.chat, func.count(), running).where(MESSAGES.c.chat.in_(chats))
        return {row[0]: (row[1], row[2]) for row in connection.execute(counted.group_by(MESSAGES.c.chat))}

    def create(self, owner: str, body: NewChat) -> dict[str, Any]:
        """The new chat, or the one of that id that was made already."""
        if body.id in RESERVED:
            raise RequestError(f"a chat cannot be called {body.id!r}", param="id")
        settings = body.settings.model_dump()
        with writing(self.engine) as connection:
            row = self.find_chat(connection, owner, body.id)
            if row is None:
                number = self.insert_chat(connection, owner, body.id, body.title, settings, time.time())
                words.put(connection, [(-number, body.title)])
                row = self.find_chat(connection, owner, body.id)
            assert row is not None
            return {**chat_json(row), "messages": self._messages(connection, row)}

    @staticmethod
    def insert_chat(
        connection: Connection, owner: str, chat: str, title: str, settings: Mapping[str, Any], created: float
    ) -> int:
        values = {
            "owner": owner, "id": chat, "title": title, "pinned": False, "created": created, "updated": time.time(),
            "settings": dict(settings), "head": None, "draft": "",
        }  # fmt: skip
        key = connection.execute(insert(CHATS).values(values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def get(self, owner: str, chat: str) -> dict[str, Any]:
        """The chat with all its messages."""
        with self.engine.connect() as connection:
            row = self.chat(connection, owner, chat)
            return {**chat_json(row), "messages": self._messages(connection, row)}

    def patch(self, owner: str, chat: str, body: ChatPatch) -> dict[str, Any]:
        """The chat without messages. Raises RequestError for a head that is no message of it."""
        given = body.model_fields_set
        with writing(self.engine) as connection:
            row = self.chat(connection, owner, chat)
            told = {name: getattr(body, name) for name in ("title", "pinned", "draft", "head") if name in given}
            values: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
            if "head" in values and self.find_message(connection, row, values["head"]) is None:
                raise RequestError(f"there is no message {values['head']!r} in this chat", param="head")
            if body.settings is not None:
                values["settings"] = ChatSettings(**row["settings"]).changed(body.settings).model_dump()
            if "title" in values:
                words.put(connection, [(-row["n"], values["title"])])
            if values:
                connection.execute(update(CHATS).where(CHATS.c.n == row["n"]).values(values))
            return chat_json({**row, **values})

    def delete(self, owner: str, chat: str) -> list[int]:
        """The numbers of its messages, so that what is running among them can be ended."""
        with writing(self.engine) as connection:
            row = self.chat(connection, owner, chat)
            numbers = list(connection.scalars(select(MESSAGES.c.n).where(MESSAGES.c.chat == row["n"])))
            attached = select(ATTACHED.c.file).join(MESSAGES, MESSAGES.c.n == ATTACHED.c.message)
            files = set(connection.scalars(attached.where(MESSAGES.c.chat == row["n"])))
            words.remove(connection, [-row["n"], *numbers])
            connection.execute(delete(CHATS).where(CHATS.c.n == row["n"]))
            kept = set(connection.scalars(select(ATTACHED.c.file).where(ATTACHED.c.file.in_(files))))
            connection.execute(delete(FILES).where(FILES.c.n.in_(files - kept)))
        return numbers

    # ---- messages ---------------------------------------------------------------------------------------------------

    def message(self, owner: str, chat: str, message: str) -> Message:
        with self.engine.connect() as connection:
            row = self.chat(connection, owner, chat)
            found = self.find_message(connection, row, message)
        if found is None:
            raise NotFound(f"there is no message {message!r} in this chat", param="message")
        return found

    def path(self, chat: int, leaf: str | None) -> list[Turn]:
        """From the first message to this one, with the texts of their files."""
        columns = (MESSAGES.c.n, MESSAGES.c.id, MESSAGES.c.parent, MESSAGES.c.role, MESSAGES.c.content)
        with self.engine.connect() as connection:
            # The tree first: texts of branches that are not asked for are not read.
            tree = connection.execute(select(*columns[:3]).where(MESSAGES.c.chat == chat))
            parents = {row.id: (row.parent, row.n) for row in tree}
            numbers: list[int] = []
            while leaf is not None and leaf in parents:
                leaf, number = parents.pop(leaf)
                numbers.append(number)
            rows: dict[int, Row[Any]] = {}
            for first in range(0, len(numbers), 500):
                some = connection.execute(select(*columns).where(MESSAGES.c.n.in_(numbers[first : first + 500])))
                rows |= {row.n: row for row in some}
            files = self._texts(connection, chat)
        chosen = (rows[n] for n in reversed(numbers))
        return [Turn(r.n, r.id, r.parent, r.role, r.content, files.get(r.n, ())) for r in chosen]

    def file_texts(self, owner: str, chat: str) -> dict[str, str]:
        """The texts of a chat's files, by the files' ids."""
        with self.engine.connect() as connection:
            row = self.chat(connection, owner, chat)
            chosen = select(FILES.c.id, FILES.c.text).join(ATTACHED, FILES.c.n == ATTACHED.c.file)
            chosen = chosen.join(MESSAGES, MESSAGES.c.n == ATTACHED.c.message).where(MESSAGES.c.chat == row["n"])
            return {found.id: found.text for found in connection.execute(chosen)}

    @staticmethod
    def _texts(connection: Connection, chat: int) -> dict[int, list[tuple[str, str]]]:
        chosen = select(ATTACHED.c.message, FILES.c.about, FILES.c.text).join(FILES, FILES.c.n == ATTACHED.c.file)
        chosen = chosen.join(MESSAGES, MESSAGES.c.n == ATTACHED.c.message).where(MESSAGES.c.chat == chat)
        texts: dict[int, list[tuple[str, str]]] = {}
        for row in connection.execute(chosen.order_by(ATTACHED.c.position)):
            texts.setdefault(row.message, []).append((row.about["name"], row.text))
        return texts

    # ---- what the other modules of this folder use, inside their transactions ---------------------------------------

    def chat(self, connection: Connection, owner: str, chat: str) -> Mapping[str, Any]:
        row = self.find_chat(connection, owner, chat)
        if row is None:
            raise NotFound(f"there is no chat {chat!r}", param="chat")
        return row

    @staticmethod
    def find_chat(connection: Connection, owner: str, chat: str) -> Mapping[str, Any] | None:
        chosen = select(CHATS).where(CHATS.c.owner == owner, CHATS.c.id == chat)
        row = connection.execute(chosen).mappings().one_or_none()
        return None if row is None else {**row}

    def find_message(self, connection: Connection, chat: Mapping[str, Any], message: str) -> Message | None:
        chosen = select(MESSAGES).where(MESSAGES.c.chat == chat["n"], MESSAGES.c.id == message)
        row = connection.execute(chosen).one_or_none()
        if row is None:
            return None
        return _message(row, chat["id"], self._files(connection, MESSAGES.c.n == row.n).get(row.n, []))

    def _messages(self, connection: Connection, chat: Mapping[str, Any]) -> list[dict[str, Any]]:
        rows = connection.execute(select(MESSAGES).where(MESSAGES.c.chat == chat["n"]).order_by(MESSAGES.c.n))
        files = self._files(connection, MESSAGES.c.chat == chat["n"])
        return [_message(row, chat["id"], files.get(row.n, [])).json() for row in rows]

    @staticmethod
    def _files(connection: Connection, which: Any) -> dict[int, list[dict[str, Any]]]:
        chosen = select(ATTACHED.c.message, FILES.c.about).join(FILES, FILES.c.n == ATTACHED.c.file)
        chosen = chosen.join(MESSAGES, MESSAGES.c.n == ATTACHED.c.message).where(which).order_by(ATTACHED.c.position)
        files: dict[int, list[dict[str, Any]]] = {}
        for row in connection.execute(chosen):
            files.setdefault(row.message, []).append(row.about)
        return files

    @staticmethod
    def insert_message(connection: Connection, chat: int, values: Mapping[str, Any], *, indexed: bool = True) -> int:
        """Its number. Not `indexed`: whoever inserts many puts their words into the index at once."""
        row = {
            "chat": chat, "parent": None, "created": time.time(), "content": "", "status": "done", "model": "",
            "worker": "", "wish": "", **values,
        }  # fmt: skip
        key = connection.execute(insert(MESSAGES).values(row)).inserted_primary_key
        assert key is not None
        if indexed and row["content"]:
            words.put(connection, [(key[0], row["content"])])
        return int(key[0])

    @staticmethod
    def touch(connection: Connection, chat: Mapping[str, Any], head: str, question: str = "") -> None:
        """The chat changed: this message is the one shown. A chat without a title is called by its first question."""
        values: dict[str, Any] = {"updated": time.time(), "head": head}
        if question and not chat["title"]:
            values["title"] = title_of(question)
            words.put(connection, [(-chat["n"], values["title"])])
        connection.execute(update(CHATS).where(CHATS.c.n == chat["n"]).values(values))


def _message(row: Row[Any], chat: str, files: list[dict[str, Any]]) -> Message:
    return Message(
        row.n, chat, row.id, row.parent, row.role, row.created, row.content, row.status, row.model, row.thinking,
        row.thinking_s, row.thinking_tokens, row.error, row.settings, row.usage, row.search, row.checks, row.worker, files,
    )  # fmt: skip


def checks_json(content: str, verdicts: Sequence[Any]) -> list[dict[str, Any]]:
    """Verdicts of `search.check.check_text` as the page reads them."""
    return [
        {
            "start": utf16(content, v.start), "end": utf16(content, v.end), "citations": list(v.citations),
            "found": v.found, "reason": v.reason, "missing": list(v.missing),
        }
        for v in verdicts
    ]  # fmt: skip
