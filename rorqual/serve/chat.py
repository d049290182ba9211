"""POST /chat/completions: OpenAI's objects, with what DeepSeek's and vLLM's clients look for beside them.

Both forms carry DeepSeek's `reasoning_content`, and `reasoning` beside it, which is what vLLM's clients read.
In a stream every delta has both `content` and `reasoning_content` (one of them null, the last ones empty):
DeepSeek's own example reads both attributes of every chunk, and OpenAI's clients ignore what they do not
know.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.serve.answers import Answer, collect
from rorqual.serve.errors import ApiError
from rorqual.serve.events import Event, Finish, Logprobs, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from rorqual.serve.logprobs import chat_logprobs
from rorqual.serve.prepare import Call, Platform, prepare_chat
from rorqual.serve.schemas import ChatRequest
from rorqual.serve.stream import EventStream

DONE = b"data: [DONE]\n\n"
compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes an encoder at each call


async def chat_completions(body: ChatRequest, http: HttpRequest, platform: Platform) -> Response:
    call = await prepare_chat(body, platform)
    events = call.events(platform.replay)
    if body.stream:
        return EventStream(events, ChatChunks(call), platform.settings, call.headers)
    answers, usage = await collect(events, len(call.job.requests), http.receive, platform.settings)
    choices = [_choice(call, i, answer) for i, answer in enumerate(answers)]
    return JSONResponse(
        {**call.envelope("chat.completion"), "choices": choices, "usage": usage.openai(), **call.diagnosed(usage)},
        headers=call.headers,
    )


class ChatChunks:
    """The streaming dialect: chat.completion.chunk objects, and `[DONE]` at the end of every stream."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._envelope = call.envelope("chat.completion.chunk")
        if call.body.include_usage:
            self._envelope["usage"] = None
        # Most of a chunk is the same in all of them; spelling it each time would be half of a token's cost here.
        self._before = f'data: {compact(self._envelope)[:-1]},"choices":['
        self._opened: set[int] = set()

    def encode(self, event: Event) -> bytes:
        if isinstance(event, Usage):
            usage = sse({**self._envelope, "choices": [], "usage": event.openai(), **self._call.diagnosed(event)})
            return (usage if self._call.body.include_usage else b"") + DONE
        opening = b""
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            opening = self._chunk(event.choice, self._opening())
        return opening + self._news(event)

    def encode_error(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE

    def _opening(self) -> dict[str, Any]:
        thinks = self._call.thinks
        first = {"content": None, "reasoning_content": ""} if thinks else {"content": "", "reasoning_content": None}
        return {"role": "assistant", **first}

    def _news(self, event: ReasoningDelta | TextDelta | ToolCallDelta | Finish) -> bytes:
        match event:
            case ReasoningDelta(text=text, logprobs=logprobs):
                delta = {"content": None, "reasoning_content": text, "reasoning": text}
                return self._chunk(event.choice, delta, self._logprobs((), logprobs))
            case TextDelta(text=text, logprobs=logprobs):
                delta = {"content": text, "reasoning_content": None}
                return self._chunk(event.choice, delta, self._logprobs(logprobs, ()))
            case ToolCallDelta():
                function = {"arguments": event.arguments} | ({"name": event.name} if event.name is not None else {})
                piece: dict[str, Any] = {"index": event.call, "function": function}
                if event.id is not None:
                    piece |= {"id": event.id, "type": "function"}
                return self._chunk(event.choice, {"content": None, "reasoning_content": None, "tool_calls": [piece]})
            case Finish():
                delta = {"content": "", "reasoning_content": None}
                return self._chunk(event.choice, delta, finish_reason=event.reason)

    def _logprobs(self, content: Logprobs, reasoning: Logprobs) -> dict[str, Any] | None:
        if self._call.body.wanted_logprobs is None:
            return None
        return chat_logprobs(self._call.served.tokenizer, content, reasoning)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return f"{self._before}{compact(choice)}]}}\n\n".encode()


def _choice(call: Call, index: int, answer: Answer) -> dict[str, Any]:
    text, reasoning = answer.text, answer.reasoning
    message: dict[str, Any] = {"role": "assistant", "content": text, "reasoning_content": None}
    if call.thinks or reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if answer.calls:
        message["content"] = text or None
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": "".join(c.arguments)}}
            for c in answer.calls
        ]
    logprobs = None
    if call.body.wanted_logprobs is not None:
        logprobs = chat_logprobs(
            call.served.tokenizer,
            tuple(logprob for piece in answer.pieces for logprob in piece.logprobs),
            tuple(logprob for piece in answer.thoughts for logprob in piece.logprobs),
        )
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish.reason}


def sse(payload: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {compact(payload)}\n\n".encode()
