"""A Llama-architecture model into DeepSeek-V3's architecture, in closed form from a little text.

    calibration text -> the source, layer by layer -> attention into MLA -> feed-forward into experts -> (MTP) -> files

Nothing is trained: every new weight is a function of the old weights and of second moments of each layer's inputs, read
off while the calibration text passes through the source once. How good that is, is measured on text that was held back:
perplexity, and the divergence from the source, after each step, so that one sees what each costs. What is lost,
`rorqual distill` brings back.

The text need not be large, some ten thousand tokens, but should be of the kind the model will see. The default is what
every Python brings along, its own language reference.

Left out: low-rank queries, group-limited routing (a model of this size has one group), and vocabularies other than the
source's own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.data.sources import texts
from rorqual.errors import ConfigError, DataError
from rorqual.model.block import Block
from rorqual.model.layers import MLP
from rorqual.model.moe import MoE
from rorqual.model.transformer import Transformer
from rorqual.post.llama import Llama, LlamaConfig
from rorqual.post.llama_files import LlamaSource, build_llama, open_llama
from rorqual.post.llama_tokenizer import TokenizerFiles, with_markers
from rorqual.post.upcycle_attention import LatentAttention, convert_attention
from rorqual.post.upcycle_experts import Experts, ExpertShape, convert_experts
from rorqual.post.upcycle_mtp import fit_mtp

log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True)
class UpcycleConfig:
    """rank: kv_lora_rank (0: a third of the hidden size, in steps of 32). fold: neighbouring rotary speeds mixed as one.
    key_weight: an error of keys against one of values. shared, routed, width, top_k: experts; 0 divides half the neurons
    into about twelve experts, half of them chosen, and leaves as many shared. drop: so many neurons of a layer with
    experts, the weakest, are left out. dense_layers: how many stay dense. chat:
    DeepSeek's chat markers in place of spare special tokens. tokens: of calibration, in sequences of `length`, a sixth of
    which is held back for measuring."""

    rank: int = 0
    fold: int = 2
    key_weight: float = 2.0
    shared: int = 0
    routed: int = 0
    width: int = 0
    top_k: int = 0
    drop: int = 0
    dense_layers: int = 1
    mtp: bool = False
    chat: bool = True
    tokens: int = 24576
    length: int = 512
    seed: int = 0


class Measure(NamedTuple):
    """On held-back text: perplexity, KL(source || model) in nats a token, share of equal first choices."""

    step: str
    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Upcycled:
    """cache_before, cache_after: cached values per token, all layers. mtp_agreement: with the model's own next choice."""

    model: Transformer
    tokenizer: TokenizerFiles | None
    measures: list[Measure]
    cache_before: int
    cache_after: int
    mtp_agreement: float | None


