"""`rorqual distill`."""

from __future__ import annotations

import typer

from rorqual.cli.train import Overrides, RunFile, finish


def distill(run: RunFile, overrides: Overrides = None) -> None:
    """Teach a model a teacher's whole distributions: heals a converted model, or compresses one into another.

    The run file names `init_from` (the student), `distill.teacher`, and data of `rorqual data prepare`; sources with
    target = "data" are learned from their own tokens. MTP modules learn along, or alone where the rest is frozen.
    `quantise.to` trains for the storage the model is shipped in. Resumes like `train`.

    Example:

        rorqual distill runs/bundled/heal.toml --set steps=200 --set out=out/trial
    """
    from rorqual.config import load_toml
    from rorqual.post.distill import distill as run_distill
    from rorqual.train.config import RunConfig

    record = run_distill(load_toml(RunConfig, run, overrides or []), say=lambda text: typer.echo(text, err=True))
    finish(record.model, record.last)
