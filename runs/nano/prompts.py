"""Prompts for a weak teacher, as one deterministic file: what users might say, and examples of how to answer.

Why examples travel with the prompts: the teacher (135 M parameters) answers a bare question in long, drifting
paragraphs. One or two short exchanges of the same category before it, written by hand, set the length and the tone;
`dialogues.py` removes them again, and drops answers that talk about the example instead of the question.

Each line of the output is one job:
    {"kind": "chat" | "think" | "text" | "magpie", "category", "turns": [user, ...], "shots": [[user, answer, ...]],
     "start": what the answer begins with, "topic": word that must come up or "",
     for "think" also "plan": the whole plan or "", "plans": [[user, plan, answer], ...]}

    python runs/nano/prompts.py --wordnet usr/share/wordnet --out data/nano/prompts.jsonl.xz --count 200000
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from words import (
    ABSTRACT_FIELDS,
    ADJECTIVES,
    ANIMALS,
    BLOCKED,
    FEELINGS,
    FOODS,
    GENERAL_FIELDS,
    GOOD_NEWS,
    HOBBIES,
    JOBS,
    LISTED,
    NAMES,
    NATURE,
    PAIRS,
    PLACES,
    PROBLEMS,
    SCIENCE,
    SENTENCES,
    STORY_THINGS,
    SUBJECTS,
    TASKS,
    THINGS,
    UNCOUNTED,
    WHYS,
)
from words_shots import ANSWERS, SHOT_OF, SHOTS
from words_stories import PARAGRAPH_SHOTS, PLANS, STORY_SHOTS
from words_templates import FOLLOW_UPS, PLAN_ENDS, PLAN_STARTS, STORY_FOLLOW_UPS, TEMPLATES, WEIGHTS

Job = dict[str, Any]
ARTICLE = {True: "an ", False: "a "}


def plural(word: str) -> str:
    if word in UNCOUNTED:
        return word
    irregular = {
        "mouse": "mice",
        "goose": "geese",
        "sheep": "sheep",
        "deer": "deer",
        "fish": "fish",
        "wolf": "wolves",
        "knife": "knives",
        "leaf": "leaves",
        "salmon": "salmon",
        "goldfish": "goldfish",
        "jellyfish": "jellyfish",
        "starfish": "starfish",
        "moose": "moose",
        "octopus": "octopuses",
        "potato": "potatoes",
        "tomato": "tomatoes",
        "volcano": "volcanoes",
        "fisherman": "fishermen",
        "child": "children",
        "man": "men",
        "woman": "women",
        "foot": "feet",
        "tooth": "teeth",
        "ox": "oxen",
        "calf": "calves",
        "loaf": "loaves",
        "shelf": "shelves",
        "scarf": "scarves",
        "thief": "thieves",
        "wife": "wives",
    }
    if word in irregular:
        return irregular[word]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"


def with_article(word: str) -> str:
    if word in UNCOUNTED:
        return word
    if word in {"sun", "moon", "sky", "sea", "ocean", "weather"}:
        return "the " + word
    return ARTICLE[word[0] in "aeio" or word in {"umbrella", "uncle"}] + word


def wordnet_nouns(folder: Path, fields: dict[str, int]) -> list[str]:
    """Common one-word nouns whose first sense lies in one of WordNet's lexicographer files `fields` (-> least count).

    The count is how often that sense was tagged in WordNet's own corpora: it keeps the rare words out.
    """
    lex, counts = {}, Counter[tuple[str, str]]()
    for line in (folder / "data.noun").read_text("latin-1").splitlines():
        if line[0] != " ":
            offset, field = line.split(" ", 2)[:2]
            if line.split(" ", 5)[4].islower():  # no names: months, countries, languages
                lex[offset] = field
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        key, _, count = line.split()
        word, rest = key.split("%")
        kind, field = rest.split(":")[:2]
        if kind == "1":
            counts[word, field] += int(count)
    nouns = []
    for line in (folder / "index.noun").read_text("latin-1").splitlines():
        parts = line.split()
        first = next((lex[p] for p in parts if len(p) == 8 and p.isdigit() and p in lex), "")
        word = parts[0] if line[0] != " " else ""
        good = re.fullmatch("[a-z]{3,11}", word) and word not in BLOCKED
        if good and first in fields and counts[word, first] >= fields[first]:
            nouns.append(word)
    return nouns


def third_person(question: str) -> str:
    """'do birds sing' -> 'birds sing', 'is the sky blue' -> 'the sky is blue': a Why turned into a clause."""
    verb, rest = question.split(" ", 1)
    if verb == "do":
        return rest
    if verb == "does":
        words = rest.split(" ")
        at = 2 if words[0] in {"the", "a"} else 1
        return " ".join([*words[:at], words[at] + "s", *words[at + 1 :]])
    for cut in [
        "the sky",
        "the sea",
        "the sun",
        "snow",
        "exercise",
        "reading",
        "honesty",
        "breakfast",
        "kindness",
        "friends",
        "it",
    ]:
        if rest.startswith(cut + " "):
            return f"{cut} {verb} {rest[len(cut) + 1 :]}"
    return rest


def pick(rng: random.Random, shots: list[list[str]], n: int) -> list[list[str]]:
    """`n` examples in their order in the list: fewer distinct prompt beginnings, which the teacher computes once."""
    return [shots[i] for i in sorted(rng.sample(range(len(shots)), n))]


def someone(rng: random.Random, animal: str) -> str:
    """Whom an animal meets: seldom one of its own kind."""
    if rng.random() < 0.1:
        return ("an " if animal[0] in "aeiou" else "a ") + animal
    return with_article(rng.choice(ANIMALS))


def vary(rng: random.Random, text: str) -> str:
    """The small accidents of typed messages: lower case, missing marks, a please, a hello."""
    roll = rng.random()
    if roll < 0.05 and not text.lower().startswith(("hi", "hey", "hello", "good")):
        text = rng.choice(["Hi! ", "Hey, ", "Hello! ", "Hi there, "]) + text
    elif roll < 0.12 and re.match(r"(Tell|Give|Explain|Write|Name|List|Describe|Teach|Make|Define|Compare) ", text):
        text = rng.choice(["Please " + text[0].lower() + text[1:], text.rstrip(".") + ", please."])
    roll = rng.random()
    if roll < 0.18:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip(".?")
    elif rng.random() < 0.04:
        text = text.rstrip(".?") + rng.choice(["??", "!", "...", " :)"])
    return text


class Prompts:
    """All jobs from one seed; `job()` draws the next."""

    def __init__(self, rng: random.Random, wordnet: Path | None) -> None:
        self.rng = rng
        self.nouns = sorted(set(wordnet_nouns(wordnet, GENERAL_FIELDS))) if wordnet else THINGS
        self.ideas = sorted(set(wordnet_nouns(wordnet, ABSTRACT_FIELDS))) if wordnet else ["courage", "trust", "hope"]

    def words(self, category: str) -> dict[str, str]:
        """The values for a category's placeholders; `topic` is what the answer must mention."""
        rng = self.rng
        pools = {
            "explain": THINGS * 2 + NATURE * 2 + self.nouns,
            "animal": ANIMALS,
            "abstract": self.ideas,
            "science": SCIENCE,
            "job": JOBS,
            "why": WHYS,
            "how": TASKS,
            "feeling": FEELINGS,
            "advice": PROBLEMS,
            "news": GOOD_NEWS,
            "opinion": THINGS + ANIMALS + FOODS,
            "hobby": HOBBIES,
            "list_tips": TASKS,
            "travel": PLACES,
            "food": FOODS,
            "sentence": self.nouns + self.ideas + THINGS + ANIMALS,
        }
        w = rng.choice(pools.get(category, THINGS))
        x, y = rng.choice(PAIRS).split("|")
        values = {
            "w": w,
            "W": w[0].upper() + w[1:],
            "a": with_article(w),
            "pl": plural(w),
            "x": x,
            "y": y,
            "pl2": rng.choice(LISTED),
            "s": rng.choice(STORY_THINGS),
            "adj": rng.choice(ADJECTIVES),
            "animal": rng.choice(ANIMALS),
            "name": rng.choice(NAMES),
            "p": rng.choice(SUBJECTS),
            "t": rng.choice(SENTENCES),
            "h": rng.choice(HOBBIES),
            "f": rng.choice(FOODS),
            "place": rng.choice(PLACES),
        }
        values["w2"] = third_person(w) if category == "why" else w
        if category in {"talk"}:
            values["pl"] = plural(rng.choice(ANIMALS + FOODS))
        return values

    def chat(self, think: bool = False) -> Job:
        rng = self.rng
        names = [c for c in WEIGHTS if not think or c in PLAN_STARTS]
        category = rng.choices(names, [WEIGHTS[c] for c in names])[0]
        values = self.words(category)
        template = rng.choice(TEMPLATES[category])
        turns = [vary(rng, template.format(**values))]
        topic = values["w"] if category in {"explain", "animal", "food", "science", "job", "hobby", "sentence"} else ""
        shots = SHOTS[SHOT_OF.get(category, category)]
        if think:
            start = PLAN_STARTS[category].format(**values)
            plan = f"{start} {rng.choice(PLAN_ENDS[category])}" if category in PLAN_ENDS and rng.random() < 0.6 else ""
            plans = [[q, p, ANSWERS[q]] for q, p in pick(rng, PLANS, 2)]
            return {
                "kind": "think",
                "category": category,
                "turns": turns,
                "shots": [],
                "start": start,
                "topic": topic,
                "plan": plan,
                "plans": plans,
            }
        if rng.random() < 0.3 and category not in {"rewrite", "sentence"}:
            follow = STORY_FOLLOW_UPS if category in {"story", "poem"} else FOLLOW_UPS
            turns.append(vary(rng, rng.choice(follow)))
            if rng.random() < 0.3:
                turns.append(vary(rng, rng.choice(follow)) if rng.random() < 0.5 else self.chat_turn())
        if len(turns) > 1:
            shots = pick(rng, SHOTS["follow"], 1) + pick(rng, shots, 1)
        else:
            shots = pick(rng, shots, 2 if rng.random() < 0.8 else 1)
        return {
            "kind": "chat",
            "category": category,
            "turns": turns,
            "shots": shots,
            "start": "",
            "topic": topic,
        }

    def chat_turn(self) -> str:
        category = self.rng.choice(["explain", "animal", "why", "how", "feeling", "talk", "food"])
        return vary(self.rng, self.rng.choice(TEMPLATES[category]).format(**self.words(category)))

    def text(self) -> Job:
        rng = self.rng
        if rng.random() < 0.3:
            pool = THINGS + NATURE + ANIMALS + FOODS + HOBBIES + self.nouns
            topic = rng.choice(pool)
            about = (
                rng.choice([plural(topic), plural(topic), f"a day with {with_article(topic)}"])
                if topic not in HOBBIES
                else topic
            )
            turns = [f"Write a short, simple paragraph about {about}."]
            return {
                "kind": "text",
                "category": "paragraph",
                "turns": turns,
                "shots": rng.sample(PARAGRAPH_SHOTS, 1),
                "start": "",
                "topic": topic,
            }
        shot = rng.choice(STORY_SHOTS)
        return {
            "kind": "text",
            "category": "story",
            "turns": [shot[0]],
            "shots": [shot],
            "start": self.opening(),
            "topic": "",
        }

    def opening(self) -> str:
        """The first words of a story: who, where, and the thing it turns on. They give the stories their variety."""
        rng = self.rng
        a, b = rng.sample(NAMES, 2)
        adj, animal, thing = rng.choice(ADJECTIVES), rng.choice(ANIMALS), rng.choice(STORY_THINGS)
        adj = ("an " if adj[0] in "aeiou" else "a ") + adj
        day = rng.choice(
            [
                "One day,",
                "One sunny morning,",
                "One cold evening,",
                "One rainy day,",
                "On Saturday,",
                "Last summer,",
                "One night,",
            ]
        )
        where = rng.choice(PLACES).replace("a big city", "the big city")
        return rng.choice(
            [
                f"Once upon a time, there was {adj} {animal} named {a}.",
                f"Once upon a time, there was {adj} {animal} who loved {rng.choice(HOBBIES)}.",
                f"{day} {a} found {thing}.",
                f"{day} {a} and {b} went to {where}.",
                f"{a} was {adj} {animal}. {day}",
                f"There once was {adj} {rng.choice(JOBS)} who lived near {where}.",
                f"{day} {adj} {animal} met {someone(rng, animal)}.",
                f"{a} wanted to {rng.choice(TASKS).replace(' my ', ' the ')}.",
                f"{a} felt {rng.choice(FEELINGS)}. {day}",
                f"{a} had {with_article(rng.choice(THINGS))}.",
                f"{a} and {b} were best friends. {day} they saw {thing}.",
                f"Long ago, in a small village, there lived {adj} {rng.choice(JOBS)}.",
                f'"{rng.choice(["Look", "Wait", "Come here", "Help", "Good morning"])}!" said {a}.',
                f"It was the first day of {rng.choice(['school', 'spring', 'winter', 'summer', 'the holidays'])}"
                f", and {a} felt {rng.choice(FEELINGS)}.",
            ]
        )

    def magpie(self) -> Job:
        start = self.rng.choice(
            [
                "What",
                "What is",
                "How",
                "How do I",
                "Can you",
                "Why",
                "I",
                "I want to",
                "Tell me",
                "My",
                "Is",
                "Do",
                "Could you",
                "Which",
                "When",
                "Who",
                "Please",
                "Describe",
                "Explain",
            ]
        )
        category = self.rng.choice(["explain", "how", "advice", "opinion", "why", "food", "travel"])
        return {
            "kind": "magpie",
            "category": category,
            "turns": [],
            "shots": pick(self.rng, SHOTS[category], 3),
            "start": start,
            "topic": "",
        }

    def job(self) -> Job:
        kind = self.rng.choices(["chat", "think", "text", "magpie"], [0.60, 0.14, 0.20, 0.06])[0]
        return {
            "chat": self.chat,
            "think": lambda: self.chat(think=True),
            "text": self.text,
            "magpie": self.magpie,
        }[kind]()


def distinct(prompts: Prompts, count: int) -> Iterator[Job]:
    """`count` jobs; the same prompt at most three times (each time with other examples before it)."""
    seen: Counter[str] = Counter()
    while count:
        job = prompts.job()
        key = job["kind"] + " ".join(job["turns"]) + job["start"]
        seen[key] += 1
        if job["kind"] in {"magpie"} or seen[key] <= 3:
            count -= 1
            yield job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, help="folder with data.noun, index.noun, cntlist.rev")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    prompts = Prompts(random.Random(args.seed), args.wordnet)
    print(f"{len(prompts.nouns)} nouns and {len(prompts.ideas)} abstract words")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kinds: Counter[str] = Counter()
    with lzma.open(args.out, "wt", encoding="utf-8", preset=4) as file:
        for job in distinct(prompts, args.count):
            kinds[job["kind"] + "/" + job["category"]] += 1
            file.write(json.dumps(job) + "\n")
    print(json.dumps(kinds, indent=1), f"{args.out} {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
