"""The platform before another server: ours with the scripted engine, and one that misbehaves."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openai
import pytest

from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import ConfigError
from rorqual.net import UpstreamClient
from rorqual.serve.app import Settings, create_app
from rorqual.serve.database import database_url
from rorqual.serve.keys import KeyStore, Limits
from rorqual.serve.run import Server
from rorqual.serve.upstream import Upstream
from tests.net.harness import Gate, Harness, eventually, running, serving
from tests.net.test_operations import sampler

HI = [{"role": "user", "content": "hi"}]


@contextlib.contextmanager
def platform(url: str, settings: Settings | None = None, **upstream: str) -> Iterator[Server]:
    with serving(create_app({}, settings or Settings(), Upstream(url, **upstream))) as server:
        yield server


def client(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture
def front(server: Harness) -> Iterator[Server]:
    with platform(server.url) as front:
        yield front


def test_answers_are_the_upstreams(server: Harness, front: Server) -> None:
    server.script("all of the sea", thought="a whale")
    ask = {"model": "tiny", "messages": HI, "extra_body": {"thinking": {"type": "enabled"}}}
    near, far = (c.chat.completions.create(**ask) for c in (server.client(), client(front)))
    assert far.choices == near.choices and far.usage == near.usage and far.choices[0].message.content
    assert client(front).models.list().data == server.client().models.list().data
    assert client(front).models.retrieve("org/alias").id == "org/alias"
    raw = client(front).chat.completions.with_raw_response.create(model="tiny", messages=HI)
    assert raw.headers["x-request-id"]


def test_the_document_tells_of_what_is_passed_on(front: Server) -> None:
    paths = httpx.get(f"{front.url}/openapi.json").json()["paths"]
    for path in ("/chat/completions", "/embeddings", "/messages"):
        assert paths[path]["post"]["requestBody"] and set(paths[path]["post"]["responses"]) == {"200", "4XX", "5XX"}


@pytest.mark.parametrize("wants_usage", [True, False])
def test_streams_are_the_upstreams(server: Harness, front: Server, wants_usage: bool) -> None:
    """Chunk by chunk; the usage that the platform asks for is seen by those alone who asked for it."""
    server.script("all of the sea 🐋", thought="a whale")
    ask: dict[str, object] = {"model": "tiny", "messages": HI, "stream": True, "logprobs": True}
    if wants_usage:
        ask["stream_options"] = {"include_usage": True}

    def chunks(url: str) -> list[dict[str, object]]:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ask) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        found = [json.loads(line) for line in lines[:-1]]
        return [{k: v for k, v in c.items() if k in ("choices", "usage") and v is not None} for c in found]

    assert chunks(front.url) == chunks(server.url)
    assert sampler(front)("vllm:generation_tokens_total", model_name="tiny") > 5
    assert sampler(front)("vllm:request_success_total", finished_reason="stop") == 1


def test_what_the_upstream_refuses_is_refused_in_its_words(server: Harness, front: Server) -> None:
    for wrong, kind in (({"model": "none"}, openai.NotFoundError), ({"temperature": 9}, openai.BadRequestError)):
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                client(front).chat.completions.create(**{"model": "tiny", "messages": HI, "stream": stream, **wrong})
            assert caught.value.param == next(iter(wrong))
    for body in (b"{", b"[]", b"\xff"):
        response = httpx.post(f"{front.url}/v1/chat/completions", content=body)
        assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]
    assert httpx.post(f"{front.url}/v1/load_lora_adapter", json={}).status_code == 404, "not passed on"


def test_a_client_that_leaves_frees_the_upstream(server: Harness, front: Server, gate: Gate) -> None:
    server.script("a word that goes on", gate=gate.after(3))
    stream = client(front).chat.completions.create(model="tiny", messages=HI, stream=True)
    next(iter(stream))
    assert server.engine.live
    stream.close()
    assert eventually(lambda: server.engine.seen[-1].id in server.engine.aborted)


def test_keys_and_limits_are_the_platforms(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = KeyStore(database_url(tmp_path))
    secrets = [store.create(name, Limits(tokens_per_minute=limit))[1] for name, limit in (("a", None), ("b", 3))]
    with (
        running(tokenizer, Settings(api_keys=("the upstream's",))) as behind,
        platform(f"{behind.url}/v1", Settings(database_url=database_url(tmp_path)), api_key="the upstream's") as front,
    ):
        behind.script("all of the sea")
        with pytest.raises(openai.AuthenticationError):
            client(front).models.list()
        for secret in secrets:
            assert client(front, secret).models.list().data
            stream = client(front, secret).chat.completions.create(model="tiny", messages=HI, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in stream) == "all of the sea"
        with pytest.raises(openai.RateLimitError):
            client(front, secrets[1]).chat.completions.create(model="tiny", messages=HI)
        assert client(front, secrets[0]).chat.completions.create(model="tiny", messages=HI).choices


def test_an_upstream_that_is_away(tmp_path: Path) -> None:
    with platform("http://127.0.0.1:9") as front:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client(front).chat.completions.create(model="m", messages=HI, stream=stream)
            assert caught.value.status_code == 502 and caught.value.response.headers["retry-after"]
        assert httpx.get(f"{front.url}/v1/models").status_code == 502
        assert httpx.get(f"{front.url}/health").status_code == 200
        assert httpx.get(f"{front.url}/ready").status_code == 503


# ---- an upstream that misbehaves -----------------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler, dict[str, object]], None]


@contextlib.contextmanager
def odd_server(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def begin_stream(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream")
    handler.end_headers()


def lines_of(front: Server, route: str = "/v1/chat/completions") -> list[str]:
    body = {"model": "m", "messages": HI, "stream": True}
    with httpx.stream("POST", front.url + route, json=body, timeout=10) as response:
        return [line for line in response.iter_lines() if line]


@pytest.mark.parametrize(
    ("route", "last"), [("/v1/chat/completions", "data: [DONE]"), ("/v1/messages", 'data: {"type": "error"')]
)
def test_a_stream_that_breaks_off_ends_in_good_form(route: str, last: str) -> None:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, object]) -> None:
        begin_stream(handler)
        handler.wfile.write(b'data: {"model": "m", "choices": [{"delta": {"content": "x"}}]}\n\n')

    with odd_server(answer) as url, platform(url) as front:
        lines = lines_of(front, route)
        assert lines[-1].startswith(last) and any("broke off" in line for line in lines)
        assert sampler(front)("vllm:request_success_total", finished_reason="error") == 1


def test_silence_is_filled_and_ended(gate: Gate) -> None:
    def answer(handler: BaseHTTPRequestHandler, body: dict[str, object]) -> None:
        begin_stream(handler)
        gate.opened.wait(60)

    settings = Settings(heartbeat_s=0.05, queue_timeout_s=1.0, idle_timeout_s=1.0)
    with odd_server(answer) as url, platform(url, settings) as front:
        lines = lines_of(front)
        assert lines.count(": keep-alive") > 2 and lines[-1] == "data: [DONE]" and "in time" in lines[-2]
        gate.open()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such thing", "code": 400, "type": "BadRequestError", "param": null}}', "no such"),
        (b'{"object": "error", "message": "older vLLM", "code": 400}', "older vLLM"),
        (b"<html>a proxy's page</html>", "status 400"),
    ],
)
def test_errors_come_in_one_shape_whatever_the_upstreams_is(body: bytes, message: str) -> None:
    def answer(handler: BaseHTTPRequestHandler, _: dict[str, object]) -> None:
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(body)

    with odd_server(answer) as url, platform(url) as front:
        for stream in (True, False):
            with pytest.raises(openai.BadRequestError) as caught:
                client(front).chat.completions.create(model="m", messages=HI, stream=stream)
            assert message in caught.value.message and caught.value.type == "invalid_request_error"


def test_callers_get_caches_of_their_own(tmp_path: Path) -> None:
    bodies: list[dict[str, object]] = []

    def answer(handler: BaseHTTPRequestHandler, body: dict[str, object]) -> None:
        bodies.append(body)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"model": "m", "choices": []}')

    keys = ("first-key", "second-key")
    with odd_server(answer) as url, platform(url, Settings(api_keys=keys)) as front:
        for key in keys:
            for more in ({}, {"user_id": "ann"}, {"user_id": "ann", "cache_salt": "x"}):
                body = {"model": "m", "messages": HI, **more}
                headers = {"authorization": f"Bearer {key}"}
                assert httpx.post(f"{front.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    with odd_server(answer) as url, platform(url) as front:
        httpx.post(f"{front.url}/v1/chat/completions", json={"model": "m", "messages": HI})
    salts = [body.get("cache_salt") for body in bodies]
    assert len(set(salts)) == 7 and salts[-1] is None and not any(key in str(salts) for key in keys)


def test_addresses_that_are_none() -> None:
    for url in ("", "gpu-box:8000", "ftp://x", "http://", "http://user:pw@host", "file:///etc/passwd", "http://[::1"):
        with pytest.raises(ConfigError):
            UpstreamClient(url)
    with pytest.raises(ConfigError, match="--upstream"):
        create_app({}, Settings())
