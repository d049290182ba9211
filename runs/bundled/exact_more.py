"""Exercises that reward working: sums that do not fit in a head, chains, logic, calendars. Each is computed, worked out
in small steps, and checked in another way before the answer; `runs/nano/exact_*.py` have the easier ones.
"""

from __future__ import annotations

import itertools
import random

from exact_base import Exchange, grow, kind, listed
from exact_numbers import FRUIT, NAMES

ASK = "{|}{What is|What's|How much is|Calculate|Work out|Compute|Solve|Please calculate}"
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PLACES = ["ones", "tens", "hundreds", "thousands"]
THINGS = [
    "bloops",
    "wugs",
    "tals",
    "zibs",
    "morks",
    "feps",
    "daxes",
    "norps",
    "blickets",
    "gribs",
    "cats",
    "birds",
    "roses",
    "poets",
]
WORDS = [
    "the",
    "a",
    "small",
    "red",
    "old",
    "quick",
    "happy",
    "quiet",
    "dog",
    "cat",
    "bird",
    "girl",
    "boy",
    "man",
    "river",
    "house",
    "tree",
    "garden",
    "runs",
    "sleeps",
    "sings",
    "likes",
    "sees",
    "finds",
    "makes",
    "near",
    "under",
    "with",
    "and",
    "then",
    "today",
    "again",
    "always",
    "never",
    "seldom",
    "bread",
    "water",
    "light",
    "stone",
]


def result(rng: random.Random, claim: str, value: object) -> str:
    return grow(rng, "{[v].|[v]|[c].|The answer is [v].|It is [v].|[c].}", v=value, c=claim)


def add_columns(a: int, b: int) -> str:
    """Column by column with carries."""
    steps, carry, written = [], 0, ""
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        s = x + y + carry
        more = f" + {carry}" if carry else ""
        steps.append(
            f"{PLACES[i].capitalize()}: {x} + {y}{more} = {s}, write {s % 10}"
            + (f", carry {s // 10}." if s > 9 else ".")
        )
        carry, written = s // 10, f"{s % 10}{written}"
    if carry:
        written = f"{carry}{written}"
        steps.append(f"Write the carry {carry}.")
    assert int(written) == a + b
    return " ".join(steps) + f" So {a} + {b} = {a + b}."


def take_away(a: int, b: int) -> str:
    """Place by place, the largest first."""
    now, steps = a, []
    for i in range(len(str(b)) - 1, -1, -1):
        part = b // 10**i % 10 * 10**i
        if part:
            steps.append(f"{now} - {part} = {now - part}.")
            now -= part
    assert now == a - b
    return " ".join(steps)


def times(a: int, b: int) -> str:
    """a by the tens and ones of b."""
    if b < 10 and a < 10:
        return f"{a} x {b} = {a * b}."
    if b < 10:
        tens, ones = a // 10 * 10, a % 10
        if not ones:
            return f"{a // 10} x {b} = {a // 10 * b}, so {a} x {b} = {a * b}."
        return f"{tens} x {b} = {tens * b}. {ones} x {b} = {ones * b}. {tens * b} + {ones * b} = {a * b}."
    tens, ones = b // 10 * 10, b % 10
    first = f"{times(a, b // 10)} So {a} x {tens} = {a * tens}."
    return first if not ones else f"{first} {times(a, ones)} {a * tens} + {a * ones} = {a * b}."


@kind("long sum", 5)
def long_sum(rng: random.Random, again: bool) -> Exchange:
    a, b = rng.randint(100, 9999 if rng.random() < 0.3 else 999), rng.randint(20, 999)
    thought = (
        f"{a} + {b}. {add_columns(a, b)} Check: {a + b} - {b}: {take_away(a + b, b)} That is {a}, as it should be."
    )
    return Exchange(grow(rng, ASK + " [a] {+|plus} [b]?", a=a, b=b), result(rng, f"{a} + {b} = {a + b}", a + b), thought,
                    key=f"long sum {a} {b}", expect=str(a + b))  # fmt: skip


