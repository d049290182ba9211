"""report.html: a run on one page that needs nothing else: its numbers, its curves, and where its tokens went.

Drawn from what the run directory holds (config.toml, metrics.jsonl, expert_load.jsonl), so it can be written again at any
time. The heat maps show each routed layer's experts over the run, relative to an even load: stripes are experts that stay
starved or crowded.
"""

from __future__ import annotations

import html
import io
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rorqual.config import from_dict
from rorqual.train.config import RunConfig
from rorqual.train.limits import size
from rorqual.train.record import duration, read_metrics
from rorqual.train.schedule import Timeline

SMOOTH = 0.9
"""Of the exponential average that is drawn over the raw loss, as in the paper's figures."""
COLUMNS = 200
"""Most points in time that a heat map shows."""


def write(run: Path) -> Path | None:
    """Write report.html; None where matplotlib is not installed or no step was made."""
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    if not lines or find_spec("matplotlib") is None:
        return None
    cfg = from_dict(RunConfig, tomllib.loads((run / "config.toml").read_text(encoding="utf-8")), str(run))
    loads_file = run / "expert_load.jsonl"
    loads = read_metrics(loads_file) if loads_file.is_file() else []
    pictures = [_curves(lines), _schedules(Timeline(cfg))] + ([_heat_maps(loads)] if loads else [])
    body = "\n".join(
        f"<h2>{title}</h2>\n{picture}"
        for title, picture in zip(("Curves", "Schedules", "Load of the experts"), pictures, strict=False)
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
svg {{ max-width: 100%; height: auto }} td {{ padding: 0 1.5rem 0 0 }}
pre {{ background: #f5f5f5; padding: 1rem; overflow: auto }}
</style></head><body>
<h1>{html.escape(run.name)}</h1>
{_numbers(lines)}
{body}
<h2>Configuration</h2>
<pre>{html.escape((run / "config.toml").read_text(encoding="utf-8"))}</pre>
</body></html>
"""
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _numbers(lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]
    vals = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    rate = float(np.median([line["tokens_per_s"] for line in lines]))
    rows = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "loss": "not a number" if last["loss"] is None else f"{last['loss']:.4f}",
        "validation loss": f"{vals[-1]:.4f}, at best {min(vals):.4f}" if vals else "none",
        "steps not applied": f"{sum(bool(line.get('skipped')) for line in lines):,}",
        "tokens/s, median": f"{rate:,.0f}",
        "MFU, median": f"{float(np.median([line['mfu'] for line in lines])):.1%}",
        "peak memory": size(max(line["memory_bytes"] for line in lines)),
        "time": duration(last["elapsed_s"]),
    }
    cells = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"


def _figure(rows: int, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height * rows), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns)).ravel()


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _curves(lines: Sequence[dict[str, Any]]) -> str:
    """Loss, and below it what explains it."""
    shown = {
        "loss": ("loss", "val_loss", "val_loss_ema"),
        "loss of further tokens (MTP)": ("mtp_loss",),
        "gradient norm": ("grad_norm",),
        "MaxVio: the busiest expert above the mean": ("max_violation",),
        "tokens/s": ("tokens_per_s",),
        "MFU": ("mfu",),
    }
    figure, axes = _figure(3, 2.8, 2)
    for axis, (title, keys) in zip(axes, shown.items(), strict=True):
        for key in keys:
            points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            if key.startswith("val"):
                axis.plot(x, y, marker="o", markersize=3, label=key)
            else:
                axis.plot(x, y, alpha=0.35, linewidth=0.8)
                axis.plot(x, smoothed(y), label=key)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("tokens", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return _svg(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential average with weight SMOOTH on the past, without the bias of its start."""
    out, total, weight = [], 0.0, 0.0
    for v in values:
        total, weight = SMOOTH * total + (1 - SMOOTH) * v, SMOOTH * weight + (1 - SMOOTH)
        out.append(total / weight)
    return out


def _schedules(timeline: Timeline) -> str:
    curves = timeline.curves()
    figure, axes = _figure(2, 2.4, 2)
    for axis, (name, (x, y)) in zip(axes, curves.items(), strict=True):
        axis.plot(x, y)
        axis.set_ylim(bottom=0)
        axis.set_title(name, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
    return _svg(figure)


def _heat_maps(lines: Sequence[dict[str, Any]]) -> str:
    """One map a routed layer: experts down, steps along, load relative to the mean (1 is even)."""
    maps = relative_loads(lines)
    figure, axes = _figure(-(-len(maps) // 2), 2.2, 2)
    for axis in axes[len(maps) :]:
        axis.set_visible(False)
    for layer, (axis, heat) in enumerate(zip(axes, maps, strict=False)):
        extent = (lines[0]["step"], lines[-1]["step"] + 1, heat.shape[0], 0)
        image = axis.imshow(heat, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2, extent=extent)
        axis.set_title(f"routed layer {layer}", loc="left", fontsize=10)
    figure.colorbar(image, ax=list(axes), label="load / mean")
    return _svg(figure)


def relative_loads(lines: Sequence[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[layers, experts, times]: each expert's tokens over the layer's mean, averaged over equal stretches of the run."""
    loads = np.array([line["loads"] for line in lines], dtype=np.float64)  # [times, layers, experts]
    stretches = np.array_split(loads, min(COLUMNS, len(loads)))
    means = np.stack([s.mean(0) for s in stretches], axis=-1)
    relative: np.ndarray[Any, np.dtype[np.float64]] = means / means.mean(1, keepdims=True)
    return relative
