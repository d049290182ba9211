"""Conversations whose models are another server's."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.app import Settings, create_app
from rorqual.serve.database import database_url
from rorqual.serve.upstream import Upstream
from tests.net.chatting import Page
from tests.net.harness import Harness, running, serving


@contextlib.contextmanager
def before(url: str, directory: Path, server: Harness | None = None) -> Iterator[Page]:
    app = create_app({}, Settings(database_url=database_url(directory)), Upstream(url))
    with serving(app) as front, httpx.Client(base_url=front.url, timeout=30) as http:
        yield Page(server, http)  # type: ignore[arg-type]


def test_our_own_server_behind_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with running(tokenizer, context=4096) as server, before(server.url, tmp_path, server) as page:
        [card, _] = page.call("GET", "/chats/setup")["models"]
        assert card == {
            "id": "tiny", "context_length": 4096, "max_output": 4096, "thinking": True, "thinking_mode": "switch"
        }  # fmt: skip
        server.script("It eats krill.", thought="Food.")
        chat = page.chat(thinking=True)
        _, ended = page.asked(chat, "What?")
        assert (ended["status"], ended["thinking"], ended["content"]) == ("done", "Food.", "It eats krill.")
        assert ended["model"] == "tiny" and ended["usage"]["prompt_tokens"] > 0
        server.script("unheard " * 20)
        _, cut = page.asked(
            chat, "Why?", ended["id"], answer={"id": "cut", "settings": {"max_tokens": 4, "thinking": False}}
        )
        assert cut["status"] == "length"
        server.script("goes on")
        page.call("POST", f"/chats/{chat}/messages/cut/continue", {})
        assert page.ended(chat, "cut")["content"] == cut["content"] + "goes on"
        assert page.prompt().endswith("</think>" + cut["content"])
        server.script("x", fail_after=0)
        _, failed = page.asked(chat, "?", ended["id"])
        assert failed["status"] == "error" and failed["error"]["message"]


class Theirs(BaseHTTPRequestHandler):
    """A server that lists itself as vLLM and says two words; what it was asked is kept."""

    asked: list[dict[str, Any]]
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "ds", "owned_by": "vllm", "max_model_len": 99}]}), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        if body["messages"][-1]["content"] == "break":
            self._send('data: {"error": {"message": "out of memory"}}\n\n', "text/event-stream")
            return
        deltas: list[dict[str, Any]] = [{"reasoning": "hm"}, {"content": "Two "}, {"content": "words"}]
        chunks = [{"model": "ds", "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
        end: list[dict[str, Any]] = [
            {"model": "ds", "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]},
            {"model": "ds", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}},
        ]
        text = "".join(f"data: {json.dumps(c)}\n\n" for c in (*chunks, *end)) + "data: [DONE]\n\n"
        self._send(text, "text/event-stream")

    def _send(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def theirs() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Theirs,), {"asked": asked}))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", asked
    httpd.shutdown()


def test_vllm_is_asked_in_its_own_words(theirs: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    url, asked = theirs
    with before(url, tmp_path) as page:
        chat = page.chat(thinking=True, temperature=0.5)
        _, ended = page.asked(chat, "?")
        assert (ended["status"], ended["thinking"], ended["content"]) == ("length", "hm", "Two words")
        assert ended["model"] == "ds" and ended["usage"]["completion_tokens"] == 3
        assert asked[0]["chat_template_kwargs"]["thinking"] is True and asked[0]["temperature"] == 0.5
        page.call("POST", f"/chats/{chat}/messages/{ended['id']}/continue", {})
        assert page.ended(chat, ended["id"])["content"] == "Two wordsTwo words"
        assert asked[1]["continue_final_message"] is True and asked[1]["add_generation_prompt"] is False
        assert page.message(chat, ended["id"])["usage"]["completion_tokens"] == 6
        _, broken = page.asked(chat, "break")
        assert broken["status"] == "error" and "out of memory" in broken["error"]["message"]


def test_an_upstream_that_is_away_is_an_error_of_the_answer(tmp_path: Path) -> None:
    with before("http://127.0.0.1:9", tmp_path) as page:
        chat = page.chat()
        _, ended = page.asked(chat, "?")
        assert ended["status"] == "error" and ended["error"]["code"] == "upstream_unavailable"
        page.call("GET", "/chats/setup", status=502)
