"""The Llama network, as plainly as it can be written: what a model is converted from, and the teacher that heals it.

It answers to the same two calls as our own `Transformer` (`hidden`, then `head`), so that either may teach. The rotary
pairs are neighbours here, as in DeepSeek's layout and in GGUF files, and not halves, as in Hugging Face directories:
`post.llama_files` permutes on reading, and everything after that has one layout.

Left out: caches (the teacher reads whole rows), biases, and stretched rotary angles, which no reader lets through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.model.batch import Batch, Routing
from rorqual.model.layers import MLP, Embedding, Linear, RMSNorm
from rorqual.ops.rope import cos_sin, inverse_frequencies, rotate


@dataclass(frozen=True)
class LlamaConfig:
    """The keys of a Llama `config.json` that say something about the network. head_dim: of queries, keys and values."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def cache_dim(self) -> int:
        """Cached values per token and layer: keys and values of all key heads."""
        return 2 * self.num_key_value_heads * self.head_dim


class Attention(nn.Module):
    """Grouped-query attention: query head h reads key and value head h // groups."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        H, G, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.d = d
        self.q_proj = Linear(cfg.hidden_size, H * d)
        self.k_proj = Linear(cfg.hidden_size, G * d)
        self.v_proj = Linear(cfg.hidden_size, G * d)
        self.o_proj = Linear(H * d, cfg.hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_BTS: Tensor | None) -> Tensor:
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.d)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (t[..., None, :] for t in rope)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None if visible_BTS is None else visible_BTS[:, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class LlamaBlock(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def attend(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_BTS: Tensor | None = None) -> Tensor:
        return x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, visible_BTS)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_BTS: Tensor | None = None) -> Tensor:
        x_BTD = self.attend(x_BTD, rope, visible_BTS)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """Left uninitialised: `llama_files.load_llama` fills it. compute_dtype: of the activations (None: the weights')."""

    def __init__(self, cfg: LlamaConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        speeds, _ = inverse_frequencies(cfg.head_dim, cfg.rope_theta, None)
        self.rope_speeds: Tensor
        self.register_buffer("rope_speeds", torch.tensor(speeds, dtype=torch.float32), persistent=False)

    @property
    def blocks(self) -> list[LlamaBlock]:
        return [layer for layer in self.layers if isinstance(layer, LlamaBlock)]

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(self, tokens_BT: Tensor, batch: Batch | None = None) -> Tensor:
        """Logits [B, T, V]."""
        return self.head(self.hidden(tokens_BT, batch)[0])

    def hidden(self, tokens_BT: Tensor, batch: Batch | None = None) -> tuple[Tensor, list[Routing]]:
        """Hidden states after the final norm [B, T, D]; the list is empty, a dense model routes nothing."""
        visible = None
        if batch is not None and batch.documents_BT is not None:
            visible = (batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :]).tril()
        rope = self.rope(tokens_BT.shape[1])
        x = self.embed(tokens_BT)
        for layer in self.layers:
            x = layer(x, rope, visible)
        return self.norm(x), []

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x = self.embed_tokens(tokens_BT)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [1, T, head_dim/2] of positions 0..T-1."""
        return cos_sin(torch.arange(length, device=self.device)[None], self.rope_speeds, 1.0)

    def head(self, h_BTD: Tensor) -> Tensor:
        return self.embed_tokens.project(h_BTD) if self.cfg.tie_word_embeddings else self.lm_head(h_BTD)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Query or key weights [heads * d, in] from halves (i turns with i + d/2) to neighbours (2i with 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halve(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`, for a Hugging Face directory."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def names(cfg: LlamaConfig) -> Iterator[tuple[str, str]]:
    """(Hugging Face name, path in `Llama`) of every tensor."""
    yield "model.embed_tokens.weight", "embed_tokens.weight"
    for i in range(cfg.num_hidden_layers):
        for part in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        ):  # fmt: skip
            yield f"model.layers.{i}.{part}.weight", f"layers.{i}.{part}.weight"
    yield "model.norm.weight", "norm.weight"
    if not cfg.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.weight"
