"""A checkpoint as one GGUF file for llama.cpp.

llama.cpp knows this architecture as `deepseek2` and computes attention in its absorbed form, so kv_b_proj goes in as two
stacks of matrices, one to take queries into the latent space and one to take values out of it, and a layer's routed
experts as three. What its loader would take for something else is refused before anything is written, because it says
nothing itself: it aborts, or computes other numbers. From its source, as llama-cpp-python 0.3.36 carries it
(src/models/deepseek2.cpp, llama-model.cpp, llama-context.cpp, llama-graph.cpp):

- q_lora_rank must be there at any depth but 26 and 27, which it takes for V2-Lite: 0 stands for null, and at those
  two depths a low-rank query has no place.
- All groups kept is no restriction; it demands fewer kept than there are, so that case is written as one group.
- YaRN: with A = rope.scaling.attn_factor and M = 10 * yarn_log_multiplier, cos and sin are multiplied by A, the softmax
  scale by (A (1 + 0.1 M ln factor))^2. Both numbers are free, so every variant of YaRN is expressed by solving for them,
  also the one without mscale keys (M is negative then).
- beta_fast and beta_slow are not read for this architecture, and all norms have one epsilon: warnings.
- A multi-token prediction block is used if there is just one and the query is of low rank; its embedding and head are
  the model's own, and left out.

Not offered: K- and IQ-types, which the gguf package reads but does not write (llama-quantize makes them from a bf16
file), and the ternary ones, which ruin weights that were not trained for them.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.checkpoint.gguf_file import Block, gguf_package, verify_gguf, write_resumable
from rorqual.checkpoint.gguf_tokenizer import Vocabulary, read_vocabulary
from rorqual.checkpoint.source import Source
from rorqual.config import ModelConfig, yarn_mscale
from rorqual.errors import CheckpointError
from rorqual.model.mla import LATENT_NORM_EPS
from rorqual.ops.rope import inverse_frequencies

__all__ = ["KINDS", "export_gguf", "verify_gguf"]

KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
FILE_TYPES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
MAX_LAYERS, MAX_EXPERTS = 512, 1024
_LITE_DEPTHS = (26, 27)
_PIECE_VALUES = 1 << 24


class Part(NamedTuple):
    """A tensor of the file. shape is torch's order (the file lists it backwards); pieces yield its fp32 rows in order."""

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterator[Tensor]]


