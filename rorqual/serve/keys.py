"""API keys: made, listed and revoked on the command line, looked up by every request.

    key, secret = KeyStore(database_url(directory)).create("laptop", Limits(concurrency=4))

The secret is shown once and never stored: the table holds its SHA-256. A slow hash would protect nothing here,
because a secret is 256 random bits and not a word that somebody chose. A revoked key stays in the table: ids in
logs keep their meaning, and a server whose last key was revoked stays closed instead of falling open.

The command line and the server are different processes, so the server's `Keyring` reads the table again when
its copy is older than `refresh_s`: that long a revoked key may still work, and no request waits for a database
otherwise. Where the database cannot be reached the last copy goes on serving, and the log says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from sqlalchemy import Column, DateTime, Engine, Integer, LargeBinary, Row, String, Table, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from rorqual.errors import ConfigError, NotFound
from rorqual.serve.database import METADATA, connect, sqlite_file, writing

log = logging.getLogger(__name__)
PREFIX = "sk-rq-"  # clients and secret scanners know keys by `sk-`
TABLE = Table(
    "api_keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("hint", String(16), nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("created", DateTime(timezone=True), nullable=False),
    Column("revoked", DateTime(timezone=True)),
    Column("concurrency", Integer),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do; None means as much as the server can. concurrency: requests at once, from the first byte
    sent to the last token received; tokens_per_minute: of prompts and completions.

    Raises ConfigError for a limit below one.
    """

    concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}", remedy="leave it out for no limit")


@dataclass(frozen=True, slots=True)
class Key:
    """hint: the beginning and the end of the secret, to recognise it by; tenant: what its cached prefixes are kept
    apart by."""

    id: str
    name: str
    hint: str
    created: datetime
    tenant: str
    revoked: datetime | None = None
    limits: Limits = field(default_factory=Limits)


class KeyStore:
    """The table. Opened, and made where it is missing, with the first call that needs it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file = sqlite_file(url)

    @cached_property
    def _engine(self) -> Engine:
        return connect(self._url)

    def create(self, name: str, limits: Limits) -> tuple[Key, str]:
        """The new key and its secret, which nobody can be told again."""
        secret = PREFIX + secrets.token_urlsafe(32)
        hint = f"{secret[: len(PREFIX) + 4]}…{secret[-4:]}"
        key_id = f"key_{secrets.token_hex(8)}"
        key = Key(key_id, name, hint, datetime.now(UTC), key_id, None, limits)
        row = {
            "id": key.id, "name": name, "hint": hint, "digest": digest(secret), "created": key.created,
            "concurrency": limits.concurrency, "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute,
        }  # fmt: skip
        with writing(self._engine) as connection:
            connection.execute(insert(TABLE).values(row))
        return key, secret

    def list(self) -> list[Key]:
        """All of them, revoked ones too, oldest first."""
        return list(self.by_digest().values())

    def revoke(self, key_id: str) -> Key:
        """Safe to call twice. Raises NotFound for an id that is not there."""
        change = update(TABLE).where(TABLE.c.id == key_id, TABLE.c.revoked.is_(None)).values(revoked=datetime.now(UTC))
        with writing(self._engine) as connection:
            connection.execute(change)
            row = connection.execute(select(TABLE).where(TABLE.c.id == key_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {key_id!r}", remedy="`rorqual keys list` names them")
        return _key(row)

    def by_digest(self) -> dict[bytes, Key]:
        """Every key under the SHA-256 of its secret. A database file that does not exist is empty, and stays so."""
        if self._file is not None and not self._file.exists():
            return {}
        with self._engine.connect() as connection:
            rows = connection.execute(select(TABLE).order_by(TABLE.c.created, TABLE.c.id)).all()
        return {bytes(row.digest): _key(row) for row in rows}


class Keyring:
    """A server's view of its keys: those of the table, and `fixed` ones that it was started with (no limits)."""

    def __init__(self, store: KeyStore | None, fixed: tuple[str, ...] = (), *, refresh_s: float = 1.0) -> None:
        self._store = store
        now = datetime.now(UTC)
        self._fixed = {
            # The id goes into logs and may tell nothing of a secret that a person chose; the tenant goes into hashes.
            digest(secret): Key(f"option_{n}", "from the command line", "", now, digest(secret).hex())
            for n, secret in enumerate(fixed, 1)
        }
        self._refresh_s = refresh_s
        self._stored: Mapping[bytes, Key] = {}
        self._read_at = float("-inf")

    @property
    def required(self) -> bool:
        """Whether requests need a key, as of the last look: once there was one, always."""
        return bool(self._fixed or self._stored)

    @property
    def usable(self) -> bool:
        """Whether there is a key that opens anything, as of the last look."""
        return bool(self._fixed) or any(key.revoked is None for key in self._stored.values())

    def find(self, secret: str) -> Key | None:
        """What is compared are digests, which a caller cannot choose: the time taken tells nothing about a secret."""
        sent = digest(secret)
        key = self._fixed.get(sent) or self._stored.get(sent)
        return key if key is not None and key.revoked is None else None

    def load(self) -> None:
        """Raises ConfigError where the database cannot be opened, SQLAlchemyError where it cannot be read."""
        if self._store is not None:
            self._stored = self._store.by_digest()
        self._read_at = time.monotonic()

    async def refresh(self) -> None:
        """Look again if the copy is old. Total: a database that is away leaves the copy as it is."""
        now = time.monotonic()
        if self._store is None or now - self._read_at < self._refresh_s:
            return
        self._read_at = now  # first, so that one request looks and the others go on
        try:
            await asyncio.to_thread(self.load)
        except (ConfigError, SQLAlchemyError) as error:
            log.error("the keys cannot be read, those known go on: %s", error)


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _key(row: Row[Any]) -> Key:
    limits = Limits(row.concurrency, row.requests_per_minute, row.tokens_per_minute)
    return Key(row.id, row.name, row.hint, _utc(row.created), row.id, row.revoked and _utc(row.revoked), limits)


def _utc(moment: datetime) -> datetime:
    """SQLite forgets the zone; what we stored was UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
