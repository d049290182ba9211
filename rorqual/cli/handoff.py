"""`rorqual handoff`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def handoff(
    model: Annotated[str, typer.Argument(help="A model directory, or a bundled model.", metavar="DIR")],
    gpu_gb: Annotated[float, typer.Option("--gpu-gb", help="Memory of one GPU, for the split.", min=1)] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the commands with which vLLM, SGLang and llama.cpp serve this checkpoint, and why.

    Read from config.json and the headers of the weights: context, precision, MTP, kernels, splits, memory; and what an
    engine would refuse. Nothing is started.

    Examples:

        rorqual handoff rorqual-mini

        rorqual handoff /models/DeepSeek-V3 --gpu-gb 141

        rorqual handoff /models/DeepSeek-V3 --json
    """
    from rorqual.config import resolve_model
    from rorqual.plan.handoff import plan

    facts = plan(resolve_model(model), gpu_gb)
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    """Commands stand at the left edge, so that they can be copied; everything else is a shell comment."""
    out = [
        f"# {facts['model']}",
        f"# {facts['weights']} weights, {facts['weight_bytes']:,} bytes ({facts['weight_bytes_are']}), "
        f"{facts['mtp_modules']} MTP modules, context {facts['context']:,}",
    ]
    for size, gpus in facts["gpus"].items():
        stages = gpus["pipeline_parallel"]
        split = f"tensor parallel {gpus['tensor_parallel']}" + (f" x {stages} stages" if stages > 1 else "")
        out.append(f"# GPUs of {size} GB: {gpus['needed']} needed, {split}")
    for engine in facts["engines"]:
        out += ["", f"# ---- {engine['engine']} ----"]
        if engine["refused"]:
            out.append(f"# cannot serve it: {engine['refused']}")
            continue
        out += engine["commands"]
        out += [f"#   {reason}" for reason in engine["reasons"]]
        out += [f"#   CAUTION: {warning}" for warning in engine["warnings"]]
        out.append(f"#   serves {engine['endpoint']}")
    out += [line for note in facts["notes"] for line in ("", f"# {note}")]
    return out
