"""The platform before another server: `serve --upstream URL` puts keys, limits, deadlines, metrics, logs and the
chat page before a vLLM, an SGLang or another OpenAI-compatible server.

It passes requests on rather than translating them. A body goes through as it came, and so does the answer, byte
for byte: what the upstream understands, clients can use, what it lacks, this does not add. Two things are changed
on the way, both said here: `cache_salt` (vLLM's field for prefix caches apart) becomes the caller's and the user's
wherever there is a key or a `user_id`; and a stream's usage is asked for, because limits are paid from it, and
taken out again where the client had not asked.

What the platform promises holds here too. Silence is filled with heartbeats, deadlines end what hangs, a client
that leaves closes the upstream's connection, and a stream that the upstream breaks off ends with an error and in
good form. Only the routes below are passed on: an upstream's administration stays out of reach.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response
from starlette.types import Receive

from rorqual.errors import RequestError, UpstreamError
from rorqual.net import UpstreamClient
from rorqual.serve.callers import VISIT
from rorqual.serve.errors import ApiError, Refused
from rorqual.serve.metrics import Metrics
from rorqual.serve.settings import Settings
from rorqual.serve.stream import Attended, EventStream

PROBE_S = 2.0
# What a stream of each kind says last. Everything else that is passed on has no streams.
LAST_WORDS: Mapping[str, tuple[bytes, ...]] = {
    "/chat/completions": (b"data: [DONE]",),
    "/completions": (b"data: [DONE]",),
    "/messages": (b"event: message_stop", b"event: error"),
    "/responses": (b"event: response.completed", b"event: response.incomplete", b"event: response.failed"),
}
WITH_USAGE_OPTION = ("/chat/completions", "/completions")
# vLLM and SGLang have these beside /v1 and not below it.
AT_ROOT = ("/tokenize", "/detokenize")
ROUTES = (*LAST_WORDS, "/messages/count_tokens", "/embeddings", "/rerank", "/score", *AT_ROOT)
# For the published document: what the bodies hold is the upstream's matter.
PASSED_ON: Mapping[str, Any] = {
    "openapi_extra": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    },
    "responses": {200: {"description": "The upstream's answer", "content": {"text/event-stream": {}}}},
}
PASSED_HEADERS = ("content-type", "retry-after", "retry-after-ms")
SENT_HEADERS = ("content-type", "accept", "anthropic-version", "anthropic-beta")


class Upstream:
    """base_url: the server's, with or without /v1."""

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self.client = UpstreamClient(base_url.rstrip("/").removesuffix("/v1"), api_key=api_key)

    async def ready(self) -> bool:
        try:
            return (await self.client.request("GET", "/health", silence_s=PROBE_S)).is_success
        except UpstreamError:
            return False

    async def close(self) -> None:
        await self.client.close()

    def router(self, settings: Settings, metrics: Metrics) -> APIRouter:
        router = APIRouter()

        async def listing(request: Request) -> Response:
            name = request.path_params.get("name")
            return await self._passed(f"/v1/models/{name}" if name else "/v1/models")

        router.add_api_route("/models", listing, methods=["GET"])
        router.add_api_route("/models/{name:path}", listing, methods=["GET"])
        for route in ROUTES:
            declared = {**PASSED_ON, "methods": ["POST"]}
            router.add_api_route(route, self._handler(route, settings, metrics), **declared)
        return router

    def _handler(self, route: str, settings: Settings, metrics: Metrics) -> Any:
        async def handle(request: Request) -> Response:
            relay = Relay(self.client, route, await request.body(), dict(request.headers), settings, metrics)
            if relay.streams:
                return EventStream(relay.events(), relay, settings)
            return await relay.answer(request.receive)

        return handle

    async def _passed(self, path: str) -> Response:
        response = await self.client.request("GET", path, silence_s=30.0)
        return Response(response.content, response.status_code, _passed_headers(response))


