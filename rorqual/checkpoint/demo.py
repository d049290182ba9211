"""The naming of DeepSeek's own demo (`inference/` in the DeepSeek-V3 repository), read as released names.

Its converter writes `model{rank}-mp{ranks}.safetensors`: matrices cut along one dimension, routed experts dealt out
whole, everything else in every file. Rotary pairs keep the released order. Its converter drops the MTP layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DEMO_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")

# demo's word -> (released word, dimension it is cut along)
_WORDS: dict[str, tuple[str, int | None]] = {
    "embed": ("embed_tokens", 0), "head": ("lm_head", 0), "norm": ("norm", None),
    "attn_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None),
    "wq": ("q_proj", 0), "wq_a": ("q_a_proj", None), "q_norm": ("q_a_layernorm", None), "wq_b": ("q_b_proj", 0),
    "wkv_a": ("kv_a_proj_with_mqa", None), "kv_norm": ("kv_a_layernorm", None), "wkv_b": ("kv_b_proj", 0),
    "wo": ("o_proj", 1), "w1": ("gate_proj", 0), "w2": ("down_proj", 1), "w3": ("up_proj", 0),
}  # fmt: skip
_ROOMS = {"attn": "self_attn", "ffn": "mlp"}
_CONFIG = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size", "n_layers": "num_hidden_layers", "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads", "n_routed_experts": "n_routed_experts", "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor", "score_func": "scoring_func", "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim", "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim", "rope_theta": "rope_theta",
}  # fmt: skip
_DEFAULTS = {"max_seq_len": 16384, "original_seq_len": 4096, "rope_factor": 40, "beta_fast": 32, "beta_slow": 1}


def released_name(name: str) -> tuple[str, int | None]:
    """(released name, dimension that ranks cut or None) of a demo tensor; a name it does not use is returned as it is."""
    *path, last = name.split(".")
    suffix = "weight_scale_inv" if last == "scale" else last
    out = [_ROOMS.get(word, word) for word in path]
    dim = None
    if path and path[-1] in _WORDS:
        out[-1], dim = _WORDS[path[-1]]
    if path[-1:] == ["gate"] and last == "bias":
        suffix = "e_score_correction_bias"
    if "experts" in path:  # dealt out whole
        dim = None
    prefix = "" if out[:1] == ["lm_head"] else "model."
    return f"{prefix}{'.'.join([*out, suffix])}", dim


def demo_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's arguments (`configs/config_671B.json`) as released keys. It stretches positions by YaRN only where
    max_seq_len exceeds original_seq_len, and always normalises sigmoid gates."""
    out: dict[str, Any] = {"model_type": "deepseek_v3"}
    out.update({released: raw[key] for key, released in _CONFIG.items() if key in raw})
    out["q_lora_rank"] = out.get("q_lora_rank") or None
    length, original, factor, fast, slow = (raw.get(key, default) for key, default in _DEFAULTS.items())
    if length > original:
        out["rope_scaling"] = {
            "type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": fast,
            "beta_slow": slow, "mscale": raw.get("mscale", 1.0), "mscale_all_dim": raw.get("mscale", 1.0),
        }  # fmt: skip
    out["max_position_embeddings"] = max(length, int(original * factor) if length > original else 0)
    if raw.get("dtype") == "fp8":
        out["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
        }  # fmt: skip
        if raw.get("scale_fmt"):
            out["quantization_config"]["scale_fmt"] = raw["scale_fmt"]
    return out
