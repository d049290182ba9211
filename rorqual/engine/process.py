"""The engine in a process of its own, behind the Engine protocol. Importing this loads no torch; the child does.

Why a process: a forward holds the interpreter for milliseconds, and an HTTP server that shares it stalls every
stream; and a model that dies (out of memory, a broken driver) must not take the server with it.

    parent                                    child
    generate() --("add", request)-----------> inbox thread -> queue -> main thread: core.add, core.step
      its asyncio.Queue <-- reader thread <--("outputs", ([...], stats)) one message for all outputs of a step

One connection, nothing shared. Endings that must not go wrong:
 - the reader of a request leaves: its generator's `finally` sends ("abort", id);
 - the child dies: its end of the connection closes, every pending request ends with an error, `alive` is False;
 - the parent dies, killed or not: the child's inbox thread reads end-of-file and exits at once, mid-step if need be;
 - the child hangs: `stop` asks, then terminates, then kills.

Left out: restarting a dead child (`engine.supervisor` does), shared memory (messages are small).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from copy import copy
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

from rorqual.engine.api import EngineInfo, FinishReason, Output, Request, check_request
from rorqual.engine.core import EngineCore
from rorqual.engine.settings import EngineSettings
from rorqual.engine.stats import EngineStats
from rorqual.errors import CapacityError, EngineDied, RequestError, RorqualError

log = logging.getLogger(__name__)

Build = Callable[[EngineSettings], EngineCore]


def load(settings: EngineSettings) -> EngineCore:
    """The default `build`: imports torch, in the child."""
    from rorqual.engine.load import load_core

    return load_core(settings)


class EngineProcess:
    """`start` and `generate` belong to one event loop. build: makes the core inside the child (a module-level function;
    tests pass one that needs no model); grace_s: how long `stop` waits before it uses force."""

    def __init__(self, settings: EngineSettings, *, build: Build = load, grace_s: float = 5.0) -> None:
        self.settings, self.grace_s = settings, grace_s
        self._build = build
        self._info: EngineInfo | None = None
        self.stats = EngineStats()
        """As of the last output."""
        self._error: RorqualError | None = RorqualError("the engine has not been started")
        self._pending: dict[str, asyncio.Queue[Output]] = {}
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._stopping = False
        self._numbers = count()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise copy(self._error) if self._error else RorqualError("the engine is still starting")
        return self._info

    @property
    def alive(self) -> bool:
        return self._error is None

    @property
    def ready(self) -> bool:
        return self.alive

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Returns when the model is loaded. Raises the child's own error (CheckpointError, ...) if it cannot be, and
        RorqualError when called a second time: a new engine is a new object."""
        if self._process is not None:
            raise RorqualError("the engine was started before", remedy="create a new EngineProcess")
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[EngineInfo] = loop.create_future()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        level = logging.getLogger("rorqual").getEffectiveLevel()
        self._process = context.Process(
            target=_child, args=(theirs, self._build, self.settings, level), name="rorqual-engine", daemon=True
        )
        self._process.start()
        theirs.close()  # or the child's end would stay open here, and its death would go unnoticed
        threading.Thread(target=self._read, args=(ours, loop, ready), name="engine-reader", daemon=True).start()
        threading.Thread(target=self._write, args=(ours,), name="engine-writer", daemon=True).start()
        try:
            self._info = await ready
            self._error = None
        except BaseException as error:
            self._error = error if isinstance(error, RorqualError) else self._error
            await self.stop()
            raise

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if self._error is not None:
            raise copy(self._error)  # a copy: an exception raised again and again grows its traceback
        check_request(request, self.info)
        room = self.settings.max_num_seqs + self.settings.max_waiting
        if len(self._pending) >= room:
            raise CapacityError(f"{room} requests are running or waiting already", remedy="try again later")
        return self._outputs(request)

    async def _outputs(self, request: Request) -> AsyncGenerator[Output, None]:
        if self._error is not None:  # it died between generate() and the first output
            yield Output(request.id, finish_reason=FinishReason.ERROR, error=self._error)
            return
        inbox: asyncio.Queue[Output] = asyncio.Queue()
        # The child gets an id of its own, or late news of an aborted request could reach a new one of the same name.
        key = f"{request.id}#{next(self._numbers)}"
        self._pending[key] = inbox
        self._outbox.put(("add", replace(request, id=key)))
        finished = False
        try:
            while not finished:
                output = await inbox.get()
                if output.finish_reason is not None:
                    finished = True
                    self._pending.pop(key, None)
                yield replace(output, request_id=request.id)
        finally:
            if not finished:
                self._pending.pop(key, None)
                self._outbox.put(("abort", key))

    async def stop(self) -> None:
        process, self._stopping = self._process, True
        self._give_up(RorqualError("the engine was stopped"))
        if process is None:
            return
        if self._info is not None:  # else it is loading and reads no messages
            self._outbox.put(("stop",))
            await asyncio.to_thread(process.join, self.grace_s)
        if process.exitcode is None:
            log.warning("the engine process has not stopped by itself: killing it")
            process.kill()
            await asyncio.to_thread(process.join, self.grace_s)
        self._outbox.put(None)

    def _give_up(self, error: RorqualError) -> None:
        """Nothing more will come: every pending request ends here."""
        self._error = self._error or error
        for request_id, inbox in self._pending.items():
            inbox.put_nowait(Output(request_id, finish_reason=FinishReason.ERROR, error=self._error))
        self._pending.clear()

    def _deliver(self, news: tuple[list[Output], EngineStats]) -> None:
        outputs, self.stats = news
        for output in outputs:
            inbox = self._pending.get(output.request_id)
            if inbox is not None:  # else its reader left while the output was on its way
                inbox.put_nowait(output)

    def _died(self, ready: asyncio.Future[EngineInfo]) -> None:
        process = self._process
        assert process is not None
        self._outbox.put(None)
        error = EngineDied(
            f"the engine process ended unexpectedly (exit code {process.exitcode})",
            remedy="its log lines say why; -9 mostly means that memory ran out",
        )
        if not ready.done():
            ready.set_exception(error)
        elif not self._stopping:
            log.error("%s; %d requests end with it", error, len(self._pending))
            self._give_up(error)

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop, ready: asyncio.Future[EngineInfo]) -> None:
        """Reader thread: everything it learns is handed to the event loop's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            while True:
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    break
                if kind == "outputs":
                    loop.call_soon_threadsafe(self._deliver, value)
                else:
                    settle = ready.set_result if kind == "ready" else ready.set_exception
                    loop.call_soon_threadsafe(_if_open, ready, settle, value)
            assert self._process is not None
            wait([self._process.sentinel], timeout=1.0)  # so that there is an exit code to report
            loop.call_soon_threadsafe(self._died, ready)

    def _write(self, connection: Connection) -> None:
        """Writer thread: a child that does not read must not block the event loop."""
        with contextlib.suppress(OSError, ValueError):
            while (message := self._outbox.get()) is not None:
                connection.send(message)


def _if_open(future: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
    if not future.done():
        settle(value)


# ---- in the child -------------------------------------------------------------------------------------------------


def _child(connection: Connection, build: Build, settings: EngineSettings, log_level: int) -> None:
    # Ctrl-C and a service manager's SIGTERM go to the whole group; the parent decides what they mean, and a parent that
    # is gone shows in the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format="%(levelname)s %(name)s: %(message)s")
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    try:
        core = build(settings)
    except Exception as error:
        if not isinstance(error, RorqualError):
            log.exception("the engine could not be started")
        connection.send(("failed", _portable(error)))
        return
    connection.send(("ready", core.info))
    _serve(core, connection, inbox)
    core.close()


def _receive(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """The parent is gone when the connection ends, whatever the main thread is doing then."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _serve(core: EngineCore, connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Take messages (waiting for one only when there is nothing to compute), step, tell; until told to stop."""
    while True:
        refused: list[Output] = []
        while not inbox.empty() or not (core.busy or refused):
            match inbox.get():
                case ("add", Request() as request):
                    try:
                        core.add(request)
                    except RequestError as error:
                        refused.append(Output(request.id, finish_reason=FinishReason.ERROR, error=error))
                case ("abort", str(request_id)):
                    core.abort(request_id)
                case ("stop",):
                    return
        outputs = refused + core.step()
        if outputs:
            connection.send(("outputs", (outputs, core.stats)))


def _portable(error: Exception) -> RorqualError:
    """Our own errors pickle; of others only the text is sure to."""
    if isinstance(error, RorqualError):
        return error
    return RorqualError(f"the engine could not be started: {type(error).__name__}: {error}")
