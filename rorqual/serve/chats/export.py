"""Conversations out and in again: Markdown for people (the branch that is shown), JSON for programs (the whole tree)."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, update

from rorqual.errors import RequestError
from rorqual.search.citations import markers
from rorqual.serve.chats import words
from rorqual.serve.chats.imported import File, ImportedChat
from rorqual.serve.chats.shapes import RUNNING
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.tables import ATTACHED, CHATS, FILES
from rorqual.serve.database import writing

FORMAT = "rorqual-chat"
VERSION = 1


def as_json(chat: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """texts: of the files, by id, so that a conversation can be taken elsewhere whole."""
    messages = [
        {**message, "files": [{**file, "text": texts.get(file["id"], "")} for file in message["files"]]}
        for message in chat["messages"]
    ]
    return {"format": FORMAT, "version": VERSION, **chat, "messages": messages}


def whole(chat: Mapping[str, Any]) -> bytes:
    """A chat as JSON, message by message: for ten thousand at once nothing else would run for as long as that takes."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    rest = encode({name: value for name, value in chat.items() if name != "messages"})
    return f'{rest[:-1]},"messages":[{",".join(map(encode, chat["messages"]))}]}}'.encode()


def shown_branch(messages: Sequence[Mapping[str, Any]], head: str | None) -> list[Mapping[str, Any]]:
    """From the first message to the leaf; without a head, to the newest message."""
    by_id = {message["id"]: message for message in messages}
    at = head if head in by_id else (messages[-1]["id"] if messages else None)
    branch: list[Mapping[str, Any]] = []
    while at in by_id:
        message = by_id.pop(at)
        branch.append(message)
        at = message["parent"]
    return branch[::-1]


def as_markdown(chat: Mapping[str, Any]) -> str:
    parts = [f"# {chat['title'] or 'Untitled'}"]
    for message in shown_branch(chat["messages"], chat["head"]):
        if message["role"] == "user":
            files = "".join(f"\n\n*attached: {file['name']}*" for file in message["files"])
            parts.append(f"## You\n\n{message['content']}{files}")
            continue
        parts.append(f"## {message['model'] or 'Assistant'}")
        if message["thinking"]:
            quoted = "\n".join(f"> {line}".rstrip() for line in message["thinking"].strip().split("\n"))
            parts.append(f"> *Thought for {message['thinking_s'] or 0:.0f} s*\n>\n{quoted}")
        parts.append(_linked(message["content"].strip(), _sources(message)) or f"*({message['status']})*")
        if message["status"] not in ("done", RUNNING) and message["content"]:
            parts.append(f"*({message['status']})*")
        if sources := _sources(message):
            parts.append("\n".join(f"[{s['n']}]: {_target(s['url'])} {s['title']}" for s in sources.values()))
    return "\n\n".join(parts) + "\n"


def _sources(message: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    return {source["n"]: source for source in (message["search"] or {}).get("sources", ())}


def _linked(content: str, sources: Mapping[int, Mapping[str, Any]]) -> str:
    """Citations as links to their pages."""
    out, at = "", 0
    for start, end in markers(content):
        numbers = [int(n) for n in re.findall(r"\d+", content[start:end])]
        links = (f"[[{n}]]({_target(sources[n]['url'])})" if n in sources else f"[{n}]" for n in numbers)
        out, at = out + content[at:start] + "".join(links), end
    return out + content[at:]


def _target(url: str) -> str:
    return "<" + re.sub(r"[<>\s]", "", url) + ">"


def file_name(title: str, suffix: str) -> str:
    """For people's disks; ASCII, because it stands in a header."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[:60]
    return f"{plain or 'chat'}.{suffix}"


def load(store: ChatStore, owner: str, chat: ImportedChat) -> dict[str, Any]:
    """Stores an exported conversation, under a new id where its own is taken. Raises RequestError for one whose messages
    are no tree."""
    _check_tree(chat)
    with writing(store.engine) as connection:
        taken = store.find_chat(connection, owner, chat.id) is not None
        name = uuid.uuid4().hex if taken else chat.id
        number = store.insert_chat(
            connection, owner, name, chat.title, chat.settings.model_dump(), chat.created or time.time()
        )
        said = [(-number, chat.title)]
        for message in chat.messages:
            values = message.model_dump(exclude={"files"})
            values["created"] = message.created or time.time()
            values["status"] = "cut" if message.status == RUNNING else message.status
            row = store.insert_message(connection, number, values, indexed=False)
            said.append((row, message.content))
            for position, file in enumerate(message.files):
                kept = _file(connection, owner, file)
                connection.execute(insert(ATTACHED).values(message=row, position=position, file=kept))
        head = chat.head or (chat.messages[-1].id if chat.messages else None)
        connection.execute(update(CHATS).where(CHATS.c.n == number).values(head=head, pinned=chat.pinned))
        words.put(connection, said)
    return store.get(owner, name)


def _check_tree(chat: ImportedChat) -> None:
    """Parents stand before their children: then there is no circle."""
    seen: set[str] = set()
    for message in chat.messages:
        if message.id in seen:
            raise RequestError(f"two messages are called {message.id!r}", param="messages")
        if message.parent is not None and message.parent not in seen:
            raise RequestError(f"message {message.id!r} stands before its parent", param="messages")
        seen.add(message.id)
    if chat.head is not None and chat.head not in seen:
        raise RequestError(f"there is no message {chat.head!r}", param="head")


def _file(connection: Connection, owner: str, file: File) -> int:
    about = {"id": f"file-{uuid.uuid4().hex}", "chars": len(file.text), **file.model_dump(exclude={"text"})}
    row = {"owner": owner, "id": about["id"], "created": time.time(), "about": about, "text": file.text}
    key = connection.execute(insert(FILES).values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])
