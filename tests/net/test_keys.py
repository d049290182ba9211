"""Keys from the database: made by the command line, obeyed by the server, never shown again."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import inspect
from typer.testing import CliRunner

from rorqual.cli.main import app as cli
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.pages import PagePool
from rorqual.errors import ConfigError, NotFound
from rorqual.serve.app import Settings
from rorqual.serve.database import connect, database_url
from rorqual.serve.keys import KeyStore, Limits
from tests.net.harness import Gate, Harness, eventually, running

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(database_url(tmp_path))


@pytest.fixture
def guarded(tokenizer: Tokenizer, tmp_path: Path, store: KeyStore) -> Iterator[tuple[Harness, str]]:
    """A server on the store's database, and the secret of a key without limits."""
    secret = store.create("first", Limits())[1]
    with running(tokenizer, Settings(database_url=database_url(tmp_path))) as server:
        server.script("a word")
        yield server, secret


def status(server: Harness, secret: str | None, path: str = "/models", header: str = "authorization") -> int:
    value = f"Bearer {secret}" if header == "authorization" else str(secret)
    return httpx.get(server.url + path, headers={} if secret is None else {header: value}).status_code


def test_a_secret_is_nowhere_in_the_data_directory(store: KeyStore, tmp_path: Path) -> None:
    key, secret = store.create("laptop", Limits(concurrency=3))
    [listed] = store.list()
    assert listed == key and secret not in repr(listed) and listed.limits.concurrency == 3
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in raw and secret[10:].encode() not in raw and b"laptop" in raw
    assert not (tmp_path / "rorqual.sqlite3").stat().st_mode & 0o077


def test_revoking(store: KeyStore) -> None:
    key, _ = store.create("one", Limits())
    revoked = store.revoke(key.id)
    assert revoked.revoked and store.revoke(key.id) == revoked and store.list() == [revoked]
    with pytest.raises(NotFound, match="keys list"):
        store.revoke("key_none")


def test_limits_that_cannot_be_meant() -> None:
    for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: 0})


def test_databases_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for url in (
        f"sqlite:///{tmp_path}/file/below.db",
        "no url",
        "postgresql+psycopg://u:hidden@127.0.0.1:9/x",
        "a://b",
    ):
        with pytest.raises(ConfigError) as caught:
            connect(url)
        assert "hidden" not in str(caught.value)
    damaged = tmp_path / "rorqual.sqlite3"
    damaged.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="cannot be opened"):
        KeyStore(database_url(tmp_path)).list()


def test_reading_makes_no_file(tmp_path: Path) -> None:
    assert KeyStore(database_url(tmp_path / "absent")).list() == [] and not (tmp_path / "absent").exists()


def test_the_table_is_the_same_through_sqlalchemy_and_sqlite(store: KeyStore, tmp_path: Path) -> None:
    store.create("one", Limits())
    names = {column["name"] for column in inspect(connect(database_url(tmp_path))).get_columns("api_keys")}
    raw = sqlite3.connect(tmp_path / "rorqual.sqlite3")
    assert {row[1] for row in raw.execute("pragma table_info(api_keys)")} == names >= {"digest", "revoked"}


def test_keys_open_what_is_closed(guarded: tuple[Harness, str]) -> None:
    server, secret = guarded
    for path in ("/models", "/v1/models"):
        assert status(server, secret, path) == status(server, secret, path, "x-api-key") == 200
        assert status(server, None, path) == status(server, secret[:-1], path) == 401
    for path in ("/metrics", "/tokenize", "/detokenize", "/v1/responses", "/anthropic/v1/messages"):
        assert status(server, None, path) == 401 and httpx.post(server.url + path, json={}).status_code == 401
    assert status(server, None, "/health") == status(server, None, "/") == 200
    assert server.client(api_key=secret).chat.completions.create(model="tiny", messages=HI).choices[0].message.content


def test_keys_made_and_revoked_while_the_server_runs(tokenizer: Tokenizer, tmp_path: Path, store: KeyStore) -> None:
    with running(tokenizer, Settings(database_url=database_url(tmp_path))) as server:
        assert status(server, None) == 200, "no keys, on loopback: open"
        key, secret = store.create("late", Limits())
        assert eventually(lambda: status(server, None) == 401)
        assert status(server, secret) == 200
        store.revoke(key.id)
        assert eventually(lambda: status(server, secret) == 401)
        assert status(server, None) == 401, "a server whose last key was revoked stays closed"


def test_a_database_that_goes_away_changes_nothing(guarded: tuple[Harness, str], tmp_path: Path) -> None:
    server, secret = guarded
    (tmp_path / "rorqual.sqlite3").write_bytes(b"not a database" * 1000)
    for _ in range(3):
        assert (status(server, secret), status(server, None)) == (200, 401)
        eventually(lambda: False, within_s=0.6)


