"""Bodies of OpenAI's Responses API, and what they say as a `ChatRequest`.

Stateless: what would need a stored response (`previous_response_id`, `conversation`, `background`) is refused, `store` is
accepted without effect. Tools are functions; OpenAI's own (web search, code interpreter) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from rorqual.errors import RequestError
from rorqual.serve.schemas import ACCEPTED, NO_NAN, Body, CacheOptions, ChatRequest, Listed

RESPONSES_ACCEPTED = (ACCEPTED - {"metadata"}) | {"access_programs", "client_metadata", "context_management"}
RESPONSES_REFUSED: Mapping[str, tuple[object, ...]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "background": (None, False),
    "prompt": (None,),
    "image": (None,),
    "max_tool_calls": (None,),
    "truncation": (None, "disabled"),
}
LOGPROBS = "message.output_text.logprobs"
Item = dict[str, Any]
# What is read by hand below, for the published schema.
CONTENT = {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "array", "items": {"type": "object"}}]}
ITEM = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "reasoning", "function_call", "function_call_output"], "default": "message"},
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": CONTENT,
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string"},
        "output": CONTENT,
    },
}
FUNCTION: dict[str, Any] = {"type": {"const": "function"}, "name": {"type": "string"}}
NAMED = {"type": "object", "properties": FUNCTION, "required": ["type", "name"]}
TOOL = {
    "type": "object",
    "properties": FUNCTION
    | {"description": {"type": "string"}, "parameters": {"type": "object"}, "strict": {"type": "boolean"}},
    "required": ["type", "name"],
}


class Reasoning(Body):
    effort: str | None = None


class TextConfig(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(Listed):
    accepted: ClassVar[frozenset[str]] = RESPONSES_ACCEPTED
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = RESPONSES_REFUSED

    model: str
    input: Annotated[
        Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": ITEM, "minItems": 1}]})
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), NO_NAN] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), NO_NAN] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    tools: Annotated[list[Annotated[Item, WithJsonSchema(TOOL)]] | None, Field(max_length=128)] = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, NAMED]})] = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    prompt_cache_options: CacheOptions | None = None
    user_id: str | None = None  # DeepSeek's: whose cache

    @field_validator("input")
    @classmethod
    def _some_input(cls, value: object) -> object:
        if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(v, dict) for v in value)):
            return value
        raise PydanticCustomError("input", "it is a text or a list of items")

    def chat(self) -> ChatRequest:
        """Raises RequestError or pydantic's ValidationError for what has no place in a chat request."""
        self.refuse_unsupported()
        first = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        fields: dict[str, Any] = {"model": self.model, "messages": first + _messages(items)}
        for name in ("temperature", "top_p", "parallel_tool_calls", "stream", "user_id"):
            fields[name] = getattr(self, name)
        fields["max_tokens"] = self.max_output_tokens
        if self.prompt_cache_options is not None:
            fields["prompt_cache_options"] = self.prompt_cache_options.model_dump(exclude_unset=True)
        if self.top_logprobs is not None or LOGPROBS in (self.include or ()):
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.tools:
            fields["tools"] = [_tool(tool, i) for i, tool in enumerate(self.tools)]
            fields["tool_choice"] = _choice(self.tool_choice)
        elif self.tool_choice not in (None, "auto", "none"):
            raise RequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        wanted = self.text.format if self.text else None
        if wanted is not None:
            schema = {name: wanted[name] for name in ("name", "description", "schema", "strict") if name in wanted}
            kind = wanted.get("type")
            fields["response_format"] = {"type": kind} | ({"json_schema": schema} if kind == "json_schema" else {})
        return ChatRequest.model_validate(fields)


def _messages(items: list[Item]) -> list[dict[str, Any]]:
    """Items that belong to one answer (thought, text, calls) become one message."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            message = {"role": item.get("role"), "content": _text(item.get("content"), where)}
            if item.get("role") == "assistant" and thought:
                message["reasoning_content"], thought = thought, ""
            messages.append(message)
        elif kind == "reasoning":
            parts = item.get("content")
            texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
            thought += "".join(text for text in texts if isinstance(text, str))
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            if thought:
                messages[-1]["reasoning_content"], thought = thought, ""
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _text(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        else:
            raise RequestError(f"items of type {kind!r} are not supported here", param=where)
    return messages


def _text(content: object, where: str) -> object:
    """What is no list is for the chat request to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise RequestError(f"content of type {kind!r} is not supported here", param=where)
        texts.append(part["text"])
    return "\n".join(texts)


def _tool(tool: Item, i: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(f"tools of type {tool.get('type')!r} are not supported here", param=f"tools[{i}].type")
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}


def _choice(choice: object) -> object:
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    return choice
