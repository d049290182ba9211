"""`rorqual train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(help="A run file in TOML; see runs/ for examples.", metavar="RUN.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key, as often as needed: --set optim.lr=3e-4.", metavar="K=V"),
]


def train(run: RunFile, overrides: Overrides = None) -> None:
    """Pretrain a model on one device.

    The run directory (`out` in the file) receives config.toml, metrics.jsonl, TensorBoard events, checkpoints and at
    the end model/, a directory that transformers, vLLM and `rorqual serve` load. The same command resumes a run that
    was stopped or killed.

    Examples:

        rorqual train runs/tiny-cpu/pretrain.toml

        rorqual train runs/nano/pretrain.toml --set steps=200 --set out=out/trial
    """
    from rorqual.config import load_toml
    from rorqual.train.config import RunConfig
    from rorqual.train.pretrain import pretrain

    cfg = load_toml(RunConfig, run, overrides or [])
    record = pretrain(cfg, say=lambda text: typer.echo(text, err=True))
    finish(record.model, record.last)


def finish(model: Path | None, last: dict[str, object]) -> None:
    """The closing line of a run."""
    if model is not None:
        val = f", val loss {last['val_loss']:.4f}" if "val_loss" in last else ""
        typer.echo(f"{model}: trained to step {last.get('step')}, loss {last.get('loss', float('nan')):.4f}{val}")
