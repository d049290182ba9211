"""A little world knowledge from hand-written tables, in several wordings, with and without thinking aloud."""

from __future__ import annotations

import random

from exact_base import Exchange, capital, grow, kind
from words_lessons import NOUNS, SCIENCE, WORDS
from words_world import ANIMALS, BODY, COLORS, COUNTRIES, HOW_MANY, JOBS, RECORDS, TOOLS


def fact(rng: random.Random, ask: str, answer: str, thought: str, expect: str, **slots: object) -> Exchange:
    """Facts are not held out: a question nobody was told the answer to is no exam, so `expect` only counts as known."""
    question, said, steps = (capital(grow(rng, p, **slots)) for p in (ask, answer, thought))
    return Exchange(question, said, steps, sure=said if said.endswith(".") else "")


@kind("capital", 9)
def capital_of(rng: random.Random, again: bool) -> Exchange:
    country, city, continent = rng.choice(COUNTRIES)[:3]
    roll = rng.random()
    if roll < 0.65:
        ask = "{What is|What's|Tell me|Do you know|Can you tell me} the capital {of|city of} [n]{?|?|}"
        return fact(
            rng, ask, "{The capital of [n] is [c].|[c].|It is [c].|[c] is the capital of [n].}",
            "The {question|user} asks for the capital of [n]. [n] is in [k]. Its capital is [c].", city, n=country, c=city, k=continent,
        )  # fmt: skip
    if roll < 0.85:
        return fact(
            rng, "{Which|What} continent is [n] {in|on}?|Where is [n]?|On which continent is [n]?".replace("|W", "|W"),
            "[n] is in [k].", "I recall where [n] lies: it is in [k].", continent, n=country, k=continent,
        )  # fmt: skip
    return fact(
        rng, "{Which|What} country has the capital [c]?", "[c] is the capital of [n].",
        "I look for the country whose capital is [c]. That is [n].", country, n=country, c=city,
    )  # fmt: skip


@kind("color", 5)
def color(rng: random.Random, again: bool) -> Exchange:
    thing, shade = rng.choice(COLORS)[:2]
    return fact(
        rng, "{What color is [t]?|Which color does [t] have?|Tell me the color of [t].}",
        "{[t] is [s].|[s].|It is [s].}", "I picture [t]. Its color is [s].", shade, t=thing, s=shade,
    )  # fmt: skip


@kind("animal", 9)
def animal(rng: random.Random, again: bool) -> Exchange:
    name, sound, young, home, food, group = (rng.choice(ANIMALS) + [""] * 6)[:6]
    article = "an" if name[0] in "aeiou" else "a"
    choices = {
        "{What sound does {x} make?|What does {x} say?}": ("{X} [v].", f"{sound}", sound),
        "{What do you call a baby [n]?|What is the name of a baby [n]?|What is a young [n] called?}": ("A baby [n] is called [v].", young, young),
        "{Where does {x} live?|What is the home of {x}?}": ("{X} lives [v].", home, home),
        "{What does {x} eat?|What do you feed {x}?}": ("{X} eats [v].", food, food),
        "{What kind of animal is {x}?|Is {x} a mammal, a bird or something else?}": ("{X} is a [v].", group, group),
    }  # fmt: skip
    ask = rng.choice([a for a, (_, _, value) in choices.items() if value])
    answer, value, expect = choices[ask]

    def named(pattern: str) -> str:
        return pattern.replace("{x}", f"{article} {name}").replace("{X}", f"{article.capitalize()} {name}")

    if group and value == group and group[0] in "aeiou":
        answer = answer.replace("a [v]", "an [v]")
    thought = f"The question is about {article} {name}. " + named(answer)
    return fact(rng, named(ask), named(answer), thought, expect, n=name, v=value)


@kind("who and what for", 6)
def uses(rng: random.Random, again: bool) -> Exchange:
    table, ask, answer = rng.choice(
        [
            (JOBS, "{Who [a]?|What do you call a person who [a]?}", "{[B] [a].|[B].|That is [b].}"),
            (
                TOOLS,
                "{What do you use to [a]?|What do I need to [a]?|Which tool is used to [a]?}",
                "{You use [b] to [a].|You can use [b].|[B].}",
            ),
            (
                BODY,
                "{What do we use to [a]?|Which part of the body do we use to [a]?}",
                "{We use [b] to [a].|[B].|With [b].}",
            ),
        ]
    )
    a, b = rng.choice(table)[:2]
    return fact(rng, ask, answer, "I think of what fits: [b].", b, a=a, b=b, B=capital(b))


@kind("how many", 3)
def how_many(rng: random.Random, again: bool) -> Exchange:
    things, owner, number = rng.choice(HOW_MANY)[:3]
    return fact(
        rng,
        "How many [t] [o]?",
        "{[n].|[n] [t].|It is [n].}",
        "I remember the number of [t]: [n].",
        number,
        t=things,
        o=owner,
        n=number,
    )


@kind("records", 3)
def record(rng: random.Random, again: bool) -> Exchange:
    asked, answer = rng.choice(RECORDS)[:2]
    return fact(
        rng,
        "{What is [q]?|Do you know [q]?|Tell me [q].|Which is [q]?}",
        "{[c] is [q].|It is [a].|[c].}",
        "I think of [q]. It is [a].",
        answer,
        q=asked,
        a=answer,
        c=capital(answer),
    )


@kind("science", 8)
def science(rng: random.Random, again: bool) -> Exchange:
    inner, question, answer = rng.choice(SCIENCE)[:3]
    ask = "{[q]|[q]|[q]|Can you tell me [i]?|Do you know [i]?|Explain [i].|Please explain to me [i].}"
    return fact(
        rng,
        ask,
        "[a]",
        "The {user|question} asks [i]. I recall the main reason. [a]",
        "",
        q=question,
        i=inner,
        a=answer,
    )


@kind("what is", 8)
def what_is(rng: random.Random, again: bool) -> Exchange:
    if rng.random() < 0.6:
        thing, meaning = rng.choice(NOUNS)[:2]
        ask = "{What is [t]?|What's [t]?|Can you explain what [t] is?|Tell me what [t] is.|Define [t].}"
        return fact(
            rng,
            ask,
            "{[T] is [m].|It is [m].}",
            "I say in easy words what [t] is: [m].",
            "",
            t=thing,
            T=capital(thing),
            m=meaning,
        )
    word, meaning = rng.choice(WORDS)[:2]
    ask = "{What does [w] mean?|What is the meaning of [w]?|What does the word [w] mean?|Explain the word [w].}"
    return fact(
        rng,
        ask,
        "{[W] means [m].|It means [m].}",
        "The word is [w]. It means [m].",
        "",
        w=word,
        W=capital(word),
        m=meaning,
    )
