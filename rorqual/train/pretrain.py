"""`pretrain(cfg)`: a run from its configuration to a model directory. Fine-tuning is the same loop over other rows.

A run directory holds config.toml (resolved), metrics.jsonl, checkpoints/, TensorBoard events, report.html, and at the end
model/.
Called again with the same configuration it goes on from the newest checkpoint, and does nothing when it is finished.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.hf import DTYPES
from rorqual.config import ModelConfig, dump_toml, from_dict, to_dict
from rorqual.data.packing import PackedSamples, PackedStream
from rorqual.data.shards import Reader, write_atomic
from rorqual.errors import ConfigError, DataError, TrainingError
from rorqual.model.precision import train_in_fp8
from rorqual.model.transformer import Transformer
from rorqual.plan.count import totals
from rorqual.train import checkpoints, report
from rorqual.train.config import Kind, RunConfig, Source, resolve
from rorqual.train.hardware import describe
from rorqual.train.limits import OutOfMemory, no_room, out_of_memory, size
from rorqual.train.loop import Loop
from rorqual.train.replicas import ALONE, Replicas
from rorqual.train.schedule import Timeline
from rorqual.train.trainer import LossFunction, Trainer

log = logging.getLogger(__name__)
MakeLoss = Callable[[RunConfig, Transformer], LossFunction]
"""What a step minimises, from the resolved configuration and the model."""


@dataclass(frozen=True)
class RunRecord:
    """What a finished (or interrupted) run left: its directory, the exported model, and its last metrics."""

    directory: Path
    model: Path | None
    step: int
    last: dict[str, Any]


def pretrain(
    cfg: RunConfig,
    kind: Kind = "pretrain",
    say: Callable[[str], None] = log.info,
    make_loss: MakeLoss | None = None,
    replicas: Replicas = ALONE,
) -> RunRecord:
    """Run or resume `cfg`. make_loss: None for the next tokens. replicas: this process's place among those of the run, which
    all call this. Raises ConfigError, DataError, CheckpointError, TrainingError; on SIGTERM or Ctrl-C writes a checkpoint
    and returns."""
    cores = torch.get_num_threads()
    cfg = resolve(cfg, kind=kind, cuda=torch.cuda.is_available(), cores=cores, replicas=replicas.world)
    device = replicas.device(cfg.device)
    with replicas.joined(device):
        return _run(cfg, device, say if replicas.first else log.debug, make_loss, replicas)


def _run(
    cfg: RunConfig, device: torch.device, say: Callable[[str], None], make_loss: MakeLoss | None, replicas: Replicas
) -> RunRecord:
    run = Path(cfg.out)
    model_cfg = model_config(cfg)
    # The data are opened first: a run that cannot start must not claim its directory.
    train, val = open_rows(cfg, model_cfg, cfg.data.train, Timeline(cfg).total_tokens), None
    if cfg.data.val:
        val = open_rows(cfg, model_cfg, cfg.data.val)
    if replicas.first:
        with full_disk_is_said(run):
            _claim(run, cfg, model_cfg)
    replicas.wait()
    assert isinstance(cfg.threads, int)
    torch.set_num_threads(cfg.threads)
    trainer = _trainer(cfg, model_cfg, device, make_loss, replicas)
    done, progress = 0, {"elapsed_s": 0.0}
    if saved := checkpoints.steps(run):
        done, progress = saved[-1], checkpoints.restore(run, saved[-1], trainer)
        say(f"resuming after step {done}")
    several = f"{replicas.world} × " if replicas.world > 1 else ""
    say(f"{several}{describe(device)}: {model_summary(trainer.model)}; run directory {run}")
    with full_disk_is_said(run):
        loop = Loop(cfg, trainer, run, done, progress, say)
        try:
            with signals_stop(loop):
                loop.run(train, val)
        finally:
            loop.close()
        if replicas.first and cfg.report and loop.step > done and (page := report.write(run)) is not None:
            say(f"curves and expert loads: {page}")
    if loop.step < loop.steps:
        again = "the same command goes on from there" if cfg.checkpoint_every else "nothing is saved, as told"
        say(f"stopped after step {loop.step}; {again}")
        return RunRecord(run, None, loop.step, loop.last)
    if not cfg.checkpoint_every:
        return RunRecord(run, None, loop.step, loop.last)
    if replicas.first:
        _export(trainer, run, done, loop.step)
    replicas.wait()  # whoever returns finds the model there
    return RunRecord(run, run / "model", loop.step, loop.last)


def _trainer(
    cfg: RunConfig, model_cfg: ModelConfig, device: torch.device, make_loss: MakeLoss | None, replicas: Replicas
) -> Trainer:
    """Raises TrainingError where the model alone, or with its teacher, does not fit."""
    try:
        model = build_model(cfg, model_cfg, device)
        return Trainer(cfg, model, None if make_loss is None else make_loss(cfg, model), replicas)
    except OutOfMemory as error:
        if not out_of_memory(error):
            raise
        needed = 4 * totals(model_cfg)[0]
        beside = ", and the teacher's stand beside them" if cfg.distill is not None and cfg.distill.teacher else ""
        raise TrainingError(
            f"out of memory: the weights alone take {size(needed)} in fp32{beside}", remedy="train a smaller model"
        ) from error


@contextmanager
def full_disk_is_said(run: Path) -> Iterator[None]:
    """Turns the system's error about a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if not no_room(error):
            raise
        raise TrainingError(
            f"the disk of {run} is full: {error}", remedy="make room and give the same command again"
        ) from error


