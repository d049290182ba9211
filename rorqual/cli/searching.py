"""Where `serve` and `chat` search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rorqual.serve.searching import Searcher

Search = Annotated[
    str,
    typer.Option(
        "--search",
        help="Where the chat's search looks: local (this machine's index, see `rorqual index`), searxng, ddgs, deepseek, "
        "tavily, brave, or none.",
        metavar="NAME",
        envvar="RORQUAL_SEARCH",
        show_envvar=True,
    ),
]
SearchUrl = Annotated[str, typer.Option(help="Address of the SearXNG server, or of another search API.", metavar="URL")]
SearchKey = Annotated[
    str, typer.Option(help="What a search API asks for.", envvar="RORQUAL_SEARCH_KEY", show_envvar=True)
]


def searcher(name: str, url: str, key: str, data_dir: Path | None) -> Searcher | None:
    """None for "none", and with a warning where the index cannot work on this machine. Raises ConfigError for a name that
    there is not, and where an address or a key is missing."""
    if name == "none":
        return None
    import logging

    from rorqual.cli.index import open_index
    from rorqual.errors import BackendUnavailable
    from rorqual.net import SafeFetcher, ServiceClient
    from rorqual.search.api import Provider
    from rorqual.search.index import LocalProvider
    from rorqual.search.providers import make_provider
    from rorqual.serve.searching import Searcher

    provider: Provider
    if name == "local":
        try:
            provider = LocalProvider(open_index(data_dir))
        except BackendUnavailable as error:  # a SQLite without FTS5 is no reason not to serve
            logging.getLogger(__name__).warning("there is no search: %s", error)
            return None
    else:
        provider = make_provider(name, ServiceClient(), url=url, key=key)
    return Searcher(provider, SafeFetcher())
