"""The words of this room: what a provider finds, what a model is shown, what a turn tells as it goes.

`Result` has the shape of DeepSeek's search API (title, url, snippet, content, date), which every other provider's answer
fits into. A `Source` is what the model is shown under one number: one page with the passages that were chosen from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Message = Mapping[str, str]
"""`{"role": …, "content": …}`, as in the chat API."""

Ask = Callable[[Sequence[Message]], AsyncIterator[str]]
"""The model: messages to pieces of the answer's text, without its thoughts. It is given no tools, on purpose: a page that
asks for one must find none."""


@dataclass(frozen=True, slots=True)
class Result:
    """One hit. `content` is the page's text where the provider already brings it; then nothing is fetched."""

    title: str
    url: str
    snippet: str = ""
    content: str = ""
    date: str = ""


class Provider(Protocol):
    """Where results come from."""

    name: str

    async def search(self, query: str, count: int) -> list[Result]:
        """At most `count` results, best first. Raises RorqualError where the provider cannot answer."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """`number` is the n of `[citation:n]`. `passages` are the very words the model was shown; `partial` says that the page
    could not be read and they are the provider's snippet."""

    number: int
    title: str
    url: str
    passages: tuple[str, ...]
    date: str = ""
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Queries:
    """What is looked for: written by the model, or the user's message. Empty: the model saw no need to search."""

    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A provider or a page that failed; the turn goes on without it."""

    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Sources:
    """All that the answer may cite, before its first word."""

    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of the answer, without citation markers."""

    text: str


@dataclass(frozen=True, slots=True)
class Citation:
    """A citation at this place of the answer. `known` is False for a number that no source has."""

    number: int
    known: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether a cited sentence's words are in the source it names; see `search/check.py`. `overlap` is the share of its
    content words that are there, between 0 and 1."""

    sentence: str
    number: int
    found: bool
    overlap: float
    missing: tuple[str, ...]


Event = Queries | Problem | Sources | Text | Citation | Checked
