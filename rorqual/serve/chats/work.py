"""The life of an answer in the database: begun, written down as it grows, ended; and what a killed process left.

An answer is begun in one transaction with its question, under ids that the client made: the same request a second time
finds them and begins nothing. While it runs it belongs to one process (`worker`), which gives a sign of life now and then.
Whoever starts, and every server now and then, looks for answers whose process is gone and marks them as cut. A process that
was only slow finds its answer marked, and ends it all the same.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from rorqual.errors import Conflict, NotFound, RequestError
from rorqual.serve.chats import words
from rorqual.serve.chats.shapes import (
    RESUMABLE,
    RUNNING,
    AnswerSpec,
    ChatSettings,
    Continuation,
    Message,
    NewAnswer,
    NewQuestion,
)
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.tables import ATTACHED, FILES, MESSAGES, WORKERS
from rorqual.serve.database import writing

LEASE_S = 10.0
FOREIGN_LEASE_S = 30.0  # another machine's clock may differ


class Work:
    """One process's answers. `default_model` names the model of a chat that names none."""

    def __init__(self, store: ChatStore, default_model: str) -> None:
        self.store = store
        self.id = uuid.uuid4().hex
        self._default_model = default_model

    # ---- beginning --------------------------------------------------------------------------------------------------

    def ask(self, owner: str, chat: str, body: NewQuestion) -> tuple[Message, Message, bool]:
        """Question, answer, and whether the answer was begun now."""
        with writing(self.store.engine) as connection:
            row = self.store.chat(connection, owner, chat)
            question = self.store.find_message(connection, row, body.id)
            if question is None:
                self._require(connection, row, body.parent, "assistant")
                if not body.content.strip() and not body.files:
                    raise RequestError("the question is empty", remedy="write something", param="content")
                values = {"id": body.id, "parent": body.parent, "role": "user", "content": body.content}
                number = self.store.insert_message(connection, row["n"], values)
                self._attach(connection, owner, number, body.files)
                question = self.store.find_message(connection, row, body.id)
                assert question is not None
            same = (question.role, question.parent, question.content, [f["id"] for f in question.files])
            if same != ("user", body.parent, body.content, body.files):
                raise Conflict(f"the id {body.id!r} is taken by another message", param="id")
            answer, begun = self._begin(connection, row, body.answer, question.id)
            if begun:
                self.store.touch(connection, row, answer.id, body.content or question.files[0]["name"])
        return question, answer, begun

    def answer(self, owner: str, chat: str, body: NewAnswer) -> tuple[Message, bool]:
        """Another answer to a question of the chat."""
        with writing(self.store.engine) as connection:
            row = self.store.chat(connection, owner, chat)
            self._require(connection, row, body.parent, "user")
            answer, begun = self._begin(connection, row, AnswerSpec(id=body.id, settings=body.settings), body.parent)
            if begun:
                self.store.touch(connection, row, answer.id)
        return answer, begun

    def go_on(self, owner: str, chat: str, message: str, body: Continuation) -> tuple[Message, bool]:
        """The same answer, running again, or a sibling that begins with the given thought and text."""
        with writing(self.store.engine) as connection:
            row = self.store.chat(connection, owner, chat)
            old = self.store.find_message(connection, row, message)
            if old is None or old.role != "assistant":
                raise NotFound(f"there is no answer {message!r} in this chat", param="message")
            if body.thinking is None and body.content is None:
                return self._resume(connection, row, old)
            if body.id is None:
                raise RequestError("a changed answer is a new message and needs an id", param="id")
            if (known := self.store.find_message(connection, row, body.id)) is not None:
                if known.parent != old.parent or known.role != "assistant":
                    raise Conflict(f"the id {body.id!r} is taken by another message", param="id")
                return known, False
            values = {
                "id": body.id, "parent": old.parent, "role": "assistant", "status": RUNNING, "worker": self.id,
                "model": old.model, "settings": old.settings, "search": old.search,
                "thinking": old.thinking if body.thinking is None else body.thinking or None,
                "thinking_s": old.thinking_s, "thinking_tokens": old.thinking_tokens, "content": body.content or "",
            }  # fmt: skip
            self.store.insert_message(connection, row["n"], values)
            self.store.touch(connection, row, body.id)
            sibling = self.store.find_message(connection, row, body.id)
            assert sibling is not None
        return sibling, True

    def _resume(self, connection: Connection, chat: Mapping[str, Any], old: Message) -> tuple[Message, bool]:
        if old.running:
            return old, False
        if old.status not in RESUMABLE:
            raise Conflict("this answer is complete", remedy="ask for another one instead", param="message")
        values = {"status": RUNNING, "worker": self.id, "wish": "", "error": None, "checks": None}
        connection.execute(update(MESSAGES).where(MESSAGES.c.n == old.n).values(values))
        self.store.touch(connection, chat, old.id)
        old.status, old.worker, old.error, old.checks = RUNNING, self.id, None, None
        return old, True

    def _begin(
        self, connection: Connection, chat: Mapping[str, Any], spec: AnswerSpec, parent: str
    ) -> tuple[Message, bool]:
        known = self.store.find_message(connection, chat, spec.id)
        if known is not None:
            if known.parent != parent or known.role != "assistant":
                raise Conflict(f"the id {spec.id!r} is taken by another message", param="id")
            return known, False
        settings = ChatSettings(**chat["settings"]).changed(spec.settings)
        settings = settings.model_copy(update={"model": settings.model or self._default_model})
        values = {
            "id": spec.id, "parent": parent, "role": "assistant", "status": RUNNING, "worker": self.id,
            "model": settings.model, "settings": settings.model_dump(),
        }  # fmt: skip
        self.store.insert_message(connection, chat["n"], values)
        begun = self.store.find_message(connection, chat, spec.id)
        assert begun is not None
        return begun, True

    def _require(self, connection: Connection, chat: Mapping[str, Any], parent: str | None, role: str) -> None:
        if parent is None:
            return
        found = self.store.find_message(connection, chat, parent)
        if found is None or found.role != role:
            raise NotFound(f"there is no {role} message {parent!r} in this chat", param="parent")
        if found.running:
            raise Conflict("the answer before is still being written", remedy="wait for it, or stop it", param="parent")

    @staticmethod
    def _attach(connection: Connection, owner: str, message: int, files: Sequence[str]) -> None:
        if len(set(files)) < len(files):
            raise RequestError("a file is attached twice", param="files")
        for position, file in enumerate(files):
            number = connection.scalar(select(FILES.c.n).where(FILES.c.id == file, FILES.c.owner == owner))
            if number is None:
                raise NotFound(f"there is no file {file!r}", remedy="upload it again", param="files")
            connection.execute(insert(ATTACHED).values(message=message, position=position, file=number))

    def chat_number(self, message: Message) -> int:
        with self.store.engine.connect() as connection:
            return int(connection.scalar(select(MESSAGES.c.chat).where(MESSAGES.c.n == message.n)) or 0)

    # ---- going on and ending ----------------------------------------------------------------------------------------

    def save(self, message: Message) -> str | None:
        """Write down what there is. What somebody wishes of it ("", "stop" or "answer"); None: it was deleted."""
        with writing(self.store.engine) as connection:
            wish = connection.scalar(select(MESSAGES.c.wish).where(MESSAGES.c.n == message.n))
            connection.execute(update(MESSAGES).where(MESSAGES.c.n == message.n).values(_progress(message)))
        return wish

    def finish(self, message: Message) -> None:
        """The last word on an answer of this process."""
        with writing(self.store.engine) as connection:
            mine = (MESSAGES.c.n == message.n, MESSAGES.c.worker == self.id)
            values = {**_progress(message), "status": message.status, "error": message.error, "wish": ""}
            if connection.execute(update(MESSAGES).where(*mine).values(values)).rowcount:
                words.put(connection, [(message.n, message.content)])

    def wish(self, message: Message, wish: str) -> None:
        """Tell the process that writes it."""
        with writing(self.store.engine) as connection:
            connection.execute(update(MESSAGES).where(MESSAGES.c.n == message.n).values(wish=wish))

    def granted(self, message: Message) -> None:
        self.wish(message, "")

    # ---- who is alive -----------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """A sign of life, and the answers of the dead marked as cut."""
        now = time.time()
        with writing(self.store.engine) as connection:
            mine = update(WORKERS).where(WORKERS.c.id == self.id).values(beat=now)
            if not connection.execute(mine).rowcount:
                values = {"id": self.id, "host": platform.node(), "pid": os.getpid(), "beat": now}
                connection.execute(insert(WORKERS).values(values))
            workers = connection.execute(select(WORKERS)).all()
            living = [row.id for row in workers if row.id == self.id or _lives(row, now)]
            orphaned = (MESSAGES.c.status == RUNNING, MESSAGES.c.worker.not_in(living))
            lost = connection.execute(select(MESSAGES.c.n, MESSAGES.c.content).where(*orphaned)).all()
            if lost:
                numbers = [row.n for row in lost]
                cut = update(MESSAGES).where(MESSAGES.c.n.in_(numbers)).values(status="cut", wish="")
                connection.execute(cut)
                words.put(connection, [(row.n, row.content) for row in lost])
            connection.execute(delete(WORKERS).where(WORKERS.c.id.not_in(living)))

    def leave(self) -> None:
        """This process ends in good order."""
        with writing(self.store.engine) as connection:
            connection.execute(delete(WORKERS).where(WORKERS.c.id == self.id))


def _progress(message: Message) -> dict[str, Any]:
    names = ("content", "thinking", "thinking_s", "thinking_tokens", "usage", "search", "checks", "model", "settings")
    return {name: getattr(message, name) for name in names}


def _lives(worker: Row[Any], now: float) -> bool:
    if worker.host != platform.node():
        return bool(now - worker.beat < FOREIGN_LEASE_S)
    if worker.pid != os.getpid() and os.name == "posix":  # elsewhere signal 0 is no question
        try:
            os.kill(worker.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # it lives and is somebody else's
            pass
    return bool(now - worker.beat < LEASE_S)  # a number may be given again
