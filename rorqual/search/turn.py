"""A whole search turn: what to look for, where it is, what it says, and an answer whose citations are checked.

    messages -> queries -> provider -> pages -> passages -> prompt -> answer with citations -> checks

The model is a function from messages to text. It is asked at most twice, for queries (if it is to write them) and for
the answer, and given no tools either time: whatever a page says, there is nothing that it could set off. Everything a
page contributes is text between markers that it cannot write (`search/neutral.py`), and text of the answer is never
fetched or followed.

Failures of single pages and queries are told as events and worked around: what remains is shown to the model, a page
that cannot be read with the provider's snippet. Without any result the model answers the question as it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rorqual.errors import RequestError, RorqualError
from rorqual.net import SafeFetcher
from rorqual.search.api import (
    Ask,
    Citation,
    Event,
    Message,
    Problem,
    Provider,
    Queries,
    Result,
    Source,
    Sources,
    Text,
)
from rorqual.search.check import check_all
from rorqual.search.citations import CitationParser
from rorqual.search.extract import Document, extract
from rorqual.search.neutral import neutral, neutral_line
from rorqual.search.passages import rank, split
from rorqual.search.prompt import PASSAGE_LIMIT, parse_queries, query_prompt, search_prompt

EXTRACT_S = 15.0


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Sizes of a turn. `budget_chars` bounds the quoted text of all sources together (a token is some 3.3 English
    characters, 1.7 Chinese ones); `write_queries=False` saves a model call and searches for the user's message."""

    queries: int = 3
    results: int = 8
    pages: int = 6
    passages_per_page: int = 3
    budget_chars: int = 12_000
    write_queries: bool = True


@dataclass(frozen=True, slots=True)
class _Page:
    """A result with its passages, not yet chosen from."""

    result: Result
    title: str
    passages: tuple[str, ...]
    headings: tuple[str, ...]
    date: str
    partial: bool


async def search_turn(
    messages: Sequence[Message],
    ask: Ask,
    provider: Provider,
    fetcher: SafeFetcher,
    *,
    today: str,
    settings: SearchSettings | None = None,
) -> AsyncIterator[Event]:
    """The events of one turn in order: Queries, Problems, Sources, then Text and Citation, then Checked for every cited
    sentence. The last message must be the user's; raises RequestError if it is not, and whatever `ask` raises."""
    settings = settings or SearchSettings()
    sources: tuple[Source, ...] = ()
    async for found in research(messages, ask, provider, fetcher, settings=settings):
        if isinstance(found, Sources):
            sources = found.sources
        yield found
    if sources:
        question = messages[-1]["content"]
        messages = [*messages[:-1], {"role": "user", "content": search_prompt(question, sources, today)}]
    parser = CitationParser(len(sources))
    said: list[Text | Citation] = []
    async for piece in ask(messages):
        for event in parser.feed(piece):
            said.append(event)
            yield event
    for event in parser.finish():
        said.append(event)
        yield event
    for verdict in check_all(said, sources):
        yield verdict


async def research(
    messages: Sequence[Message],
    ask: Ask,
    provider: Provider,
    fetcher: SafeFetcher,
    *,
    settings: SearchSettings | None = None,
) -> AsyncIterator[Queries | Problem | Sources]:
    """The first half of a turn: Queries, then Problems, then Sources. For whoever asks the model for the answer itself.
    Raises as `search_turn` does."""
    settings = settings or SearchSettings()
    if not messages or messages[-1].get("role") != "user" or not messages[-1].get("content", "").strip():
        raise RequestError("a search turn answers the user's last message", param="messages")
    question = messages[-1]["content"]
    queries = await _queries(messages, question, ask, settings)
    yield Queries(queries)
    results, problems = await _search(queries, provider, settings)
    pages, unread = await _read(results, fetcher, settings)
    for problem in (*problems, *unread):
        yield problem
    yield Sources(choose(pages, " ".join((question, *queries)), settings))


async def _queries(messages: Sequence[Message], question: str, ask: Ask, settings: SearchSettings) -> tuple[str, ...]:
    if not settings.write_queries:
        return parse_queries("", question, settings.queries)
    asking = {"role": "user", "content": query_prompt(question, settings.queries)}
    answer = "".join([piece async for piece in ask([*messages[:-1], asking])])
    return parse_queries(answer, question, settings.queries)


