"""Seconds of what `make soak` does for minutes: streams that are left, and an engine that is killed under them."""

from __future__ import annotations

import random

import pytest

from tests.net.storm import Books, judge, storm
from tests.net.test_bundled import SERVE, needs_proc, serving


@needs_proc
def test_a_storm_leaves_nothing_behind() -> None:
    with serving([*SERVE, "--log-format", "json", "--dtype", "int8"]) as server:
        found = storm(server, seconds=7, streams=12, kill_every_s=3, seed=random.randrange(1 << 30))
    assert not found["faults"], found
    # One that is killed while it starts was never counted as started.
    assert 1 <= found["restarts"] <= found["kills"] and found["finished"] > 0 and found["left"] > 0


@pytest.mark.parametrize(
    "answer",
    [
        b'data: {"choices":[]}\n\n',
        b'data: {"finish_reason":"stop"}\n\n',
        b'data: {"finish_reason":"stop"}\n\ndata: [DONE]\n\ndata: [DONE]\n\n',
        b'data: {"error":{"message":"","code":null}}\n\ndata: [DONE]\n\n',
        b'data: {"finish_reason":"stop"}\n\nTraceback (most\n\ndata: [DONE]\n\n',
    ],
)
def test_bad_ends_are_seen(answer: bytes) -> None:
    books = Books()
    judge("x", "/v1/chat/completions", True, b"HTTP/1.1 200 OK\r\n\r\n" + answer, books)
    assert books.faults
