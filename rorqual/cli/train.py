"""`rorqual train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.train.config import RunConfig
    from rorqual.train.replicas import Replicas

RunFile = Annotated[Path, typer.Argument(help="A run file in TOML; see runs/ for examples.", metavar="RUN.toml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key, as often as needed: --set optim.lr=3e-4.", metavar="K=V"),
]


DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show the resolved configuration, the budget and every schedule as a picture; train nothing."
    ),
]


def train(run: RunFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Pretrain a model, on one device or on all GPUs of a host.

    The run directory (`out` in the file) receives config.toml, metrics.jsonl, TensorBoard events, checkpoints,
    report.html and at the end model/, a directory that transformers, vLLM and `rorqual serve` load. The same command
    resumes a run that was stopped (Ctrl-C, SIGTERM) or killed.

    Started by torchrun, the GPUs of one host share the micro-batches of each step, each with the whole model; `batch` must
    be a multiple of micro_batch times their number. Losses are those of one device, and either may go on with the other's
    run.

    Examples:

        rorqual train runs/tiny-cpu/pretrain.toml

        rorqual train runs/v3-miniature/pretrain.toml --dry-run

        rorqual train runs/nano/pretrain.toml --set steps=200 --set out=out/trial

        torchrun --nproc-per-node 8 -m rorqual train runs/nano/pretrain.toml
    """
    from rorqual.config import load_toml
    from rorqual.train.config import RunConfig
    from rorqual.train.pretrain import pretrain

    cfg = load_toml(RunConfig, run, overrides or [])
    if dry_run:
        show(cfg)
        return
    replicas = launched()
    record = pretrain(cfg, say=lambda text: typer.echo(text, err=True), replicas=replicas)
    if replicas.first:
        finish(record.model, record.last)


def launched() -> Replicas:
    """This process's place among those that torchrun started; by itself where none did. Raises ConfigError for several
    hosts."""
    from rorqual.train.replicas import ALONE, Replicas

    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return ALONE
    if os.environ.get("LOCAL_WORLD_SIZE") != world:
        raise ConfigError(
            f"WORLD_SIZE is {world}, but LOCAL_WORLD_SIZE {os.environ.get('LOCAL_WORLD_SIZE', 'not set')}",
            remedy="replicas run on one host, started by torchrun --nproc-per-node N",
        )
    return Replicas(int(os.environ["LOCAL_RANK"]), int(world))


def show(cfg: RunConfig) -> None:
    """The dry run."""
    import torch

    from rorqual.train.config import resolve
    from rorqual.train.dry_run import describe_run, draw
    from rorqual.train.pretrain import model_config
    from rorqual.train.schedule import Timeline

    cfg = resolve(cfg, kind="pretrain", cuda=torch.cuda.is_available(), cores=torch.get_num_threads())
    timeline = Timeline(cfg)
    typer.echo(describe_run(cfg, model_config(cfg), timeline))
    picture = Path(cfg.out) / "schedules.png"
    drawn = draw(timeline, picture)
    typer.echo(str(picture) if drawn else "for a picture: pip install matplotlib")


def finish(model: Path | None, last: dict[str, object]) -> None:
    """The closing line of a run."""
    if model is not None:
        val = f", val loss {last['val_loss']:.4f}" if "val_loss" in last else ""
        typer.echo(f"{model}: trained to step {last.get('step')}, loss {last.get('loss') or float('nan'):.4f}{val}")
