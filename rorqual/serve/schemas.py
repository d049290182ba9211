"""Request bodies: OpenAI's chat completion with DeepSeek's and vLLM's additions.

The rule for a field that is not implemented: if ignoring it cannot change the answer (`user`, `store`,
cache hints, names not known yet) it is accepted and ignored, because clients send new fields all the time; if
it would change the answer (`tools`, penalties, `n` of 2) it is a 400 that names the field, because a client
that silently got something else than it asked for is worse off than one that got an error. `NOT_SUPPORTED` is
that list: for each field the values that mean "off". A feature that arrives leaves it and becomes a field.

Types are strict, as OpenAI's are: "0.5" is not a temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rorqual.errors import RequestError

_TOOLS_OFF: tuple[object, ...] = (None, [])
NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (None, 1),
    "tools": _TOOLS_OFF,
    "functions": _TOOLS_OFF,
    "tool_choice": (None, "none", "auto"),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "prompt_logprobs": (None,),
}
MESSAGE_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "prefix": (None, False),
    "tool_calls": _TOOLS_OFF,
    "function_call": (None,),
    "audio": (None,),
}
NO_NAN = Field(allow_inf_nan=False)


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True, protected_namespaces=())


class Message(Body):
    """One turn. An assistant's `reasoning_content` is accepted and ignored, as DeepSeek does since V3.2:
    clients that replay it work, and the model sees what its template shows it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        """Text parts become one text, a line each (as vLLM has it); any other part is refused by its type."""
        if not isinstance(value, list):
            return value
        texts = []
        for i, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                detail = {"i": i, "kind": str(kind)}
                raise PydanticCustomError("part", "part {i} is of type {kind}, and only text is supported", detail)
            texts.append(part["text"])
        return "\n".join(texts)

    @model_validator(mode="after")
    def _require_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "a {role} message needs content", {"role": self.role})
        return self

    def plain(self) -> dict[str, str]:
        """As the template takes it. `developer` is OpenAI's newer word for `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class StreamOptions(Body):
    include_usage: bool | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class ChatRequest(Body):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), NO_NAN] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), NO_NAN] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None  # vLLM's; -1 and 0 are off
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=16)] = None
    stop_token_ids: Annotated[list[int] | None, Field(max_length=128)] = None  # vLLM's
    ignore_eos: bool | None = None  # vLLM's, for benchmarks
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    thinking: Thinking | None = None  # DeepSeek's
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    user_id: Annotated[str | None, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=512)] = None  # DeepSeek's: whose cache

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def thinking_wish(self) -> tuple[str, bool | None]:
        """(the field that says so, whether to think); None where the request leaves it to the model.

        Three dialects say the same thing; the most particular wins: DeepSeek's `thinking`, then
        `reasoning_effort`, then vLLM's `chat_template_kwargs`. `adaptive` leaves it to the model by its own
        definition.
        """
        if self.thinking is not None:
            return "thinking", {"enabled": True, "disabled": False}.get(self.thinking.type)
        if self.reasoning_effort is not None:
            return "reasoning_effort", self.reasoning_effort != "none"
        for key in ("thinking", "enable_thinking"):
            value = (self.chat_template_kwargs or {}).get(key)
            if value is not None:
                return "chat_template_kwargs", bool(value)
        return "thinking", None


def refuse_unsupported(body: ChatRequest) -> None:
    """Raises RequestError for the first field that asks for what this server does not do."""
    _refuse(body, NOT_SUPPORTED, "")
    for i, message in enumerate(body.messages):
        _refuse(message, MESSAGE_NOT_SUPPORTED, f"messages[{i}].")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is allowed only where stream is true", param="stream_options")


def _refuse(body: Body, not_supported: Mapping[str, tuple[object, ...]], path: str) -> None:
    for name, value in (body.model_extra or {}).items():
        off = not_supported.get(name)
        if off is not None and value not in off:
            raise RequestError(
                f"'{path}{name}' is not supported by this server yet",
                remedy="leave it out",
                param=path + name,
            )
