"""Text of strangers made harmless: what a page says is quoted, and it cannot say where its quotation ends.

Three things are taken from it before a model sees it. Control tokens: our own tokenizer never reads them out of text, but
behind `--upstream` stands somebody else's, which may. So every spelling of `data/special.py` and everything built like one
(`<｜…｜>`, `<|…|>`, `<tool_call>`) gets a space after its first bracket: a person still reads the same, no tokenizer finds
a token. Our own markers (`[webpage 1 end]`, `[citation:3]`, the heading before the user's message): their opening bracket
becomes a round one, so that only we write them. And characters nobody sees: controls, direction overrides, tag characters,
which carry instructions past the eye of whoever looks at the sources.

Only replacements, never deletions, after the invisible characters are gone: taking something out could join its
neighbours to what was to be prevented. The function is idempotent; tests hold it to that and to finding no token.

What this does not do: stop a model from believing what it reads. "Ignore your instructions" stays in the text, in quotation
marks so to speak; that nothing happens is due to there being nothing to trigger, since a search turn has no tools.
"""

from __future__ import annotations

import re

from rorqual.data.special import SPECIAL_TOKENS

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\U000e0000-\U0010ffff]"
)
_BARRED = re.compile(r"<(?=[|｜])|(?<=[|｜])(?=>)")
_NAMED = re.compile(
    "<(?=(?:"
    + "|".join(re.escape(token[1:]) for token in SPECIAL_TOKENS if token[1] not in "|｜")
    + r"|/?(?:tool_|function_|invoke|parameter|system|user|assistant)[^<>\n]{0,60}>))",
    re.IGNORECASE,
)
_MARKERS = re.compile(r"[\[［【](?=\s*/?\s*(?:webpage|citation|file\s+(?:name|content)))", re.IGNORECASE)
_HEADING = re.compile(
    r"^([ \t]*)#+(?=[ \t]*(?:the user|the following contents|用户消息|以下内容))", re.IGNORECASE | re.MULTILINE
)


def neutral(text: str, limit: int) -> str:
    """Quotable text of at most `limit` characters; see the module."""
    text = _UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n")[: 4 * limit])
    text = _BARRED.sub(lambda m: "< " if m[0] else " ", text)
    text = _NAMED.sub("< ", text)
    text = _MARKERS.sub("(", text)
    text = _HEADING.sub(r"\1*", text).strip()
    if len(text) <= limit:
        return text
    cut = text[: limit - 2]
    return (cut[: cut.rfind(" ")] if " " in cut[limit // 2 :] else cut).rstrip() + " …"


def neutral_line(text: str, limit: int = 200) -> str:
    """The same for what must stay on one line: titles, addresses, dates."""
    return " ".join(neutral(" ".join(text.split()), limit).split())
