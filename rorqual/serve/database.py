"""The server's database: one SQLite file in the data directory, or whatever a SQLAlchemy URL names.

A table belongs to the module that reads and writes it and is declared on the metadata here. SQLAlchemy because the same
statements run on PostgreSQL, where several servers share accounts; its Core without the ORM, because what is kept are
rows, not objects with a life of their own.

The tables are made and changed by Alembic, from the scripts in `migrations/`, whenever a database of an older version is
opened: in one transaction, so that a kill in the middle changes nothing. A new table or column needs a script there and
its number in `HEAD`; a test compares the metadata with what the scripts make. Alembic itself is imported only where
there is something to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from rorqual.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")
FILE = "rorqual.sqlite3"
METADATA = MetaData()
HEAD = "0002"
BUSY_MS = 5000
MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 7_201_865  # any number, the same for everyone who migrates a PostgreSQL database


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
    """The database with all tables, made or brought up to date. Raises ConfigError where it cannot be opened, or was made
    by a newer version."""
    path = sqlite_file(url)
    try:
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        engine = create_engine(url, pool_pre_ping=path is None)
        if path is not None:
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        migrate(engine)
    except (SQLAlchemyError, ModuleNotFoundError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError | NoSuchModuleError)
        remedy = "install its driver, for example rorqual[postgres]" if missing else "is the address right?"
        raise ConfigError(f"the database {safe(url)} cannot be opened: {error}", remedy=remedy) from error
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that will write. On SQLite it takes the write lock at once: one that begins by reading and finds
    somebody else's change when it writes fails without waiting."""
    with engine.connect().execution_options(rorqual_writes=True) as connection, connection.begin():
        yield connection


def twice(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A transaction that looks whether something is there before it makes it. Where another made it in between (PostgreSQL
    lets both begin), it is there when one looks again."""
    try:
        return call(*args, **kwargs)
    except IntegrityError:
        return call(*args, **kwargs)


def migrate(engine: Engine) -> None:
    """Bring the tables to this version. Raises ConfigError for a database of a newer one."""
    with engine.connect() as connection:
        if _version(connection) == HEAD:
            return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":  # SQLite's write lock does the same
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            where = safe(engine.url.render_as_string(hide_password=False))
            raise ConfigError(
                f"the database {where} was made by a newer rorqual: {error}", remedy="install that version, or newer"
            ) from error


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def safe(url: str) -> str:
    """The URL without its password, for messages."""
    return make_url(url).render_as_string(hide_password=True)


def _set_up_sqlite(connection: Any, record: object) -> None:
    """Readers do not wait for the writer, writers wait for each other instead of failing, references are checked.
    Transactions begin where SQLAlchemy says so: by itself the driver begins none for a CREATE TABLE."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_MS}", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("rorqual_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
