"""POST /chat/completions: from the body to an engine request, and from the event stream to OpenAI's objects.

Both forms carry DeepSeek's `reasoning_content`, and `reasoning` beside it, which is what vLLM's clients read.
In a stream every delta has both `content` and `reasoning_content` (one of them null, the last ones empty):
DeepSeek's own example reads both attributes of every chunk, and OpenAI's clients ignore what they do not
know.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import Request, SamplingParams, TokenLogprob, check_request
from rorqual.errors import DataError, NotFound, RequestError
from rorqual.serve.errors import ApiError, engine_gone
from rorqual.serve.generation import Delta, End, Event, Logprobs, produce
from rorqual.serve.schemas import ChatRequest, refuse_unsupported
from rorqual.serve.served import ServedModel
from rorqual.serve.settings import Settings
from rorqual.serve.stream import Attended, EventStream

SMALLEST_LOGPROB = -9999.0  # OpenAI's; JSON has no minus infinity
SMALLEST_TOP_P = 1e-9  # a top_p of 0 means the likeliest token alone
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Call:
    """One chat completion on its way: what was asked, of which model, and what the engine will be asked."""

    body: ChatRequest
    served: ServedModel
    request: Request
    in_thinking: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


async def chat_completions(
    body: ChatRequest, http: HttpRequest, models: Mapping[str, ServedModel], settings: Settings
) -> Response:
    call = await prepare(body, models, settings)
    events = produce(call.served, call.request, call.in_thinking)
    if body.stream:
        return EventStream(events, ChatChunks(call), settings)
    async with Attended(events, http.receive, settings) as attended:
        deltas = []
        async for event in attended:
            if isinstance(event, Delta):
                deltas.append(event)
            elif isinstance(event, End):
                end = event
    return JSONResponse(_completion(call, Delta.join(deltas), end))


async def prepare(body: ChatRequest, models: Mapping[str, ServedModel], settings: Settings) -> Call:
    """Raises RequestError for whatever is wrong with the request, before the engine hears of it."""
    served = find_model(models, body.model)
    refuse_unsupported(body)
    thinking = _thinking(body, served)
    messages = [message.plain() for message in body.messages]
    try:
        # In a thread: a long conversation takes longer to encode than other streams should wait.
        prompt = await asyncio.to_thread(served.template.encode, served.tokenizer, messages, thinking)
    except DataError as error:
        raise RequestError(str(error), param="messages") from error
    params = _sampling(body, served, len(prompt), settings)
    request = Request(f"chatcmpl-{uuid.uuid4().hex}", tuple(prompt), params, salt=body.user_id or "")
    if not served.engine.alive:
        raise engine_gone()
    check_request(request, served.engine.info)
    return Call(body, served, request, served.template.starts_in_thinking(thinking))


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    served = models.get(name)
    if served is None:
        names = ", ".join(models) or "none"
        raise NotFound(f"The model '{name}' does not exist", remedy=f"served here: {names}", param="model")
    return served


def _thinking(body: ChatRequest, served: ServedModel) -> bool:
    """Whether to think. Raises RequestError where the request says what this model's template cannot do."""
    param, wish = body.thinking_wish()
    if wish is None:
        return served.defaults.thinking and served.template.supports_thinking
    if wish and not served.template.supports_thinking:
        raise RequestError(f"The model '{body.model}' has no thinking mode", remedy="leave thinking out", param=param)
    if not wish and served.template.starts_in_thinking(False):
        raise RequestError(f"The model '{body.model}' always thinks", remedy="leave thinking out", param=param)
    return wish


def _sampling(body: ChatRequest, served: ServedModel, prompt_tokens: int, settings: Settings) -> SamplingParams:
    defaults, info = served.defaults, served.engine.info
    max_tokens = body.wanted_tokens
    if max_tokens is None:
        room = max(1, info.max_model_len - prompt_tokens)
        max_tokens = min(room, defaults.max_tokens or settings.default_max_tokens)
    top_k = defaults.top_k if body.top_k is None else body.top_k
    return SamplingParams(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=max(SMALLEST_TOP_P, defaults.top_p if body.top_p is None else body.top_p),
        top_k=min(max(0, top_k), info.vocab_size),
        max_tokens=max_tokens,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


class ChatChunks:
    """The streaming dialect: chat.completion.chunk objects, and `[DONE]` at the end of every stream."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._envelope = call.envelope("chat.completion.chunk")
        if call.body.include_usage:
            self._envelope["usage"] = None
        self._opened = False

    def encode(self, event: Event) -> bytes:
        opening = b"" if self._opened else self._chunk(self._opening())
        self._opened = True
        if isinstance(event, Delta):
            return opening + self._delta(event)
        closing = self._chunk({"content": "", "reasoning_content": None}, finish_reason=str(event.finish_reason))
        usage = _data({**self._envelope, "choices": [], "usage": event.usage.openai()})
        return opening + closing + (usage if self._call.body.include_usage else b"") + DONE

    def encode_error(self, error: ApiError) -> bytes:
        return _data(error.body()) + DONE

    def _opening(self) -> dict[str, Any]:
        thinking = self._call.in_thinking
        first = {"content": None, "reasoning_content": ""} if thinking else {"content": "", "reasoning_content": None}
        return {"role": "assistant", **first}

    def _delta(self, event: Delta) -> bytes:
        """Up to two chunks: the end of the thought and the beginning of the answer may arrive together."""
        chunks = b""
        if event.reasoning or event.reasoning_logprobs:
            delta = {"content": None, "reasoning_content": event.reasoning, "reasoning": event.reasoning}
            chunks += self._chunk(delta, self._logprobs((), event.reasoning_logprobs))
        if event.content or event.content_logprobs:
            delta = {"content": event.content, "reasoning_content": None}
            chunks += self._chunk(delta, self._logprobs(event.content_logprobs, ()))
        return chunks

    def _logprobs(self, content: Logprobs, reasoning: Logprobs) -> dict[str, Any] | None:
        return _choice_logprobs(self._call.served.tokenizer, content, reasoning) if self._call.body.logprobs else None

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return _data({**self._envelope, "choices": [choice]})


def _completion(call: Call, answer: Delta, end: End) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "reasoning_content": None}
    if call.in_thinking or answer.reasoning:
        message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    logprobs = None
    if call.body.logprobs:
        logprobs = _choice_logprobs(call.served.tokenizer, answer.content_logprobs, answer.reasoning_logprobs)
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": str(end.finish_reason)}
    return {**call.envelope("chat.completion"), "choices": [choice], "usage": end.usage.openai()}


def _choice_logprobs(tokenizer: Tokenizer, content: Logprobs, reasoning: Logprobs) -> dict[str, Any]:
    """OpenAI's object, with DeepSeek's `reasoning_content` beside `content`."""
    return {
        "content": [_token_logprob(tokenizer, logprob) for logprob in content],
        "reasoning_content": [_token_logprob(tokenizer, logprob) for logprob in reasoning] or None,
    }


def _token_logprob(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    top = [_spell(tokenizer, token_id, value) for token_id, value in logprob.top]
    return {**_spell(tokenizer, logprob.token_id, logprob.logprob), "top_logprobs": top}


def _spell(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, SMALLEST_LOGPROB), "bytes": list(raw)}


def _data(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
