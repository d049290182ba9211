"""Anthropic's Messages: what its client and the agents built on it rely on."""

from __future__ import annotations

import json
from typing import Any

from rorqual.conformance.openai import SCHEMA, fits
from rorqual.conformance.probe import QUESTION, Absent, Failed, Json, Probe, require, usage_of

STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use")
TOOL: Json = {"name": "paint", "description": "Paints.", "input_schema": SCHEMA}


async def messages(probe: Probe) -> str:
    answer = await probe.ask("/messages", _body(probe))
    require(answer.get("type") == "message" and answer.get("role") == "assistant", f"type is {answer.get('type')!r}")
    kinds = [block.get("type") for block in answer.get("content") or []]
    require(set(kinds) <= {"text", "thinking", "tool_use"}, f"content is {kinds}")
    require(answer.get("stop_reason") in STOP_REASONS, f"stop_reason is {answer.get('stop_reason')!r}")
    counts = [usage_of(answer).get(name) for name in ("input_tokens", "output_tokens")]
    require(all(isinstance(n, int) for n in counts), f"usage is {counts}")
    return f"{', '.join(map(str, kinds))}; {answer['stop_reason']}"


async def stream(probe: Probe) -> str:
    stream = await probe.stream("/messages", _body(probe))
    names = [name for name, _ in stream.events if name != "ping"]
    require(
        names and names[0] == "message_start" and names[-1] == "message_stop", f"events are {names[:1]} … {names[-1:]}"
    )
    require("message_delta" in names, "no message_delta")
    starts, stops = names.count("content_block_start"), names.count("content_block_stop")
    require(starts == stops, f"{starts} blocks begin and {stops} end")
    require(all(chunk.get("type") == name for chunk, (name, _) in zip(stream.chunks(), stream.events, strict=True)),
            "an event's type differs from its name")  # fmt: skip
    return f"{len(names)} events, {starts} blocks"


async def count_tokens(probe: Probe) -> str:
    body = {k: v for k, v in _body(probe).items() if k != "max_tokens"}
    counted = (await probe.ask("/messages/count_tokens", body)).get("input_tokens")
    require(isinstance(counted, int) and counted > 0, f"input_tokens is {counted!r}")
    used = usage_of(await probe.ask("/messages", _body(probe)))
    total = used["input_tokens"] + (used.get("cache_read_input_tokens") or 0)
    require(counted == total, f"counted {counted}, used {total}")
    return f"{counted} tokens, as used"


async def bad_value(probe: Probe) -> str:
    body = {**_body(probe), "max_tokens": "many"}
    for path in probe.paths("/messages"):
        reply = await probe.post(path, body)
        if reply.status not in (404, 405):
            break
    else:
        raise Absent("no such route")
    require(reply.status in (400, 422), f"status {reply.status}")
    found = reply.json()
    error = found.get("error")
    require(found.get("type") == "error" and isinstance(error, dict) and error.get("type"), f"said {reply.says}")
    return reply.says


async def system_and_history(probe: Probe) -> str:
    history = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "one"}]}, *QUESTION]
    longer = _input_tokens(await probe.ask("/messages", _body(probe, system="Be brief.", messages=history)))
    shorter = _input_tokens(await probe.ask("/messages", _body(probe)))
    require(longer > shorter, f"a system text and three turns count {longer} tokens, one turn alone {shorter}")
    return f"{shorter} → {longer} input tokens"


