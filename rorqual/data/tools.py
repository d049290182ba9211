"""Tools in DeepSeek's words: how they are told to the model, how its calls are written, and how they are read.

Two forms. V3 and R1 write `function<｜tool▁sep｜>NAME`, a line break, and the arguments in a fence marked json; V3.1
writes `NAME<｜tool▁sep｜>{…}` and nothing between calls. The list of tools in the system part is V3.1's published one;
DeepSeek published none for V3 and R1, and the one here is what SGLang and vLLM give them.

Calls are read by token id, never by spelling: a model made to repeat `<｜tool▁call▁begin｜>` in letters calls nothing,
and a call is found however its tokens were cut into outputs. `call_grammar` describes the same form to the engine, so
that what is called exists and its arguments are JSON. Left out: DSML (V3.2 and later).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rorqual.data.segments import Segment, marked
from rorqual.data.special import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)

if TYPE_CHECKING:
    from rorqual.data.tokenizer import Tokenizer

Form = Literal["fenced", "bare"]  # V3 and R1; V3.1
FENCE_OPEN, FENCE_CLOSE = "```json\n", "\n```"

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_V31_HEAD = "## Tools\nYou have access to the following tools:\n"
_V31_TAIL = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
    "{additional_tool_calls}<｜tool▁calls▁end｜>\n\n"
    "Where:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)
_V3_HEAD = (
    "You are a helpful assistant with tool calling capabilities. "
    "When a tool call is needed, you MUST use the following format to issue the call:\n"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME\n"
    '```json\n{"param1": "value1", "param2": "value2"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>\n\n'
    "Make sure the JSON is valid."
    "## Tools\n\n### Function\n\nYou have the following functions available:\n\n"
)


def tool_list(form: Form, tools: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """What stands behind the system messages, for tools as OpenAI's API has them; nothing without tools."""
    if not tools:
        return []
    if form == "fenced":
        texts = [f"\n```json\n{_json(tool)}\n```\n" for tool in tools]
        return [Segment("\n\n"), *marked(_V3_HEAD), *map(Segment, texts)]
    texts = []
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters") or {}
        described = f"\n### {function['name']}\nDescription: {function.get('description') or ''}\n\n"
        texts.append(f"{described}Parameters: {_json(parameters)}\n")
    return [Segment("\n\n" + _V31_HEAD), *map(Segment, texts), *marked(_V31_TAIL)]


def tool_calls(form: Form, calls: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The calls of one answer. Arguments stand as the client sends them: a string of JSON, or an object."""
    segments = [Segment(TOOL_CALLS_BEGIN, special=True)]
    for i, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
        text = arguments if isinstance(arguments, str) else _json(arguments)
        before, after = name, text
        if form == "fenced":
            before, after = "function", f"{name}\n{FENCE_OPEN}{text}{FENCE_CLOSE}"
            segments += [Segment("\n")] if i else []
        segments += [Segment(TOOL_CALL_BEGIN, special=True), Segment(before), Segment(TOOL_SEP, special=True)]
        segments += [Segment(after), Segment(TOOL_CALL_END, special=True)]
    return [*segments, Segment(TOOL_CALLS_END, special=True)]


def call_grammar(
    tokenizer: Tokenizer,
    form: Form,
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    parallel: bool = True,
    opened: bool = False,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A Lark grammar of calls. schemas: of each tool's arguments, by name; parallel: several calls or one; opened:
    whether the token that begins calls has been written already; answer: a schema that an answer without calls must
    match (None: there must be calls)."""
    begin, end, call, close, sep = (
        f"<[{tokenizer.special(name)}]>"
        for name in (TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP)
    )
    between = '"\\n" ' if form == "fenced" else ""
    more = f" ({between}{call} one {close})*" if parallel else ""
    lines = [f"calls: {'' if opened else begin} {call} one {close}{more} {end}"]
    lines.append("start: calls" if answer is None else "start: calls | answer")
    if answer is not None:
        lines.append(f"answer: %json {_compact(answer)}")
    lines.append("one: " + " | ".join(f"tool{i}" for i in range(len(schemas))))
    for i, (name, schema) in enumerate(schemas.items()):
        if form == "fenced":
            lines.append(f'tool{i}: "function" {sep} {_json(name + chr(10) + FENCE_OPEN)} arguments{i} "\\n```"')
        else:
            lines.append(f"tool{i}: {_json(name)} {sep} arguments{i}")
        lines.append(f"arguments{i}: %json {_compact(schema)}")
    return "\n".join(lines)


def shape(schema: object) -> dict[str, Any]:
    """The part of a JSON schema that a grammar can keep whatever else the schema says: types, enumerations, the names of
    properties and which of them are required. Objects that name properties have no others. What is not understood is
    left open, so that no schema fails."""
    if not isinstance(schema, Mapping):
        return {}
    kept: dict[str, Any] = {}
    kinds = schema.get("type")
    if all(kind in _TYPES for kind in (kinds if isinstance(kinds, list) and kinds else [kinds])):
        kept["type"] = kinds
    if isinstance(values := schema.get("enum"), list) and values:
        return {"enum": values}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list) and options and "properties" not in schema:
        return {"anyOf": [shape(option) for option in options]}
    if isinstance(items := schema.get("items"), Mapping):
        kept["items"] = shape(items)
    if isinstance(properties := schema.get("properties"), Mapping) and properties:
        required = schema.get("required")
        names = [name for name in required if name in properties] if isinstance(required, list) else []
        closed = schema.get("additionalProperties", False) is False
        kept |= {"properties": {name: shape(value) for name, value in properties.items()}, "required": names}
        kept |= {"additionalProperties": False} if closed else {}
    return kept


