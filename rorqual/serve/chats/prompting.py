"""From a branch of a conversation to the messages of a request.

Files stand before the question in the form that DeepSeek published for its own chat (deepseek-ai/DeepSeek-R1, README).
What a file or a page says is quoted: it may be a stranger's, and must not be able to end its own quotation or to spell a
control token for a tokenizer of somebody else's. In source code that is done sparingly, `|>` is an operator there.

Citations of earlier answers are left out: their numbers mean other pages by now.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from rorqual.data.special import SPECIAL_TOKENS
from rorqual.search.api import Source
from rorqual.search.citations import without_markers
from rorqual.search.neutral import neutral_line
from rorqual.search.prompt import search_prompt
from rorqual.serve.chats.shapes import Message, Turn

Prompt = list[dict[str, Any]]
_TOKEN = re.compile(
    "<(?=[|｜][^<>\n]{1,60}[|｜]>|"
    + "|".join(re.escape(token[1:]) for token in SPECIAL_TOKENS if token[1] not in "|｜")
    + ")"
)
_MARKER = re.compile(r"\[(?=\s*/?\s*file\s+(?:name|content)\b)", re.IGNORECASE)
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def quoted_file(name: str, text: str) -> str:
    """One file as the model reads it."""
    text = _MARKER.sub("(", _TOKEN.sub("< ", _CONTROLS.sub("", text)))
    return f"[file name]: {neutral_line(name)}\n[file content begin]\n{text}\n[file content end]\n"


def question_text(turn: Turn) -> str:
    return "".join(quoted_file(name, text) for name, text in turn.files) + turn.content


def conversation(path: Sequence[Turn], system: str) -> Prompt:
    """The messages up to the question that is to be answered."""
    messages: Prompt = [{"role": "system", "content": system}] if system.strip() else []
    for turn in path:
        if turn.role == "user":
            messages.append({"role": "user", "content": question_text(turn)})
        elif turn.content:
            messages.append({"role": "assistant", "content": without_markers(turn.content)})
    return messages


def with_sources(messages: Prompt, sources: Sequence[Source], created: float) -> Prompt:
    """The last question with what was found for it. created: of the answer, so that going on reads the same prompt."""
    if not sources:
        return messages
    today = time.strftime("%d %B %Y", time.localtime(created)).lstrip("0")
    return [*messages[:-1], {"role": "user", "content": search_prompt(messages[-1]["content"], sources, today)}]


def begun(message: Message, *, answers_now: bool) -> Prompt:
    """The beginning of an answer that is to go on; nothing where it is to begin. answers_now: the thought is over."""
    if not message.thinking and not message.content and not answers_now:
        return []
    prefix: dict[str, Any] = {"role": "assistant", "content": message.content, "prefix": True}
    if message.thinking:
        prefix["reasoning_content"] = message.thinking
    if answers_now and not message.content:
        prefix["thinking_done"] = True
    return [prefix]


def source_json(source: Source) -> dict[str, Any]:
    """A source as it is kept and shown."""
    site = re.sub(r"^https?://(?:www\.)?", "", source.url).partition("/")[0] if "://" in source.url else "local"
    if source.url.startswith("file:"):
        site = "local"
    return {
        "n": source.number, "url": source.url, "title": source.title, "site": site, "date": source.date or None,
        "passage": "\n…\n".join(source.passages), "partial": source.partial,
    }  # fmt: skip


def source_of(kept: dict[str, Any]) -> Source:
    """The other way round. Passages are cut again where they were joined."""
    passages = tuple(str(kept.get("passage") or "").split("\n…\n"))
    return Source(
        int(kept["n"]), str(kept["title"]), str(kept["url"]), passages, str(kept.get("date") or ""),
        bool(kept.get("partial")),
    )  # fmt: skip


def estimate(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand, as DeepSeek's documentation counts them."""
    wide = sum(c > "\u2e80" for c in text)
    return round(0.3 * (len(text) - wide) + 0.6 * wide)