async def stop_sequences(probe: Probe) -> str:
    text = _text(await probe.ask("/messages", _body(probe, temperature=0)))
    word = next((w for w in text.split()[1:] if len(w) > 1), None) or text[len(text) // 2 :][:2].strip()
    if not word:
        raise Absent("the model says too little to be stopped")
    answer = await probe.ask("/messages", _body(probe, temperature=0, stop_sequences=[word]), "stop_sequences")
    require(word not in _text(answer), f"the answer holds the stop sequence {word!r}")
    require(answer["stop_reason"] == "stop_sequence", f"stop_reason is {answer['stop_reason']!r}")
    require(answer["stop_sequence"] == word, f"stop_sequence is {answer['stop_sequence']!r}")
    return f"cut before {word!r}"


async def tool_use(probe: Probe) -> str:
    answer = await probe.ask("/messages", _body(probe, **_required()), "tools", "tool_choice")
    calls = [block for block in answer["content"] if block.get("type") == "tool_use"]
    require(calls, f"no tool_use with tool_choice any, but {[b.get('type') for b in answer['content']]}")
    require(calls[0].get("name") == "paint" and calls[0].get("id"), f"called {calls[0].get('name')!r}")
    require(fits(calls[0].get("input")), f"the input is {str(calls[0].get('input'))[:60]}")
    require(answer["stop_reason"] == "tool_use", f"stop_reason is {answer['stop_reason']!r}")
    return f"paint({json.dumps(calls[0]['input'])})"


async def tool_stream(probe: Probe) -> str:
    chunks = (await probe.stream("/messages", _body(probe, **_required()), "tools", "tool_choice")).chunks()
    starts = [c for c in chunks if c["type"] == "content_block_start" and c["content_block"]["type"] == "tool_use"]
    require(starts and starts[0]["content_block"].get("name") == "paint", "no tool_use block begins")
    pieces = [
        c["delta"]["partial_json"] for c in _deltas(chunks, "input_json_delta") if c["index"] == starts[0]["index"]
    ]
    try:
        value = json.loads("".join(pieces))
    except ValueError as error:
        raise Failed(f"the pieces make {''.join(pieces)[:60]!r}, which is no JSON") from error
    require(fits(value), f"the pieces make {''.join(pieces)[:60]!r}")
    return f"{len(pieces)} pieces make {''.join(pieces)[:40]}"


async def tool_result(probe: Probe) -> str:
    call = {"type": "tool_use", "id": "toolu_1", "name": "paint", "input": {"colour": "red", "count": 1}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "painted"}
    history = [*QUESTION, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    answer = await probe.ask("/messages", _body(probe, messages=history, tools=[TOOL]), "tools", "tool_result")
    longer, shorter = _input_tokens(answer), _input_tokens(await probe.ask("/messages", _body(probe)))
    require(longer > shorter, "the call and its result are not in the prompt")
    return f"{longer - shorter} input tokens of tools, call and result"


async def thinking(probe: Probe) -> str:
    body = _body(probe, max_tokens=1100, thinking={"type": "enabled", "budget_tokens": 1024})
    chunks = (await probe.stream("/messages", body, "thinking")).chunks()
    kinds = [c["content_block"]["type"] for c in chunks if c["type"] == "content_block_start"]
    require(kinds[:1] == ["thinking"], f"blocks are {kinds} with thinking enabled")
    thought = "".join(c["delta"]["thinking"] for c in _deltas(chunks, "thinking_delta"))
    require(thought, "the thinking block is empty")
    block = {"type": "thinking", "thinking": thought, "signature": ""}
    past = {"role": "assistant", "content": [block, {"type": "text", "text": "one"}]}
    await probe.ask("/messages", _body(probe, messages=[*QUESTION, past, *QUESTION]), "thinking", "signature")
    return f"{len(thought)} characters, and taken back"


async def models(probe: Probe) -> str:
    for path in probe.paths("/models"):
        reply = await probe.get(path, headers={"anthropic-version": "2023-06-01"})
        if reply.status == 200 and "has_more" in reply.json():
            break
    else:
        raise Absent("the list of models is not in Anthropic's words")
    data = reply.json()["data"]
    require(
        all(m.get("type") == "model" and m.get("display_name") and m.get("created_at") for m in data),
        "a model lacks fields",
    )
    return f"{len(data)} with display_name and created_at"


async def no_key(probe: Probe) -> str:
    if not probe.has_key:
        raise Absent("asked without a key")
    for path in probe.paths("/messages"):
        reply = await probe.post(path, _body(probe), with_key=False)
        if reply.status not in (404, 405):
            break
    else:
        raise Absent("no such route")
    require(reply.status == 401, f"without a key: {reply.status}")
    found = reply.json()
    require(found.get("type") == "error" and found["error"].get("type") == "authentication_error", f"said {reply.says}")
    return reply.says


def _body(probe: Probe, **more: Any) -> Json:
    return {"model": probe.model, "max_tokens": 24, "messages": QUESTION, **more}


def _required() -> Json:
    return {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 200}


def _text(answer: Json) -> str:
    return "".join(block.get("text") or "" for block in answer["content"])


def _input_tokens(answer: Json) -> int:
    found = usage_of(answer)
    return int(found["input_tokens"]) + int(found.get("cache_read_input_tokens") or 0)


def _deltas(chunks: list[Json], kind: str) -> list[Json]:
    return [c for c in chunks if c["type"] == "content_block_delta" and c["delta"]["type"] == kind]
