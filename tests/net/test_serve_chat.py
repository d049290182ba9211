"""Chat completions through OpenAI's client: what was scripted comes out, in OpenAI's and DeepSeek's fields."""

from __future__ import annotations

import asyncio
import json
import random
import string

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.scripted import Script
from rorqual.serve.app import GenerationDefaults, Settings
from tests.net.harness import Gate, Harness, eventually, running, some_text

HI = [{"role": "user", "content": "hi"}]


def raw_events(server: Harness, **body: object) -> list[object]:
    """The data of every server-sent event, parsed, and "[DONE]"."""
    request = {"model": "tiny", "messages": HI, "stream": True} | body
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request, timeout=20) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
        text = response.read().decode()
    events = [e.removeprefix("data: ") for e in text.split("\n\n") if e.startswith("data: ")]
    return [e if e == "[DONE]" else json.loads(e) for e in events]


@pytest.mark.parametrize("per_output", [1, 3, 1000])
@pytest.mark.parametrize("thinking", [False, True])
def test_streaming_and_not_say_the_same(server: Harness, rng: random.Random, per_output: int, thinking: bool) -> None:
    answer, thought = some_text(rng, 30), some_text(rng, 20) if thinking else None
    ids = server.script(answer, thought, tokens_per_output=per_output)
    ask = {
        "model": "tiny",
        "messages": HI,
        "extra_body": {"thinking": {"type": "enabled" if thinking else "disabled"}},
    }
    whole = server.client().chat.completions.create(**ask)
    message = whole.choices[0].message
    assert message.content == answer and message.role == "assistant"
    assert message.reasoning_content == thought and (not thinking or message.reasoning == thought)
    assert whole.choices[0].finish_reason == "stop" and whole.model == "tiny"

    content, reasoning, reasons = "", "", []
    for chunk in server.client().chat.completions.create(**ask, stream=True):
        delta = chunk.choices[0].delta
        assert not (content and delta.reasoning_content), "the thought comes first"
        content, reasoning = content + (delta.content or ""), reasoning + (delta.reasoning_content or "")
        reasons.append(chunk.choices[0].finish_reason)
    assert (content, reasoning or None) == (answer, thought)
    assert reasons[-1] == "stop" and not any(reasons[:-1])

    prompt = server.engine.seen[-1].prompt
    assert list(prompt) == server.template.encode(server.tokenizer, HI, thinking)
    usage = whole.usage
    assert usage.prompt_tokens == len(prompt) and usage.completion_tokens == len(ids) + 1  # the end of sequence
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    thought_tokens = len(server.tokenizer.encode(thought)) if thought else 0
    assert usage.completion_tokens_details.reasoning_tokens == thought_tokens


def test_chunks_are_what_the_clients_models_say(server: Harness, rng: random.Random) -> None:
    answer = some_text(rng)
    server.script(answer, some_text(rng))
    options = {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    *chunks, done = raw_events(server, thinking={"type": "enabled"}, **options)
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk["object"] == "chat.completion.chunk"
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    *deltas, usage = chunks
    assert deltas[0]["choices"][0]["delta"]["role"] == "assistant"
    assert not any("role" in c["choices"][0]["delta"] for c in deltas[1:])
    # DeepSeek's example reads both from every chunk.
    assert all({"content", "reasoning_content"} <= c["choices"][0]["delta"].keys() for c in deltas)
    assert all(c["usage"] is None for c in deltas)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    assert deltas[-1]["choices"][0]["finish_reason"] == "stop"

    no_usage = raw_events(server)
    assert not any("usage" in c for c in no_usage if c != "[DONE]")


def test_whole_answer_is_what_the_clients_model_says(server: Harness, rng: random.Random) -> None:
    server.script(some_text(rng), some_text(rng))
    body = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 3, "reasoning_effort": "high"}
    reply = httpx.post(f"{server.url}/chat/completions", json=body).json()
    ChatCompletion.model_validate(reply, strict=True)
    assert reply["id"] == server.engine.seen[-1].id


def test_cache_hits_in_usage(server: Harness, rng: random.Random) -> None:
    server.script("ok")
    messages = [{"role": "user", "content": "".join(rng.choices(string.ascii_letters, k=150))}]
    client = server.client()
    first = client.chat.completions.create(model="tiny", messages=messages).usage
    again = client.chat.completions.create(model="tiny", messages=messages).usage
    assert first.prompt_cache_hit_tokens == 0 and again.prompt_cache_hit_tokens > 0
    assert again.prompt_tokens_details.cached_tokens == again.prompt_cache_hit_tokens
    for usage in (first, again):
        assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_answer_and_free_the_engine(server: Harness, rng: random.Random, stream: bool) -> None:
    before, stop = some_text(rng), "".join(rng.choices("#@%", k=rng.randint(1, 5)))
    full = before + stop + some_text(rng, 40)
    ids = server.script(full, thought=f"no end at {stop} here")
    ask = {"thinking": {"type": "enabled"}, "stop": ["never so", stop]}
    if stream:
        chunks = [c for c in raw_events(server, **ask, stream_options={"include_usage": True}) if c != "[DONE]"]
        content = "".join(c["choices"][0]["delta"]["content"] or "" for c in chunks[:-1])
        reason, usage = chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
    else:
        reply = server.client().chat.completions.create(model="tiny", messages=HI, extra_body=ask)
        content, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        usage = reply.usage.model_dump()
        assert stop in reply.choices[0].message.reasoning_content
    assert content == full[: full.index(stop)] and reason == "stop"
    assert usage["completion_tokens"] < len(ids)
    assert eventually(lambda: server.engine.aborted and server.engine.aborted[-1] == server.engine.seen[-1].id)


