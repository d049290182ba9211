"""Conversations: chats, messages, files, the processes that write answers, and on SQLite an index of their words."""

import contextlib

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import OperationalError

revision, down_revision = "0002", "0001"

FTS = "CREATE VIRTUAL TABLE chat_words USING fts5(body, tokenize='unicode61 remove_diacritics 2')"


def upgrade() -> None:
    op.create_table(
        "chats",
        sa.Column("n", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("head", sa.String(64)),
        sa.Column("draft", sa.Text, nullable=False),
        sa.UniqueConstraint("owner", "id"),
        sqlite_autoincrement=True,
    )
    op.create_index("chats_recent", "chats", ["owner", "pinned", "updated"])
    op.create_table(
        "chat_messages",
        sa.Column("n", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("chat", sa.Integer, sa.ForeignKey("chats.n", ondelete="CASCADE"), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("parent", sa.String(64)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("thinking", sa.Text),
        sa.Column("thinking_s", sa.Double),
        sa.Column("thinking_tokens", sa.Integer),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("error", sa.JSON),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("settings", sa.JSON),
        sa.Column("usage", sa.JSON),
        sa.Column("search", sa.JSON),
        sa.Column("checks", sa.JSON),
        sa.Column("worker", sa.String(32), nullable=False),
        sa.Column("wish", sa.String(16), nullable=False),
        sa.UniqueConstraint("chat", "id"),
        sqlite_autoincrement=True,
    )
    op.create_index("chat_messages_status", "chat_messages", ["status"])
    op.create_table(
        "chat_files",
        sa.Column("n", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("about", sa.JSON, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "chat_attached",
        sa.Column("message", sa.Integer, sa.ForeignKey("chat_messages.n", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("file", sa.Integer, sa.ForeignKey("chat_files.n"), nullable=False),
    )
    op.create_index("chat_attached_file", "chat_attached", ["file"])
    op.create_table(
        "chat_workers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("beat", sa.Double, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        with contextlib.suppress(
            OperationalError
        ):  # a SQLite without FTS5: words are found by looking through all texts
            op.execute(FTS)
