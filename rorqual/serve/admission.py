"""What holds for every request to an engine, whatever dialect it came in: whose cache, how long, at whose cost.

`AdmittedEngine` is an Engine around another. It reads the caller from `CALLER`, so that a route cannot forget
it: the request's salt (a `user_id`, by then) becomes the caller's and the user's, and the tokens go to the
caller's account. Deadlines live here and not in the connection's code because only here is it known whether the
engine has begun: a request that waits too long for its first token gets a 503 and can be retried elsewhere, one
that falls silent in the middle gets a 504. Either way the engine's request is aborted.

Left out: a queue of its own. The engine's is bounded (`EngineSettings.max_waiting`) and knows priorities.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from starlette.exceptions import HTTPException

from rorqual.engine.api import Engine, EngineInfo, Output, Request
from rorqual.serve.callers import CALLER, Caller
from rorqual.serve.errors import RETRY_LATER
from rorqual.serve.settings import Settings


class AdmittedEngine:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def alive(self) -> bool:
        return self._engine.alive

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Beside what the engine raises, HTTPException 503 or 504 at a deadline."""
        caller = CALLER.get()
        if caller is not None:
            request = replace(request, salt=caller.salt(request.salt))
        return self._watch(request, self._engine.generate(request), caller)

    async def _watch(
        self, request: Request, outputs: AsyncGenerator[Output, None], caller: Caller | None
    ) -> AsyncGenerator[Output, None]:
        begun = False
        async with aclosing(outputs):
            while (output := await self._next(outputs, begun)) is not None:
                if caller is not None:
                    caller.spend(len(output.token_ids) + (0 if begun else len(request.prompt)))
                begun = True
                yield output

    async def _next(self, outputs: AsyncGenerator[Output, None], begun: bool) -> Output | None:
        """None at the end. The deadline cancels what the engine is doing for this request."""
        limit_s = self._settings.idle_timeout_s if begun else self._settings.queue_timeout_s
        try:
            async with asyncio.timeout(limit_s) as deadline:
                return await anext(outputs, None)
        except TimeoutError:
            if not deadline.expired():
                raise
        if begun:
            raise HTTPException(504, f"The engine sent nothing for {limit_s:g} seconds.", {"x-should-retry": "false"})
        raise HTTPException(503, f"The request did not begin within {limit_s:g} seconds.", RETRY_LATER)
