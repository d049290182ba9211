"""Parameters, cache bytes and operations of a configuration, in closed form: no torch, no model is built.

Checked against the model built on the meta device, and against the paper's totals for DeepSeek-V3
(671,026,419,200 parameters, 37.55 B of them active on a token).
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the network: all of them, and those one token touches."""

    name: str
    total: int
    active: int


def attention_parameters(cfg: ModelConfig) -> int:
    """One layer's MLA, latent norms included."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    q = D * H * cfg.qk_head_dim
    if cfg.q_lora_rank is not None:
        q = D * cfg.q_lora_rank + cfg.q_lora_rank + cfg.q_lora_rank * H * cfg.qk_head_dim
    kv_a = D * cfg.cache_dim + cfg.kv_lora_rank
    kv_b = cfg.kv_lora_rank * H * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    return q + kv_a + kv_b + H * cfg.v_head_dim * D


def parts(cfg: ModelConfig) -> list[Part]:
    """The main model by part, MTP last and apart. Correction biases count as router parameters."""
    D, L = cfg.hidden_size, cfg.num_hidden_layers
    moe_layers = L - cfg.first_k_dense_replace
    dense = cfg.first_k_dense_replace * 3 * D * cfg.intermediate_size
    expert = 3 * D * cfg.moe_intermediate_size
    router = cfg.n_routed_experts * (D + 1)
    head = 0 if cfg.tie_word_embeddings else cfg.vocab_size * D

    def plain(name: str, n: int) -> Part:
        return Part(name, n, n)

    mtp_rest = attention_parameters(cfg) + router + cfg.n_shared_experts * expert + 2 * D * D + 5 * D
    depth = cfg.num_nextn_predict_layers
    return [
        plain("embedding", cfg.vocab_size * D),
        plain("attention", L * attention_parameters(cfg)),
        plain("dense feed-forward", dense),
        plain("router", moe_layers * router),
        plain("shared experts", moe_layers * cfg.n_shared_experts * expert),
        Part(
            "routed experts",
            moe_layers * cfg.n_routed_experts * expert,
            moe_layers * cfg.num_experts_per_tok * expert,
        ),
        plain("norms", (2 * L + 1) * D),
        plain("head", head),
        Part(
            "MTP modules",
            depth * (mtp_rest + cfg.n_routed_experts * expert),
            depth * (mtp_rest + cfg.num_experts_per_tok * expert),
        ),
    ]


def totals(cfg: ModelConfig) -> tuple[int, int]:
    """(total, active) parameters of the main model, MTP apart; both count the embedding and the head once each."""
    main = parts(cfg)[:-1]
    return sum(p.total for p in main), sum(p.active for p in main)


def cache_bytes_per_token(cfg: ModelConfig, bytes_per_value: float = 2) -> int:
    """Bytes of latent cache one token takes over all layers (MTP apart)."""
    return int(cfg.num_hidden_layers * cfg.cache_dim * bytes_per_value)


def forward_flops_per_token(cfg: ModelConfig, context: int, mtp: bool = False) -> int:
    """Operations of one token's forward among `context` tokens with causal attention in the expanded form.

    Two per active weight that is multiplied (the embedding is looked up, a tied head still multiplies), and on average
    context / 2 keys per head at N + R for the scores and U for the values.
    """
    _, active = totals(cfg)
    weights = active - cfg.vocab_size * cfg.hidden_size
    if cfg.tie_word_embeddings:
        weights += cfg.vocab_size * cfg.hidden_size
    layers = cfg.num_hidden_layers
    if mtp and (depth := cfg.num_nextn_predict_layers):
        weights += parts(cfg)[-1].active + depth * cfg.vocab_size * cfg.hidden_size
        layers += depth
    pair = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    return 2 * weights + layers * pair * context


def training_flops_per_token(cfg: ModelConfig, context: int) -> int:
    """Three times the forward: gradients of activations and of weights cost one forward each."""
    return 3 * forward_flops_per_token(cfg, context, mtp=True)
