"""Parameters, stored bytes, cache bytes and operations of a configuration, in closed form: no torch, no model is built.

Checked against the model built on the meta device, against the paper's totals for DeepSeek-V3 (671,026,419,200
parameters, 37.55 B of them active on a token), and against its release to the byte (91,991 tensors, 688,574,839,360
bytes: FP8 weights with the MTP module and its second copies of embedding and head).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rorqual.config import ModelConfig

FP8_BLOCK = 128
INT_GROUP = 32
Form = Literal["fp32", "bf16", "fp8", "int8", "int4"]
FORMS: tuple[Form, ...] = ("fp32", "bf16", "fp8", "int8", "int4")
# linear: in FP8 as released, in int8 and int4 too.  table: embedding and head, bf16 in the FP8 release, int8 and int4
# otherwise.  kept: router, norms, eh_proj, which no form quantises.  bias: the router's correction, always fp32.
Kind = Literal["linear", "table", "kept", "bias"]


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


# ---- what a checkpoint stores ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """`count` stored tensors of one shape; `rows` is 1 for vectors."""

    kind: Kind
    rows: int
    cols: int
    count: int = 1

    def bytes_in(self, form: Form) -> int:
        """Bytes of all of them in a storage form, scales included."""
        if self.kind == "bias":
            return self.count * self.rows * self.cols * 4
        if form == "fp32":
            return self.count * self.rows * self.cols * 4
        if form == "fp8" and self.kind == "linear":
            grid = math.ceil(self.rows / FP8_BLOCK) * math.ceil(self.cols / FP8_BLOCK)
            return self.count * (self.rows * self.cols + 4 * grid)
        if form in ("int8", "int4") and self.kind in ("linear", "table"):
            words = math.ceil(self.cols * int(form[3:]) / 32)  # packed into int32 along a row
            return self.count * self.rows * (4 * words + 2 * math.ceil(self.cols / INT_GROUP))
        return self.count * self.rows * self.cols * 2

    def names_in(self, form: Form) -> int:
        """Entries in the index: an FP8 matrix has its scale grid beside it."""
        return self.count * (2 if form == "fp8" and self.kind == "linear" else 1)


def stored(cfg: ModelConfig, mtp: bool = True, copies: bool = False) -> Iterator[Tensors]:
    """Every tensor of a checkpoint. copies: with the embedding and head that a release stores again for each MTP module
    although they are shared."""
    D, V, L = cfg.hidden_size, cfg.vocab_size, cfg.num_hidden_layers
    depth = cfg.num_nextn_predict_layers if mtp else 0
    tables = 1 + (not cfg.tie_word_embeddings) + (2 * depth if copies else 0)
    yield Tensors("table", V, D, tables)
    yield Tensors("kept", 1, D)
    for times, moe in ((cfg.first_k_dense_replace, False), (L - cfg.first_k_dense_replace + depth, True)):
        if times:
            for t in _layer(cfg, moe):
                yield Tensors(t.kind, t.rows, t.cols, t.count * times)
    if depth:
        yield Tensors("kept", 1, D, 3 * depth)  # enorm, hnorm, shared_head.norm
        yield Tensors("kept", D, 2 * D, depth)  # eh_proj


def _layer(cfg: ModelConfig, moe: bool) -> Iterator[Tensors]:
    D, H = cfg.hidden_size, cfg.num_attention_heads
    yield Tensors("kept", 1, D, 2)
    queries = H * cfg.qk_head_dim
    if cfg.q_lora_rank is None:
        yield Tensors("linear", queries, D)
    else:
        yield Tensors("linear", cfg.q_lora_rank, D)
        yield Tensors("kept", 1, cfg.q_lora_rank)
        yield Tensors("linear", queries, cfg.q_lora_rank)
    yield Tensors("linear", cfg.cache_dim, D)
    yield Tensors("kept", 1, cfg.kv_lora_rank)
    yield Tensors("linear", H * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)
    yield Tensors("linear", D, H * cfg.v_head_dim)
    widths = [(cfg.intermediate_size, 1)]
    if moe:
        yield Tensors("kept", cfg.n_routed_experts, D)
        yield Tensors("bias", 1, cfg.n_routed_experts)
        widths = [
            (cfg.moe_intermediate_size, cfg.n_routed_experts),
            (cfg.n_shared_experts * cfg.moe_intermediate_size, 1),
        ]
    for width, count in widths:
        yield Tensors("linear", width, D, 2 * count)
        yield Tensors("linear", D, width, count)


def stored_bytes(cfg: ModelConfig, form: Form, mtp: bool = True, copies: bool = False) -> int:
    """Bytes of all weights in a storage form. fp8: as released, e4m3 with fp32 scales on ceil/128 grids. int8 and int4:
    symmetric, groups of 32 along a row with bf16 scales. The rest stays bf16, correction biases fp32."""
    return sum(t.bytes_in(form) for t in stored(cfg, mtp, copies))


def stored_tensors(cfg: ModelConfig, form: Form, mtp: bool = True, copies: bool = False) -> int:
    """How many tensors the safetensors index of an fp32, bf16 or fp8 checkpoint lists."""
    return sum(t.names_in(form) for t in stored(cfg, mtp, copies))


# ---- cache and operations -------------------------------------------------------------------------------------------


def cache_bytes_per_token(cfg: ModelConfig, bytes_per_value: float = 2) -> int:
    """Bytes of latent cache one token takes over all layers (MTP apart)."""
    return int(cfg.num_hidden_layers * cfg.cache_dim * bytes_per_value)


def fp8_cache_bytes_per_token(cfg: ModelConfig) -> int:
    """The same in FlashMLA's FP8 form: e4m3 latent, an fp32 scale for each 128 of it, the rotary key in bf16."""
    scales = math.ceil(cfg.kv_lora_rank / FP8_BLOCK)
    return cfg.num_hidden_layers * (cfg.kv_lora_rank + 4 * scales + 2 * cfg.qk_rope_head_dim)


