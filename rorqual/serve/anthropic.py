"""POST /messages and /messages/count_tokens: Anthropic's dialect. Its errors: `errors.ApiError.body_for`.

Thoughts are `thinking` blocks with an empty signature: nothing here needs to be proven when they come back, and a tool loop
is served with the thought whether it does or not (`serve.replay`). `input_tokens` counts what was not cached, as Anthropic
has it; at the start of a stream that is not known yet and everything is counted. Instead of Anthropic's `ping` events a
quiet stream has comments, which every parser of server-sent events skips.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.serve.answers import Answer, collect
from rorqual.serve.anthropic_schemas import CountRequest, MessagesRequest
from rorqual.serve.chat import sse
from rorqual.serve.errors import ApiError
from rorqual.serve.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from rorqual.serve.prepare import IGNORED, Call, Platform, named, prepare_chat, render
from rorqual.serve.stream import EventStream

Block = Literal["thinking", "text", "tool_use"]


async def messages(body: MessagesRequest, http: HttpRequest, platform: Platform) -> Response:
    call = await prepare_chat(named(body.chat), platform, "msg_")
    headers = {IGNORED: ", ".join(body.ignored())} if body.ignored() else {}
    events = call.events(platform.replay)
    if body.stream:
        return EventStream(events, MessageEvents(call, told=body.diagnostics is not None), platform.settings, headers)
    (answer,), usage = await collect(events, 1, http.receive, platform.settings)
    message = _message(call, usage)
    message |= {"content": _content(answer), **_stop(answer.finish)}
    if body.diagnostics is not None:
        message |= _diagnostics(call, usage)
    return JSONResponse(message, headers=headers)


async def count_tokens(body: CountRequest, platform: Platform) -> Response:
    rendered = await render(named(body.chat), platform)
    return JSONResponse({"input_tokens": len(rendered.prompt)})


class MessageEvents:
    """The streaming dialect: one block after the other, each opened, filled and closed. told: whether the end tells why
    the cache was missed."""

    def __init__(self, call: Call, *, told: bool = False) -> None:
        self._call = call
        self._told = told
        self._index = -1
        self._open: tuple[Block, int] | None = None  # and which call, for several in a row
        self._started = False
        self._finish = Finish("stop")

    def encode(self, event: Event) -> bytes:
        start = b""
        if not self._started:
            self._started = True
            nothing = Usage(self._call.job.prompt_tokens, 0, 0, 0)
            start = self._event("message_start", message=_message(self._call, nothing))
        match event:
            case ReasoningDelta(text=text):
                news = self._delta(("thinking", 0), {"type": "thinking_delta", "thinking": text}, text)
            case TextDelta(text=text):
                news = self._delta(("text", 0), {"type": "text_delta", "text": text}, text)
            case ToolCallDelta():
                begin: dict[str, Any] = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                news = self._enter(("tool_use", event.call), begin)
                if event.arguments:
                    news += self._fill({"type": "input_json_delta", "partial_json": event.arguments})
            case Finish():
                self._finish = event
                news = self._close()
            case Usage():
                told = _diagnostics(self._call, event) if self._told else {}
                news = self._event("message_delta", delta=_stop(self._finish), usage=_usage(event), **told)
                news += self._event("message_stop")
        return start + news

    def encode_error(self, error: ApiError) -> bytes:
        return sse(error.anthropic_body(), "error")

    def _delta(self, block: tuple[Block, int], delta: dict[str, Any], text: str) -> bytes:
        if not text:
            return b""
        kind = block[0]
        begin: dict[str, Any] = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
        return self._enter(block, begin) + self._fill(delta)

    def _enter(self, block: tuple[Block, int], begin: dict[str, Any]) -> bytes:
        if self._open == block:
            return b""
        closing = self._close()
        self._open = block
        self._index += 1
        return closing + self._event("content_block_start", index=self._index, content_block=begin)

    def _fill(self, delta: dict[str, Any]) -> bytes:
        return self._event("content_block_delta", index=self._index, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        sealed = b""
        if self._open[0] == "thinking":
            sealed = self._fill({"type": "signature_delta", "signature": ""})
        self._open = None
        return sealed + self._event("content_block_stop", index=self._index)

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        return sse({"type": kind, **fields}, kind)


def _message(call: Call, usage: Usage) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "message",
        "role": "assistant",
        "model": call.served.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(usage),
    }


def _content(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        blocks.append({"type": "text", "text": answer.text})
    for call in answer.calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input("".join(call.arguments))})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """Of a call that was cut off there is no object: it is left empty, as the stop reason tells."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {"value": value}


def _stop(finish: Finish) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    reason = reasons[finish.reason] if finish.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finish.stop}


def _diagnostics(call: Call, usage: Usage) -> dict[str, Any]:
    reason = call.comparison.anthropic(usage) if call.comparison else None
    return {"diagnostics": {"cache_miss_reason": reason} if reason else None}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