def upcycle(
    src: str | Path,
    dst: str | Path,
    text: Sequence[str | Path] = (),
    cfg: UpcycleConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    say: Say = log.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Upcycled:
    """Convert `src` (a Hugging Face directory or a GGUF file) and write `dst`, a released-format directory.

    text: files or folders for calibration (none: Python's language reference); special tokens spelled in them count as
    such. progress: (layers done, layers). The same inputs and seed give the same weights on one machine. Raises
    ConfigError for what has no place in this architecture, DataError for text that is too short, CheckpointError.
    """
    cfg = cfg or UpcycleConfig()
    source = open_llama(src)
    if source.tokenizer is None:
        raise ConfigError(f"{src} has no tokenizer", remedy="add tokenizer.json: calibration text must be encoded")
    rows_BT = calibration_rows(source.tokenizer, text, cfg)
    result = convert(source, rows_BT, cfg, say, progress)
    dst = Path(dst)
    save_model(result.model, dst, dtype=dtype)
    if result.tokenizer is not None:
        result.tokenizer.save(dst)
    return result


def convert(
    source: LlamaSource, rows_BT: Tensor, cfg: UpcycleConfig, say: Say = log.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Upcycled:  # fmt: skip
    """The same in memory, from token rows; the last sixth of them is held back."""
    llama = build_llama(source)
    tokenizer, ids = _tokenizer(source, cfg, say)
    model_cfg = released_config(source.cfg, cfg, ids)
    held = max(1, len(rows_BT) // 6)
    calibration, measured = rows_BT[:-held], rows_BT[-held:]
    # Three models that share what they have in common; the last is the result.
    whole = model_cfg.replace(kv_lora_rank=max(source.cfg.hidden_size, model_cfg.kv_lora_rank), **_dense(model_cfg))
    steps = {"one rotary key": _shell(whole, llama), "latent": _shell(model_cfg.replace(**_dense(model_cfg)), llama)}
    final = _shell(model_cfg, llama)
    shape = expert_shape(source.cfg, cfg)
    with torch.no_grad():
        for i, x_attention, x_ffn in layer_inputs(llama, calibration):
            block = llama.blocks[i]
            for model in steps.values():
                rank = model.cfg.kv_lora_rank
                weights = convert_attention(block, source.cfg, x_attention, rank, cfg.fold, cfg.key_weight)
                _set_attention(model, i, weights)
            _set_attention(final, i, weights)  # the last step's
            if model_cfg.is_moe(i):
                _set_experts(final, i, convert_experts(block.mlp, x_ffn, shape, cfg.seed + i))
            progress(i + 1, len(llama.layers))
        agreement = None
        measures = measure(llama, {**steps, f"{shape.top_k} of {shape.routed} experts": final}, measured, say)
        if cfg.mtp:
            agreement = fit_mtp(final, llama, calibration, measured)
            say(f"MTP module: agrees with the model's own next choice on {agreement:.1%} of held-back tokens")
    before = source.cfg.cache_dim * source.cfg.num_hidden_layers
    after = model_cfg.cache_dim * model_cfg.num_hidden_layers
    say(f"cache: {2 * before:,} bytes a token in bf16 before, {2 * after:,} after ({after / before:.0%})")
    return Upcycled(final, tokenizer, measures, before, after, agreement)


# ---- what the new model looks like -------------------------------------------------------------------------------


def expert_shape(source: LlamaConfig, cfg: UpcycleConfig) -> ExpertShape:
    """Raises ConfigError where the experts do not add up to the feed-forward's neurons."""
    neurons = source.intermediate_size - cfg.drop
    if not 0 < neurons <= source.intermediate_size:
        raise ConfigError(
            f"{cfg.drop} of {source.intermediate_size} neurons cannot be dropped",
            remedy=f"drop at least 0 and fewer than {source.intermediate_size}",
        )
    width = cfg.width or _usual_width(neurons, 2 * (cfg.routed or 12))
    routed = cfg.routed or max(2, neurons // width // 2)
    shared = cfg.shared or neurons // width - routed
    if shared < 1 or (shared + routed) * width != neurons:
        raise ConfigError(
            f"{shared} shared and {routed} routed experts of width {width} are not the {neurons} neurons",
            remedy="choose routed, width, shared and drop with (shared + routed) * width + drop = intermediate_size",
        )
    top_k = cfg.top_k or max(1, routed // 2)
    if not 1 <= top_k <= routed:
        raise ConfigError(f"top_k {top_k} must lie between 1 and {routed}")
    return ExpertShape(shared, routed, width, top_k)


def _usual_width(neurons: int, parts: int) -> int:
    """The divisor of `neurons` nearest to a `parts`-th, among multiples of 32 (int4's groups) where one is near."""
    near = [w for w in range(1, neurons + 1) if neurons % w == 0 and w <= max(1, 2 * neurons // parts)]
    whole = [w for w in near if w % 32 == 0 and 2 * w * parts >= neurons]
    return min(whole or near, key=lambda w: abs(w - neurons / parts))


def released_config(source: LlamaConfig, cfg: UpcycleConfig, ids: tuple[int | None, ...]) -> ModelConfig:
    """ids: of beginning, end and padding. Raises ConfigError for a source this architecture cannot hold."""
    shape, d = expert_shape(source, cfg), source.head_dim
    pairs = d // 2
    if cfg.fold < 1 or pairs % cfg.fold:
        raise ConfigError(f"fold {cfg.fold} does not divide the {pairs} rotary pairs of a head")
    rank = cfg.rank or min(max(32, round(source.hidden_size / 3 / 32) * 32), 2 * source.num_key_value_heads * d)
    if rank < source.hidden_size and rank > 2 * source.num_key_value_heads * d:
        raise ConfigError(
            f"rank {rank} is more than keys and values need", remedy=f"at most {2 * source.num_key_value_heads * d}"
        )
    bos, eos, pad = ids
    return ModelConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        kv_lora_rank=rank,
        qk_nope_head_dim=d,
        qk_rope_head_dim=d,
        v_head_dim=d,
        intermediate_size=source.intermediate_size,
        moe_intermediate_size=shape.width,
        n_routed_experts=shape.routed,
        num_experts_per_tok=shape.top_k,
        n_shared_experts=shape.shared,
        first_k_dense_replace=min(cfg.dense_layers, source.num_hidden_layers),
        routed_scaling_factor=float(shape.top_k),
        num_nextn_predict_layers=int(cfg.mtp),
        max_position_embeddings=source.max_position_embeddings,
        rope_theta=source.rope_theta,
        rms_norm_eps=source.rms_norm_eps,
        tie_word_embeddings=source.tie_word_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _tokenizer(
    source: LlamaSource, cfg: UpcycleConfig, say: Say
) -> tuple[TokenizerFiles | None, tuple[int | None, ...]]:
    """The result's tokenizer, with chat markers where asked and possible, and its ids of beginning, end and padding."""
    own = source.cfg
    eos = own.eos_token_id[0] if isinstance(own.eos_token_id, tuple) else own.eos_token_id
    ids = (own.bos_token_id, eos, own.pad_token_id)
    if source.tokenizer is None or not cfg.chat:
        return source.tokenizer, ids
    marked = with_markers(source.tokenizer, *ids)
    if marked is None:
        say("the tokenizer has no special tokens to spare for chat markers: it stays the source's")
        return source.tokenizer, ids
    spelled = {t["content"]: int(t["id"]) for t in marked.spec["added_tokens"]}
    return marked, (*ids[:2], spelled[marked.config["pad_token"]])


# ---- calibration -------------------------------------------------------------------------------------------------


def calibration_rows(tokenizer: TokenizerFiles, text: Sequence[str | Path], cfg: UpcycleConfig) -> Tensor:
    """Token rows [B, T] spread over the text. Raises DataError for a text too short for them."""
    count = max(2, cfg.tokens // cfg.length)
    words = list(texts(text, 400 * cfg.tokens)) if text else language_reference()
    ids = tokenizer.encode("\n\n".join(words))
    if len(ids) < count * cfg.length:
        raise DataError(
            f"the calibration text has {len(ids):,} tokens, {count * cfg.length:,} are wanted",
            remedy="give more text, or ask for fewer tokens",
        )
    stride = (len(ids) - cfg.length) // max(1, count - 1)
    rows = torch.tensor([ids[i * stride : i * stride + cfg.length] for i in range(count)])
    return rows[torch.randperm(count, generator=torch.Generator().manual_seed(cfg.seed))]


def language_reference() -> list[str]:
    """Python's language reference as this Python has it: half a megabyte of English prose and code."""
    from pydoc_data.topics import topics

    return [str(topics[name]) for name in sorted(topics)]


def layer_inputs(llama: Llama, rows_BT: Tensor, chunk: int = 8) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(layer, normed inputs of its attention [N, D], of its feed-forward [N, D]) as the rows pass through, a layer at a
    time: memory holds one layer's inputs, whatever the model's depth."""
    rope = llama.rope(rows_BT.shape[1])
    h_BTD = llama.embed(rows_BT)
    for i, layer in enumerate(llama.blocks):
        normed = layer.input_layernorm(h_BTD)
        between = torch.cat([layer.attend(part, rope) for part in h_BTD.split(chunk)])
        normed_ffn = layer.post_attention_layernorm(between)
        yield i, normed.flatten(0, 1), normed_ffn.flatten(0, 1)
        h_BTD = between + torch.cat([layer.mlp(part) for part in normed_ffn.split(chunk)])


@torch.no_grad()
def measure(llama: Llama, models: dict[str, Transformer], rows_BT: Tensor, say: Say) -> list[Measure]:
    """The source and each model on the same rows."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("source", *models)}
    for row in rows_BT.split(1):
        reference = llama(row)[0, :-1].float().log_softmax(-1)
        for name, sum_3 in sums.items():
            logs = reference if name == "source" else models[name](row)[0, :-1].float().log_softmax(-1)
            nll = F.nll_loss(logs, row[0, 1:], reduction="sum")
            kl = F.kl_div(logs, reference, reduction="sum", log_target=True)
            sum_3 += torch.stack((nll, kl, (logs.argmax(-1) == reference.argmax(-1)).sum())).double()
    tokens = rows_BT[:, 1:].numel()
    out = []
    for name, sum_3 in sums.items():
        nll, kl, top1 = (sum_3 / tokens).tolist()
        out.append(Measure(name, math.exp(nll), kl, top1))
        say(f"{name:>22}: perplexity {math.exp(nll):8.3f}  KL {kl:.4f}  same first choice {top1:.1%}")
    return out


# ---- weights into a Transformer ----------------------------------------------------------------------------------


def _dense(cfg: ModelConfig) -> dict[str, int]:
    return {"first_k_dense_replace": cfg.num_hidden_layers, "num_nextn_predict_layers": 0}


@torch.no_grad()
def _shell(cfg: ModelConfig, llama: Llama) -> Transformer:
    """A model with everything of the source that is not converted; the rest undefined, correction biases 0."""
    model = Transformer(cfg, init=False)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    model.embed_tokens.weight.copy_(llama.embed_tokens.weight)
    model.norm.weight.copy_(llama.norm.weight)
    if not cfg.tie_word_embeddings:
        model.lm_head.weight.copy_(llama.lm_head.weight)
    for ours, theirs in zip(model.layers, llama.blocks, strict=True):
        assert isinstance(ours, Block)
        ours.input_layernorm.weight.copy_(theirs.input_layernorm.weight)
        ours.post_attention_layernorm.weight.copy_(theirs.post_attention_layernorm.weight)
        if isinstance(ours.mlp, MLP):
            ours.mlp.load_state_dict(theirs.mlp.state_dict())
    return model.eval().requires_grad_(False)


def _set_attention(model: Transformer, layer: int, weights: LatentAttention) -> None:
    attention = model.layers[layer].self_attn
    for name in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        getattr(attention, name).weight.copy_(getattr(weights, name))


def _set_experts(model: Transformer, layer: int, experts: Experts) -> None:
    moe = model.layers[layer].mlp
    assert isinstance(moe, MoE)
    moe.gate.weight.copy_(experts.router)
    moe.experts.gate_up_proj.copy_(experts.gate_up)
    moe.experts.down_proj.copy_(experts.down)
    for name in ("gate", "up", "down"):
        getattr(moe.shared_experts, f"{name}_proj").weight.copy_(getattr(experts, f"shared_{name}"))
