"""Letters and words: spelling, order, forms of words, lists, and small instructions to follow to the letter."""

from __future__ import annotations

import random

from exact_base import Exchange, a, capital, grow, kind, listed
from words_letters import (
    IRREGULAR_PLURALS,
    LISTS,
    MEMBERS,
    OPPOSITES,
    PAST,
    REGULAR_PLURALS,
    REGULAR_VERBS,
    RHYMES,
    SHORT,
)
from words_sentences import SAYINGS, SENTENCES

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DAYS, MONTHS = LISTS["days of the week"], LISTS["months"]
DAYS_IN = dict(zip(MONTHS, [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], strict=True))
ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
THE_WORD = "{the word |}{[w]|'[w]'|\"[w]\"}"


def nth(n: int) -> str:
    tail = "th" if n in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{tail}"


def counted(word: str) -> str:
    return ", ".join(f"{c} {i}" for i, c in enumerate(word, 1))


@kind("count letters", 3.5, again=True)
def count_letters(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice(SHORT)
    ask = (
        "{And in|What about|And how many in} " + THE_WORD + "?"
        if again
        else "{How many letters {are in|does} [W]{|}?|Count the letters in [W].|How long is [W], in letters?}"
    )
    ask = ask.replace("{are in|does} [W]{|}", "are {in|there in} [W]").replace("[W]", THE_WORD)
    ask = ask.replace("{What about|", "{")
    n = len(word)
    return Exchange(
        grow(rng, ask, w=word),
        grow(
            rng,
            "{[n].|[c] has [n] letters.|There are [n] letters in [w].|It has [n] letters.|[n] letters.}",
            n=n,
            w=word,
            c=capital(word),
        ),
        f"{word}: {counted(word)}. So {word} has {n} letters.",
        key=f"letters {word}",
        expect=str(n),
        sure=f"{word} is spelled {'-'.join(word)}, and that is {n} letters.",
    )


@kind("count one letter", 3)
def count_one(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice(SHORT)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiost")
    n = word.count(letter)
    marks, so_far = [], 0
    for c in word:
        so_far += c == letter
        marks.append(f"{c} {so_far}" if c == letter else c)
    times = "once" if n == 1 else "twice" if n == 2 else f"{n} times"
    said = f"The letter {letter} is in {word} {times}." if n else f"There is no {letter} in {word}."
    ask = "{How many times is the letter [l] in [W]?|How many [l]'s are in [W]?|Count the letter [l] in [W].}"
    return Exchange(
        grow(rng, ask.replace("[W]", THE_WORD), w=word, l=letter),
        grow(rng, "{[n].|[s]}", n=n, s=said) if n else rng.choice(["0.", said]),
        f"{word}: {', '.join(marks)}. So {letter} occurs {n} times in {word}.".replace(" 1 times", " 1 time"),
        key=f"one letter {word} {letter}",
    )


@kind("spell", 3.5, again=True)
def spell(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice(SHORT)
    ask = (
        "{And|What about|Now} " + THE_WORD + "?"
        if again
        else "{How do you spell|Spell|Can you spell|Please spell} [W]?"
    )
    ask = ask.replace("[W]", THE_WORD)
    text = grow(rng, ask, w=word)
    if text.startswith(("Spell", "Please")):
        text = text[:-1] + "."
    spelled = "-".join(word)
    return Exchange(
        text,
        grow(rng, "{[s].|[c] is spelled [s].|It is spelled [s].}", s=spelled, c=capital(word)),
        f"{word}: {', '.join(word)}. With dashes: {spelled}.",
        expect=spelled,
    )


@kind("backwards", 3.5)
def backwards(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice([w for w in SHORT if len(w) < 7])
    turned = word[::-1]
    ask = "{Spell [W] backwards.|What is [W] spelled backwards?|Write [W] backwards.|Reverse [W].|Can you reverse [W]?}"
    return Exchange(
        grow(rng, ask.replace("[W]", THE_WORD), w=word),
        grow(rng, "{[t].|[c] backwards is [t].|It is [t].|[t]}", t=turned, c=capital(word)),
        f"{word}: {', '.join(word)}. From the end: {', '.join(turned)}. So: {turned}.",
        key=f"backwards {word}",
        expect=turned,
    )


@kind("first letter", 3.5, again=True)
def first_letter(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice(SHORT)
    place = rng.choice(["first", "last", "first", "last", "second", "third"])
    letter = word[{"first": 0, "last": -1, "second": 1, "third": 2}[place]]
    ask = "And the [p] letter of [W]?" if again else "{What is|What's|Tell me|Which is} the [p] letter {of|in} [W]?"
    return Exchange(
        grow(rng, ask.replace("[W]", THE_WORD), w=word, p=place),
        grow(
            rng,
            "{[l].|The [p] letter of [w] is [l].|It is [l].|[w]: the [p] letter is [l].}",
            l=letter,
            p=place,
            w=word,
        ),
        f"{word}: {', '.join(word)}. The {place} letter is {letter}.",
    )


@kind("alphabet", 3.5, again=True)
def alphabet(rng: random.Random, again: bool) -> Exchange:
    roll = rng.random()
    if roll < 0.6 or again:
        i = rng.randint(1, 24)
        word, found = rng.choice([("after", ALPHABET[i + 1]), ("before", ALPHABET[i - 1])])
        letter = ALPHABET[i]
        ask = "{And|What about the letter} [w] [l]?" if again else (
            "{What|Which} letter comes {right |just |}[w] [l]{| in the alphabet}?")  # fmt: skip
        run = ", ".join(ALPHABET[max(0, i - 2) : i + 3])
        return Exchange(
            grow(rng, ask, w=word, l=letter),
            grow(rng, "{[f].|[f] comes [w] [l].|It is [f].|The letter [w] [l] is [f].}", f=found, w=word, l=letter),
            f"The alphabet near {letter}: {run}. {capital(word)} {letter} comes {found}.",
        )
    if roll < 0.85:
        x, y = rng.sample(ALPHABET, 2)
        first, second = sorted((x, y))
        run = ", ".join(ALPHABET[ALPHABET.index(first) : ALPHABET.index(second) + 1])
        return Exchange(
            grow(
                rng,
                "{Which letter comes first{| in the alphabet}, [x] or [y]?|Does [x] or [y] come first in the "
                "alphabet?}",
                x=x,
                y=y,
            ),
            grow(rng, "{[f].|[f] comes first.|[f] comes before [s].}", f=first, s=second),
            f"{first} to {second}: {run}. So {first} comes before {second}.",
        )
    i = rng.randint(0, 25)
    run = ", ".join(ALPHABET[: i + 1])
    return Exchange(
        grow(rng, "{What is|Which is|Tell me} the [n] letter of the alphabet?", n=nth(i + 1)),
        grow(rng, "{[l].|It is [l].|The [n] letter of the alphabet is [l].}", l=ALPHABET[i], n=nth(i + 1)),
        f"{run}. The {nth(i + 1)} letter is {ALPHABET[i]}.",
    )


@kind("sort words", 3.5)
def sort_words(rng: random.Random, again: bool) -> Exchange:
    words: list[str] = []
    size = rng.choice([2, 3, 3, 4])
    while len(words) < size:
        word = rng.choice(SHORT)
        if word[0] not in {w[0] for w in words}:
            words.append(word)
    ordered = sorted(words)
    row = ", ".join(ordered)
    ask = "{Put these words in alphabetical order|Sort these words|Sort alphabetically|Alphabetical order, please}: [l]{.|}"
    return Exchange(
        grow(rng, ask, l=", ".join(words)),
        grow(rng, "{[r].|[r]|In alphabetical order: [r].|Here they are: [r].}", r=row),
        f"The first letters are {listed([w[0] for w in words])}. In the alphabet: {', '.join(w[0] for w in ordered)}. "
        f"So: {row}.",
        key=f"sort {words}",
        expect=row,
    )


@kind("longer word", 2)
def longer(rng: random.Random, again: bool) -> Exchange:
    x, y = rng.sample(SHORT, 2)
    while len(x) == len(y):
        x, y = rng.sample(SHORT, 2)
    word, best = rng.choice([("longer", max(x, y, key=len)), ("shorter", min(x, y, key=len))])
    return Exchange(
        grow(rng, "{Which word is [w], [x] or [y]?|Which is the [w] word: [x] or [y]?}", w=word, x=x, y=y),
        grow(rng, "{[b].|[b] is [w].|The [w] word is [b].}", w=word, b=best),
        f"{x}: {counted(x)}. {y}: {counted(y)}. {len(x)} and {len(y)}: {best} is {word}.",
        key=f"longer {sorted((x, y))}",
        expect=best,
    )


@kind("vowel", 1.5)
def vowel(rng: random.Random, again: bool) -> Exchange:
    letter = rng.choice("abcdefghijklmnopqrstuvwxz")
    said = "a vowel" if letter in "aeiou" else "a consonant"
    return Exchange(
        grow(rng, "{Is [l] a vowel{| or a consonant}?|Is the letter [l] a vowel{| or a consonant}?}", l=letter.upper()),
        grow(rng, "{[u] is [s].|The letter [u] is [s].}", u=letter.upper(), s=said),
        f"The vowels are a, e, i, o, u. {letter} is {'' if said == 'a vowel' else 'not '}one of them, so it is {said}.",
        expect=said,
    )


@kind("days", 3.5, again=True)
def days(rng: random.Random, again: bool) -> Exchange:
    return _around(rng, again, "day", DAYS)


@kind("months", 3.5, again=True)
def months(rng: random.Random, again: bool) -> Exchange:
    roll = rng.random()
    if again or roll < 0.6:
        return _around(rng, again, "month", MONTHS)
    if roll < 0.8:
        month = rng.choice(MONTHS)
        n = DAYS_IN[month]
        said = f"{month} has {n} days" + (", and 29 in a leap year." if n == 28 else ".")
        return Exchange(
            grow(rng, "{How many days does [m] have?|How many days are in [m]?|How long is [m]?}", m=month),
            said,
            f"January, March, May, July, August, October and December have 31 days, February has 28, the others 30. "
            f"So {month} has {n}.",
            expect=str(n),
        )
    i = rng.randrange(12)
    return Exchange(
        grow(rng, "{What|Which} is the [o] month{| of the year}?", o=ORDINALS[i]),
        grow(rng, "{[m].|The [o] month is [m].|It is [m].}", o=ORDINALS[i], m=MONTHS[i]),
        f"{', '.join(MONTHS[: i + 1])}. The {ORDINALS[i]} month is {MONTHS[i]}.",
        expect=MONTHS[i],
    )


def _around(rng: random.Random, again: bool, unit: str, names: list[str]) -> Exchange:
    i, size = rng.randrange(len(names)), len(names)
    word, sign = rng.choice([("after", 1), ("before", -1)])
    far = 1 if again or rng.random() < 0.65 else rng.randint(2, 4)
    found = names[(i + sign * far) % size]
    walk = ", ".join(names[(i + sign * k) % size] for k in range(far + 1))
    if far == 1:
        ask = "{And [w]|What about the [u] [w]} [n]?" if again else "{What|Which} [u] comes {right |just |}[w] [n]?"
        said = "{[f].|[f] comes [w] [n].|It is [f].|The [u] [w] [n] is [f].}"
    else:
        ask = "{What|Which} [u] is [k] [u]s [w] [n]?"
        said = "{[f].|It is [f].|[K] [u]s [w] [n] is [f].}"
    number = COUNTS[far]
    slots = {"w": word, "u": unit, "n": names[i], "k": number, "K": capital(number), "f": found}
    return Exchange(
        grow(rng, ask, **slots),
        grow(rng, said, **slots),
        f"{capital(number)} {word} {names[i]}: {walk}. So it is {found}.",
        expect=found,
    )


@kind("opposite", 4, again=True)
def opposite(rng: random.Random, again: bool) -> Exchange:
    x, y = rng.choice(OPPOSITES).split()
    if sum(x in pair.split() for pair in OPPOSITES) == 1 and rng.random() < 0.4:
        x, y = (y, x) if sum(y in pair.split() for pair in OPPOSITES) == 1 else (x, y)
    right = [p.split()[1] for p in OPPOSITES if p.split()[0] == x] if y != x else [y]
    ask = (
        "{And|What about|And of} [w]?"
        if again
        else "{What is|What's|Tell me|Can you tell me|Do you know} the opposite of [w]?"
    )
    ask = ask if again else ask.replace("[w]", "{[w]|'[w]'}")
    return Exchange(
        grow(rng, ask, w=x),
        grow(rng, "{[c].|The opposite of [x] is [y].|It is [y].|[y]}", c=capital(y), x=x, y=y),
        f"I turn {x} around: not {x} but {y}. The opposite of {x} is {y}.",
        expect=y if len(right) < 2 else "",
    )


@kind("plural", 4, again=True)
def plural(rng: random.Random, again: bool) -> Exchange:
    if rng.random() < 0.4:
        word, many = rng.choice(IRREGULAR_PLURALS).split()
        why = f"{word} does not take a plain s. The plural is {many}."
        if word == many:
            why = f"{word} does not change. The plural is {many}."
    else:
        word = rng.choice(REGULAR_PLURALS)
        if word.endswith("y") and word[-2] not in "aeiou":
            many, why = word[:-1] + "ies", f"{word} ends in {word[-2]} and y, so y becomes ies"
        elif word.endswith(("s", "x", "ch", "sh")) or word in ("potato", "tomato", "hero"):
            many, why = word + "es", f"{word} ends in {word[-2:]}, so it takes es"
        else:
            many, why = word + "s", f"{word} takes a plain s"
        why += f": {many}."
    ask = (
        "{And|What about|And of} [w]?"
        if again
        else "{What is|What's|Tell me} the plural of {[w]|'[w]'}?|What is more than one [w] called?|One [w], two ...?"
    )
    ask = ask if again else "{" + ask.replace("{What is|What's|Tell me}", "What is") + "}"
    return Exchange(
        grow(rng, ask, w=word),
        grow(rng, "{[c].|The plural of [w] is [m].|One [w], two [m].|It is [m].}", c=capital(many), w=word, m=many),
        why,
        expect=many if many != word else "",
    )


@kind("past tense", 4, again=True)
def past(rng: random.Random, again: bool) -> Exchange:
    if rng.random() < 0.5:
        word, was = rng.choice(PAST).split()
        why = f"{word} is an irregular verb: today I {word}, yesterday I {was}."
    else:
        word = rng.choice(REGULAR_VERBS)
        if word.endswith("e"):
            was, how = word + "d", "it ends in e, so add d"
        elif word.endswith("y") and word[-2] not in "aeiou":
            was, how = word[:-1] + "ied", "y becomes ied"
        elif word in ("stop", "plan", "drop", "hop", "clap", "hug", "shop", "jog"):
            was, how = word + word[-1] + "ed", "double the last letter and add ed"
        else:
            was, how = word + "ed", "add ed"
        why = f"{word} is a regular verb: {how}. Today I {word}, yesterday I {was}."
    ask = (
        "{And|What about|And of} [w]?"
        if again
        else "{What is the past tense of {[w]|'[w]'|to [w]}?|Past tense of [w]?|Give me the past tense of [w].|"
        "Today I [w]. Yesterday I ...?}"
    )
    while "{[w]|'[w]'|to [w]}" in ask:
        ask = ask.replace("{[w]|'[w]'|to [w]}", rng.choice(["[w]", "'[w]'", "to [w]"]))
    return Exchange(
        grow(rng, ask, w=word),
        grow(rng, "{[c].|The past tense of [w] is [p].|It is [p].|Yesterday I [p].}", c=capital(was), w=word, p=was),
        why,
        expect=was,
    )


@kind("rhyme", 3, again=True)
def rhyme(rng: random.Random, again: bool) -> Exchange:
    group = rng.choice(RHYMES).split()
    word, *found = rng.sample(group, len(group))
    ask = (
        "{And|What about|And with} [w]?"
        if again
        else "{What rhymes with [W]?|Tell me a word that rhymes with [W].|Give me a rhyme for [W].|Which word rhymes with [W]?"
        "|Find a rhyme for [W].}"
    )
    one = found[0]
    return Exchange(
        grow(rng, ask.replace("[W]", rng.choice(["[w]", "'[w]'"])), w=word),
        grow(rng, "{[c].|[c] rhymes with [w].|A rhyme for [w] is [o].}", c=capital(one), w=word, o=one)
        if len(found) < 2 or rng.random() < 0.7
        else f"{capital(listed(found[:2]))} rhyme with {word}.",
        f"Words that sound like {word} at the end: {', '.join(found)}. I take {one}.",
    )


@kind("member", 3.5, again=True)
def member(rng: random.Random, again: bool) -> Exchange:
    one, other = rng.sample(sorted(MEMBERS), 2)
    item = rng.choice([x for x in LISTS[MEMBERS[one]] if "_" not in x])
    proper = item[0].isupper()
    thing = item if proper or one in ("color", "sport") else a(item)
    asked = one if rng.random() < 0.5 else other
    roles = [m for m in MEMBERS if item in LISTS[MEMBERS[m]] or item.lower() in LISTS[MEMBERS[m]]]
    if one == "animal" or item == "orange" or (asked == "animal" and one == "insect") or len(roles) > 1:
        asked = one
        roles = [one]
    truth = asked == one
    ask = "{And|What about} [t], is it [k]?" if again else "{Is [t] [k]?|Is [t] [k]?|True or false: [t] is [k].}"
    fact = f"{thing} is {a(one)}"
    return Exchange(
        capital(grow(rng, ask, t=thing, k=a(asked))),
        grow(rng, "{[y].|[y], [f].|[y], [f].}", y="Yes" if truth else "No", f=fact),
        f"{capital(fact)}. {'That is what was asked' if truth else f'That is not {a(asked)}'}, "
        f"so the answer is {'yes' if truth else 'no'}.",
        expect="Yes" if truth else "No",
    )


@kind("odd one out", 2.5)
def odd_one(rng: random.Random, again: bool) -> Exchange:
    one, other = rng.sample(["fruit", "vegetable", "tool", "musical instrument", "vehicle", "country", "shape"], 2)
    same = rng.sample([x for x in LISTS[MEMBERS[one]] if "_" not in x], 3)
    odd = rng.choice([x for x in LISTS[MEMBERS[other]] if "_" not in x])
    words = [*same, odd]
    rng.shuffle(words)
    ask = "{Which word does not belong|Which one is the odd one out|Find the odd one out}: [l]?"
    return Exchange(
        grow(rng, ask, l=", ".join(words)),
        grow(
            rng,
            "{[c].|[c] does not belong.|[c] is the odd one out.|[c], because the others are [m].}",
            c=capital(odd),
            m=MEMBERS[one],
        ),
        f"{capital(listed(same))} are {MEMBERS[one]}. {capital(odd)} is {a(other)}. So {odd} does not belong.",
        key=f"odd {sorted(words)}",
        expect=capital(odd),
    )


@kind("list", 7, again=True)
def name_some(rng: random.Random, again: bool) -> Exchange:
    what = rng.choice(sorted(LISTS))
    n = rng.choice([2, 3, 3, 3, 4, 5])
    pool = [x.replace("_", " ") for x in LISTS[what]]
    chosen = rng.sample(pool, n) if n <= len(pool) else pool
    n = len(chosen)
    if what in ("oceans",):
        chosen = ["the " + x for x in chosen]
    ask = (
        "{And|Now} [n] [w]{.|?|, please.}"
        if again
        else "{Name|List|Give me|Tell me|Can you name|Write down|Please name|Say} [n] [w]{.|, please.|}"
    )
    text = grow(rng, ask, n=rng.choice([COUNTS[n], COUNTS[n], n]), w=what)
    if text.startswith("Can"):
        text = text.rstrip(".").removesuffix(", please") + "?"
    style = rng.random()
    if style < 0.5:
        answer = capital(listed(chosen)) + "."
    elif style < 0.65:
        answer = f"{rng.choice(['Sure', 'Here you go', 'Of course'])}: {listed(chosen)}."
    elif style < 0.8:
        answer = "\n".join(f"{i}. {capital(x)}" for i, x in enumerate(chosen, 1))
    elif style < 0.9:
        answer = "\n".join(f"- {capital(x)}" for x in chosen)
    else:
        answer = f"{capital(COUNTS[n])} {what} are {listed(chosen)}."
    return Exchange(
        text,
        answer,
        f"I need {n} {what}. " + " ".join(f"{i}: {x}." for i, x in enumerate(chosen, 1)) + f" That is {n}.",
    )


@kind("repeat", 3)
def repeat(rng: random.Random, again: bool) -> Exchange:
    if rng.random() < 0.6:
        text = rng.choice(SAYINGS) if rng.random() < 0.5 else rng.choice(SENTENCES)[1]
    else:
        text = " ".join(rng.sample(SHORT, rng.randint(1, 4)))
    return Exchange(
        grow(rng, "{Repeat after me|Please repeat|Say this|Repeat this|Say|Please say|Repeat}: [t]", t=text),
        text,
        f"I say exactly the same: {text}",
        key=f"repeat {text}",
        expect=text,
        literal=True,
    )


@kind("upper case", 3)
def upper(rng: random.Random, again: bool) -> Exchange:
    word = rng.choice(SHORT)
    spelled = ", ".join
    if rng.random() < 0.7:
        ask, made = (
            "{Write [W] in {capital letters|uppercase|big letters}.|Make [W] uppercase.|Put [W] in capitals.}",
            word.upper(),
        )
        shown, name = word, "capital"
    else:
        ask, made = "{Write [W] in {small letters|lowercase}.|Make [W] lowercase.}", word
        shown, name = word.upper(), "small"
    ask = ask.replace("[W]", rng.choice(["the word [w]", "[w]", "'[w]'"]))
    return Exchange(
        grow(rng, ask, w=shown),
        grow(rng, "{[m].|[m]|Here it is: [m].}", m=made),
        f"{shown} in {name} letters: {spelled(made)}. So: {made}.",
        key=f"case {shown}",
        expect=made,
        literal=True,
    )


@kind("write a sentence", 5, again=True)
def sentence(rng: random.Random, again: bool) -> Exchange:
    word, text = rng.choice(SENTENCES)
    ask = (
        "{And|Now} {one with|a sentence with} [w]{.|, please.}"
        if again
        else "{Write|Make|Give me|Tell me|Please write} a {short |}sentence with {[W].|[W].|[W], please.}"
    )
    if not again and rng.random() < 0.3:
        ask = "{Use [W] in a sentence.|Can you use [W] in a sentence?|Write one sentence about {a |}[w].}".replace(
            "{a |}", ""
        )
    for _ in range(3):
        ask = ask.replace("[W]", rng.choice(["the word [w]", "the word '[w]'", "[w]", "'[w]'", 'the word "[w]"']), 1)
    return Exchange(
        grow(rng, ask, w=word), text, f"I need one short sentence with {word}. {text} It has the word {word}.",
    )  # fmt: skip


@kind("one word answer", 2.5)
def how_many_words(rng: random.Random, again: bool) -> Exchange:
    words = rng.sample(SHORT, rng.randint(2, 6))
    row = " ".join(words)
    which = rng.choice(["first", "last", "how many"])
    if which == "how many":
        ask, answer = "{How many words are here|Count the words}: [r]?", str(len(words))
        why = ", ".join(f"{w} {i}" for i, w in enumerate(words, 1)) + f". That is {len(words)} words."
    else:
        answer = words[0] if which == "first" else words[-1]
        ask, why = (
            "{What is|Which is|Tell me} the " + which + " word here: [r]?",
            f"{', '.join(words)}. The {which} one is {answer}.",
        )
    return Exchange(
        grow(rng, ask, r=row),
        grow(rng, "{[a].|It is [a].|[a]}", a=answer)
        if which != "how many"
        else grow(rng, "{[a].|[a] words.}", a=answer),
        why,
        key=f"words {row}",
        expect=answer,
    )
