"""Some hundreds of what `make soak` sends ten thousand of. A server that answers wrongly is noticed."""

from __future__ import annotations

import random
from functools import partial

import httpx
import pytest

from rorqual.cli.http_load import answers
from rorqual.cli.scripted_server import scripted_server
from rorqual.config import DEFAULT_MODEL, resolve_model
from tests.net.harness import eventually
from tests.net.malformed import send_all, wrong


def test_what_nobody_means_is_refused_and_leaves_nothing() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    with scripted_server(resolve_model(DEFAULT_MODEL), partial(answers, period_s=0.0, tokens=3)) as server:
        statuses, faults = send_all(server.url, 300, seed)
        assert not faults, faults[:3]
        assert statuses["400"] > 100 and statuses["200"] < 100 and eventually(lambda: server.live() == 0)
        before = server.memory_bytes()
        _, faults = send_all(server.url, 300, seed + 1)
        assert not faults, faults[:3]
        assert server.memory_bytes() - before < 30e6
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 500 X\r\n\r\n{"error":{}}',
        b"HTTP/1.1 400 X\r\n\r\nTraceback (most recent call last)",
        b'HTTP/1.1 400 X\r\ncontent-type: application/json\r\n\r\n{"error":{"message":"x","type":"y","detail":[]}}',
    ],
)
def test_wrong_answers_are_seen(answer: bytes) -> None:
    assert wrong(answer[9:12].decode(), answer, silent=False)