def _compact(schema: Mapping[str, Any]) -> str:
    """As the parser takes it, without white space between the parts of a document: arguments are for programs."""
    return _json({**schema, "x-guidance": {"whitespace_flexible": False}})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News of call number `index`: its name once, then pieces of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads calls from token ids. While `active`, ids belong to it; `begin` is the id that makes it so.

    What is no call is dropped: text between calls, and a call that ends before its name does.
    """

    def __init__(self, tokenizer: Tokenizer, form: Form) -> None:
        markers = (TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP)
        ids = [tokenizer.special(name) if tokenizer.has_special(name) else None for name in markers]
        self.begin, self._end, self._call, self._close, self._sep = ids
        self._form: Form = form
        self._stream = tokenizer.stream()
        self._state: Literal["outside", "between", "head", "arguments"] = "outside"
        self._text = ""  # not told yet: a head, or what may be a fence
        self._named = False
        self.count = 0

    @property
    def active(self) -> bool:
        return self._state != "outside"

    def push(self, token_id: int) -> CallPiece | None:
        if token_id == self.begin:
            self._state = "between"
        elif token_id == self._end:
            piece, self._state = self._finish(), "outside"
            return piece
        elif token_id == self._call:
            piece = self._finish()
            self._state, self._text, self._named = "head", "", False
            return piece
        elif token_id == self._close:
            piece, self._state = self._finish(), "between"
            return piece
        elif token_id == self._sep and self._state == "head":
            self._text += self._stream.flush()
            return self._separated()
        elif self._state in ("head", "arguments"):
            self._text += self._stream.push(token_id)
            return self._told() if self._state == "arguments" else None
        return None

    def flush(self) -> CallPiece | None:
        """When the text ends in the middle of a call: the arguments so far, nothing where its name is not complete, and
        nothing of a fence."""
        if self._form == "fenced" and (self._named or "\n" not in self._text):
            self._state = "between"
        return self._finish()

    def _separated(self) -> CallPiece | None:
        head, self._text, self._state = self._text.strip(), "", "arguments"
        return self._name(head) if self._form == "bare" else None

    def _name(self, name: str) -> CallPiece:
        self._named = True
        self.count += 1
        return CallPiece(self.count - 1, name)

    def _told(self) -> CallPiece | None:
        """What of the pending text is certainly the call's."""
        if self._form == "bare":
            text, self._text = self._text, ""
            return CallPiece(self.count - 1, arguments=text) if text else None
        name = None
        if not self._named:
            line, newline, rest = self._text.partition("\n")
            if not newline or (len(rest) < len(FENCE_OPEN) and FENCE_OPEN.startswith(rest)):
                return None
            name, self._text = self._name(line.strip()).name, rest.removeprefix(FENCE_OPEN)
        held = next(n for n in range(len(FENCE_CLOSE), -1, -1) if self._text.endswith(FENCE_CLOSE[:n]))
        cut = len(self._text) - held
        text, self._text = self._text[:cut], self._text[cut:]
        return CallPiece(self.count - 1, name, text) if name or text else None

    def _finish(self) -> CallPiece | None:
        if self._state != "arguments":
            self._stream.flush()
            return None
        self._text += self._stream.flush()
        if self._form == "fenced" and not self._named:
            self._text += "" if "\n" in self._text else "\n"  # a name alone
            line, _, rest = self._text.partition("\n")
            piece = self._name(line.strip())
            text = "" if FENCE_OPEN.startswith(rest) else rest.removeprefix(FENCE_OPEN)
            name: str | None = piece.name
        else:
            name, text = None, self._text
        text, self._text, self._state = text.removesuffix(FENCE_CLOSE), "", "between"
        return CallPiece(self.count - 1, name, text) if name or text else None
