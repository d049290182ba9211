"""Numbers: each exercise with steps that a very small network can learn, and a check that would show a mistake.

Two-digit numbers are taken apart first ("27 is 20 + 7"), because the tokenizer may hold them as one piece.
"""

from __future__ import annotations

import itertools
import random

from exact_base import Exchange, capital, grow, kind, listed

TELL = "{What is|What's|Tell me|Can you tell me|Calculate|Work out|Do you know}"
ASK = "{|}{What is|What's|How much is|Calculate|Work out|Can you calculate|Please calculate|Compute|Solve}"
FRUIT = [
    "apples",
    "pears",
    "cookies",
    "books",
    "marbles",
    "stickers",
    "coins",
    "balloons",
    "pencils",
    "shells",
    "nuts",
    "flowers",
    "stamps",
    "eggs",
    "cards",
]
NAMES = [
    "Tom",
    "Anna",
    "Ben",
    "Mia",
    "Sam",
    "Lily",
    "Max",
    "Nina",
    "Leo",
    "Rosa",
    "Paul",
    "Ella",
    "Finn",
    "Ruby",
    "Jack",
    "Zoe",
    "Ivy",
    "Noah",
    "Clara",
    "Hugo",
]
ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number(rng: random.Random) -> int:
    """Up to two digits; small ones more often, as in what people ask."""
    return rng.randint(1, 9) if rng.random() < 0.25 else rng.randint(1, 99)


def in_words(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n == 100:
        return "one hundred"
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def parts(n: int) -> str:
    return f"{n} is {n // 10 * 10} + {n % 10}."


def add_steps(a: int, b: int) -> str:
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}. Check: {a + b} - {b} = {a}."
    ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    assert ones + tens == a + b
    return (
        f"{parts(a)} {parts(b)} {a % 10} + {b % 10} = {ones}. {a // 10 * 10} + {b // 10 * 10} = {tens}. "
        f"{tens} + {ones} = {a + b}. Check: {a + b} - {b} = {a}."
    )


def sub_steps(a: int, b: int) -> str:
    if a < 10:
        return f"{a} - {b} = {a - b}. Check: {a - b} + {b} = {a}."
    tens = b // 10 * 10
    between = a - tens
    assert between - b % 10 == a - b >= 0
    return f"{parts(b)} {a} - {tens} = {between}. {between} - {b % 10} = {a - b}. Check: {a - b} + {b} = {a}."


def number_answer(rng: random.Random, claim: str, value: object) -> str:
    return grow(rng, "{[v].|[v]|[c].|It is [v].|The answer is [v].|That is [v].|[c].}", v=value, c=claim)


@kind("add", 9, again=True)
def add(rng: random.Random, again: bool) -> Exchange:
    a, b = number(rng), number(rng)
    ask = "{And|What about|How about|Now} [a] {+|plus} [b]?" if again else "{" + ASK + " |}[a] {+|plus|+} [b]?"
    claim = f"{a} + {b} = {a + b}"
    return Exchange(
        grow(rng, ask, a=a, b=b).removesuffix("?") + rng.choice(["?", "?", " = ?"] if not again else ["?"]),
        number_answer(rng, claim, a + b),
        f"{a} + {b}: {add_steps(a, b)}",
        key=f"add {a} {b}",
        expect=str(a + b),
        sure=f"{claim}, because {a + b} - {b} = {a}.",
    )


@kind("subtract", 8, again=True)
def subtract(rng: random.Random, again: bool) -> Exchange:
    a, b = sorted((number(rng), number(rng)), reverse=True)
    ask = "{And|What about|How about|Now} [a] {-|minus} [b]?" if again else "{" + ASK + " |}[a] {-|minus|-} [b]?"
    claim = f"{a} - {b} = {a - b}"
    return Exchange(
        grow(rng, ask, a=a, b=b),
        number_answer(rng, claim, a - b),
        f"{a} - {b}: {sub_steps(a, b)}",
        key=f"subtract {a} {b}",
        expect=str(a - b),
        sure=f"{claim}, because {a - b} + {b} = {a}.",
    )