class Relay:
    """One request on its way there and back. As a Dialect it spells errors as the route's clients expect them."""

    def __init__(
        self,
        client: UpstreamClient,
        route: str,
        body: bytes,
        headers: Mapping[str, str],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        """Raises RequestError for a body that is not a JSON object."""
        self._client, self._route, self._settings, self._metrics = client, route, settings, metrics
        self._path = route if route in AT_ROOT else f"/v1{route}"
        self._headers = {name: headers[name] for name in SENT_HEADERS if name in headers}
        self._body = _object(body)
        self.streams = bool(self._body.get("stream")) and route in LAST_WORDS
        self._hides_usage = self.streams and route in WITH_USAGE_OPTION and self._ask_for_usage()
        self._salt()
        self._seen = Seen()

    def encode(self, event: Any) -> bytes:
        return bytes(event)

    def encode_error(self, error: ApiError) -> bytes:
        if self._route in WITH_USAGE_OPTION:
            return _data(error.body()) + b"data: [DONE]\n\n"
        return b"event: error\n" + _data(error.anthropic_body())

    async def answer(self, receive: Receive) -> Response:
        """The whole answer at once."""
        async with Attended(self._one(), receive, self._settings) as attended:
            async for response in attended:
                if response is not None:
                    found: Any = response
        return Response(found.content, found.status_code, _passed_headers(found))

    async def events(self) -> AsyncGenerator[Any, None]:
        """The stream's events, each whole, as bytes. Raises Refused where the upstream refuses, UpstreamError where it
        breaks off."""
        began, finished = time.monotonic(), False
        try:
            async with self._sent() as response:
                if not response.is_success:
                    raise Refused(_their_error(response, await response.aread()))
                async for event in _split(response):
                    self._seen.read(event, began)
                    finished = finished or event.startswith(LAST_WORDS[self._route])
                    if not (self._hides_usage and _is_usage_alone(event)):
                        yield event
            if not finished:
                raise UpstreamError(f"{self._client.base_url} broke off in the middle of its answer")
        finally:
            self._account(began, "stop" if finished else "error")

    async def _one(self) -> AsyncGenerator[Any, None]:
        began, ok = time.monotonic(), False
        try:
            async with self._sent() as response:
                await response.aread()
                ok = response.is_success
                if ok:
                    self._seen.count(response.content)
                elif not self._route.startswith("/messages"):  # Anthropic's errors are of another shape
                    raise Refused(_their_error(response, response.content))
                yield response
        finally:
            self._account(began, "stop" if ok else "error")

    def _sent(self) -> Any:
        visit = VISIT.get()
        headers = self._headers | ({"x-request-id": visit.request_id} if visit else {})
        headers["content-type"] = "application/json"
        content = json.dumps(self._body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        # Until something comes the request is queued there; between the pieces httpx keeps the same clock.
        silence_s = max(self._settings.queue_timeout_s, self._settings.idle_timeout_s)
        return self._client.stream("POST", self._path, content=content, headers=headers, silence_s=silence_s)

    def _ask_for_usage(self) -> bool:
        """Whether the client had not asked itself."""
        options = self._body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            return False  # the upstream will say what is wrong with it
        self._body["stream_options"] = {**(options or {}), "include_usage": True}
        return not (options or {}).get("include_usage")

    def _salt(self) -> None:
        visit = VISIT.get()
        user, own = self._body.get("user_id") or "", self._body.get("cache_salt") or ""
        salt = visit.caller.salt(f"{user}/{own}" if own else str(user)) if visit else ""
        if salt and self._route in ("/chat/completions", "/completions", "/responses"):
            self._body["cache_salt"] = hashlib.sha256(salt.encode("utf-8", "replace")).hexdigest()

    def _account(self, began: float, reason: str) -> None:
        """Pay for what is known to have been used. A stream that was left early told no usage: an event counts as a
        token then."""
        seen, visit, labels = self._seen, VISIT.get(), (self._seen.model, "0")
        prompt, completion = seen.prompt_tokens, seen.completion_tokens or seen.events
        if visit is not None:
            visit.caller.spend(prompt + completion)
            visit.model, visit.finish_reason = seen.model or "upstream", reason
            visit.prompt_tokens, visit.completion_tokens, visit.cached_tokens = prompt, completion, seen.cached_tokens
        if not seen.model:  # it never answered, and names that clients make up are no labels
            return
        self._metrics.prompt_tokens.labels(*labels).inc(prompt)
        self._metrics.new_tokens.labels(*labels).inc(completion)
        self._metrics.cached_tokens.labels(*labels).inc(seen.cached_tokens)
        self._metrics.request_s.labels(*labels).observe(time.monotonic() - began)
        self._metrics.ended.labels(*labels, reason).inc()
        if seen.first_s is not None:
            self._metrics.first_token_s.labels(*labels).observe(seen.first_s)


@dataclass(slots=True)
class Seen:
    """What an answer told of itself."""

    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    events: int = 0
    first_s: float | None = None

    def read(self, event: bytes, began: float) -> None:
        self.events += 1
        if self.first_s is None:
            self.first_s = time.monotonic() - began
        if not self.model or b'"usage"' in event:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    self.count(line[5:])

    def count(self, body: bytes) -> None:
        """OpenAI's usage, the Responses API's or Anthropic's (whose stream tells it in two pieces)."""
        try:
            found = json.loads(body)
        except ValueError:
            return
        if not isinstance(found, dict):
            return
        found = next((found[key] for key in ("response", "message") if isinstance(found.get(key), dict)), found)
        self.model = self.model or str(found.get("model") or "")
        usage = found.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens = _number(usage, "prompt_tokens", "input_tokens") or self.prompt_tokens
            self.completion_tokens = _number(usage, "completion_tokens", "output_tokens") or self.completion_tokens
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
            self.cached_tokens = _number(details, "cached_tokens", "cache_read_input_tokens") or self.cached_tokens


def _number(found: Any, *names: str) -> int:
    values = (found.get(name) for name in names) if isinstance(found, dict) else ()
    return next((value for value in values if isinstance(value, int)), 0)


async def _split(response: httpx.Response) -> AsyncIterator[bytes]:
    """Server-sent events, each with its blank line, as they were sent."""
    rest = b""
    async for piece in response.aiter_bytes():
        rest = (rest + piece).replace(b"\r\n", b"\n")
        *events, rest = rest.split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest.strip():
        yield rest + b"\n\n"


def _is_usage_alone(event: bytes) -> bool:
    if b'"usage"' not in event:
        return False
    try:
        chunk = json.loads(event.removeprefix(b"data:"))
    except ValueError:
        return False
    return isinstance(chunk, dict) and chunk.get("choices") == [] and bool(chunk.get("usage"))


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestError("The request body must be a JSON object")
    return found


def _their_error(response: httpx.Response, body: bytes) -> ApiError:
    """An upstream's error in our shape: vLLM's codes are numbers, and proxies on the way answer in HTML."""
    headers = {name: response.headers[name] for name in PASSED_HEADERS[1:] if name in response.headers}
    try:
        found = json.loads(body)
        error = found["error"] if isinstance(found.get("error"), dict) else found
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, KeyError, AttributeError, TypeError):
        message, param, code = f"The upstream answered with status {response.status_code}.", None, None
    return ApiError(
        response.status_code, message, param and str(param), code if isinstance(code, str) else None, headers
    )


def _passed_headers(response: httpx.Response) -> dict[str, str]:
    return {name: response.headers[name] for name in PASSED_HEADERS if name in response.headers}


def _data(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
