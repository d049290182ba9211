"""What the teacher is asked: user turns of many kinds, as one deterministic file, and 200 that nobody trains on.

    python runs/bundled/asks.py --wordnet data/bundled/wordnet/usr/share/wordnet --text data/bundled/text \\
        --out data/bundled/asks.jsonl.xz --held-out runs/bundled/held-out.jsonl

Each line is {"kind", "turns": [user, ...]}; the words of everyday questions come from `runs/nano`. In a turn, {passage}
stands for a piece of real text, which `generate.py` draws, so that the file stays small. Held-out lines come from the same
source with their passages filled in, and none of them is among the others.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

from prompts import Prompts, vary

CODE_TASKS = """reverses a string|checks whether a number is prime|computes the factorial of a number|sorts a list of
numbers|finds the largest number in a list|counts the vowels in a string|removes duplicates from a list|merges two
dictionaries|reads a file and prints its lines|checks whether a word is a palindrome|computes the Fibonacci numbers|adds
two numbers|converts Celsius to Fahrenheit|counts the words in a text|finds the average of a list|prints the numbers from
1 to 10|checks whether a number is even|computes the area of a circle|splits a sentence into words|joins a list of words
with commas|swaps two variables|finds the common elements of two lists|generates a random password|validates an email
address|computes the greatest common divisor|flattens a nested list|counts how often each letter occurs|rounds a number to
two decimals|draws a triangle of stars|computes the sum of the digits of a number|removes spaces from a string|multiplies
two matrices|does a binary search|turns a string into upper case|zips two lists into a dictionary|waits for five
seconds|parses a date|finds the shortest word|returns the last element of a list|computes a power"""
LANGUAGES = ["Python", "Python", "Python", "JavaScript", "C", "Java", "Bash", "Go", "Rust", "SQL"]
CODE_THINGS = """a for loop|a while loop|a function|a variable|a class|an array|a dictionary|recursion|a pointer|an
exception|a list comprehension|a lambda|inheritance|an API|a database index|a regular expression|a thread|version
control|a unit test|a compiler|an algorithm|big O notation|a hash table|a stack|a queue|a binary tree|JSON|HTML|CSS|a web
server|a virtual machine|an operating system|open source|encryption|a cookie|an IP address|machine learning"""
CODE = [
    "Write a {l} function that {t}.", "How do I write code in {l} that {t}?", "Give me a short {l} program that {t}.",
    "Show me {l} code which {t}, and explain it.", "Can you write a {l} script that {t}?",
    "Write a function that {t}.", "What is {c} in programming?", "Explain {c} with an example in {l}.",
    "What is the difference between {c} and {c2}?", "When should I use {c}?", "How does {c} work?",
]  # fmt: skip
PASSAGE = [
    "Summarize the following text in one sentence:\n\n{passage}", "Summarize this:\n\n{passage}",
    "{passage}\n\nWhat is the main point of this text?", "Explain this text in simple words:\n\n{passage}",
    "Rewrite the following text so that it is easier to read:\n\n{passage}", "{passage}\n\nSummarize the text above.",
    "Rewrite this in a formal style:\n\n{passage}", "Make this shorter:\n\n{passage}",
    "List the key points of this text:\n\n{passage}", "Give the following text a title:\n\n{passage}",
    "Write three questions about this text:\n\n{passage}", "What is this text about?\n\n{passage}",
    "Turn this into a list of bullet points:\n\n{passage}", "Correct the grammar of this text:\n\n{passage}",
    "Based on the following passage, what can we learn?\n\n{passage}", "Continue this text:\n\n{passage}",
    "Paraphrase the following:\n\n{passage}", "Who might have written this, and for whom?\n\n{passage}",
    "What do the most important words in this text mean?\n\n{passage}", "Write a reply to this message:\n\n{passage}",
]  # fmt: skip
REQUESTS = [
    "Write an email to {who} about {what}.", "Write a short speech about {what}.", "Give me ideas for {what}.",
    "Write a dialogue between {who} and {who2} about {what}.", "Plan {what} for me.", "What are the pros and cons of {what}?",
    "Write a short story about {who} and {what}.", "Write a poem about {what}.", "How can I get better at {what}?",
    "What should I know about {what} before I start?", "Make a checklist for {what}.", "Write a product description for {what}.",
    "Give me five tips for {what}.", "Explain the history of {what}.", "Compare {what} with {what2}.",
    "Write a thank-you note to {who}.", "Write a review of {what}.", "What questions should I ask about {what}?",
]  # fmt: skip
WHO = """my boss|my teacher|a friend|my neighbour|a customer|my landlord|my grandmother|a doctor|a new colleague|my team|a
scientist|a pirate|a detective|two children|an old sailor|the mayor|a shop owner|my sister|a robot|a chef"""
WHAT = """a day off|a birthday party|learning a language|a late delivery|a trip to the mountains|healthy eating|saving
money|climate change|a job interview|online courses|a small garden|working from home|public transport|a school project|a lost
key|sleep|time management|a reading club|electric cars|a family dinner|photography|a charity run|moving to a new city|solar
energy|space travel|friendship|music lessons|a broken phone|chess|the ocean|ancient Rome|the printing press|vaccines|recycling|
running a marathon|public speaking|board games|a bicycle|coffee|tea|winter|history museums|a rainy weekend|volunteering"""
FOLLOW = [
    "Can you give an example?", "Make it shorter.", "Explain that more simply.", "Why?", "Tell me more.", "Thanks! What else?",
    "Can you say that in one sentence?", "What is the most important point?", "Are you sure?", "How does that work?",
    "Can you rewrite it in a friendlier tone?", "Give me another one.", "What do you mean by that?", "Put it into a list.",
    "And what are the disadvantages?", "How would you explain it to a child?", "What should I do first?", "Thank you!",
]  # fmt: skip
KINDS = {"everyday": 0.46, "code": 0.12, "passage": 0.22, "request": 0.20}


def split(text: str) -> list[str]:
    return [" ".join(x.split()) for x in text.split("|")]


POOLS = {k: split(v) for k, v in {"t": CODE_TASKS, "c": CODE_THINGS, "who": WHO, "what": WHAT}.items()}


def ask(rng: random.Random, everyday: Prompts) -> dict[str, object]:
    """One conversation's user turns."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "everyday":
        return {"kind": kind, "turns": everyday.chat()["turns"]}
    templates = {"code": CODE, "passage": PASSAGE, "request": REQUESTS}[kind]
    values = {k: rng.choice(pool) for k, pool in POOLS.items()}
    values |= {k + "2": rng.choice(POOLS[k]) for k in ("c", "who", "what")}
    text = rng.choice(templates)
    if kind != "passage":
        text = vary(rng, text.format(l=rng.choice(LANGUAGES), **values))
    return {"kind": kind, "turns": [text, *rng.sample(FOLLOW, rng.choice([0, 1, 1, 2]))]}