@kind("long difference", 5)
def long_difference(rng: random.Random, again: bool) -> Exchange:
    b, a = sorted((rng.randint(100, 999), rng.randint(15, 999)))
    thought = f"{a} - {b}. {take_away(a, b)} Check: {a - b} + {b}: {add_columns(a - b, b)} Right."
    return Exchange(grow(rng, ASK + " [a] {-|minus} [b]?", a=a, b=b), result(rng, f"{a} - {b} = {a - b}", a - b), thought,
                    key=f"long difference {a} {b}", expect=str(a - b))  # fmt: skip


@kind("product", 6)
def product(rng: random.Random, again: bool) -> Exchange:
    a, b = rng.randint(11, 99), rng.randint(3, 9) if rng.random() < 0.5 else rng.randint(11, 40)
    thought = f"{a} x {b}. {times(a, b)} Check: the last digit comes from {a % 10} x {b % 10} = {a % 10 * (b % 10)}, "
    thought += f"so it must be {a * b % 10}. {a * b} ends in {a * b % 10}. Good."
    return Exchange(grow(rng, ASK + " [a] {x|times|*|multiplied by} [b]?", a=a, b=b), result(rng, f"{a} x {b} = {a * b}", a * b),
                    thought, key=f"product {a} {b}", expect=str(a * b))  # fmt: skip


@kind("chain", 6)
def chain(rng: random.Random, again: bool) -> Exchange:
    now = rng.randint(5, 90)
    text, steps = str(now), [f"Start with {now}."]
    for _ in range(rng.randint(2, 4)):
        n = rng.randint(2, 60)
        sign = "+" if n > now or rng.random() < 0.55 else "-"
        after = now + n if sign == "+" else now - n
        steps.append(f"{now} {sign} {n} = {after}.")
        text, now = f"{text} {sign} {n}", after
    plus = sum(int(x) for x in text.replace("- ", "-").replace("+ ", "").split() if not x.startswith("-"))
    minus = -sum(int(x) for x in text.replace("- ", "-").replace("+ ", "").split() if x.startswith("-"))
    assert plus - minus == now
    steps.append(f"Check: the plus numbers make {plus}, the minus numbers {minus}. {plus} - {minus} = {now}.")
    return Exchange(grow(rng, ASK + " [t]?", t=text), result(rng, f"{text} = {now}", now), " ".join(steps),
                    key=f"chain {text}", expect=str(now))  # fmt: skip


@kind("order of operations", 4)
def order(rng: random.Random, again: bool) -> Exchange:
    a, b, c = rng.randint(2, 50), rng.randint(2, 12), rng.randint(2, 9)
    if rng.random() < 0.5:
        text, value = f"{a} + {b} x {c}", a + b * c
        why = f"Multiplication comes first: {b} x {c} = {b * c}. Then {a} + {b * c} = {value}. Check: {value} - {a} = {b * c}."
    else:
        a = rng.randint(2, 12)
        text, value = f"({a} + {b}) x {c}", (a + b) * c
        why = f"The brackets come first: {a} + {b} = {a + b}. Then {times(a + b, c)} Check: {a} x {c} = {a * c}, {b} x {c} = "
        why += f"{b * c}, and {a * c} + {b * c} = {value}."
    return Exchange(grow(rng, ASK + " [t]?", t=text), result(rng, f"{text} = {value}", value), why, key=f"order {text}",
                    expect=str(value))  # fmt: skip


@kind("remainder", 3)
def remainder(rng: random.Random, again: bool) -> Exchange:
    b, q = rng.randint(3, 9), rng.randint(3, 20)
    r = rng.randrange(b)
    a = b * q + r
    near = f"{b} x {q} = {b * q}. {a} - {b * q} = {r}, which is less than {b}."
    return Exchange(
        grow(rng, "{What is the remainder of [a] divided by [b]?|What is left over when you divide [a] by [b]?|What is [a] mod [b]?}", a=a, b=b),
        grow(rng, "{[r].|The remainder is [r].|[r]}", r=r),
        f"How often does {b} go into {a}? {near} {b} x {q + 1} = {b * (q + 1)} would be more than {a}. So the remainder is {r}.",
        key=f"remainder {a} {b}", expect=str(r),
    )  # fmt: skip