@kind("multiply", 5, again=True)
def multiply(rng: random.Random, again: bool) -> Exchange:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    ask = "{And|What about|How about|Now} [a] {x|times} [b]?" if again else "{" + ASK + " |}[a] {x|times|*} [b]?"
    claim = f"{a} x {b} = {a * b}"
    steps = ", ".join(str(a * i) for i in range(1, b + 1))
    return Exchange(
        grow(rng, ask, a=a, b=b),
        number_answer(rng, claim, a * b),
        f"{a} x {b}: count by {a}, {b} times: {steps}. So {claim}. Check: {b} x {a} = {a * b}.",
        expect=str(a * b),
        sure=f"{claim}, because {b} times {a} is {a * b}.",
    )


@kind("divide", 2.5, again=True)
def divide(rng: random.Random, again: bool) -> Exchange:
    b, c = rng.randint(2, 9), rng.randint(1, 9)
    a = b * c
    ask = "{And|What about} [a] divided by [b]?" if again else "{" + ASK + " |}[a] {divided by|/} [b]?"
    steps = ", ".join(str(b * i) for i in range(1, c + 1))
    return Exchange(
        grow(rng, ask, a=a, b=b),
        number_answer(rng, f"{a} / {b} = {c}", c),
        f"{a} / {b}: count by {b} up to {a}: {steps}. That is {c} steps. Check: {b} x {c} = {a}.",
        expect=str(c),
        sure=f"{a} / {b} = {c}, because {b} x {c} = {a}.",
    )


@kind("compare", 4, again=True)
def compare(rng: random.Random, again: bool) -> Exchange:
    a, b = rng.sample(range(1, 100), 2)
    big = rng.random() < 0.6
    word = rng.choice(["bigger", "larger", "greater"] if big else ["smaller", "less"])
    right = max(a, b) if big else min(a, b)
    other = a + b - right
    ask = (
        "{And|What about} [a] or [b]{| - which is [w]}?"
        if again
        else "{Which {number |}is [w]{, |: }[a] or [b]?|Is [a] or [b] [w]?|[a] or [b], which is [w]?|What is [w], [a] or [b]?}"
    )
    ask = ask.replace("{| - which is [w]}", ", which is [w]")
    left_tens, right_tens = a // 10, b // 10
    if left_tens != right_tens:
        why = f"{a} has {left_tens} tens. {b} has {right_tens} tens. {max(left_tens, right_tens)} is more than "
        why += f"{min(left_tens, right_tens)}, so {max(a, b)} is bigger and {min(a, b)} is smaller."
    else:
        why = f"{a} and {b} both have {left_tens} tens. The ones are {a % 10} and {b % 10}. "
        why += f"{max(a, b) % 10} is more than {min(a, b) % 10}, so {max(a, b)} is bigger and {min(a, b)} is smaller."
    than = f"{right} is {word} than {other}"
    return Exchange(
        grow(rng, ask, a=a, b=b, w=word),
        grow(rng, "{[r].|[r] is [w].|[t].|The [w] number is [r].}", r=right, w=word, t=than).replace(
            "The less number", "The smaller number"
        ),
        f"{why} The question asks for the {'bigger' if big else 'smaller'} one: {right}.",
        key=f"compare {min(a, b)} {max(a, b)}",
        expect=str(right),
        sure=f"{than}, because {max(a, b)} - {min(a, b)} = {abs(a - b)}.",
    )


