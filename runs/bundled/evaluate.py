"""Models against their teacher on held-out shards: perplexity, divergence, first choices, and the drafts' agreement.

    python runs/bundled/evaluate.py --teacher smollm2.gguf --model healed=out/bundled/mtp/model \\
        --shards chat=out/bundled/shards/chat/val --run runs/bundled/heal.toml --out evaluation.json

The run file says what the teacher reads in place of our markers. Only positions that a model learns are counted: of a
conversation, what the assistant says. Weights are computed with as they are stored, in the precision given.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import load_model
from rorqual.checkpoint.hf import DTYPES
from rorqual.cli.bench_report import environment
from rorqual.config import load_toml
from rorqual.data.packing import PackedStream
from rorqual.data.shards import Reader
from rorqual.model.transformer import Transformer
from rorqual.post.distill import Teacher, expansion_table, load_teacher
from rorqual.post.expand import Expansion
from rorqual.train.config import RunConfig


@torch.no_grad()
def compare(
    model: Transformer | None, teacher: Teacher, expansion: Expansion, data: PackedStream, rows: int
) -> dict[str, float]:
    """Means over the learned positions of the first rows; model None: the teacher against itself. Nats and shares."""
    sums = torch.zeros(5, dtype=torch.float64)
    for i in range(rows):
        tokens, documents, mask = (torch.from_numpy(a).to(expansion.lengths_V.device) for a in data.rows(i, 1))
        inputs, words, learned = tokens[:, :-1], tokens[0, 1:], mask[0, 1:] > 0
        spelled, _, places = expansion(inputs, documents[:, :-1])
        reference = teacher.head(teacher.hidden(spelled)[0][0, places[0]]).float().log_softmax(-1)
        logs, agree = reference, torch.zeros(len(words), device=words.device)
        if model is not None:
            h, _ = model.hidden(inputs)
            logs = model.head(h)[0].float().log_softmax(-1)
            if model.mtp:
                (draft, *_), _ = model.predict_further(h[:, :-1], [inputs[:, 1:]])
                agree[1:] = (model.head(draft)[0].argmax(-1) == logs[1:].argmax(-1)).float()
        nll = -logs.gather(1, words[:, None])[:, 0]
        kl = (reference.exp() * (reference - logs)).sum(-1)
        same = (logs.argmax(-1) == reference.argmax(-1)).float()
        sums += torch.stack([x[learned].sum() for x in (nll, kl, same, agree)] + [learned.sum()]).double().cpu()
    nll, kl, same, agree, count = sums.tolist()
    return {
        "perplexity": math.exp(nll / count), "kl": kl / count, "same_first_choice": same / count,
        "draft_agreement": agree / count, "tokens": count,
    }  # fmt: skip


def pairs(items: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (item.partition("=") for item in items)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--shards", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    o = parser.parse_args()
    device, dtype, models = torch.device(o.device), DTYPES[o.dtype], pairs(o.model)
    settings = load_toml(RunConfig, o.run, [f"distill.teacher={o.teacher}"]).distill
    assert settings is not None
    teacher, vocab = load_teacher(o.teacher, dtype, device)
    table = expansion_table(settings, str(next(iter(models.values()))))
    expansion = Expansion(table, vocab, device)
    data = {name: PackedStream([Reader(path)], o.seq_len, seed=0) for name, path in pairs(o.shards).items()}
    result: dict[str, Any] = {"dtype": o.dtype, "rows": o.rows, "seq_len": o.seq_len, "models": {}}
    result["environment"] = environment(str(device))
    for name, path in {"teacher": None, **models}.items():
        model = None if path is None else load_model(path, dtype, device, dequantize=True)
        result["models"][name] = {
            s: compare(model, teacher, expansion, d, min(o.rows, d.rows_per_epoch)) for s, d in data.items()
        }
        for shards, x in result["models"][name].items():
            shares = f"same first choice {x['same_first_choice']:.1%}  drafts {x['draft_agreement']:.1%}"
            print(f"{name:>10} {shards:>8}: perplexity {x['perplexity']:.3f}  KL {x['kl']:.4f}  {shares}", flush=True)
    o.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