def _export(trainer: Trainer, run: Path, done: int, step: int) -> None:
    """model/, and model-ema/ where there is an average, unless an earlier call left them."""
    cfg, export = trainer.cfg, run / "model"
    if (export / "config.json").is_file() and step == done:
        return
    options: dict[str, Any] = {
        "dtype": DTYPES[cfg.export_dtype], "files_from": cfg.data.tokenizer or cfg.init_from or None
    }  # fmt: skip
    if trainer.average is not None:
        with trainer.average.in_place():
            save_model(trainer.model, run / "model-ema", **options)
    save_model(trainer.model, export, **options)


@contextmanager
def signals_stop(loop: Loop) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the loop after the step under way, so that what is saved is whole; a second Ctrl-C
    does not wait. Only the main thread can hear signals; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if loop.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        loop.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def model_config(cfg: RunConfig) -> ModelConfig:
    """The configuration of the model to train: of `init_from` where given, else `model`."""
    if cfg.init_from:
        if cfg.model:
            raise ConfigError("give model or init_from, not both", remedy="init_from brings its own configuration")
        return ModelConfig.load(cfg.init_from)
    return ModelConfig.load(cfg.model)


def build_model(cfg: RunConfig, model_cfg: ModelConfig, device: torch.device) -> Transformer:
    """fp32 parameters under activations of cfg.dtype; seeded initialisation or the weights of init_from; multiplied in
    cfg.precision."""
    model = _weights(cfg, model_cfg, device)
    if cfg.precision == "fp8":
        train_in_fp8(model)
    return model


def _weights(cfg: RunConfig, model_cfg: ModelConfig, device: torch.device) -> Transformer:
    compute = None if cfg.dtype == "float32" else DTYPES[cfg.dtype]
    if cfg.init_from:
        # Quantised weights are no parameters, and a view of a file is no place for an optimiser's updates.
        return load_model(cfg.init_from, torch.float32, device, compute, dequantize=True, memory_map=False).train()
    # Drawn on the CPU, so that a seed means the same weights on every machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        drawn = Transformer(model_cfg)
    if device.type == "cpu" and compute is None:
        return drawn
    model = Transformer(model_cfg, device=device, compute_dtype=compute, init=False)
    model.load_state_dict(drawn.state_dict())
    return model


