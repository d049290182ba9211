"""FP8 against bf16 on the same data, order and seed, and the noise floor: bf16 again with the step cut into two
micro-batches, which changes the order of additions and nothing else.

Measured as in appendix B.1: curves smoothed by an exponential average of 0.9, the relative difference |a - b| / b at each
step after the warm-up. The paper reports less than 0.25 % throughout. An FP8 error that is no larger than the floor would
say nothing; so both stand in the result.

    python runs/fp8-parity/compare.py --text TEXT...   # tokenizer and shards first, where there are none
    python runs/fp8-parity/compare.py --python         # the same of the Python sources that this machine has
    python runs/fp8-parity/compare.py                  # the three arms, one after another, then the comparison

An arm that is finished is not run again; one that was cut off begins anew, since it saves nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sysconfig
from pathlib import Path

import torch

from rorqual.cli.bench_report import environment
from rorqual.config import load_toml
from rorqual.data.prepare import prepare
from rorqual.data.sources import texts
from rorqual.data.tokenizer import train_tokenizer
from rorqual.train.config import RunConfig
from rorqual.train.pretrain import pretrain
from rorqual.train.record import read_metrics

HERE = Path(__file__).resolve().parent
ARMS = {"bf16": [], "floor": ["micro_batch=4"], "fp8": ["precision=fp8"]}
SMOOTH = 0.9
PAPER = 0.0025
CHARACTERS = 110_000_000
"""Of Python: a little more than the run's 24.6 M tokens."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/fp8-parity"), help="where data and arms are")
    parser.add_argument("--text", nargs="*", default=[], help="text files or folders for tokenizer and shards")
    parser.add_argument("--python", action="store_true", help="the installed Python sources as the text")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="how much of them")
    parser.add_argument("--vocab", type=int, default=32768, help="tokens of the tokenizer, at most the model's")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="override a key in all arms")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/fp8-parity.json"))
    return parser


def main() -> None:
    options = arguments().parse_args()
    out = options.out
    if options.text or options.python:
        make_data(options.text or [python_sources(out, options.characters)], out, options.vocab)
        return
    data = [f"data.{part}=[{{path='{out}/shards/{part}'}}]" for part in ("train", "val")]
    for arm in options.arms:
        if not finished(out / arm):
            settings = [f"data.tokenizer='{out}/tokenizer'", *data, *options.set, *ARMS[arm], f"out='{out / arm}'"]
            pretrain(load_toml(RunConfig, HERE / "run.toml", settings), say=print)
            gc.collect()  # the arm's memory, before the next takes as much
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if all(finished(out / arm) for arm in ARMS):
        report(out, options.json)


def finished(run: Path) -> bool:
    metrics, config = run / "metrics.jsonl", run / "config.toml"
    if not (metrics.is_file() and config.is_file()):
        return False
    lines = read_metrics(metrics)
    return bool(lines) and lines[-1]["step"] == load_toml(RunConfig, config, []).steps


def python_sources(out: Path, characters: int) -> str:
    """JSONL of the sources below this Python's packages and standard library, in an order that mixes them, up to so many
    characters."""
    paths = sysconfig.get_paths()
    roots = {Path(paths[name]).resolve() for name in ("purelib", "platlib", "stdlib")}
    files = {file.resolve() for root in roots for file in root.rglob("*.py")}
    out.mkdir(parents=True, exist_ok=True)
    target, left = out / "python.jsonl", characters
    with target.open("w", encoding="utf-8") as stream:
        for file in sorted(files, key=lambda f: hashlib.blake2b(str(f).encode()).digest()):
            if left <= 0:
                break
            text = file.read_text(encoding="utf-8", errors="ignore")
            stream.write(json.dumps({"text": text}) + "\n")
            left -= len(text)
    return str(target)


def make_data(paths: list[str], out: Path, vocab: int) -> None:
    """A tokenizer and shards, a hundredth held out."""
    if not (out / "tokenizer").is_dir():
        train_tokenizer(texts(paths, 40_000_000), vocab).save(out / "tokenizer")
    made = prepare(paths, out / "shards", out / "tokenizer", val_fraction=0.01)
    print(f"{made.tokens:,} tokens")


def smoothed(losses: list[float]) -> list[float]:
    out = [losses[0]]
    for loss in losses[1:]:
        out.append(SMOOTH * out[-1] + (1 - SMOOTH) * loss)
    return out


def differences(out: Path, arm: str, warmup: int) -> list[float]:
    curves = [
        smoothed([line["lm_loss"] for line in read_metrics(out / name / "metrics.jsonl")]) for name in (arm, "bf16")
    ]
    return [abs(a - b) / b for a, b in zip(*curves, strict=True)][warmup:]


def report(out: Path, file: Path) -> None:
    warmup = load_toml(RunConfig, out / "bf16" / "config.toml", []).optim.warmup_steps
    rows = {}
    for arm in ("fp8", "floor"):
        errors = differences(out, arm, warmup)
        last = errors[-len(errors) // 5 :]
        rows[arm] = {
            "max": max(errors), "mean": sum(errors) / len(errors), "last fifth": sum(last) / len(last),
            "steps within the bound": sum(error < PAPER for error in errors) / len(errors),
        }  # fmt: skip
    ends = {arm: read_metrics(out / arm / "metrics.jsonl")[-1] for arm in ARMS}
    result = {
        "kind": "fp8 parity",
        "relative_error": rows,
        "papers_bound": PAPER,
        "below_the_papers_bound": rows["fp8"]["max"] < PAPER,
        "val_loss": {arm: end.get("val_loss") for arm, end in ends.items()},
        "tokens_per_s": {arm: end["tokens"] / end["elapsed_s"] for arm, end in ends.items()},
        "steps": ends["bf16"]["step"],
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    draw(out, file.with_suffix(".png"), warmup)


def draw(out: Path, file: Path, warmup: int) -> None:
    """The smoothed losses, and the differences beside the paper's bound."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for arm in ARMS:
        top.plot(smoothed([line["lm_loss"] for line in read_metrics(out / arm / "metrics.jsonl")]), label=arm, lw=1)
    for arm in ("fp8", "floor"):
        errors = differences(out, arm, warmup)
        bottom.plot(range(warmup, warmup + len(errors)), [100 * e for e in errors], label=arm, lw=1)
    bottom.axhline(100 * PAPER, ls="--", c="grey", label="the paper's bound")
    top.set(ylabel="loss (nats), smoothed")
    bottom.set(ylabel="difference from bf16 (%)", xlabel="step")
    for axes in (top, bottom):
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
