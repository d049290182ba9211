"""The engine across a process border: endings, whichever side goes first."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from rorqual.engine.api import FinishReason, Output, Request
from rorqual.engine.process import Build, EngineProcess
from rorqual.engine.settings import EngineSettings
from rorqual.errors import CapacityError, CheckpointError, PromptTooLong, RorqualError
from tests.unit.engine import fakes
from tests.unit.engine.fakes import VOCAB, expected, request

ROOT = Path(__file__).parents[3]


def random_request(id: str, n: int = 9, **params: object) -> Request:
    return request(id, random.choices(range(2, VOCAB), k=n), **params)


@asynccontextmanager
async def running(build: Build = fakes.build_fake, **settings: int) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(EngineSettings("none", **settings), build=build, grace_s=2.0)  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def collect(engine: EngineProcess, req: Request) -> list[Output]:
    return [output async for output in engine.generate(req)]


def tokens(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until_gone(pid: int, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def test_streams_aborts_and_refuses() -> None:
    async def run() -> None:
        async with running(max_num_seqs=4, max_waiting=2) as engine:
            assert engine.alive and engine.info.vocab_size == VOCAB
            requests = [random_request(str(n), max_tokens=random.randint(1, 40)) for n in range(5)]
            answers = await asyncio.gather(*(collect(engine, r) for r in requests))
            for req, outputs in zip(requests, answers, strict=True):
                assert tokens(outputs) == expected(req, 20000)
                assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH]
                assert {o.request_id for o in outputs} == {req.id}
                assert outputs[-1].stats and outputs[-1].stats.prefill_s > 0
            assert engine.stats.new_tokens == sum(len(tokens(outputs)) for outputs in answers)
            with pytest.raises(PromptTooLong):
                engine.generate(random_request("long", 9, max_tokens=20000))
            await abort_and_reuse_the_name(engine)
            await fill_up(engine)
            pid = engine.pid or 0
        assert not is_running(pid)
        with pytest.raises(RorqualError):
            engine.generate(random_request("late"))
        await engine.stop()

    asyncio.run(run())


async def abort_and_reuse_the_name(engine: EngineProcess) -> None:
    for _ in range(5):
        req = random_request("same", max_tokens=10_000)
        async with aclosing(engine.generate(req)) as outputs:
            async for _ in outputs:
                break
        again = random_request("same", max_tokens=5)
        assert tokens(await collect(engine, again)) == expected(again, 20000)


async def fill_up(engine: EngineProcess) -> None:
    """4 running and 2 waiting is all there is room for; cancelling the readers makes room again."""
    tasks = [asyncio.create_task(collect(engine, random_request(f"f{n}", max_tokens=15_000))) for n in range(6)]
    await asyncio.sleep(0.05)
    with pytest.raises(CapacityError):
        engine.generate(random_request("one too many"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    req = random_request("after", max_tokens=3)
    assert tokens(await collect(engine, req)) == expected(req, 20000)


def test_a_killed_child_ends_every_request_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with running() as engine:
            tasks = [asyncio.create_task(collect(engine, random_request(str(n), max_tokens=15_000))) for n in range(3)]
            await asyncio.sleep(0.1)
            os.kill(engine.pid or 0, signal.SIGKILL)
            for outputs in await asyncio.wait_for(asyncio.gather(*tasks), 30):
                assert outputs[-1].finish_reason is FinishReason.ERROR
                assert "-9" in str(outputs[-1].error)
            assert not engine.alive
            with pytest.raises(RorqualError):
                engine.generate(random_request("late"))

    with caplog.at_level(logging.ERROR, "rorqual"):
        asyncio.run(run())
    assert any("ended unexpectedly" in r.getMessage() for r in caplog.records)


def test_a_lost_device_ends_the_child_and_every_request() -> None:
    async def run() -> None:
        async with running(fakes.build_doomed) as engine:
            outputs = await asyncio.wait_for(collect(engine, random_request("r")), 30)
            assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]
            assert not engine.alive

    asyncio.run(run())


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [(fakes.build_refusing, CheckpointError, "truncated"), (fakes.build_foreign, RorqualError, "not one of ours")],
)
def test_start_raises_the_childs_error_as_itself(build: Build, error: type[Exception], text: str) -> None:
    async def run() -> None:
        engine = EngineProcess(EngineSettings("none"), build=build)
        with pytest.raises(error, match=text) as caught:
            await engine.start()
        if isinstance(caught.value, CheckpointError):
            assert caught.value.remedy == "copy it again"
        assert not engine.alive and not is_running(engine.pid or 0)

    asyncio.run(run())


def test_cancelling_start_leaves_no_child() -> None:
    async def run() -> None:
        engine = EngineProcess(EngineSettings("none"), build=fakes.build_slow)
        task = asyncio.create_task(engine.start())
        while engine.pid is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.pid and not is_running(engine.pid)

    asyncio.run(run())


def test_stop_ends_a_child_that_hangs() -> None:
    async def run() -> None:
        engine = EngineProcess(EngineSettings("none"), build=fakes.build_hanging, grace_s=0.3)
        await engine.start()
        task = asyncio.create_task(collect(engine, random_request("r")))
        await asyncio.sleep(0.1)
        await engine.stop()
        assert (await task)[-1].finish_reason is FinishReason.ERROR
        assert not is_running(engine.pid or 0)

    asyncio.run(run())


PARENT = """
import asyncio, sys
from rorqual.engine.process import EngineProcess
from rorqual.engine.settings import EngineSettings
from tests.unit.engine import fakes

async def main():
    engine = EngineProcess(EngineSettings("none"), build=getattr(fakes, sys.argv[1]))
    await engine.start()
    print(engine.pid, flush=True)
    async for _ in engine.generate(fakes.request("r", [5, 6], max_tokens=15000)):
        pass

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("build", ["build_fake", "build_hanging"])
def test_the_child_exits_when_its_parent_is_killed(build: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), build],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(child)


def test_importing_the_engines_outside_loads_no_torch() -> None:
    code = (
        "import sys, rorqual.engine.process, rorqual.engine.scripted, rorqual.engine.settings, rorqual.engine.core;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
