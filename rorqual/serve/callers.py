"""Who is calling, what is left of their limits, and which cached prefixes are theirs.

A `Caller` is one key while the server runs: requests in flight, and two buckets that fill up again evenly, a
minute's worth each. Requests are counted when they are let in; tokens when they were used, because nobody
knows a completion's length before: a key may overdraw by what it has in flight, and then waits until the
bucket is above empty again.

`VISIT` tells code far below the border on whose behalf it runs. It is a context variable rather than an
argument so that no route can forget to pass it: whatever reaches an engine out of a request carries that
request's salt, pays into its account and shows in its log line. Outside of requests it is None.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from rorqual.serve.errors import ApiError
from rorqual.serve.keys import Key, Limits

MINUTE_S = 60.0


class Bucket:
    """`limit` a minute: full at first, refilled evenly. The level may fall below zero by `take`."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level, self._at = float(limit), now

    def level(self, now: float) -> float:
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / MINUTE_S)
        self._at = now
        return self._level

    def take(self, amount: int, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        return max(0.0, level - self.level(now)) * MINUTE_S / self.limit


class Caller:
    """id: of the key, "" where the server asks for none; owner: whose conversations are the caller's. `clock` gives
    seconds."""

    def __init__(self, key: Key | None, clock: Callable[[], float]) -> None:
        self.id = key.id if key else ""
        self.owner = _owner(key) if key else "local"
        self._tenant = key.tenant if key else ""
        self.limits = key.limits if key else Limits()
        self.in_flight = 0
        self._clock = clock
        self._buckets = {
            name: Bucket(limit, clock())
            for name, limit in (
                ("requests", self.limits.requests_per_minute),
                ("tokens", self.limits.tokens_per_minute),
            )
            if limit is not None
        }

    def enter(self) -> ApiError | None:
        """Count one more request, or say why not. `leave` follows only where it was counted."""
        now, most = self._clock(), self.limits.concurrency
        if most is not None and self.in_flight >= most:
            message = f"This key's limit of {most} requests at once is reached."
            return ApiError(429, message, code="concurrency_limit_exceeded", headers={"retry-after": "1"})
        for name, bucket in self._buckets.items():
            # A whole request has to fit; tokens only have to be above empty.
            wait_s = bucket.seconds_until(1.0, now)
            if wait_s > 0:
                message = f"This key's limit of {bucket.limit} {name} per minute is reached."
                headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(1000 * wait_s))}
                return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        if (requests := self._buckets.get("requests")) is not None:
            requests.take(1, now)
        self.in_flight += 1
        return None

    def leave(self) -> None:
        self.in_flight -= 1

    def spend(self, tokens: int) -> None:
        """Tokens of a prompt or a completion, as they are used."""
        if (bucket := self._buckets.get("tokens")) is not None:
            bucket.take(tokens, self._clock())

    def salt(self, user: str) -> str:
        """What separates this caller's user from everybody else in the prefix cache. No tenant has a slash in it."""
        return f"{self._tenant}/{user}" if self._tenant or user else ""

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit headers, for the limits that there are."""
        now, headers = self._clock(), {}
        for name, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
            headers[f"x-ratelimit-reset-{name}"] = spell_duration(bucket.seconds_until(bucket.limit, now))
        return headers


def _owner(key: Key) -> str:
    """A stored key's id. One of the command line is numbered by its place there, which may change: it goes by its secret,
    hashed once more than its tenant is."""
    return key.id if key.tenant == key.id else hashlib.sha256(f"chats of {key.tenant}".encode()).hexdigest()[:40]


class Callers:
    """The callers of one server: a key's account outlives its requests, and a changed limit begins a new one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._anonymous = Caller(None, clock)
        self._known: dict[str, Caller] = {}

    def of(self, key: Key | None) -> Caller:
        if key is None:
            return self._anonymous
        caller = self._known.get(key.id)
        if caller is None or caller.limits != key.limits:
            caller = self._known[key.id] = Caller(key, self._clock)
        return caller


@dataclass(slots=True)
class Visit:
    """One HTTP request of a caller, and what it came to: sums over the engine requests that it made."""

    request_id: str
    caller: Caller
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""

    def used(self) -> dict[str, str | int]:
        """For the log line; nothing where no engine was asked."""
        names = ("model", "prompt_tokens", "cached_tokens", "completion_tokens", "finish_reason")
        return {name: getattr(self, name) for name in names} if self.model else {}


VISIT: ContextVar[Visit | None] = ContextVar("visit", default=None)


def spell_duration(seconds: float) -> str:
    """As OpenAI has it: 12ms, 3.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    if seconds < MINUTE_S:
        return f"{math.ceil(10 * seconds) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
