"""A rendered conversation before it is token ids: special tokens and plain text, told apart.

Text is encoded as text, so markers typed into a message stay letters; a marker that is meant is a segment of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.data.special import SPECIAL_TOKENS

_MARKERS = re.compile("(" + "|".join(re.escape(name) for name in SPECIAL_TOKENS) + ")")


@dataclass(frozen=True, slots=True)
class Segment:
    """A special token (`special`) or plain text, and whether the assistant must learn to write it."""

    text: str
    special: bool = False
    learn: bool = False


def marked(text: str) -> list[Segment]:
    """Of a text of our own that names markers and means them. Never for text from outside."""
    return [Segment(part, special=i % 2 == 1) for i, part in enumerate(_MARKERS.split(text)) if part]


def joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbouring texts as one: a tokenizer sees them as one when it reads the rendered string."""
    result: list[Segment] = []
    for segment in segments:
        last = result[-1] if result else None
        if last and not (last.special or segment.special) and last.learn == segment.learn:
            result[-1] = Segment(last.text + segment.text, learn=last.learn)
        else:
            result.append(segment)
    return result