@kind("is it bigger", 2)
def is_bigger(rng: random.Random, again: bool) -> Exchange:
    a, b = rng.sample(range(1, 100), 2)
    word, truth = rng.choice([("bigger", a > b), ("smaller", a < b)])
    sign = "more" if a > b else "less"
    return Exchange(
        grow(rng, "{Is [a] [w] than [b]?|True or false: [a] is [w] than [b].}", a=a, b=b, w=word),
        f"{'Yes' if truth else 'No'}, {a} is {word if truth else ('bigger' if a > b else 'smaller')} than {b}."
        if rng.random() < 0.6
        else ("Yes." if truth else "No."),
        f"{a} - is it {word} than {b}? {a} is {sign} than {b}, so the answer is {'yes' if truth else 'no'}.",
        key=f"compare {min(a, b)} {max(a, b)}",
        expect="Yes" if truth else "No",
    )


@kind("half", 2.5, again=True)
def half(rng: random.Random, again: bool) -> Exchange:
    h = rng.randint(1, 50)
    ask = "{And|What about} half of [n]?" if again else "{" + TELL + "} half of [n]?"
    steps = f"{h // 5 * 5} + {h // 5 * 5} = {h // 5 * 10}. " if h % 5 and h > 5 else ""
    return Exchange(
        grow(rng, ask.replace("{{", "{").replace("}}", "}"), n=2 * h),
        number_answer(rng, f"Half of {2 * h} is {h}", h),
        f"Half of {2 * h}: {steps}{h} + {h} = {2 * h}. So half of {2 * h} is {h}.",
        expect=str(h),
        sure=f"Half of {2 * h} is {h}, because {h} + {h} = {2 * h}.",
    )


@kind("double", 2.5, again=True)
def double(rng: random.Random, again: bool) -> Exchange:
    n = rng.randint(1, 99)
    ask = "{And|What about} {double|twice} [n]?" if again else TELL + " {double|twice|two times} [n]?"
    return Exchange(
        grow(rng, ask, n=n),
        number_answer(rng, f"Double {n} is {2 * n}", 2 * n),
        f"Double {n} is {n} + {n}. {add_steps(n, n)}",
        key=f"double {n}",
        expect=str(2 * n),
        sure=f"Double {n} is {2 * n}, because {n} + {n} = {2 * n}.",
    )


@kind("even or odd", 3, again=True)
def parity(rng: random.Random, again: bool) -> Exchange:
    n = rng.randint(1, 200) if rng.random() < 0.8 else rng.randint(201, 999)
    word, wrong = ("even", "odd") if n % 2 == 0 else ("odd", "even")
    why = f"The last digit of {n} is {n % 10}. {n % 10} is {word}, so {n} is {word}."
    if not again and rng.random() < 0.4:
        said = rng.choice([word, wrong])
        truth = said == word
        return Exchange(
            grow(rng, "{Is [n] [s]?|Is [n] an [s] number?|Is the number [n] [s]?}", n=n, s=said).replace(
                "an even", "an even"
            ),
            f"{'Yes' if truth else 'No'}, {n} is {word}.",
            why + f" So the answer is {'yes' if truth else 'no'}.",
            key=f"parity {n}",
            expect="Yes" if truth else "No",
        )
    ask = (
        "{And|What about} [n]{|, even or odd}?"
        if again
        else "{Is [n] even or odd?|Even or odd: [n]?|[n]: even or odd?|Is the number [n] odd or even?}"
    )
    return Exchange(
        grow(rng, ask.replace("{|, even or odd}", ", even or odd"), n=n),
        grow(rng, "{[w].|[n] is [c].|It is [c].|[n] is an [c] number.}", n=n, w=capital(word), c=word),
        why,
        key=f"parity {n}",
        expect=word if rng else "",
        sure=f"{n} is {word}, because its last digit is {n % 10}.",
    )


