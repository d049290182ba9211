"""Search providers: each turns a query into results of one shape.

Local ones need nothing (`local`) or a server of one's own (`searxng`); `ddgs` scrapes public engines without a key
and is soon told to slow down; `deepseek`, `tavily` and `brave` are APIs with a key. Services are asked through
`net.ServiceClient`, because their addresses come from the operator. The addresses they answer with come from
strangers: pages are fetched by `SafeFetcher` only. `ddgs` brings its own HTTP client and talks to the engines it
knows, none of them named by people or models; it is imported when it is used, and it reads DDGS_PROXY, as its own
documentation says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from rorqual.errors import BackendUnavailable, ConfigError
from rorqual.search.api import Provider, Result

MAX_QUERY = 128
"""DeepSeek's limit for a query, in characters."""


class Client(Protocol):
    """What providers need of `net.ServiceClient`."""

    async def json(
        self, method: str, url: str, *, params: Any = None, body: object = None, headers: Any = None
    ) -> Any: ...


class SearXNG:
    """A SearXNG server. Its `search.formats` setting must list json, which it does not by default."""

    name = "searxng"

    def __init__(self, url: str, client: Client) -> None:
        self._url, self._client = url.rstrip("/"), client

    async def search(self, query: str, count: int) -> list[Result]:
        try:
            answer = await self._client.json("GET", f"{self._url}/search", params={"q": query, "format": "json"})
        except BackendUnavailable as error:
            if " 403" in str(error):
                error.remedy = "allow JSON in SearXNG's settings.yml: search: formats: [html, json]"
            raise
        return _results(answer, "results", count, snippet="content", date="publishedDate")


class DeepSeekSearch:
    """DeepSeek's search API, or any server of that shape. Pages come with the results."""

    name = "deepseek"

    def __init__(self, key: str, client: Client, url: str = "https://api.deepseek.com") -> None:
        self._key, self._url, self._client = key, url.rstrip("/").removesuffix("/v1"), client

    async def search(self, query: str, count: int) -> list[Result]:
        body = {"query": query[:MAX_QUERY], "count": min(50, count), "need_content": True}
        headers = {"Authorization": f"Bearer {self._key}"}
        answer = await self._client.json("POST", f"{self._url}/v1/tools/search", body=body, headers=headers)
        return _results(answer, "results", count, snippet="snippet", content="content", date="date")


class Tavily:
    name = "tavily"

    def __init__(self, key: str, client: Client, url: str = "https://api.tavily.com") -> None:
        self._key, self._url, self._client = key, url.rstrip("/"), client

    async def search(self, query: str, count: int) -> list[Result]:
        body = {"query": query, "max_results": min(20, count), "include_raw_content": "markdown"}
        headers = {"Authorization": f"Bearer {self._key}"}
        answer = await self._client.json("POST", f"{self._url}/search", body=body, headers=headers)
        return _results(answer, "results", count, snippet="content", content="raw_content", date="published_date")


class Brave:
    name = "brave"

    def __init__(self, key: str, client: Client, url: str = "https://api.search.brave.com") -> None:
        self._key, self._url, self._client = key, url.rstrip("/"), client

    async def search(self, query: str, count: int) -> list[Result]:
        answer = await self._client.json(
            "GET",
            f"{self._url}/res/v1/web/search",
            params={"q": query, "count": min(20, count)},
            headers={"X-Subscription-Token": self._key, "Accept": "application/json"},
        )
        web = answer.get("web") if isinstance(answer, dict) else None
        return _results(web or {"results": []}, "results", count, snippet="description", date="page_age")


class Ddgs:
    """Public engines through the ddgs package, in a thread. `text` is its search, for tests."""

    name = "ddgs"

    def __init__(self, text: Callable[..., list[dict[str, Any]]] | None = None, timeout_s: float = 15.0) -> None:
        self._text, self._timeout_s = text or _ddgs_text, timeout_s

    async def search(self, query: str, count: int) -> list[Result]:
        try:
            async with asyncio.timeout(self._timeout_s):
                rows = await asyncio.to_thread(self._text, query, max_results=count)
        except TimeoutError:
            raise BackendUnavailable(f"ddgs took longer than {self._timeout_s:g} s") from None
        except BackendUnavailable:
            raise
        except Exception as error:  # the package raises its own kind for "no results", bare ones for what engines do
            raise BackendUnavailable(
                f"ddgs found nothing: {error}", remedy="engines limit scrapers; a SearXNG server or a key is steadier"
            ) from error
        return _results({"results": rows}, "results", count, url="href", snippet="body")


def _ddgs_text(query: str, *, max_results: int) -> list[dict[str, Any]]:
    try:
        from ddgs import DDGS
    except ImportError as error:
        raise BackendUnavailable("this provider needs ddgs", remedy='pip install "rorqual[search]"') from error
    return list(DDGS(timeout=10).text(query, max_results=max_results))


def make_provider(name: str, client: Client, *, url: str = "", key: str = "") -> Provider:
    """A provider by name, for those that are asked over the network. Raises ConfigError for an unknown name, and where
    the address or the key is missing."""
    if name == "ddgs":
        return Ddgs()
    if name == "searxng":
        if not url:
            raise ConfigError("searxng needs the address of a server", remedy="for instance http://127.0.0.1:8888")
        return SearXNG(url, client)
    keyed: dict[str, Callable[..., Provider]] = {"deepseek": DeepSeekSearch, "tavily": Tavily, "brave": Brave}
    if name not in keyed:
        known = ", ".join(sorted((*keyed, "ddgs", "searxng", "local")))
        raise ConfigError(f"there is no search provider called {name!r}", remedy=f"known are {known}")
    if not key:
        raise ConfigError(f"{name} needs an API key")
    return keyed[name](key, client, **({"url": url} if url else {}))


def _results(answer: Any, field: str, count: int, **names: str) -> list[Result]:
    """Rows of somebody's JSON as results. Rows without an http address and repeated ones are left out, other types than
    text count as nothing; an answer of another shape is an error."""
    rows = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise BackendUnavailable(f"the search service's answer has no list {field!r}")
    found: dict[str, Result] = {}
    for row in rows:
        if not isinstance(row, dict):
            continue
        told = {ours: row.get(names.get(ours, ours)) for ours in ("title", "url", "snippet", "content", "date")}
        if "content" not in names:
            del told["content"]
        result = Result(**({"title": "", "url": ""} | {k: v for k, v in told.items() if isinstance(v, str)}))
        if result.url.startswith(("http://", "https://")):
            found.setdefault(result.url, result)
    return list(found.values())[:count]
