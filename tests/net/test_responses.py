"""The Responses API through OpenAI's client: the stream and the whole say the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from rorqual.data import special
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import tool_calls
from rorqual.engine.scripted import Script
from rorqual.errors import RorqualError
from tests.net.harness import Harness, running, some_text

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": True}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Harness]:
    with running(tokenizer, context=4096) as harness:
        yield harness


def ask(server: Harness, **more: Any) -> Any:
    return server.client().responses.create(**({"model": "tiny", "input": "hi"} | more))


def both(server: Harness, **more: Any) -> Iterator[Any]:
    """The response of a whole answer, and that at the end of a stream whose events are in order."""
    yield ask(server, **more)
    events = list(ask(server, stream=True, **more))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [d.model_dump() for d in done] == [o.model_dump() for o in final.output]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    thought = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert text == final.output_text
    assert thought == "".join(o.content[0].text for o in final.output if o.type == "reasoning")
    assert arguments == "".join(o.arguments for o in final.output if o.type == "function_call")
    yield final


def test_text_and_thought(server: Harness, rng: random.Random) -> None:
    answer, thought = some_text(rng), some_text(rng)
    server.script(answer, thought)
    more = {"reasoning": {"effort": "high"}, "instructions": "Be brief.", "metadata": {"k": "v"}}
    for response in both(server, **more):
        Response.model_validate(response.model_dump(), strict=False)
        assert response.output_text == answer and response.status == "completed" and response.metadata == {"k": "v"}
        assert [o.type for o in response.output] == ["reasoning", "message"]
        assert response.output[0].content[0].text == thought
        prompt = server.engine.seen[-1].prompt
        assert response.usage.input_tokens == len(prompt) and response.usage.output_tokens > 0
        assert response.usage.output_tokens_details.reasoning_tokens == len(server.tokenizer.encode(thought))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert list(prompt) == server.template.encode(server.tokenizer, chat, True)


def test_calls_and_their_outputs(server: Harness) -> None:
    tokenizer = server.tokenizer
    ids = [*tokenizer.encode("look it up"), tokenizer.special(special.END_THINK), *tokenizer.encode("Let me see.")]
    for segment in tool_calls("bare", [{"function": {"name": "weather", "arguments": '{"a": 1}'}}] * 2):
        ids += [tokenizer.special(segment.text)] if segment.special else tokenizer.encode(segment.text)
    server.engine.scripts[:] = [Script(tokens=ids)]
    for response in both(server, tools=[TOOL], reasoning={"effort": "high"}):
        kinds = [o.type for o in response.output]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        calls = response.output[2:]
        assert all((c.name, c.arguments) == ("weather", '{"a": 1}') for c in calls)
        assert calls[0].call_id != calls[1].call_id
    assert server.engine.seen[-1].params.grammar.optional
    server.script("Rain.")
    outputs = [{"type": "function_call_output", "call_id": c.call_id, "output": "rain"} for c in calls]
    for kept in (response.output, response.output[1:]):  # the thought comes back either way
        history = [{"role": "user", "content": "hi"}, *(o.model_dump(exclude_none=True) for o in kept), *outputs]
        assert ask(server, input=history, tools=[TOOL], reasoning={"effort": "high"}).output_text == "Rain."
        text = tokenizer.decode(server.engine.seen[-1].prompt)
        assert "<think>look it up</think>Let me see.<｜tool▁calls▁begin｜>" in text
        assert text.endswith("<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>" * 2)


def test_limits_formats_and_logprobs(server: Harness) -> None:
    server.script("one two three")
    for response in both(server, max_output_tokens=1):
        assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    for response in both(server, top_logprobs=2):
        entries = response.output[0].content[0].logprobs
        assert "".join(e.token for e in entries) == "one two three" and len(entries[0].top_logprobs) == 2
    schema = {"type": "json_schema", "name": "n", "schema": {"enum": [1]}, "strict": True}
    ask(server, text={"format": schema})
    assert server.engine.seen[-1].params.grammar.text == '{"enum": [1]}'
    ask(server, tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
    assert not server.engine.seen[-1].params.grammar.optional
    parts = [{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}, {"role": "user", "content": "b"}]
    ask(server, input=parts)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert list(server.engine.seen[-1].prompt) == server.template.encode(server.tokenizer, chat)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"previous_response_id": "r"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "response_format.type"),
        ({"field_of_2027": 1}, "field_of_2027"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_is_wrong_is_named(server: Harness, fields: dict[str, object], param: str) -> None:
    server.script("x")
    reply = httpx.post(f"{server.url}/v1/responses", json={"model": "tiny", "input": "hi"} | fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_failures_end_the_stream(server: Harness, rng: random.Random) -> None:
    server.script(some_text(rng), fail_after=3, error=RorqualError("out of memory"))
    events = list(ask(server, stream=True))
    assert events[-1].type == "response.failed" and "out of memory" in events[-1].response.error.message
    with pytest.raises(openai.InternalServerError):
        ask(server)
    server.script("x")
    raw = server.client().responses.with_raw_response.create(model="tiny", input="hi", store=True, user="u")
    assert raw.headers["x-rorqual-ignored"] == "store, user"
