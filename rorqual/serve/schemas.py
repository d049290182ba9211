"""Request bodies: OpenAI's chat completion with DeepSeek's and vLLM's additions.

Every field of a request is in one of three lists, which docs/api.md shows: it is honoured (a field of `ChatRequest`); it is
`ACCEPTED` without effect, because it cannot change the answer, and the response header `x-rorqual-ignored` names it; or
it is refused with a 400 that names it, because a client that silently got something else than it asked for is worse off
than one that got an error. Refused is what nobody knows, and what `REFUSED` knows, with the values that mean "off" and
pass. Messages are read more generously: clients send back whole answers, other servers' fields included.

Types are strict, as OpenAI's are: "0.5" is not a temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from rorqual.errors import RequestError

ACCEPTED = frozenset(
    [
        "metadata",
        "moderation",
        "prediction",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "session_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "store",
        "user",
        "verbosity",
    ]
)
"""Changes no answer of ours: bookkeeping, routing and hints."""

REFUSED: Mapping[str, tuple[object, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "allowed_token_ids": (None,),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
    "include_stop_str_in_output": (None, False),
    "echo": (None, False),
    "best_of": (None, 1),
    "prompt_logprobs": (None,),
    "suffix": (None,),
}
"""Known and not done here: the values that ask for nothing pass."""

MESSAGE_REFUSED: Mapping[str, tuple[object, ...]] = {"function_call": (None,), "audio": (None,)}
NO_NAN = Field(allow_inf_nan=False)
NAME = r"^[a-zA-Z0-9_.:-]{1,128}$"


NonEmpty = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[NonEmpty], Field(max_length=16)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True, protected_namespaces=())


class Listed(Body):
    """A body whose fields are in the three lists. Its JSON schema shows all of them, and nothing else is allowed."""

    accepted: ClassVar[frozenset[str]] = ACCEPTED
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = REFUSED

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        whole = handler.resolve_ref_schema(schema)
        for name in sorted(cls.accepted):
            whole["properties"][name] = {"description": "Accepted without effect."}
        for name, off in cls.refused.items():
            whole["properties"][name] = {"description": "Refused unless off.", "enum": list(off)}
        whole["additionalProperties"] = False
        return schema

    def ignored(self) -> list[str]:
        """The fields that were accepted without effect."""
        return sorted(self.accepted & (self.model_extra or {}).keys())

    def refuse_unsupported(self) -> None:
        """Raises RequestError for the first field that asks for what this server does not do."""
        refuse(self, self.refused, "", self.accepted)


class Function(Body):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """As the client sent it, in its order: that is what the template shows."""
        return self.model_dump(exclude_unset=True) | {"type": "function"}


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("schema", "json_schema is missing")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. An assistant's `reasoning_content` (or vLLM's `reasoning`) is accepted wherever it stands, and shown to
    the model where its template has a place for it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=128)] = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool | None = None
    thinking_done: bool | None = None  # ours: a prefix whose thought is over, though its text has not begun

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart] | None)
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
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant calls tools")
        return self

    def plain(self) -> dict[str, Any]:
        """As the template takes it. `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_unset=True) for call in self.tool_calls]
        if self.prefix:
            message |= {"prefix": True} | ({"thinking_done": True} if self.thinking_done else {})
        return message


class StreamOptions(Body):
    include_usage: bool | None = None


class CacheOptions(Body):
    """Of these, the answer to compare with when the cache is missed; prefixes are cached without being told where."""

    comparison_response_id: str | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class Sampled(Listed):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), NO_NAN] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), NO_NAN] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None  # vLLM's; -1 and 0 are off
    min_p: Annotated[float | None, Field(ge=0, le=1), NO_NAN] = None  # vLLM's
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), NO_NAN] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), NO_NAN] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100), NO_NAN] = None  # vLLM's
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=1024)] = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=128)] = None  # vLLM's
    min_tokens: Annotated[int | None, Field(ge=0)] = None  # vLLM's
    stop: Stops | None = None
    stop_token_ids: Annotated[list[int] | None, Field(max_length=128)] = None  # vLLM's
    ignore_eos: bool | None = None  # vLLM's, for benchmarks
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user_id: Annotated[str | None, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=512)] = None  # DeepSeek's: whose cache
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=512)] = None  # vLLM's: a part of it

    @property
    def cache_scope(self) -> str:
        """Who may share cached prefixes with this request: those who name the same user and salt."""
        user = self.user_id or ""
        return f"{user}/{self.cache_salt}" if self.cache_salt else user

    @field_validator("stop", mode="before", json_schema_input_type=NonEmpty | Stops | None)
    @classmethod
    def _one_stop(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is allowed only where stream is true", param="stream_options")


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None  # DeepSeek's
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    prompt_cache_options: CacheOptions | None = None

    @field_validator(
        "tool_choice", mode="wrap", json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None
    )
    @classmethod
    def _one_choice(cls, value: object, read: Callable[[object], object]) -> object:
        """One error for the field, not one for each of its forms."""
        if isinstance(value, str) and value not in ("none", "auto", "required"):
            raise PydanticCustomError("tool_choice", "it is none, auto, required or a function")
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError("tool_choice", "it is none, auto, required or a function") from None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

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

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for i, message in enumerate(self.messages):
            refuse(message, MESSAGE_REFUSED, f"messages[{i}].", None)
            if message.prefix and (message.role != "assistant" or i != len(self.messages) - 1):
                raise RequestError(
                    "prefix is for the assistant's message at the end", param=f"messages[{i}].prefix", remedy="move it"
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        constrained = self.tools or (self.response_format and self.response_format.type != "text")
        if self.min_tokens and constrained:  # a complete document has no further token
            raise RequestError("min_tokens cannot be promised with a response_format or tools", param="min_tokens")
        if self.messages[-1].prefix and self.response_format and self.response_format.type != "text":
            raise RequestError("a prefix cannot be continued in a response_format", param="response_format")
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise RequestError("two tools have one name", remedy="rename one", param="tools")
        choice = self.tool_choice
        if choice in ("required",) or isinstance(choice, NamedTool):
            if not names:
                raise RequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
            if self.messages[-1].prefix:
                raise RequestError("a prefix cannot be continued by a call that is required", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise RequestError(f"there is no tool '{choice.function.name}'", param="tool_choice")


def refuse(body: Body, refused: Mapping[str, tuple[object, ...]], path: str, accepted: frozenset[str] | None) -> None:
    """accepted None: what nobody knows passes."""
    for name, value in (body.model_extra or {}).items():
        if name in refused:
            if value not in refused[name]:
                raise RequestError(
                    f"'{path}{name}' is not supported by this server", remedy="leave it out", param=path + name
                )
        elif accepted is not None and name not in accepted:
            raise RequestError(f"Unknown parameter: '{path}{name}'", remedy="leave it out", param=path + name)