def weight_flops_per_token(cfg: ModelConfig, mtp: bool = False) -> int:
    """Two for each active weight that is multiplied: the embedding is looked up, a tied head still multiplies."""
    table = cfg.vocab_size * cfg.hidden_size
    weights = totals(cfg)[1] - table + (table if cfg.tie_word_embeddings else 0)
    if mtp:
        weights += parts(cfg)[-1].active + cfg.num_nextn_predict_layers * table
    return 2 * weights


def attention_flops_per_token(cfg: ModelConfig, keys: float, absorbed: bool = False, mtp: bool = False) -> int:
    """Scores and values of one query against `keys` keys, in all heads and layers.

    Expanded, a pair costs N + R for its score and U for its value; absorbed, C + R and C, because the latent itself is
    key and value (what decoding does: no key is ever expanded).
    """
    layers = cfg.num_hidden_layers + (cfg.num_nextn_predict_layers if mtp else 0)
    expanded_pair = cfg.qk_head_dim + cfg.v_head_dim
    pair = cfg.cache_dim + cfg.kv_lora_rank if absorbed else expanded_pair
    return int(2 * layers * cfg.num_attention_heads * pair * keys)


def forward_flops_per_token(cfg: ModelConfig, context: int, mtp: bool = False) -> int:
    """Operations of one token's forward among `context` tokens with causal attention in the expanded form: the weights
    once, and on average context / 2 keys."""
    return weight_flops_per_token(cfg, mtp) + attention_flops_per_token(cfg, context / 2, mtp=mtp)


def decode_flops_per_token(cfg: ModelConfig, context: int) -> int:
    """Operations of the next token after `context` cached ones, in the absorbed form. Its weights are the expanded
    form's: kv_b multiplies the query and the output instead of the latents."""
    return weight_flops_per_token(cfg) + attention_flops_per_token(cfg, context, absorbed=True)


def training_flops_per_token(cfg: ModelConfig, context: int) -> int:
    """Three times the forward: gradients of activations and of weights cost one forward each."""
    return 3 * forward_flops_per_token(cfg, context, mtp=True)
