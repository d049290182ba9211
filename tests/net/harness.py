"""A real server on a free port in a thread, a scripted engine behind it, and OpenAI's own clients in front."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from rorqual.data.special import END_THINK
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.serve.app import GenerationDefaults, ServedModel, Settings, create_app
from rorqual.serve.run import Server, listen
from rorqual.serve.searching import Searcher

WORDS = [
    "whale",
    "sea",
    "krill",
    "baleen",
    "Wal",
    "été",
    "你好",
    "深海",
    "🐋",
    "🌊🌊",
    "naïve",
    "x²",
    "don't",
    "42",
    "\n",
    "—",
]


def some_text(rng: random.Random, words: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def eventually(condition: Callable[[], object], within_s: float = 30.0) -> bool:
    """A deadline for what does not come at all: a busy machine may take seconds over what an idle one does at once."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@dataclass
class Gate:
    """Holds a script back until it is opened, from any thread."""

    opened: threading.Event = field(default_factory=threading.Event)

    def open(self) -> None:
        self.opened.set()

    async def wait(self) -> None:
        while not self.opened.is_set():
            await asyncio.sleep(0.005)

    def after(self, outputs: int) -> Callable[[], Awaitable[None]]:
        """For a script that says so much first and is held back then."""
        free = iter(range(outputs))

        async def wait() -> None:
            if next(free, None) is None:
                await self.wait()

        return wait


@dataclass
class Harness:
    url: str
    engine: ScriptedEngine
    tokenizer: Tokenizer
    template: ChatTemplate
    server: Server

    def client(self, **options: object) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 20} | options)

    def async_client(self, **options: object) -> AsyncOpenAI:
        return AsyncOpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 20} | options
        )

    def script(self, answer: str = "", thought: str | None = None, **how: object) -> list[int]:
        """What the engine says from now on; with a thought, the ids are those of thought, marker and answer."""
        ids = self.tokenizer.encode(answer)
        if thought is not None:
            ids = [*self.tokenizer.encode(thought), self.tokenizer.special(END_THINK), *ids]
        self.engine.scripts[:] = [Script(tokens=ids, **how)]
        return ids


@contextlib.contextmanager
def running(
    tokenizer: Tokenizer,
    settings: Settings | None = None,
    *,
    template: str = "v3.1",
    defaults: GenerationDefaults | None = None,
    engine: ScriptedEngine | None = None,
    grace_s: int = 1,
    context: int = 512,
    searcher: Searcher | None = None,
) -> Iterator[Harness]:
    info = EngineInfo("scripted", context, tokenizer.vocab_size, (tokenizer.eos_id,), cache_tokens=1 << 20)
    engine = engine or ScriptedEngine(info=info)
    chat_template = ChatTemplate(template)
    served = ServedModel(
        engine, tokenizer, chat_template, name="tiny", created=7, defaults=defaults or GenerationDefaults()
    )
    app = create_app({"tiny": served, "org/alias": served}, settings or Settings(), searcher=searcher)
    with serving(app, grace_s=grace_s) as server:
        yield Harness(server.url, engine, tokenizer, chat_template, server)


@contextlib.contextmanager
def serving(app: FastAPI, *, grace_s: int = 1) -> Iterator[Server]:
    """Any app on a free port, in a thread."""
    listener = listen(app, "127.0.0.1", 0)
    ready = threading.Event()
    server = Server(app, listener, grace_s=grace_s, on_ready=lambda url: ready.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(60)
        yield server
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive(), "the server did not shut down"
