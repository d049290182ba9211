"""Exact conversations without a teacher: talk, sums, letters and words, a little knowledge, simple instructions.

    python runs/nano/exact.py --out data/nano/exact.jsonl.xz --count 60000 --eval data/nano/exam.jsonl

Each line is {"messages": [...]}; about half have `reasoning_content`, steps in a fixed form that check themselves. What
`--eval` writes never occurs in the lines (held out by a checksum of the question, whatever the seed).
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import sys
from collections import Counter
from pathlib import Path

import exact_letters  # registers its kinds
import exact_numbers
import exact_talk
import exact_world
from exact_base import KINDS, Exchange, held_out, normal, vary

assert exact_letters and exact_numbers and exact_talk and exact_world
TALK = ("identity", "small talk", "joke")
THANKS = ["Thanks!", "Thank you!", "Thanks a lot!", "Great, thank you.", "Ok, thanks."]
WELCOME = ["You're welcome!", "You are welcome!", "My pleasure!", "Glad to help!"]


def pick(rng: random.Random) -> Exchange:
    """One exchange that belongs to the lessons."""
    names = list(KINDS)
    while True:
        name = rng.choices(names, [KINDS[n].weight for n in names])[0]
        exchange = KINDS[name](rng)
        if not held_out(exchange):
            return exchange


def turn(rng: random.Random, exchange: Exchange, think: bool) -> list[dict[str, str]]:
    thought = {"reasoning_content": exchange.thought} if think and exchange.thought else {}
    return [
        {"role": "user", "content": vary(rng, exchange)},
        {"role": "assistant", "content": exchange.answer, **thought},
    ]


def conversation(rng: random.Random) -> tuple[list[dict[str, str]], str]:
    """One to four turns; (messages, kind of the last question). Only the last turn may keep its thought."""
    count = 1 if rng.random() < 0.8 else rng.choice([2, 2, 3, 4])
    think = rng.random() < 0.5
    messages: list[dict[str, str]] = []
    exchange = pick(rng)
    for i in range(count):
        if i:
            follow = KINDS[exchange.kind]
            again = follow.again and rng.random() < 0.5
            exchange = follow(rng, again=True) if again else pick(rng)
            if held_out(exchange):
                exchange = pick(rng)
        messages += turn(rng, exchange, think and i == count - 1)
        if i < count - 1 and rng.random() < 0.1 and exchange.sure:
            messages += [
                {"role": "user", "content": "Are you sure?"},
                {"role": "assistant", "content": f"Yes. {exchange.sure}"},
            ]
    if count > 1 and rng.random() < 0.3:
        messages[-1].pop("reasoning_content", None)
        messages += [
            {"role": "user", "content": rng.choice(THANKS)},
            {"role": "assistant", "content": rng.choice(WELCOME)},
        ]
    return messages, exchange.kind


def lessons(count: int, seed: int) -> tuple[list[str], Counter[str]]:
    """`count` lines; a conversation comes again at most twice."""
    rng, seen, kinds = random.Random(seed), Counter[str](), Counter[str]()
    lines = []
    while len(lines) < count:
        messages, kind = conversation(rng)
        line = json.dumps({"messages": messages})
        assert line.isascii()
        seen[line] += 1
        if seen[line] <= 2:
            lines.append(line)
            kinds[kind] += 1
    return lines, kinds


def exam(count: int, seed: int) -> list[str]:
    """Held-out questions with what the answer must contain, half of them to be thought about."""
    rng, seen, out = random.Random(f"exam {seed}"), set(), []
    names = [n for n in KINDS if n not in TALK]
    for _ in range(count * 2000):
        exchange = KINDS[rng.choice(names)](rng)
        key = exchange.key or normal(exchange.question)
        if held_out(exchange) and key not in seen:
            seen.add(key)
            thinking = bool(exchange.thought) and len(out) % 2 == 1
            out.append(
                {"question": exchange.question, "expect": exchange.expect, "thinking": thinking, "kind": exchange.kind}
            )
        if len(out) == count:
            break
    return [json.dumps(x) for x in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/nano/exact.jsonl.xz"))
    parser.add_argument("--count", type=int, default=60000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval", type=Path, help="also write held-out questions here")
    options = parser.parse_args()
    lines, kinds = lessons(options.count, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode()))
    for kind, n in kinds.most_common():
        print(f"{n:7,} {kind}", file=sys.stderr)
    if options.eval:
        options.eval.write_text("\n".join(exam(400, options.seed)) + "\n")
    print(f"{options.out}: {len(lines):,} conversations", file=sys.stderr)


if __name__ == "__main__":
    main()
