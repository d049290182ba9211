"""The database made, brought up to date and refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from rorqual.errors import ConfigError
from rorqual.serve.chats import tables
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.database import HEAD, METADATA, MIGRATIONS, connect, database_url
from rorqual.serve.keys import TABLE, KeyStore, Limits


def test_the_scripts_make_what_the_code_expects(tmp_path: Path) -> None:
    assert tables.CHATS.metadata is METADATA
    engine = connect(database_url(tmp_path))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), METADATA)
        assert [d for d in differences if "chat_words" not in repr(d)] == []
        assert "chat_words" in inspect(connection).get_table_names()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_a_database_older_than_the_migrations_keeps_its_keys(tmp_path: Path) -> None:
    """As the first version made it: the table of keys, and no version."""
    url = database_url(tmp_path)
    TABLE.create(create_engine(url))
    with sqlite3.connect(tmp_path / "rorqual.sqlite3") as raw:
        raw.execute(
            "INSERT INTO api_keys (id, name, hint, digest, created, concurrency) "
            "VALUES ('key_1', 'old', 'sk-rq-…', x'00', '2026-01-01 00:00:00', 3)"
        )
    [key] = KeyStore(url).list()
    assert (key.id, key.name, key.limits.concurrency) == ("key_1", "old", 3)
    assert ChatStore(url).recent("local")["chats"] == []
    assert [k.id for k in KeyStore(url).list()] == ["key_1"]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    url = database_url(tmp_path)
    with sqlite3.connect(tmp_path / "rorqual.sqlite3") as raw:
        raw.execute("CREATE TABLE chat_files (other INTEGER)")  # somebody else's: the second script stumbles over it
    with pytest.raises(ConfigError, match="cannot be opened"):
        connect(url)
    with sqlite3.connect(tmp_path / "rorqual.sqlite3") as raw:
        assert raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("chat_files",)]
        raw.execute("DROP TABLE chat_files")
    connect(url)


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    url = database_url(tmp_path)
    connect(url)
    with sqlite3.connect(tmp_path / "rorqual.sqlite3") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigError, match="newer rorqual"):
        connect(url)


def test_many_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from rorqual.serve.keys import KeyStore, Limits; "
        "print(KeyStore(sys.argv[1]).create('k', Limits())[0].id)"
    )
    command = [sys.executable, "-c", code, database_url(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    ids = {child.communicate(timeout=60)[0].strip() for child in children}
    assert {key.id for key in KeyStore(database_url(tmp_path)).list()} == ids and len(ids) == 3
    KeyStore(database_url(tmp_path)).create("more", Limits())
