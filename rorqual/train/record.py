"""What a run writes while it goes: metrics.jsonl, TensorBoard events, and one live line for the person watching."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl, one object a step. On resuming, lines beyond the checkpoint are dropped: they will come again."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if line["step"] <= resume_step]
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.path) if self.path.is_file() else []

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


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


class LiveLine:
    """One line that updates in place on a terminal; elsewhere a line every `every_s` seconds."""

    def __init__(self, steps: int, every_s: float = 15.0) -> None:
        self.steps, self.every_s = steps, every_s
        self.tty = sys.stderr.isatty()
        self._last = 0.0

    def show(self, line: dict[str, Any], eta_s: float) -> None:
        now = time.monotonic()
        final = line["step"] == self.steps
        if not final and now - self._last < (0.1 if self.tty else self.every_s):
            return
        self._last = now
        mfu = f"  MFU {line['mfu']:.1%}" if line["mfu"] else ""
        val = f"  val {line['val_loss']:.4f}" if "val_loss" in line else ""
        text = (
            f"step {line['step']}/{self.steps}  loss {line['loss']:.4f}{val}  {line['tokens_per_s']:,.0f} tokens/s{mfu}"
            f"  max_violation {line['max_violation']:.2f}  ETA {duration(eta_s)}"
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
