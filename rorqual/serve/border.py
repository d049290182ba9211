"""The outermost layer: what holds for every request whatever its route.

Every response carries `x-request-id` (the client's own where it is clean) and `openai-processing-ms`, and one
log line tells of it. A key is asked for before anything of the body is read, on every path that was not
declared public: a route that someone adds later is closed until it is opened on purpose. Bodies over the
limit are refused. Exceptions that nobody expected end here, with a traceback in the log and without one in
the answer.

It is plain ASGI because Starlette's BaseHTTPMiddleware puts a queue between the route and the connection, and
then a client's departure is noticed late. Left out: CORS, on purpose; pages of other origins have no business
here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.errors import ApiError, to_api_error
from rorqual.serve.settings import Settings
from rorqual.serve.stream import SHUTTING_DOWN

log = logging.getLogger(__name__)
CLEAN_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, dict(error.headers))


async def answer_error(request: Request, error: Exception) -> Response:
    """The exception handler of the routes. Server faults are logged with the id that the client got."""
    api_error = to_api_error(error)
    if api_error.status >= 500:
        log.error("%s failed", request.scope.get("request_id", "a request"), exc_info=error)
    return error_response(api_error)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """For a client that is gone; 499 (nginx's number) is for the log line."""
    return Response(status_code=499)


class Border:
    """ASGI middleware. `is_public(method, path)` names what needs no key."""

    def __init__(self, app: ASGIApp, settings: Settings, is_public: Callable[[str, str], bool]) -> None:
        self._app = app
        self._settings = settings
        self._is_public = is_public
        self._keys = [_digest(key) for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        crossing = _Crossing(scope, receive, send, self._settings.max_body_bytes)
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, crossing.receive, crossing.send)
            else:
                await error_response(refusal)(scope, receive, crossing.send)
        except Exception as error:
            log.exception("%s failed", crossing.id)
            if not crossing.status:
                await error_response(to_api_error(error))(scope, receive, crossing.send)
        except asyncio.CancelledError:
            if not crossing.status:
                await error_response(SHUTTING_DOWN)(scope, receive, crossing.send)
            raise
        finally:
            took_ms = 1000 * (time.monotonic() - crossing.began)
            log.info("%s %s %s %s %.0f ms", crossing.id, scope["method"], scope["path"], crossing.status, took_ms)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._keys and not self._is_public(scope["method"], scope["path"]):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                return _unauthorized("No API key was sent: put it into the header 'Authorization: Bearer KEY'.")
            sent = _digest(key.strip())
            # Digests have one length and every key is compared: the time taken tells nothing about a key.
            if not sum(hmac.compare_digest(sent, known) for known in self._keys):
                return _unauthorized("The API key is not known to this server.")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            return to_api_error(_too_large(self._settings.max_body_bytes))
        return None


class _Crossing:
    """One request's way over the border: its id, its status once known, its body's size so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        asked = Headers(scope=scope).get("x-request-id", "")
        self.id = asked if CLEAN_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        scope["request_id"] = self.id
        self.began = time.monotonic()
        self.status = 0
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._body_bytes = 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_bytes += len(message.get("body", b""))
        if self._body_bytes > self._max_body_bytes:  # a chunked body announces no length
            raise _too_large(self._max_body_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            took_ms = round(1000 * (time.monotonic() - self.began))
            ours = [(b"x-request-id", self.id.encode()), (b"openai-processing-ms", str(took_ms).encode())]
            message = {**message, "headers": [*message.get("headers", []), *ours]}
        await self._send(message)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, headers={"www-authenticate": "Bearer"})


def _too_large(limit: int) -> HTTPException:
    # The unread rest of the body is still under way on this connection, so it cannot be used again.
    return HTTPException(413, f"The request body is larger than {limit} bytes.", {"connection": "close"})
