"""A Llama-family model from disk: a Hugging Face directory, or one GGUF file of any quantisation.

Both give the same thing: a configuration, tensors by Hugging Face name in fp32 with rotary pairs side by side, and the
tokenizer as the two files a Hugging Face directory has. GGUF goes through the gguf package, which knows every block
format; what is refused, is refused by name, because a model with biases or stretched rotary angles would convert into
one that computes something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.gguf_file import gguf_package
from rorqual.checkpoint.hf import SIDE_FILES
from rorqual.checkpoint.shards import Planned, Shard, find_shards, write_index, write_json, write_shard
from rorqual.errors import CheckpointError, ConfigError
from rorqual.ops.rope import inverse_frequencies
from rorqual.post.llama import Llama, LlamaConfig, halve, interleave, names
from rorqual.post.llama_tokenizer import TokenizerFiles, read_gguf_tokenizer

_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class LlamaSource:
    """One opened model. read(name): a tensor by its Hugging Face name, fp32, query and key weights interleaved."""

    cfg: LlamaConfig
    read: Callable[[str], Tensor]
    tokenizer: TokenizerFiles | None


def open_llama(path: str | Path) -> LlamaSource:
    """Raises ConfigError for another architecture, CheckpointError for damaged files, BackendUnavailable without gguf."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is no model", remedy="name a Hugging Face directory or a .gguf file")
    return _open_directory(path)


def load_llama(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Llama:
    """The network in eval mode, its weights frozen. Raises what `open_llama` raises."""
    return build_llama(open_llama(path), dtype, device)


def build_llama(source: LlamaSource, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Llama:
    """The same from an opened source. Raises CheckpointError for a tensor of another shape."""
    with torch.device("meta"):
        model = Llama(source.cfg)
    model.to_empty(device=device)
    model = model.to(dtype)
    speeds, _ = inverse_frequencies(source.cfg.head_dim, source.cfg.rope_theta, None)
    model.rope_speeds = torch.tensor(speeds, dtype=torch.float32, device=device)  # left empty above, never cast
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, target in names(source.cfg):
            value = source.read(name)
            if value.shape != parameters[target].shape:
                raise CheckpointError(
                    f"{name} is {list(value.shape)}, the config makes it {list(parameters[target].shape)}",
                    remedy="config and weights must be of one model",
                )
            parameters[target].copy_(value)
    return model.eval().requires_grad_(False)


def save_llama(model: Llama, directory: str | Path, tokenizer: TokenizerFiles | None, dtype: torch.dtype) -> None:
    """A Hugging Face directory that transformers loads as LlamaForCausalLM."""
    directory, cfg = Path(directory), model.cfg
    directory.mkdir(parents=True, exist_ok=True)
    parameters, tensors = dict(model.named_parameters()), {}
    for name, source in names(cfg):
        value = parameters[source]
        tensors[name] = halve(value, cfg.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else value
    planned = [Planned(name, dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_shard(directory / "model.safetensors", planned, ((n, t.to("cpu", dtype)) for n, t in tensors.items()))
    write_index(directory, {"model.safetensors": planned})
    eos = list(cfg.eos_token_id) if isinstance(cfg.eos_token_id, tuple) else cfg.eos_token_id
    keys = {**vars(cfg), "eos_token_id": eos, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    keys |= {"rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": str(dtype)[6:]}
    write_json(directory / "config.json", {**kind, **keys})
    if tokenizer is not None:
        tokenizer.save(directory)


# ---- Hugging Face ------------------------------------------------------------------------------------------------


def _open_directory(path: Path) -> LlamaSource:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}/config.json is not valid JSON: {error}", remedy="restore the file") from None
    cfg, where = _read_config(raw, str(path)), find_shards(path)
    shards = {file: Shard(file) for file in set(where.values())}

    def read(name: str) -> Tensor:
        if name not in where:
            raise CheckpointError(f"{path} lacks {name}", remedy="config.json and weights must be of one model")
        value = shards[where[name]].tensor(name).float()
        return interleave(value, cfg.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else value

    files = {f: path / f for f in SIDE_FILES if (path / f).is_file()}
    tokenizer = None
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))
        named = files.get("tokenizer_config.json")
        config = json.loads(named.read_text(encoding="utf-8")) if named else {}
        if "chat_template.jinja" in files:
            config["chat_template"] = files["chat_template.jinja"].read_text(encoding="utf-8")
        tokenizer = TokenizerFiles(spec, config)
    return LlamaSource(cfg, read, tokenizer)


def _read_config(raw: Mapping[str, Any], where: str) -> LlamaConfig:
    if (kind := raw.get("model_type")) not in ("llama", "mistral"):
        raise ConfigError(f"{where}: model_type {kind!r} is not of the Llama family", remedy="name a Llama-type model")
    _refuse_biases(raw, where)
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"{where}: rotary angles are stretched by {kind!r}",
            remedy="DeepSeek-V3's config can say only yarn: convert a model without rope_scaling",
        )
    heads = raw["num_attention_heads"]
    eos = raw.get("eos_token_id")
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0))),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=raw.get("pad_token_id") if (raw.get("pad_token_id") or 0) >= 0 else None,
    )


