"""Stop strings over streamed text.

A stop string may be spread over tokens, so text that could be the beginning of one is held back until it is
decided. The text ends where a stop string is first *complete*; if several are complete at that character, the
one that began first is cut off whole. Stated by character, this does not depend on how the text was cut into
pieces. Each stop string keeps its Knuth-Morris-Pratt state: the work per character is constant, however long
or repetitive the strings a client sends.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Feeds text through; `matched` is the stop string that ended it, or None."""

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._patterns = [(s, _failures(s)) for s in dict.fromkeys(stop) if s]
        self._states = [0] * len(self._patterns)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string is complete). After that, nothing is returned any
        more."""
        if self.matched is not None:
            return "", True
        if not self._patterns:
            return text, False
        pending = self._held + text
        for i, char in enumerate(text):
            found = self._step(char)
            if found:
                self.matched = found
                end = len(self._held) + i + 1
                self._held = ""
                return pending[: end - len(found)], True
        safe = len(pending) - max(self._states)
        self._held = pending[safe:]
        return pending[:safe], False

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._patterns)
        return held

    def _step(self, char: str) -> str:
        """Advances every pattern by one character; the longest that is now complete, or nothing."""
        found = ""
        for p, (pattern, failures) in enumerate(self._patterns):
            state = self._states[p]
            while state and pattern[state] != char:
                state = failures[state - 1]
            state += pattern[state] == char
            self._states[p] = state
            if state == len(pattern) and state > len(found):
                found = pattern
        return found


def _failures(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    failures, k = [0] * len(pattern), 0
    for i in range(1, len(pattern)):
        while k and pattern[i] != pattern[k]:
            k = failures[k - 1]
        k += pattern[i] == pattern[k]
        failures[i] = k
    return failures
