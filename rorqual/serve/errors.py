"""From any exception to the one error object that clients understand.

Every error that leaves here, as a response or in the middle of a stream, is made by `to_api_error`:
`{"error": {"message", "type", "param", "code"}}`, all four keys present, `param` and `code` strings or null; Anthropic's
clients get theirs (`ApiError.body_for`).

Choices. Invalid values are 400, as OpenAI has it, and not DeepSeek's 422: openai-python has a class for each,
but 400 is what programs written for OpenAI catch, and DeepSeek's clients treat both alike. Messages of our
own errors are for people and passed on; of an unexpected exception only the fact is, and its traceback
goes to the log under the request's id. Left out: a code for each of OpenAI's hundred cases.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from rorqual.errors import (
    CapacityError,
    Conflict,
    EngineDied,
    NotFound,
    PromptTooLong,
    RequestError,
    RorqualError,
    UpstreamError,
)

# What each status says when nothing more particular is known: (type, code).
KINDS: Mapping[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "unknown_url"),
    405: ("invalid_request_error", "method_not_allowed"),
    409: ("invalid_request_error", "conflict"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "engine_overloaded"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "upstream_unavailable"),
    503: ("server_error", "engine_unavailable"),
    504: ("server_error", "timeout"),
}
ANTHROPIC_KINDS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# A conversation of the chat page has messages too, which are none of Anthropic's.
ANTHROPIC_PATH = re.compile(r"/anthropic/|(/beta)?(/v1)?/messages(/count_tokens)?$")
RETRY_LATER = {"retry-after": "1"}  # openai-python obeys it; without, it would begin at half a second


@dataclass(frozen=True, slots=True)
class ApiError:
    status: int
    message: str
    param: str | None = None
    code: str | None = None  # None: the status's own
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind, code = KINDS.get(self.status, KINDS[500 if self.status >= 500 else 400])
        # A message may quote the client's text, and JSON can smuggle in what UTF-8 cannot write (lone surrogates).
        message = self.message.encode("utf-8", "replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code or code}
        return {"error": error}

    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.body()["error"]["message"]}}

    def body_for(self, path: str) -> dict[str, Any]:
        """As the clients of this path read errors: Anthropic's for its messages, wherever they are mounted, and for all
        that is under its prefix."""
        return self.anthropic_body() if ANTHROPIC_PATH.match(path) else self.body()


def log_fault(log: logging.Logger, request: str, error: BaseException) -> None:
    """A server's fault, under the id that the client got. What is ours says why in its message; a traceback would tell no
    more, and a dead engine would write one for each request that it had."""
    known = isinstance(error, RorqualError | HTTPException)
    log.error("%s failed: %s", request, error, exc_info=None if known else error)


class Refused(Exception):
    """An answer that was decided elsewhere: an upstream's own error, passed on as it came."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def to_api_error(error: BaseException) -> ApiError:
    """Total: whatever was raised has an answer."""
    match error:
        case PromptTooLong():
            return ApiError(400, str(error), error.param, "context_length_exceeded")
        case NotFound():
            return ApiError(404, str(error), error.param, "model_not_found" if error.param == "model" else "not_found")
        case Conflict():
            return ApiError(409, str(error), error.param)
        case CapacityError():
            return ApiError(429, str(error), error.param, headers=RETRY_LATER)
        case RequestError():
            return ApiError(400, str(error), error.param, "invalid_value")
        case RequestValidationError():
            return _validation_error(error.errors())
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers or {})
        case EngineDied():
            return ApiError(503, str(error), headers=RETRY_LATER)
        case UpstreamError():
            return ApiError(502, str(error), headers=RETRY_LATER)
        case Refused():
            return error.error
        case OperationalError():
            return ApiError(503, "The database is busy or away; try again.", None, "database_unavailable", RETRY_LATER)
        case RorqualError():
            return ApiError(500, str(error))
        case _:
            return ApiError(500, "The server failed on this request. Its log has the details under the request's id.")


def engine_gone() -> HTTPException:
    return HTTPException(503, "The engine is not running; the operator has to restart the server.", RETRY_LATER)


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's complaints, in OpenAI's words: one error object has room for one."""
    first = errors[0]
    kind, where = str(first["type"]), list(first["loc"])[1:]  # loc begins with "body"
    if kind == "json_invalid":
        return ApiError(400, f"The request body is not valid JSON: {first['ctx']['error']} at character {where[0]}.")
    if not where and not kind.endswith("_type"):
        return ApiError(400, f"{first['msg']}.", None, "invalid_value")
    if not where:
        return ApiError(400, "The request body must be a JSON object, sent with content-type: application/json.")
    param = _spell(where)
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(400, f"Invalid value for '{param}': {first['msg']}.", param, code)


def _spell(loc: Sequence[str | int]) -> str:
    """("messages", 0, "content") -> messages[0].content"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
