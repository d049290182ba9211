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
from dataclasses import dataclass
from decimal import Decimal

from rorqual.search.api import Checked, Citation, Source, Text
from rorqual.search.citations import CitationParser, markers
from rorqual.search.words import CJK, STOP, words

OVERLAP = 0.5
_NUMBER = re.compile(r"\d+(?:[,\u00a0\u202f]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_LIST_MARK = re.compile(r"^\s*(?:[-*+>#]+\s+|\d{1,3}[.)、]\s+)+")
_MARKUP = re.compile(r"[*_`#|]+")
_LETTER = rf"[^\W_{CJK}]"
_NAME = re.compile(rf"(?<!{_LETTER})(?!\d){_LETTER}(?:{_LETTER}|['’-])*")
_ENDING = re.compile(r"(?:[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*|\n)")
_ABBREVIATED = re.compile(r"\b(?:[A-Z]|e\.g|i\.e|vs|cf|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|approx|etc)\.$")


@dataclass(frozen=True, slots=True)
class Verdict:
    """On a cited sentence of a whole answer: where it stands, markers included (characters), what it cites, and whether
    its words are in what it cites, all sources together."""

    start: int
    end: int
    citations: tuple[int, ...]
    found: bool
    missing: tuple[str, ...]
    reason: str


def check_text(answer: str, sources: Sequence[Source]) -> list[Verdict]:
    """Every cited sentence of an answer that still has its `[citation:n]` in it."""
    parser = CitationParser(len(sources))
    events = [*parser.feed(answer), *parser.finish()]
    places = _places(answer)
    verdicts = []
    for (a, b), numbers in _cited(events):
        text = "".join(event.text for event in events if isinstance(event, Text))[a:b]
        cited = [source for source in sources if source.number in numbers]
        whole = Source(0, "\n".join(s.title for s in cited), "", tuple(p for s in cited for p in s.passages))
        told = check(_plain(text), whole)
        lead = len(text) - len(text.lstrip())
        start, end = places[a + lead], places[a + len(text.rstrip()) - 1] + 1
        verdicts.append(Verdict(start, end, numbers, told.found, told.missing, _reason(told)))
    return verdicts


def _places(answer: str) -> list[int]:
    """For each character outside of markers, where it stands in the answer."""
    places: list[int] = []
    at = 0
    for start, end in markers(answer):
        places += range(at, start)
        at = end
    return [*places, *range(at, len(answer))]


def _reason(told: Checked) -> str:
    if told.found:
        return "its names and numbers and most of its words are in the source"
    if told.missing:
        return f"not in the source: {', '.join(told.missing[:5])}"
    return f"{told.overlap:.0%} of its words are in the source"


def statements(events: Iterable[Text | Citation]) -> list[tuple[str, tuple[int, ...]]]:
    """The cited sentences of an answer, each with its known citations. A marker after the full stop belongs to the
    sentence before it, as one before the full stop does."""
    events = list(events)
    text = "".join(event.text for event in events if isinstance(event, Text))
    return [(_plain(text[a:b]), numbers) for (a, b), numbers in _cited(events)]


def _cited(events: Iterable[Text | Citation]) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    """Spans of the cited sentences in the text without markers, and what they cite."""
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
    return [(span, tuple(numbers)) for span, numbers in sorted(cited.items())]


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
