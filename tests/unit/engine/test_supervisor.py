"""An engine that is killed and comes back: which requests survive, which end, and when it is given up."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable

import pytest

from rorqual.engine.api import FinishReason, Output, Request
from rorqual.engine.process import EngineProcess
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.engine.settings import EngineSettings
from rorqual.engine.supervisor import SupervisedEngine
from rorqual.errors import CapacityError, CheckpointError, PromptTooLong, RorqualError
from tests.unit.engine import fakes
from tests.unit.engine.fakes import VOCAB, expected, request

HASTE = {"pause_s": 0.01, "look_s": 0.01, "longest_pause_s": 0.02}


async def collect(engine: SupervisedEngine, req: Request) -> list[Output]:
    return [output async for output in engine.generate(req)]


def tokens(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_killed_process_comes_back_and_the_queue_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """kill -9: the running request ends with the reason, those that waited get the answer they would have got."""
    made: list[EngineProcess] = []

    def make() -> EngineProcess:
        made.append(EngineProcess(EngineSettings("none"), build=fakes.build_single, grace_s=2.0))
        return made[-1]

    async def run() -> None:
        engine = SupervisedEngine(make, **HASTE)
        await engine.start()
        running = asyncio.create_task(collect(engine, request("running", [5, 6, 7], max_tokens=15_000)))
        await until(lambda: engine.stats.new_tokens)
        queued = [request(str(n), random.choices(range(2, VOCAB), k=9), max_tokens=20) for n in range(5)]
        tasks = [asyncio.create_task(collect(engine, req)) for req in queued]
        await until(lambda: engine.stats.waiting == 5)
        os.kill(made[0].pid or 0, signal.SIGKILL)
        ended = await asyncio.wait_for(running, 30)
        assert tokens(ended) and ended[-1].finish_reason is FinishReason.ERROR and "-9" in str(ended[-1].error)
        assert engine.alive and not engine.ready
        late = request("late", [3, 4], max_tokens=4)
        answers = await asyncio.wait_for(asyncio.gather(*tasks, collect(engine, late)), 60)
        for req, outputs in zip([*queued, late], answers, strict=True):
            assert tokens(outputs) == expected(req, 20000)
            assert sum(o.finish_reason is not None for o in outputs) == 1
        assert engine.ready and engine.restarts == 1 and len(made) == 2
        await engine.stop()
        with pytest.raises(RorqualError, match="stopped"):
            engine.generate(late)

    with caplog.at_level(logging.ERROR, "rorqual"):
        asyncio.run(run())


def ask(name: str) -> Request:
    return request(name, [3], ignore_eos=False)


class Mortal(ScriptedEngine):
    """Dies of whatever it is asked if it is `deadly`; does not start if there is a `fault`."""

    def __init__(self, *, deadly: bool = False, fault: RorqualError | None = None) -> None:
        super().__init__([Script(tokens=[7, 8, 9], gate=self._collapse if deadly else None)])
        self.fault = fault
        self.die()

    async def _collapse(self) -> None:
        self.die(RorqualError("it was too much"))

    async def start(self) -> None:
        if self.fault:
            raise self.fault
        await super().start()


def supervise(engines: list[Mortal], body: Callable[[SupervisedEngine], Awaitable[None]]) -> None:
    """`body` with a supervisor that gets these engines one after the other, and then no more."""
    rest = iter(engines)

    async def run() -> None:
        engine = SupervisedEngine(lambda: next(rest), attempts=2, max_waiting=2, **HASTE)
        await engine.start()
        try:
            await asyncio.wait_for(body(engine), 60)
        finally:
            await engine.stop()

    asyncio.run(run())


def test_a_request_that_kills_two_engines_ends_with_the_error() -> None:
    engines = [Mortal(deadly=True), Mortal(deadly=True), Mortal()]

    async def body(engine: SupervisedEngine) -> None:
        outputs = await collect(engine, ask("poison"))
        assert [str(o.error) for o in outputs if o.finish_reason] == ["it was too much"] and not tokens(outputs)
        await until(lambda: engine.ready)
        assert tokens(await collect(engine, ask("next"))) == [7, 8, 9, 1]

    supervise(engines, body)
    assert [len(e.seen) for e in engines] == [1, 1, 1]


def test_an_engine_that_does_not_come_back_is_given_up() -> None:
    fault = CheckpointError("the weights are gone", remedy="copy them again")

    async def body(engine: SupervisedEngine) -> None:
        with pytest.raises(CheckpointError, match="the weights are gone"):
            await collect(engine, ask("waiting"))
        assert not engine.alive and not engine.ready
        with pytest.raises(CheckpointError):
            engine.generate(ask("late"))

    supervise([Mortal(deadly=True), Mortal(fault=fault), Mortal(fault=fault)], body)


def test_an_engine_that_fails_to_start_once_is_tried_again() -> None:
    async def body(engine: SupervisedEngine) -> None:
        assert tokens(await collect(engine, ask("patient"))) == [7, 8, 9, 1]

    supervise([Mortal(deadly=True), Mortal(fault=RorqualError("busy device")), Mortal()], body)


def test_an_idle_death_is_noticed() -> None:
    first = Mortal()

    async def body(engine: SupervisedEngine) -> None:
        first.die()
        await until(lambda: engine.restarts == 1)
        assert engine.ready

    supervise([first, Mortal()], body)


def test_those_who_wait_for_an_engine_are_few_and_may_leave() -> None:
    async def body(engine: SupervisedEngine) -> None:
        # Nobody looks before the first sleep, so all of this happens while there is no engine.
        first.die()
        waiting = [asyncio.create_task(collect(engine, ask(str(n)))) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="2 requests wait"):
            engine.generate(ask("third"))
        with pytest.raises(PromptTooLong):
            engine.generate(request("long", [3], max_tokens=10**6))
        waiting[0].cancel()
        assert tokens(await waiting[1]) == [7, 8, 9, 1]
        assert [r.id for r in second.seen] == ["1"]

    first, second = Mortal(), Mortal()
    supervise([first, second], body)


def test_the_first_start_raises_what_is_wrong() -> None:
    async def run() -> None:
        engine = SupervisedEngine(lambda: Mortal(fault=CheckpointError("truncated")))
        with pytest.raises(CheckpointError, match="truncated"):
            await engine.start()
        assert not engine.alive
        await engine.stop()

    asyncio.run(run())
