"""`pretrain(cfg)`: a run from its configuration to a model directory. Fine-tuning is the same loop over other rows.

A run directory holds config.toml (resolved), metrics.jsonl, checkpoints/, TensorBoard events, and at the end model/.
Called again with the same configuration it goes on from the newest checkpoint, and does nothing when it is finished.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.hf import DTYPES
from rorqual.config import ModelConfig, dump_toml, from_dict, to_dict
from rorqual.data.packing import PackedSamples, PackedStream
from rorqual.data.shards import Reader
from rorqual.errors import ConfigError, DataError
from rorqual.model.transformer import Transformer
from rorqual.plan.count import training_flops_per_token
from rorqual.train import checkpoints, schedule
from rorqual.train.config import Kind, RunConfig, Source, resolve
from rorqual.train.hardware import describe, memory_bytes, peak_flops
from rorqual.train.loss import losses
from rorqual.train.record import Events, LiveLine, MetricsFile, read_metrics
from rorqual.train.trainer import METRICS, Fetch, LossFunction, StepResult, Trainer

log = logging.getLogger(__name__)


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
    make_loss: Callable[[RunConfig, Transformer], LossFunction] | None = None,
) -> RunRecord:
    """Run or resume `cfg`. make_loss: what a step minimises, from the resolved configuration and the model (None: the
    next tokens). Raises ConfigError, DataError, CheckpointError; on Ctrl-C writes a checkpoint and returns."""
    cfg = resolve(cfg, kind=kind, cuda=torch.cuda.is_available(), cores=torch.get_num_threads())
    run = Path(cfg.out)
    model_cfg = model_config(cfg)
    # The data are opened first: a run that cannot start must not claim its directory.
    train, val = open_rows(cfg, model_cfg, cfg.data.train), None
    if cfg.data.val:
        val = open_rows(cfg, model_cfg, cfg.data.val)
    _claim(run, cfg, model_cfg)
    device = torch.device(cfg.device)
    assert isinstance(cfg.threads, int)
    torch.set_num_threads(cfg.threads)
    model = build_model(cfg, model_cfg, device)
    trainer = Trainer(cfg, model, losses if make_loss is None else make_loss(cfg, model))
    done, progress = 0, {"tokens": 0, "elapsed_s": 0.0}
    if saved := checkpoints.steps(run):
        done, progress = saved[-1], checkpoints.restore(run, saved[-1], trainer)
        say(f"resuming after step {done}")
    say(f"{describe(device)}: {model_summary(trainer.model)}; run directory {run}")
    loop = Loop(cfg, trainer, run, done, progress, say)
    try:
        loop.run(train, val)
    except KeyboardInterrupt:
        loop.save()
        say(f"interrupted after step {loop.step}; the same command goes on from there")
        return RunRecord(run, None, loop.step, loop.last)
    finally:
        loop.close()
    export = run / "model"
    if not (export / "config.json").is_file() or loop.step > done:
        save_model(
            trainer.model,
            export,
            dtype=DTYPES[cfg.export_dtype],
            files_from=cfg.data.tokenizer or cfg.init_from or None,
        )
    return RunRecord(run, export, loop.step, loop.last)


def model_config(cfg: RunConfig) -> ModelConfig:
    """The configuration of the model to train: of `init_from` where given, else `model`."""
    if cfg.init_from:
        if cfg.model:
            raise ConfigError("give model or init_from, not both", remedy="init_from brings its own configuration")
        return ModelConfig.load(cfg.init_from)
    return ModelConfig.load(cfg.model)


def build_model(cfg: RunConfig, model_cfg: ModelConfig, device: torch.device) -> Transformer:
    """fp32 parameters under activations of cfg.dtype; seeded initialisation or the weights of init_from."""
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


def open_rows(cfg: RunConfig, model_cfg: ModelConfig, sources: Sequence[Source]) -> PackedStream | PackedSamples:
    """The packed rows of some sources. Raises DataError where they do not fit the model."""
    readers = [Reader(s.path) for s in sources]
    for reader in readers:
        if reader.meta.vocab_size > model_cfg.vocab_size:
            raise DataError(
                f"{reader.directory} has a vocabulary of {reader.meta.vocab_size}, the model {model_cfg.vocab_size}",
                remedy="prepare the data with the model's tokenizer",
            )
    extra = 1 + model_cfg.num_nextn_predict_layers
    marks = [2 if s.target == "data" else 1 for s in sources]
    if cfg.data.packing == "samples":
        return PackedSamples(readers, cfg.data.seq_len, cfg.seed, extra, marks)
    weights = [s.weight for s in sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ConfigError("give every source of a mixture a weight, or none")
    return PackedStream(
        readers, cfg.data.seq_len, cfg.seed, [w for w in weights if w is not None] or None, extra, marks
    )


def model_summary(model: Transformer) -> str:
    n = sum(p.numel() for p in model.parameters())
    return f"{n / 1e6:.1f} M parameters"


def _claim(run: Path, cfg: RunConfig, model_cfg: ModelConfig) -> None:
    """Write the resolved configuration, or refuse a directory that holds another run."""
    file = run / "config.toml"
    # The machine is not part of what a run *is*: one may resume elsewhere.
    machine = {"device", "threads", "compile", "micro_batch", "dtype"}
    mine = to_dict(cfg)
    if file.is_file():
        import tomllib

        theirs = to_dict(from_dict(RunConfig, tomllib.loads(file.read_text()), str(file)))
        differing = sorted(k for k in {*mine, *theirs} - machine if mine.get(k) != theirs.get(k))
        if differing:
            raise ConfigError(
                f"{run} holds a run with other settings ({', '.join(differing)})",
                remedy="choose another `out`, or delete that directory to start over",
            )
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_toml(cfg), encoding="utf-8")
    (run / "model_config.json").write_text(json.dumps(model_cfg.to_json(), indent=2) + "\n", encoding="utf-8")


class Loop:
    """The steps of a run, its records and its checkpoints."""

    def __init__(
        self,
        cfg: RunConfig,
        trainer: Trainer,
        run: Path,
        done: int,
        progress: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.cfg, self.trainer, self.directory, self.step = cfg, trainer, run, done
        self.tokens, self.elapsed = int(progress["tokens"]), float(progress["elapsed_s"])
        self.last: dict[str, Any] = next(reversed(_history(run, done)), {})
        self.metrics, self.events = MetricsFile(run / "metrics.jsonl", done), Events(run, done)
        self.live, self.say = LiveLine(cfg.steps), say
        self.peak, self.peak_source = peak_flops(trainer.model.device)
        self.flops_per_token = training_flops_per_token(trainer.model.cfg, cfg.data.seq_len)
        self.pending: list[tuple[int, StepResult, float]] = []
        self.recent: deque[float] = deque(maxlen=50)
        self.saved_at = time.monotonic()

    def run(self, train: PackedStream | PackedSamples, val: PackedStream | PackedSamples | None) -> None:
        """From the step reached to the last."""
        cfg, cuda = self.cfg, self.trainer.model.device.type == "cuda"
        if self.step < cfg.steps:
            self.say(f"MFU is measured against {self.peak / 1e12:.3g} TFLOP/s: {self.peak_source}")
        while self.step < cfg.steps:
            start = time.perf_counter()
            result = self.trainer.step(self.step, train.rows)
            self.step += 1
            self.tokens += cfg.batch * cfg.data.seq_len
            self.pending.append((self.step, result, start))
            evaluate = val is not None and (self.step % cfg.eval_every == 0 or self.step == cfg.steps)
            # Reading a metric waits for the device; on a GPU that is done for ten steps at once.
            if evaluate or not cuda or len(self.pending) == 10 or self._due():
                self._flush(val.rows if evaluate and val is not None else None, val)
            if self._due():
                self.save()

    def _due(self) -> bool:
        cfg = self.cfg
        at_step = self.step % cfg.checkpoint_every == 0 or self.step == cfg.steps
        return at_step or time.monotonic() - self.saved_at > cfg.checkpoint_seconds

    def _flush(self, evaluate: Fetch | None = None, val: PackedStream | PackedSamples | None = None) -> None:
        """Write the pending steps' metrics, the last of them with a validation where asked."""
        if not self.pending:
            return
        values = torch.stack([r.values for _, r, _ in self.pending]).tolist()
        now = time.perf_counter()
        per_step = (now - self.pending[0][2]) / len(self.pending)
        device = self.trainer.model.device
        for (step, _, _), row in zip(self.pending, values, strict=True):
            self.elapsed += per_step
            self.recent.append(per_step)
            rate = self.cfg.batch * self.cfg.data.seq_len / per_step
            line = {
                "step": step,
                "tokens": step * self.cfg.batch * self.cfg.data.seq_len,
                **dict(zip(METRICS, row, strict=True)),
                "lr": schedule.learning_rate(self.cfg, step - 1),
                "tokens_per_s": rate,
                "mfu": rate * self.flops_per_token / self.peak,
                "memory_bytes": memory_bytes(device),
                "elapsed_s": self.elapsed,
            }
            if step == self.step and evaluate is not None and val is not None:
                rows = min(self.cfg.eval_rows, val.rows_per_epoch)
                line["val_loss"], line["mtp_agreement"] = self.trainer.evaluate(evaluate, rows, step - 1)
            self.metrics.write(line)
            self.events.write(line)
            self.last = {**{k: v for k, v in self.last.items() if k in ("val_loss", "mtp_agreement")}, **line}
        self.pending = []
        self.live.show(self.last, (self.cfg.steps - self.step) * sum(self.recent) / len(self.recent))

    def save(self) -> None:
        self._flush()
        self.metrics.flush()
        progress = {"tokens": self.tokens, "elapsed_s": self.elapsed}
        checkpoints.save(
            self.directory, self.step, self.trainer, progress, self.cfg.data.tokenizer or self.cfg.init_from
        )
        self.saved_at = time.monotonic()

    def close(self) -> None:
        self.metrics.close()
        self.events.close()


def _history(run: Path, done: int) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [line for line in read_metrics(path) if line["step"] <= done] if path.is_file() else []
