"""Whether a cited sentence's words are in the source it names: a lexical check, made without a model.

It asks three things of the passages that the model was shown under that number. Every number of the sentence must be
there (1,234 and 1234.0 are one number). So must every name: a word with a capital inside the sentence, or with
several capitals or digits anywhere. And at least half of the content words, endings aside, in CJK half of the
character pairs. All three: found. What is missing is told with the verdict.

It finds invented figures, swapped names and citations of the wrong page, which are most of what goes wrong. It does
not understand: a negation that was dropped passes, and a sentence that translates its source, or says "three" where
that says "3", is reported as not found. The label means "these words are (not) there", and the interface should say
so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from rorqual.search.api import Checked, Citation, Source, Text
from rorqual.search.words import CJK, STOP, words

OVERLAP = 0.5
_NUMBER = re.compile(r"\d+(?:[,\u00a0\u202f]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_LIST_MARK = re.compile(r"^\s*(?:[-*+>#]+\s+|\d{1,3}[.)、]\s+)+")
_MARKUP = re.compile(r"[*_`#|]+")
_LETTER = rf"[^\W_{CJK}]"
_NAME = re.compile(rf"(?<!{_LETTER})(?!\d){_LETTER}(?:{_LETTER}|['’-])*")
_ENDING = re.compile(r"(?:[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*|\n)")
_ABBREVIATED = re.compile(r"\b(?:[A-Z]|e\.g|i\.e|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|approx|etc)\.$")


def statements(events: Iterable[Text | Citation]) -> list[tuple[str, tuple[int, ...]]]:
    """The cited sentences of an answer, each with its known citations. A marker after the full stop belongs to the
    sentence before it, as one before the full stop does."""
    text, marks = "", []
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif event.known:
            marks.append((len(text.rstrip()) - 1, event.number))
    spans = _sentences(text)
    cited: dict[tuple[int, int], list[int]] = {}
    for at, number in marks:
        span = next(((a, b) for a, b in spans if a <= at < b), None)
        if span and number not in cited.setdefault(span, []):
            cited[span].append(number)
    return [(_plain(text[a:b]), tuple(numbers)) for (a, b), numbers in sorted(cited.items())]


def check(sentence: str, source: Source) -> Checked:
    """The verdict on one sentence and one of its sources."""
    shown = "\n".join((source.title, *source.passages))
    there, stems, figures = set(words(shown)), set(map(_stem, words(shown))), _numbers(shown)
    missing = [raw for value, raw in _numbers(sentence).items() if value not in figures]
    missing += [name for name in _names(sentence) if not there.issuperset(words(name))]
    content = {w for w in words(sentence) if w not in STOP and not w.isdigit()}
    overlap = sum(_stem(w) in stems for w in content) / len(content) if content else 1.0
    found = not missing and overlap >= OVERLAP
    return Checked(sentence, source.number, found, round(overlap, 3), tuple(missing))


def check_all(events: Iterable[Text | Citation], sources: Sequence[Source]) -> list[Checked]:
    """Every cited sentence against each of its sources."""
    by_number = {source.number: source for source in sources}
    return [check(text, by_number[n]) for text, numbers in statements(events) for n in numbers if n in by_number]


def _sentences(text: str) -> list[tuple[int, int]]:
    """Spans that cover the text."""
    spans, start = [], 0
    for end in _ENDING.finditer(text):
        if text[end.start()] == "." and _ABBREVIATED.search(text[start : end.start() + 1]):
            continue
        if text[start : end.end()].strip():
            spans.append((start, end.end()))
            start = end.end()
    return [*spans, (start, len(text))]


def _plain(sentence: str) -> str:
    return " ".join(_MARKUP.sub("", _LIST_MARK.sub("", sentence)).split())


def _numbers(text: str) -> dict[Decimal, str]:
    """Values to how they are written. Digits inside a word (V3, H800) belong to a name."""
    found = {}
    for match in _NUMBER.finditer(text):
        before = text[match.start() - 1 : match.start()]
        if not (before.isalpha() and before.isascii()):
            found[Decimal(re.sub("[,\u00a0\u202f]", "", match[0])).normalize()] = match[0]
    return found


def _names(sentence: str) -> list[str]:
    found = []
    for i, match in enumerate(_NAME.finditer(sentence)):
        word = match[0].removesuffix("'s").removesuffix("’s")
        marked = sum(c.isupper() or c.isdigit() for c in word) > 1
        if word != "I" and (marked or (i > 0 and word[0].isupper())):
            found.append(word)
    return found


def _stem(word: str) -> str:
    """Crude on purpose: what the sentence and its source share is a beginning, not a dictionary form."""
    return word[:5] if word.isascii() and len(word) > 5 else word.removesuffix("s")
