"""Files that are attached to questions: read once, when they are uploaded, and kept as text.

What cannot be read as text is refused with a sentence, nothing of it is kept. A text longer than a message may be is cut,
and says so. A file that was never sent with a question is dropped after a day.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from charset_normalizer import from_bytes
from sqlalchemy import delete, insert, select

from rorqual.errors import Conflict, NotFound, RequestError
from rorqual.search.neutral import neutral_line
from rorqual.serve.chats.shapes import CONTENT_CHARS, FileInfo, storable
from rorqual.serve.chats.store import ChatStore
from rorqual.serve.chats.tables import ATTACHED, FILES
from rorqual.serve.database import writing

PDF_S = 30.0
UNUSED_S = 24 * 3600.0
TEXT = (
    ".txt", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log", ".csv", ".tsv", ".srt", ".vtt", ".eml",
)  # fmt: skip
CODE = (
    ".py", ".ipynb", ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".html", ".htm", ".css", ".scss", ".json",
    ".jsonl", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".env", ".xml", ".svg", ".c", ".h", ".cc", ".cpp",
    ".hpp", ".cu", ".cs", ".java", ".kt", ".go", ".rs", ".swift", ".m", ".rb", ".php", ".pl", ".lua", ".r", ".jl",
    ".scala", ".clj", ".hs", ".ml", ".ex", ".exs", ".erl", ".fs", ".sh", ".bash", ".zsh", ".ps1", ".bat", ".sql",
    ".graphql", ".proto", ".diff", ".patch", ".vue", ".svelte", ".dart", ".zig", ".nim", ".asm", ".s", ".v", ".vhd",
    ".tf", ".mk", ".cmake", ".gradle", ".dockerfile", ".jinja", ".lean",
)  # fmt: skip
TYPES = (*TEXT, *CODE, ".pdf")
NAMED = ("makefile", "dockerfile", "license", "readme", "changelog", "authors", "notice", "gemfile", "procfile")
Kind = Literal["text", "code", "pdf"]


def kind_of(name: str, body: bytes) -> Kind:
    """Raises RequestError for what is read here in no way."""
    suffix = Path(name).suffix.lower()
    if body.startswith(b"%PDF-") or suffix == ".pdf":
        return "pdf"
    if suffix in TEXT:
        return "text"
    if suffix in CODE or (not suffix and name.lower() in NAMED):
        return "code"
    what = f"files of the kind {suffix}" if suffix else "files without a suffix"
    raise RequestError(f"{what} cannot be read here", remedy="attach text, source code or a PDF", param="file")


async def read(name: str, body: bytes) -> tuple[Kind, str, int, bool]:
    """(kind, text, its length before it was cut, whether it was). Raises RequestError with a sentence for people."""
    kind = kind_of(name, body)
    if not body:
        raise RequestError(f"{name} is empty", param="file")
    if kind == "pdf":
        told = await _pdf(name, body)
        text, chars, truncated = storable(told["text"]), int(told["chars"]), bool(told["truncated"])
    else:
        whole = storable(_decoded(name, body))
        text, chars, truncated = whole[:CONTENT_CHARS], len(whole), len(whole) > CONTENT_CHARS
    if not text.strip():
        scanned = ": its pages may be pictures" if kind == "pdf" else ""
        raise RequestError(f"{name} holds no text{scanned}", param="file")
    return kind, text, chars, truncated


def _decoded(name: str, body: bytes) -> str:
    if body.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return body.decode("utf-16")
        except UnicodeDecodeError as error:
            raise RequestError(f"{name} is damaged: {error.reason}", param="file") from error
    if b"\0" in body:
        raise RequestError(f"{name} is no text", remedy="attach text, source code or a PDF", param="file")
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.end >= len(body) and error.reason == "unexpected end of data":
            raise RequestError(f"{name} breaks off in the middle of a character", param="file") from error
    best = from_bytes(body).best()
    if best is None:
        raise RequestError(f"{name} is in no encoding that can be recognised", remedy="save it as UTF-8", param="file")
    return str(best)


async def _pdf(name: str, body: bytes) -> dict[str, Any]:
    program = Path(__file__).with_name("pdf.py")
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, str(program), str(CONTENT_CHARS), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(PDF_S):
            said, _ = await child.communicate(body)
    except TimeoutError:
        raise RequestError(f"{name} took longer than {PDF_S:g} s to read", param="file") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        told: dict[str, Any] = json.loads(said)
    except ValueError:
        told = {"error": "takes too much memory to read"}
    if "error" in told:
        raise RequestError(f"{name} {told['error']}"[:300], param="file")
    return told


class Files:
    """The uploads of a store. `count` gives the tokens of a text."""

    def __init__(self, store: ChatStore, count: Callable[[str], int]) -> None:
        self._store, self._count = store, count

    async def add(self, owner: str, name: str, type: str, body: bytes) -> FileInfo:
        name = clean_name(name)
        kind, text, chars, truncated = await read(name, body)
        tokens = await asyncio.to_thread(self._count, text)
        file = f"file-{uuid.uuid4().hex}"
        info = FileInfo(file, name, neutral_line(type, 100), len(body), chars, tokens, truncated, kind)
        await asyncio.to_thread(self._keep, owner, info, text)
        return info

    def _keep(self, owner: str, info: FileInfo, text: str) -> None:
        now = time.time()
        used = select(ATTACHED.c.file)
        with writing(self._store.engine) as connection:
            connection.execute(delete(FILES).where(FILES.c.created < now - UNUSED_S, FILES.c.n.not_in(used)))
            row = {"owner": owner, "id": info.id, "created": now, "about": info.json(), "text": text}
            connection.execute(insert(FILES).values(row))

    def remove(self, owner: str, file: str) -> None:
        """Raises NotFound, and Conflict for one that belongs to a message."""
        with writing(self._store.engine) as connection:
            number = connection.scalar(select(FILES.c.n).where(FILES.c.owner == owner, FILES.c.id == file))
            if number is None:
                raise NotFound(f"there is no file {file!r}", param="file")
            if connection.scalar(select(ATTACHED.c.file).where(ATTACHED.c.file == number).limit(1)):
                raise Conflict("the file belongs to a message", remedy="delete the conversation", param="file")
            connection.execute(delete(FILES).where(FILES.c.n == number))


def clean_name(name: str) -> str:
    """A name without its path, for people and models to read."""
    name = unicodedata.normalize("NFC", storable(name)).replace("\\", "/").rpartition("/")[2]
    return neutral_line(name, 150) or "file"