@kind("shopping", 6)
def shopping(rng: random.Random, again: bool) -> Exchange:
    who = rng.choice(NAMES)
    (x, y), p, q = rng.sample(FRUIT, 2), rng.randint(2, 9), rng.randint(2, 9)
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    total = p * m + q * n
    tale = f"{who} buys {m} {x} for {p} dollars each and {n} {y} for {q} dollars each."
    why = f"The {x}: {m} x {p} = {m * p}. The {y}: {n} x {q} = {n * q}. {m * p} + {n * q} = {total}."
    if rng.random() < 0.5:
        return Exchange(f"{tale} How much does {who} pay?", grow(rng, "{[t] dollars.|[w] pays [t] dollars.}", t=total, w=who),
                        f"{why} Check: {total} - {n * q} = {m * p}.", key=f"shopping {p} {m} {q} {n}", expect=str(total))  # fmt: skip
    note = -(-(total + 1) // 50) * 50
    left = note - total
    return Exchange(f"{tale} {who} pays with {note} dollars. How much change is there?",
                    grow(rng, "{[t] dollars.|The change is [t] dollars.}", t=left),
                    f"{why} The change: {note} - {total}: {take_away(note, total)} Check: {total} + {left} = {note}.",
                    key=f"change {p} {m} {q} {n}", expect=str(left))  # fmt: skip


@kind("who is tallest", 6)
def ordering(rng: random.Random, again: bool) -> Exchange:
    names = rng.sample(NAMES, rng.choice([3, 3, 4, 5]))
    more, most, least = rng.choice(
        [("taller", "tallest", "shortest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest")]
    )
    facts = [f"{a} is {more} than {b}." for a, b in itertools.pairwise(names)]
    rng.shuffle(facts)
    top = rng.random() < 0.5
    ask, who = (most, names[0]) if top else (least, names[-1])
    row = " > ".join(names)
    below = names[1:] if top else names[:-1]
    check = f"Check: nobody is {more} than {who}." if top else f"Check: {who} is {more} than nobody."
    return Exchange(f"{' '.join(facts)} Who is the {ask}?", grow(rng, "{[w].|[w] is the [a].}", w=who, a=ask),
                    f"Put them in a row by the facts: {row}. The {ask} stands {'first' if top else 'last'}: {who}. "
                    f"{check} The others, {listed(below)}, do not fit.",
                    key=" ".join(sorted(facts)) + ask, expect=who)  # fmt: skip


@kind("all are", 5)
def syllogism(rng: random.Random, again: bool) -> Exchange:
    a, b, c = rng.sample(THINGS, 3)
    form = rng.randrange(4)
    facts = [(f"All {a} are {b}.", f"All {b} are {c}."), (f"All {a} are {b}.", f"No {b} are {c}."),
             (f"All {a} are {b}.", f"All {c} are {b}."), (f"All {a} are {b}.", f"Some {b} are {c}.")][form]  # fmt: skip
    question = f"{' '.join(facts)} Are all {a} {c}?"
    if form == 0:
        return Exchange(question, f"Yes, all {a} are {c}.", f"Take any of the {a}. It is one of the {b}, since {facts[0].lower()[:-1]}. All {b} "
                        f"are {c}, so it is one of the {c}. That holds for every one. Yes.", expect="Yes")  # fmt: skip
    if form == 1:
        return Exchange(question, f"No, no {a} are {c}.", f"Take any of the {a}. It is one of the {b}. No {b} are {c}, so it is none of the {c}. "
                        "The answer is no.", expect="No")  # fmt: skip
    return Exchange(question, "That does not follow from this.", f"Take any of the {a}. It is one of the {b}. But only of {facts[1].lower()[:-1]} are we told: "
                    f"that does not say that each of the {b} is one of the {c}. It may be so or not. It does not follow.", expect="not follow")  # fmt: skip


@kind("true or false", 4)
def boolean(rng: random.Random, again: bool) -> Exchange:
    values = {n: rng.random() < 0.5 for n in rng.sample("ABCPQR", 2)}
    (x, vx), (y, vy) = values.items()
    said = {True: "true", False: "false"}
    nx = rng.random() < 0.5
    word = rng.choice(["and", "or"])
    left = vx != nx
    value = (left and vy) if word == "and" else (left or vy)
    text = f"{'not ' if nx else ''}{x} {word} {y}"
    steps = (
        f"{x} is {said[vx]}, so not {x} is {said[not vx]}. " if nx else f"{x} is {said[vx]}. "
    ) + f"{y} is {said[vy]}. "
    rule = "And needs both to be true." if word == "and" else "Or needs at least one to be true."
    return Exchange(f"{x} is {said[vx]} and {y} is {said[vy]}. Is ({text}) true or false?",
                    grow(rng, "{[v].|It is [v].}", v=said[value]).capitalize(),
                    f"{steps}{rule} We have {said[left]} {word} {said[vy]}. That is {said[value]}.",
                    key=f"bool {x}{vx} {y}{vy} {text}", expect=said[value])  # fmt: skip


@kind("day of the week", 4)
def weekday(rng: random.Random, again: bool) -> Exchange:
    i, n = rng.randrange(7), rng.randint(2, 60)
    weeks, rest = divmod(n, 7)
    walk = ", ".join(DAYS[(i + k) % 7] for k in range(1, rest + 1))
    day = DAYS[(i + n) % 7]
    steps = f"After 7 days it is {DAYS[i]} again. {n} = {weeks} x 7 + {rest}. "
    steps += (
        f"So count {rest} days on from {DAYS[i]}: {walk}. It is {day}." if rest else f"Nothing is left, so it is {day}."
    )
    return Exchange(grow(rng, "Today is [d]. {What day is it in [n] days?|Which day will it be in [n] days?}", d=DAYS[i], n=n),
                    grow(rng, "{[x].|It will be [x].}", x=day), steps, key=f"weekday {i} {n}", expect=day)  # fmt: skip


@kind("count words", 3)
def count_words(rng: random.Random, again: bool) -> Exchange:
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 9))]
    counted = ", ".join(f"{w} {i}" for i, w in enumerate(words, 1))
    return Exchange(grow(rng, "{How many words are in|Count the words in} '[t]'?", t=" ".join(words)),
                    grow(rng, "{[n].|[n] words.|There are [n] words.}", n=len(words)),
                    f"Count: {counted}. The last number is {len(words)}.", key="count words " + " ".join(words),
                    expect=str(len(words)), literal=True)  # fmt: skip