def test_text_held_back_for_a_stop_string_is_not_lost(server: Harness) -> None:
    server.script("a sea of EN")
    assert _ask(server, stop="END") == ("a sea of EN", "stop")


def test_length(server: Harness, rng: random.Random) -> None:
    answer = some_text(rng, 30)
    ids = server.script(answer)
    n = rng.randint(1, len(ids) - 1)
    expected = server.tokenizer.decode(ids[:n])
    for name in ("max_tokens", "max_completion_tokens"):
        assert _ask(server, **{name: n}) == (expected, "length")


def _ask(server: Harness, **options: object) -> tuple[str | None, str]:
    choice = server.client().chat.completions.create(model="tiny", messages=HI, **options).choices[0]
    return choice.message.content, choice.finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_list_the_tokens_of_the_text(server: Harness, rng: random.Random, stream: bool) -> None:
    answer, thought = some_text(rng, 20), some_text(rng, 8)
    server.script(answer + "STOP more", thought)
    ask = {"thinking": {"type": "enabled"}, "logprobs": True, "top_logprobs": 2, "stop": "STOP"}
    content: list[dict] = []
    reasoning: list[dict] = []
    if stream:
        for chunk in raw_events(server, **ask)[:-1]:
            logprobs = chunk["choices"][0]["logprobs"] or {}
            content += logprobs.get("content") or []
            reasoning += logprobs.get("reasoning_content") or []
    else:
        reply = server.client().chat.completions.create(model="tiny", messages=HI, extra_body=ask)
        logprobs = reply.choices[0].logprobs.model_dump()
        content, reasoning = logprobs["content"], logprobs["reasoning_content"]
    # The stop string may begin inside a token, which then is listed whole.
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode()
    assert text.startswith(answer) and (answer + "STOP").startswith(text)
    assert b"".join(bytes(entry["bytes"]) for entry in reasoning).decode() == thought
    for entry in content + reasoning:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["token"] == entry["token"]


def test_logprobs_without_alternatives(server: Harness) -> None:
    server.script("deep sea")
    logprobs = server.client().chat.completions.create(model="tiny", messages=HI, logprobs=True).choices[0].logprobs
    assert "".join(entry.token for entry in logprobs.content) == "deep sea"
    assert all(entry.top_logprobs == [] for entry in logprobs.content)


def test_request_reaches_the_engine_as_meant(server: Harness) -> None:
    server.script("x")
    options = {"temperature": 0.25, "top_p": 0.5, "seed": 11, "max_tokens": 9, "stop": ["a", "b"]}
    server.client().chat.completions.create(model="tiny", messages=HI, **options, extra_body={"top_k": 5})
    params = server.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.25, 0.5, 5, 11)
    assert (params.max_tokens, params.stop, params.logprobs) == (9, ("a", "b"), None)


