"""Search as the server has it: one provider, one fetcher, and the routes that give both to programs.

`POST /tools/search` and `POST /tools/fetch` have the shape of DeepSeek's API (since October 2026), `POST /search` is the
first by a shorter name. What a page says is told without control tokens and invisible characters: it is about to be put
before a model. `rerank_score` and `authority` are null: there is nothing here that would know them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from rorqual.errors import BackendUnavailable, DataError, NotFound, RequestError, RorqualError, UpstreamError
from rorqual.net import SafeFetcher
from rorqual.search.api import Provider, Result
from rorqual.search.extract import Document, extract
from rorqual.search.neutral import neutral, neutral_line
from rorqual.serve.schemas import Body

MAX_QUERY = 128
PAGE_CHARS = 100_000
SUMMARY_CHARS = 800
PAGES = 10
EXTRACT_S = 15.0


@dataclass(frozen=True, slots=True)
class Searcher:
    """Where is searched, and what fetches the pages that are found."""

    provider: Provider
    fetcher: SafeFetcher

    @property
    def local(self) -> bool:
        """Whether the provider is this machine's own index."""
        return self.provider.name == "local"


class SearchRequest(Body):
    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY)]
    count: Annotated[int | None, Field(ge=1, le=50)] = None
    limit: Annotated[int | None, Field(ge=1, le=50)] = None
    need_content: bool = False


class FetchRequest(Body):
    url: Annotated[str, Field(min_length=1, max_length=8192)]


def routes(searcher: Searcher | None) -> APIRouter:
    router = APIRouter()

    def there_is() -> Searcher:
        if searcher is None:
            raise NotFound("this server has no search", remedy="start it with --search")
        return searcher

    @router.post("/search")
    @router.post("/tools/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        found = there_is()
        try:
            results = await found.provider.search(body.query, body.count or body.limit or 10)
        except BackendUnavailable as error:
            raise UpstreamError(str(error)) from error
        contents = [result.content for result in results]
        if body.need_content:
            texts = (_content(result, found.fetcher) for result in results[:PAGES])
            contents[:PAGES] = await asyncio.gather(*texts)
        return {"results": [_hit(r, c, body.need_content) for r, c in zip(results, contents, strict=True)]}

    @router.post("/tools/fetch")
    async def fetch(body: FetchRequest) -> dict[str, Any]:
        try:
            document = await _read(body.url, there_is().fetcher)
        except (DataError, TimeoutError) as error:
            raise RequestError(str(error) or "the page took too long to read", param="url") from error
        return {"title": neutral_line(document.title), "content": neutral(document.text, PAGE_CHARS)}

    return router


async def _read(url: str, fetcher: SafeFetcher) -> Document:
    """Raises FetchError for an address that is not fetched, DataError for a page without text."""
    page = await fetcher.fetch(url)
    async with asyncio.timeout(EXTRACT_S):
        return await asyncio.to_thread(extract, page.body, page.type, page.charset, page.url)


async def _content(result: Result, fetcher: SafeFetcher) -> str:
    if result.content:
        return result.content
    try:
        return (await _read(result.url, fetcher)).text
    except (RorqualError, TimeoutError):  # a page that cannot be read is no error of the search
        return ""


def _hit(result: Result, content: str, whole: bool) -> dict[str, Any]:
    text = neutral(content, PAGE_CHARS) if content else ""
    return {
        "title": neutral_line(result.title), "url": result.url, "snippet": neutral_line(result.snippet),
        "summary": neutral(text, SUMMARY_CHARS) if text else neutral_line(result.snippet),
        "content": text if whole else "", "rerank_score": None, "authority": None, "date": result.date or None,
    }  # fmt: skip
