"""What holds for every request to an engine, whatever dialect it came in: whose cache, how long, at whose cost.

`AdmittedEngine` is an Engine around another. It reads the caller from `VISIT`, so that a route cannot forget
it: the request's salt (a `user_id`, by then) becomes the caller's and the user's, the tokens go to the caller's
account, and all of it to the metrics. Deadlines live here and not in the connection's code because only here
is it known whether the engine has begun: a request that waits too long for its first token gets a 503 and can be
retried elsewhere, one that falls silent in the middle gets a 504. Either way the engine's request is aborted.

Left out: a queue of its own. The engine's is bounded (`EngineSettings.max_waiting`) and knows priorities.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.exceptions import HTTPException

from rorqual.engine.api import Engine, EngineInfo, FinishReason, Output, Request
from rorqual.engine.stats import EngineStats
from rorqual.serve.callers import VISIT, Visit
from rorqual.serve.errors import RETRY_LATER
from rorqual.serve.metrics import Journey, Metrics
from rorqual.serve.served import ServedModel
from rorqual.serve.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")


class Patience:
    """A limit on each of many waits in a row, by one timer: `asyncio.timeout` around each output would cost more than all
    that is done with it. The timer is set where there is none, looks when it fires whether the present wait is over its
    limit, and else is set anew. over: whether a wait was ended by it."""

    def __init__(self) -> None:
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._until = 0.0

    async def wait(self, coming: Awaitable[T], limit_s: float) -> T:
        """Raises TimeoutError at the limit, and cancels what it waited for."""
        self._waiting = task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        self._until = self._loop.time() + limit_s
        if self._timer is None or self._timer.when() > self._until:
            self._set()
        try:
            return await coming
        except asyncio.CancelledError:
            if self.over and task.uncancel() <= cancelled:  # else somebody else wants the task to end, too
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set(self) -> None:
        self.close()
        self._timer = self._loop.call_at(self._until, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._waiting is None:
            return  # the next wait sets it again
        if self._loop.time() < self._until:
            self._set()
        else:
            self.over = True
            self._waiting.cancel()


class AdmittedEngine:
    def __init__(self, served: ServedModel, settings: Settings, metrics: Metrics) -> None:
        self._engine: Engine = served.engine
        self._served = served
        self._settings = settings
        self._metrics = metrics

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def alive(self) -> bool:
        return self._engine.alive

    @property
    def ready(self) -> bool:
        return self._engine.ready

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Beside what the engine raises, HTTPException 503 or 504 at a deadline."""
        visit = VISIT.get()
        if visit is not None:
            request = replace(request, salt=visit.caller.salt(request.salt))
            visit.model = self._served.name
        return self._watch(request, self._engine.generate(request), visit)

    async def _watch(
        self, request: Request, outputs: AsyncGenerator[Output, None], visit: Visit | None
    ) -> AsyncGenerator[Output, None]:
        journey = Journey(self._metrics, self._served.name, len(request.prompt))
        reason: FinishReason | None = None
        said: list[int] = []
        begun = False
        patience = Patience()
        try:
            async with aclosing(outputs):
                while (output := await self._next(outputs, begun, patience)) is not None:
                    journey.read(output)
                    if visit is not None:
                        _charge(visit, output, 0 if begun else len(request.prompt))
                    if self._settings.log_prompts:
                        said += output.token_ids
                    begun, reason = True, output.finish_reason
                    yield output
        except GeneratorExit:  # whoever reads has enough: a stop string
            reason = reason or FinishReason.STOP
            raise
        except asyncio.CancelledError:  # the client left, or the server is stopping
            reason = FinishReason.ABORT
            raise
        finally:
            patience.close()
            reason = reason or FinishReason.ERROR
            journey.end(reason)
            if visit is not None:
                visit.finish_reason = str(reason)
            if self._settings.log_prompts:
                self._log_texts(request, said, visit)

    async def _next(self, outputs: AsyncGenerator[Output, None], begun: bool, patience: Patience) -> Output | None:
        """None at the end. The deadline cancels what the engine is doing for this request."""
        limit_s = self._settings.idle_timeout_s if begun else self._settings.queue_timeout_s
        try:
            return await patience.wait(anext(outputs, None), limit_s)
        except TimeoutError:
            if not patience.over:
                raise
        if begun:
            raise HTTPException(504, f"The engine sent nothing for {limit_s:g} seconds.", {"x-should-retry": "false"})
        raise HTTPException(503, f"The request did not begin within {limit_s:g} seconds.", RETRY_LATER)

    def _log_texts(self, request: Request, said: list[int], visit: Visit | None) -> None:
        decode = self._served.tokenizer.decode
        fields = {
            "request_id": visit.request_id if visit else request.id,
            "prompt": decode(request.prompt),
            "completion": decode(said),
        }
        log.info("%(request_id)s asked %(prompt)r and was told %(completion)r", fields, extra={"fields": fields})


def _charge(visit: Visit, output: Output, prompt_tokens: int) -> None:
    """prompt_tokens: with a request's first output, and 0 after."""
    visit.caller.spend(len(output.token_ids) + prompt_tokens)
    visit.completion_tokens += len(output.token_ids)
    if prompt_tokens:
        visit.prompt_tokens += prompt_tokens
        visit.cached_tokens += output.cached_tokens
