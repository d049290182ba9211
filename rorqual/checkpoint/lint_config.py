"""Lint rules that config.json alone decides: what is missing, what contradicts itself, what some engine refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rorqual.checkpoint.lint_subject import ENGINES, MODEL_TYPES, Config, Rule, Subject, is_number, listed

CLASS = "DeepseekV3ForCausalLM"
SERVERS = ("vLLM", "SGLang", "llama.cpp")
OTHERS = ("vLLM", "SGLang", "llama.cpp", "rorqual")

# key -> what transformers assumes where it is absent, and what rorqual does.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "q_lora_rank": (1536, None), "n_group": (8, 1), "topk_group": (4, 1), "first_k_dense_replace": (3, 1),
    "routed_scaling_factor": (2.5, 1.0),
}  # fmt: skip
_FIXED: dict[str, Any] = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip


# ---- the file itself ----------------------------------------------------------------------------------------------


def _other_architecture(s: Subject) -> str | None:
    if not s.raw or s.demo or not s.other_architecture:
        return None
    return f"model_type is {s.raw.get('model_type')!r}, architectures {s.raw.get('architectures')!r}"


def _incomplete(s: Subject) -> str | None:
    missing = [item for item in s.bad_sizes() if " = " not in item]
    return f"config.json lacks {listed(missing, 6)}" if missing else None


def _value(s: Subject) -> str | None:
    bad = [item for item in s.bad_sizes() if " = " in item]
    rope = s.raw.get("qk_rope_head_dim")
    if isinstance(rope, int) and rope % 2:
        bad.append(f"qk_rope_head_dim = {rope} (pairs are rotated: it must be even)")
    for key in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
        value = s.raw.get(key, 1.0)
        if not is_number(value) or value <= 0:
            bad.append(f"{key} = {value!r}")
    return listed(bad, 6) if bad else None


def _defaults(s: Subject) -> str | None:
    absent = []
    for key, (theirs, ours) in _DEFAULTS.items():
        if key not in s.raw:
            absent.append(f"{key} (transformers assumes {theirs}, rorqual {'null' if ours is None else ours})")
    return f"absent: {listed(absent, 6)}" if absent else None


def _write_defaults(config: Config, s: Subject) -> None:
    """What the weights decide; the rest only whoever trained the model knows."""
    if "q_lora_rank" not in config:
        direct = any(name.endswith("self_attn.q_proj.weight") for name in s.weights)
        norms = [p["weight"].shape[0] for n, p in s.weights.items() if n.endswith("q_a_layernorm.weight")]
        if direct or norms:
            config["q_lora_rank"] = norms[0] if norms else None


def _missing(key: str) -> Callable[[Subject], str | None]:
    return lambda s: None if key in s.raw else f"config.json has no {key}"


def _write(key: str, value: Any) -> Callable[[Config, Subject], None]:
    def repair(config: Config, _: Subject) -> None:
        config[key] = value

    return repair


def _drop(key: str) -> Callable[[Config, Subject], None]:
    def repair(config: Config, _: Subject) -> None:
        config.pop(key, None)

    return repair


def _fixed_values(s: Subject) -> str | None:
    other = [f"{k} = {s.raw[k]!r}, not {v!r}" for k, v in _FIXED.items() if k in s.raw and s.raw[k] != v]
    return listed(other, 4) if other else None


def _architectures(s: Subject) -> str | None:
    found = s.raw.get("architectures")
    return None if found == [CLASS] else f"architectures is {found!r}, not [{CLASS!r}]"


def _kimi(s: Subject) -> str | None:
    kind = s.raw.get("model_type")
    return f"model_type is {kind!r}" if kind == "kimi_k2" and not s.raw.get("auto_map") else None


def _auto_map(s: Subject) -> str | None:
    mapping = s.raw.get("auto_map")
    if not isinstance(mapping, Mapping):
        return None
    modules = {str(v).split("--")[-1].split(".")[0] for v in mapping.values() if "--" not in str(v)}
    missing = sorted(f"{m}.py" for m in modules if not (s.directory / f"{m}.py").is_file())
    return f"auto_map names {listed(missing)}, which is not here" if missing else None


# ---- experts and groups -------------------------------------------------------------------------------------------


def _groups_uneven(s: Subject) -> str | None:
    z = s.size()
    uneven = z.n_routed_experts % z.n_group
    return f"n_group {z.n_group} does not divide n_routed_experts {z.n_routed_experts}" if uneven else None


def _group_small(s: Subject) -> str | None:
    z = s.size()
    if z.per_group >= 2:
        return None
    return f"{z.n_routed_experts} experts in {z.n_group} groups: {z.per_group} in each"


def _topk_group(s: Subject) -> str | None:
    z = s.size()
    return f"topk_group {z.topk_group} of n_group {z.n_group}" if z.topk_group > z.n_group else None


def _all_kept(s: Subject) -> str | None:
    z = s.size()
    return f"topk_group = n_group = {z.n_group}: every group is kept" if z.topk_group == z.n_group > 1 else None


def _ungroup(config: Config, s: Subject) -> None:
    """Keeping all groups is the same choice as having one."""
    config["n_group"] = config["topk_group"] = 1


def _beyond_groups(s: Subject) -> str | None:
    z = s.size()
    kept = z.per_group * min(z.topk_group, z.n_group)
    if z.num_experts_per_tok <= kept:
        return None
    return f"num_experts_per_tok {z.num_experts_per_tok}, but {z.topk_group} groups hold {kept} experts"


def _group_large(s: Subject) -> str | None:
    z = s.size()
    return f"{z.per_group} experts in a group (limit 32)" if z.per_group > 32 else None


def _dense_beyond(s: Subject) -> str | None:
    z = s.size()
    if z.first_k_dense_replace <= z.num_hidden_layers:
        return None
    return f"first_k_dense_replace {z.first_k_dense_replace} of {z.num_hidden_layers} layers"


def _no_moe(s: Subject) -> str | None:
    z = s.size()
    if z.first_k_dense_replace != z.num_hidden_layers:
        return None
    return f"first_k_dense_replace = num_hidden_layers = {z.num_hidden_layers}: no layer routes"


# ---- attention and the rest ---------------------------------------------------------------------------------------


def _latent(s: Subject) -> str | None:
    z = s.size()
    if (z.kv_lora_rank, z.qk_rope_head_dim) == (512, 64):
        return None
    width = z.kv_lora_rank + z.qk_rope_head_dim
    return f"kv_lora_rank {z.kv_lora_rank} + qk_rope_head_dim {z.qk_rope_head_dim} = {width}, not 512 + 64 = 576"


def _head_dims(s: Subject) -> str | None:
    z = s.size()
    odd = [f"{n} {v}" for n, v in (("query/key head", z.qk_head_dim), ("v_head_dim", z.v_head_dim)) if v % 8]
    return f"{' and '.join(odd)}: no multiple of 8" if odd else None


def _kv_heads(s: Subject) -> str | None:
    heads = s.raw.get("num_key_value_heads")
    if heads is None or heads == s.size().num_attention_heads:
        return None
    return f"num_key_value_heads {heads}, num_attention_heads {s.size().num_attention_heads}"


def _write_kv_heads(config: Config, s: Subject) -> None:
    config["num_key_value_heads"] = config["num_attention_heads"]


def _eps(s: Subject) -> str | None:
    eps = s.raw.get("rms_norm_eps", 1e-6)
    return None if eps == 1e-6 else f"rms_norm_eps {eps}; the norms of the latents have 1e-06 in the released code"


def _bias(s: Subject) -> str | None:
    return f"attention_bias is {s.raw['attention_bias']!r}" if s.raw.get("attention_bias") else None


def _no_bias(config: Config, s: Subject) -> None:
    if s.entries and not any(name.endswith("_proj.bias") or name.endswith("_mqa.bias") for name in s.entries):
        config["attention_bias"] = False


def _act(s: Subject) -> str | None:
    act = s.raw.get("hidden_act", "silu")
    return None if act == "silu" else f"hidden_act is {act!r}"


RULES = (
    Rule("config-missing", "error", ENGINES, "there is no config.json",
         "copy the model's config.json into the directory", "nothing", lambda s: s.problem("config-missing")),
    Rule("config-not-json", "error", ENGINES, "config.json is no JSON object", "restore the file", "nothing",
         lambda s: s.problem("config-not-json")),
    Rule("config-other-architecture", "error", ENGINES, "model_type is another architecture",
         f"only {' and '.join(MODEL_TYPES)} can be checked here", "nothing", _other_architecture),
    Rule("config-incomplete", "error", ENGINES,
         "sizes are missing from config.json (transformers fills in those of the 671 B model)",
         "write the missing keys as the model was trained", "config", _incomplete),
    Rule("config-value", "error", ENGINES, "a key of config.json has an impossible value", "write a possible value",
         "config", _value),
    Rule("config-defaults", "error", ENGINES, "keys are absent for which engines assume different values",
         "write the keys out (--fix writes those that the weights decide)", "config", _defaults, _write_defaults),
    Rule("model-type-missing", "error", ("transformers", "vLLM", "SGLang"), "config.json has no model_type",
         'write "model_type": "deepseek_v3"', "config", _missing("model_type"), _write("model_type", "deepseek_v3")),
    Rule("architectures-wrong", "error", SERVERS, "architectures does not name the class that engines look up",
         f'write "architectures": ["{CLASS}"]', "config", _architectures, _write("architectures", [CLASS])),
    Rule("model-type-kimi", "warning", ("transformers",),
         "transformers has no kimi_k2, and no auto_map leads to its code",
         "write model_type deepseek_v3 for transformers", "config", _kimi),
    Rule("auto-map-left", "warning", ("transformers", "vLLM", "SGLang"),
         "auto_map names code files that are not here: --trust-remote-code fails",
         "remove auto_map, or copy the files", "config", _auto_map, _drop("auto_map")),
    Rule("scoring-func-missing", "error", SERVERS,
         "no scoring_func: llama.cpp converts a softmax router in silence, vLLM scores by softmax, SGLang raises",
         'write "scoring_func": "sigmoid" (transformers has no such key of its own)', "config",
         _missing("scoring_func"), _write("scoring_func", "sigmoid")),
    Rule("topk-method-missing", "error", ("vLLM", "SGLang"),
         "no topk_method: no correction bias is made for the router",
         'write "topk_method": "noaux_tc" (transformers has no such key of its own)', "config",
         _missing("topk_method"), _write("topk_method", "noaux_tc")),
    Rule("moe-layer-freq-missing", "error", ("SGLang",), "no moe_layer_freq, which SGLang reads unconditionally",
         'write "moe_layer_freq": 1 (transformers has no such key of its own)', "config", _missing("moe_layer_freq"),
         _write("moe_layer_freq", 1)),
    Rule("architecture-value", "error", ENGINES, "a key asks for something that is not DeepSeek-V3",
         "this is another network: no config change makes it V3", "config", _fixed_values),
    Rule("groups-uneven", "error", ENGINES, "n_group does not divide the experts", "correct n_group", "sizes",
         _groups_uneven),
    Rule("group-too-small", "error", ENGINES, "a group of one expert: its score is the sum of its best two",
         "correct n_group", "sizes", _group_small),
    Rule("topk-group-beyond", "error", ENGINES, "more groups are kept than there are", "correct topk_group", "sizes",
         _topk_group),
    Rule("groups-all-kept", "error", ("llama.cpp",), "topk_group = n_group > 1: llama.cpp aborts by an assertion",
         "write n_group = topk_group = 1, which chooses the same experts", "sizes", _all_kept, _ungroup),
    Rule("topk-beyond-groups", "error", ENGINES, "more experts are chosen than the kept groups hold",
         "correct num_experts_per_tok or topk_group", "sizes", _beyond_groups),
    Rule("group-too-large", "warning", ("SGLang",),
         "more than 32 experts in a group: moe_fused_gate cannot take them",
         "nothing in the checkpoint; SGLang needs its slower grouped top-k here", "sizes", _group_large),
    Rule("dense-layers-beyond", "error", ENGINES, "first_k_dense_replace exceeds the layers",
         "correct first_k_dense_replace", "sizes", _dense_beyond),
    Rule("no-moe-layers", "note", ENGINES, "every layer is dense", "nothing, if it is meant", "sizes", _no_moe),
    Rule("latent-width", "warning", ("vLLM", "SGLang"),
         "latent and rotary widths other than 512 + 64: fast MLA refuses them",
         "serve with the Triton MLA backend, or train with 512 and 64", "sizes", _latent),
    Rule("head-dim-padding", "note", ("vLLM", "SGLang"), "head widths that flash attention must pad",
         "nothing in the checkpoint; multiples of 8 are not padded", "sizes", _head_dims),
    Rule("kv-heads", "error", ("transformers",), "num_key_value_heads differs: MLA expands a key for every head",
         "write num_key_value_heads = num_attention_heads", "sizes", _kv_heads, _write_kv_heads),
    Rule("rms-norm-eps", "warning", SERVERS,
         "rms_norm_eps is not 1e-6: the released code and transformers keep 1e-6 in the latent norms, others use one value",
         "nothing in the checkpoint, if it was trained so; expect small differences", "config", _eps),
    Rule("attention-bias", "error", OTHERS, "attention_bias is true: only transformers builds the biases",
         "--fix writes false where no bias is stored", "config", _bias, _no_bias),
    Rule("hidden-act", "error", OTHERS, "hidden_act is not silu: engines refuse it or compute silu anyway",
         "this is another network: no config change makes it V3", "config", _act),
)  # fmt: skip
