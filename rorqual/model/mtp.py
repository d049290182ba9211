"""A multi-token-prediction module (DeepSeek-V3 section 2.2), in the form that released checkpoints use.

It sees the hidden state of position i *after* the model's final norm and the embedding of the next token i+1, and
predicts token i+2 through one more block and the shared head. The paper writes [h; Emb]; released weights expect
the embedding half first: eh_proj(cat[enorm(Emb(t_{i+1})), hnorm(h_i)]). A head trained the other way round, or on the
hidden state before the norm, works here and can be drafted with by no other engine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.batch import LayerPages, Routing
from rorqual.model.block import Block
from rorqual.model.layers import Linear, RMSNorm


class SharedHead(nn.Module):
    """The module's own norm before the head it shares with the model (so the head itself is not here)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class MTP(nn.Module):
    """Layer index num_hidden_layers + k in a checkpoint; embedding and head are the model's own."""

    def __init__(self, cfg: ModelConfig, layer: int, experts_backend: str, attention_backend: str) -> None:
        super().__init__()
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size)
        self.block = Block(cfg, layer, experts_backend, attention_backend)
        self.shared_head = SharedHead(cfg)

    def forward(
        self,
        h_BTD: Tensor,
        next_embedding_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible_BTS: Tensor | None = None,
        cache: LayerPages | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The normed hidden state for the head, which is also what the next module in a chain reads as h."""
        x = self.eh_proj(torch.cat((self.enorm(next_embedding_BTD), self.hnorm(h_BTD)), -1))
        x, routing = self.block(x, rope, visible_BTS, cache)
        return self.shared_head.norm(x), routing
