"""One step of training: gradients over micro-batches, clipping, the optimiser, the bias update.

The trainer owns nothing that a checkpoint does not hold: weights, their average, optimiser moments. The data are a pure
function of the step, so a killed run goes on where its last checkpoint stands, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.data.packing import Rows
from rorqual.errors import ConfigError, TrainingError
from rorqual.model.batch import Batch
from rorqual.model.moe import Gate
from rorqual.model.transformer import Transformer
from rorqual.ops.balance import load, max_violation, update_bias_
from rorqual.train.config import RunConfig
from rorqual.train.ema import WeightAverage
from rorqual.train.graphs import MicroGraph
from rorqual.train.limits import OutOfMemory, out_of_memory
from rorqual.train.loss import Losses, Targets, losses, token_loss
from rorqual.train.optimizer import Optimizer
from rorqual.train.quantise import ShippedWeights
from rorqual.train.replicas import ALONE, Replicas
from rorqual.train.schedule import Timeline
from rorqual.train.working import WorkingCopies

Fetch = Callable[[int, int], Rows]
LossFunction = Callable[..., Losses]
"""What `train.loss.losses` is: (model, rows, counts, *, mask_documents, balance_share) -> Losses."""
METRICS = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation")


class StepResult(NamedTuple):
    """values: fp32 [len(METRICS)] on the device, so that nobody waits for it; loads: tokens per expert, [gates, E]; factor:
    what gradients are clipped by."""

    values: Tensor
    loads: Tensor
    factor: Tensor


Judge = Callable[[StepResult], bool]
"""Whether a step's gradients may be applied."""


