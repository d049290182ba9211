"""The server's database: one SQLite file in the data directory, or whatever a SQLAlchemy URL names.

A table belongs to the module that reads and writes it (`keys` has the first) and is declared on the metadata
here, so that one call makes whatever is missing. SQLAlchemy because the same statements run on PostgreSQL,
where several servers share accounts; its Core without the ORM, because what is kept are rows, not objects with
a life of their own.

Left out: migrations. Tables are only ever added so far; the first changed column brings them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from rorqual.errors import ConfigError

FILE = "rorqual.sqlite3"
METADATA = MetaData()


def database_url(data_dir: Path) -> str:
    """The default database of a data directory."""
    return URL.create("sqlite", database=str(data_dir / FILE)).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """The file behind the URL, or None where the database is not SQLite. Raises ConfigError for what is no URL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"{url!r} is no database URL", remedy="write postgresql+psycopg://user:password@host/name, for example"
        ) from error
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def connect(url: str) -> Engine:
    """The database with all tables, made where they are missing. Raises ConfigError where it cannot be opened."""
    path = sqlite_file(url)
    try:
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        engine = create_engine(url, pool_pre_ping=path is None)
        if path is not None:
            event.listen(engine, "connect", _set_up_sqlite)
        METADATA.create_all(engine)
    except (SQLAlchemyError, ModuleNotFoundError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError | NoSuchModuleError)
        remedy = "install its driver, for example rorqual[postgres]" if missing else "is the address right?"
        raise ConfigError(f"the database {safe(url)} cannot be opened: {error}", remedy=remedy) from error
    return engine


def safe(url: str) -> str:
    """The URL without its password, for messages."""
    return make_url(url).render_as_string(hide_password=True)


def _set_up_sqlite(connection: Any, record: object) -> None:
    """Readers do not wait for the writer, writers wait for each other instead of failing, references are checked."""
    for pragma in ("journal_mode=WAL", "busy_timeout=5000", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
