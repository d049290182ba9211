"""An answer on the terminal as it comes: the thought dim, the text as Markdown, block by block.

A block that is complete is printed for good; the one that grows is drawn again and again below it. Where the output is no
terminal the text goes out as it is. What a model or a page says can hold escape sequences, with which a terminal can be made
to do things: all control characters are taken out first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import SegmentLines

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ITEM = re.compile(r"(?:[-+*]|\d{1,9}[.)]?)(?:\s|$)")  # or what may become one
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return _CONTROLS.sub("", text)


def finished(text: str) -> int:
    """How much of a growing Markdown text is in blocks that cannot change any more: up to a line at the margin that follows
    a blank one and begins something new, which an item of a list does not, and nothing within code."""
    at = end = 0
    fence, blank = "", False
    for line in text.splitlines(keepends=True):
        if blank and not fence and line.strip() and not line[0].isspace() and not _ITEM.match(line):
            end = at
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and fence and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        blank = not line.strip()
        at += len(line)
    return end


def cited(text: str) -> str:
    """Citations as people write them."""
    from rorqual.search.citations import markers

    out, at = "", 0
    for start, end in markers(text):
        out += text[at:start] + "".join(f"[{n}]" for n in re.findall(r"\d+", text[start:end]))
        at = end
    return out + text[at:]


class Painter:
    """One answer. Every method may be called at any time; `close` ends what is drawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pretty = console.is_terminal
        self._waiting = ""  # the block that grows
        self._thinks = False
        self._live: Live | None = None

    def say(self, line: str) -> None:
        """A line of the program's own."""
        self.close()
        self._console.print(harmless(line), style="dim", markup=False)

    def thinking(self, text: str) -> None:
        if not self._thinks:
            self._thinks = True
            self._console.print("thinking … (Ctrl-C: answer now)" if self._pretty else "thinking …", style="dim")
        self._console.print(harmless(text), style="dim italic", end="", markup=False, soft_wrap=True)

    def text(self, text: str) -> None:
        if self._thinks:
            self._thinks = False
            self._console.print("\n")
        if not self._pretty:
            self._console.print(harmless(text), end="", markup=False, soft_wrap=True)
            return
        self._waiting += harmless(text)
        if at := finished(self._waiting):
            self._stop()
            self._print(self._waiting[:at])
            self._console.print()
            self._waiting = self._waiting[at:]
        if self._waiting.strip():
            self._draw()

    def close(self) -> None:
        """Print what is left."""
        self._stop()
        if self._thinks or (not self._pretty and self._waiting):
            self._console.print()
        elif self._waiting.strip():
            self._print(self._waiting)
        self._thinks, self._waiting = False, ""

    def _print(self, block: str) -> None:
        """For good, without the blank lines that rich puts around some blocks."""
        lines = self._console.render_lines(Markdown(cited(block)), pad=False)
        while lines and not "".join(part.text for part in lines[0]).strip():
            lines.pop(0)
        while lines and not "".join(part.text for part in lines[-1]).strip():
            lines.pop()
        self._console.print(SegmentLines(lines, new_lines=True), end="")

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=12, auto_refresh=True)
            self._live.start()
        self._live.update(Markdown(cited(self._waiting)))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def sources(message: Mapping[str, Any]) -> list[str]:
    """A line for each source, with what the check of its sentences said."""
    lines = []
    for source in (message["search"] or {}).get("sources", ()):
        checks = [c for c in message["checks"] or () if source["n"] in c["citations"]]
        missed = sum(not c["found"] for c in checks)
        verdict = ""
        if checks:
            verdict = f" · {missed} of {len(checks)} sentences not found in it" if missed else " · its words are in it"
        lines.append(f"[{source['n']}] {source['title']} · {source['url']}{verdict}")
    return lines


def footer(message: Mapping[str, Any]) -> str:
    """One line: how it ended, and what it took."""
    parts = []
    if message["thinking"]:
        parts.append(f"thought for {message['thinking_s'] or 0:.1f} s ({message['thinking_tokens'] or 0} tokens)")
    if usage := message["usage"]:
        parts.append(f"{usage['completion_tokens']} tokens")
        if usage["tokens_per_s"]:
            parts.append(f"{usage['tokens_per_s']:.0f} tokens/s")
        if usage["cached_tokens"]:
            parts.append(f"{usage['cached_tokens']} of {usage['prompt_tokens']} prompt tokens from the cache")
    ends = {"length": "cut at the limit: /continue goes on", "cut": "cut: /continue goes on",
            "stopped": "stopped: /continue goes on"}  # fmt: skip
    if message["status"] in ends:
        parts.append(ends[message["status"]])
    if message["error"]:
        parts.append(f"{message['error']['message']} /retry tries again")
    return ", ".join(parts)
