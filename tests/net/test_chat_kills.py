"""The server killed in the middle of answers: afterwards every answer is there, whole or cut, and none twice.

`make soak` does it a hundred times; here are a few.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.net.chat_server import ANSWER, THOUGHT
from tests.net.chatting import new
from tests.net.harness import eventually

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def server(directory: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.net.chat_server", str(directory), "0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        assert url.startswith("http"), "the server did not start"
        with httpx.Client(base_url=url, timeout=30) as http:
            yield child, http
    finally:
        child.kill()
        child.wait()


def send(http: httpx.Client, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
    """None where the server died over it."""
    try:
        response = http.request(method, path, json=body)
    except httpx.TransportError:
        return None
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def ask_and_kill(directory: Path, asked: dict[str, dict[str, Any]], rng: random.Random) -> None:
    """Some questions, and a kill at a random moment of the answers. `asked` is what a client would send again: chat to
    the body of its last question."""
    with server(directory) as (child, http):
        began = time.monotonic()
        for chat in asked or {new(): {} for _ in range(3)}:
            if send(http, "POST", "/chats", {"id": chat, "settings": {"thinking": rng.random() < 0.5}}) is None:
                break
            leaf = asked.get(chat, {}).get("answer", {}).get("id")
            body = {"id": new(), "parent": leaf, "content": "Say them.", "answer": {"id": new()}}
            asked[chat] = body
            send(http, "POST", f"/chats/{chat}/messages", body)
        time.sleep(max(0.0, rng.uniform(0.0, 1.2) - (time.monotonic() - began)))  # the moment of the kill is the test
        child.send_signal(signal.SIGKILL)


def whole_or_cut(message: dict[str, Any]) -> str:
    """The answer's status, after making sure that its text is a beginning of what was said, and not more."""
    assert message["status"] in ("done", "cut"), message
    thought = message["thinking"] or ""
    assert ANSWER.startswith(message["content"]) and THOUGHT.startswith(thought)
    if message["status"] == "done":
        assert message["content"] == ANSWER and thought in ("", THOUGHT)
    return str(message["status"])


def check_and_finish(directory: Path, asked: dict[str, dict[str, Any]]) -> dict[str, int]:
    """What a client finds and does afterwards: everything is there once; it sends again what it had no answer to, and
    lets what was cut go on."""
    seen = {"done": 0, "cut": 0, "lost_with_its_question": 0}
    with server(directory) as (_, http):
        for chat, body in asked.items():
            send(http, "POST", "/chats", {"id": chat})
            messages = (send(http, "GET", f"/chats/{chat}") or {})["messages"]
            ids = [m["id"] for m in messages]
            assert len(set(ids)) == len(ids)
            parents = [m["parent"] for m in messages if m["role"] == "assistant"]
            assert len(set(parents)) == len(parents), "a question has two answers"
            for message in messages:
                if message["role"] == "assistant":
                    seen[whole_or_cut(message)] += 1
            if body["id"] not in ids:  # the server died before it was stored: the client sends it again
                seen["lost_with_its_question"] += 1
            path = f"/chats/{chat}/messages/{body['answer']['id']}"
            send(http, "POST", f"/chats/{chat}/messages", body)
            if (send(http, "GET", path) or {})["status"] == "cut":
                send(http, "POST", f"{path}/continue", {})
            assert eventually(lambda path=path: (send(http, "GET", path) or {})["status"] == "done", 60)  # type: ignore[misc]
            assert whole_or_cut(send(http, "GET", path) or {}) == "done"
            assert len((send(http, "GET", f"/chats/{chat}") or {})["messages"]) == len(
                {*ids, body["id"], body["answer"]["id"]}
            )
    return seen


def test_killed_in_the_middle_of_answers(tmp_path: Path, rng: random.Random, request: pytest.FixtureRequest) -> None:
    asked: dict[str, dict[str, Any]] = {}
    seen = {"done": 0, "cut": 0}
    for kill in range(request.config.getoption("--chat-kills")):
        if kill % 5 == 0:
            asked.clear()  # other conversations: they need not grow without end
        ask_and_kill(tmp_path, asked, rng)
        for status, count in check_and_finish(tmp_path, asked).items():
            seen[status] = seen.get(status, 0) + count
    print(f"answers found after the kills: {seen}")
    assert sum(seen.values()) > 0


@pytest.mark.parametrize(("signals", "left"), [(1, ("done",)), (2, ("done", "cut"))])
def test_a_server_that_is_told_to_stop_finishes_or_marks_what_runs(
    tmp_path: Path, signals: int, left: tuple[str, ...]
) -> None:
    """The first Ctrl-C waits for answers as for requests, the second does not."""
    chat, answer = new(), new()
    with server(tmp_path) as (child, http):
        send(http, "POST", "/chats", {"id": chat})
        body = {"id": new(), "parent": None, "content": "?", "answer": {"id": answer}}
        send(http, "POST", f"/chats/{chat}/messages", body)
        for _ in range(signals):
            child.send_signal(signal.SIGINT)
        child.wait(30)
    with server(tmp_path) as (_, http):
        assert whole_or_cut((send(http, "GET", f"/chats/{chat}") or {})["messages"][1]) in left
