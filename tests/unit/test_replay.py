"""The record of thoughts: bounded, short-lived, one user's own, and quiet where it knows nothing."""

from __future__ import annotations

import random

from rorqual.serve.replay import ReplayRecord


def test_thoughts_expire_and_the_oldest_make_room() -> None:
    now = 0.0
    record = ReplayRecord(ttl_s=10, max_chars=100, clock=lambda: now)
    for i in range(50):
        record.remember("u", f"call_{i}", "x" * random.randint(1, 40))
    kept = [i for i in range(50) if record.recall("u", f"call_{i}")]
    assert kept == list(range(kept[0], 50))
    assert 60 < sum(len(record.recall("u", f"call_{i}") or "") for i in kept) <= 100
    now = 10.5
    assert not any(record.recall("u", f"call_{i}") for i in kept)
    record.remember("u", "call_7", "new")
    record.remember("u", "call_7", "newer")
    assert record.recall("u", "call_7") == "newer"
    record.remember("u", "too long", "x" * 101)
    assert record.recall("u", "too long") is None


def test_only_what_was_dropped_is_put_back() -> None:
    record = ReplayRecord()
    record.remember("u", "a", "thought")
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "zz"}, {"id": "a"}]}
    kept = {**called, "reasoning_content": "its own"}
    other = {"role": "assistant", "content": "", "tool_calls": [{"id": "b"}, {}]}
    plain = {"role": "user", "content": "hi"}
    assert record.restore("u", [plain, called, kept, other]) == [
        plain,
        {**called, "reasoning_content": "thought"},
        kept,
        other,
    ]
    assert record.restore("someone else", [called]) == [called] and "reasoning_content" not in called
