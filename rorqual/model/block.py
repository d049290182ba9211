"""One pre-norm layer: attention, then a dense or a routed feed-forward, each added to the residual stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual.config import ModelConfig
from rorqual.model.batch import LayerPages, Routing
from rorqual.model.layers import MLP, RMSNorm
from rorqual.model.mla import MLA
from rorqual.model.moe import MoE

Recompute = Literal["none", "selective", "block"]
"""What a training step computes again in the backward in place of keeping it: nothing; what comes before the attention's own
products (norms, queries, keys and values from their latents: section 3.2.3); or all of a layer but its input."""


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int, experts_backend: str, attention_backend: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg, attention_backend)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MoE(cfg, experts_backend) if cfg.is_moe(layer) else MLP(cfg.hidden_size, cfg.intermediate_size)
        self.whole = False

    def recompute(self, what: Recompute) -> None:
        """From now on, in training."""
        self.whole, self.self_attn.recompute = what == "block", what == "selective"

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible_BTS: Tensor | None = None,
        cache: LayerPages | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream, and the routing decisions of a routed layer (None of a dense one)."""
        if self.whole and cache is None and torch.is_grad_enabled():
            kept: tuple[Tensor, Routing | None] = checkpoint(
                self.compute, x_BTD, rope, visible_BTS, use_reentrant=False
            )
            return kept
        return self.compute(x_BTD, rope, visible_BTS, cache)

    def compute(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible_BTS: Tensor | None = None,
        cache: LayerPages | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The same, everything kept."""
        x_BTD, normed = self.input_layernorm.beside(x_BTD)
        attended = self.self_attn(normed, rope, visible_BTS, cache)
        x_BTD, normed = self.post_attention_layernorm.after(x_BTD, attended)
        if isinstance(self.mlp, MoE):
            return self.mlp(normed, x_BTD)
        return x_BTD + self.mlp(normed), None
