"""Between an event stream and an HTTP client: waiting, heartbeats, deadlines, and clients that go away.

`Attended` runs the event stream in a task of its own and watches the connection in another, so that a
client's departure cancels the engine's request in the moment it is noticed, even while the request waits in a
queue and nothing is written; a non-streaming call is attended the same way. `EventStream` writes server-sent
events from it.

The status line is held back until the first event or the first heartbeat, whichever comes first: what is
refused at once (prompt too long, queue full) is an HTTP error even for a streaming call, and only later
trouble is an error event. The events wait in a queue without a limit of its own: a request's own max_tokens
bounds it, and the engine never waits for a client that reads slowly. What has queued up goes out in one piece.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Protocol

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rorqual.serve.errors import ApiError, log_fault, to_api_error
from rorqual.serve.events import Event
from rorqual.serve.settings import Settings

log = logging.getLogger(__name__)
KEEP_ALIVE = b": keep-alive\n\n"
SHUTTING_DOWN = ApiError(503, "The server is shutting down.")


class Dialect(Protocol):
    """How one API spells the event stream: bytes of whole server-sent events, the closing ones included."""

    def encode(self, event: Event) -> bytes: ...

    def encode_error(self, error: ApiError) -> bytes: ...


class Attended:
    """`async with Attended(...) as events: async for event in events` gives events, None for a heartbeat.

    Raises what the event stream raises, ClientDisconnect when the client is gone, HTTPException 504 at the
    deadline. When the block is left the event stream is closed.
    """

    def __init__(self, events: AsyncGenerator[Event, None], receive: Receive, settings: Settings) -> None:
        self._events = events
        self._receive = receive
        self._settings = settings
        self._news: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._end: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Attended:
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._deadline = self._heard + self._settings.request_timeout_s
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch())
        self._tick()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # A second one would interrupt what the first makes it do: a connection to an upstream would never be closed.
        if not self._reader.cancelling():
            self._reader.cancel()
        self._watcher.cancel()
        await asyncio.gather(self._reader, self._watcher, return_exceptions=True)
        await self._events.aclose()  # a reader cancelled before its first step never entered the generator

    async def __aiter__(self) -> AsyncIterator[Event | None]:
        while True:
            news = self._end or await self._news.get()
            if isinstance(news, StopAsyncIteration):
                return
            if isinstance(news, BaseException):
                raise news
            yield news

    def waiting(self) -> Iterator[Event | None]:
        """What has come in the meantime, for whoever can take several at once."""
        while self._end is None and not self._news.empty():
            news = self._news.get_nowait()
            if isinstance(news, BaseException):
                self._end = news
            else:
                yield news

    def _tick(self) -> None:
        """Heartbeats and the deadline, by one timer that runs on past the news: setting one for each event would cost more
        than the event does."""
        now = self._loop.time()
        if now >= self._deadline:
            limit = f"The request did not end within {self._settings.request_timeout_s:g} seconds."
            # openai-python's header; without it, it would wait as long again.
            self._news.put_nowait(HTTPException(504, limit, {"x-should-retry": "false"}))
            return
        if now - self._heard >= self._settings.heartbeat_s:
            self._heard = now
            if self._news.empty():
                self._news.put_nowait(None)
        self._timer = self._loop.call_at(min(self._heard + self._settings.heartbeat_s, self._deadline), self._tick)

    async def _read(self) -> None:
        try:
            async for event in self._events:
                self._heard = self._loop.time()
                self._news.put_nowait(event)
        except Exception as error:
            self._news.put_nowait(error)
        else:
            self._news.put_nowait(StopAsyncIteration())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._reader.cancel()
        self._news.put_nowait(ClientDisconnect())


class EventStream(Response):
    """Server-sent events as a response. What fails before anything was written is raised, and becomes an HTTP error."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        dialect: Dialect,
        settings: Settings,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Not super().__init__: it renders a body and its length, and here there is neither.
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self._events = events
        self._dialect = dialect
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Every other deadline waits for the engine; this one is for a client that stays and does not read.
            async with asyncio.timeout(self._settings.request_timeout_s + self._settings.heartbeat_s) as patience:
                await self._stream(scope, receive, send, patience)
        except TimeoutError:
            if not patience.expired():
                raise
            log.warning("%s: the client has stopped reading and is left", scope.get("request_id", "a request"))

    async def _stream(self, scope: Scope, receive: Receive, send: Send, patience: asyncio.Timeout) -> None:
        started = False
        last: BaseException | None = None
        try:
            async with Attended(self._events, receive, self._settings) as events:
                async for event in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await self._write(send, b"".join(map(self._spell, (event, *events.waiting()))))
        except ClientDisconnect:
            if not started:
                raise
        except (Exception, asyncio.CancelledError) as error:
            if patience.expired() or not started:
                raise
            last = error
        if last is not None:
            await self._write(send, self._dialect.encode_error(self._explain(last, scope)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if isinstance(last, asyncio.CancelledError):
            raise last

    def _spell(self, event: Event | None) -> bytes:
        return KEEP_ALIVE if event is None else self._dialect.encode(event)

    @staticmethod
    async def _write(send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    @staticmethod
    def _explain(error: BaseException, scope: Scope) -> ApiError:
        if isinstance(error, asyncio.CancelledError):  # only the server's own shutdown cancels a request
            return SHUTTING_DOWN
        api_error = to_api_error(error)
        if api_error.status >= 500:
            log_fault(log, scope.get("request_id", "a request"), error)
        return api_error
