"""Where commands that share the server's data find it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Where the server keeps its data; default: ~/.local/share/rorqual.",
        envvar="RORQUAL_DATA_DIR",
        show_envvar=True,
        metavar="DIR",
    ),
]
Database = Annotated[
    str | None,
    typer.Option(
        help="A SQLAlchemy URL (postgresql+psycopg://…) instead of the SQLite file there.",
        envvar="RORQUAL_DATABASE",
        show_envvar=True,
        metavar="URL",
    ),
]


def database(data_dir: Path | None, url: str | None) -> str:
    """The URL that both options come to."""
    import os

    from rorqual.serve.database import database_url

    if url:
        return url
    if data_dir is not None:
        return database_url(data_dir.expanduser())
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return database_url(Path(home) / "rorqual")
