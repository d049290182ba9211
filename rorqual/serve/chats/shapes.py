"""The objects of the chat's HTTP contract: bodies that come in, and the JSON that goes out.

Places in a text are told in UTF-16 code units, which is what an index into a JavaScript string is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LOCAL = "local"
RUNNING = "running"
RESUMABLE = ("length", "cut", "stopped", "error")
TITLE_CHARS = 200
CONTENT_CHARS = 400_000
FILES_PER_MESSAGE = 10


def storable(text: str) -> str:
    """JSON can say what no database takes: half a character, and a zero."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Text = Annotated[str, AfterValidator(storable)]
Title = Annotated[Text, Field(max_length=TITLE_CHARS)]
Content = Annotated[Text, Field(max_length=CONTENT_CHARS)]
Status = Literal["running", "done", "stopped", "length", "cut", "error"]
RESERVED = frozenset({"setup", "import", "files"})


class Body(BaseModel):
    """Unknown fields are refused: a page of another version should fail loudly."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True, protected_namespaces=())


class ChatSettings(Body):
    """What a conversation's next answer is made with. None: the model's own."""

    model: Annotated[str, Field(max_length=200)] = ""
    thinking: bool = False
    search: bool = False
    system: Content = ""
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**53)] = None

    def changed(self, given: ChatSettings | None) -> ChatSettings:
        """With what was given, and only that, in place of its own."""
        return self if given is None else self.model_copy(update=given.model_dump(exclude_unset=True))


class NewChat(Body):
    id: Id
    title: Title = ""
    settings: ChatSettings = ChatSettings()


class ChatPatch(Body):
    title: Title | None = None
    pinned: bool | None = None
    settings: ChatSettings | None = None
    head: Id | None = None
    draft: Content | None = None


class AnswerSpec(Body):
    id: Id
    settings: ChatSettings | None = None


class NewQuestion(Body):
    id: Id
    parent: Id | None = None
    content: Content
    files: Annotated[list[Id], Field(max_length=FILES_PER_MESSAGE)] = []
    answer: AnswerSpec


class NewAnswer(Body):
    id: Id
    parent: Id
    settings: ChatSettings | None = None


class Continuation(Body):
    """Empty: go on in place. With `thinking` or `content`: a sibling called `id`, which goes on from them."""

    id: Id | None = None
    thinking: Content | None = None
    content: Content | None = None


class Stop(Body):
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file that was read. chars: of its text before it was cut (`truncated`); tokens: of what is left."""

    id: str
    name: str
    type: str
    bytes: int
    chars: int
    tokens: int
    truncated: bool
    kind: Literal["text", "code", "pdf"]

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Message:
    """One message, as it stands in the table; the answer worker changes the one it writes."""

    n: int
    chat: str
    id: str
    parent: str | None
    role: str
    created: float
    content: str
    status: str
    model: str = ""
    thinking: str | None = None
    thinking_s: float | None = None
    thinking_tokens: int | None = None
    error: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    checks: list[dict[str, Any]] | None = None
    worker: str = ""
    files: list[dict[str, Any]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return self.status == RUNNING

    def json(self) -> dict[str, Any]:
        hidden = ("n", "worker")
        return {name: getattr(self, name) for name in self.__slots__ if name not in hidden}


@dataclass(frozen=True, slots=True)
class Turn:
    """A message as the next prompt needs it. files: (name, text)."""

    n: int
    id: str
    parent: str | None
    role: str
    content: str
    files: Sequence[tuple[str, str]] = ()


def chat_json(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("id", "title", "pinned", "created", "updated", "settings", "head", "draft")
    return {name: row[name] for name in names}


def utf16(text: str, at: int) -> int:
    """A place in a Python string as a place in a JavaScript string."""
    return at + sum(c > "\uffff" for c in text[:at])


def title_of(question: str, limit: int = 60) -> str:
    """The beginning of a first question, cut between words."""
    text = " ".join(question.split())
    if len(text) <= limit:
        return text
    cut = text[:limit]  # one more than there is room for: a space there ends a whole word
    return (cut[: cut.rfind(" ")] if " " in cut[limit // 2 :] else cut[:-1]).rstrip(" ,;:.-") + "…"
