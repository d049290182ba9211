"""The optimiser of a run: AdamW, with moments in fp32 or bf16, or Muon for the matrices and AdamW for the rest.

AdamW with fp32 moments is torch's fused one on a CPU; on a GPU, and with bf16 moments, it is `ops.adamw`, whose kernels
also clip and write the 16-bit copy of a weight (`train.working`). Either goes on from the other's state. Muon
(`ops.muon`) sees each expert's gate, up and down as a matrix of its own, because orthogonalising two as one is another
update; its step is scaled to AdamW's size (arXiv 2502.16982), so that one learning rate serves both. Embedding, head, and
norms are AdamW's in either case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.errors import ConfigError
from rorqual.model.layers import Embedding
from rorqual.model.moe import RoutedExperts
from rorqual.model.transformer import Transformer
from rorqual.ops.adamw import adamw_backends
from rorqual.ops.muon import Muon
from rorqual.ops.native.training import native_missing
from rorqual.ops.triton.available import triton_missing
from rorqual.train.config import OptimConfig
from rorqual.train.working import WorkingCopies

Group = tuple[list[nn.Parameter], float]
"""Parameters and their weight decay."""


class OurAdamW:
    """`ops.adamw` over parameters, moments in `dtype`; reads the gradients of copies where weights have none themselves."""

    def __init__(
        self, groups: list[Group], cfg: OptimConfig, dtype: torch.dtype, copies: WorkingCopies | None, backend: str
    ) -> None:
        self._parameters = [(p, decay) for group, decay in groups for p in group]
        self._copies = [None if copies is None else copies.of(p) for p, _ in self._parameters]
        self._cfg, self._update = cfg, adamw_backends.get(backend)
        self._steps = 0
        self._m = [torch.zeros_like(p, dtype=dtype) for p, _ in self._parameters]
        self._v = [torch.zeros_like(p, dtype=dtype) for p, _ in self._parameters]

    def step(self, lr: float, factor: Tensor | None) -> None:
        """factor: on all gradients, a scalar on their device."""
        self._steps += 1
        o = self._cfg
        for (p, decay), copy, m, v in zip(self._parameters, self._copies, self._m, self._v, strict=True):
            grad = copy.grad if p.grad is None and copy is not None else p.grad
            if grad is not None:
                to = None if copy is None else copy.detach()
                self._update(p, grad, m, v, self._steps, lr, (o.beta1, o.beta2), o.eps, decay, factor, to)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "m": self._m, "v": self._v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "param_groups" in state:  # torch's own AdamW
            each = [state["state"][i] for i in range(len(self._parameters))]
            steps, m, v = each[0]["step"], [s["exp_avg"] for s in each], [s["exp_avg_sq"] for s in each]
            state = {"steps": steps, "m": m, "v": v}
        self._steps = int(state["steps"])
        for mine, theirs in ((self._m, state["m"]), (self._v, state["v"])):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)


def _backend(device: torch.device) -> str:
    if device.type == "cuda":
        return "triton" if triton_missing() is None else "reference"
    return "native" if device.type == "cpu" and native_missing() is None else "reference"


class Optimizer:
    """One object for all of them, over the parameters that require gradients. Its state is a dict of plain tensors and
    numbers by optimiser."""

    def __init__(self, cfg: OptimConfig, model: Transformer, copies: WorkingCopies | None = None) -> None:
        """copies: kept equal to the weights, and their gradients taken for the weights' own. Raises ConfigError where
        nothing is left to train."""
        self._model, self._copies = model, copies
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("every parameter is frozen", remedy="name fewer in freeze")
        matrices = [p for p in trained if p.ndim >= 2]
        self._muon: Muon | None = None
        if cfg.name == "muon":
            matrices = self._give_to_muon(cfg, matrices)
        groups: list[Group] = [
            (matrices, cfg.weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        ]
        backend = _backend(model.device)
        dtype = torch.bfloat16 if cfg.moments == "bfloat16" else torch.float32
        ours = backend == "triton" or cfg.moments == "bfloat16"
        self._narrow = OurAdamW(groups, cfg, dtype, copies, backend) if ours else None
        self._plain: torch.optim.Optimizer | None = None
        if self._narrow is None:
            options = [{"params": p, "weight_decay": decay} for p, decay in groups]
            self._plain = torch.optim.AdamW(options, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

    def _give_to_muon(self, cfg: OptimConfig, matrices: list[nn.Parameter]) -> list[nn.Parameter]:
        """Builds Muon over the hidden matrices; returns those that stay with AdamW."""
        tables = [m.weight for m in self._model.modules() if isinstance(m, Embedding)]
        if not self._model.cfg.tie_word_embeddings:
            tables.append(self._model.lm_head.weight)
        kept = {id(p) for p in tables}
        halves = {id(m.gate_up_proj) for m in self._model.modules() if isinstance(m, RoutedExperts)}
        whole = slice(None)
        mine: list[tuple[nn.Parameter, tuple[slice, ...]]] = []
        for p in matrices:
            if id(p) in halves:
                mine += [(p, (whole, rows)) for rows in _halves(p.shape[1])]
            elif id(p) not in kept:
                mine.append((p, (whole,)))
        if mine:  # all may be frozen
            self._muon = Muon(mine, cfg.momentum, cfg.weight_decay)
        return [p for p in matrices if id(p) in kept]

    def step(self, lr: float, factor: Tensor | None = None) -> None:
        """Update the weights by their gradients times factor (a scalar on their device; None: 1), in place."""
        theirs = self._plain is not None or self._muon is not None
        if theirs and self._copies is not None:
            self._copies.fold()
        if theirs and factor is not None:
            torch._foreach_mul_([p.grad for p in self._model.parameters() if p.grad is not None], factor)
            factor = None
        if self._plain is not None:
            for group in self._plain.param_groups:
                group["lr"] = lr
            self._plain.step()
        if self._muon is not None:
            self._muon.step(lr)
        if self._narrow is not None:
            self._narrow.step(lr, factor)
        if theirs and self._copies is not None:
            self._copies.refresh(everything=True)

    def zero_grad(self) -> None:
        for p in self._model.parameters():
            p.grad = None
            if self._copies is not None and (copy := self._copies.of(p)) is not None:
                copy.grad = None

    @property
    def bytes_to_come(self) -> int:
        """What the first step will allocate for moments."""
        plain = self._plain
        lazy = [] if plain is None or plain.state else [p for group in plain.param_groups for p in group["params"]]
        coming = 0 if self._muon is None else self._muon.numel_to_come
        return 4 * (2 * sum(p.numel() for p in lazy) + coming)

    def _parts(self) -> dict[str, Any]:
        parts = {"adamw": self._plain, "narrow": self._narrow, "muon": self._muon}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _as_torchs(self, state: dict[str, Any]) -> dict[str, Any]:
        """Our AdamW's state as torch's."""
        assert self._plain is not None
        if state["m"] and state["m"][0].dtype != torch.float32:
            raise ValueError("it holds bfloat16 moments, the run has float32 ones")
        step = torch.tensor(float(state["steps"]))
        each = {
            i: {"step": step.clone(), "exp_avg": m, "exp_avg_sq": v}
            for i, (m, v) in enumerate(zip(state["m"], state["v"], strict=True))
        }
        return {"state": each, "param_groups": self._plain.state_dict()["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError where the state is another optimiser's."""
        if "param_groups" in state:  # written before there was more than one
            state = {"adamw": state}
        parts = self._parts()
        if "narrow" in parts and "adamw" in state:  # fp32 moments, saved by a run on a CPU
            state = {"narrow" if name == "adamw" else name: part for name, part in state.items()}
        elif "adamw" in parts and "narrow" in state:
            state = {"adamw" if name == "narrow" else name: part for name, part in state.items()}
            state["adamw"] = self._as_torchs(state["adamw"])
        if parts.keys() != state.keys():
            raise ValueError(f"it holds the state of {', '.join(state)}, the run has {', '.join(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])


def _halves(rows: int) -> list[slice]:
    return [slice(0, rows // 2), slice(rows // 2, rows)]
