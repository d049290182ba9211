"""`rorqual sft`."""

from __future__ import annotations

import typer

from rorqual.cli.train import Overrides, RunFile, finish, launched


def sft(run: RunFile, overrides: Overrides = None) -> None:
    """Fine-tune a model on conversations.

    Whole conversations are packed into rows, masked from each other, and only the assistant's words are learned.

    The run file names `init_from` (the model to start from) and data of `rorqual data prepare`. Resumes like `train`.

    Example:

        rorqual sft runs/tiny-cpu/sft.toml --set optim.lr=5e-4
    """
    from rorqual.config import load_toml
    from rorqual.post.sft import sft as run_sft
    from rorqual.train.config import RunConfig

    replicas, cfg = launched(), load_toml(RunConfig, run, overrides or [])
    record = run_sft(cfg, say=lambda text: typer.echo(text, err=True), replicas=replicas)
    if replicas.first:
        finish(record.model, record.last)
