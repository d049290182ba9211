"""What the shipped model does when it is used: the exam with and without thinking, loops, stops, drafts, fixed answers.

    python runs/bundled/judge.py models/NAME --teacher teacher-answers.jsonl --out judged.json

Through the engine, as stored. The exam is greedy; held-out and fixed prompts are sampled as generation_config.json says,
with fixed seeds. Differences between thinking and not are paired by question; intervals are 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rorqual import LLM, SamplingParams

HERE = Path(__file__).resolve().parent


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def says(text: str, expected: str) -> bool:
    """Whether the answer holds the expected words as words: "8" is not in "18", nor "no" in "not"."""
    return re.search(rf"(?<![\w.]){re.escape(expected)}(?!\w|\.\d)", text, re.IGNORECASE) is not None


def repeated(text: str, n: int = 8) -> tuple[int, int]:
    """(n-grams of words that occurred before in the text, n-grams)."""
    words = text.split()
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return total - len(grams), total


def interval(shares: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    spread = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return statistics.fmean(shares), 1.96 * spread


def exam(llm: LLM, asked: list[dict[str, Any]], teacher: dict[str, str], tokens: int) -> dict[str, Any]:
    right: dict[str, list[bool]] = {}
    for name, thinking in (("off", False), ("on", True)):
        made = llm.chat(
            [[{"role": "user", "content": x["question"]}] for x in asked],
            SamplingParams(temperature=0, max_tokens=tokens), thinking=thinking,
        )  # fmt: skip
        right[name] = [says(c.text, x["expect"]) for x, c in zip(asked, made, strict=True)]
    if teacher:
        right["teacher"] = [says(teacher.get(x["question"], ""), x["expect"]) for x in asked]
    result: dict[str, Any] = {"questions": len(asked)}
    for name, values in right.items():
        result[name] = interval([float(v) for v in values])
    result["on_minus_off"] = interval([float(a) - float(b) for a, b in zip(right["on"], right["off"], strict=True)])
    kinds: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for i, x in enumerate(asked):
        for name, values in right.items():
            kinds[x["kind"]][name].append(values[i])
    result["by_kind"] = {k: {n: f"{sum(v)}/{len(v)}" for n, v in names.items()} for k, names in kinds.items()}
    return result


def sampled(model: Path, tokens: int, count: int) -> list[SamplingParams]:
    told = json.loads((model / "generation_config.json").read_text())
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    kept = {k: v for k, v in told.items() if k in names}
    return [SamplingParams(**kept, max_tokens=tokens, seed=i) for i in range(count)]


def talk(llm: LLM, model: Path, prompts: list[str], tokens: int) -> tuple[dict[str, Any], list[str]]:
    made = llm.chat([[{"role": "user", "content": p}] for p in prompts], sampled(model, tokens, len(prompts)))
    again = [repeated(c.text) for c in made]
    return {
        "prompts": len(prompts), "max_tokens": tokens,
        "stopped": sum(c.finish_reason == "stop" for c in made) / len(made),
        "repeated_8grams": sum(a for a, _ in again) / max(1, sum(n for _, n in again)),
        "tokens": statistics.fmean(len(c.token_ids) for c in made),
    }, [c.text for c in made]  # fmt: skip


def drafts(model: Path, prompts: list[str], tokens: int, threads: int) -> dict[str, Any]:
    """Share of the MTP module's tokens that stand, on the model's own greedy answers."""
    with LLM(model, speculation=1, threads=threads) as llm:
        llm.chat([[{"role": "user", "content": p}] for p in prompts], SamplingParams(temperature=0, max_tokens=tokens))
        return {"drafted": llm.stats.draft_tokens, "acceptance": llm.stats.accepted / max(1, llm.stats.draft_tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--teacher", type=Path, help="the teacher's answers to the same questions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=1000, help="only so many of each list")
    parser.add_argument("--tokens", type=int, default=512, help="longest answer to a prompt")
    parser.add_argument("--threads", type=int, default=2)
    o = parser.parse_args()
    asked, held, fixed = (read(HERE / f"{n}.jsonl")[: o.first] for n in ("exam", "held-out", "fixed"))
    theirs = read(o.teacher) if o.teacher else []
    answers = {x["question"]: x["answer"] for x in theirs if "question" in x}
    prompted = {x["prompt"]: x for x in theirs if "prompt" in x}
    result: dict[str, Any] = {}
    with LLM(o.model, threads=o.threads, speculation=0) as llm:
        result["exam"] = exam(llm, asked, answers, 320)
        print(json.dumps({k: v for k, v in result["exam"].items() if k != "by_kind"}), flush=True)
        result["held_out"], _ = talk(llm, o.model, [x["prompt"] for x in held], o.tokens)
        _, said = talk(llm, o.model, [x["prompt"] for x in fixed], o.tokens)
    if prompted:
        seen = [prompted[x["prompt"]] for x in held if x["prompt"] in prompted]
        again = [repeated(x["answer"]) for x in seen]
        result["held_out_teacher"] = {
            "stopped": sum(x["ended"] for x in seen) / len(seen),
            "repeated_8grams": sum(a for a, _ in again) / max(1, sum(n for _, n in again)),
        }
    print(json.dumps(result["held_out"]), json.dumps(result.get("held_out_teacher")), flush=True)
    result["drafts"] = drafts(o.model, [x["prompt"] for x in held[:40]], 128, o.threads)
    print(json.dumps(result["drafts"]), flush=True)
    result["fixed"] = [
        {"prompt": x["prompt"], "answer": a, "teacher": prompted.get(x["prompt"], {}).get("answer", "")}
        for x, a in zip(fixed, said, strict=True)
    ]
    o.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