def test_messages_in_every_accepted_form_are_one_prompt(server: Harness) -> None:
    server.script("x")
    plain = [
        {"role": "system", "content": "be\nbrief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]
    other = [
        {"role": "developer", "content": parts, "name": "ops"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "reasoning": "hm", "tool_calls": None},
        {"role": "user", "content": "r"},
    ]
    for messages in (plain, other):
        server.client().chat.completions.create(model="tiny", messages=messages)
    assert server.engine.seen[-1].prompt == server.engine.seen[-2].prompt
    assert list(server.engine.seen[-1].prompt) == server.template.encode(server.tokenizer, plain)


def test_harmless_fields_are_accepted_and_named(server: Harness) -> None:
    server.script("fine")
    client = server.client()
    reply = client.chat.completions.create(
        model="tiny",
        messages=HI,
        n=1,
        user="u",
        store=False,
        metadata={"k": "v"},
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        frequency_penalty=0,
        presence_penalty=0.0,
        tools=[],
        tool_choice="none",
        logit_bias={},
        temperature=None,
        top_p=0,
        extra_body={"user_id": "u1", "min_p": 0.0, "functions": [], "echo": False},
    )
    assert reply.choices[0].message.content == "fine"
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HI, user="u", store=True, stream=True)
    assert raw.headers["x-rorqual-ignored"] == "store, user"
    raw.http_response.read()


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
        ({"thinking": {"type": "adaptive"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "xhigh"}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
    ],
)
def test_thinking_in_three_dialects(server: Harness, body: dict[str, object], thinks: bool) -> None:
    server.script("x", "hm" if thinks else None)
    server.client().chat.completions.create(model="tiny", messages=HI, extra_body=body)
    assert list(server.engine.seen[-1].prompt) == server.template.encode(server.tokenizer, HI, thinks)


def test_defaults_of_the_model(tokenizer: Tokenizer) -> None:
    defaults = GenerationDefaults(
        temperature=0.3, top_p=0.9, top_k=7, max_tokens=5, thinking=True, min_p=0.1, repetition_penalty=1.2
    )
    with running(tokenizer, defaults=defaults) as server:
        server.script("answer of more than five tokens", "thought")
        choice = server.client().chat.completions.create(model="tiny", messages=HI).choices[0]
        params = server.engine.seen[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.3, 0.9, 7, 5)
        assert (params.min_p, params.repetition_penalty) == (0.1, 1.2)
        assert choice.message.reasoning_content and choice.finish_reason == "length"
        server.script("x")
        own = {"repetition_penalty": 1.0, "min_p": 0.0}
        server.client().chat.completions.create(model="tiny", messages=HI, extra_body=own)
        params = server.engine.seen[-1].params
        assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)


@pytest.mark.parametrize(("template", "wish"), [("v3", "enabled"), ("r1", "disabled")])
def test_thinking_that_the_template_cannot_do_is_refused(tokenizer: Tokenizer, template: str, wish: str) -> None:
    with running(tokenizer, template=template) as server:
        assert server.client().models.retrieve("tiny").thinking is False
        server.script("answer", "thought" if template == "r1" else None)
        body = {"model": "tiny", "messages": HI, "thinking": {"type": wish}}
        reply = httpx.post(f"{server.url}/chat/completions", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "thinking"
        choice = server.client().chat.completions.create(model="tiny", messages=HI).choices[0]
        assert choice.message.content == "answer"
        assert choice.message.reasoning_content == ("thought" if template == "r1" else None)


def test_default_limit_is_the_rest_of_the_context_or_the_setting(tokenizer: Tokenizer) -> None:
    for limit in (100, 4096):
        with running(tokenizer, Settings(default_max_tokens=limit)) as server:
            server.script("x")
            server.client().chat.completions.create(model="tiny", messages=HI)
            request = server.engine.seen[-1]
            assert request.params.max_tokens == min(limit, 512 - len(request.prompt))


def test_models(server: Harness) -> None:
    client = server.client()
    assert {model.id for model in client.models.list()} == {"tiny", "org/alias"}
    model = client.models.retrieve("org/alias")
    assert (model.id, model.object, model.created, model.owned_by) == ("org/alias", "model", 7, "rorqual")
    assert model.thinking is True and model.max_model_len == 512
    server.script("x")
    assert client.chat.completions.create(model="org/alias", messages=HI).model == "tiny"


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta", "/beta/v1"])
def test_every_base_url(server: Harness, prefix: str) -> None:
    server.script("same")
    client = server.client(base_url=server.url + prefix)
    assert len(list(client.models.list())) == 2
    assert client.chat.completions.create(model="tiny", messages=HI).choices[0].message.content == "same"
    assert httpx.get(f"{server.url}{prefix}/health").status_code == 200


def test_32_streams_at_once_do_not_mix(server: Harness, rng: random.Random) -> None:
    answers = {f"q{i}": some_text(rng, 25) for i in range(32)}
    by_prompt = {
        tuple(server.template.encode(server.tokenizer, [{"role": "user", "content": q}])): a for q, a in answers.items()
    }
    server.engine.scripts[:] = [_answering(server, by_prompt)]

    async def one(client: object, question: str) -> tuple[str, str]:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], stream=True
        )
        return question, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone() -> dict[str, str]:
        async with server.async_client() as client:
            return dict(await asyncio.gather(*(one(client, q) for q in answers)))

    assert asyncio.run(everyone()) == answers


def _answering(server: Harness, by_prompt: dict[tuple[int, ...], str]) -> Script:
    return Script(tokens=lambda prompt: server.tokenizer.encode(by_prompt[prompt]), delay_s=0.002)


def test_heartbeats_while_waiting(server: Harness, gate: Gate) -> None:
    server.script("at last", gate=gate.wait)
    body = {"model": "tiny", "messages": HI, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        gate.open()
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"


def test_heartbeats_do_not_disturb_the_client(server: Harness, gate: Gate) -> None:
    server.script("at last", gate=gate.wait)
    stream = server.client().chat.completions.create(model="tiny", messages=HI, stream=True)  # after one heartbeat
    gate.open()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "at last"
