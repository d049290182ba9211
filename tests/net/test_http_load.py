"""`rorqual bench http`, small: what it counts, not how fast anything is. And a server that nobody can slow down."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from rorqual.cli.http_load import Load, measure
from rorqual.config import DEFAULT_MODEL, resolve_model
from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.app import Settings
from tests.net.harness import Harness, eventually, running


def test_every_token_is_counted() -> None:
    found = measure(resolve_model(DEFAULT_MODEL), Load(streams=3, tokens=40, rate=200.0))
    # One event a token, but for those that are half a character or the end of sequence.
    assert 3 * 30 < found["tokens"] <= 3 * 40
    assert found["CPU us/token"] > 0 and found["seconds"] >= 40 / 200


@contextlib.contextmanager
def unread(server: Harness) -> Iterator[socket.socket]:
    """A client that asks for an answer larger than every buffer on the way, and reads nothing of it."""
    server.script("whale " * 20_000, tokens_per_output=50)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        body = (
            b'{"model": "tiny", "stream": true, "max_tokens": 100000, "messages": [{"role": "user", "content": "?"}]}'
        )
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        yield client


def test_the_engine_does_not_wait_for_a_client_that_does_not_read(tokenizer: Tokenizer) -> None:
    """It ends the answer all the same, and others are served."""
    with running(tokenizer, context=1 << 17) as server, unread(server):
        assert eventually(lambda: server.engine.finished, 60)
        assert not server.engine.live and not server.engine.aborted
        server.script("quick")
        reply = server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}])
        assert reply.choices[0].message.content == "quick"


def test_a_client_that_stays_and_does_not_read_is_left_at_the_deadline(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(request_timeout_s=0.5, heartbeat_s=0.2)
    with running(tokenizer, settings, context=1 << 17) as server, unread(server) as client:
        assert eventually(lambda: "has stopped reading" in caplog.text, 30)
        assert client.fileno() > 0  # it is still there
