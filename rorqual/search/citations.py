"""`[citation:3]` in a stream of text becomes an event, wherever the chunks are cut.

Text is passed on as soon as it cannot be the beginning of a marker; at most MAX_HELD characters ever wait. Models also write
`[citation:1,2]`, `[citation: 1]` and a full-width colon; all are read. A marker that is never finished was text.
"""

from __future__ import annotations

import re

from rorqual.search.api import Citation, Text

MAX_HELD = 64
_MARKER = re.compile(r"\[citation[:：]\s{0,3}(\d{1,4}(?:\s{0,3}[,，、]\s{0,3}\d{1,4}){0,7})\s{0,3}\]", re.IGNORECASE)
_OPENING = "[citation"
_BEGUN = re.compile(r"\[citation[:：][\d\s,，、]*", re.IGNORECASE)


class CitationParser:
    """`sources`: how many there are; numbers beyond are reported as not known."""

    def __init__(self, sources: int) -> None:
        self._sources = sources
        self._held = ""

    def feed(self, text: str) -> list[Text | Citation]:
        """What is certain after these characters."""
        held = self._held + text
        keep = _possible_marker(held)
        self._held = held[keep:]
        return self._events(held[:keep])

    def finish(self) -> list[Text | Citation]:
        """What was still waiting."""
        held, self._held = self._held, ""
        return self._events(held)

    def _events(self, text: str) -> list[Text | Citation]:
        events: list[Text | Citation] = []
        at = 0
        for marker in _MARKER.finditer(text):
            if marker.start() > at:
                events.append(Text(text[at : marker.start()]))
            for number in map(int, re.findall(r"\d+", marker[1])):
                events.append(Citation(number, 1 <= number <= self._sources))
            at = marker.end()
        if at < len(text):
            events.append(Text(text[at:]))
        return events


def markers(text: str) -> list[tuple[int, int]]:
    """Where the markers of a whole text stand."""
    return [marker.span() for marker in _MARKER.finditer(text)]


def without_markers(text: str) -> str:
    """An answer as a later turn should see it: its numbers mean nothing there."""
    return _MARKER.sub("", text)


def _possible_marker(text: str) -> int:
    """Where a marker begins that later characters may finish; the length of the text if there is none."""
    at = text.rfind("[")
    tail = text[at:] if at >= 0 else ""
    if not tail or len(tail) > MAX_HELD:
        return len(text)
    return at if _OPENING.startswith(tail.lower()) or _BEGUN.fullmatch(tail) else len(text)
