"""What `rorqual bench http` measures: the cost of everything between the engine and the client's socket.

The engine is scripted, so that a token costs nothing to make. The server has a process and a core of its own; the
client is another process that reads bytes and counts events, since a client that parses would be the slower side.
Two loads: a steady one, at which the server's CPU time for a token is measured, and as much as it can carry.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from rorqual.cli.scripted_server import ScriptedServer, scripted_server
from rorqual.engine.scripted import Script

TEXT = (
    "Rorquals are the largest group of baleen whales. They feed by taking in a mouthful of the sea, krill and small fish "
    "included, and pressing the water out again through their baleen plates; what is left is swallowed. "
)


class Steps:
    """The engine's beat: all who wait are let on together, as the requests of a batch are. period_s 0: at once."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        if not self._period_s:
            await asyncio.sleep(0)
            return
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._next = loop.create_future()
            loop.call_at((loop.time() // self._period_s + 1) * self._period_s, self._beat)
        await self._next

    def _beat(self) -> None:
        assert self._next is not None
        self._next.set_result(None)
        self._next = None


def answers(directory: Path, period_s: float, tokens: int) -> list[Script]:
    """The same text again and again, a token at a time."""
    from rorqual.data.tokenizer import Tokenizer

    ids = Tokenizer.load(directory).encode(TEXT)
    return [Script(tokens=(ids * (tokens // len(ids) + 1))[:tokens], gate=Steps(period_s).wait)]


@dataclass(frozen=True, slots=True)
class Load:
    """streams: at once; tokens: of each; rate: tokens a second of each, 0 for as many as possible."""

    streams: int = 32
    tokens: int = 500
    rate: float = 0.0


def measure(directory: Path, load: Load) -> dict[str, float]:
    """tokens/s of all streams together, and the server's CPU microseconds per token."""
    scripts = partial(answers, period_s=1 / load.rate if load.rate else 0.0, tokens=load.tokens)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    server_core = cores[-1] if len(cores) > 1 else None
    with scripted_server(directory, scripts, core=server_core) as server:
        if server_core is not None:
            os.sched_setaffinity(0, set(cores[:-1]))
        try:
            asyncio.run(_streams(server, Load(load.streams, 8)))  # connections, imports, caches
            before, start = server.cpu_s(), time.perf_counter()
            counted = asyncio.run(_streams(server, load))
            seconds, cpu_s = time.perf_counter() - start, server.cpu_s() - before
        finally:
            if server_core is not None:
                os.sched_setaffinity(0, set(cores))
    return {
        "tokens": counted, "seconds": seconds, "tokens/s": counted / seconds, "CPU us/token": 1e6 * cpu_s / counted,
        "server cores": cpu_s / seconds,
    }  # fmt: skip


async def _streams(server: ScriptedServer, load: Load) -> int:
    return sum(await asyncio.gather(*(_stream(server, load.tokens) for _ in range(load.streams))))


async def _stream(server: ScriptedServer, tokens: int) -> int:
    """Events of one streamed answer that carry text."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    question = [{"role": "user", "content": "What do rorquals eat?"}]
    body = json.dumps({"model": server.model, "messages": question, "max_tokens": tokens, "stream": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: rorqual\r\nconnection: close\r\ncontent-type: application/json\r\n"
    )
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer, answer[:300]
    return answer.count(b'"content":"') - 2  # but for the first delta and the last


def middle(directory: Path, load: Load, rounds: int) -> dict[str, float]:
    """Medians over rounds, each with a new server."""
    runs = [measure(directory, load) for _ in range(rounds)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
