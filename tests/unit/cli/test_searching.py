"""`--search` of `serve` and `chat`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rorqual.cli.searching import searcher
from rorqual.errors import ConfigError


def test_the_local_index_knows_this_projects_documentation_out_of_the_box(tmp_path: Path) -> None:
    found = searcher("local", "", "", tmp_path)
    assert found is not None and found.local
    [result, *_] = asyncio.run(found.provider.search("sandbox drafts speculation", 3))
    assert result.content and (tmp_path / "index.sqlite").is_file()


@pytest.mark.parametrize(
    ("name", "url", "key", "says"),
    [("searxng", "", "", "address"), ("tavily", "", "", "key"), ("altavista", "", "", "known are")],
)
def test_what_is_missing_is_said(tmp_path: Path, name: str, url: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        searcher(name, url, key, tmp_path)


def test_others(tmp_path: Path) -> None:
    assert searcher("none", "", "", tmp_path) is None
    web = searcher("searxng", "http://127.0.0.1:1", "", tmp_path)
    assert web is not None and not web.local and web.provider.name == "searxng"
    assert not (tmp_path / "index.sqlite").exists()
