"""Whatever a client sends and whatever the engine does: one error object, the right status, and a server that goes on
(the `server` fixture asks it for an answer after every test)."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket

import httpx
import openai
import pytest

from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import ScriptedEngine
from rorqual.errors import CapacityError, RorqualError
from rorqual.serve.app import Settings
from tests.net.harness import Gate, Harness, eventually, running, some_text

HI = [{"role": "user", "content": "hi"}]


def post(server: Harness, body: object = None, *, content: bytes | None = None, **headers: str) -> httpx.Response:
    content = json.dumps(body).encode() if content is None else content
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json"} | headers,
        timeout=20,
    )


def checked(response: httpx.Response, status: int) -> dict[str, str | None]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"] and int(response.headers["openai-processing-ms"]) >= 0
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and isinstance(error["type"], str)
    assert all(error[key] is None or isinstance(error[key], str) for key in ("param", "code"))
    assert "Traceback" not in response.text and ".py" not in response.text
    return error


TOOL = {"type": "function", "function": {"name": "f"}}
INVALID = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [*HI, {"role": "robot", "content": "x"}]}, "messages[1].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "assistant", "content": "x", "prefix": True}, *HI]}, "messages[0].prefix"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[1].tool_calls[0].function"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": [str(i) for i in range(17)]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"thinking": True}, "thinking"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": 5, "max_tokens": 3}, "min_tokens"),
    ({"min_tokens": 5, "response_format": {"type": "json_object"}}, "min_tokens"),
    ({"user_id": "a b"}, "user_id"),
    ({"guided_json": {}}, "guided_json"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"field_of_2027": 1}, "field_of_2027"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), INVALID, ids=[f"{i}-{p}" for i, (_, p) in enumerate(INVALID)])
def test_invalid_fields_are_named(_shared: Harness, fields: dict[str, object], param: str, stream: bool) -> None:
    before = len(_shared.engine.seen)
    error = checked(post(_shared, {"model": "tiny", "messages": HI, "stream": stream} | fields), 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert len(_shared.engine.seen) == before, "the engine never hears of it"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields(server: Harness, field: str) -> None:
    body = {"model": "tiny", "messages": HI}
    del body[field]
    error = checked(post(server, body), 400)
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"model":' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "nonsense", "list", "null", "string", "no-utf8", "deep", "huge-number"],
)
def test_bad_json(server: Harness, content: bytes) -> None:
    assert checked(post(server, content=content), 400)["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_refused(server: Harness) -> None:
    """Pages of other origins can send text/plain without asking; they must not be able to run the model."""
    body = json.dumps({"model": "tiny", "messages": HI}).encode()
    assert "application/json" in checked(post(server, content=body, **{"content-type": "text/plain"}), 400)["message"]


def test_lone_surrogates_do_not_crash(server: Harness) -> None:
    for where in ("content", "model", "stop"):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        bad = {"content": {"messages": [{"role": "user", "content": "\ud800"}]}}.get(where, {where: "\ud800"})
        assert post(server, body | bad).status_code in (200, 400, 404)


def test_random_bodies_never_make_a_server_error(server: Harness, rng: random.Random) -> None:
    names = ["model", "messages", "max_tokens", "stop", "stream", "thinking", "n", "logprobs", "x", "temperature"]

    def value(depth: int = 0) -> object:
        pick = rng.randrange(9 if depth < 3 else 6)
        if pick == 6:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        if pick >= 7:
            keys = ["role", "content", "type", "text", "prefix", "include_usage"]
            return {rng.choice(keys): value(depth + 1) for _ in range(rng.randrange(4))}
        return [None, True, rng.randint(-9, 9), rng.random(), "user", "text"][pick]

    server.script("ok")
    with httpx.Client(timeout=20) as client:
        for _ in range(300):
            body = {"model": "tiny", "messages": HI} | {rng.choice(names): value() for _ in range(rng.randint(1, 3))}
            response = client.post(f"{server.url}/chat/completions", json=body)
            assert response.status_code < 500, (body, response.text)


def test_unknown_model(server: Harness) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().chat.completions.create(model="gpt-9", messages=HI)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model") and "gpt-9" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-9")


def test_unknown_routes_and_methods(server: Harness) -> None:
    for method, path in [("GET", "/v1/nothing"), ("POST", "/v2/chat/completions"), ("GET", "/assets/../../app.py")]:
        checked(httpx.request(method, server.url + path), 404)
    for method, path in [("GET", "/v1/chat/completions"), ("DELETE", "/models"), ("OPTIONS", "/chat/completions")]:
        response = httpx.request(method, server.url + path)
        assert checked(response, 405)["code"] == "method_not_allowed" and response.headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_too_long(server: Harness, rng: random.Random, stream: bool) -> None:
    messages = [{"role": "user", "content": some_text(rng, 600)}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="tiny", messages=messages, stream=stream)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    assert "maximum context length is 512 tokens" in str(caught.value)
    with pytest.raises(openai.BadRequestError):
        server.client().chat.completions.create(model="tiny", messages=HI, max_tokens=512, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_429_with_retry_after(server: Harness, stream: bool) -> None:
    server.script("x", refuse=CapacityError("the queue is full", remedy="try again later"))
    response = post(server, {"model": "tiny", "messages": HI, "stream": stream})
    assert checked(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) > 0
    with pytest.raises(openai.RateLimitError):
        server.client().chat.completions.create(model="tiny", messages=HI, stream=stream)


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body(tokenizer: Tokenizer, chunked: bool) -> None:
    with running(tokenizer, Settings(max_body_bytes=2000)) as server:
        body = b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"a" * 4000
        pieces = iter([body, body])
        response = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=pieces if chunked else body,
            headers={"content-type": "application/json"},
        )
        assert checked(response, 413)["code"] == "request_too_large"
        server.script("x")
        assert post(server, {"model": "tiny", "messages": HI}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_engine_error_before_the_first_token_is_a_status(server: Harness, stream: bool) -> None:
    server.script("some words", fail_after=0, error=RorqualError("out of memory"))
    error = checked(post(server, {"model": "tiny", "messages": HI, "stream": stream}), 500)
    assert "out of memory" in error["message"] and error["type"] == "server_error"


def test_engine_error_in_mid_stream(server: Harness, rng: random.Random) -> None:
    answer = some_text(rng)
    ids = server.script(answer, fail_after=4, error=RorqualError("out of memory"))
    with server.client() as client, pytest.raises(openai.APIError, match="out of memory"):
        got = ""
        for chunk in client.chat.completions.create(model="tiny", messages=HI, stream=True):
            got += chunk.choices[0].delta.content or ""
    assert got and answer.startswith(got) and len(ids) > 4

    async def asynchronously() -> None:
        async with server.async_client() as client:
            async for _ in await client.chat.completions.create(model="tiny", messages=HI, stream=True):
                pass

    with pytest.raises(openai.APIError, match="out of memory"):
        asyncio.run(asynchronously())
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        server.client().chat.completions.create(model="tiny", messages=HI)


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_bug_leaks_nothing_and_is_logged_with_the_request_id(
    server: Harness, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    server.script("x", fail_after=0, error=ZeroDivisionError("secret detail in /home/me"))
    with caplog.at_level(logging.ERROR):
        response = post(server, {"model": "tiny", "messages": HI, "stream": stream}, **{"x-request-id": "mine-7"})
    assert "secret" not in response.text and checked(response, 500)
    record = next(r for r in caplog.records if "mine-7" in r.getMessage())
    assert record.exc_info and "secret detail" in str(record.exc_info[1])


def test_a_dead_engine_is_503_and_unhealthy(tokenizer: Tokenizer, gate: Gate) -> None:
    with running(tokenizer, Settings(heartbeat_s=0.1)) as server:
        assert [httpx.get(f"{server.url}/{probe}").status_code for probe in ("health", "ready")] == [200, 200]
        server.script("some words", gate=gate.wait)
        stream = server.client().chat.completions.create(model="tiny", messages=HI, stream=True, timeout=30)
        server.engine.die(RorqualError("killed"))
        response = post(server, {"model": "tiny", "messages": HI})
        assert checked(response, 503)["type"] == "server_error" and response.headers["retry-after"]
        assert [checked(httpx.get(f"{server.url}/{p}"), 503)["code"] for p in ("health", "ready")]
        gate.open()
        with pytest.raises(openai.APIError):
            list(stream)
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(tokenizer: Tokenizer, gate: Gate, stream: bool) -> None:
    with running(tokenizer, Settings(request_timeout_s=0.3, heartbeat_s=0.1 if stream else 10)) as server:
        server.script("never", gate=gate.wait)
        response = post(server, {"model": "tiny", "messages": HI, "stream": stream})
        if stream:
            *_, event, done = [line for line in response.text.split("\n\n") if line.startswith("data: ")]
            assert json.loads(event.removeprefix("data: "))["error"]["code"] == "timeout" and "DONE" in done
        else:
            assert checked(response, 504)["code"] == "timeout"
            assert response.headers["x-should-retry"] == "false"
        assert eventually(lambda: server.engine.aborted)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_frees_the_engine_at_once(
    server: Harness, gate: Gate, rng: random.Random, stream: bool, begun: bool
) -> None:
    """Heard while nothing is written (waiting in the queue) as well as in mid-answer, by closing the bare socket."""
    server.script(some_text(rng, 60), gate=gate.after(3) if begun else gate.wait)
    body = json.dumps({"model": "tiny", "messages": HI, "stream": stream}).encode()
    before = len(server.engine.seen)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert eventually(lambda: len(server.engine.seen) > before)
        request = server.engine.seen[before].id
        if stream and begun:
            assert b"200" in connection.recv(100)
    assert eventually(lambda: request in server.engine.aborted)
    assert request not in server.engine.finished


def test_closing_the_clients_stream_frees_the_engine(server: Harness, gate: Gate, rng: random.Random) -> None:
    server.script(some_text(rng, 60), gate=gate.after(3))
    stream = server.client().chat.completions.create(model="tiny", messages=HI, stream=True)
    request = next(iter(stream)).id
    stream.close()
    assert eventually(lambda: request in server.engine.aborted)


def test_cancelling_the_async_clients_call_frees_the_engine(server: Harness, gate: Gate) -> None:
    server.script("never", gate=gate.wait)
    before = len(server.engine.seen)

    async def leave() -> None:
        async with server.async_client() as client:
            call = asyncio.create_task(client.chat.completions.create(model="tiny", messages=HI))
            assert await asyncio.to_thread(eventually, lambda: len(server.engine.seen) > before)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(leave())
    request = server.engine.seen[before].id
    assert eventually(lambda: request in server.engine.aborted)


def test_a_crowd_that_leaves_and_fails_keeps_the_books_straight(tokenizer: Tokenizer, rng: random.Random) -> None:
    """Every request the engine saw ends exactly once, whatever became of its client."""
    info = EngineInfo("scripted", 512, tokenizer.vocab_size, (tokenizer.eos_id,), cache_tokens=1 << 20)
    with running(tokenizer, engine=ScriptedEngine(info=info, max_live=12)) as server:
        server.script(some_text(rng, 20), delay_s=0.003)
        patience = [rng.uniform(0.0, 0.4) for _ in range(60)]

        async def one(client: openai.AsyncOpenAI, seconds: float, stream: bool) -> None:
            try:
                async with asyncio.timeout(seconds):
                    reply = await client.chat.completions.create(model="tiny", messages=HI, stream=stream)
                    if stream:
                        async for _ in reply:
                            pass
            except (TimeoutError, openai.APIError):
                pass

        async def crowd() -> None:
            async with server.async_client() as client:
                await asyncio.gather(*(one(client, s, i % 2 == 0) for i, s in enumerate(patience)))

        asyncio.run(crowd())
        engine = server.engine
        assert eventually(lambda: not engine.live)
        ended = [*engine.aborted, *engine.finished]
        assert sorted(ended) == sorted(request.id for request in engine.seen)
        server.script("still here")
        assert server.client().chat.completions.create(model="tiny", messages=HI).choices[0].message.content
