"""The optimiser of a run: AdamW, or Muon and AdamW side by side behind one face.

torch.optim.Muon (Keller Jordan's optimiser with Moonshot's scaling of the update) takes single matrices. So attention,
dense and shared feed-forwards go to it; stacks of experts, embeddings, head, routers and norms stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rorqual.train.config import OptimConfig

MUON_MOMENTUM = 0.95
_ADAMW_MATRICES = ("embed_tokens.weight", "lm_head.weight", "gate.weight")


class Optimizers:
    """Several optimisers as one: the part of torch.optim.Optimizer that a trainer and a checkpoint use."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError or ValueError for a state of other optimisers."""
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state_dict(own)


def make_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.AdamW | Optimizers:
    """Over the parameters that require gradients. Weight decay acts on matrices, not on norms."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in trained if cfg.kind == "muon" and p.ndim == 2 and not name.endswith(_ADAMW_MATRICES)}
    adamw = _adamw(cfg, [p for name, p in trained if name not in by_muon])
    if not by_muon:
        return adamw
    muon = torch.optim.Muon(
        [p for name, p in trained if name in by_muon],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizers(muon, adamw)


def _adamw(cfg: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    every = list(parameters)
    matrices, vectors = [p for p in every if p.ndim >= 2], [p for p in every if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
