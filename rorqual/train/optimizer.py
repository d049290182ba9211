"""The optimiser of a run: AdamW, with moments in fp32 or bf16, or Muon for the matrices and AdamW for the rest.

AdamW with fp32 moments is torch's fused one; with bf16 moments `ops.adamw`. Muon (`ops.muon`) sees each expert's gate, up
and down as a matrix of its own, because orthogonalising two as one is another update; its step is scaled to AdamW's
size, so that one learning rate serves both. Embedding, head, and norms are AdamW's in either case.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rorqual.errors import ConfigError
from rorqual.model.layers import Embedding
from rorqual.model.moe import RoutedExperts
from rorqual.model.transformer import Transformer
from rorqual.ops.adamw import adamw_backends
from rorqual.ops.muon import Muon
from rorqual.train.config import OptimConfig

Group = tuple[list[nn.Parameter], float]
"""Parameters and their weight decay."""


class NarrowAdamW:
    """`ops.adamw` over parameters, moments in `dtype`."""

    def __init__(self, groups: list[Group], cfg: OptimConfig, dtype: torch.dtype) -> None:
        self._parameters = [(p, decay) for group, decay in groups for p in group]
        self._cfg, self._update = cfg, adamw_backends.get("reference")
        self._steps = 0
        self._m = [torch.zeros_like(p, dtype=dtype) for p, _ in self._parameters]
        self._v = [torch.zeros_like(p, dtype=dtype) for p, _ in self._parameters]

    def step(self, lr: float) -> None:
        self._steps += 1
        o = self._cfg
        for (p, decay), m, v in zip(self._parameters, self._m, self._v, strict=True):
            if p.grad is not None:
                self._update(p, p.grad, m, v, self._steps, lr, (o.beta1, o.beta2), o.eps, decay)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "m": self._m, "v": self._v}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])
        for mine, theirs in ((self._m, state["m"]), (self._v, state["v"])):
            for a, b in zip(mine, theirs, strict=True):
                a.copy_(b)


class Optimizer:
    """One object for all of them, over the parameters that require gradients. Its state is a dict of plain tensors and
    numbers by optimiser."""

    def __init__(self, cfg: OptimConfig, model: Transformer) -> None:
        """Raises ConfigError where nothing is left to train."""
        self._model = model
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
        self._narrow = NarrowAdamW(groups, cfg, torch.bfloat16) if cfg.moments == "bfloat16" else None
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

    def step(self, lr: float) -> None:
        """Update the weights by their gradients, in place."""
        if self._plain is not None:
            for group in self._plain.param_groups:
                group["lr"] = lr
            self._plain.step()
        if self._muon is not None:
            self._muon.step(lr)
        if self._narrow is not None:
            self._narrow.step(lr)

    def zero_grad(self) -> None:
        for p in self._model.parameters():
            p.grad = None

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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError where the state is another optimiser's."""
        if "param_groups" in state:  # written before there was more than one
            state = {"adamw": state}
        parts = self._parts()
        if parts.keys() != state.keys():
            raise ValueError(f"it holds the state of {', '.join(state)}, the run has {', '.join(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])


def _halves(rows: int) -> list[slice]:
    return [slice(0, rows // 2), slice(rows // 2, rows)]