def _refuse_biases(raw: Mapping[str, Any], where: str) -> None:
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ConfigError(f"{where} has biases, which DeepSeek-V3 has not", remedy="convert a model without biases")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{where}: hidden_act {raw['hidden_act']!r}, DeepSeek-V3 has silu", remedy="name another model"
        )
    if raw.get("sliding_window"):
        raise ConfigError(f"{where} attends in a sliding window", remedy="convert a model with full attention")


# ---- GGUF --------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> LlamaSource:
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is no readable GGUF file: {error}", remedy="copy it again") from None
    meta = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: t for t in reader.tensors}
    if (kind := meta.get("general.architecture")) != "llama":
        raise ConfigError(f"{path}: architecture {kind!r} is not of the Llama family", remedy="name a Llama-type model")
    cfg = _gguf_config(meta, tied="output.weight" not in tensors, where=str(path))
    if odd := [name for name in tensors if name.endswith(".bias") or name == "rope_freqs.weight"]:
        raise ConfigError(f"{path} has {odd[0]}, which DeepSeek-V3 has no place for", remedy="name another model")

    def read(name: str) -> Tensor:
        stored = _gguf_name(name)
        if stored not in tensors:
            raise CheckpointError(f"{path} lacks {stored}", remedy="copy the file again")
        tensor = tensors[stored]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()

    return LlamaSource(cfg, read, read_gguf_tokenizer(meta))


def _gguf_config(meta: Mapping[str, Any], tied: bool, where: str) -> LlamaConfig:
    def key(name: str, default: Any = None) -> Any:
        value = meta.get(f"llama.{name}", default)
        if value is None:
            raise CheckpointError(f"{where} does not say llama.{name}", remedy="make the file again")
        return value

    if meta.get("llama.rope.scaling.type", "none") != "none" or meta.get("llama.expert_count"):
        raise ConfigError(f"{where} has stretched rotary angles or experts", remedy="name a plain Llama model")
    hidden, heads = key("embedding_length"), key("attention.head_count")
    return LlamaConfig(
        vocab_size=meta.get("llama.vocab_size") or len(meta["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("attention.head_count_kv", heads),
        head_dim=meta.get("llama.attention.key_length") or hidden // heads,
        intermediate_size=key("feed_forward_length"),
        # Stored as fp32: 1e-5 comes back as 9.99999975e-06.
        rms_norm_eps=float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(meta.get("llama.rope.freq_base", 10000.0)),
        max_position_embeddings=key("context_length"),
        tie_word_embeddings=tied,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return f"{whole[name]}.weight"
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"
