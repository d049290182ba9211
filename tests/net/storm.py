"""Weather for a server: many streams at once whose clients leave when they like, and an engine that is killed.

`storm` drives a running `rorqual serve` and keeps the books of every request by an id of its own: what the client saw of
its end, and, from the server's log, how often it ended. Used by a test for seconds and by `make soak` for minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rorqual.config import DEFAULT_MODEL
from tests.net.test_bundled import Serving, children, eventually

ENDS = {  # what the last words of a stream look like: (all is well, it failed)
    "/v1/chat/completions": (rb'"finish_reason":"(stop|length|tool_calls)"', rb'data: \{"error":'),
    "/v1/completions": (rb'"finish_reason":"(stop|length|tool_calls)"', rb'data: \{"error":'),
    "/v1/messages": (rb"event: message_stop\n", rb"event: error\n"),
    "/v1/responses": (rb"event: response\.(completed|incomplete)\n", rb"event: response\.failed\n"),
}
TOPICS = ("the sea", "a whale", "12 + 35", "five animals", "a story", "the moon")


@dataclass
class Books:
    """outcomes: finished, failed (with an error in good form), refused (an HTTP error), left (by the client);
    faults: what must not be; errors: the messages of failures."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)  # whose end the client has seen
    tokens: int = 0


def body_for(path: str, rng: random.Random) -> dict[str, Any]:
    """Prompts of a few families, so that pages are shared; short answers and long ones."""
    text = (
        rng.choice(("", "Please listen to this. " * rng.choice((1, 20, 60)))) + f"Tell me about {rng.choice(TOPICS)}."
    )
    limit = rng.choice((1, 8, 40, 120))
    shared = {"model": DEFAULT_MODEL, "stream": rng.random() < 0.9, "temperature": rng.choice((0, 1))}
    if path == "/v1/completions":
        return {**shared, "prompt": text, "max_tokens": limit, "n": rng.choice((1, 1, 3))}
    if path == "/v1/responses":
        return {**shared, "input": text, "max_output_tokens": limit}
    return {**shared, "messages": [{"role": "user", "content": text}], "max_tokens": limit}


async def one(url: str, books: Books, rng: random.Random) -> None:
    """One request, from its first byte to its end, or until the client has enough."""
    path = rng.choice(list(ENDS))
    body = body_for(path, rng)
    name = f"storm-{len(books.asked)}"
    books.asked.append(name)
    leaves_after = rng.choice((None, None, None, 0, 1, 5, 25))  # pieces that it reads first
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: {name}\r\n"
        head += "content-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer, pieces = b"", 0
        while leaves_after is None or pieces < leaves_after:
            piece = await asyncio.wait_for(reader.read(1 << 16), 120)
            if not piece:
                judge(name, path, bool(body["stream"]), answer, books)
                return
            answer, pieces = answer + piece, pieces + 1
        books.outcomes["left"] += 1
    except (TimeoutError, OSError) as error:
        books.faults.append(f"{name}: {type(error).__name__} {error}")
    finally:
        writer.close()


def judge(name: str, path: str, stream: bool, answer: bytes, books: Books) -> None:
    """A whole answer, as the connection's end left it: it ends once, and in good form."""
    books.answered.add(name)
    status = int(answer[9:12] or b"0")
    text = answer.partition(b"\r\n\r\n")[2]
    if b"Traceback" in answer:
        books.faults.append(f"{name}: a traceback in {answer[-300:]!r}")
    if status != 200:
        message = re.search(rb'"message":"(.*?)[".(]', text)
        if status < 429 or not message:
            books.faults.append(f"{name}: {status} {text[:200]!r}")
        books.outcomes["refused"] += 1
        books.errors[f"{status} {(message[1] if message else b'').decode()}"] += 1
        return
    if not stream:
        books.outcomes["finished"] += 1
        return
    well, failed = (len(re.findall(pattern, text)) for pattern in ENDS[path])
    done = text.count(b"data: [DONE]")
    books.tokens += text.count(b"data: ")
    wants_done = "completions" in path
    if ((failed == 0) != (well > 0) and not wants_done) or failed > 1 or done != wants_done or not (well or failed):
        books.faults.append(f"{name}: ended {well} times well, {failed} badly, {done} [DONE]: {text[-300:]!r}")
    if failed:
        message = re.findall(rb'"message":\s?"(.*?)[".(]', text)
        books.errors[message[-1].decode() if message else "?"] += 1
        if not message or not message[-1]:
            books.faults.append(f"{name}: an error without words: {text[-300:]!r}")
    books.outcomes["failed" if failed else "finished"] += 1


async def weather(server: Serving, books: Books, seconds: float, streams: int, kill_every_s: float, seed: int) -> int:
    """Returns how often the engine was killed."""
    end, kills = time.monotonic() + seconds, 0

    async def client(rng: random.Random) -> None:
        while time.monotonic() < end:
            await one(server.url, books, rng)

    async def killer() -> int:
        kills = 0
        while time.monotonic() + kill_every_s < end:
            await asyncio.sleep(kill_every_s)
            engines = children(server.process.pid)
            if engines:
                os.kill(engines[-1], signal.SIGKILL)
                kills += 1
        return kills

    *_, kills = await asyncio.gather(*(client(random.Random(f"{seed} {i}")) for i in range(streams)), killer())
    return kills


def gauges(url: str) -> dict[str, float]:
    """The engine's state and the ended requests, from /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()

    def total(name: str) -> float:
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    names = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:request_success_total",
    )
    return {name: total(name) for name in (*names, "rorqual:engine_restarts_total")}


def log_of(server: Serving) -> list[dict[str, Any]]:
    return [json.loads(line) for line in list(server.lines) if line.startswith("{")]


def endings(server: Serving) -> Counter[str]:
    """How often the server's log says of each request that it ended."""
    told = [line["request_id"] for line in log_of(server) if "status" in line]
    return Counter(name for name in told if name.startswith("storm-"))


def storm(
    server: Serving,
    *,
    seconds: float,
    streams: int,
    kill_every_s: float,
    seed: int,
    told: Callable[[str], None] = print,
) -> dict[str, Any]:
    """A server that was started with `--log-format json`. Returns the books; `faults` is empty if all is well."""
    books = Books()
    told(f"storm of seed {seed}")
    kills = asyncio.run(weather(server, books, seconds, streams, kill_every_s, seed))
    calm = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    if not eventually(lambda: not any(gauges(server.url)[name] for name in calm), 60):
        books.faults.append(f"after the storm there are still {gauges(server.url)}")
    # The last engine may still be starting, and the last lines of the log on their way.
    eventually(lambda: not kills or gauges(server.url)["rorqual:engine_restarts_total"], 60)
    eventually(lambda: not books.answered - endings(server).keys())
    found, logged, ended = gauges(server.url), log_of(server), endings(server)
    books.faults += [f"{name} ended {n} times" for name, n in ended.items() if n != 1]
    books.faults += [f"{name} has no line in the log" for name in sorted(books.answered - ended.keys())]
    books.faults += [f"traceback: {line['message']}" for line in logged if "Traceback" in json.dumps(line)]
    return {
        "seconds": seconds, "streams": streams, "seed": seed, "kills": kills, "requests": len(books.asked),
        "events": books.tokens, **{name: books.outcomes[name] for name in ("finished", "failed", "refused", "left")},
        "errors": dict(books.errors), "restarts": found["rorqual:engine_restarts_total"],
        "pages in use afterwards": found["vllm:kv_cache_usage_perc"], "faults": books.faults,
    }  # fmt: skip
