"""What changes over a run, as pure functions of the step. Steps count from 0."""

from __future__ import annotations

import math

from rorqual.train.config import RunConfig


def learning_rate(cfg: RunConfig, step: int) -> float:
    """Linear warm-up from lr / warmup_steps, constant, then decay to lr * min_lr_ratio at the last step."""
    o = cfg.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    begin = max(o.warmup_steps, cfg.steps - round(cfg.steps * o.decay_fraction))
    if step < begin:
        return o.lr
    done = (step - begin + 1) / (cfg.steps - begin)
    left = (1 + math.cos(math.pi * done)) / 2 if o.decay == "cosine" else 1 - done
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * left)


def mtp_weight(cfg: RunConfig, step: int) -> float:
    late = step >= cfg.steps * (1 - cfg.mtp.late_fraction)
    return cfg.mtp.late_weight if late else cfg.mtp.weight


def gamma(cfg: RunConfig, step: int) -> float:
    return 0.0 if step >= cfg.steps * (1 - cfg.balance.off_fraction) else cfg.balance.gamma
