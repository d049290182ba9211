"""One step of training: gradients over micro-batches, clipping, the optimiser, the bias update.

The trainer owns nothing that a checkpoint does not hold: weights, optimiser moments, the step number. The data are a
pure function of the step, so a killed run goes on where its last checkpoint stands, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.data.packing import Rows
from rorqual.model.moe import Gate
from rorqual.model.transformer import Transformer
from rorqual.ops.balance import load, max_violation, update_bias_
from rorqual.train import schedule
from rorqual.train.config import RunConfig
from rorqual.train.loss import Losses, Targets, losses
from rorqual.train.optimizer import make_optimizer
from rorqual.train.quantise import ShippedWeights

Fetch = Callable[[int, int], Rows]
LossFunction = Callable[..., Losses]
"""What `train.loss.losses` is: (model, rows, counts, *, mask_documents, balance_share) -> Losses."""
METRICS = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation")


class StepResult(NamedTuple):
    """values: fp32 [len(METRICS)] on the device, so that nobody waits for it; loads: tokens per expert, [gates, E]."""

    values: Tensor
    loads: Tensor


class Trainer:
    """cfg is resolved; model has fp32 parameters and computes in cfg.dtype. loss: what a step minimises."""

    def __init__(self, cfg: RunConfig, model: Transformer, loss: LossFunction = losses) -> None:
        self.cfg, self.model = cfg, model
        self.gates = [m for m in model.modules() if isinstance(m, Gate)]
        for name, parameter in model.named_parameters():
            if any(fnmatch(name, pattern) for pattern in cfg.freeze):
                parameter.requires_grad_(False)
        self.optimizer = make_optimizer(cfg.optim, model)
        self.losses = loss
        self.shipped = ShippedWeights(cfg, model)
        if cfg.compile:
            for block in [*model.layers, *model.mtp]:
                block.compile()

    def step(self, step: int, fetch: Fetch) -> StepResult:
        """Train on the rows of this step; fetch(start, count) gives them."""
        cfg, model = self.cfg, self.model
        assert isinstance(cfg.micro_batch, int)
        rows = self._to_device(fetch(step * cfg.batch, cfg.batch))
        counts = self._target_counts(rows)
        weight, alpha = schedule.mtp_weight(cfg, step), cfg.balance.alpha
        lr = schedule.learning_rate(cfg, step)
        sums = torch.zeros(3, device=model.device)
        loads = torch.zeros(len(self.gates), model.cfg.n_routed_experts, dtype=torch.int64, device=model.device)
        with self.shipped.during(step):
            for start in range(0, cfg.batch, cfg.micro_batch):
                part = Targets(*(t[start : start + cfg.micro_batch] for t in rows))
                out = self.losses(
                    model,
                    part,
                    counts,
                    mask_documents=bool(cfg.data.mask_documents),
                    balance_share=cfg.micro_batch / cfg.batch,
                )
                (out.lm + weight * out.mtp + alpha * out.balance).backward()
                sums += torch.stack((out.lm.detach(), out.mtp.detach(), out.balance.detach()))
                if out.routings:
                    loads += torch.stack([load(r.chosen_NK, model.cfg.n_routed_experts) for r in out.routings])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for gate, load_E in zip(self.gates, loads, strict=True):
            if gate.weight.requires_grad:
                update_bias_(gate.e_score_correction_bias, load_E, schedule.gamma(cfg, step))
        lm, mtp, balance = sums.unbind()
        worst = torch.stack([max_violation(x) for x in loads]).max() if self.gates else torch.zeros_like(lm)
        total = lm + weight * mtp + alpha * balance
        return StepResult(torch.stack((total, lm, mtp, balance, norm, worst)), loads)

    @torch.no_grad()
    def evaluate(self, fetch: Fetch, rows: int, step: int = 0) -> tuple[float, float]:
        """(next-token loss, share of MTP depth-1 greedy guesses equal to the model's own) over the first `rows` rows, with
        the weights that the forward of this step sees."""
        cfg, model = self.cfg, self.model
        assert isinstance(cfg.micro_batch, int)
        total, agree = torch.zeros((), device=model.device), torch.zeros((), device=model.device)
        counted = torch.zeros((), device=model.device)
        with self.shipped.during(step):
            for start in range(0, rows, cfg.micro_batch):
                part = self._to_device(fetch(start, min(cfg.micro_batch, rows - start)))
                lm, match, weights = evaluate_rows(model, part, bool(cfg.data.mask_documents))
                total, agree, counted = total + lm, agree + match, counted + weights
        return (total / counted).item(), (agree / counted).item()

    def _to_device(self, rows: Rows) -> Targets:
        device = self.model.device
        return Targets(*(torch.from_numpy(np.ascontiguousarray(a)).to(device, non_blocking=True) for a in rows))

    def _target_counts(self, rows: Targets) -> Tensor:
        """How many targets each depth has in the whole step, at least 1."""
        depth = len(self.model.mtp)
        T = rows.tokens.shape[1] - 1 - depth
        within = bool(self.cfg.data.mask_documents)
        counts = [rows.weights(1 + k, T, within or k > 0).sum() for k in range(1 + depth)]
        return torch.stack(counts).clamp(min=1.0)


def evaluate_rows(model: Transformer, rows: Targets, mask_documents: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of next-token losses, MTP guesses that match the model's, number of targets) over the rows."""
    from rorqual.model.batch import Batch
    from rorqual.train.loss import token_loss

    T = rows.tokens.shape[1] - 1 - len(model.mtp)
    batch = Batch(documents_BT=rows.documents[:, :T]) if mask_documents else None
    h, _ = model.hidden(rows.tokens[:, :T], batch)
    weights = rows.weights(1, T, mask_documents)
    lm = token_loss(model, h, rows.tokens[:, 1 : T + 1], weights)
    match = torch.zeros_like(lm)
    if model.mtp:
        (draft_h, *_), _ = model.predict_further(h, [rows.tokens[:, 1 : T + 1]], batch)
        guess, own = model.head(draft_h[:, :-1]).argmax(-1), model.head(h[:, 1:]).argmax(-1)
        match = ((guess == own) * weights[:, 1:]).sum()
    return lm, match, weights.sum()
