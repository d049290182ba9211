"""Conversations over HTTP against a scripted engine: asked, streamed, stopped, continued, found again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.app import Settings
from rorqual.serve.database import database_url
from tests.net.harness import Gate, Harness, eventually, running


def new() -> str:
    return str(uuid.uuid4())


@dataclass
class Page:
    """What the page does, by its own words."""

    server: Harness
    http: httpx.Client

    def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        response = self.http.request(method, path, json=body)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    def chat(self, **settings: Any) -> str:
        return str(self.call("POST", "/chats", {"id": new(), "settings": settings})["id"])

    def ask(self, chat: str, content: str, parent: str | None = None, **more: Any) -> tuple[str, str]:
        question, answer = new(), new()
        body = {"id": question, "parent": parent, "content": content, "answer": {"id": answer}} | more
        told = self.call("POST", f"/chats/{chat}/messages", body)
        assert told["answer"]["parent"] == told["question"]["id"] == question
        return question, answer

    def message(self, chat: str, message: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/chats/{chat}/messages/{message}")
        return found

    def ended(self, chat: str, message: str) -> dict[str, Any]:
        assert eventually(lambda: self.message(chat, message)["status"] != "running", 20)
        return self.message(chat, message)

    def frames(self, chat: str, message: str, after: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        url = f"/chats/{chat}/messages/{message}/events?after={after}"
        with self.http.stream("GET", url) as response:
            position = ""
            for line in response.iter_lines():
                if line.startswith("id: "):
                    position = line[4:]
                elif line.startswith("data: "):
                    yield position, json.loads(line[6:])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(database_url=database_url(tmp_path), heartbeat_s=0.2)


@pytest.fixture
def page(tokenizer: Tokenizer, settings: Settings) -> Iterator[Page]:
    with running(tokenizer, settings, context=8192) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        yield Page(server, http)


def heard(frames: list[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    """Thought and text as a listener puts them together."""
    thinking = text = ""
    for _, frame in frames:
        if frame["type"] in ("state", "end"):
            thinking, text = frame["message"]["thinking"] or "", frame["message"]["content"]
        elif frame["type"] == "thinking":
            thinking += frame["text"]
        elif frame["type"] == "text":
            text += frame["text"]
    return thinking, text


def test_a_question_is_answered_and_kept(page: Page) -> None:
    page.server.script("It eats krill.", thought="What does it eat?")
    chat = page.chat(thinking=True)
    question, answer = page.ask(chat, "What does a whale eat?")
    frames = list(page.frames(chat, answer))
    assert frames[0][1]["type"] == "state" and frames[-1][1]["type"] == "end"
    assert heard(frames) == heard(frames[:-1]) == ("What does it eat?", "It eats krill.")
    found = page.call("GET", f"/chats/{chat}")
    assert found["title"] == "What does a whale eat?" and found["head"] == answer
    assert [m["id"] for m in found["messages"]] == [question, answer]
    kept = found["messages"][1]
    assert (kept["status"], kept["thinking"], kept["content"]) == ("done", "What does it eat?", "It eats krill.")
    usage = kept["usage"]
    assert usage["completion_tokens"] > usage["reasoning_tokens"] == kept["thinking_tokens"] > 0
    assert usage["prompt_tokens"] > 0 and usage["requests"] == 1 and kept["thinking_s"] >= 0
    assert kept["settings"]["thinking"] and kept["model"] == "tiny"


def test_nobody_listens_and_the_answer_is_there(page: Page, gate: Gate) -> None:
    page.server.script("A whale of an answer.", gate=gate.wait)
    chat = page.chat()
    _, answer = page.ask(chat, "?")
    assert page.message(chat, answer)["status"] == "running"
    gate.open()
    assert page.ended(chat, answer)["content"] == "A whale of an answer."
