"""A server for the chat page's tests: it serves the built page and answers from a script.

It stands in for the real server so that the tests can say exactly what the page receives, and when:
each line of the script is one thing that can happen to a stream. Standard library only.

The last user message picks the answer by its first word (see `ANSWERS` and `ScriptedApi.stream`):

    markdown   a list, a table, a code block            slow      a word every 50 ms, for 20 seconds
    think      reasoning first, then the answer         fail      HTTP 503
    long       thirty paragraphs                        fault     an error inside the stream
    cut        the connection closes without [DONE]     other     one short sentence
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mimetypes import guess_type
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "rorqual" / "serve" / "page"
MARKDOWN = """\
The blue whale is the largest animal known to have lived. Three of its relatives, all of them **rorquals**:

1. The **fin whale**, fast and slender, with one white jaw.
2. The **humpback**, which sings for hours and catches fish in nets of bubbles.
3. The **minke whale**, the smallest of the family.

| Whale    | Length | Weight |
| :------- | -----: | -----: |
| Blue     |   30 m |  150 t |
| Fin      |   26 m |   70 t |
| Humpback |   16 m |   30 t |

A gulp takes in more water than the whale weighs. In Python:

```python
def krill_per_gulp(litres: float, krill_per_litre: float = 10) -> int:
    \"\"\"How many krill one mouthful holds.\"\"\"
    return round(litres * krill_per_litre)
```

Raw HTML stays text: <img src=x onerror=alert(1)>. A [link](https://example.org/whales) opens in a new tab, \
a [bad one](javascript:alert(1)) does not, and ![a whale](https://example.org/whale.png) is not loaded.
"""
THOUGHTS = {
    "think": """\
The question is how many times the letter *r* occurs in "rorqual".

Spelling it out: r, o, r, q, u, a, l. The first letter is an r and so is the third. No other letter is.
"""
}
ANSWERS = {
    "markdown": MARKDOWN,
    "think": "The letter *r* occurs **twice** in “rorqual”: first and third.",
    "long": "\n\n".join(f"Paragraph {n}: the whale swam on, under the ice and past the islands." for n in range(1, 31)),
    "fault": "This is as far as",
    "cut": "The connection will close after these words.",
    "slow": " ".join(f"word{n}" for n in range(400)),
}


@dataclass
class ScriptedApi:
    """What the server is told, and what it has seen."""

    api_key: str | None = None
    models: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    broken_off: threading.Event = field(default_factory=threading.Event)
    fail_once: bool = False
    pace_s: float = 0.002
    url: str = ""

    def reset(self) -> None:
        self.api_key, self.fail_once, self.pace_s = None, False, 0.002
        self.models = [
            {"id": "rorqual-nano", "object": "model", "created": 0, "owned_by": "rorqual",
             "max_model_len": 4096, "thinking": True},
        ]  # fmt: skip
        self.requests = []
        self.broken_off = threading.Event()

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The lines of one answer, in time."""
        kind = _kind(body)
        text = ANSWERS.get(kind, "A rorqual is a whale with a pleated throat.")
        pace = 0.05 if kind == "slow" else self.pace_s
        reasoning = 0
        yield ": keep-alive\n\n"
        if kind in THOUGHTS and body.get("thinking", {}).get("type") == "enabled":
            for piece in _pieces(THOUGHTS[kind]):
                time.sleep(max(pace, 0.02))
                reasoning += 1
                yield _event({"choices": [{"index": 0, "delta": {"reasoning_content": piece, "content": None}}]})
        completion = reasoning
        for piece in _pieces(text):
            time.sleep(pace)
            completion += 1
            yield _event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if kind == "fault":
            yield _event({"error": {"message": "the engine ran out of memory", "type": "server_error"}})
            return
        if kind == "cut":
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {
            "prompt_tokens": 52,
            "completion_tokens": completion,
            "prompt_cache_hit_tokens": 32,
            "prompt_cache_miss_tokens": 20,
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _kind(body: dict[str, Any]) -> str:
    last = body["messages"][-1]["content"].split()
    return re.sub(r"\W", "", last[0]).lower() if last else ""


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*?", text)


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _handler(api: ScriptedApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                if self.allowed():
                    self.send(200, json.dumps({"object": "list", "data": api.models}).encode(), "application/json")
                return
            file = PAGE / (self.path.split("?")[0].lstrip("/") or "index.html")
            if file.is_file() and file.resolve().is_relative_to(PAGE):
                self.send(200, file.read_bytes(), guess_type(file.name)[0] or "application/octet-stream")
            else:
                self.refuse(404, "not found")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            api.requests.append(body)
            if _kind(body) == "fail" or api.fail_once:
                api.fail_once = False
                self.refuse(503, "The server is busy, try again later.")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for line in api.stream(body):
                    self.wfile.write(line.encode())
                    self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                api.broken_off.set()

        def allowed(self) -> bool:
            if api.api_key is None or self.headers["Authorization"] == f"Bearer {api.api_key}":
                return True
            self.refuse(401, "Authentication fails: no or a wrong API key.")
            return False

        def refuse(self, status: int, message: str) -> None:
            error = {"message": message, "type": "error", "param": None, "code": str(status)}
            self.send(status, json.dumps({"error": error}).encode(), "application/json")

        def send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class NotBuiltError(Exception):
    """There is no page to serve."""


def serve_script() -> tuple[ScriptedApi, ThreadingHTTPServer]:
    """Starts the server on a free port; the caller shuts it down. Raises NotBuiltError without a page."""
    if not (PAGE / "index.html").is_file():
        raise NotBuiltError("The chat page is not built: run `npm ci && npm run build` in web/ (Node 20 or newer).")
    api = ScriptedApi()
    api.reset()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return api, server
