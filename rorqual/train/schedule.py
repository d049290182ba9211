"""What changes over a run, as data: pieces in fractions of the run's tokens, so that any budget gives the same picture.

DeepSeek-V3 (section 4.2) publishes its schedules in tokens of 14.8 T. Divided by that they fit every run: `RECIPES` holds
them so, and a run of sixty million tokens with the same pieces is a faithful miniature. A value is a factor on the
setting it belongs to (`optim.lr`, `batch`, `balance.gamma`, `mtp.weight`), so one override moves the whole curve.

Fractions are of tokens and not of steps, because the batch grows: `Timeline` lays the steps out and is a pure function of
the configuration, so that a resumed run needs no memory of where it was. A step's value is the one at its end.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rorqual.errors import ConfigError
from rorqual.train.config import Piece, RunConfig

V3_TOKENS = 14.8e12
V3_RAMP_TOKENS, V3_BATCH, V3_FIRST_BATCH, V3_SEQ_LEN, V3_WARMUP_STEPS = 469e9, 15360, 3072, 4096, 2000


class Shapes(NamedTuple):
    """The four curves of a run as factors on their settings; no batch pieces means a constant batch."""

    lr: tuple[Piece, ...]
    batch: tuple[Piece, ...]
    gamma: tuple[Piece, ...]
    mtp: tuple[Piece, ...]


def _v3_warmup_tokens() -> float:
    """Tokens of the published 2,000 warm-up steps, while the batch grows linearly in tokens: the solution of
    steps = integral of dt / (seq_len * batch(t))."""
    slope = (V3_BATCH - V3_FIRST_BATCH) / V3_RAMP_TOKENS
    return V3_FIRST_BATCH / slope * math.expm1(V3_WARMUP_STEPS * slope * V3_SEQ_LEN)


RECIPES: Mapping[str, Shapes] = {
    "deepseek-v3": Shapes(
        # 2.2e-4 after the warm-up, to 10 T tokens; cosine to 2.2e-5 over 4.3 T; 333 B at that, 167 B at 7.3e-6.
        lr=(
            Piece(_v3_warmup_tokens() / V3_TOKENS, 1.0, "linear"),
            Piece(10 / 14.8, 1.0),
            Piece(14.3 / 14.8, 0.1, "cosine"),
            Piece(14.633 / 14.8, 0.1),
            Piece(1.0, 7.3e-6 / 2.2e-4),
        ),
        # 3,072 to 15,360 sequences "gradually" over the first 469 B tokens; how is not published, here linearly.
        batch=(Piece(0.469 / 14.8, 1.0, "linear", start=0.2), Piece(1.0, 1.0)),
        gamma=(Piece(14.3 / 14.8, 1.0), Piece(1.0, 0.0)),
        mtp=(Piece(10 / 14.8, 1.0), Piece(1.0, 0.1 / 0.3)),
    )
}


def value(pieces: Sequence[Piece], x: float) -> float:
    """The curve at fraction x of the run. Raises nothing: x beyond the last piece gives its end."""
    begin, at = 0.0, 0.0
    for piece in pieces:
        at = at if piece.start is None else piece.start
        if x <= piece.until + 1e-12:
            break
        begin, at = piece.until, piece.to
    else:
        return at
    if piece.shape == "hold":
        return piece.to
    done = (x - begin) / (piece.until - begin)
    left = 1 - done if piece.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return piece.to + (at - piece.to) * left


def shapes(cfg: RunConfig) -> Shapes:
    """The run's curves: its own pieces where it names them, else its recipe's. Raises ConfigError for pieces that do not
    cover the run."""
    recipe = _simple(cfg) if cfg.schedule.recipe == "simple" else RECIPES[cfg.schedule.recipe]
    s = cfg.schedule
    chosen = Shapes(s.lr or recipe.lr, s.batch or recipe.batch, s.gamma or recipe.gamma, s.mtp or recipe.mtp)
    for name, pieces in chosen._asdict().items():
        _check(name, pieces)
    return chosen


def _simple(cfg: RunConfig) -> Shapes:
    """Warm-up, hold, one decay, and the late changes of gamma and the MTP weight, from the settings beside the values."""
    o, steps = cfg.optim, full_steps(cfg)
    begin = max(o.warmup_steps, steps - round(steps * o.decay_fraction))
    lr = [Piece(o.warmup_steps / steps, 1.0, "linear")] if o.warmup_steps else []
    if begin > o.warmup_steps:
        lr.append(Piece(begin / steps, 1.0))
    if begin < steps:
        lr.append(Piece(1.0, o.min_lr_ratio, o.decay, start=None if lr else 1.0))
    off, late = 1 - cfg.balance.off_fraction, 1 - cfg.mtp.late_fraction
    ratio = cfg.mtp.late_weight / cfg.mtp.weight if cfg.mtp.weight else 1.0
    return Shapes(tuple(lr), (), _two(off, 0.0), _two(late, ratio))


def _two(border: float, late: float) -> tuple[Piece, ...]:
    """1 up to the border, then `late`."""
    first, last = Piece(border, 1.0), Piece(1.0, late)
    return (last,) if border <= 0 else (Piece(1.0, 1.0),) if border >= 1 else (first, last)


def _check(name: str, pieces: Sequence[Piece]) -> None:
    if not pieces:
        return
    borders = [0.0, *(p.until for p in pieces)]
    if any(b <= a for a, b in itertools.pairwise(borders)) or borders[-1] != 1.0:
        raise ConfigError(f"schedule.{name}: `until` must rise from piece to piece and end at 1.0, not {borders[1:]}")
    levels = [v for p in pieces for v in (p.to, p.start) if v is not None]
    if min(levels) < 0 or not all(map(math.isfinite, levels)):
        raise ConfigError(f"schedule.{name}: factors must not be negative")
    if name == "batch" and ((pieces[0].shape != "hold" and not pieces[0].start) or min(levels) <= 0 or max(levels) > 1):
        raise ConfigError("schedule.batch: factors lie in (0, 1], and a ramp needs a `start`")


def full_steps(cfg: RunConfig) -> int:
    """Steps that the budget would take at full batch size."""
    return cfg.steps or max(1, math.ceil(cfg.tokens / (cfg.batch * cfg.data.seq_len)))


class Timeline:
    """Where each step lies: its batch, its first row, its tokens, and the values that hold in it. Steps count from 0."""

    def __init__(self, cfg: RunConfig) -> None:
        """Raises ConfigError for schedules that cannot be."""
        self._cfg, self._shapes = cfg, shapes(cfg)
        self._seq_len = cfg.data.seq_len
        self.total_tokens = cfg.tokens or cfg.steps * cfg.batch * self._seq_len
        self._firsts: array[int] | None = None
        if not self._shapes.batch:
            self.steps = full_steps(cfg)
            return
        if not cfg.tokens:
            raise ConfigError("a batch ramp needs the budget as tokens", remedy="give tokens instead of steps")
        self._firsts, rows = array("q", [0]), 0
        while rows * self._seq_len < self.total_tokens:
            x = rows * self._seq_len / self.total_tokens
            rows += max(1, round(cfg.batch * value(self._shapes.batch, x)))
            self._firsts.append(rows)
        self.steps = len(self._firsts) - 1

    def first_row(self, step: int) -> int:
        """Rows that all steps before this one took."""
        return step * self._cfg.batch if self._firsts is None else self._firsts[step]

    def batch(self, step: int) -> int:
        """Sequences in this step."""
        return self._cfg.batch if self._firsts is None else self._firsts[step + 1] - self._firsts[step]

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        return self.first_row(steps) * self._seq_len

    def fraction(self, step: int) -> float:
        """How much of the budget is used at the end of this step."""
        return min(self.tokens(step + 1) / self.total_tokens, 1.0)

    def learning_rate(self, step: int) -> float:
        return self._cfg.optim.lr * value(self._shapes.lr, self.fraction(step))

    def gamma(self, step: int) -> float:
        return self._cfg.balance.gamma * value(self._shapes.gamma, self.fraction(step))

    def mtp_weight(self, step: int) -> float:
        return self._cfg.mtp.weight * value(self._shapes.mtp, self.fraction(step))

    def curves(self, points: int = 400) -> dict[str, tuple[list[float], list[float]]]:
        """name -> (tokens after a step, value in it) at up to `points` steps over the whole run, for pictures."""
        stride = max(1, self.steps // points)
        at = sorted({*range(0, self.steps, stride), self.steps - 1})
        x = [float(self.tokens(s + 1)) for s in at]
        named = {
            "learning rate": self.learning_rate, "batch (sequences)": self.batch,
            "gamma (bias update)": self.gamma, "lambda (MTP weight)": self.mtp_weight,
        }  # fmt: skip
        return {name: (x, [float(f(s)) for s in at]) for name, f in named.items()}
