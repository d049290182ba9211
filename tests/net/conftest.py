"""Fixtures of the API tests; the server in a thread is in harness.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.serve.app import Settings
from tests.net.harness import WORDS, Gate, Harness, eventually, running


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    sentences = ["The whale takes in a whole sea and keeps only what feeds it. "] * 3
    return train_tokenizer([*sentences, " ".join(WORDS)], vocab_size=340)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print(f"rng seed {seed}")  # pytest shows it when the test fails
    return random.Random(seed)


@pytest.fixture(scope="session")
def _shared(tokenizer: Tokenizer) -> Iterator[Harness]:
    with running(tokenizer, Settings(heartbeat_s=0.2)) as harness:
        yield harness


@pytest.fixture
def server(_shared: Harness) -> Iterator[Harness]:
    """One server for many tests. Whatever a test did to it, it must go on serving."""
    yield _shared
    _shared.script("still here")
    reply = _shared.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}])
    assert reply.choices[0].message.content == "still here"
    assert eventually(lambda: not _shared.engine.live)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
