"""`rorqual train --dry-run`: what a run would do, before it does any of it.

The configuration resolved, the budget laid out in steps, every schedule as a line of blocks on the terminal and as a
picture in the run directory, and what the model and its optimiser take in memory. Nothing is allocated and no data read.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rorqual.config import ModelConfig, dump_toml
from rorqual.plan.count import totals, training_flops_per_token
from rorqual.train.config import RunConfig
from rorqual.train.limits import size
from rorqual.train.schedule import Timeline

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def describe_run(cfg: RunConfig, model_cfg: ModelConfig, timeline: Timeline) -> str:
    """cfg is resolved. Several lines of text."""
    parameters, active = totals(model_cfg)
    moments = {"float32": 4, "bfloat16": 2}[cfg.optim.moments] * (1 if cfg.optim.name == "muon" else 2)
    state = parameters * (4 + 4 + moments)
    flops = training_flops_per_token(model_cfg, cfg.data.seq_len) * timeline.total_tokens
    lines = [
        dump_toml(cfg),
        f"model: {parameters:,} parameters, {active:,} active for each token",
        f"budget: {timeline.total_tokens:,} tokens in {timeline.steps:,} steps; {flops:.3g} FLOP",
        f"weights, gradients and moments: {size(state)}, activations of {cfg.micro_batch} rows beside",
        "",
        *(f"{name:>20}  {sparkline(y)}  {_range(y)}" for name, (_, y) in timeline.curves(WIDTH).items()),
    ]
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.3g} at first, {max(values):.3g} at most, {values[-1]:.3g} at the end"


def sparkline(values: Sequence[float]) -> str:
    """One block for each value, from zero to the largest."""
    top = max(values) or 1.0
    return "".join(BLOCKS[round(v / top * (len(BLOCKS) - 1))] for v in values)


def draw(timeline: Timeline, path: Path) -> bool:
    """The schedules as a picture (by its suffix: .png, .svg); False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    curves = timeline.curves()
    figure = Figure(figsize=(9, 2.1 * len(curves)), layout="constrained")
    axes: Any = figure.subplots(len(curves), 1, sharex=True)
    for axis, (name, (x, y)) in zip(axes, curves.items(), strict=True):
        axis.plot(x, y, drawstyle="steps-pre" if name.startswith("batch") else "default")
        axis.set_ylim(bottom=0)
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
