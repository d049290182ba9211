"""Tools as DeepSeek writes them, byte for byte, and calls read back from token ids however they are cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rorqual.data import special
from rorqual.data.segments import joined, marked
from rorqual.data.template import NAMES, ChatTemplate, encode_segments
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import CallReader, tool_calls

ALL = pytest.mark.parametrize("name", NAMES)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter für eine Stadt",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def call(name: str, arguments: str, call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [call("weather", '{"city": "Köln"}'), call("now", "{}")]},
    {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
]  # fmt: skip
LIST_V31 = """

## Tools
You have access to the following tools:

### weather
Description: Wetter für eine Stadt

Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}

### now
Description: 

Parameters: {}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>\
{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""  # noqa: W291
LIST_V3 = """

You are a helpful assistant with tool calling capabilities. When a tool call is needed, you MUST use the following format \
to issue the call:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME
```json
{"param1": "value1", "param2": "value2"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Make sure the JSON is valid.## Tools

### Function

You have the following functions available:


```json
{"type": "function", "function": {"name": "weather", "description": "Wetter für eine Stadt", "parameters": \
{"type": "object", "properties": {"city": {"type": "string"}}}}}
```

```json
{"type": "function", "function": {"name": "now"}}
```
"""
CALLS = {
    "bare": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Köln"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "fenced": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Köln"}\n```'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
}
RESULTS = {
    "bare": "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>",
    "fenced": (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>\n"
        "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    ),
}


@ALL
def test_a_tool_loop_is_rendered_as_published(small: Tokenizer, name: str) -> None:
    template = ChatTemplate(name)
    form = template.tool_form
    opened = "<｜Assistant｜></think>" if name == "v3.1" else "<｜Assistant｜>"
    expected = (
        f"{special.BOS}Be brief.{LIST_V31 if name == 'v3.1' else LIST_V3}<｜User｜>Weather?{opened}Let me see."
        f"{CALLS[form]}{special.EOS}{RESULTS[form]}"
    )
    ids = template.encode(small, CHAT, tools=TOOLS)
    assert small.decode(ids, skip_special=False) == expected
    # Token by token, markers included: what a tokenizer makes of the rendered string.
    assert ids == encode_segments(small, joined(marked(expected)))[0]
    assert not template.starts_in_thinking(True, CHAT)

    done = [*CHAT, {"role": "assistant", "content": "Rain."}, {"role": "user", "content": "Thanks"}]
    text = small.decode(template.encode(small, done, tools=TOOLS), skip_special=False)
    asked = {"v3": "<｜Assistant｜>", "r1": "<｜Assistant｜><think>\n", "v3.1": "<｜Assistant｜></think>"}[name]
    assert text == f"{expected}Rain.{special.EOS}<｜User｜>Thanks{asked}"


@ALL
def test_thoughts_of_a_tool_loop_stay_until_the_next_user(small: Tokenizer, name: str) -> None:
    template = ChatTemplate(name)
    thinking = template.supports_thinking
    chat = [dict(message) for message in CHAT]
    chat[2]["reasoning_content"] = "look it up"
    text = small.decode(template.encode(small, chat, thinking, tools=TOOLS), skip_special=False)
    thought = {"v3": "", "r1": "<think>\nlook it up</think>", "v3.1": "<think>look it up</think>"}[name]
    assert f"<｜Assistant｜>{thought}Let me see.<｜tool▁calls▁begin｜>" in text
    later = [*chat, {"role": "assistant", "content": "Rain."}, {"role": "user", "content": "Thanks"}]
    assert "look it up" not in small.decode(template.encode(small, later, thinking))


OVER = {"content": "", "reasoning_content": "hm", "thinking_done": True}


@pytest.mark.parametrize(
    ("name", "prefix", "expected", "inside"),
    [
        ("v3", {"content": "So"}, "<｜Assistant｜>So", False),
        ("v3.1", {"content": "So"}, "<｜Assistant｜></think>So", False),
        ("v3.1", {"content": "So", "reasoning_content": "hm"}, "<｜Assistant｜><think>hm</think>So", False),
        ("v3.1", {"content": "", "reasoning_content": "hm"}, "<｜Assistant｜><think>hm", True),
        ("r1", {"content": "So"}, "<｜Assistant｜><think>\n</think>So", False),
        ("r1", {"content": "", "reasoning_content": "hm"}, "<｜Assistant｜><think>\nhm", True),
        ("v3", {"content": "", "thinking_done": True}, "<｜Assistant｜>", False),
        ("v3.1", {"content": "", "thinking_done": True}, "<｜Assistant｜></think>", False),
        (
            "v3.1",
            OVER,
            "<｜Assistant｜><think>hm</think>",
            False,
        ),
        (
            "r1",
            OVER,
            "<｜Assistant｜><think>\nhm</think>",
            False,
        ),
        ("r1", {"content": "", "thinking_done": True}, "<｜Assistant｜><think>\n</think>", False),
    ],
)
def test_a_prefix_goes_on(small: Tokenizer, name: str, prefix: dict[str, Any], expected: str, inside: bool) -> None:
    template = ChatTemplate(name)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "prefix": True, **prefix}]
    text = small.decode(template.encode(small, chat), skip_special=False)
    assert text == f"{special.BOS}<｜User｜>hi{expected}"
    assert template.starts_in_thinking(False, chat) == inside


def read(tokenizer: Tokenizer, form: Any, ids: list[int]) -> tuple[list[list[str]], list[int]]:
    """Calls as [name, arguments], and the ids that are no part of any."""
    reader = CallReader(tokenizer, form)
    calls: list[list[str]] = []
    outside = []
    pieces = []
    for token in ids:
        if reader.active or token == reader.begin:
            pieces.append(reader.push(token))
        else:
            outside.append(token)
    for piece in [*pieces, reader.flush()]:
        if piece and piece.name is not None:
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        if piece:
            calls[piece.index][1] += piece.arguments
    return calls, outside


@pytest.mark.parametrize("form", ["bare", "fenced"])
def test_what_was_written_is_read_in_any_tokens(small: Tokenizer, form: Any) -> None:
    """Arguments with fences, markers in letters and half characters, in tokens of one byte and of many."""
    rng = random.Random()
    hostile = ["\n```", "```json\n", "<｜tool▁call▁end｜>", "🐋", "鲸", "\n", "`", '"', "\\", "}{", " "]
    for _ in range(30):
        wanted = []
        for i in range(rng.randint(1, 3)):
            value = "".join(rng.choice(hostile) for _ in range(rng.randint(0, 8)))
            wanted.append([f"f_{i}", json.dumps({"v": value}, ensure_ascii=rng.random() < 0.5)])
        segments = tool_calls(form, [call(*w) for w in wanted])
        ids = []
        for segment in segments:
            if segment.special:
                ids.append(small.special(segment.text))
            elif rng.random() < 0.5:
                ids += small.encode(segment.text)
            else:
                ids += [token for char in segment.text for token in small.encode(char)]
        before, after = small.encode("Let me see <｜tool▁calls▁begin｜>."), small.encode("x")
        assert read(small, form, before + ids + after) == (wanted, before + after)
        # Cut off anywhere: what came is the beginning of what would have come.
        got, _ = read(small, form, ids[: rng.randrange(len(ids))])
        for i, (name, arguments) in enumerate(got):
            assert name == wanted[i][0] and (wanted[i][1] + "\n```").startswith(arguments.rstrip("�"))
            assert i == len(got) - 1 or arguments == wanted[i][1]


def test_a_call_without_a_name_or_a_fence(small: Tokenizer) -> None:
    marker = {name: small.special(f"<｜tool▁{name}｜>") for name in ("calls▁begin", "call▁begin", "call▁end", "sep")}
    head = [marker["calls▁begin"], marker["call▁begin"]]
    assert read(small, "bare", [*head, *small.encode("x"), marker["call▁end"]])[0] == []
    body = small.encode('now\n{"a": 1}')
    ids = [*head, *small.encode("function"), marker["sep"], *body, marker["call▁end"]]
    assert read(small, "fenced", ids)[0] == [["now", '{"a": 1}']]