def export_gguf(
    source: Source, target: str | Path, kind: str = "bf16", progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Write `source` to `target` and return warnings: what llama.cpp will not do as this package does.

    kind: of the matrices; norms and routers are f32 always, embedding and head at least q8_0, and rows that no block of
    the kind fits are f16. At most one expert, or one other matrix, is in memory. An export that was killed goes on where
    it was. `progress` is called with (bytes done, bytes in all). Raises CheckpointError, before anything is written,
    for a model that llama.cpp would refuse or misread.
    """
    target = Path(target)
    gguf = gguf_package()
    if kind not in KINDS:
        raise CheckpointError(f"GGUF type {kind!r} is not written", remedy=f"choose {', '.join(KINDS)}")
    cfg = source.cfg
    _check_loader(cfg)
    vocabulary = read_vocabulary(source.directory, cfg)
    warnings = _differences(cfg)
    if vocabulary is None:
        warnings.append("there is no tokenizer.json: the file has no vocabulary and serves token ids only")
    predicts = _predicts(cfg, warnings)
    parts = _Plan(source, kind, predicts, frozenset(source.names)).parts()
    if narrow := [p.name for p in parts if p.kind == "f16" and kind not in ("f16", "f32")]:
        warnings.append(f"{len(narrow)} matrices whose rows no block of {kind} fits are f16, among them {narrow[0]}")
    header = _header(gguf, source, kind, parts, vocabulary, predicts)
    blocks = [Block(p.name, _nbytes(gguf, p), _encoder(gguf, p)) for p in parts]
    write_resumable(target, header, blocks, _fingerprint(source, header), progress)
    verify_gguf(target)
    return warnings


# ---- what llama.cpp can do ----------------------------------------------------------------------------------------


def _check_loader(cfg: ModelConfig) -> None:
    """Raises CheckpointError where its loader would abort or read the file as another model."""
    lite = cfg.num_hidden_layers in _LITE_DEPTHS or (cfg.num_hidden_layers == 48 and cfg.vocab_size == 128256)
    if lite and cfg.q_lora_rank is not None:
        raise CheckpointError(
            f"llama.cpp takes {cfg.num_hidden_layers} layers for a model without q_lora_rank, and this one has it",
            remedy="no GGUF can say otherwise: serve this model with another engine",
        )
    if cfg.num_hidden_layers + 1 > MAX_LAYERS or cfg.n_routed_experts > MAX_EXPERTS:
        raise CheckpointError(
            f"llama.cpp is built for less than {MAX_LAYERS} layers and at most {MAX_EXPERTS} experts",
            remedy="build it with larger LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS, or serve with another engine",
        )
    _yarn(cfg)


def _differences(cfg: ModelConfig) -> list[str]:
    found = []
    if not math.isclose(cfg.rms_norm_eps, LATENT_NORM_EPS, rel_tol=1e-6):
        found.append(
            f"llama.cpp has one epsilon for all norms: it uses rms_norm_eps {cfg.rms_norm_eps:g} in the latent norms, "
            f"too, where this model has {LATENT_NORM_EPS:g}"
        )
    scaling = cfg.rope_scaling or {}
    betas = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    if betas != (32, 1):
        found.append(
            "llama.cpp does not read beta_fast and beta_slow of this architecture from the file: "
            f"start it with --yarn-beta-fast {betas[0]} --yarn-beta-slow {betas[1]}"
        )
    return found


def _predicts(cfg: ModelConfig, warnings: list[str]) -> bool:
    """Whether a multi-token prediction block goes in."""
    count = cfg.num_nextn_predict_layers
    if count and cfg.q_lora_rank is None:
        warnings.append("the multi-token prediction block is left out: llama.cpp needs q_lora_rank to draft with one")
        return False
    if count > 1:
        warnings.append(f"llama.cpp drafts with one multi-token prediction block: {count - 1} of {count} are left out")
    return count > 0


def _yarn(cfg: ModelConfig) -> tuple[float, float] | None:
    """(attn_factor, yarn_log_multiplier) with which llama.cpp computes this model's cos, sin and softmax scale."""
    if cfg.rope_scaling is None:
        return None
    factor = float(cfg.rope_scaling["factor"])
    _, rotary = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
    wanted = math.sqrt(cfg.softmax_scale * math.sqrt(cfg.qk_head_dim))
    stretch = 0.1 * math.log(factor)
    if not rotary > 0 or (stretch == 0 and not math.isclose(rotary, wanted)):
        raise CheckpointError(
            f"llama.cpp cannot scale rotary embeddings by {rotary:g} and scores by {wanted**2:g} at factor {factor:g}",
            remedy="set rope_scaling to null if factor is 1",
        )
    multiplier = (wanted / rotary - 1) / stretch if stretch else 0.0
    if abs(multiplier) < 1e-12:  # without the key it multiplies by its own 0.1 ln(factor) + 1
        return rotary / yarn_mscale(factor, 1.0), 0.0
    return rotary, 0.1 * multiplier


# ---- tensors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Every tensor of the file, in order, checked against the config's shapes."""

    source: Source
    kind: str
    predicts: bool
    names: frozenset[str]

    def parts(self) -> list[Part]:
        cfg = self.source.cfg
        D, V, L = cfg.hidden_size, cfg.vocab_size, cfg.num_hidden_layers
        parts = [self.matrix("token_embd", "model.embed_tokens", V, D, wide=True)]
        if not cfg.tie_word_embeddings:
            parts.append(self.matrix("output", "lm_head", V, D, wide=True))
        parts.append(self.plain("output_norm.weight", "model.norm.weight", D))
        for i in range(L + self.predicts):
            parts += self.attention(f"blk.{i}.", f"model.layers.{i}.")
            parts += self.experts(f"blk.{i}.", f"model.layers.{i}.mlp.", dense=not cfg.is_moe(i))
        if self.predicts:
            blk, layer = f"blk.{L}.nextn.", f"model.layers.{L}."
            parts.append(self.matrix(f"{blk}eh_proj", f"{layer}eh_proj", D, 2 * D))
            for mine, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head_norm", "shared_head.norm")):
                parts.append(self.plain(f"{blk}{mine}.weight", f"{layer}{theirs}.weight", D))
        return parts

    def attention(self, blk: str, layer: str) -> list[Part]:
        cfg, attn = self.source.cfg, f"{layer}self_attn."
        D, H, C, Q = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.q_lora_rank
        N, U = cfg.qk_nope_head_dim, cfg.v_head_dim
        parts = [self.plain(f"{blk}attn_norm.weight", f"{layer}input_layernorm.weight", D)]
        if Q is None:
            parts.append(self.matrix(f"{blk}attn_q", f"{attn}q_proj", H * cfg.qk_head_dim, D))
        else:
            parts.append(self.matrix(f"{blk}attn_q_a", f"{attn}q_a_proj", Q, D))
            parts.append(self.plain(f"{blk}attn_q_a_norm.weight", f"{attn}q_a_layernorm.weight", Q))
            parts.append(self.matrix(f"{blk}attn_q_b", f"{attn}q_b_proj", H * cfg.qk_head_dim, Q))
        parts.append(self.matrix(f"{blk}attn_kv_a_mqa", f"{attn}kv_a_proj_with_mqa", C + cfg.qk_rope_head_dim, D))
        parts.append(self.plain(f"{blk}attn_kv_a_norm.weight", f"{attn}kv_a_layernorm.weight", C))
        name = self.checked(f"{attn}kv_b_proj.weight", H * (N + U), C)

        def keys() -> Iterator[Tensor]:
            yield self.source.dense(name).view(H, N + U, C)[:, :N].transpose(1, 2).reshape(-1, N)

        def values() -> Iterator[Tensor]:
            yield self.source.dense(name).view(H, N + U, C)[:, N:].reshape(-1, C)

        parts.append(Part(f"{blk}attn_k_b.weight", (H, C, N), self.kind_of(N), keys))
        parts.append(Part(f"{blk}attn_v_b.weight", (H, U, C), self.kind_of(C), values))
        parts.append(self.matrix(f"{blk}attn_output", f"{attn}o_proj", D, H * U))
        return parts

    def experts(self, blk: str, mlp: str, dense: bool) -> list[Part]:
        cfg = self.source.cfg
        D, E, F = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
        parts = [self.plain(f"{blk}ffn_norm.weight", f"{mlp[:-4]}post_attention_layernorm.weight", D)]
        if dense:
            return [*parts, *self.swiglu(f"{blk}ffn_{{}}", mlp, cfg.intermediate_size)]
        parts.append(self.plain(f"{blk}ffn_gate_inp.weight", f"{mlp}gate.weight", E, D))
        parts.append(self.plain(f"{blk}exp_probs_b.bias", f"{mlp}gate.e_score_correction_bias", E))
        for which, out, width in (("gate", F, D), ("up", F, D), ("down", D, F)):
            names = [self.checked(f"{mlp}experts.{e}.{which}_proj.weight", out, width) for e in range(E)]
            kind = self.kind_of(width)
            parts.append(Part(f"{blk}ffn_{which}_exps.weight", (E, out, width), kind, self.each(names)))
        return [*parts, *self.swiglu(f"{blk}ffn_{{}}_shexp", f"{mlp}shared_experts.", F * cfg.n_shared_experts)]

    def swiglu(self, pattern: str, prefix: str, width: int) -> list[Part]:
        D = self.source.cfg.hidden_size
        sizes = {"gate": (width, D), "up": (width, D), "down": (D, width)}
        return [self.matrix(pattern.format(which), f"{prefix}{which}_proj", *size) for which, size in sizes.items()]

    def matrix(self, name: str, module: str, out: int, width: int, wide: bool = False) -> Part:
        weight = self.checked(f"{module}.weight", out, width)
        return Part(f"{name}.weight", (out, width), self.kind_of(width, wide), self.each([weight]))

    def plain(self, name: str, weight: str, *shape: int) -> Part:
        """In f32, whatever the kind."""
        return Part(name, shape, "f32", self.each([self.checked(weight, *shape)]))

    def kind_of(self, width: int, wide: bool = False) -> str:
        """The kind that rows of this width can have."""
        if self.kind in ("f32", "f16", "bf16"):
            return self.kind
        if width % 32:
            return "f16"
        return "q8_0" if wide else self.kind

    def each(self, names: Sequence[str]) -> Callable[[], Iterator[Tensor]]:
        return lambda: (self.source.dense(name) for name in names)

    def checked(self, name: str, *shape: int) -> str:
        if name not in self.names:
            raise CheckpointError(f"the checkpoint lacks {name}", remedy="copy missing shards")
        if (found := tuple(self.source.shape(name))) != shape:
            raise CheckpointError(
                f"{name} is {list(found)}, the config makes it {list(shape)}",
                remedy="config.json and weights must be of one model",
            )
        return name


def _nbytes(gguf: Any, part: Part) -> int:
    block, size = gguf.GGML_QUANT_SIZES[_type(gguf, part.kind)]
    return math.prod(part.shape) // int(block) * int(size)


def _type(gguf: Any, kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def _encoder(gguf: Any, part: Part) -> Callable[[], Iterator[bytes]]:
    rows = max(1, _PIECE_VALUES // part.shape[-1])

    def pieces() -> Iterator[bytes]:
        for whole in part.pieces():
            for piece in whole.reshape(-1, part.shape[-1]).split(rows):
                yield _encode(gguf, part, piece)

    return pieces


def _encode(gguf: Any, part: Part, piece: Tensor) -> bytes:
    value = piece.half() if part.kind == "f16" else piece.float()
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{part.name} holds values that are not finite in {part.kind}",
            remedy="export f32 or bf16 if the weights are large; otherwise the checkpoint is damaged",
        )
    if part.kind == "bf16":
        return value.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if part.kind in ("f32", "f16"):
        return value.contiguous().numpy().tobytes()
    encoded: np.ndarray[Any, Any] = gguf.quants.quantize(value.contiguous().numpy(), _type(gguf, part.kind))
    return encoded.tobytes()


# ---- header -------------------------------------------------------------------------------------------------------


def _header(
    gguf: Any, source: Source, kind: str, parts: Sequence[Part], vocabulary: Vocabulary | None, predicts: bool
) -> bytes:
    """Everything before the data. The same arguments give the same bytes."""
    writer = gguf.GGUFWriter(None, "deepseek2")
    writer.add_type("model")
    writer.add_name(source.directory.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")])
    if kind not in ("f32", "f16", "bf16"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_model(gguf, writer, source.cfg, predicts)
    _add_vocabulary(writer, vocabulary)
    for part in parts:
        writer.add_tensor_info(
            part.name, part.shape, np.dtype(np.float32), _nbytes(gguf, part), raw_dtype=_type(gguf, part.kind)
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _add_model(gguf: Any, writer: Any, cfg: ModelConfig, predicts: bool) -> None:
    writer.add_block_count(cfg.num_hidden_layers + predicts)
    if predicts:
        writer.add_nextn_predict_layers(1)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_leading_dense_block_count(cfg.first_k_dense_replace)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed, every head reads the one latent
    writer.add_q_lora_rank(cfg.q_lora_rank or 0)
    writer.add_kv_lora_rank(cfg.kv_lora_rank)
    writer.add_key_length(cfg.cache_dim)
    writer.add_value_length(cfg.kv_lora_rank)
    writer.add_key_length_mla(cfg.qk_head_dim)
    writer.add_value_length_mla(cfg.v_head_dim)
    writer.add_expert_count(cfg.n_routed_experts)
    writer.add_expert_used_count(cfg.num_experts_per_tok)
    writer.add_expert_shared_count(cfg.n_shared_experts)
    writer.add_expert_feed_forward_length(cfg.moe_intermediate_size)
    writer.add_expert_weights_scale(cfg.routed_scaling_factor)
    writer.add_expert_weights_norm(cfg.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    choosing = cfg.topk_group < cfg.n_group
    writer.add_expert_group_count(cfg.n_group if choosing else 1)
    writer.add_expert_group_used_count(cfg.topk_group if choosing else 1)
    writer.add_rope_dimension_count(cfg.qk_rope_head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    if (yarn := _yarn(cfg)) is not None and cfg.rope_scaling is not None:
        attn_factor, multiplier = yarn
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(cfg.rope_scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(cfg.rope_scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(cfg.rope_scaling.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(cfg.rope_scaling.get("beta_slow") or 1))
        if attn_factor != 1:
            writer.add_rope_scaling_attn_factors(attn_factor)
        if multiplier:
            writer.add_rope_scaling_yarn_log_mul(multiplier)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for which in ("bos", "eos", "eot", "pad"):
        if (token := getattr(vocabulary, which)) is not None:
            getattr(writer, f"add_{which}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _fingerprint(source: Source, header: bytes) -> str:
    """Of what decides the file's bytes: the header, and the weight files as they lie there."""
    digest = hashlib.sha256(header)
    for path in sorted(source.directory.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
