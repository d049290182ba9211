"""What happens when the loss jumps or stops being a number.

A step whose loss or gradient norm is not finite, or whose loss stands far above the last ones, is not applied. "skip"
leaves its rows out and goes on; "rewind" goes back to the newest checkpoint and trains on from there with the rows *after*
the jump, because the cause lies in some steps before it (arXiv 2204.02311 section 5.1). Both are pure functions of the
losses that metrics.jsonl holds, so a killed run judges as an undisturbed one would. A run that only jumps is ended: no
policy cures a learning rate.

Far means: above the median of the last accepted losses by more than `sigma` robust standard deviations: 1.4826 times the
median absolute deviation, at least one percent of the median and SMALLEST. Judging costs a GPU one wait a step; "off" spares
it.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from rorqual.data.shards import write_atomic
from rorqual.errors import CheckpointError, TrainingError
from rorqual.train.config import GuardConfig

FEWEST = 16
"""So many accepted losses are needed before a jump can be told."""


SMALLEST = 0.02
"""Nats. Fine-tuning comes to losses near zero whose spread says nothing about the next batch."""


class Guard:
    """Judges losses in the order of the steps."""

    def __init__(self, cfg: GuardConfig, losses: Iterable[tuple[float, bool]] = ()) -> None:
        """losses: (loss, whether it was skipped) of the steps already made."""
        self.cfg = cfg
        self._recent: deque[float] = deque(maxlen=cfg.window)
        self._in_a_row = 0
        for loss, skipped in losses:
            self._note(loss, skipped)

    def objection(self, loss: float, norm: float) -> str | None:
        """Why this step must not be applied, or None. Raises TrainingError where too many were refused in a row."""
        why = self._why(loss, norm) if self.cfg.policy != "off" else None
        self._note(loss, why is not None)
        if self._in_a_row > self.cfg.in_a_row:
            raise TrainingError(
                f"the loss diverged: {self._in_a_row} steps in a row were refused, the last because {why}",
                remedy="lower optim.lr, or lengthen the warm-up, and start from an earlier checkpoint",
            )
        return why

    def _note(self, loss: float, skipped: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if not skipped:
            self._recent.append(loss)

    def _why(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(norm):
            return f"its gradient norm is {norm}"
        if len(self._recent) < FEWEST:
            return None
        middle = median(self._recent)
        spread = max(1.4826 * median(abs(x - middle) for x in self._recent), 0.01 * abs(middle), SMALLEST)
        if loss > middle + self.cfg.sigma * spread:
            return f"its loss of {loss:.4g} stands {(loss - middle) / spread:.1f} deviations above {middle:.4g}"
        return None


class Detours:
    """The rows a run passed over by rewinding: guard.json in its directory, replaced as a whole."""

    def __init__(self, run: Path, keep: bool = True) -> None:
        """keep: False where another replica writes the file. Raises CheckpointError where it is damaged."""
        self._file, self._keep = run / "guard.json", keep
        self._taken: list[tuple[int, int]] = []
        if self._file.is_file():
            try:
                entries = json.loads(self._file.read_text())["rewinds"]
                self._taken = [(int(e["from_step"]), int(e["rows"])) for e in entries]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self._file} is damaged: {error!r}", remedy="restore it, or start in another directory"
                ) from error

    def __len__(self) -> int:
        return len(self._taken)

    def add(self, from_step: int, rows: int) -> None:
        """From this step on, everything comes `rows` later. On disk before this returns."""
        self._taken.append((from_step, rows))
        if not self._keep:
            return
        entries = [{"from_step": step, "rows": n} for step, n in self._taken]
        write_atomic(self._file, (json.dumps({"rewinds": entries}) + "\n").encode())

    def shift(self, step: int) -> int:
        """How many rows later this step's rows lie."""
        return sum(rows for start, rows in self._taken if start <= step)
