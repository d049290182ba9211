"""What every `rorqual bench` does alike: taking turns, one table, one JSON file, hardware, versions and commit in both."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer


def finish(
    kind: str, facts: dict[str, Any], rows: list[dict[str, Any]], device: str, json_file: Path | None, most: int = 0
) -> None:
    """The table (of its first `most` rows, if that is not 0), where it was measured, and the JSON."""
    where = environment(device)
    told = ", ".join(f"{k} {f'{v:,.6g}' if isinstance(v, float) else v}" for k, v in facts.items())
    print_rows(f"{kind}: {told}", rows[: most or None])
    typer.echo(", ".join(f"{k} {v}" for k, v in where.items()))
    if json_file is not None:
        json_file.write_text(json.dumps({"kind": kind, **facts, "rows": rows, "environment": where}, indent=1) + "\n")


def interleaved(engines: Mapping[str, Callable[[], float | None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each engine's work, one after another within a round, after one unmeasured call each. An engine that
    times a part of its work itself returns those seconds."""
    import torch

    def timed(work: Callable[[], float | None]) -> float:
        start = time.perf_counter()
        own = work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return own if own is not None else time.perf_counter() - start

    for work in engines.values():
        timed(work)
        timed(work)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, work in engines.items():
            seconds[name].append(timed(work))
    return seconds


def report(
    kind: str,
    facts: dict[str, Any],
    rates: dict[str, list[float]],
    bound: float,
    bound_source: str,
    device: str,
    json_file: Path | None,
    more: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Print the table; write the JSON. `ratio` is the median of the per-round ratios of the first engine to this one. more:
    other figures of each engine, columns of their own."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{kind}: " + ", ".join(f"{k} {v}" for k, v in facts.items()), title_justify="left")
    first, more = next(iter(rates)), more or {}
    others = list(more.get(first, {}))
    for column in ("engine", "tokens/s", "spread", "of the bound", f"{first} / this", *others):
        table.add_column(column, justify="left" if column == "engine" else "right")
    ours = rates[first]
    result: dict[str, Any] = {"kind": kind, **facts, "bound_tokens_per_s": bound, "bound": bound_source, "engines": {}}
    for name, values in rates.items():
        median = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        figures = more.get(name, {})
        table.add_row(
            name, f"{median:,.1f}", f"{min(values):,.0f} - {max(values):,.0f}", f"{median / bound:.1%}", f"{ratio:.2f}",
            *(f"{figures[k]:,.3g}" for k in others),
        )  # fmt: skip
        result["engines"][name] = {
            "tokens_per_s": median, "runs": values, "of_bound": median / bound, "ratio": ratio, **figures,
        }  # fmt: skip
    result["environment"] = environment(device)
    console = Console()
    console.print(table)
    console.print(f"bound {bound:,.0f} tokens/s: {bound_source}")
    console.print(", ".join(f"{k} {v}" for k, v in result["environment"].items()))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


def environment(device: str) -> dict[str, str]:
    """Hardware, versions, commit and date of a measurement."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from rorqual.train.hardware import describe

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        "hardware": describe(torch.device(device)),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
    except OSError:
        import platform

        return platform.processor()
    return names[0] if names else "unknown"


COMMIT = "RORQUAL_COMMIT"
"""Names the commit of a copy that is no checkout: on a machine that the files alone were sent to."""


def commit() -> str:
    """$RORQUAL_COMMIT if it is set; else the short hash of this checkout, with + where it has changes; "unknown" for a copy
    of the files, also where that lies within another checkout."""
    if named := os.environ.get(COMMIT):
        return named
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Dictionaries of equal keys as a table; on its side where it is wider than high."""
    from rich.console import Console
    from rich.table import Table

    if not rows:
        return
    cells = [[f"{v:.3g}" if isinstance(v, float) and v < 1000 else _cell(v) for v in row.values()] for row in rows]
    heads, *lines = [list(rows[0]), *cells]
    if len(heads) > 8 and len(rows) < 5:
        heads, *lines = [list(line) for line in zip(heads, *lines, strict=True)]
    table = Table(*heads, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _cell(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
