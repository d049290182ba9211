"""Anthropic's own client against the Messages routes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from rorqual.data import special
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import tool_calls
from rorqual.engine.scripted import Script
from rorqual.errors import CapacityError, RorqualError
from rorqual.serve.app import Settings
from tests.net.harness import Harness, running, some_text

HI = [{"role": "user", "content": "hi"}]
TOOL: dict[str, Any] = {"name": "weather", "description": "W", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Harness]:
    with running(tokenizer, context=4096) as harness:
        yield harness


def client(server: Harness, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key=key, max_retries=0, timeout=20)


def ask(server: Harness, **more: Any) -> Any:
    return client(server).messages.create(**({"model": "tiny", "max_tokens": 400, "messages": HI} | more))


def script_call(server: Harness, text: str = "", thought: str = "") -> None:
    tokenizer = server.tokenizer
    ids = [*tokenizer.encode(thought), tokenizer.special(special.END_THINK)] if thought else []
    ids += tokenizer.encode(text)
    for segment in tool_calls("bare", [{"function": {"name": "weather", "arguments": '{"city": "Köln"}'}}] * 2):
        ids += [tokenizer.special(segment.text)] if segment.special else tokenizer.encode(segment.text)
    server.engine.scripts[:] = [Script(tokens=ids)]


def test_text_thinking_and_usage(server: Harness, rng: random.Random) -> None:
    answer, thought = some_text(rng), some_text(rng)
    server.script(answer, thought)
    message = ask(server, thinking={"type": "enabled", "budget_tokens": 1024}, system="Be brief.")
    assert [(b.type, getattr(b, b.type)) for b in message.content] == [("thinking", thought), ("text", answer)]
    assert message.stop_reason == "end_turn" and message.role == "assistant" and message.model == "tiny"
    prompt = list(server.engine.seen[-1].prompt)
    chat = [{"role": "system", "content": "Be brief."}, *HI]
    assert prompt == server.template.encode(server.tokenizer, chat, True)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt) and usage.output_tokens > 0

    with client(server).messages.stream(
        model="tiny", max_tokens=400, messages=HI, thinking={"type": "enabled", "budget_tokens": 1024}
    ) as stream:
        kinds = [event.type for event in stream if event.type in ("content_block_start", "content_block_stop")]
        final = stream.get_final_message()
    assert kinds == ["content_block_start", "content_block_stop"] * 2
    assert [(b.type, getattr(b, b.type)) for b in final.content] == [("thinking", thought), ("text", answer)]
    assert final.usage.output_tokens == message.usage.output_tokens and final.stop_reason == "end_turn"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_use_and_its_results(server: Harness, stream: bool) -> None:
    script_call(server, "Let me see.", "look it up")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    more = {"model": "tiny", "max_tokens": 400, "messages": HI, "tools": [TOOL], "thinking": thinking}
    if stream:
        with client(server).messages.stream(**more) as events:
            message = events.get_final_message()
    else:
        message = client(server).messages.create(**more)
    assert [b.type for b in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.stop_reason == "tool_use"
    calls = message.content[2:]
    assert all(c.input == {"city": "Köln"} and c.name == "weather" for c in calls) and calls[0].id != calls[1].id

    server.script("Rain.")
    result = [
        {"type": "tool_result", "tool_use_id": c.id, "content": [{"type": "text", "text": "rain"}]} for c in calls
    ]
    # The client drops the thought: the server has kept it.
    said = [block.model_dump() for block in message.content[1:]]
    loop = [*HI, {"role": "assistant", "content": said}, {"role": "user", "content": result}]
    assert ask(server, messages=loop, tools=[TOOL], thinking=thinking).content[0].text == "Rain."
    text = server.tokenizer.decode(server.engine.seen[-1].prompt)
    assert "<think>look it up</think>Let me see.<｜tool▁calls▁begin｜>" in text
    assert text.endswith("<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>" * 2)


def test_tool_choice(server: Harness) -> None:
    server.script("x")
    begin = server.tokenizer.special(special.TOOL_CALLS_BEGIN)
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        ask(server, tools=[TOOL], tool_choice=choice)
        assert not server.engine.seen[-1].params.grammar.optional
    ask(server, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert ")*" not in server.engine.seen[-1].params.grammar.text
    ask(server, tools=[TOOL], tool_choice={"type": "none"})
    assert (begin,) in server.engine.seen[-1].params.bad_token_ids


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_and_limits(server: Harness, stream: bool) -> None:
    server.script("one END two")

    def asked(**more: Any) -> Any:
        if not stream:
            return ask(server, **more)
        with client(server).messages.stream(**({"model": "tiny", "max_tokens": 400, "messages": HI} | more)) as events:
            return events.get_final_message()

    message = asked(stop_sequences=["END"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one ", "stop_sequence", "END")
    assert asked(max_tokens=1).stop_reason == "max_tokens"


def test_prefill_counting_and_names(server: Harness) -> None:
    server.script("es.")
    message = ask(server, model="tiny[1m]", messages=[*HI, {"role": "assistant", "content": "Y"}])
    assert message.content[0].text == "es."
    assert server.tokenizer.decode(server.engine.seen[-1].prompt).endswith("</think>Y")
    counted = client(server).messages.count_tokens(model="tiny", messages=HI, tools=[TOOL], system="s")
    ask(server, tools=[TOOL], system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}])
    assert counted.input_tokens == len(server.engine.seen[-1].prompt)
    raw = client(server).messages.with_raw_response.create(
        model="tiny", max_tokens=4, messages=HI, service_tier="auto", metadata={"user_id": "u@1"}
    )
    assert raw.headers["x-rorqual-ignored"] == "service_tier" and server.engine.seen[-1].salt not in ("", "u@1")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_anthropics(server: Harness, stream: bool) -> None:
    server.script("x")
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    wrong = [
        ({"max_tokens": 0}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": [image]}]}, anthropic.BadRequestError),
        ({"extra_body": {"field_of_2027": 1}}, anthropic.BadRequestError),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, anthropic.BadRequestError),
        ({"model": "other"}, anthropic.NotFoundError),
    ]
    for fields, kind in wrong:
        with pytest.raises(kind) as caught:
            ask(server, stream=stream, **fields)
        assert caught.value.body["type"] == "error" and set(caught.value.body["error"]) == {"type", "message"}
    server.script("x", refuse=CapacityError("the queue is full"))
    with pytest.raises(anthropic.RateLimitError):
        ask(server, stream=stream)
    server.script("some words here", fail_after=2, error=RorqualError("out of memory"))
    with pytest.raises(anthropic.APIStatusError, match="out of memory"):
        for _ in ask(server, stream=stream):
            pass
    for content in (b"", b"{", b"[]", b'"x"', b"\xff"):
        reply = httpx.post(f"{server.url}/v1/messages", content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400 and reply.json()["type"] == "error"
    assert httpx.post(f"{server.url}/v1/messages", content=b"{}").status_code == 400


def test_the_borders_errors_are_anthropics_too(tokenizer: Tokenizer) -> None:
    """Keys, sizes, routes and methods are judged before any dialect is known; the path says whose client it is."""
    with running(tokenizer, Settings(api_keys=("k",), max_body_bytes=2000)) as server:
        key = {"x-api-key": "k"}
        calls = [
            ("POST", "/anthropic/v1/messages", {}, b"{}", 401, "authentication_error"),
            ("POST", "/v1/messages", {}, b"{}", 401, "authentication_error"),
            ("POST", "/v1/messages", key, b"x" * 3000, 413, "request_too_large"),
            ("GET", "/anthropic/v1/messages", key, b"", 405, "invalid_request_error"),
            ("POST", "/anthropic/v1/nothing", key, b"{}", 404, "not_found_error"),
            ("GET", "/anthropic/v1/models/other", key, b"", 404, "not_found_error"),
        ]
        for method, path, headers, content, status, kind in calls:
            reply = httpx.request(method, server.url + path, headers=headers, content=content)
            assert (reply.status_code, reply.json()["type"], reply.json()["error"]["type"]) == (status, "error", kind)
        for path in ("/v1/models", "/chats/x/messages", "/chats/messages", "/anthropics/x"):
            assert set(httpx.post(server.url + path).json()["error"]) == {"message", "type", "param", "code"}
        assert set(httpx.get(f"{server.url}/v1/models").json()["error"]) == {"message", "type", "param", "code"}
        with pytest.raises(anthropic.AuthenticationError):
            client(server).messages.create(model="tiny", max_tokens=3, messages=HI)
        listed = client(server, "k").models.list()
        assert [(m.id, m.type) for m in listed] == [("tiny", "model"), ("org/alias", "model")]
        one = client(server, "k").models.retrieve("tiny")
        assert (one.display_name, one.created_at.timestamp()) == ("tiny", 7)