@kind("sequence", 4)
def sequence(rng: random.Random, again: bool) -> Exchange:
    length = rng.choice([3, 4, 4, 5])
    if rng.random() < 0.12:
        start = rng.randint(1, 5)
        shown = [start * 2**i for i in range(length)]
        nxt = shown[-1] * 2
        why = " ".join(f"{x} x 2 = {y}." for x, y in itertools.pairwise(shown))
        why += f" Each number is double the one before. {shown[-1]} x 2 = {nxt}."
    else:
        step = rng.choice([1, 2, 3, 4, 5, 10, 2, 5, 10, 6, 7])
        up = rng.random() < 0.7
        low = rng.randint(0, 99 - step * length) if step * length < 90 else rng.randint(0, 9)
        shown = [low + step * i for i in range(length + 1)]
        if not up:
            shown.reverse()
        *shown, nxt = shown
        sign = "+" if up else "-"
        why = " ".join(f"{x} {sign} {step} = {y}." for x, y in itertools.pairwise(shown))
        why += f" The step is {sign}{step}. {shown[-1]} {sign} {step} = {nxt}."
    row = ", ".join(map(str, shown))
    ask = "{What comes next{:|?}|What is the next number{:|?}|Continue:|Which number comes next{:|?}|What number is next:} [r], ...{?|}"
    return Exchange(
        grow(rng, ask, r=row),
        grow(rng, "{[n].|The next number is [n].|It is [n].|Next comes [n].|[n]}", n=nxt),
        f"{row}: {why}",
        key=f"sequence {row}",
        expect=str(nxt),
    )


@kind("after a number", 2, again=True)
def neighbour(rng: random.Random, again: bool) -> Exchange:
    n = rng.randint(1, 99)
    word, value = rng.choice([("after", n + 1), ("before", n - 1)])
    ask = "{And|What about the number} [w] [n]?" if again else "{What|Which} number comes {right |just |}[w] [n]?"
    sign = "+" if word == "after" else "-"
    return Exchange(
        grow(rng, ask, n=n, w=word),
        grow(rng, "{[v].|[v] comes [w] [n].|It is [v].|The number [w] [n] is [v].}", v=value, n=n, w=word),
        f"{capital(word)} {n}: {n} {sign} 1 = {value}.",
        key=f"{word} {n}",
        expect=str(value),
    )


@kind("largest", 3)
def largest(rng: random.Random, again: bool) -> Exchange:
    numbers = rng.sample(range(1, 100), rng.choice([3, 3, 4]))
    big = rng.random() < 0.6
    word = rng.choice(["largest", "biggest"] if big else ["smallest"])
    best = numbers[0]
    steps = [f"Start with {best}."]
    for n in numbers[1:]:
        better = n > best if big else n < best
        steps.append(f"{n} is {'bigger' if n > best else 'smaller'}, so {'take' if better else 'keep'} "
                     f"{n if better else best}.")  # fmt: skip
        best = n if better else best
    assert best == (max if big else min)(numbers)
    ask = "{Which {number |}is the [w]{: |, }[l]?|What is the [w] of [l]?|Find the [w] number: [l].}"
    shown = rng.choice([", ".join(map(str, numbers)), listed([str(n) for n in numbers], "or")])
    return Exchange(
        grow(rng, ask, w=word, l=shown),
        grow(rng, "{[b].|[b] is the [w].|The [w] number is [b].|It is [b].}", b=best, w=word),
        " ".join(steps) + f" The {word} is {best}.",
        key=f"largest {sorted(numbers)}",
        expect=str(best),
    )


@kind("sort numbers", 2.5)
def sort_numbers(rng: random.Random, again: bool) -> Exchange:
    numbers = rng.sample(range(1, 100), rng.choice([3, 3, 4]))
    left, taken, steps = list(numbers), [], []
    while left:
        least = min(left)
        steps.append(f"The smallest of {', '.join(map(str, left))} is {least}." if len(left) > 1 else f"Last: {least}.")
        taken.append(least)
        left.remove(least)
    row = ", ".join(map(str, taken))
    ask = "{Sort these numbers|Put these numbers in order|Order these numbers|Sort from small to large}: [l]."
    return Exchange(
        grow(rng, ask, l=", ".join(map(str, numbers))),
        grow(rng, "{[r].|[r]|In order: [r].|Here they are in order: [r].}", r=row),
        " ".join(steps) + f" So: {row}.",
        key=f"sort {numbers}",
        expect=row,
    )


