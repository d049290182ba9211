"""OpenAI's older completions and newer Responses."""

from __future__ import annotations

import itertools

from rorqual.conformance.openai import SCHEMA, TOOL, fits, parsed
from rorqual.conformance.probe import Probe, require, usage_of


async def completions(probe: Probe) -> str:
    answer = await probe.ask("/completions", {"model": probe.model, "prompt": "one, two,", "max_tokens": 8})
    require(answer.get("object") == "text_completion", f"object is {answer.get('object')!r}")
    require(isinstance(answer["choices"][0].get("text"), str), "the choice has no text")
    return f"{usage_of(answer)['completion_tokens']} tokens"


async def echo(probe: Probe) -> str:
    body = {"model": probe.model, "prompt": "one, two,", "max_tokens": 4, "echo": True}
    text = (await probe.ask("/completions", body, "echo"))["choices"][0]["text"]
    require(text.startswith("one, two,"), f"began with {text[:20]!r}")
    return "the prompt comes first"


async def answer(probe: Probe) -> str:
    body = {"model": probe.model, "input": "Count to three.", "max_output_tokens": 24, "store": False}
    answer = await probe.ask("/responses", body)
    require(answer.get("object") == "response", f"object is {answer.get('object')!r}")
    require(answer.get("status") in ("completed", "incomplete"), f"status is {answer.get('status')!r}")
    kinds = [item.get("type") for item in answer.get("output") or []]
    require(kinds and set(kinds) <= {"message", "reasoning", "function_call"}, f"output is {kinds}")
    return f"{answer['status']}: {', '.join(map(str, kinds))}"


async def stream(probe: Probe) -> str:
    body = {"model": probe.model, "input": "Count to three.", "max_output_tokens": 24, "store": False}
    chunks = (await probe.stream("/responses", body)).chunks()
    require(chunks, "no events")
    numbers = [int(c["sequence_number"]) for c in chunks]
    require(all(a < b for a, b in itertools.pairwise(numbers)), "sequence_number does not rise")
    last = chunks[-1].get("type")
    require(last in ("response.completed", "response.incomplete"), f"the last event is {last!r}")
    return f"{len(chunks)} events, {last}"


async def function_call(probe: Probe) -> str:
    tool = {"type": "function", **TOOL["function"]}
    body = {
        "model": probe.model,
        "input": "Paint.",
        "max_output_tokens": 200,
        "tools": [tool],
        "tool_choice": "required",
    }
    answer = await probe.ask("/responses", body, "tools", "tool_choice")
    calls = [item for item in answer["output"] if item.get("type") == "function_call"]
    require(
        calls and calls[0].get("name") == "paint" and calls[0].get("call_id"), f"output is {answer['output']}"[:100]
    )
    require(fits(parsed(calls[0]["arguments"])), f"arguments are {calls[0]['arguments'][:60]!r}")
    return f"paint({calls[0]['arguments'][:40]})"


async def json_schema(probe: Probe) -> str:
    form = {"format": {"type": "json_schema", "name": "paint", "strict": True, "schema": SCHEMA}}
    body = {"model": probe.model, "input": "Paint.", "max_output_tokens": 200, "text": form}
    answer = await probe.ask("/responses", body, "text", "json_schema")
    texts = [part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    require(texts and fits(parsed("".join(texts))), f"said {''.join(texts)[:60]!r}, which does not fit the schema")
    return "".join(texts)[:60]
