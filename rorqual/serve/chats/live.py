"""A running answer, and whoever listens to it.

The answer grows whether or not anybody listens. A listener keeps its place in it and is woken when there is more: what it
then gets is everything since its place, so that a slow one gets larger pieces and never a queue. One that comes late, or
again after its connection was lost, first gets the whole message as it stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from rorqual.serve.chats.shapes import Message

PACE_S = 0.02  # what comes in between goes out together: fifty times a second is more than an eye sees
Frame = tuple[int, dict[str, Any]]
"""(position, data) of one event."""


class Growing:
    """A text that is added to often and read as a whole now and then."""

    def __init__(self, text: str = "") -> None:
        self._pieces: list[str] = []
        self._whole, self._upto = text, 0

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, text: str) -> None:
        self._pieces.append(text)

    def whole(self) -> str:
        if self._upto < len(self._pieces):
            self._whole += "".join(self._pieces[self._upto :])
            self._upto = len(self._pieces)
        return self._whole

    def since(self, place: int) -> str:
        return "".join(self._pieces[place:])


@dataclass(slots=True)
class _Place:
    thinking: int
    content: int
    search: int
    usage: int
    checks: int


class Live:
    """`message` is up to date after `settle`. Everything here runs in one event loop."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.ended = False
        self.thinking, self.content = Growing(message.thinking or ""), Growing(message.content)
        self.phase = "done"
        self.position = 0
        self._versions = {"search": 0, "usage": 0, "checks": 0}
        self._changed = asyncio.Event()
        self._thinks_since: float | None = None

    def think(self, text: str) -> None:
        """More of the thought: one token, for all that is known."""
        if self._thinks_since is None:
            self._thinks_since = time.monotonic()
        self.message.thinking_tokens = (self.message.thinking_tokens or 0) + 1
        self.thinking.add(text)
        self._wake()

    def say(self, text: str) -> None:
        self.stop_clock()
        self.content.add(text)
        self._wake()

    def stop_clock(self) -> None:
        """The thought is over, or pauses."""
        if self._thinks_since is not None:
            self.message.thinking_s = (self.message.thinking_s or 0.0) + time.monotonic() - self._thinks_since
            self._thinks_since = None

    def tell(self, what: str, phase: str = "done") -> None:
        """`search`, `usage` or `checks` of the message is news."""
        self.phase = phase if what == "search" else self.phase
        self._versions[what] += 1
        self._wake()

    def end(self) -> None:
        self.settle()
        self.ended = True
        self._wake()

    def settle(self) -> Message:
        """The message with all text in it."""
        since, self._thinks_since = self._thinks_since, None
        if since is not None:  # read the clock without stopping it
            now = time.monotonic()
            self.message.thinking_s = (self.message.thinking_s or 0.0) + now - since
            self._thinks_since = None if self.ended else now
        self.message.thinking = self.thinking.whole() or None
        self.message.content = self.content.whole()
        return self.message

    def snapshot(self) -> Message:
        """The message as it is now, for whoever keeps it: this one goes on changing."""
        return replace(self.settle())

    def _wake(self) -> None:
        self.position += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def frames(self, heartbeat_s: float) -> AsyncGenerator[Frame | None, None]:
        """From now to the end; None where nothing happened for so long."""
        place = self._here()
        yield self.position, {"type": "state", "message": self.settle().json()}
        while True:
            changed = self._changed
            frames = self._since(place)
            for frame in frames:
                yield self.position, frame
            if frames and not self.ended:
                await asyncio.sleep(PACE_S)
            if self._changed is not changed:  # more came while those were sent
                continue
            if self.ended:
                yield self.position, {"type": "end", "message": self.message.json()}
                return
            try:
                async with asyncio.timeout(heartbeat_s):
                    await changed.wait()
            except TimeoutError:
                yield None

    def _here(self) -> _Place:
        v = self._versions
        return _Place(len(self.thinking), len(self.content), v["search"], v["usage"], v["checks"])

    def _since(self, place: _Place) -> list[dict[str, Any]]:
        frames: list[dict[str, Any]] = []
        here = self._here()
        if here.search != place.search:
            frames.append({"type": "search", "search": self.message.search, "phase": self.phase})
        for name, grown, at in (("thinking", self.thinking, place.thinking), ("text", self.content, place.content)):
            if text := grown.since(at):
                frames.append({"type": name, "text": text})
        if here.usage != place.usage:
            frames.append({"type": "usage", "usage": self.message.usage})
        if here.checks != place.checks:
            frames.append({"type": "checks", "checks": self.message.checks})
        place.thinking, place.content = here.thinking, here.content
        place.search, place.usage, place.checks = here.search, here.usage, here.checks
        return frames


async def once(message: Message) -> AsyncGenerator[Frame | None, None]:
    """What is told of an answer that has ended."""
    yield 0, {"type": "state", "message": message.json()}
