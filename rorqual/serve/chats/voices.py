"""Who answers: the models of this server, or those of an upstream.

Both go the way that a client's request goes: the same validation, template, admission, accounts and metrics. What comes back
is the server's one event stream. An upstream's is read from its chat completions; the `prefix` of an answer that goes on is
DeepSeek's field, vLLM and SGLang get their own words for it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rorqual.errors import NotFound, UpstreamError
from rorqual.serve.callers import VISIT
from rorqual.serve.chats.prompting import Prompt, estimate
from rorqual.serve.errors import ApiError, Refused
from rorqual.serve.events import Event, Finish, Reason, ReasoningDelta, TextDelta, Usage
from rorqual.serve.metrics import Metrics
from rorqual.serve.prepare import Platform, prepare_chat, render
from rorqual.serve.schemas import ChatRequest
from rorqual.serve.settings import Settings
from rorqual.serve.upstream import Relay, Upstream

THEIR_WORDS = ("vllm", "sglang")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """thinking: whether it can be asked to think ("switch"), does anyway, or cannot. context_length 0: not known."""

    id: str
    context_length: int
    thinking: Literal["none", "switch", "always"]

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id, "context_length": self.context_length, "max_output": self.context_length,
            "thinking": self.thinking == "switch", "thinking_mode": self.thinking,
        }  # fmt: skip

    def thinks(self, wished: bool) -> bool:
        return wished if self.thinking == "switch" else self.thinking == "always"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. None: the model's own value."""

    model: str
    messages: Prompt
    thinking: bool = False
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """As the API has it."""
        body: dict[str, Any] = {"model": self.model, "messages": self.messages}
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        return body | {name: value for name, value in given.items() if value is not None}


class Voice(Protocol):
    async def models(self) -> list[ModelCard]:
        """The first is the one that answers where none is named. Raises UpstreamError."""
        ...

    async def tokens(self, asked: Asked) -> int:
        """How long the prompt is; about, where its tokenizer is not here. Raises as chat completions do."""
        ...

    def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        """Raises as chat completions do."""
        ...


async def card(voice: Voice, name: str) -> ModelCard:
    """The model of that name, the first one where it is empty. Raises NotFound."""
    cards = await voice.models()
    for found in cards:
        if name in ("", found.id):
            return found
    known = ", ".join(found.id for found in cards) or "none"
    raise NotFound(f"The model '{name}' does not exist", remedy=f"served here: {known}", param="model")


class OwnModels:
    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    async def models(self) -> list[ModelCard]:
        cards = []
        for name, served in self._platform.models.items():
            mode: Literal["none", "switch", "always"] = "none"
            if served.template.supports_thinking:
                mode = "switch" if served.has_thinking_switch else "always"
            cards.append(ModelCard(name, served.engine.info.max_model_len, mode))
        return cards

    def _request(self, asked: Asked) -> ChatRequest:
        body = asked.body()
        if self._platform.find(asked.model).has_thinking_switch:
            body["thinking"] = {"type": "enabled" if asked.thinking else "disabled"}
        return ChatRequest.model_validate(body)

    async def tokens(self, asked: Asked) -> int:
        return len((await render(self._request(asked), self._platform)).prompt)

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        call = await prepare_chat(self._request(asked), self._platform)
        async with aclosing(call.events(self._platform.replay)) as events:
            async for event in events:
                yield event


class TheirModels:
    """An upstream's. Whether a model of vLLM's or SGLang's thinks is not in their lists: it can be asked to, and one
    whose template knows no thinking takes no notice."""

    def __init__(self, upstream: Upstream, settings: Settings, metrics: Metrics) -> None:
        self._upstream, self._settings, self._metrics = upstream, settings, metrics

    async def _listed(self) -> list[Mapping[str, Any]]:
        response = await self._upstream.client.request("GET", "/v1/models", silence_s=10.0)
        try:
            data = response.json()["data"]
            return [entry for entry in data if isinstance(entry.get("id"), str)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UpstreamError(f"{self._upstream.client.base_url} does not list its models") from error

    async def models(self) -> list[ModelCard]:
        cards = []
        for entry in await self._listed():
            length = entry.get("max_model_len")
            can = entry.get("thinking", entry.get("owned_by") in THEIR_WORDS)
            cards.append(ModelCard(entry["id"], length if isinstance(length, int) else 0, "switch" if can else "none"))
        return cards

    async def tokens(self, asked: Asked) -> int:
        return estimate("".join(message["content"] for message in asked.messages))

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        entry = next((e for e in await self._listed() if e["id"] == asked.model), {})
        body = asked.body() | {"stream": True, "stream_options": {"include_usage": True}}
        theirs = entry.get("owned_by") in THEIR_WORDS
        if theirs:
            body["chat_template_kwargs"] = {"thinking": asked.thinking, "enable_thinking": asked.thinking}
            if asked.messages[-1].get("prefix"):
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        elif entry.get("thinking"):
            body["thinking"] = {"type": "enabled" if asked.thinking else "disabled"}
        raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        relay = Relay(self._upstream.client, "/chat/completions", raw, {}, self._settings, self._metrics)
        reason: Reason = "stop"
        async with aclosing(relay.events()) as events:
            async for event in events:
                for spoken in _read(event):
                    if isinstance(spoken, Finish):
                        reason = spoken.reason
                    else:
                        yield spoken
        yield Finish(reason)
        if (visit := VISIT.get()) is not None:
            yield Usage(visit.prompt_tokens, visit.completion_tokens, 0, visit.cached_tokens)


def _read(event: bytes) -> list[Event]:
    """One chunk of an upstream's stream. Raises Refused where it is an error."""
    data = event.removeprefix(b"data:").strip()
    if not event.startswith(b"data:") or data == b"[DONE]":
        return []
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise UpstreamError("the upstream sent something that is no chat completion") from error
    if isinstance(chunk.get("error"), dict):
        raise Refused(ApiError(502, str(chunk["error"].get("message") or "the upstream failed")))
    found: list[Event] = []
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            found.append(ReasoningDelta(str(thought)))
        if text := delta.get("content"):
            found.append(TextDelta(str(text)))
        if choice.get("finish_reason"):
            found.append(Finish("length" if choice["finish_reason"] == "length" else "stop"))
    return found
