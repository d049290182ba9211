"""What DeepSeek-V3 does to documents before they are packed (section 4.1): fill-in-the-middle, and splitting some tokens.

*Fill-in-the-middle*, as prefix, suffix, middle: a document is cut at two random places and written as
`<｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <｜end▁of▁sentence｜>`, at a rate of 0.1 as published, so
that a model learns to fill a gap while it keeps learning to go on. *Splitting*: the tokenizer has tokens of punctuation and
line breaks together, and a prompt that ends without its last line break would be one the model never saw; a share of them
(which one is not published) is learned as two.

Both are drawn from the content of a document and a seed, so that the shards do not depend on order, cores or interruptions.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from functools import cached_property

from rorqual.data import special
from rorqual.data.segments import Segment
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import DataError


class Reshaper:
    """fim: share of documents; split: share of punctuation-and-newline tokens. Immutable."""

    def __init__(self, tokenizer: Tokenizer, fim: float, split: float, seed: int) -> None:
        """Raises DataError for shares outside [0, 1], or where the tokenizer lacks the markers."""
        if not 0 <= fim <= 1 or not 0 <= split <= 1:
            raise DataError(f"the shares of fill-in-the-middle and of splits lie in [0, 1], not {fim} and {split}")
        if fim:
            for marker in (special.FIM_BEGIN, special.FIM_HOLE, special.FIM_END):
                tokenizer.special(marker)
        self._tokenizer, self._fim, self._split, self._seed = tokenizer, fim, split, seed

    def segments(self, text: str) -> list[Segment]:
        """The text as it is, or in three parts behind their markers."""
        draw = self._random(text, "fim")
        if len(text) < 3 or draw.random() >= self._fim:
            return [Segment(text, learn=True)]
        a, b = sorted(draw.sample(range(len(text) + 1), 2))
        parts = ((special.FIM_BEGIN, text[:a]), (special.FIM_HOLE, text[b:]), (special.FIM_END, text[a:b]))
        out = []
        for marker, part in parts:
            out += [Segment(marker, special=True, learn=True), Segment(part, learn=True)]
        return out

    def split(self, ids: list[int], text: str) -> list[int]:
        """Some of the tokens of punctuation and line breaks as two (rarely more) tokens with the same bytes. `text` seeds
        the choice."""
        if not self._split:
            return ids
        draw, table = self._random(text, "split"), self.halves
        out: list[int] = []
        for token in ids:
            halves = table.get(token)
            out += halves if halves is not None and draw.random() < self._split else (token,)
        return out

    @cached_property
    def halves(self) -> dict[int, tuple[int, ...]]:
        """Token of punctuation and line breaks -> the tokens of its punctuation, then those of its line breaks."""
        found = {}
        for token in range(self._tokenizer.vocab_size):
            if token in self._tokenizer.special_ids:
                continue
            try:
                text = self._tokenizer.token_bytes(token).decode("utf-8")
            except UnicodeDecodeError:
                continue
            head = text.rstrip("\r\n")
            tail = text[len(head) :]
            if tail and _is_punctuation(head.removeprefix(" ")):
                found[token] = (*self._tokenizer.encode(head), *self._tokenizer.encode(tail))
        return found

    def _random(self, text: str, purpose: str) -> random.Random:
        content = f"{self._seed} {purpose} {text}".encode("utf-8", "surrogatepass")
        return random.Random(int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "big"))


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)
