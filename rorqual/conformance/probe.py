"""How a check asks a server, and how it says what it found.

A check is an async function of a `Probe`. It returns its evidence when the server does what clients rely on, and
raises `Failed` or `Absent` when not. The difference is honesty: a server that refuses a parameter by name lacks a
feature (absent), one that takes it and answers as if it had not been there misleads its client (failed).

Checks look at shapes and at relations between answers, never at what a model knows: a model with random weights
passes on a server that is right.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rorqual.errors import UpstreamError
from rorqual.net import UpstreamClient

Json = dict[str, Any]
QUESTION: list[Json] = [{"role": "user", "content": "Count from one to ten in words."}]


class Failed(Exception):
    """The server takes the request and gets it wrong."""


class Absent(Exception):
    """The server says that it does not have this."""


def require(ok: object, evidence: str) -> None:
    """Raises Failed."""
    if not ok:
        raise Failed(evidence)


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Json:
        try:
            found = json.loads(self.body)
        except ValueError as error:
            raise Failed(f"status {self.status} with a body that is not JSON: {_short(self.body)}") from error
        require(isinstance(found, dict), f"status {self.status} with {_short(self.body)}, which is no object")
        return dict(found)

    @property
    def says(self) -> str:
        """Status and message, for evidence."""
        try:
            error = json.loads(self.body)["error"]
            message = error["message"] if isinstance(error, dict) else str(error)
        except (ValueError, KeyError, TypeError):
            message = _short(self.body)
        return f"{self.status}: {_short(str(message).encode())}"


@dataclass(slots=True)
class Stream:
    """A streamed answer. events: (name, data) in order, name "" where none was sent; longest_silence_s: before the first
    byte, or between two pieces."""

    status: int
    content_type: str
    events: list[tuple[str, str]] = field(default_factory=list)
    longest_silence_s: float = 0.0

    def chunks(self) -> list[Json]:
        """The data of all events but `[DONE]`, parsed."""
        found = []
        for _, data in self.events:
            if data != "[DONE]":
                try:
                    found.append(json.loads(data))
                except ValueError as error:
                    raise Failed(f"an event's data is not JSON: {_short(data.encode())}") from error
        return found


class Probe:
    """base_url: with the version's path or without, as clients are told it; model: "" takes the first one listed."""

    def __init__(self, base_url: str, *, api_key: str = "", model: str = "", timeout_s: float = 120.0) -> None:
        path = urlsplit(base_url).path.rstrip("/")
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.has_key = bool(api_key)
        self._api = f"{self.root}/v1" if path.endswith("/v1") or not path else self.root
        self._client = UpstreamClient(self.root, api_key=api_key, silence_s=timeout_s)
        self._anonymous = UpstreamClient(self.root, silence_s=timeout_s)

    async def close(self) -> None:
        await self._client.close()
        await self._anonymous.close()

    def paths(self, route: str) -> tuple[str, ...]:
        """Where clients look for a route, relative to the root: the API's own prefix, then those of DeepSeek."""
        own = self._api.removeprefix(self.root)
        return tuple(dict.fromkeys((f"{own}{route}", f"/beta{route}", f"/anthropic/v1{route}", route)))

    async def get(self, path: str, *, with_key: bool = True, headers: Mapping[str, str] | None = None) -> Reply:
        client = self._client if with_key else self._anonymous
        response = await client.request("GET", path, headers=headers)
        return Reply(response.status_code, response.headers, response.content)

    async def post(self, path: str, body: Any, *, with_key: bool = True) -> Reply:
        """`body` as JSON, bytes as they are."""
        sent = {"content-type": "application/json"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        client = self._client if with_key else self._anonymous
        response = await client.request("POST", path, content=content, headers=sent)
        return Reply(response.status_code, response.headers, response.content)

    async def leave(self, path: str, body: Json) -> bool:
        """Asks, reads the first bytes of the answer, and closes the connection. Whether it was answered with 200."""
        sent = {"content-type": "application/json"}
        async with self._client.stream("POST", path, content=json.dumps(body).encode(), headers=sent) as response:
            async for _ in response.aiter_bytes():
                break
            return response.status_code == 200

    async def ask(self, route: str, body: Json, *names: str) -> Json:
        """The 200 answer of the first path that has the route. `names`: parameters whose refusal means Absent."""
        for path in self.paths(route):
            reply = await self.post(path, body)
            if not _no_route(reply):
                break
        _accept(reply, names)
        return reply.json()

    async def chat(self, *names: str, messages: Sequence[Json] = QUESTION, **more: Any) -> Json:
        body = {"model": self.model, "messages": list(messages), "max_tokens": 24, **more}
        return await self.ask("/chat/completions", body, *names)

    async def stream(self, route: str, body: Json, *names: str) -> Stream:
        """The whole stream of the first path that has the route."""
        for path in self.paths(route):
            found, reply = await self._streamed(path, {**body, "stream": True})
            if not _no_route(reply):
                break
        _accept(reply, names)
        return found

    async def chat_stream(self, *names: str, **more: Any) -> Stream:
        body = {"model": self.model, "messages": QUESTION, "max_tokens": 24, **more}
        return await self.stream("/chat/completions", body, *names)

    async def _streamed(self, path: str, body: Json) -> tuple[Stream, Reply]:
        heard, raw = time.monotonic(), b""
        longest = 0.0
        headers = {"content-type": "application/json"}
        try:
            async with self._client.stream(
                "POST", path, content=json.dumps(body).encode(), headers=headers
            ) as response:
                async for piece in response.aiter_bytes():
                    now = time.monotonic()
                    longest, heard = max(longest, now - heard), now
                    raw += piece
        except UpstreamError as error:
            if not raw:
                raise
            raise Failed(f"the connection broke in mid-stream: {error}") from error
        stream = Stream(response.status_code, response.headers.get("content-type", ""), list(_events(raw)), longest)
        return stream, Reply(response.status_code, response.headers, raw)


def message_of(answer: Json) -> Json:
    """The first choice's message. Raises Failed where there is none."""
    choices = answer.get("choices")
    require(isinstance(choices, list) and choices, f"no choices: {_short(json.dumps(answer).encode())}")
    assert isinstance(choices, list)
    message = choices[0].get("message")
    require(isinstance(message, dict), f"the first choice has no message: {_short(json.dumps(choices[0]).encode())}")
    return dict(message)


def usage_of(answer: Json) -> Json:
    usage = answer.get("usage")
    require(isinstance(usage, dict), "no usage")
    return dict(usage or {})


def _accept(reply: Reply, names: Sequence[str]) -> None:
    """Raises Absent where the route is missing or one of the names is refused, Failed for any other error."""
    if _no_route(reply):
        raise Absent("no such route")
    if reply.status in (400, 422, 501) and any(name in reply.body.decode("utf-8", "replace") for name in names):
        raise Absent(f"refused with {reply.says}")
    require(reply.status == 200, f"answered {reply.says}")


def _no_route(reply: Reply) -> bool:
    """404 may also mean a model; then the message speaks of one."""
    return reply.status in (404, 405) and b"odel" not in reply.body


def _events(raw: bytes) -> Iterator[tuple[str, str]]:
    """Server-sent events by the standard: comments are nothing, data lines of one event belong together."""
    for block in raw.replace(b"\r\n", b"\n").decode("utf-8", "replace").split("\n\n"):
        fields = [line.partition(":") for line in block.split("\n") if line and not line.startswith(":")]
        data = "\n".join(value.removeprefix(" ") for name, _, value in fields if name == "data")
        name = next((value.strip() for key, _, value in fields if key == "event"), "")
        if data:
            yield name, data


def _short(text: bytes, limit: int = 120) -> str:
    spelled = " ".join(text.decode("utf-8", "replace").split())
    return spelled if len(spelled) <= limit else spelled[: limit - 1] + "…"
