"""`make speedrun`: text -> tokenizer -> shards -> pretraining -> fine-tuning -> answers, on two CPU cores in minutes.

Every step is a public command or function; killed at any point, it goes on where it was. It ends in
out/tiny-cpu/report.md: times, losses, balance, and what the model says.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from rorqual import LLM, SamplingParams
from rorqual.cli.bench_report import environment
from rorqual.config import load_toml
from rorqual.data.prepare import prepare
from rorqual.data.sources import texts
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.post.sft import sft
from rorqual.train.config import RunConfig
from rorqual.train.pretrain import RunRecord, pretrain
from rorqual.train.record import duration, read_metrics

HERE = Path(__file__).resolve().parent
OUT = Path("out/tiny-cpu")
TEXT = HERE / "dialogues.jsonl.xz"
QUESTIONS = [
    "Hello!",
    "What is a dog?",
    "Tell me a short story about a cat.",
    "How can I sleep better?",
    "Who are you?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="delete out/tiny-cpu first")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="override a key of pretrain.toml")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    times: dict[str, float] = {}

    def timed(name, work):  # type: ignore[no-untyped-def]
        say(f"— {name}")
        start = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - start
        return result

    timed("tokenizer", make_tokenizer)
    data = timed("shards", lambda: prepare([TEXT], OUT / "shards", OUT / "tokenizer", val_fraction=0.02))
    base = timed("pretraining", lambda: pretrain(load_toml(RunConfig, HERE / "pretrain.toml", options.set), say=say))
    tuned = timed("fine-tuning", lambda: sft(load_toml(RunConfig, HERE / "sft.toml"), say=say))
    answers = timed("answers", lambda: ask(tuned.model))
    report = write_report(times, data.tokens, base, tuned, answers)
    print(report.read_text())
    print(f"The model is {tuned.model}: rorqual chat --model {tuned.model}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_tokenizer() -> None:
    if not (OUT / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(texts([TEXT], 10_000_000), 2048).save(OUT / "tokenizer")


def ask(model: Path | None) -> list[tuple[str, str]]:
    llm = LLM(model)
    conversations = [[{"role": "user", "content": q}] for q in QUESTIONS]
    made = llm.chat(conversations, SamplingParams(temperature=0.5, top_p=0.9, max_tokens=80, seed=1))
    return [(q, c.text.strip()) for q, c in zip(QUESTIONS, made, strict=True)]


def write_report(
    times: dict[str, float], tokens: int, base: RunRecord, tuned: RunRecord, answers: list[tuple[str, str]]
) -> Path:
    lines = read_metrics(base.directory / "metrics.jsonl")
    characters = Tokenizer.load(OUT / "tokenizer")
    late = lines[-len(lines) // 10 :]

    def mean(key: str) -> float:
        return sum(line[key] for line in late) / len(late)

    env = environment("cpu")
    rows = [
        (
            "time",
            ", ".join(f"{name} {duration(s)}" for name, s in times.items())
            + f"; in all {duration(sum(times.values()))}",
        ),
        ("corpus", f"{tokens:,} tokens, vocabulary {characters.vocab_size:,}"),
        (
            "pretraining",
            f"{lines[-1]['tokens']:,} tokens, loss {lines[0]['lm_loss']:.2f} → {mean('lm_loss'):.2f}, "
            f"val {base.last['val_loss']:.3f}",
        ),
        ("speed", f"{mean('tokens_per_s'):,.0f} tokens/s, MFU {mean('mfu'):.0%} of a measured fp32 matrix product"),
        ("balance", f"max_violation {mean('max_violation'):.2f} with no auxiliary loss to speak of (alpha 1e-4)"),
        ("MTP", f"the module guesses the model's own next-but-one token {base.last['mtp_agreement']:.0%} of the time"),
        ("fine-tuning", f"val loss {tuned.last['val_loss']:.3f} on the assistant's words"),
        ("machine", ", ".join(f"{k} {v}" for k, v in env.items())),
    ]
    text = "# Speedrun\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in rows)
    text += "\n## What it says\n\n" + "".join(f"**{q}**\n\n{a}\n\n" for q, a in answers)
    (OUT / "report.md").write_text(text, encoding="utf-8")
    return OUT / "report.md"


if __name__ == "__main__":
    main()
