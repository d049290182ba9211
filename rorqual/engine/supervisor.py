"""An engine that is started again when it dies. The Engine protocol over the Engine protocol; no torch, no processes.

    engine = SupervisedEngine(lambda: EngineProcess(settings))

What becomes of the requests that a dead engine had:
 - one whose client has seen tokens ends with the engine's error: the rest of its answer is lost, and starting it again
   would say the beginning twice;
 - one that had nothing yet (in the queue, or its prompt half read) goes to the next engine and its client notices a
   pause. But once only: if that engine dies too, this request may be what kills them, and it ends with the error;
 - new ones wait while there is no engine, as many as `max_waiting`.

`alive` stays true while a new engine is being made, so that a liveness probe does not kill the server that is healing;
`ready` does not. After `attempts` deaths in a row, each within `settled_s` of its start, it gives up: every waiting
request and every later one gets the last error, and `alive` is false.

Left out: going on with a half-written answer. The tokens are known here and could be sent along as the prompt, but a
grammar's state, penalties and log-probabilities would have to be replayed exactly for it to be the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from copy import copy
from dataclasses import replace

from rorqual.engine.api import Engine, EngineInfo, FinishReason, Output, Request, check_request
from rorqual.engine.stats import EngineStats
from rorqual.errors import CapacityError, RorqualError

log = logging.getLogger(__name__)
_Attempt = tuple[Engine, AsyncGenerator[Output, None]]


class SupervisedEngine:
    """make: a new engine, not started; pause_s: before the first restart, doubled with each death in a row up to
    `longest_pause_s`; look_s: how often an idle engine is looked at."""

    def __init__(
        self,
        make: Callable[[], Engine],
        *,
        attempts: int = 5,
        settled_s: float = 60.0,
        pause_s: float = 0.5,
        longest_pause_s: float = 30.0,
        max_waiting: int = 1024,
        look_s: float = 0.2,
    ) -> None:
        self.restarts = 0
        self._make = make
        self._attempts, self._settled_s, self._look_s = attempts, settled_s, look_s
        self._pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._max_waiting, self._waiting = max_waiting, 0
        self._engine = make()
        self._error: RorqualError | None = RorqualError("the engine has not been started")
        self._up = asyncio.Event()  # an engine runs, or none ever will again
        self._info: EngineInfo | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        return self._info or self._engine.info

    @property
    def stats(self) -> EngineStats:
        """Of the present engine: its counts begin at zero after a restart."""
        return replace(self._engine.stats, restarts=self.restarts)

    @property
    def alive(self) -> bool:
        return self._error is None

    @property
    def ready(self) -> bool:
        return self.alive and self._engine.ready

    async def start(self) -> None:
        """Raises the engine's own error if the first one cannot start: that is a fault of its settings."""
        await self._engine.start()
        self._info, self._error = self._engine.info, None
        self._up.set()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._give_up(RorqualError("the engine was stopped"))
        await self._engine.stop()

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if self._error is not None:
            raise copy(self._error)
        check_request(request, self.info)
        if self._engine.ready:
            return self._outputs(request, (self._engine, self._engine.generate(request)))
        if self._waiting >= self._max_waiting:
            raise CapacityError(f"{self._waiting} requests wait for the engine to come back", remedy="try again later")
        return self._outputs(request, None)

    async def _outputs(self, request: Request, first: _Attempt | None) -> AsyncGenerator[Output, None]:
        engine, outputs = first or await self._attempt(request)
        begun = lost = False
        async with aclosing(outputs):
            async for output in outputs:
                begun = begun or bool(output.token_ids)
                lost = output.finish_reason is FinishReason.ERROR and not engine.alive
                if lost and not begun and self.alive:
                    break
                yield output
        if lost and not begun and self.alive:
            _, outputs = await self._attempt(request)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output

    async def _attempt(self, request: Request) -> _Attempt:
        """With the next engine that runs. Raises the error if there will be none, CapacityError if it is full."""
        while True:
            self._waiting += 1
            try:
                await self._up.wait()
            finally:
                self._waiting -= 1
            if self._error is not None:
                raise copy(self._error)
            if self._engine.ready:
                return self._engine, self._engine.generate(request)
            self._up.clear()  # it died just now, and the watcher has not looked yet

    async def _watch(self) -> None:
        deaths, pause_s, born = 0, self._pause_s, time.monotonic()
        while True:
            await asyncio.sleep(self._look_s)
            if self._engine.alive:
                continue
            self._up.clear()
            if time.monotonic() - born > self._settled_s:
                deaths, pause_s = 0, self._pause_s
            error: RorqualError | None = None
            while True:
                deaths += 1
                if deaths > self._attempts:
                    self._give_up(
                        error or RorqualError(f"the engine died {deaths} times in a row", remedy="see its log")
                    )
                    return
                log.error("the engine is gone: starting another in %.1f s (%d of %d)", pause_s, deaths, self._attempts)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._longest_pause_s)
                error = await self._replace()
                if error is None:
                    break
            born = time.monotonic()
            self.restarts += 1
            self._up.set()

    async def _replace(self) -> RorqualError | None:
        """A new engine in the place of the dead one, or why it did not start."""
        with contextlib.suppress(Exception):  # it is dead: what it says of that was logged
            await self._engine.stop()
        try:
            self._engine = self._make()
            await self._engine.start()
        except Exception as error:
            log.error("the new engine did not start: %s", error)
            return error if isinstance(error, RorqualError) else RorqualError(f"the engine did not start: {error}")
        return None

    def _give_up(self, error: RorqualError) -> None:
        self._error = self._error or error
        self._up.set()