def test_limits_are_each_keys_own(guarded: tuple[Harness, str], store: KeyStore, gate: Gate) -> None:
    server, unlimited = guarded
    narrow = server.client(api_key=store.create("narrow", Limits(concurrency=1, requests_per_minute=2))[1])
    eventually(lambda: False, within_s=1.1)  # until the server has looked again
    server.script("a word", gate=gate.wait)
    first = threading.Thread(target=lambda: narrow.chat.completions.create(model="tiny", messages=HI))
    first.start()
    assert eventually(lambda: server.engine.live)
    with pytest.raises(openai.RateLimitError) as caught:
        narrow.chat.completions.create(model="tiny", messages=HI, stream=True)
    assert caught.value.code == "concurrency_limit_exceeded" and caught.value.response.headers["retry-after"] == "1"
    gate.open()
    first.join(10)
    assert narrow.models.list().data, "what costs nothing is not counted"
    raw = narrow.chat.completions.with_raw_response.create(model="tiny", messages=HI)
    assert raw.headers["x-ratelimit-limit-requests"] == "2" and raw.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(openai.RateLimitError) as caught:
        narrow.chat.completions.create(model="tiny", messages=HI)
    assert caught.value.code == "rate_limit_exceeded" and 0 < int(caught.value.response.headers["retry-after"]) <= 30
    raw = server.client(api_key=unlimited).chat.completions.with_raw_response.create(model="tiny", messages=HI)
    assert not [name for name in raw.headers if name.startswith("x-ratelimit")]


def test_tokens_are_charged_as_used(guarded: tuple[Harness, str], store: KeyStore) -> None:
    server, _ = guarded
    client = server.client(api_key=store.create("tokens", Limits(tokens_per_minute=5))[1])
    eventually(lambda: False, within_s=1.1)
    reply = client.chat.completions.create(model="tiny", messages=HI)
    assert reply.usage.total_tokens > 6
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="tiny", messages=HI)
    owed = reply.usage.total_tokens - 5
    assert caught.value.code == "rate_limit_exceeded"
    assert float(caught.value.response.headers["retry-after"]) == pytest.approx((owed + 1) * 12, abs=12)


def test_a_client_that_leaves_gives_its_place_back(guarded: tuple[Harness, str], store: KeyStore, gate: Gate) -> None:
    server, _ = guarded
    client = server.client(api_key=store.create("one", Limits(concurrency=1))[1])
    eventually(lambda: False, within_s=1.1)
    server.script("a word that goes on", delay_s=0.01)
    stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
    next(iter(stream))
    stream.close()
    assert eventually(lambda: not server.engine.live)
    assert client.chat.completions.create(model="tiny", messages=HI).choices[0].finish_reason == "stop"


def test_cached_prefixes_are_kept_apart_by_key_and_user(guarded: tuple[Harness, str], store: KeyStore) -> None:
    """On the structure: two requests can share a page exactly where their salts have one root in the page pool."""
    server, first = guarded
    second = store.create("second", Limits())[1]
    eventually(lambda: False, within_s=1.1)
    long = [{"role": "user", "content": "the whale takes in a whole sea " * 30}]

    def cached(secret: str, user: str | None = None) -> int:
        body = {"user_id": user} if user else {}
        reply = server.client(api_key=secret).chat.completions.create(model="tiny", messages=long, extra_body=body)
        return reply.usage.prompt_tokens_details.cached_tokens

    begin = len(server.engine.seen)
    callers = [(first, None), (second, None), (first, "ann"), (second, "ann"), (first, "bob")]
    assert [cached(*caller) for caller in callers] == [0] * 5
    assert all(cached(*caller) >= 64 for caller in callers)
    salts = [request.salt for request in server.engine.seen[begin:]]
    assert salts[:5] == salts[5:]
    pool = PagePool(8, 64, identity=b"model")
    assert len({pool.root(salt) for salt in salts}) == 5
    assert not any(secret in salt for secret in (first, second) for salt in salts)


def test_users_that_cannot_be_meant(guarded: tuple[Harness, str]) -> None:
    server, secret = guarded
    for user in ("", "a b", "a/b", "é", "x" * 513):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client(api_key=secret).chat.completions.create(
                model="tiny", messages=HI, extra_body={"user_id": user}
            )
        assert caught.value.param == "user_id"


def test_the_command_line(tmp_path: Path) -> None:
    def run(*words: str) -> object:
        result = CliRunner().invoke(cli, ["keys", *words, "--data-dir", str(tmp_path)], catch_exceptions=False)
        assert result.exit_code == 0
        return result

    secret = run("create", "laptop", "--tokens-per-minute", "9").stdout.strip()
    made = json.loads(run("create", "other", "--json").stdout)
    assert KeyStore(database_url(tmp_path)).by_digest().keys() and secret.startswith("sk-")
    run("revoke", made["id"])
    listed = json.loads(run("list", "--json").stdout)
    assert [(key["name"], bool(key["revoked"]), key["tokens_per_minute"]) for key in listed] == [
        ("laptop", False, 9), ("other", True, None),
    ]  # fmt: skip
    assert made["id"] in run("list").stdout and secret not in run("list").stdout
    assert "secret" in made and "secret" not in listed[0]
