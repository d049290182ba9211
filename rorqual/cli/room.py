"""The server's inside without its network: engines and conversations in an event loop of their own thread, so that the main
thread can wait for a person and be interrupted by Ctrl-C."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from fastapi import FastAPI

    from rorqual.serve.chats.files import Files
    from rorqual.serve.chats.live import Frame
    from rorqual.serve.chats.service import Chats

T = TypeVar("T")


class Room:
    """`with Room(app) as room`: started inside, ended in good order after."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat", daemon=True)
        self._ending: asyncio.Event | None = None
        self._ended: Any = None

    @property
    def chats(self) -> Chats:
        chats: Chats = self._app.state.chats
        return chats

    @property
    def files(self) -> Files:
        files: Files = self._app.state.files
        return files

    def __enter__(self) -> Self:
        """Raises what an engine raises that cannot start."""
        self._thread.start()
        started = threading.Event()
        self._ended = asyncio.run_coroutine_threadsafe(self._live(started), self._loop)
        while not started.wait(0.05):
            if self._ended.done():
                self._ended.result()
        return self

    async def _live(self, started: threading.Event) -> None:
        self._ending = asyncio.Event()
        async with self._app.router.lifespan_context(self._app):
            started.set()
            await self._ending.wait()

    def __exit__(self, *_: object) -> None:
        if self._ending is not None:
            self._loop.call_soon_threadsafe(self._ending.set)
            self._ended.result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def frames(self, owner: str, chat: str, message: str) -> Iterator[dict[str, Any]]:
        """An answer's events. Interrupted, it can be asked again."""
        news: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()

        async def listen() -> None:
            try:
                frames: AsyncGenerator[Frame | None, None] = await self.chats.events(owner, chat, message)
                async with aclosing(frames):
                    async for frame in frames:
                        if frame is not None:
                            news.put(frame[1])
                news.put(None)
            except BaseException as error:
                news.put(error)
                raise

        listening = asyncio.run_coroutine_threadsafe(listen(), self._loop)
        try:
            while True:
                try:
                    item = news.get(timeout=0.2)  # a wait without end would not be interrupted everywhere
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            listening.cancel()