@kind("letter shift", 3)
def shift(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice([w for w in WORDS if 3 <= len(w) <= 5])
    n = rng.randint(1, 3)
    moved = [chr((ord(c) - 97 + n) % 26 + 97) for c in word]
    steps = " ".join(f"{c} -> {m}." for c, m in zip(word, moved, strict=True))
    value = "".join(moved)
    return Exchange(f"Shift each letter of '{word}' forward by {n} in the alphabet.", grow(rng, "{[v]|[v].|The result is [v].}", v=value),
                    f"Letter by letter, {n} forward: {steps} Together: {value}. Both have {len(word)} letters.",
                    key=f"shift {word} {n}", expect=value, literal=True)  # fmt: skip


@kind("unknown number", 4)
def unknown(rng: random.Random, again: bool) -> Exchange:
    x, a, b = rng.randint(2, 30), rng.randint(2, 9), rng.randint(1, 40)
    if rng.random() < 0.5:
        text, why = (
            f"x + {b} = {x + b}",
            f"Take {b} from both sides: x = {x + b} - {b} = {x}. Check: {x} + {b} = {x + b}.",
        )
    else:
        text = f"{a}x + {b} = {a * x + b}"
        why = f"Take {b} from both sides: {a}x = {a * x + b} - {b} = {a * x}. Divide by {a}: x = {x}. Check: {a} x {x} = {a * x}, "
        why += f"{a * x} + {b} = {a * x + b}."
    return Exchange(grow(rng, "{Solve for x: [t]|What is x if [t]?|Find x: [t]}", t=text), grow(rng, "{x = [x]|x = [x].|x is [x].}", x=x), why,
                    key=f"unknown {text}", expect=str(x), literal=True)  # fmt: skip
