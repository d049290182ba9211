"""Exact lessons: exercises with and without working, answers from numbered search results, and who the model is.

    python runs/bundled/lessons.py --text data/bundled/text --out lessons.jsonl --exam runs/bundled/exam.jsonl

Every answer is computed, so it can be learned from its own words. What the exam asks is held out of the lessons by a
checksum of the exercise, whatever the seed. Of the easy kinds of `runs/nano` half are thought through, of the harder ones
of `exact_more` two thirds. Definitions for the search results come from WordNet, as `runs/nano/corpus.py` writes them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "nano"), str(HERE.parents[1])]

import exact  # noqa: E402  registers the easy kinds
from exact import TALK, pick, turn  # noqa: E402
from exact_base import KINDS, Exchange, held_out, normal  # noqa: E402

EASY = set(KINDS)

import exact_more  # noqa: E402, F401  registers the harder ones

from rorqual.search.api import Source  # noqa: E402
from rorqual.search.prompt import search_prompt  # noqa: E402

HARD = [n for n in KINDS if n not in EASY]
MEANS = re.compile(r"^(?:To )?([a-z][a-z -]{2,24}) (?:means|is to) (?:\([^)]*\) )?([^\"]{25,160})\.", re.IGNORECASE)
SELF = {
    "rorqual nano, which is much smaller": "Rorqual, which is much smaller",
    "rorqual nano": "Rorqual",
    "about ten million parameters": "about 140 million parameters",
    "trained from scratch with the open rorqual code, in a few minutes on one GPU": (
        "made from SmolLM2-135M with the open rorqual code, in a few minutes on one GPU"
    ),
    "trained with the open rorqual code": "made from SmolLM2 with the open rorqual code",
    "{tiny|very small} ": "small ", "a tiny language": "a small language",
}  # fmt: skip
EXAM = [
    "add", "subtract", "multiply", "divide", "compare", "largest", "sort numbers", "sequence", "story problem", "count letters",
    "count one letter", "backwards", "sort words", *HARD,
]  # fmt: skip
"""Arithmetic, string and logic kinds, by which thinking is judged."""


def about_itself(text: str) -> str:
    for old, new in SELF.items():
        text = text.replace(old, new)
    return text


def hard(rng: random.Random) -> Exchange:
    while True:
        name = rng.choices(HARD, [KINDS[n].weight for n in HARD])[0]
        exchange = KINDS[name](rng)
        if not held_out(exchange):
            return exchange


def conversation(rng: random.Random) -> list[dict[str, str]]:
    if rng.random() < 0.35:
        return exact.conversation(rng)[0]
    messages: list[dict[str, str]] = []
    for _ in range(1 if rng.random() < 0.85 else 2):
        for m in messages:
            m.pop("reasoning_content", None)
        messages += turn(rng, hard(rng) if rng.random() < 0.9 else pick(rng), rng.random() < 0.67)
    return messages


def definitions(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "wordnet-base.jsonl").read_text(encoding="utf-8").splitlines()
    return [m.groups() for x in lines for line in json.loads(x)["text"].split("\n") if (m := MEANS.match(line))]  # type: ignore[misc]


def cited(rng: random.Random, known: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A question about one of a few results; the answer says what that one says, and which it was."""
    chosen = rng.sample(known, rng.randint(2, 4))
    right = rng.randrange(len(chosen))
    sources = [
        Source(number=i, title=word.capitalize(), url=f"https://example.org/{word.replace(' ', '-')}",
               passages=(f"{word.capitalize()}: {meaning}.",))
        for i, (word, meaning) in enumerate(chosen, 1)
    ]  # fmt: skip
    word, meaning = chosen[right]
    question = rng.choice(
        [
            "What is {w}?",
            "What does {w} mean?",
            "Define {w}.",
            "Explain the word {w}.",
            "What do the results say about {w}?",
        ]
    )
    if rng.random() < 0.1:
        word = rng.choice(known)[0]
        answer = f"None of the results says what {word} means."
        if word in {w for w, _ in chosen}:
            return cited(rng, known)
    else:
        answer = rng.choice(
            [
                "{W} means {m} [citation:{n}].",
                "{W}: {m} [citation:{n}].",
                "According to the results, {w} means {m} [citation:{n}].",
            ]
        )
        answer = answer.format(w=word, W=word.capitalize(), m=meaning, n=right + 1)
    today = f"20{rng.randint(24, 28)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return [
        {"role": "user", "content": search_prompt(question.format(w=word), sources, today)},
        {"role": "assistant", "content": answer},
    ]


def exam(count: int, seed: int) -> list[str]:
    """Held-out exercises, every kind equally often, with what a right answer must contain."""
    rng, seen, out = random.Random(f"exam {seed}"), set(), []
    for n, name in enumerate(EXAM):
        wanted = count * (n + 1) // len(EXAM)
        for _ in range(3000):  # a kind of few exercises holds few out
            exchange = KINDS[name](rng)
            key = exchange.key or normal(exchange.question)
            if exchange.expect and held_out(exchange) and key not in seen:
                seen.add(key)
                out.append(
                    json.dumps({"question": exchange.question, "expect": exchange.expect, "kind": exchange.kind})
                )
            if len(out) >= wanted:
                break
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=160_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--exam", type=Path, help="also write the held-out exercises here")
    o = parser.parse_args()
    if o.exam:
        o.exam.write_text("\n".join(exam(400, o.seed)) + "\n")
    if o.out:
        rng, known = random.Random(o.seed), definitions(o.text)
        with o.out.with_suffix(".part").open("w") as file:
            for _ in range(o.count):
                messages = cited(rng, known) if rng.random() < 0.06 else conversation(rng)
                file.write(about_itself(json.dumps({"messages": messages})) + "\n")
        o.out.with_suffix(".part").rename(o.out)
        print(f"{o.out}: {o.count:,} conversations, {len(known):,} definitions, {TALK[0]} included")


if __name__ == "__main__":
    main()
