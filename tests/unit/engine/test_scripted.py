"""The scripted engine keeps the rules every engine keeps, so that tests above it mean something."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest

from rorqual.engine.api import Engine, EngineInfo, FinishReason, Output, Request, SamplingParams
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.errors import CapacityError, PromptTooLong, RequestError, RorqualError

INFO = EngineInfo(model="scripted", max_model_len=300, vocab_size=1000, eos_token_ids=(1, 2), cache_tokens=9999)


def request(n: int = 5, id: str = "r", **params: Any) -> Request:
    return Request(id, tuple(random.randrange(3, 1000) for _ in range(n)), SamplingParams(**params))


def play(engine: Engine, req: Request) -> list[Output]:
    async def run() -> list[Output]:
        return [output async for output in engine.generate(req)]

    return asyncio.run(run())


def tokens(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_first_matching_script_answers_and_eos_ends_it() -> None:
    engine = ScriptedEngine(
        [
            Script(tokens=[7, 8], when=lambda prompt: len(prompt) == 3),
            Script(tokens=lambda prompt: prompt[::-1], tokens_per_output=4),
        ],
        INFO,
    )
    assert tokens(play(engine, request(3))) == [7, 8, 1]
    req = request(9, id="s")
    outputs = play(engine, req)
    assert tokens(outputs) == [*req.prompt[::-1], 1]
    assert [len(o.token_ids) for o in outputs] == [4, 4, 2]
    assert [o.finish_reason for o in outputs] == [None, None, FinishReason.STOP]
    assert engine.finished == {"r": FinishReason.STOP, "s": FinishReason.STOP}
    assert [r.id for r in engine.seen] == ["r", "s"]


@pytest.mark.parametrize(
    ("params", "want", "reason"),
    [
        ({"max_tokens": 2}, [5, 6], FinishReason.LENGTH),
        ({"max_tokens": 4}, [5, 6, 7, 1], FinishReason.STOP),
        ({"stop_token_ids": (6,)}, [5, 6], FinishReason.STOP),
        ({"ignore_eos": True, "max_tokens": 7}, [5, 6, 7, 5, 6, 7, 5], FinishReason.LENGTH),
    ],
)
def test_limits(params: dict[str, Any], want: list[int], reason: FinishReason) -> None:
    outputs = play(ScriptedEngine([Script(tokens=[5, 6, 7])], INFO), request(**params))
    assert tokens(outputs) == want
    assert outputs[-1].finish_reason == reason
    assert sum(o.finish_reason is not None for o in outputs) == 1


def test_the_context_ends_an_answer() -> None:
    outputs = play(ScriptedEngine([Script(tokens=range(3, 900))], INFO), request(290))
    assert len(tokens(outputs)) == 10
    assert outputs[-1].finish_reason == FinishReason.LENGTH


def test_failure_after_some_tokens() -> None:
    engine = ScriptedEngine([Script(tokens=[5, 6, 7], fail_after=2)], INFO)
    outputs = play(engine, request())
    assert tokens(outputs) == [5, 6]
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert isinstance(outputs[-1].error, RorqualError)
    assert engine.finished == {"r": FinishReason.ERROR}


def test_refusals_are_raised_at_once() -> None:
    engine = ScriptedEngine([Script(refuse=CapacityError("full"))], INFO)
    with pytest.raises(CapacityError):
        engine.generate(request())
    with pytest.raises(PromptTooLong):
        engine.generate(request(301))
    with pytest.raises(RequestError):
        engine.generate(Request("r", ()))


def test_closing_the_iterator_aborts() -> None:
    engine = ScriptedEngine([Script(tokens=range(3, 100))], INFO, max_live=1)

    async def run() -> None:
        async with aclosing(engine.generate(request())) as outputs:
            await anext(outputs)
            assert engine.live == {"r"}
            with pytest.raises(CapacityError):
                engine.generate(request(id="other"))
        assert engine.aborted == ["r"] and not engine.live and not engine.finished

    asyncio.run(run())


def test_cancelling_the_reader_aborts() -> None:
    async def run() -> None:
        engine = ScriptedEngine([Script(tokens=[5], gate=asyncio.Event().wait)], INFO)

        async def read() -> None:
            async for _ in engine.generate(request()):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.aborted == ["r"] and not engine.live

    asyncio.run(run())


def test_death_ends_live_requests_and_refuses_new_ones() -> None:
    async def run() -> None:
        engine = ScriptedEngine([Script(tokens=range(3, 100))], INFO)
        outputs = engine.generate(request())
        await anext(outputs)
        engine.die()
        last = [o async for o in outputs]
        assert [o.finish_reason for o in last] == [FinishReason.ERROR]
        assert not engine.alive
        with pytest.raises(RorqualError):
            engine.generate(request())
        await engine.start()
        assert engine.alive

    asyncio.run(run())


def test_cached_tokens_are_full_units_of_an_earlier_prompt() -> None:
    engine = ScriptedEngine([Script(tokens=[5])], INFO)
    first = request(150)
    assert play(engine, first)[0].cached_tokens == 0
    assert play(engine, first)[0].cached_tokens == 128
    longer = Request("r", first.prompt[:100] + request(50).prompt)
    assert play(engine, longer)[0].cached_tokens == 64
    assert play(engine, Request("r", first.prompt[:64]))[0].cached_tokens == 0  # one token is always computed


def test_logprobs_on_demand() -> None:
    engine = ScriptedEngine([Script(tokens=[5, 6])], INFO)
    assert all(not o.logprobs for o in play(engine, request()))
    outputs = play(engine, request(logprobs=3))
    assert [lp.token_id for o in outputs for lp in o.logprobs] == tokens(outputs)
    assert all(len(lp.top) == 3 for o in outputs for lp in o.logprobs)
