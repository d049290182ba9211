"""Bodies of Anthropic's Messages API, and what they say as a `ChatRequest`.

Honoured is what becomes a field of the chat request; `ACCEPTED` and unknown fields are treated as in `schemas`. Images and
documents are refused. A conversation that ends with the assistant is continued, which is Anthropic's prefill.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from rorqual.errors import RequestError
from rorqual.serve.schemas import NO_NAN, Body, ChatRequest, Listed, Stops

ACCEPTED = frozenset(
    [
        "betas",
        "cache_control",
        "container",
        "context_management",
        "inference_geo",
        "mcp_servers",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    ]
)
USER_ID = re.compile(r"[a-zA-Z0-9_-]{1,512}")
BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Block = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "properties": {"type": {"enum": list(BLOCKS)}}, "required": ["type"]}),
]


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Body):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class Diagnostics(Body):
    """Asked for: why the cache was missed, in comparison with an earlier answer."""

    previous_message_id: str | None = None


class Metadata(Body):
    user_id: str | None = None


class OutputConfig(Body):
    effort: str | None = None
    format: dict[str, Any] | None = None


class CountRequest(Listed):
    """What a prompt is made of; a whole request may be counted too."""

    accepted: ClassVar[frozenset[str]] = ACCEPTED
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=128)] = None
    tool_choice: ToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: OutputConfig | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2), NO_NAN] = None
    top_p: Annotated[float | None, Field(ge=0, le=1), NO_NAN] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    stop_sequences: Stops | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    diagnostics: Diagnostics | None = None

    def chat(self) -> ChatRequest:
        """Raises RequestError for what has no place in a chat request."""
        self.refuse_unsupported()
        return ChatRequest.model_validate(self._fields())

    def _fields(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system, "system")})
        for i, message in enumerate(self.messages):
            messages += _turns(message, f"messages[{i}].content")
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            messages[-1]["prefix"] = True
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [_tool(tool, i) for i, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            fields |= self._choice(self.tool_choice)
        if self.thinking is not None:
            fields["thinking"] = {"type": self.thinking.type}
        wanted = self.output_config.format if self.output_config else None
        if wanted is not None:
            if wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
                raise RequestError("only json_schema is supported", param="output_config.format")
            fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted["schema"]}}
        for name in ("max_tokens", "temperature", "top_p", "top_k", "stream"):
            fields[name] = getattr(self, name)
        fields["stop"] = self.stop_sequences
        if self.diagnostics is not None:
            fields["prompt_cache_options"] = {"comparison_response_id": self.diagnostics.previous_message_id}
        user = self.metadata.user_id if self.metadata else None
        if user:  # any text is one here; what goes on is as short as DeepSeek's
            fields["user_id"] = (
                user if USER_ID.fullmatch(user) else hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()
            )
        return fields

    @staticmethod
    def _choice(choice: ToolChoice) -> dict[str, Any]:
        if choice.type == "tool" and choice.name is None:
            raise RequestError("tool_choice names no tool", param="tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        kinds: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
        fields = {"tool_choice": kinds[choice.type]}
        return fields | ({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]


def _tool(tool: AnthropicTool, i: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(f"tools of type {tool.type} run at Anthropic and not here", param=f"tools[{i}].type")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema or {}}
    if tool.description is None:
        del function["description"]
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


def _turns(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """One message may hold results of several tools beside its text: each is a message of its own, and comes first."""
    blocks = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content
    texts: list[str] = []
    results: list[dict[str, Any]] = []
    turn: dict[str, Any] = {"role": message.role}
    for i, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                content = _text(block.get("content") or "", f"{where}[{i}].content")
                results.append({"role": "tool", "tool_call_id": call_id, "content": content})
            case {"type": "tool_use", "id": str(call_id), "name": str(name)}:
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                turn.setdefault("tool_calls", []).append(call)
            case {"type": "thinking", "thinking": str(thought)}:
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
            case {"type": "redacted_thinking"}:
                pass
            case _:
                kind = block.get("type")
                raise RequestError(f"content of type {kind!r} is not supported here", param=f"{where}[{i}]")
    if texts or not results:
        results.append({**turn, "content": ("" if message.role == "assistant" else "\n").join(texts)})
    return results


def _text(content: str | list[Block] | object, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, block in enumerate(content if isinstance(content, list) else [None]):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise RequestError("only text is supported here", param=f"{where}[{i}]")
        texts.append(block["text"])
    return "\n".join(texts)
