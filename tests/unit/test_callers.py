"""What is left of a key's limits, against an account kept by hand."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from rorqual.serve.callers import Caller, Callers, spell_duration
from rorqual.serve.keys import Key, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(**limits: int) -> Key:
    return Key("key_1", "", "", datetime.now(UTC), "tenant", None, Limits(**limits))


def test_requests_at_once() -> None:
    caller = Caller(key(concurrency=2), Clock())
    assert caller.enter() is None and caller.enter() is None
    refusal = caller.enter()
    assert refusal and refusal.status == 429 and refusal.code == "concurrency_limit_exceeded"
    caller.leave()
    assert caller.enter() is None and caller.enter() is not None and caller.in_flight == 2


def test_no_minute_sees_more_requests_than_a_full_bucket_and_its_refill() -> None:
    """Random arrivals: whatever is let in within 60 s fits into twice the limit, and a steady stream gets its rate."""
    clock, rng = Clock(), random.Random(7)
    caller = Caller(key(requests_per_minute=30), clock)
    entered = []
    for _ in range(5000):
        clock.now += rng.expovariate(2.0)
        if caller.enter() is None:
            entered.append(clock.now)
    span = entered[-1] - entered[0]
    assert len(entered) == pytest.approx(30 + span / 2, rel=0.02)
    assert max(sum(t <= s < t + 60 for s in entered[i : i + 70]) for i, t in enumerate(entered)) <= 60


def test_what_a_refusal_says_to_wait_is_enough_and_not_too_much() -> None:
    clock = Clock()
    caller = Caller(key(requests_per_minute=7), clock)
    while (refusal := caller.enter()) is None:
        pass
    wait_s = int(refusal.headers["retry-after-ms"]) / 1000
    assert int(refusal.headers["retry-after"]) >= wait_s
    clock.now += wait_s - 0.01
    assert caller.enter() is not None
    clock.now += 0.01
    assert caller.enter() is None


def test_tokens_are_owed_after_an_overdraft() -> None:
    clock = Clock()
    caller = Caller(key(tokens_per_minute=600), clock)
    assert caller.enter() is None
    caller.spend(1200)
    headers = caller.headers()
    assert headers["x-ratelimit-limit-tokens"] == "600" and headers["x-ratelimit-remaining-tokens"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "2m0s" and "x-ratelimit-limit-requests" not in headers
    refusal = caller.enter()
    assert refusal and refusal.code == "rate_limit_exceeded" and refusal.headers["retry-after"] == "61"
    clock.now += 60.2
    assert caller.enter() is None
    clock.now += 1000
    assert caller.headers()["x-ratelimit-remaining-tokens"] == "600"


def test_a_refused_request_costs_nothing() -> None:
    caller = Caller(key(concurrency=1, requests_per_minute=5), Clock())
    caller.enter()
    for _ in range(20):
        assert caller.enter() is not None
    assert caller.headers()["x-ratelimit-remaining-requests"] == "4" and caller.in_flight == 1


def test_accounts_outlive_requests_and_limits_do_not() -> None:
    callers = Callers(Clock())
    first = callers.of(key(concurrency=1))
    assert callers.of(key(concurrency=1)) is first
    assert callers.of(key(concurrency=2)) is not first
    assert callers.of(None) is callers.of(None)


def test_salts_tell_tenants_and_users_apart() -> None:
    one, nobody = Caller(key(), Clock()), Caller(None, Clock())
    salts = [one.salt(""), one.salt("a"), one.salt("b"), nobody.salt("a"), nobody.salt("")]
    assert len(set(salts)) == len(salts) and salts[-1] == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0119, "12ms"), (1, "1s"), (3.41, "3.5s"), (60, "1m0s"), (360, "6m0s")]
)
def test_durations_are_spelled_as_openai_does(seconds: float, text: str) -> None:
    assert spell_duration(seconds) == text
