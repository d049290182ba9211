"""The published document, `/openapi.json`: every route of the API once, with `servers` naming where it is mounted.

FastAPI makes it from the declarations; what it cannot know is told here: streams beside whole answers, one shape of
errors (and Anthropic's), and keys. tests/net/test_openapi.py drives the server with what the document allows and
forbids, and holds the answers against it.
"""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from rorqual.serve import answer_schemas as told

DONE = "[DONE]"
"""What OpenAI's streams end with instead of an event."""
STREAMED = "Server-sent events where `stream` is true; "
ERRORS = {
    "4XX": "What is wrong with the request, its key, or its limits",
    "5XX": "The engine is gone or late (503, 504), or the server failed (500)",
}


def answers(model: type[BaseModel], events: type[BaseModel] | None = None, last: str = "") -> dict[int | str, Any]:
    """For a route's `responses`: its whole answer, and the data of its events."""
    content: dict[str, Any] = {}
    if events is not None:
        data: dict[str, Any] = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": _reference(events),
        }
        if DONE in last:
            data = {"anyOf": [{"const": DONE}, data]}
        content["text/event-stream"] = {"itemSchema": {"type": "object", "properties": {"data": data}}}
    found: dict[str, Any] = {
        "model": model,
        "description": (STREAMED + last) if events else "The answer",
        "content": content,
    }
    # Named under a status that no answer has, or its schema would not be in the document.
    extra: dict[int | str, Any] = {} if events is None else {"default": {"model": events, "description": ""}}
    return {200: found, **extra}


def publish(app: FastAPI, prefixes: tuple[str, ...]) -> None:
    """Make `app.openapi` return the document. Every route is declared once, without prefix."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, prefixes)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    app.state.methods_of = lambda path: _methods(document()["paths"], prefixes, path)


def _methods(paths: dict[str, Any], prefixes: tuple[str, ...], path: str) -> list[str]:
    """The methods of a route as published, by a request's path; none where no route is."""
    for prefix in sorted(prefixes, key=len, reverse=True):
        if path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
            break
    if path in paths:
        return sorted(method.upper() for method in paths[path])
    for template, item in paths.items():
        pattern = "/".join("[^/]+" if part.startswith("{") else re.escape(part) for part in template.split("/"))
        if re.fullmatch(pattern, path):
            return sorted(method.upper() for method in item)
    return []


def _document(app: FastAPI, prefixes: tuple[str, ...]) -> dict[str, Any]:
    servers = [{"url": prefix or "/"} for prefix in prefixes]
    whole = get_openapi(title=app.title, version=app.version, description=_essay(), routes=app.routes, servers=servers)
    schemas = whole.setdefault("components", {}).setdefault("schemas", {})
    for model in (told.Error, told.AnthropicError):
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= found.pop("$defs", {}) | {model.__name__: found}
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which never leave here
        schemas.pop(name, None)
    for path, item in whole["paths"].items():
        kinds: list[type[BaseModel]] = (
            [told.AnthropicError] if path.startswith("/messages") else [told.Error, told.AnthropicError]
        )
        shape = {"anyOf": [_reference(kind) for kind in kinds]}
        for operation in item.values():
            said = operation["responses"]
            for status in ("422", "default"):
                said.pop(status, None)
            for status, why in ERRORS.items():
                said.setdefault(status, {"description": why, "content": {"application/json": {"schema": shape}}})
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    whole["components"]["securitySchemes"] = schemes
    whole["security"] = [{}, {"bearer": []}, {"key": []}]
    return whole


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _essay() -> str:
    return (
        "Chat completions, completions, Responses and Anthropic's Messages. Each path answers under every server listed. "
        "Fields of a request are honoured, accepted without effect (the response header x-rorqual-ignored names them), or "
        "refused with a 400; which is which stands in each request's schema. Beyond the schema a 400 may say that fields "
        "contradict each other or that the model cannot do it. With keys on, everything but /health and /ready needs one."
    )
