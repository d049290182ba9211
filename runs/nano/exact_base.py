"""What the exact exercises share: one exchange, a tiny grammar for wordings, and what is held out of training.

The long tail comes from the grammar: "{Hi|Hello}, what is [a] + [b]?" first chooses among the alternatives in braces
(innermost first), then fills the names in brackets, so that one hand-written line gives many wordings and the part that
must be exact is never written twice.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\[(\w+)\]")
HELD_ONE_IN = 20


@dataclass(slots=True)
class Exchange:
    """One question and its answer.

    thought: the steps, for the thinking style.
    key: what counts as the same question; the question itself unless given. Arithmetic gives its operands, so that a
        held-out sum is held out in every wording.
    expect: what a right answer must contain, "" if many answers are right (then it is no exam question).
    sure: what to say to "are you sure?", "" if that cannot be shown in one line.
    literal: the case and the last punctuation of the question matter.
    """

    question: str
    answer: str
    thought: str
    key: str = ""
    expect: str = ""
    sure: str = ""
    literal: bool = False
    kind: str = ""


Maker = Callable[[random.Random, bool], Exchange]


@dataclass(slots=True)
class Kind:
    """A maker of exchanges, its share of the data, and whether it has a follow-up form ("And 4 + 5?")."""

    name: str
    make: Maker
    weight: float
    again: bool

    def __call__(self, rng: random.Random, again: bool = False) -> Exchange:
        exchange = self.make(rng, again)
        exchange.kind = self.name
        return exchange


KINDS: dict[str, Kind] = {}


def kind(name: str, weight: float, again: bool = False) -> Callable[[Maker], Maker]:
    """Register a maker. weight: its share among single questions, relative to the others."""

    def register(make: Maker) -> Maker:
        KINDS[name] = Kind(name, make, weight, again)
        return make

    return register


def grow(rng: random.Random, pattern: str, **slots: object) -> str:
    """One wording of the pattern."""
    while found := ALTERNATIVES.search(pattern):
        pattern = pattern[: found.start()] + rng.choice(found[1].split("|")) + pattern[found.end() :]
    return SLOT.sub(lambda m: str(slots[m[1]]), pattern)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def a(noun: str) -> str:
    """The noun with its article."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "use", "eu", "one"))
    return f"an {noun}" if vowel or noun.startswith(("hour", "honest")) else f"a {noun}"


def listed(items: list[str], last: str = "and") -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def rows(table: str) -> list[list[str]]:
    """The cells of a hand-written table: one row a line, cells apart by |."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines() if line.strip()]


def normal(text: str) -> str:
    """The question without case and punctuation: what must differ between an exam and the lessons."""
    return " ".join(re.findall(r"[a-z0-9+*/-]+", text.lower()))


def held_out(exchange: Exchange) -> bool:
    """Whether this question belongs to the exam. Decided by a checksum, so it holds for every seed."""
    key = exchange.key or normal(exchange.question)
    return bool(exchange.expect) and zlib.crc32(key.encode()) % HELD_ONE_IN == 0


def vary(rng: random.Random, exchange: Exchange) -> str:
    """The question as people type it: sometimes greeting first, in lower case, without the last mark."""
    text = exchange.question
    roll = rng.random()
    if roll < 0.09 and not re.match(r"(hi|hello|hey|good|ok|and|thank|bye|i|i'm|now)\b", text.lower()):
        lead = rng.choice(["Hi, ", "Hello, ", "Hey, ", "Ok, ", "So, ", "Please help me: ", "Quick question: ", "Hi! "])
        keeps = lead == "Hi! " or re.match(r"[A-Z]{2}|I\b|[A-Z]\b|\d", text)
        text = lead + (text if keeps else text[0].lower() + text[1:])
    if exchange.literal:
        return text
    roll = rng.random()
    if roll < 0.10:
        return text.lower()
    if roll < 0.20:
        return text.lower().rstrip(".?!")
    if roll < 0.27:
        return text.rstrip(".?!")
    if roll < 0.32:
        return text[0].lower() + text[1:]
    if roll < 0.34:
        return text.rstrip(".") + "!" if not text.endswith(("?", "!")) else text
    if roll < 0.36:
        return text.replace("?", "??")
    return text
