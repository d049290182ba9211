"""From a finished run to the bundled model: shards small enough for git, an exam, a loss curve and the model card.

    python runs/nano/bundle.py --run out/nano --exam data/nano/exam.jsonl --out out/nano/rorqual-nano

Everything in the card is computed here from the run's own records; nothing is typed in by hand but the prose.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rorqual import LLM, SamplingParams
from rorqual.checkpoint import load_model, save_model
from rorqual.config import ModelConfig
from rorqual.plan import count
from rorqual.train.record import read_metrics

SHARD_BYTES = 14_000_000
GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.4, "top_p": 0.9}
QUESTIONS = [
    "Who are you?",
    "What is the capital of Japan?",
    "Give me three tips for a healthy life.",
    "I feel sad today.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("out/nano"))
    parser.add_argument("--exam", type=Path, default=Path("data/nano/exam.jsonl"))
    parser.add_argument("--licences", type=Path, default=Path("data/nano/text/LICENSES.json"))
    parser.add_argument("--teacher", type=Path, default=Path("data/nano/dialogues/stats.json"))
    parser.add_argument("--out", type=Path, default=Path("out/nano/rorqual-nano"))
    parser.add_argument("--hardware", default="NVIDIA H200")
    parser.add_argument(
        "--versions", default="", help='for the record, like {"torch": "2.11.0", "commit": "abc", "date": "2026-11-24"}'
    )
    o = parser.parse_args()
    save_model(load_model(o.run / "sft/model"), o.out, files_from=o.run / "sft/model", max_shard_bytes=SHARD_BYTES)
    (o.out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    phases = {name: read_metrics(o.run / name / "metrics.jsonl") for name in ("pretrain", "sft")}
    record = training_record(phases, o.hardware, json.loads(o.versions or "{}"))
    record["exam"], samples = examine(o.out, o.exam)
    Path("benchmarks/nano-training.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(phases, o.out / "loss.png")
    teacher, licences = json.loads(o.teacher.read_text()), json.loads(o.licences.read_text())
    (o.out / "README.md").write_text(card(record, samples, teacher, licences, ModelConfig.load(o.out)))


def training_record(phases: dict[str, list[dict[str, Any]]], hardware: str, versions: dict[str, str]) -> dict[str, Any]:
    """Tokens, seconds, rates and last losses of each phase; medians leave out compilation and validation."""
    rows = []
    for name, lines in phases.items():
        late = lines[-len(lines) // 20 :]
        validated = [x for x in lines if "val_loss" in x]
        rows.append(
            {
                "phase": name,
                "steps": lines[-1]["step"],
                "tokens": lines[-1]["tokens"],
                "seconds": round(lines[-1]["elapsed_s"]),
                "tokens_per_s": statistics.median(x["tokens_per_s"] for x in lines),
                "mfu": statistics.median(x["mfu"] for x in lines),
                "loss": statistics.mean(x["lm_loss"] for x in late),
                "val_loss": validated[-1]["val_loss"],
                "mtp_agreement": validated[-1]["mtp_agreement"],
                "max_violation": statistics.mean(x["max_violation"] for x in late),
                "memory_bytes": max(x["memory_bytes"] for x in lines),
            }
        )
    return {"kind": "training record", "model": "rorqual-nano", "hardware": hardware, **versions, "phases": rows}


def examine(model: Path, exam: Path) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Greedy accuracy on held-out questions with and without thinking, and some answers for the card."""
    llm, asked = LLM(model), [json.loads(line) for line in exam.read_text().splitlines()]
    greedy = SamplingParams(temperature=0, max_tokens=160)
    result: dict[str, Any] = {"questions": len(asked)}
    for name, thinking in (("direct", False), ("thinking", True)):
        made = llm.chat([[{"role": "user", "content": x["question"]}] for x in asked], greedy, thinking=thinking)
        right: dict[str, list[bool]] = defaultdict(list)
        for x, c in zip(asked, made, strict=True):
            right[x["kind"]].append(says(c.text, x["expect"]))
        result[name] = sum(map(sum, right.values())) / len(asked)
        result[f"{name}_by_kind"] = {k: f"{sum(v)}/{len(v)}" for k, v in sorted(right.items())}
    samples = []
    for question, thinking in [*((q, False) for q in QUESTIONS), ("What is 47 + 38?", True)]:
        c = llm.chat([{"role": "user", "content": question}], greedy, thinking=thinking)[0]
        samples.append((question, c.reasoning.strip(), c.text.strip()))
    return result, samples


