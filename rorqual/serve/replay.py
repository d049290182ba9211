"""What the model thought before it called tools, kept for a while, for clients that do not send it back.

In a tool loop the next prompt should hold the thought that led to the call (DeepSeek's V3.2 insists on it with a 400).
Many clients drop it. Nothing is refused here: the server remembers the thought under the ids of its calls, and puts it back
where a message comes without. Ids are random and long, so knowing one is having been given it; `user_id` must agree all
the same. The record is of this process and short-lived: without it, the loop goes on without the thought.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rorqual.serve.events import Event, Finish, ReasoningDelta, ToolCallDelta

Key = tuple[str, str]


class ReplayRecord:
    """ttl_s: how long a thought is kept; max_chars: of all thoughts, the oldest go first."""

    def __init__(
        self, ttl_s: float = 3600.0, max_chars: int = 1 << 24, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_s, self._max_chars, self._clock = ttl_s, max_chars, clock
        self._kept: OrderedDict[Key, tuple[float, str]] = OrderedDict()
        self._chars = 0

    def remember(self, user: str, call_id: str, thought: str) -> None:
        self._drop((user, call_id))
        self._kept[user, call_id] = self._clock() + self._ttl_s, thought
        self._chars += len(thought)
        while self._chars > self._max_chars or (self._kept and self._first_expiry() < self._clock()):
            self._drop(next(iter(self._kept)))

    def recall(self, user: str, call_id: str) -> str | None:
        expiry, thought = self._kept.get((user, call_id), (0.0, None))
        return thought if thought is not None and expiry >= self._clock() else None

    def restore(self, user: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with thoughts put back where an answer called tools and came without one."""
        restored = []
        for message in messages:
            copy = dict(message)
            if copy.get("tool_calls") and not copy.get("reasoning_content"):
                thoughts = (self.recall(user, call["id"]) for call in copy["tool_calls"] if call.get("id"))
                thought = next((t for t in thoughts if t), None)
                if thought:
                    copy["reasoning_content"] = thought
            restored.append(copy)
        return restored

    async def watch(self, user: str, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events; a thought that ends in calls is remembered."""
        thoughts: dict[int, list[str]] = {}
        calls: dict[int, list[str]] = {}
        async with aclosing(events):
            async for event in events:
                if isinstance(event, ReasoningDelta):
                    thoughts.setdefault(event.choice, []).append(event.text)
                elif isinstance(event, ToolCallDelta) and event.id is not None:
                    calls.setdefault(event.choice, []).append(event.id)
                elif isinstance(event, Finish) and event.choice in thoughts:
                    thought = "".join(thoughts[event.choice])
                    for call_id in calls.get(event.choice, ()):
                        self.remember(user, call_id, thought)
                yield event

    def _first_expiry(self) -> float:
        return next(iter(self._kept.values()))[0]

    def _drop(self, key: Key) -> None:
        _, thought = self._kept.pop(key, (0.0, ""))
        self._chars -= len(thought)