@kind("story problem", 5)
def story(rng: random.Random, again: bool) -> Exchange:
    who, other = rng.sample(NAMES, 2)
    what = rng.choice(FRUIT)
    one = what[:-1]
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    if rng.random() < 0.5:
        tale = (
            "[w] has [a] [t]{ and|. [w]} {gets|finds|buys} [b] more{|[_][t]}. How many [t] does [w] have {now|in all}?"
        )
        result, sign = a + b, "+"
        steps, verb = add_steps(a, b), "gets"
    else:
        a, b = max(a, b) + 1, min(a, b)
        tale = "[w] has [a] [t]{ and|. [w]} {gives [b] to [o]|gives [o] [b] of them|loses [b] of them}. "
        tale += "How many [t] {are left|does [w] have left|does [w] have now}?"
        result, sign = a - b, "-"
        steps, verb = sub_steps(a, b), "has fewer by"
    noun = one if result == 1 else what
    return Exchange(
        grow(rng, tale, w=who, a=a, b=b, t=what, o=other, _=" "),
        grow(rng, "{[w] has [r] [t].|[r] [t].|[w] has [r] [t] now.|[r].}", w=who, r=result, t=noun),
        f"{who} has {a} and {verb} {b}: {a} {sign} {b}. {steps} So {who} has {result} {noun}.",
        key=f"{'add' if sign == '+' else 'subtract'} {a} {b}",
        expect=str(result),
        sure=f"{a} {sign} {b} = {result}.",
    )


@kind("number words", 2, again=True)
def number_words(rng: random.Random, again: bool) -> Exchange:
    n = rng.randint(0, 100)
    word = in_words(n)
    if rng.random() < 0.5:
        ask = "{And|What about} [n]{| in words}?" if again else "{How do you write|Write|What is} [n] in words?"
        answer, expect = "{[c].|[n] in words is [w].|It is [w].}", word
        ask = ask.replace("{| in words}", " in words")
    else:
        ask = (
            "{And|What about} [w] as a number?"
            if again
            else "{Write|How do you write|What is} [w] {as a number|in digits}?"
        )
        answer, expect = "{[n].|[n]|[c] is [n].|It is [n].}", str(n)
    steps = (
        f"{n} is {n // 10 * 10} and {n % 10}: {TENS[n // 10]} and {ONES[n % 10]}. " if 20 < n < 100 and n % 10 else ""
    )
    return Exchange(
        grow(rng, ask, n=n, w=word),
        grow(rng, answer, n=n, w=word, c=capital(word)),
        f"{steps}{n} is written {word}.",
        expect=expect,
    )


@kind("count up", 2)
def count_up(rng: random.Random, again: bool) -> Exchange:
    step = rng.choice([1, 1, 1, 2, 5, 10])
    start = rng.randint(1, 20) if step == 1 else step * rng.randint(0, 5)
    end = start + step * rng.randint(3, 9)
    row = list(range(start, end + 1, step))
    how = "" if step == 1 else f" by {in_words(step)}s" if rng.random() < 0.5 else f" in steps of {step}"
    if step == 1 and rng.random() < 0.3:
        row.reverse()
        how = " backwards" if rng.random() < 0.5 else " down"
    shown = ", ".join(map(str, row))
    return Exchange(
        grow(
            rng,
            "{Count[h] from [a] to [b].|Can you count[h] from [a] to [b]?|Please count[h] from [a] to [b].}",
            h=how,
            a=row[0],
            b=row[-1],
        ),
        grow(rng, "{[r].|[r]|Sure: [r].}", r=shown),
        f"Start at {row[0]}, {'add' if row[-1] > row[0] else 'take away'} {step} each time, stop at {row[-1]}.",
        expect=shown,
    )
