"""The tables of conversations. `migrations/` makes them; what the columns mean is said here.

A chat belongs to an owner, which is a key (`callers.Caller.owner`), or "local" where the server asks for none. Its
messages are a tree: `parent` is the id of the message before, and siblings are other wordings of a question or other
answers to it. Ids are the client's, so that a request that was sent twice does its work once; `n` is ours, and what
references go by.

A running answer carries the id of the process that writes it (`worker`), and `wish` is how other processes ask that one to
stop. Of a file only the text is kept, not its bytes.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from rorqual.serve.database import METADATA

CHATS = Table(
    "chats",
    METADATA,
    Column("n", Integer, primary_key=True, autoincrement=True),
    Column("owner", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("title", Text, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("head", String(64)),  # the leaf that is shown
    Column("draft", Text, nullable=False),
    UniqueConstraint("owner", "id"),
    Index("chats_recent", "owner", "pinned", "updated"),
    sqlite_autoincrement=True,
)
MESSAGES = Table(
    "chat_messages",
    METADATA,
    Column("n", Integer, primary_key=True, autoincrement=True),
    Column("chat", Integer, ForeignKey("chats.n", ondelete="CASCADE"), nullable=False),
    Column("id", String(64), nullable=False),
    Column("parent", String(64)),
    Column("role", String(16), nullable=False),
    Column("created", Double, nullable=False),
    Column("content", Text, nullable=False),
    Column("thinking", Text),
    Column("thinking_s", Double),
    Column("thinking_tokens", Integer),
    Column("status", String(16), nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("model", String(200), nullable=False),
    Column("settings", JSON(none_as_null=True)),
    Column("usage", JSON(none_as_null=True)),
    Column("search", JSON(none_as_null=True)),
    Column("checks", JSON(none_as_null=True)),
    Column("worker", String(32), nullable=False),
    Column("wish", String(16), nullable=False),
    UniqueConstraint("chat", "id"),
    Index("chat_messages_status", "status"),
    sqlite_autoincrement=True,
)
FILES = Table(
    "chat_files",
    METADATA,
    Column("n", Integer, primary_key=True, autoincrement=True),
    Column("owner", String(64), nullable=False),
    Column("id", String(64), nullable=False, unique=True),
    Column("created", Double, nullable=False),
    Column("about", JSON, nullable=False),
    Column("text", Text, nullable=False),
    sqlite_autoincrement=True,
)
ATTACHED = Table(
    "chat_attached",
    METADATA,
    Column("message", Integer, ForeignKey("chat_messages.n", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("file", Integer, ForeignKey("chat_files.n"), nullable=False),
    Index("chat_attached_file", "file"),
)
WORKERS = Table(
    "chat_workers",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("beat", Double, nullable=False),
)