def passage(rng: random.Random, texts: list[str], words: int = 90) -> str:
    """A stretch of about so many words that begins and ends at sentences, if it can."""
    parts = rng.choice(texts).split(" ")
    start = rng.randrange(max(1, len(parts) - words))
    piece = " ".join(parts[start : start + rng.randint(words // 3, words)])
    begin = max(piece.find(". ", 0, len(piece) // 3) + 2, 0) if start else 0
    end = piece.rfind(".") + 1
    return piece[begin : end if end > begin + 60 else len(piece)].strip()


def read_texts(folder: Path, names: str = "*.jsonl") -> list[str]:
    files = sorted(folder.glob(names))
    return [json.loads(line)["text"] for f in files for line in f.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=7)
    o = parser.parse_args()
    rng, texts = random.Random(f"held out {o.seed}"), read_texts(o.text)
    everyday = Prompts(rng, o.wordnet)
    held: list[dict[str, object]] = []
    while len(held) < 200:
        line = ask(rng, everyday)
        first = line["turns"][0]  # type: ignore[index]
        if first not in {h["raw"] for h in held} or line["kind"] == "passage":
            held.append({"raw": first, "kind": line["kind"], "prompt": first.replace("{passage}", passage(rng, texts))})
    o.held_out.write_text("".join(json.dumps({"kind": h["kind"], "prompt": h["prompt"]}) + "\n" for h in held))
    known = {str(h["raw"]).lower() for h in held if h["kind"] != "passage"}
    everyday.rng = rng = random.Random(o.seed)
    lines: list[str] = []
    while len(lines) < o.count:
        line = ask(rng, everyday)
        if not known.intersection(str(t).lower() for t in line["turns"]):  # type: ignore[attr-defined]
            lines.append(json.dumps(line))
    o.out.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=6))
    print(f"{o.out}: {len(lines):,} conversations, {o.out.stat().st_size / 1e6:.1f} MB; {len(held)} held out")


if __name__ == "__main__":
    main()
