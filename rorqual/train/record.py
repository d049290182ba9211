"""What a run writes while it goes: metrics.jsonl, expert loads, TensorBoard events, and one live line for the person
watching."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from rorqual.data.shards import write_atomic
from rorqual.errors import BackendUnavailable
from rorqual.train.limits import no_room, size

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl, one object a step. On resuming, lines beyond the checkpoint are dropped: they will come again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        _keep(path, resume_step)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """One step. JSON knows no NaN and no infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


class ExpertLoads:
    """expert_load.jsonl: every `every` steps and at the end, how many tokens each expert of each routed layer got (MTP
    modules last), for the heat maps of the report."""

    def __init__(self, path: Path, resume_step: int, every: int = 10) -> None:
        _keep(path, resume_step)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._every = every

    def write(self, step: int, loads: Tensor, steps: int) -> None:
        """loads: int64 [gates, E] of this step."""
        if len(loads) and (step % self._every == 0 or step == steps):
            self._file.write(json.dumps({"step": step, "loads": loads.tolist()}) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _keep(path: Path, resume_step: int) -> None:
    """Drop the lines beyond a step; replaced as a whole, so that a kill here loses nothing."""
    if path.is_file():
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a line cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Events:
    """TensorBoard events where the `tensorboard` package is installed; said once in the log where it is not."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("no TensorBoard events: pip install tensorboard")
            return
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else None)

    def write(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Dashboard:
    """Curves of all runs side by side while they go, by trackio: a database on this machine (`trackio show --project
    rorqual` serves the page), nothing is sent anywhere. Steps that a resumed run makes again appear twice."""

    def __init__(self, kind: str, run: Path, config: dict[str, Any]) -> None:
        """kind: "none" or "trackio". Raises BackendUnavailable where that is not installed."""
        self._trackio: Any = None
        if kind == "none":
            return
        try:
            self._trackio = import_module(kind)
        except ImportError as error:
            raise BackendUnavailable(
                "dashboard = trackio needs the package trackio", remedy="pip install trackio, or dashboard = none"
            ) from error
        self._trackio.init(
            project="rorqual", name=run.name, config=config, resume="allow", embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def write(self, line: dict[str, Any]) -> None:
        if self._trackio is not None:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
            self._trackio.log(values, step=line["step"])

    def close(self) -> None:
        if self._trackio is not None:
            self._trackio.finish()


class Records:
    """All of these, of a run that goes on after `resume_step`. keep: False where another replica keeps them."""

    def __init__(self, run: Path, resume_step: int, dashboard: str, config: dict[str, Any], keep: bool) -> None:
        """Raises BackendUnavailable where the dashboard is not installed."""
        self._loads = ExpertLoads(run / "expert_load.jsonl", resume_step) if keep else None
        self._lines: list[MetricsFile | Events | Dashboard] = []
        if keep:
            self._lines = [
                MetricsFile(run / "metrics.jsonl", resume_step), Events(run, resume_step), Dashboard(dashboard, run, config)
            ]  # fmt: skip

    def write(self, line: dict[str, Any], loads: Tensor, steps: int) -> None:
        """One step of `steps`. loads: int64 [gates, E]."""
        for record in self._lines:
            record.write(line)
        if self._loads is not None:
            self._loads.write(line["step"], loads, steps)

    def flush(self) -> None:
        """To the disk: the lines that a checkpoint counts on."""
        for record in self._lines:
            if isinstance(record, MetricsFile):
                record.flush()
        if self._loads is not None:
            self._loads.flush()

    def close(self) -> None:
        """What a full disk refuses here was never promised: resuming writes those lines anew."""
        for record in (*self._lines, self._loads):
            try:
                if record is not None:
                    record.close()
            except OSError as error:
                if not no_room(error):
                    raise


class LiveLine:
    """One line that updates in place on a terminal; elsewhere a line every `every_s` seconds."""

    def __init__(self, steps: int, every_s: float = 15.0) -> None:
        self.steps, self.every_s = steps, every_s
        self.tty = sys.stderr.isatty()
        self._last = 0.0

    def show(self, line: dict[str, Any]) -> None:
        now = time.monotonic()
        final = line["step"] == self.steps
        if not final and now - self._last < (0.1 if self.tty else self.every_s):
            return
        self._last = now
        skipped = "  skipped" if line.get("skipped") else ""
        val = f"  val {line['val_loss']:.4f}" if "val_loss" in line else ""
        text = (
            f"step {line['step']}/{self.steps}  loss {line['loss']:.4f}{val}{skipped}  {line['tokens_per_s']:,.0f} tokens/s"
            f"  MFU {line['mfu']:.1%}  {size(line['memory_bytes'])}  max_violation {line['max_violation']:.2f}"
            f"  ETA {duration(line['eta_s'])}"
        )
        if self.tty:
            sys.stderr.write(f"\r\x1b[2K{text}" + ("\n" if final else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """1:02:03 or 4:05."""
    s = int(seconds)
    return f"{s // 3600}:{s % 3600 // 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"