def says(text: str, expected: str) -> bool:
    """Whether the answer holds the expected words as words: "8" is not in "18", nor "no" in "not"."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", text, re.IGNORECASE) is not None


def draw(phases: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (name, lines) in zip(axes, phases.items(), strict=True):
        tokens = [x["tokens"] / 1e6 for x in lines]
        axis.plot(tokens, smooth([x["lm_loss"] for x in lines]), label="next token", lw=1)
        axis.plot(tokens, smooth([x["mtp_loss"] for x in lines]), label="next but one (MTP)", lw=1)
        checked = [x for x in lines if "val_loss" in x]
        axis.plot(
            [x["tokens"] / 1e6 for x in checked], [x["val_loss"] for x in checked], "k.-", label="validation", lw=0.8
        )
        axis.set(title=name, xlabel="million tokens", ylabel="nats a token", ylim=(1.2, 5 if name == "pretrain" else 3))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=90)


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    out, mean = [], values[0]
    for v in values:
        mean = keep * mean + (1 - keep) * v
        out.append(mean)
    return out


def card(
    record: dict[str, Any],
    samples: list[tuple[str, str, str]],
    teacher: dict[str, Any],
    licences: dict[str, Any],
    cfg: ModelConfig,
) -> str:
    pre, sft = record["phases"]
    exam = record["exam"]
    total, active = count.totals(cfg)
    mtp = count.parts(cfg)[-1].total
    rows = "\n".join(
        f"| {k} {v['version']} | {v['licence']} | {v['documents']:,} | {v['characters'] / 1e6:.1f} MB |"
        for k, v in licences.items()
    )
    said = "\n".join(
        f"> **{q}**\n>\n" + (f"> *{t}*\n>\n" if t else "") + "> " + a.replace("\n", "\n> ") + "\n"
        for q, t, a in samples
    )
    kinds = exam["direct_by_kind"]
    by_kind = "\n".join(f"| {k} | {kinds[k]} | {exam['thinking_by_kind'][k]} |" for k in kinds)
    return f"""---
license: mit
language: en
library_name: rorqual
---
# rorqual-nano

A chat model of {total / 1e6:.1f} M parameters ({active / 1e6:.1f} M active on a token, and {mtp / 1e6:.1f} M of a multi-token-prediction module)
in DeepSeek-V3's architecture, trained from scratch by this repository's own commands in {(pre["seconds"] + sft["seconds"]) / 60:.0f} minutes
of one {record["hardware"]}.

**It can** hold short, friendly, simple English conversations, answer easy questions, write a few sentences, and do small
sums and word puzzles, clearly better with DeepThink on. **It cannot** be trusted with facts: it has read little and
invents freely. It knows no other language, no tools, no news. Do not use it for anything that matters.

## Training

![loss](loss.png)

| | pretraining | fine-tuning |
|---|---|---|
| tokens | {pre["tokens"]:,} | {sft["tokens"]:,} |
| steps | {pre["steps"]:,} | {sft["steps"]:,} |
| seconds | {pre["seconds"]} | {sft["seconds"]} |
| tokens/s (median) | {pre["tokens_per_s"]:,.0f} | {sft["tokens_per_s"]:,.0f} |
| MFU | {pre["mfu"]:.1%} | {sft["mfu"]:.1%} |
| last training loss, nats | {pre["loss"]:.3f} | {sft["loss"]:.3f} |
| validation loss | {pre["val_loss"]:.3f} | {sft["val_loss"]:.3f} |
| MTP module agrees with the model | {pre["mtp_agreement"]:.1%} | {sft["mtp_agreement"]:.1%} |
| max_violation (alpha 1e-4, bias update) | {pre["max_violation"]:.2f} | {sft["max_violation"]:.2f} |

Recipe: `runs/nano/` (README there). Vocabulary {cfg.vocab_size:,}, {cfg.num_hidden_layers} layers, hidden {cfg.hidden_size}, {cfg.n_routed_experts} routed experts of width {cfg.moe_intermediate_size},
top-{cfg.num_experts_per_tok}, one shared; kv_lora_rank {cfg.kv_lora_rank} + rope {cfg.qk_rope_head_dim}: {count.cache_bytes_per_token(cfg, 2):,} cache bytes a token in bf16.
The whole recipe, teacher included, takes {(240 + pre["seconds"] + sft["seconds"]) / 60:.0f} GPU minutes.

## Data

1. Dialogues, stories and thoughts written by **SmolLM2-135M-Instruct** (Apache-2.0) from our prompts: {sum(teacher["lines"].values()):,} pieces,
   {teacher["kept_tokens"]:,} tokens kept of {teacher["generated_tokens"]:,} (`runs/nano/dialogues.py`). The teacher is weak; so are its facts.
2. 60,000 exact conversations made by rules (`runs/nano/exact.py`): who it is, small talk, sums, letters and words, a few
   hundred facts; half of them with steps that check themselves.
3. Text of Debian packages (`runs/nano/corpus.py`):

| package | licence | documents | characters |
|---|---|---|---|
{rows}

## Exam

{exam["questions"]} questions held out from the exact lessons, greedy decoding: **{exam["direct"]:.0%}** right without thinking, **{exam["thinking"]:.0%}** with DeepThink.

| kind | direct | DeepThink |
|---|---|---|
{by_kind}

## What it says (greedy)

{said}
The weights are released under the MIT licence of this repository.
"""


if __name__ == "__main__":
    main()
