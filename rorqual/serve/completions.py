"""POST /completions: text goes on as text, without a template; with `suffix` a hole is filled.

DeepSeek's markers surround the hole: `<｜fim▁begin｜>` before `<｜fim▁hole｜>` after `<｜fim▁end｜>`, and the model
writes what belongs in between. Text prompts get a beginning-of-sequence token, ids are taken as they are. Special tokens
in what the model writes mean nothing here and are shown, but for the end. Left out: log-probabilities of the prompt (`echo`
with `logprobs` is refused), and `best_of`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.data.special import FIM_BEGIN, FIM_END, FIM_HOLE
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import Request
from rorqual.errors import RequestError
from rorqual.serve.answers import Answer, collect
from rorqual.serve.chat import DONE, sse
from rorqual.serve.completion_schemas import CompletionRequest
from rorqual.serve.errors import ApiError
from rorqual.serve.events import Event, Finish, Logprobs, TextDelta, Usage
from rorqual.serve.generation import Job
from rorqual.serve.logprobs import completion_logprobs
from rorqual.serve.prepare import Call, Platform, engine_requests, sampling
from rorqual.serve.stream import EventStream


async def completions(body: CompletionRequest, http: HttpRequest, platform: Platform) -> Response:
    call = await _prepare(body, platform)
    echoes = _echoes(body, call) if body.echo else [""] * len(call.job.requests)
    events = call.events(platform.replay)
    if body.stream:
        return EventStream(events, CompletionChunks(call, echoes), platform.settings, call.headers)
    answers, usage = await collect(events, len(call.job.requests), http.receive, platform.settings)
    choices = [_choice(call, i, answer, echoes[i]) for i, answer in enumerate(answers)]
    whole = {**call.envelope("text_completion"), "choices": choices, "usage": usage.openai()}
    return JSONResponse(whole, headers=call.headers)


async def _prepare(body: CompletionRequest, platform: Platform) -> Call:
    """Raises RequestError for whatever is wrong with the request."""
    served = platform.find(body.model)
    body.refuse_unsupported()
    prompts = await asyncio.to_thread(_encode, served.tokenizer, body)
    call_id = f"cmpl-{uuid.uuid4().hex}"
    requests: list[Request] = []
    for i, prompt in enumerate(prompts):
        params = sampling(body, served, len(prompt), platform.settings)
        name = call_id if len(prompts) == 1 else f"{call_id}-p{i}"
        requests += engine_requests(name, prompt, params, body, served)
    return Call(call_id, body, Job(served, tuple(requests), plain=True, n=body.n or 1))


def _encode(tokenizer: Tokenizer, body: CompletionRequest) -> list[Sequence[int]]:
    if body.suffix is None:
        return [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in body.prompt]
    if not tokenizer.has_special(FIM_HOLE):
        raise RequestError(f"The model '{body.model}' cannot fill holes", remedy="leave suffix out", param="suffix")
    begin, hole, end = (tokenizer.special(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    suffix = tokenizer.encode(body.suffix)
    return [[tokenizer.bos_id, begin, *tokenizer.encode(p), hole, *suffix, end] for p in body.prompt]


def _echoes(body: CompletionRequest, call: Call) -> list[str]:
    """For each choice its prompt."""
    decode = call.served.tokenizer.decode
    texts = [p if isinstance(p, str) else decode(p) for p in body.prompt]
    return [text for text in texts for _ in range(call.job.n)]


class CompletionChunks:
    """The streaming dialect: text_completion objects, and `[DONE]`. offsets: where in its text each choice is."""

    def __init__(self, call: Call, echoes: list[str]) -> None:
        self._call = call
        self._envelope = call.envelope("text_completion")
        if call.body.include_usage:
            self._envelope["usage"] = None
        self._echoes = dict(enumerate(echoes))
        self._offsets = [len(echo) for echo in echoes]

    def encode(self, event: Event) -> bytes:
        match event:
            case TextDelta(text=text, logprobs=logprobs):
                return self._chunk(event.choice, text, logprobs)
            case Finish():
                return self._chunk(event.choice, "", (), event.reason)
            case Usage():
                usage = sse({**self._envelope, "choices": [], "usage": event.openai()})
                return (usage if self._call.body.include_usage else b"") + DONE
        return b""

    def encode_error(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE

    def _chunk(self, index: int, text: str, logprobs: Logprobs, finish_reason: str | None = None) -> bytes:
        told = _logprobs(self._call, logprobs, self._offsets[index])
        self._offsets[index] += len(text)
        choice = {"index": index, "text": self._echoes.pop(index, "") + text, "logprobs": told}
        return sse({**self._envelope, "choices": [choice | {"finish_reason": finish_reason}]})


def _choice(call: Call, index: int, answer: Answer, echo: str) -> dict[str, Any]:
    logprobs = tuple(logprob for piece in answer.pieces for logprob in piece.logprobs)
    told = _logprobs(call, logprobs, len(echo))
    return {"index": index, "text": echo + answer.text, "logprobs": told, "finish_reason": answer.finish.reason}


def _logprobs(call: Call, logprobs: Logprobs, offset: int) -> dict[str, Any] | None:
    if call.body.wanted_logprobs is None:
        return None
    return completion_logprobs(call.served.tokenizer, logprobs, offset)
