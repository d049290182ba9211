"""The conversations of one server: what the routes and the terminal call.

Answers that run here are in `_running`; those of other processes on the same database are read from it. When the server
stops, what still runs is written down as cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from rorqual.plan.prices import DEEPSEEK
from rorqual.serve.callers import Caller
from rorqual.serve.chats.answering import Answering, Tools
from rorqual.serve.chats.files import TYPES
from rorqual.serve.chats.live import Frame, Live, once
from rorqual.serve.chats.shapes import (
    CONTENT_CHARS,
    FILES_PER_MESSAGE,
    TITLE_CHARS,
    Continuation,
    Message,
    NewAnswer,
    NewQuestion,
)
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.voices import Voice
from rorqual.serve.chats.work import Work
from rorqual.serve.database import twice
from rorqual.serve.searching import Searcher

log = logging.getLogger(__name__)
BEAT_S = 3.0
LOOK_S = 0.5
STOP_S = 10.0
T = TypeVar("T")


class Chats:
    """`hold(caller)` counts an answer among what the server is doing and returns what ends that; file_bytes: the largest
    upload."""

    def __init__(
        self,
        store: ChatStore,
        voice: Voice,
        searcher: Searcher | None = None,
        *,
        default_model: str = "",
        file_bytes: int = 8 << 20,
        heartbeat_s: float = 10.0,
        hold: Callable[[Caller], Callable[[], None]] = lambda caller: lambda: None,
    ) -> None:
        self.store = store
        self.voice = voice
        self.searcher = searcher
        self.file_bytes = file_bytes
        self.work = Work(store, default_model)
        self._tools = Tools(self.work, voice, searcher)
        self._heartbeat_s = heartbeat_s
        self._hold = hold
        self._running: dict[int, tuple[Answering, asyncio.Task[None]]] = {}
        self._beating: asyncio.Task[None] | None = None

    # ---- starting and stopping --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens the database and marks what a killed process left. Raises ConfigError where it cannot be opened."""
        await asyncio.to_thread(self.work.beat)
        self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await asyncio.to_thread(self.work.beat)
            except SQLAlchemyError as error:
                log.error("no sign of life could be written: %s", error)

    async def stop(self) -> None:
        if self._beating is None:
            return
        running = list(self._running.values())
        for answering, _ in running:
            answering.wish("cut")
        if running:  # what cannot be written down by then is cut as by a kill
            await asyncio.wait([task for _, task in running], timeout=STOP_S)
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self._beating = None
        await asyncio.to_thread(self.work.leave)

    # ---- asking -----------------------------------------------------------------------------------------------------

    async def ask(self, owner: str, caller: Caller, chat: str, body: NewQuestion) -> tuple[Message, Message]:
        """The question and its answer, which has begun, or had when this was asked before."""

        async def whole() -> tuple[Message, Message]:
            question, answer, begun = await asyncio.to_thread(twice, self.work.ask, owner, chat, body)
            return question, await self._begin(answer, begun, caller)

        return await _undisturbed(whole())

    async def answer(self, owner: str, caller: Caller, chat: str, body: NewAnswer) -> Message:
        """Another answer to a question that is there."""

        async def whole() -> Message:
            return await self._begin(*await asyncio.to_thread(twice, self.work.answer, owner, chat, body), caller)

        return await _undisturbed(whole())

    async def go_on(self, owner: str, caller: Caller, chat: str, message: str, body: Continuation) -> Message:
        """The same answer, or a sibling with another beginning."""
        over = body.thinking is not None and body.content is not None

        async def whole() -> Message:
            answer, begun = await asyncio.to_thread(twice, self.work.go_on, owner, chat, message, body)
            return await self._begin(answer, begun, caller, answers_now=over)

        return await _undisturbed(whole())

    async def _begin(self, message: Message, begun: bool, caller: Caller, *, answers_now: bool = False) -> Message:
        if not begun:
            return self._current(message)
        try:
            chat = await asyncio.to_thread(self.work.chat_number, message)
            path = await asyncio.to_thread(self.store.path, chat, message.parent)
        except BaseException:
            message.status = "cut"
            await asyncio.to_thread(self.work.finish, message)
            raise
        live = Live(message)
        answering = Answering(live, path, caller, self._tools, answers_now=answers_now)
        release = self._hold(caller)
        task = asyncio.create_task(answering.run())
        self._running[message.n] = answering, task

        def ended(_: asyncio.Task[None]) -> None:
            self._running.pop(message.n, None)
            release()

        task.add_done_callback(ended)
        return live.snapshot()

    # ---- while it runs ----------------------------------------------------------------------------------------------

    async def stop_answer(self, owner: str, chat: str, message: str, *, thinking: bool = False) -> Message:
        """The answer as it stands once it has stopped, or, for `thinking`, while it goes on."""
        found = await self._find(owner, chat, message)
        running = self._running.get(found.n)
        if running is None:
            if found.running:
                await asyncio.to_thread(self.work.wish, found, "answer" if thinking else "stop")
            return found
        answering, task = running
        answering.wish("answer" if thinking else "stop")
        if not thinking:
            await asyncio.wait([task], timeout=STOP_S)
        return answering.live.snapshot()

    async def delete(self, owner: str, chat: str) -> None:
        for number in await asyncio.to_thread(self.store.delete, owner, chat):
            if number in self._running:
                self._running[number][0].wish("gone")

    async def message(self, owner: str, chat: str, message: str) -> Message:
        return self._current(await self._find(owner, chat, message))

    async def _find(self, owner: str, chat: str, message: str) -> Message:
        """As the database has it. One of ours that runs there and not here any more ended while it was read."""
        for pause_s in (0.01, 0.1, 1.0, 0.0):
            found: Message = await asyncio.to_thread(self.store.message, owner, chat, message)
            if not found.running or found.worker != self.work.id or found.n in self._running:
                break
            await asyncio.sleep(pause_s)
        return found

    async def chat(self, owner: str, chat: str) -> dict[str, Any]:
        """With what runs here up to this moment."""
        # Those that run before it is read, too: they may end meanwhile.
        running = [answering.live for answering, _ in self._running.values()]
        found: dict[str, Any] = await asyncio.to_thread(self.store.get, owner, chat)
        running += [answering.live for answering, _ in self._running.values()]
        live = {one.message.id: one for one in running}
        for i, message in enumerate(found["messages"]):
            here = live.get(message["id"]) if message["status"] == "running" else None
            if here is not None and here.message.chat == chat:
                found["messages"][i] = here.settle().json()
        return found

    def _current(self, message: Message) -> Message:
        running = self._running.get(message.n)
        return running[0].live.snapshot() if running else message

    async def events(self, owner: str, chat: str, message: str) -> AsyncGenerator[Frame | None, None]:
        """What is told of an answer from now on. Raises NotFound at once."""
        found = await self._find(owner, chat, message)
        running = self._running.get(found.n)
        if running is not None:
            return running[0].live.frames(self._heartbeat_s)
        look: Callable[[], Awaitable[Message]] = lambda: asyncio.to_thread(self.store.message, owner, chat, message)  # noqa: E731
        return self._elsewhere(found, look) if found.running else once(found)

    async def _elsewhere(
        self, message: Message, look: Callable[[], Awaitable[Message]]
    ) -> AsyncGenerator[Frame | None, None]:
        """An answer that another process writes: what it has written down, as it does."""
        position = 0
        while True:
            yield position, {"type": "state", "message": message.json()}
            position += 1
            if not message.running:
                yield position, {"type": "end", "message": message.json()}
                return
            before = message.json()
            while message.json() == before:
                await asyncio.sleep(LOOK_S)
                message = await look()
                yield None

    # ---- what the page asks first -----------------------------------------------------------------------------------

    async def setup(self) -> dict[str, Any]:
        cards = await self.voice.models()
        searcher = self.searcher
        return {
            "models": [card.json() for card in cards],
            "default_model": cards[0].id if cards else None,
            "search": {
                "available": searcher is not None,
                "provider": searcher.provider.name if searcher else None,
                "local_index": searcher is not None and searcher.local,
            },
            "prices": [
                {"name": p.name, "input_miss": p.input_miss, "input_hit": p.input_hit, "output": p.output, "since": p.since}
                for p in DEEPSEEK
            ],
            "limits": {
                "file_bytes": self.file_bytes, "files_per_message": FILES_PER_MESSAGE, "content_chars": CONTENT_CHARS,
                "title_chars": TITLE_CHARS,
            },
            "upload_types": list(TYPES),
        }  # fmt: skip


async def _undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """To its end, even where whoever waits is cancelled: no answer may be begun that nobody writes."""
    return await asyncio.shield(asyncio.create_task(work))
