"""The real server with a scripted model and a scripted web behind it, for the chat page's tests.

The page, the routes, the database, the streams and the search turn are the product's own; only the two ends are told what
to say: the engine answers by the first word of the question (answers.py), the search provider brings three pages. `World`
holds what a test may turn: the pace, keys, failures.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.request import Request, urlopen

from fastapi import FastAPI

from rorqual.config import DEFAULT_MODEL, resolve_model
from rorqual.data.special import END_THINK, THINK
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import Prompt, Script, ScriptedEngine
from rorqual.errors import RequestError, UpstreamError
from rorqual.net import SafeFetcher
from rorqual.search.api import Result
from rorqual.serve.app import ServedModel, Settings, create_app
from rorqual.serve.database import database_url
from rorqual.serve.run import serve
from rorqual.serve.searching import Searcher
from tests.net.harness import serving
from tests.web.answers import ANSWERS, OTHER, QUERIES, THOUGHT, THOUGHTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "rorqual" / "serve" / "page"
SECRET = "sk-right"

FOUND = [
    Result(
        "Blue whale", "https://whales.example/blue", "The largest animal.",
        "The blue whale is the largest animal known. It reaches 29.9 metres in length.", "2025-03-01",
    ),
    Result(
        "What do whales eat?", "https://sea.example/food", "On krill.",
        "The blue whale feeds almost only on krill: it takes about four tonnes of krill a day.", "2024-11-12",
    ),
    Result(
        "Songs of the sea", "https://songs.example/far", "Loud.",
        "A whale's song is loud. It can be heard by other whales over hundreds of kilometres.",
    ),
]  # fmt: skip


class NotBuiltError(Exception):
    """There is no page to serve."""


@dataclass
class World:
    """What the two ends do, and what they have seen."""

    tokenizer: Tokenizer
    url: str = ""
    engine: ScriptedEngine | None = None
    pace_s: float = 0.001
    pause_at: int | None = None
    """After so many tokens since `reset` all wait for `go_on`: a test may look at an answer in its middle for long."""
    said: int = 0
    refuse: bool = False
    search_fails: bool = False
    found: list[Result] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    name = "scripted"

    def reset(self) -> None:
        self.pace_s, self.refuse, self.search_fails, self.queries = 0.001, False, False, []
        self.found, self.pause_at, self.said = list(FOUND), None, 0
        self.gate.set()

    def go_on(self) -> None:
        """Whether or not the pause was reached."""
        self.pause_at = None
        self.gate.set()

    def clear(self) -> None:
        """Deletes every conversation, and returns once none is being answered any more."""
        self.go_on()
        with urlopen(f"{self.url}/chats?limit=100", timeout=10) as answer:
            chats = json.load(answer)["chats"]
        for chat in chats:
            urlopen(Request(f"{self.url}/chats/{chat['id']}", method="DELETE"), timeout=10).close()
        end = time.monotonic() + 20
        while self.engine is not None and self.engine.stats.running:
            assert time.monotonic() < end, "an answer of the test before does not end"
            time.sleep(0.01)

    async def search(self, query: str, count: int) -> list[Result]:
        self.queries.append(query)
        await self._open()
        if self.search_fails:
            raise UpstreamError("the search engine does not answer")
        return self.found[:count]

    async def pace(self) -> None:
        self.said += 1
        await asyncio.sleep(self.pace_s)
        await self._open()

    async def _open(self) -> None:
        while not self.gate.is_set() or (self.pause_at is not None and self.said >= self.pause_at):
            await asyncio.sleep(0.01)

    def scripts(self) -> list[Script]:
        how = {"gate": self.pace}
        return [
            Script(when=lambda _: self.refuse, refuse=RequestError("The scripted model will not answer this.")),
            Script(self._say, when=self._is("fault"), fail_after=4, error=RuntimeError("out of memory"), **how),
            Script(self._say, when=self._is("slow"), gate=self._slowly),
            Script(self._say, **how),
        ]

    async def _slowly(self) -> None:
        await asyncio.sleep(max(self.pace_s, 0.04))
        await self._open()

    def _is(self, kind: str):  # type: ignore[no-untyped-def]
        return lambda prompt: _kind(self._said(prompt)[0]) == kind

    def _said(self, prompt: Prompt) -> tuple[str, str]:
        """The last question, and what of its answer is in the prompt already."""
        text = self.tokenizer.decode(prompt, skip_special=False)
        question, _, answer = text.rpartition("<｜User｜>")[2].partition("<｜Assistant｜>")
        return question, answer

    def _say(self, prompt: Prompt) -> list[int]:
        question, begun = self._said(prompt)
        if "decide what to look up" in question:
            return self.tokenizer.encode(QUERIES)
        kind = _kind(question)
        thought, answer = THOUGHTS.get(kind, THOUGHT), ANSWERS.get(kind, OTHER)
        end = self.tokenizer.special(END_THINK)
        if THINK in begun and END_THINK not in begun:
            left = (
                thought.removeprefix(begun.removeprefix(THINK)) if thought.startswith(begun.removeprefix(THINK)) else ""
            )
            return [*self.tokenizer.encode(left), end, *self.tokenizer.encode(answer)]
        written = begun.rpartition(END_THINK)[2]
        return self.tokenizer.encode(answer[len(written) :] if answer.startswith(written) else answer)


def _kind(question: str) -> str:
    asked = re.split(r"# The user's message is:\s*|# 用户消息为：\s*|\[file content end\]\s*", question)[-1].split()
    return re.sub(r"\W", "", asked[0]).lower() if asked else ""


def built(folder: Path, key: str | None = None) -> tuple[World, FastAPI]:
    """A world and its server, which keeps its data in the folder. Raises NotBuiltError without a page."""
    if not (PAGE / "index.html").is_file():
        raise NotBuiltError("The chat page is not built: run `npm ci && npm run build` in web/ (Node 20 or newer).")
    tokenizer = Tokenizer.load(resolve_model())
    world = World(tokenizer)
    world.reset()
    info = EngineInfo("scripted", 1 << 16, tokenizer.vocab_size, (tokenizer.eos_id,), cache_tokens=1 << 20)
    engine = world.engine = ScriptedEngine(world.scripts(), info)
    model = ServedModel(engine, tokenizer, ChatTemplate("v3.1"), name=DEFAULT_MODEL, created=7)
    models = {DEFAULT_MODEL: model, "another-model": replace(model, name="another-model")}
    settings = Settings(database_url=database_url(folder), page_dir=PAGE, api_keys=(key,) if key else (), heartbeat_s=2)
    return world, create_app(models, settings, searcher=Searcher(world, SafeFetcher()))


@contextmanager
def running(*, key: str | None = None) -> Iterator[World]:
    """A world, its server in a thread on a free port. Raises NotBuiltError."""
    with tempfile.TemporaryDirectory() as folder:
        world, app = built(Path(folder), key)
        with serving(app) as server:
            world.url = server.url
            yield world
            world.go_on()


@dataclass
class Killable:
    """The same in a process of its own, which comes back at the same address."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        command = [sys.executable, "-m", "tests.web.world", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url.startswith("http"), "the server did not start"
        self.port = int(url.rpartition(":")[2])
        return url

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


if __name__ == "__main__":
    serve(built(Path(sys.argv[1]))[1], port=int(sys.argv[2]), on_ready=lambda url: print(url, flush=True))