def open_rows(
    cfg: RunConfig, model_cfg: ModelConfig, sources: Sequence[Source], budget: int | None = None
) -> PackedStream | PackedSamples:
    """The packed rows of some sources; budget: tokens of the run, where sources may say their epochs. Raises DataError where
    they do not fit the model, ConfigError for a mixture that cannot be."""
    readers = [Reader(s.path) for s in sources]
    for reader in readers:
        if cfg.data.verify:
            reader.verify()
        if reader.meta.vocab_size > model_cfg.vocab_size:
            raise DataError(
                f"{reader.directory} has a vocabulary of {reader.meta.vocab_size}, the model {model_cfg.vocab_size}",
                remedy="prepare the data with the model's tokenizer",
            )
    extra = 1 + model_cfg.num_nextn_predict_layers
    marks = [2 if s.target == "data" else 1 for s in sources]
    shares = mixture(sources, [r.tokens for r in readers], budget)
    if cfg.data.packing == "samples":
        if shares is not None:
            raise ConfigError(
                "packing = samples goes through all sources together: weights and epochs have no effect there",
                remedy="remove them, or repeat a source in data.train",
            )
        return PackedSamples(readers, cfg.data.seq_len, cfg.seed, extra, marks)
    return PackedStream(readers, cfg.data.seq_len, cfg.seed, shares, extra, marks)


def mixture(sources: Sequence[Source], tokens: Sequence[int], budget: int | None) -> list[float] | None:
    """Each source's share of the rows, None for by size. A source with `epochs` gets what that many take of the budget; the
    others divide the rest by weight, or by size."""
    rest = [s for s in sources if s.epochs is None]
    if any(s.weight is None for s in rest) and any(s.weight is not None for s in rest):
        raise ConfigError("give every source of a mixture a weight, or none", remedy="or say its epochs")
    if len(rest) == len(sources):
        return [s.weight for s in sources if s.weight is not None] or None
    if budget is None:
        raise ConfigError("epochs belong to the sources of data.train", remedy="remove them from data.val")
    fixed = [s.epochs * n / budget if s.epochs is not None else 0.0 for s, n in zip(sources, tokens, strict=True)]
    left = 1 - sum(fixed)
    if left < -1e-3 or (rest and left < 1e-3) or (not rest and left > 1e-3):
        given = sum(fixed) * budget
        raise ConfigError(
            f"the epochs asked for are {given:,.0f} tokens of a budget of {budget:,}",
            remedy=f"set tokens={given:.0f}" if not rest else "ask for fewer epochs, or raise the budget",
        )
    plain = [s.weight or n for s, n in zip(sources, tokens, strict=True) if s.epochs is None]
    remaining = iter(w / sum(plain) * left for w in plain)
    return [next(remaining) if s.epochs is None else f for s, f in zip(sources, fixed, strict=True)]


def model_summary(model: Transformer) -> str:
    n = sum(p.numel() for p in model.parameters())
    return f"{n / 1e6:.1f} M parameters"


def _claim(run: Path, cfg: RunConfig, model_cfg: ModelConfig) -> None:
    """Write the resolved configuration, or refuse a directory that holds another run."""
    file = run / "config.toml"
    # The machine is not part of what a run *is*: one may resume elsewhere.
    machine = {
        "device",
        "threads",
        "compile",
        "graph",
        "recompute",
        "micro_batch",
        "dtype",
        "precision",
        "report",
        "dashboard",
    }
    mine = to_dict(cfg)
    if file.is_file():
        import tomllib

        theirs = to_dict(from_dict(RunConfig, tomllib.loads(file.read_text()), str(file)))
        if (mine["precision"] == "fp8") != (theirs["precision"] == "fp8"):
            machine.remove("precision")
        differing = sorted(k for k in {*mine, *theirs} - machine if mine.get(k) != theirs.get(k))
        if differing:
            raise ConfigError(
                f"{run} holds a run with other settings ({', '.join(differing)})",
                remedy="choose another `out`, or delete that directory to start over",
            )
    run.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a kill here must not leave a run that nothing can resume.
    write_atomic(file, dump_toml(cfg).encode())
    write_atomic(run / "model_config.json", (json.dumps(model_cfg.to_json(), indent=2) + "\n").encode())
