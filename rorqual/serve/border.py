"""The outermost layer: what holds for every request whatever its route.

Every response carries `x-request-id` (the client's own where it is clean), `openai-processing-ms` and what is
left of the key's limits, and one log line tells of it. A key is asked for before anything of the body is
read, on every path that was not declared public: a route that someone adds later is closed until it is opened
on purpose. POST is what costs, but where it was declared free: its requests are counted against the key's
limits, refused beyond what the server can hold, and refused while it drains. Bodies over the limit are
refused. Exceptions that nobody expected end here, with a traceback in the log and without one in the answer.

It is plain ASGI because Starlette's BaseHTTPMiddleware puts a queue between the route and the connection, and
then a client's departure is noticed late. Left out: CORS, on purpose; pages of other origins have no business
here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.serve.callers import VISIT, Callers, Visit
from rorqual.serve.errors import RETRY_LATER, ApiError, log_fault, to_api_error
from rorqual.serve.keys import Keyring
from rorqual.serve.metrics import Metrics
from rorqual.serve.settings import Settings
from rorqual.serve.stream import SHUTTING_DOWN

log = logging.getLogger(__name__)
CLEAN_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def error_response(error: ApiError, scope: Scope) -> Response:
    return JSONResponse(error.body_for(scope["path"]), error.status, dict(error.headers))


async def answer_error(request: Request, error: Exception) -> Response:
    """The exception handler of the routes. Server faults are logged with the id that the client got."""
    api_error = to_api_error(error)
    if api_error.status >= 500:
        log_fault(log, request.scope.get("request_id", "a request"), error)
    if api_error.status == 405 and (methods := request.app.state.methods_of(request.url.path)):
        # The framework names those of the first route that has the path, not of all.
        api_error = replace(api_error, headers={"Allow": ", ".join(methods)})
    return error_response(api_error, request.scope)


async def answer_nobody(request: Request, error: Exception) -> Response:
    """For a client that is gone; 499 (nginx's number) is for the log line."""
    return Response(status_code=499)


@dataclass(slots=True)
class Traffic:
    """in_flight: requests being answered, of those that cost; draining: the server is about to stop."""

    in_flight: int = 0
    draining: bool = False


class Border:
    """ASGI middleware. `is_public(method, path)` names what needs no key, `is_free(path)` the POSTs that cost nothing,
    `is_upload(path)` those whose bodies may be larger."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keyring: Keyring,
        traffic: Traffic,
        metrics: Metrics,
        is_public: Callable[[str, str], bool],
        is_free: Callable[[str], bool] = lambda path: False,
        is_upload: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring
        self._traffic = traffic
        self._metrics = metrics
        self._is_public = is_public
        self._is_free = is_free
        self._is_upload = is_upload
        self._callers = Callers(time.monotonic)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        uploads = self._is_upload(scope["path"])
        limit = self._settings.max_upload_bytes if uploads else self._settings.max_body_bytes
        crossing = _Crossing(scope, receive, send, limit, self._metrics)
        try:
            refusal = await self._identify(crossing, scope) or self._enter(crossing, scope)
            if refusal is None:
                await self._app(scope, crossing.receive, crossing.send)
            else:
                await error_response(refusal, scope)(scope, receive, crossing.send)
        except Exception as error:
            if crossing.gone:
                return
            log.exception("%s failed", crossing.id)
            if not crossing.status:
                await error_response(to_api_error(error), scope)(scope, receive, crossing.send)
        except asyncio.CancelledError:
            if not crossing.status:
                await error_response(SHUTTING_DOWN, scope)(scope, receive, crossing.send)
            raise
        finally:
            self._leave(crossing)
            crossing.tell(scope)

    async def _identify(self, crossing: _Crossing, scope: Scope) -> ApiError | None:
        """Whose request it is. What is public belongs to nobody, even where a key was sent."""
        await self._keyring.refresh()
        headers, key = Headers(scope=scope), None
        if self._keyring.required and not self._is_public(scope["method"], scope["path"]):
            scheme, _, secret = headers.get("authorization", "").partition(" ")
            sent = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
            if not sent:
                return _unauthorized("No API key was sent: put it into the header 'Authorization: Bearer KEY'.")
            key = self._keyring.find(sent)
            if key is None:
                return _unauthorized("The API key is not known to this server.")
        crossing.visit = Visit(crossing.id, self._callers.of(key))
        VISIT.set(crossing.visit)
        return None

    def _enter(self, crossing: _Crossing, scope: Scope) -> ApiError | None:
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length) > crossing.max_body_bytes:
            return to_api_error(_too_large(crossing.max_body_bytes))
        if scope["method"] != "POST" or crossing.visit is None or self._is_free(scope["path"]):
            return None
        if self._traffic.draining:
            # The connection is about to end, and a retry should find another server.
            return ApiError(503, SHUTTING_DOWN.message, headers={**RETRY_LATER, "connection": "close"})
        if self._traffic.in_flight >= self._settings.max_in_flight:
            message = f"The server is answering {self._traffic.in_flight} requests and takes no more now."
            return ApiError(503, message, code="engine_overloaded", headers=RETRY_LATER)
        refusal = crossing.visit.caller.enter()
        if refusal is None:
            crossing.counted = True
            self._traffic.in_flight += 1
        return refusal

    def _leave(self, crossing: _Crossing) -> None:
        if crossing.counted and crossing.visit is not None:
            self._traffic.in_flight -= 1
            crossing.visit.caller.leave()


class _Crossing:
    """One request's way over the border: its id, its status once known, its body's size so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int, metrics: Metrics) -> None:
        asked = Headers(scope=scope).get("x-request-id", "")
        self.id = asked if CLEAN_ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        scope["request_id"] = self.id
        self.began = time.monotonic()
        self.status = 0
        self.visit: Visit | None = None  # until it is known whose it is
        self.counted = False
        self.gone = False  # the client, or all sense from its connection
        self._receive = receive
        self._send = send
        self.max_body_bytes = max_body_bytes
        self._body_bytes = 0
        self._metrics = metrics

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_bytes += len(message.get("body", b""))
        if self._body_bytes > self.max_body_bytes:  # a chunked body announces no length
            raise _too_large(self.max_body_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            took_ms = round(1000 * (time.monotonic() - self.began))
            ours = {"x-request-id": self.id, "openai-processing-ms": str(took_ms)}
            ours |= self.visit.caller.headers() if self.visit else {}
            raw = [(name.encode(), value.encode()) for name, value in ours.items()]
            message = {**message, "headers": [*message.get("headers", []), *raw]}
        try:
            await self._send(message)
        except Exception as error:  # the transport's: behind this request came something that is no HTTP, or an end
            self.gone = True
            raise ClientDisconnect from error

    def tell(self, scope: Scope) -> None:
        """One log line, and the counts."""
        seconds = time.monotonic() - self.began
        fields = {
            "request_id": self.id,
            "method": scope["method"],
            "path": scope["path"],
            "status": self.status,
            "ms": round(1000 * seconds, 1),
        }
        if self.visit:
            fields |= {"key": self.visit.caller.id, **self.visit.used()}
        log.info("%(request_id)s %(method)s %(path)s %(status)s %(ms).0f ms", fields, extra={"fields": fields})
        # The route as declared, one for all prefixes: a path that somebody made up must not become a time series.
        handler = getattr(scope.get("route"), "path", "none")
        self._metrics.answered(scope["method"], handler, self.status, seconds)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, headers={"www-authenticate": "Bearer"})


def _too_large(limit: int) -> HTTPException:
    # The unread rest of the body is still under way on this connection, so it cannot be used again.
    return HTTPException(413, f"The request body is larger than {limit} bytes.", {"connection": "close"})
