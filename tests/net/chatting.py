"""What a chat page does, by its own words, against a server of the harness."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.net.harness import Harness, eventually

Frames = list[tuple[str, dict[str, Any]]]


def new() -> str:
    return str(uuid.uuid4())


@dataclass
class Page:
    server: Harness
    http: httpx.Client

    def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        response = self.http.request(method, path, json=body)
        assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
        return response.json() if response.content else None

    def chat(self, **settings: Any) -> str:
        return str(self.call("POST", "/chats", {"id": new(), "settings": settings})["id"])

    def ask(self, chat: str, content: str, parent: str | None = None, **more: Any) -> tuple[str, str]:
        question, answer = new(), new()
        body = {"id": question, "parent": parent, "content": content, "answer": {"id": answer}} | more
        told = self.call("POST", f"/chats/{chat}/messages", body)
        assert told["answer"]["parent"] == told["question"]["id"] == question
        return question, str(told["answer"]["id"])

    def asked(self, chat: str, content: str, parent: str | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
        """... and waits for the end of the answer."""
        question, answer = self.ask(chat, content, parent, **more)
        return question, self.ended(chat, answer)

    def again(self, chat: str, question: str, **more: Any) -> dict[str, Any]:
        """Another answer, to its end."""
        answer = self.call("POST", f"/chats/{chat}/answers", {"id": new(), "parent": question} | more)
        return self.ended(chat, answer["id"])

    def message(self, chat: str, message: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/chats/{chat}/messages/{message}")
        return found

    def ended(self, chat: str, message: str) -> dict[str, Any]:
        assert eventually(lambda: self.message(chat, message)["status"] != "running", 20)
        return self.message(chat, message)

    def frames(self, chat: str, message: str, after: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        url = f"/chats/{chat}/messages/{message}/events?after={after}"
        with self.http.stream("GET", url) as response:
            assert response.status_code == 200
            position = ""
            for line in response.iter_lines():
                if line.startswith("id: "):
                    position = line[4:]
                elif line.startswith("data: "):
                    yield position, json.loads(line[6:])

    def prompt(self, number: int = -1) -> str:
        """What the engine was asked, markers included."""
        request = self.server.engine.seen[number]
        return self.server.tokenizer.decode(request.prompt, skip_special=False)


def heard(frames: Frames) -> tuple[str, str]:
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
