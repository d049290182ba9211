"""`rorqual distill`."""

from __future__ import annotations

import typer

from rorqual.cli.train import Overrides, RunFile, finish, launched


def distill(run: RunFile, overrides: Overrides = None) -> None:
    """Teach a model a teacher's whole distributions: heals a converted model, or compresses one into another.

    The run file names `init_from` (the student), `distill.teacher`, and data of `rorqual data prepare`; sources with
    target = "data" are learned from their own tokens. MTP modules learn along, or alone where the rest is frozen.
    `quantise.to` trains for the storage the model is shipped in. Resumes like `train`, and like it runs on all GPUs of a
    host, each with the teacher beside the model.

    Examples:

        rorqual distill runs/bundled/heal.toml --set steps=200 --set out=out/trial

        torchrun --nproc-per-node 2 -m rorqual distill runs/bundled/heal.toml
    """
    from rorqual.config import load_toml
    from rorqual.post.distill import distill as run_distill
    from rorqual.train.config import RunConfig

    replicas, cfg = launched(), load_toml(RunConfig, run, overrides or [])
    record = run_distill(cfg, say=lambda text: typer.echo(text, err=True), replicas=replicas)
    if replicas.first:
        finish(record.model, record.last)
