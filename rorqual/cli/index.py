"""`rorqual index`: the local search index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rorqual.search.index import LocalIndex

app = typer.Typer(help="The local search index: what answers offline.", no_args_is_help=True)

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Where the index lies, as index.sqlite; default: ~/.local/share/rorqual.",
        envvar="RORQUAL_DATA_DIR",
        show_envvar=True,
        metavar="DIR",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


@app.callback()
def index() -> None:
    """The local search index: what answers offline."""


@app.command()
def add(
    places: Annotated[list[str], typer.Argument(help="Folders, files or http(s) addresses.", metavar="DIR|URL…")],
    data_dir: DataDir = None,
) -> None:
    """Add folders of text, Markdown and HTML (also .gz and .xz), single files, or pages of the web.

    Repeat it to bring the index up to date: what has not changed is skipped, what is gone is taken out. Interrupted, it goes
    on where it stopped. Pages are fetched from the public internet only.

    Examples:

        rorqual index add ~/notes /usr/share/doc/git

        rorqual index add https://docs.python.org/3/library/sqlite3.html
    """
    import asyncio
    import logging

    from rorqual.cli.progress import item_bar
    from rorqual.search import gather

    logging.getLogger("trafilatura").setLevel(
        logging.CRITICAL
    )  # pages without an article are counted, not told one by one
    store = open_index(data_dir)
    for place in places:
        if re.match(r"[a-z][a-z0-9+.-]+://", place, re.IGNORECASE):
            from rorqual.net import SafeFetcher

            report = asyncio.run(gather.add_page(store, place, SafeFetcher()))
        elif place == gather.OWN:
            report = gather.add_own(store, again=True)
        else:
            with item_bar("indexing", "files") as progress:
                report = gather.add_folder(store, Path(place).expanduser(), progress)
        typer.echo(
            f"{place}: {report.added:,} added, {report.updated:,} updated, {report.unchanged:,} unchanged, "
            f"{report.removed:,} gone, {report.unreadable:,} without readable text"
        )


@app.command("list")
def list_(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """What was added, and whether it was gone through to the end.

    Example:

        rorqual index list
    """
    import dataclasses
    import json

    for entry in open_index(data_dir).entries():
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(entry), ensure_ascii=False))
        else:
            state = f"{entry.finished} UTC" if entry.finished else "interrupted: add it again to go on"
            typer.echo(f"{entry.place}  {entry.documents:,} documents, {entry.passages:,} passages  ({state})")


@app.command()
def remove(
    places: Annotated[list[str], typer.Argument(help="As `rorqual index list` shows them.", metavar="PLACE…")],
    data_dir: DataDir = None,
) -> None:
    """Take what was added out again. The files themselves are not touched.

    Example:

        rorqual index remove ~/notes rorqual-docs
    """
    from rorqual.errors import NotFound

    store = open_index(data_dir)
    for place in places:
        if not store.remove(place) and not store.remove(str(Path(place).expanduser().resolve())):
            raise NotFound(f"{place} is not in the index", remedy="`rorqual index list` shows what is")
        typer.echo(f"removed {place}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="Words; passages that have more of the rarer ones come first.")],
    count: Annotated[int, typer.Option(help="Passages to show.", min=1, max=100)] = 5,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show the passages that answer a query best.

    Examples:

        rorqual index search "speculation drafts"

        rorqual index search krill --count 20 --json | jq .place
    """
    import dataclasses
    import json

    hits = open_index(data_dir).search(query, count)
    if not hits:
        typer.echo("nothing found", err=True)
        raise typer.Exit(1)
    for hit in hits:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(hit), ensure_ascii=False))
        else:
            typer.secho(f"{hit.title or hit.place}" + (f" · {hit.heading}" if hit.heading else ""), bold=True)
            typer.echo(f"{hit.place}\n{hit.text}\n")


def open_index(data_dir: Path | None) -> LocalIndex:
    """The index with this project's documentation up to date in it."""
    import os

    from rorqual.search.gather import add_own
    from rorqual.search.index import LocalIndex

    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "rorqual"
    store = LocalIndex((data_dir.expanduser() if data_dir else home) / "index.sqlite")
    add_own(store)
    return store
