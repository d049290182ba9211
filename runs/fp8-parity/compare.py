"""FP8 against bf16 on the same data, order and seed, and the noise floor: bf16 again with the step cut into two
micro-batches, which changes the order of additions and nothing else.

Measured as in appendix B.1: curves smoothed by an exponential average of 0.9, the relative difference |a - b| / b at each
step after the warm-up. The paper reports less than 0.25 % throughout. An FP8 error that is no larger than the floor would
say nothing; so both stand in the result.

    python runs/fp8-parity/compare.py --text TEXT...   # tokenizer and shards first, where there are none
    python runs/fp8-parity/compare.py                  # the three arms, one after another, then the comparison
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rorqual.cli.bench_report import environment
from rorqual.config import load_toml
from rorqual.data.prepare import prepare
from rorqual.data.sources import texts
from rorqual.data.tokenizer import train_tokenizer
from rorqual.train.config import RunConfig
from rorqual.train.pretrain import pretrain
from rorqual.train.record import read_metrics

HERE = Path(__file__).resolve().parent
OUT = Path("out/fp8-parity")
ARMS = {"bf16": [], "floor": ["micro_batch=4"], "fp8": ["precision=fp8"]}
SMOOTH = 0.9
PAPER = 0.0025


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", nargs="*", default=[], help="text files or folders for tokenizer and shards")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="override a key in all arms")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/fp8-parity.json"))
    options = parser.parse_args()
    if options.text:
        make_data(options.text)
        return
    for arm in options.arms:
        settings = [*options.set, *ARMS[arm], f"out='{OUT / arm}'"]
        pretrain(load_toml(RunConfig, HERE / "run.toml", settings), say=print)
    if all((OUT / arm / "metrics.jsonl").is_file() for arm in ARMS):
        report(options.json)


def make_data(paths: list[str]) -> None:
    """A tokenizer of 32,768 tokens and shards, a hundredth held out."""
    if not (OUT / "tokenizer").is_dir():
        train_tokenizer(texts(paths, 40_000_000), 32768).save(OUT / "tokenizer")
    made = prepare(paths, OUT / "shards", OUT / "tokenizer", val_fraction=0.01)
    print(f"{made.tokens:,} tokens")


def smoothed(losses: list[float]) -> list[float]:
    out = [losses[0]]
    for loss in losses[1:]:
        out.append(SMOOTH * out[-1] + (1 - SMOOTH) * loss)
    return out


def differences(arm: str, warmup: int) -> list[float]:
    curves = [
        smoothed([line["lm_loss"] for line in read_metrics(OUT / name / "metrics.jsonl")]) for name in (arm, "bf16")
    ]
    return [abs(a - b) / b for a, b in zip(*curves, strict=True)][warmup:]


def report(file: Path) -> None:
    warmup = load_toml(RunConfig, OUT / "bf16" / "config.toml", []).optim.warmup_steps
    rows = {}
    for arm in ("fp8", "floor"):
        errors = differences(arm, warmup)
        last = errors[-len(errors) // 5 :]
        rows[arm] = {"max": max(errors), "mean": sum(errors) / len(errors), "last fifth": sum(last) / len(last)}
    ends = {arm: read_metrics(OUT / arm / "metrics.jsonl")[-1] for arm in ARMS}
    result = {
        "kind": "fp8 parity",
        "relative_error": rows,
        "papers_bound": PAPER,
        "below_the_papers_bound": rows["fp8"]["max"] < PAPER,
        "val_loss": {arm: end.get("val_loss") for arm, end in ends.items()},
        "tokens_per_s": {arm: end["tokens"] / end["elapsed_s"] for arm, end in ends.items()},
        "steps": ends["bf16"]["step"],
        "environment": environment("cuda"),
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    draw(file.with_suffix(".png"), warmup)


def draw(file: Path, warmup: int) -> None:
    """The smoothed losses, and the differences beside the paper's bound."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    for arm in ARMS:
        top.plot(smoothed([line["lm_loss"] for line in read_metrics(OUT / arm / "metrics.jsonl")]), label=arm, lw=1)
    for arm in ("fp8", "floor"):
        errors = differences(arm, warmup)
        bottom.plot(range(warmup, warmup + len(errors)), [100 * e for e in errors], label=arm, lw=1)
    bottom.axhline(100 * PAPER, ls="--", c="grey", label="the paper's bound")
    top.set(ylabel="loss (nats), smoothed")
    bottom.set(ylabel="difference from bf16 (%)", xlabel="step")
    for axes in (top, bottom):
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