async def _search(
    queries: Sequence[str], provider: Provider, settings: SearchSettings
) -> tuple[list[Result], list[Problem]]:
    """All queries at once; their results in turns, the first of each first, no page twice."""
    tried = await asyncio.gather(*(provider.search(q, settings.results) for q in queries), return_exceptions=True)
    found: dict[str, Result] = {}
    problems, lists = [], []
    for query, outcome in zip(queries, tried, strict=True):
        if isinstance(outcome, RorqualError):
            problems.append(Problem(f"{provider.name}: {query}", str(outcome)))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            lists.append(outcome)
    for row in zip_longest(*lists):
        for result in filter(None, row):
            known = found.setdefault(_same(result.url), result)
            if known is not result and result.content and result.content not in known.content:
                # The local index brings, for each query, the passages that match it.
                content = f"{known.content}\n\n{result.content}"
                found[_same(result.url)] = Result(known.title, known.url, known.snippet, content, known.date)
    return list(found.values())[: settings.results], problems


def _same(url: str) -> str:
    return url.partition("#")[0].rstrip("/")


async def _read(
    results: Sequence[Result], fetcher: SafeFetcher, settings: SearchSettings
) -> tuple[list[_Page], list[Problem]]:
    """The pages behind the first results, all at once, in the results' order."""
    read = await asyncio.gather(*(_page(result, fetcher) for result in results[: settings.pages]))
    pages, problems = [], []
    for page, problem in read:
        if page:
            pages.append(page)
        if problem:
            problems.append(problem)
    return pages, problems


async def _page(result: Result, fetcher: SafeFetcher) -> tuple[_Page | None, Problem | None]:
    problem = None
    if result.content.strip():
        document = Document(result.title, result.content, result.date)
    else:
        try:
            fetched = await fetcher.fetch(result.url)
            async with asyncio.timeout(EXTRACT_S):
                document = await asyncio.to_thread(extract, fetched.body, fetched.type, fetched.charset, fetched.url)
        except (RorqualError, TimeoutError) as error:
            problem = Problem(result.url, str(error) or "the page took too long to read")
            document = Document(result.title, result.snippet, result.date)
    passages = split(document.text)
    if not passages:
        return None, problem
    page = _Page(
        result, document.title or result.title, tuple(p.text for p in passages), tuple(p.heading for p in passages),
        document.date or result.date, problem is not None,
    )  # fmt: skip
    return page, problem


def choose(pages: Sequence[_Page], query: str, settings: SearchSettings) -> tuple[Source, ...]:
    """The best passages of all pages within the budget, numbered by page in the order of each page's best one. A page none
    of whose passages share a word with the question (another language, say) comes last, with its beginning."""
    flat = [(p, i) for p, page in enumerate(pages) for i in range(len(page.passages))]
    order = rank([(f"{pages[p].title} {pages[p].headings[i]}", pages[p].passages[i]) for p, i in flat], query)
    ranked = [flat[at] for at in order]
    matched = {p for p, _ in ranked}
    chosen = _within((*ranked, *((p, 0) for p in range(len(pages)) if p not in matched)), pages, settings)
    sources = []
    for number, (p, which) in enumerate(chosen.items(), 1):
        page, url = pages[p], pages[p].result.url
        shown = tuple(neutral(page.passages[i], PASSAGE_LIMIT) for i in sorted(which))
        title = neutral_line(page.title) or url
        sources.append(Source(number, title, url, shown, neutral_line(page.date, 40), page.partial))
    return tuple(sources)


def _within(
    ranked: Iterable[tuple[int, int]], pages: Sequence[_Page], settings: SearchSettings
) -> dict[int, list[int]]:
    """Page to passages, taken in order while there is room."""
    left = settings.budget_chars
    chosen: dict[int, list[int]] = {}
    for p, i in ranked:
        cost = len(pages[p].passages[i]) + (0 if p in chosen else len(pages[p].title) + 80)
        if len(chosen.get(p, ())) < settings.passages_per_page and cost <= left:
            chosen.setdefault(p, []).append(i)
            left -= cost
    return chosen