class Trainer:
    """cfg is resolved; model has fp32 parameters and computes in cfg.dtype. loss: what a step minimises (None: the next
    tokens). Parameters that cfg.freeze names get no gradient, frozen gates no bias update. replicas: who shares the
    micro-batches of a step and of an evaluation; they make the same calls with the same arguments."""

    def __init__(
        self, cfg: RunConfig, model: Transformer, loss: LossFunction | None = None, replicas: Replicas = ALONE
    ) -> None:
        self.cfg, self.model, self.replicas = cfg, model, replicas
        self.timeline = Timeline(cfg)
        self.gates = [m for m in model.modules() if isinstance(m, Gate)]
        freeze(model, cfg.freeze)
        narrow = cfg.dtype == "bfloat16" and cfg.precision != "fp8"
        self.copies = WorkingCopies(model, torch.bfloat16) if narrow else None
        self.optimizer = Optimizer(cfg.optim, model, self.copies)
        self.shipped = ShippedWeights(cfg.quantise, model, self.timeline)
        self.graph: MicroGraph | None = None
        self.average = WeightAverage(cfg.ema, model) if cfg.ema.decay else None
        self.losses = losses if loss is None else loss
        for block in [*model.layers, *(m.block for m in model.mtp)]:
            block.recompute(cfg.recompute)
        if cfg.compile:
            for block in [*model.layers, *model.mtp]:
                block.compile()

    def step(self, step: int, fetch: Fetch, judge: Judge | None = None) -> StepResult:
        """Train on the rows of this step; fetch(start, count) gives them. What `judge` refuses changes nothing."""
        rows = self._to_device(fetch(self.timeline.first_row(step), self.timeline.batch(step)))
        result = self.gradients(step, rows)
        if judge is None or judge(result):
            self.update(step, result)
        self.optimizer.zero_grad()
        return result

    def gradients(self, step: int, rows: Targets) -> StepResult:
        """Gradients of the step's mean loss, added up over micro-batches and replicas, in the `grad` of the parameters or of
        their copies; not clipped yet."""
        cfg = self.cfg
        assert isinstance(cfg.micro_batch, int)
        sums, loads = self._add_up(step, rows, self.replicas.mine(len(rows.tokens), cfg.micro_batch))
        self.replicas.sum_([*self.replicas.gradients(self._leaves()), sums, loads])
        norm = self._gradient_norm()
        factor = (cfg.optim.clip / (norm + 1e-6)).clamp(max=1.0)
        lm, mtp, balance = sums.unbind()
        worst = torch.stack([max_violation(x) for x in loads]).max() if self.gates else torch.zeros_like(lm)
        total = lm + self.timeline.mtp_weight(step) * mtp + cfg.balance.alpha * balance
        return StepResult(torch.stack((total, lm, mtp, balance, norm, worst)), loads, factor)

    def _add_up(self, step: int, rows: Targets, starts: range, capture: bool = True) -> tuple[Tensor, Tensor]:
        """Adds gradients of the micro-batches of the step's rows that begin at `starts`; their three losses and their loads.
        capture: whether a CUDA graph may be made and used."""
        cfg, model = self.cfg, self.model
        assert isinstance(cfg.micro_batch, int)
        batch, counts, weight = len(rows.tokens), self._target_counts(rows), self.timeline.mtp_weight(step)
        sums = torch.zeros(3, device=model.device)
        loads = torch.zeros(len(self.gates), model.cfg.n_routed_experts, dtype=torch.int64, device=model.device)
        # Of several micro-batches, whichever replica has them, gradients are added in fp32.
        several, more = batch > cfg.micro_batch, len(starts) > 1
        with self.shipped.during(step), self._narrow():
            for start in starts:
                part = Targets(*(t[start : start + cfg.micro_batch] for t in rows))
                share = len(part.tokens) / batch
                if graph := self._graph_for(part, counts) if capture else None:
                    values, load_GE = graph.run(part, counts, weight, share, more)
                else:
                    values, load_GE = self._micro(part, counts, weight, share)
                sums += values
                loads += load_GE
                if self.copies is not None and several:
                    self.copies.fold()
        return sums, loads

    def _micro(
        self, part: Targets, counts: Tensor, weight: float | Tensor, share: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds gradients of a micro-batch, `share` of the step's sequences; returns its three losses and its loads."""
        cfg, E = self.cfg, self.model.cfg.n_routed_experts
        documents = bool(cfg.data.mask_documents)
        out = self.losses(self.model, part, counts, mask_documents=documents, balance_share=share)
        total = out.lm + weight * out.mtp
        if cfg.balance.alpha:  # else it is only told: no way back through every gate for gradients of zero
            total = total + cfg.balance.alpha * out.balance
        total.backward()
        values = torch.stack((out.lm.detach(), out.mtp.detach(), out.balance.detach()))
        loads = [load(r.chosen_NK, E) for r in out.routings]
        return values, torch.stack(loads) if loads else torch.zeros(0, E, dtype=torch.int64, device=values.device)

    def _graph_for(self, part: Targets, counts: Tensor) -> MicroGraph | None:
        """The graph for a whole micro-batch, made where there is none yet; None where the step is not captured, or for what
        a growing batch leaves over."""
        if self.cfg.graph is not True or len(part.tokens) != self.cfg.micro_batch:
            return None
        if self.graph is None:
            leaves = self._leaves()
            before = [p.grad for p in leaves]
            for p in leaves:
                p.grad = None
            self.graph = MicroGraph(self._micro, leaves, part, counts)
            for p, grad in zip(leaves, before, strict=True):
                p.grad = grad
        return self.graph

    def _narrow(self) -> AbstractContextManager[None]:
        return nullcontext() if self.copies is None else self.copies.in_place()

    def _leaves(self) -> list[torch.nn.Parameter]:
        """Whatever may get a gradient: each parameter, then its copy."""
        copies = self.copies
        both = [(p, None if copies is None else copies.of(p)) for p in self.model.parameters() if p.requires_grad]
        return [leaf for pair in both for leaf in pair if leaf is not None]

    def _gradient_norm(self) -> Tensor:
        """Of all gradients together, in fp32."""
        grads = [p.grad for p in self._leaves() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        return torch.linalg.vector_norm(torch.stack(norms))

    def update(self, step: int, result: StepResult) -> None:
        """Weights by their gradients, correction biases by the step's load, and the average of the weights."""
        if self.average is not None:
            self.average.before_update()
        self.optimizer.step(self.timeline.learning_rate(step), result.factor)
        for gate, load_E in zip(self.gates, result.loads, strict=True):
            if gate.weight.requires_grad:
                update_bias_(gate.e_score_correction_bias, load_E, self.timeline.gamma(step))
        if self.average is not None:
            self.average.after_update(step + 1)

    def advise(self, step: int, fetch: Fetch, message: str) -> TrainingError:
        """After memory ran out: the error to raise, which names the largest micro-batch that does fit (found by trying, with
        room held for what the optimiser has yet to allocate)."""
        micro, self.graph = int(self.cfg.micro_batch), None
        said = f"out of memory in step {step + 1} with micro_batch {micro}: {message}"
        first, batch = self.timeline.first_row(step), self.timeline.batch(step)
        while micro > 1:
            micro = max(n for n in range(1, micro) if self.cfg.batch % (n * self.replicas.world) == 0)
            self.optimizer.zero_grad()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            if self._fits(step, fetch, first, min(micro, batch)):
                return TrainingError(said, remedy=f"micro_batch {micro} fits: --set micro_batch={micro}")
        return TrainingError(
            said,
            remedy="even one sequence does not fit: lower data.seq_len, set optim.moments=bfloat16, or a smaller model",
        )

    def _fits(self, step: int, fetch: Fetch, first: int, rows: int) -> bool:
        try:
            held = torch.zeros(self.optimizer.bytes_to_come, dtype=torch.uint8, device=self.model.device)
            # Twice: from the second micro-batch on, gradients are there already.
            for _ in range(2):
                self._add_up(step, self._to_device(fetch(first, rows)), range(0, rows, rows), capture=False)
            del held
        except OutOfMemory as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad()
        return True

    @torch.no_grad()
    def evaluate(self, fetch: Fetch, rows: int, step: int = 0) -> tuple[float, float]:
        """(next-token loss, share of MTP depth-1 greedy guesses equal to the model's own) over the first `rows` rows, with
        the weights as the forward of this step sees them."""
        cfg, model = self.cfg, self.model
        assert isinstance(cfg.micro_batch, int)
        sums = torch.zeros(3, device=model.device)
        with self.shipped.during(step), self._narrow():
            for start in self.replicas.mine(rows, cfg.micro_batch):
                part = self._to_device(fetch(start, min(cfg.micro_batch, rows - start)))
                sums += torch.stack(evaluate_rows(model, part, bool(cfg.data.mask_documents)))
        self.replicas.sum_([sums])
        lm, agree, _ = (sums / sums[2]).tolist()
        return lm, agree

    def _to_device(self, rows: Rows) -> Targets:
        device = self.model.device
        parts = [torch.from_numpy(np.ascontiguousarray(a)) for a in rows]
        if device.type == "cuda":  # from other memory, a copy would wait for the step before
            parts = [part.pin_memory() for part in parts]
        return Targets(*(part.to(device, non_blocking=True) for part in parts))

    def _target_counts(self, rows: Targets) -> Tensor:
        """How many targets each depth has in the whole step, at least 1."""
        depth = len(self.model.mtp)
        T = rows.tokens.shape[1] - 1 - depth
        within = bool(self.cfg.data.mask_documents)
        counts = [rows.weights(1 + k, T, within or k > 0).sum() for k in range(1 + depth)]
        return torch.stack(counts).clamp(min=1.0)


def freeze(model: Transformer, patterns: Sequence[str]) -> None:
    """No gradients for the parameters that these patterns name; a tied head's is the embedding's. Raises ConfigError for a
    pattern that names none."""
    named = {**dict(model.named_parameters()), "lm_head.weight": model.head_weight}
    for pattern in patterns:
        meant = [parameter for name, parameter in named.items() if fnmatch(name, pattern)]
        if not meant:
            raise ConfigError(
                f"freeze: {pattern!r} is the name of no parameter",
                remedy="names are as in the checkpoint, without `model.`: layers.*, *.self_attn.*, norm.weight",
            )
        for parameter in meant:
            parameter.requires_grad_(False)


def evaluate_rows(model: Transformer, rows: Targets, mask_documents: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of next-token losses, MTP guesses that match the model's, number of targets) over the rows."""
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
