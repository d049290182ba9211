"""The steps of a run between its checkpoints: records, validation, the guard, and every way a run may have to stop.

Whatever ends it (Ctrl-C, SIGTERM, a full disk, no memory, a diverging loss), the newest checkpoint stands and the same
command goes on from there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rorqual.config import to_dict
from rorqual.data.packing import PackedSamples, PackedStream, Rows
from rorqual.errors import TrainingError
from rorqual.plan.count import training_flops_per_token
from rorqual.train import checkpoints
from rorqual.train.config import RunConfig
from rorqual.train.guard import Detours, Guard
from rorqual.train.hardware import memory_bytes, peak_flops
from rorqual.train.limits import OutOfMemory, out_of_memory
from rorqual.train.record import LiveLine, Records, read_metrics
from rorqual.train.trainer import METRICS, StepResult, Trainer

log = logging.getLogger(__name__)
Packed = PackedStream | PackedSamples
LOSS, NORM = METRICS.index("loss"), METRICS.index("grad_norm")


class Loop:
    """One process's part of a run. `step` counts finished steps; `stop` may be set at any time from a signal handler, in any
    replica. Every replica makes the same steps and decisions; the first one writes."""

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
        self.timeline, self.steps, self.say, self.stop = trainer.timeline, trainer.timeline.steps, say, False
        self.elapsed = float(progress["elapsed_s"])
        self.replicas = trainer.replicas
        self.live, self.detours = LiveLine(self.steps), Detours(run, self.replicas.first)
        peak, self.peak_source = peak_flops(trainer.model.device)
        self.peak = peak * self.replicas.world
        self.flops_per_token = training_flops_per_token(trainer.model.cfg, cfg.data.seq_len)
        self.saved_at = time.monotonic()
        self._open_records()

    def _open_records(self) -> None:
        """What the steps made so far left behind; called again after going back."""
        history = _history(self.directory, self.step)
        self.last: dict[str, Any] = history[-1] if history else {}
        nan = float("nan")
        rounded = self.trainer.shipped.on(min(self.step, self.steps - 1))
        alike = [h for h in history if self.trainer.shipped.on(h["step"] - 1) is rounded]
        seen = [(nan if h["loss"] is None else h["loss"], bool(h.get("skipped"))) for h in alike]
        self.guard = Guard(self.cfg.guard, seen)
        self.records = Records(
            self.directory, self.step, self.cfg.dashboard, to_dict(self.cfg), keep=self.replicas.first
        )
        self.pending: list[tuple[int, StepResult, float]] = []
        self.refused: dict[int, str] = {}
        self.recent: deque[float] = deque(maxlen=50)

    def run(self, train: Packed, val: Packed | None) -> None:
        """From the step reached to the last, or until `stop`. Raises TrainingError where it cannot go on."""
        if self.step < self.steps:
            self.say(f"MFU is measured against {self.peak / 1e12:.3g} TFLOP/s: {self.peak_source}")
        if self.cfg.guard.policy == "rewind" and not self.step and not checkpoints.steps(self.directory):
            self.save()
        stop, _ = self._asked()
        while self.step < self.steps and not stop:
            went_back = self._advance(train, val)
            stop, due = self._asked()
            if not went_back and (stop or due) and self.cfg.checkpoint_every:
                self.save()
        self._flush()

    def _advance(self, train: Packed, val: Packed | None) -> bool:
        """One step and what is shown of it; whether it was refused and the run went back instead."""
        cfg, cuda = self.cfg, self.trainer.model.device.type == "cuda"
        start = time.perf_counter()
        result = self._train(train)
        self.step += 1
        self.pending.append((self.step, result, start))
        if self.step in self.refused and cfg.guard.policy == "rewind":
            self._rewind()
            return True
        evaluate = val is not None and (self.step % cfg.eval_every == 0 or self.step == self.steps)
        # Reading a metric waits for the device; on a GPU that is done for ten steps at once.
        if evaluate or not cuda or len(self.pending) == 10:
            self._flush(val if evaluate else None)
        return False

    def _asked(self) -> tuple[bool, bool]:
        """Whether to stop, and whether a checkpoint is due: the same in all replicas, whose signals and clocks differ."""
        stop, late = self.replicas.any(self.stop, time.monotonic() - self.saved_at > self.cfg.checkpoint_seconds)
        return stop, late or self.step == self.steps or self.step % max(1, self.cfg.checkpoint_every) == 0

    def _train(self, train: Packed) -> StepResult:
        if self.step and self.trainer.shipped.on(self.step) is not self.trainer.shipped.on(self.step - 1):
            self.guard = Guard(self.cfg.guard)  # rounded weights lose more from one step to the next: no jump

        def fetch(start: int, count: int) -> Rows:
            return train.rows(start + self.detours.shift(self.step), count)

        def judge(result: StepResult) -> bool:
            values = result.values.tolist()
            why = self.guard.objection(values[LOSS], values[NORM])
            if why is not None:
                self.refused[self.step + 1] = why
                self.say(f"step {self.step + 1} is not applied: {why}")
            return why is None

        try:
            return self.trainer.step(self.step, fetch, judge if self.cfg.guard.policy != "off" else None)
        except OutOfMemory as error:
            if not out_of_memory(error):
                raise
            message = str(error).strip().splitlines()[0]
        # Outside of the handler: the traceback held the tensors that did not fit.
        raise self.trainer.advise(self.step, fetch, message)

    def _rewind(self) -> None:
        """Back to the newest checkpoint; from there on the rows after this step's."""
        bad, why = self.step, self.refused[self.step]
        if len(self.detours) >= self.cfg.guard.rewinds:
            raise TrainingError(
                f"step {bad} was refused after {len(self.detours)} rewinds: {why}",
                remedy="lower optim.lr, or raise guard.sigma if the jump is harmless",
            )
        back = checkpoints.steps(self.directory)[-1]
        self.detours.add(back, self.timeline.first_row(bad) - self.timeline.first_row(back))
        progress = checkpoints.restore(self.directory, back, self.trainer)
        self.close()
        self.step, self.elapsed = back, float(progress["elapsed_s"])
        self._open_records()
        self.say(f"back to step {back}, with the rows after step {bad}")

    def _flush(self, val: Packed | None = None) -> None:
        """Write the pending steps' metrics, the last of them with a validation where asked."""
        if not self.pending:
            return
        values = torch.stack([r.values for _, r, _ in self.pending]).tolist()
        per_step = (time.perf_counter() - self.pending[0][2]) / len(self.pending)
        for (step, result, _), row in zip(self.pending, values, strict=True):
            self.elapsed += per_step
            self.recent.append(per_step)
            line = self._line(step, row, per_step)
            if step == self.step and val is not None:
                line |= self._validate(val)
            self.records.write(line, result.loads, self.steps)
            kept = {k: v for k, v in self.last.items() if k in ("val_loss", "val_loss_ema", "mtp_agreement")}
            self.last = {**kept, **line}
        self.pending = []
        if self.replicas.first:
            self.live.show(self.last)

    def _line(self, step: int, row: list[float], seconds: float) -> dict[str, Any]:
        """One object of metrics.jsonl."""
        timeline, index = self.timeline, step - 1
        rate = timeline.batch(index) * self.cfg.data.seq_len / seconds
        left = timeline.tokens(self.steps) - timeline.tokens(step)
        line = {
            "step": step,
            "tokens": timeline.tokens(step),
            **dict(zip(METRICS, row, strict=True)),
            "lr": timeline.learning_rate(index),
            "batch": timeline.batch(index),
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak,
            "memory_bytes": memory_bytes(self.trainer.model.device),
            "elapsed_s": self.elapsed,
            "eta_s": left / rate * (sum(self.recent) / len(self.recent)) / seconds,
        }
        return line | ({"skipped": True} if step in self.refused else {})

    def _validate(self, val: Packed) -> dict[str, float]:
        rows = min(self.cfg.eval_rows, val.rows_per_epoch)
        step = self.step - 1
        loss, agreement = self.trainer.evaluate(val.rows, rows, step)
        line = {"val_loss": loss, "mtp_agreement": agreement}
        if self.trainer.average is not None:
            with self.trainer.average.in_place():
                line["val_loss_ema"] = self.trainer.evaluate(val.rows, rows, step)[0]
        return line

    def save(self) -> None:
        """Write a checkpoint. Raises TrainingError where there is no room for it; the ones before stand."""
        self._flush()
        if self.replicas.first:
            self.records.flush()
            progress = {"tokens": self.timeline.tokens(self.step), "elapsed_s": self.elapsed}
            checkpoints.save(
                self.directory, self.step, self.trainer, progress, self.cfg.data.tokenizer or self.cfg.init_from
            )
        self.saved_at = time.monotonic()

    def close(self) -> None:
        self.records.close()


def _history(run: Path, done: int) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [line for line in read_metrics(path) if line["step"] <= done] if path.is_file() else []
