"""Checkpoints of a run: `checkpoints/step-N/` is a model directory in the released layout, in the run's own fp32, plus
the optimiser's moments and the average of the weights. Any engine can load one; a run resumes from the newest that is whole.

A directory is written under another name, flushed, and renamed: a kill at any instant leaves the previous ones intact.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import save_model
from rorqual.checkpoint.hf import load_model
from rorqual.errors import CheckpointError, TrainingError
from rorqual.train.limits import no_room, size
from rorqual.train.trainer import Trainer

STATE = "trainer.json"


def directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def save(run: Path, step: int, trainer: Trainer, progress: dict[str, Any], tokenizer: str) -> Path:
    """Write the state after `step` steps; older checkpoints beyond keep_checkpoints go. On a full disk all but the newest go
    and it is tried once more. Raises TrainingError where that does not help: nothing half-written stays."""
    target = directory(run, step)
    building = run / "checkpoints" / f".step-{step}.building"
    _sweep(run)
    for last_try in (False, True):
        try:
            _write(building, step, trainer, progress, tokenizer)
            break
        except (OSError, RuntimeError, CheckpointError) as error:
            _sweep(run)
            if not no_room(error):
                raise
            if last_try or len(steps(run)) < 2:
                raise _full(run, step, trainer) from error
            for old in steps(run)[:-1]:
                _remove(directory(run, old))
    _remove(target)
    building.rename(target)
    _sync_directory(target.parent)
    for old in steps(run)[: -trainer.cfg.keep_checkpoints]:
        _remove(directory(run, old))
    return target


def _write(building: Path, step: int, trainer: Trainer, progress: dict[str, Any], tokenizer: str) -> None:
    save_model(trainer.model, building, files_from=tokenizer or None)
    torch.save(trainer.optimizer.state_dict(), building / "optimizer.pt")
    if trainer.average is not None:
        torch.save(trainer.average.state_dict(), building / "ema.pt")
    (building / STATE).write_text(json.dumps({"step": step, **progress}) + "\n")
    for path in building.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sweep(run: Path) -> None:
    """What a kill or a full disk left half-written."""
    for path in run.glob("checkpoints/.*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Its state file first: what has one is whole, also if this is killed half-way."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _full(run: Path, step: int, trainer: Trainer) -> TrainingError:
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    kept = steps(run)
    stands = f"step {kept[-1]} stands saved" if kept else "nothing is saved yet"
    return TrainingError(
        f"no room for a checkpoint of about {size(3 * weights)} after step {step}: {run} has "
        f"{size(shutil.disk_usage(run).free)} free; {stands}",
        remedy="make room and give the same command again",
    )


def steps(run: Path) -> list[int]:
    """Steps with a whole checkpoint, oldest first."""
    found = run.glob(f"checkpoints/step-*/{STATE}")
    return sorted(int(p.parent.name.removeprefix("step-")) for p in found)


def restore(run: Path, step: int, trainer: Trainer) -> dict[str, Any]:
    """Load weights and moments in place; returns what `save` was given. Raises CheckpointError naming the damage."""
    source = directory(run, step)
    saved = load_model(source, dtype=torch.float32, device=trainer.model.device)
    trainer.model.load_state_dict(saved.state_dict())
    try:
        state = torch.load(source / "optimizer.pt", map_location=trainer.model.device, weights_only=True)
        trainer.optimizer.load_state_dict(state)
        if trainer.average is not None:
            trainer.average.load_state_dict(torch.load(source / "ema.pt", weights_only=True))
        progress: dict[str, Any] = json.loads((source / STATE).read_text())
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{source} cannot be resumed from: {error}", remedy="delete that checkpoint to go on from the one before"
        ) from error
    return progress


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
