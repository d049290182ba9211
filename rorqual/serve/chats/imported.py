"""The body of an import: an exported conversation, which may have been through anybody's hands.

Read generously where a newer version may have added something (it is left out), and strictly where this version will rely on
what stands there. An address that is none of a page or a document is dropped: it would become a link.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator

from rorqual.serve.chats.shapes import ChatSettings, Id, Status, Text, Title

IMPORT_MESSAGES = 50_000
_ADDRESS = re.compile(r"(?:https?|file)://|[\w.-][\w./-]*$")
Address = Annotated[Text, AfterValidator(lambda url: url if _ADDRESS.match(url) else "")]
Count = Annotated[int, Field(ge=0)]


class Source(BaseModel):
    n: Annotated[int, Field(ge=1)]
    url: Address = ""
    title: Text = ""
    site: Text = ""
    date: Text | None = None
    passage: Text = ""
    partial: bool = False


class Problem(BaseModel):
    where: Text = ""
    message: Text = ""


class Search(BaseModel):
    queries: list[Text] = []
    sources: list[Source] = []
    problems: list[Problem] = []
    failed: Text | None = None
    done: bool = True


class Check(BaseModel):
    start: Count
    end: Count
    citations: list[int] = []
    found: bool
    missing: list[Text] = []
    reason: Text = ""


class Usage(BaseModel):
    prompt_tokens: Count = 0
    cached_tokens: Count = 0
    completion_tokens: Count = 0
    reasoning_tokens: Count = 0
    requests: Count = 0
    tokens_per_s: float | None = None


class Failure(BaseModel):
    message: Text
    code: Text | None = None


class File(BaseModel):
    """`text` is what the model reads of it."""

    name: Annotated[Text, Field(max_length=300)] = "file"
    type: Annotated[Text, Field(max_length=200)] = ""
    kind: Literal["text", "code", "pdf"] = "text"
    bytes: Count = 0
    tokens: Count = 0
    truncated: bool = False
    text: Text = ""


class ImportedMessage(BaseModel):
    id: Id
    parent: Id | None = None
    role: Literal["user", "assistant"]
    created: float = 0.0
    content: Text = ""
    thinking: Text | None = None
    thinking_s: float | None = None
    thinking_tokens: Count | None = None
    status: Status = "done"
    model: Annotated[Text, Field(max_length=200)] = ""
    files: Annotated[list[File], Field(max_length=100)] = []
    settings: ChatSettings | None = None
    usage: Usage | None = None
    search: Search | None = None
    checks: list[Check] | None = None
    error: Failure | None = None

    _known = field_validator("settings", mode="before")(lambda value: known_settings(value))


class ImportedChat(BaseModel):
    id: Id
    title: Title = ""
    pinned: bool = False
    created: float = 0.0
    settings: ChatSettings = ChatSettings()
    head: Id | None = None
    messages: Annotated[list[ImportedMessage], Field(max_length=IMPORT_MESSAGES)]

    _known = field_validator("settings", mode="before")(lambda value: known_settings(value))


def known_settings(value: Any) -> Any:
    """Without those of other versions."""
    return {k: v for k, v in value.items() if k in ChatSettings.model_fields} if isinstance(value, dict) else value
