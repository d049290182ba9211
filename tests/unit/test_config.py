"""Configurations: what is read is what was released, what is written is read back, what cannot be right is refused."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.config import (
    DEFAULT_MODEL,
    ModelConfig,
    dump_toml,
    from_dict,
    load_toml,
    models_dir,
    presets,
    resolve_model,
    to_dict,
    yarn_mscale,
)
from rorqual.errors import ConfigError
from rorqual.train.config import BalanceConfig, DataConfig, MTPConfig, OptimConfig, RunConfig, Source

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# The released config.json, key by key.
RELEASED: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
EVERYWHERE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 128,
    "ep_size": 1,
    "use_cache": True,
}


def released(**changes: Any) -> dict[str, Any]:
    """The released keys with some of them changed (None stays a value; use `without` to drop one)."""
    return {**EVERYWHERE, **RELEASED, **changes}


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k not in keys}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "rorqual.config")
    return caplog


# ---- presets and round trips ------------------------------------------------------------------------------------


def test_the_presets_are_those_that_are_promised() -> None:
    assert {"deepseek-v3", "v3-16b", "bench-gpu", "bench-cpu", "nano", "test"} <= set(presets())
    assert {"deepseek-v3-0324", "deepseek-r1", "deepseek-v3.1", "moonlight-16b-a3b", "kimi-k2"} <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_presets_load_in_silence_and_survive_a_round_trip(name: str, warnings: pytest.LogCaptureFixture) -> None:
    """A preset is a released config.json: read, written and read again it is the same, without a warning."""
    cfg = ModelConfig.load(name)
    assert ModelConfig.load(cfg.to_json()) == cfg
    assert ModelConfig.load(json.loads(json.dumps(cfg.to_json()))) == cfg
    assert not warnings.records


def test_deepseek_v3_has_the_released_values() -> None:
    """Every key of the released config.json, both as an attribute and as it is written."""
    cfg = ModelConfig.load("deepseek-v3")
    assert {key: getattr(cfg, key) for key in RELEASED} == RELEASED
    written = cfg.to_json()
    assert {key: written[key] for key in EVERYWHERE | RELEASED} == EVERYWHERE | RELEASED
    assert ModelConfig.load(released()) == cfg.replace(extra={})


def test_the_family_differs_from_deepseek_v3_where_it_was_published_to() -> None:
    """R1 and V3-0324 are V3 key for key; V3.1 says that its scales are powers of two."""
    v3 = ModelConfig.load("deepseek-v3")
    assert ModelConfig.load("deepseek-r1") == ModelConfig.load("deepseek-v3-0324") == v3
    scales = {**RELEASED["quantization_config"], "scale_fmt": "ue8m0"}
    assert ModelConfig.load("deepseek-v3.1") == v3.replace(quantization_config=scales)


def test_moonlight_has_the_published_values() -> None:
    """Moonlight-16B-A3B-Instruct's config.json: no query latent, no groups, no YaRN, no MTP, plain bf16."""
    v3 = ModelConfig.load("deepseek-v3")
    published = v3.replace(
        vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
        intermediate_size=11264, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.446, num_nextn_predict_layers=0,
        max_position_embeddings=8192, rope_theta=50000.0, rope_scaling=None, rms_norm_eps=1e-5,
        bos_token_id=163584, eos_token_id=163586, quantization_config=None,
    )  # fmt: skip
    assert ModelConfig.load("moonlight-16b-a3b") == published


def test_kimi_k2_is_the_same_architecture_under_its_own_name() -> None:
    """Read as kimi_k2, written as deepseek_v3, which every loader of the architecture knows."""
    raw = json.loads(resources.files("rorqual.presets").joinpath("kimi-k2.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == "kimi_k2" and raw["architectures"] == ["DeepseekV3ForCausalLM"]
    cfg = ModelConfig.load(raw)
    assert cfg == ModelConfig.load("kimi-k2")
    assert cfg.to_json()["model_type"] == "deepseek_v3" and ModelConfig.load(cfg.to_json()) == cfg
    assert cfg.rope_scaling == {**YARN, "factor": 32, "beta_fast": 1}
    assert cfg == ModelConfig.load("deepseek-v3").replace(
        vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=2.827, num_nextn_predict_layers=0, max_position_embeddings=131072, rope_theta=50000.0,
        rope_scaling=cfg.rope_scaling, bos_token_id=163584, eos_token_id=163585,
    )  # fmt: skip


def test_a_preset_may_have_a_point_in_its_name_and_a_file_still_wins(tmp_path: Path) -> None:
    assert ModelConfig.load("deepseek-v3.1").quantization_config is not None
    for missing in ("deepseek-v3.2", str(tmp_path / "config.json"), "models/none.d"):
        with pytest.raises(ConfigError, match="there is no model at"):
            ModelConfig.load(missing)


def test_what_follows_from_the_keys() -> None:
    """Widths, the softmax scale under YaRN and which layers route, for DeepSeek-V3."""
    cfg = ModelConfig.load("deepseek-v3")
    assert (cfg.qk_head_dim, cfg.cache_dim, cfg.eos_token_ids) == (192, 576, (1,))
    assert cfg.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-15)
    assert cfg.replace(rope_scaling=None).softmax_scale == 192**-0.5
    assert [cfg.is_moe(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert cfg.replace(eos_token_id=None).eos_token_ids == ()
    assert cfg.replace(eos_token_id=(1, 7)).eos_token_ids == (1, 7)


def test_yarn_without_mscale_keys_leaves_the_softmax_scale_alone() -> None:
    """As transformers has it: the factor then goes to cos and sin."""
    cfg = ModelConfig.load(released(rope_scaling=without(YARN, "mscale", "mscale_all_dim")))
    assert cfg.softmax_scale == 192**-0.5
    assert yarn_mscale(40, 1.0) == pytest.approx(0.1 * math.log(40) + 1) and yarn_mscale(1, 1.0) == 1.0


sizes = st.integers(1, 4096)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any configuration that means something."""
    n_group = draw(st.integers(1, 8))
    per_group = draw(st.integers(2, 16))
    topk_group = draw(st.integers(1, n_group))
    layers = draw(st.integers(1, 80))
    yarn = st.fixed_dictionaries(
        {
            "type": st.just("yarn"),
            "factor": st.integers(1, 64) | st.floats(1, 64),
            "original_max_position_embeddings": st.integers(1, 1 << 16),
        },
        optional={
            "beta_fast": st.integers(2, 64),
            "beta_slow": st.integers(1, 2),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
        },
    )
    vocab_size = draw(sizes)
    ids = st.integers(0, vocab_size - 1)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=draw(sizes),
        num_hidden_layers=layers,
        num_attention_heads=draw(sizes),
        kv_lora_rank=draw(sizes),
        qk_nope_head_dim=draw(sizes),
        qk_rope_head_dim=2 * draw(sizes),
        v_head_dim=draw(sizes),
        intermediate_size=draw(sizes),
        moe_intermediate_size=draw(sizes),
        n_routed_experts=n_group * per_group,
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
        q_lora_rank=draw(st.none() | sizes),
        n_shared_experts=draw(st.integers(1, 4)),
        n_group=n_group,
        topk_group=topk_group,
        first_k_dense_replace=draw(st.integers(0, layers)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.floats(0.1, 10)),
        num_nextn_predict_layers=draw(st.integers(0, 3)),
        max_position_embeddings=draw(st.integers(1, 1 << 18)),
        rope_theta=draw(st.floats(1, 1e7)),
        rope_scaling=draw(st.none() | yarn),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(st.floats(1e-4, 1)),
        bos_token_id=draw(st.none() | ids),
        eos_token_id=draw(st.none() | ids | st.lists(ids, min_size=1, max_size=3).map(tuple)),
        pad_token_id=draw(st.none() | ids),
        quantization_config=draw(st.none() | st.just({"quant_method": "fp8", "weight_block_size": [128, 128]})),
        extra=draw(st.dictionaries(st.sampled_from(["auto_map", "torch_dtype", "my_own"]), st.text())),
    )


@given(configs())
def test_any_configuration_survives_a_round_trip_through_json(cfg: ModelConfig) -> None:
    """Written to a config.json and read again it is equal, extra keys included."""
    assert ModelConfig.load(json.loads(json.dumps(cfg.to_json()))) == cfg


@given(configs())
def test_any_configuration_is_understood_without_the_keys_that_transformers_drops(cfg: ModelConfig) -> None:
    """transformers' save_pretrained writes rope_parameters alone and no scoring_func, topk_method, moe_layer_freq."""
    dropped = without(
        cfg.to_json(), "scoring_func", "topk_method", "moe_layer_freq", "ep_size", "rope_theta", "rope_scaling"
    )
    assert ModelConfig.load(dropped) == cfg


# ---- other writers' dialects ------------------------------------------------------------------------------------


def test_rope_parameters_alone_say_the_same_as_the_released_keys() -> None:
    """The spelling of transformers 5, default and YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 50000, **without(YARN, "type")}
    cfg = ModelConfig.load(without(released(rope_parameters=yarn), "rope_theta", "rope_scaling"))
    assert cfg.rope_theta == 50000.0 and cfg.rope_scaling == YARN
    plain = {"rope_type": "default", "rope_theta": 500}
    cfg = ModelConfig.load(without(released(rope_parameters=plain), "rope_theta", "rope_scaling"))
    assert cfg.rope_theta == 500.0 and cfg.rope_scaling is None
    both = ModelConfig.load("deepseek-v3").to_json()["rope_parameters"]
    assert both == {"rope_type": "yarn", "rope_theta": 10000.0, **without(YARN, "type")}


def test_rope_parameters_win_where_both_spellings_stand() -> None:
    """Whoever edits a file that transformers wrote edits the newer key."""
    newer = {"rope_type": "yarn", "rope_theta": 500, **without(YARN, "type"), "factor": 8}
    cfg = ModelConfig.load(released(rope_parameters=newer))
    assert cfg.rope_theta == 500.0 and cfg.rope_scaling == {**YARN, "factor": 8}


def test_rope_scaling_is_written_with_the_released_key_whatever_key_it_came_with() -> None:
    """`type` is what DeepSeek's own code and older engines read, `rope_type` what transformers writes."""
    cfg = ModelConfig.load(released(rope_scaling={"rope_type": "yarn", **without(YARN, "type")}))
    assert cfg.to_json()["rope_scaling"] == YARN


def test_nulls_of_other_writers_mean_the_default() -> None:
    nulls = {"n_group": None, "topk_group": None, "n_shared_experts": None, "num_nextn_predict_layers": None}
    cfg = ModelConfig.load(released(**nulls))
    assert (cfg.n_group, cfg.topk_group, cfg.n_shared_experts, cfg.num_nextn_predict_layers) == (1, 1, 1, 0)


def test_an_unknown_key_warns_and_is_written_back(warnings: pytest.LogCaptureFixture) -> None:
    cfg = ModelConfig.load(released(index_topk=2048, colour={"of": "whales"}))
    assert cfg.to_json()["index_topk"] == 2048 and cfg.to_json()["colour"] == {"of": "whales"}
    [record] = warnings.records
    assert "index_topk" in record.getMessage() and "colour" in record.getMessage()


def test_keys_known_to_be_irrelevant_pass_in_silence_and_survive(warnings: pytest.LogCaptureFixture) -> None:
    noise = {"torch_dtype": "bfloat16", "transformers_version": "5.17.0", "auto_map": {"AutoModel": "x.Y"}}
    written = ModelConfig.load(released(**noise)).to_json()
    assert {k: written[k] for k in noise} == noise and not warnings.records


def test_a_model_directory_a_file_and_a_dict_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released()))
    cfg = ModelConfig.load(released())
    assert ModelConfig.load(tmp_path) == ModelConfig.load(str(tmp_path / "config.json")) == cfg


# ---- contradictions ---------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    *[(f"{name}=0", {name: 0}, name) for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "max_position_embeddings", "q_lora_rank",
    )],
    *[(f"{name} as text", {name: "16"}, name) for name in ("vocab_size", "hidden_size", "n_group", "q_lora_rank")],
    ("a fraction of a layer", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ("true is no number", {"n_routed_experts": True}, "n_routed_experts"),
    ("text for a number", {"rope_theta": "10000"}, "rope_theta"),
    ("text for a switch", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ("text among ids", {"eos_token_id": [1, "2"]}, "eos_token_id"),
    ("odd rotary width", {"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
    ("more dense layers than layers", {"first_k_dense_replace": 62}, "first_k_dense_replace"),
    ("negative dense layers", {"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ("negative MTP depth", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("groups that do not divide", {"n_group": 7}, "n_group"),
    ("more groups chosen than there are", {"topk_group": 9}, "topk_group"),
    ("groups of one expert", {"n_group": 256, "topk_group": 8}, "group needs two experts"),
    ("more experts chosen than offered", {"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ("softmax router", {"scoring_func": "softmax"}, "scoring_func"),
    ("V2's selection", {"topk_method": "group_limited_greedy"}, "topk_method"),
    ("other activation", {"hidden_act": "gelu"}, "hidden_act"),
    ("every second layer", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("bias in attention", {"attention_bias": True}, "attention_bias"),
    ("dropout", {"attention_dropout": 0.1}, "attention_dropout"),
    ("half-split rotary", {"rope_interleave": False}, "rope_interleave"),
    ("another architecture", {"model_type": "llama"}, "model_type"),
    ("another stretching", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ("YaRN without factor", {"rope_scaling": without(YARN, "factor")}, "factor"),
    ("YaRN without its context", {"rope_scaling": without(YARN, "original_max_position_embeddings")}, "original_max"),
    ("text for a YaRN factor", {"rope_scaling": {**YARN, "factor": "40"}}, "factor"),
    ("text for YaRN's temperature", {"rope_scaling": {**YARN, "mscale_all_dim": "1"}}, "mscale_all_dim"),
    ("a factor of nothing", {"rope_scaling": {**YARN, "factor": 0}}, "factor"),
    ("text for YaRN", {"rope_scaling": "yarn"}, "rope_scaling"),
    ("text for rope_parameters", {"rope_parameters": "default"}, "rope_parameters"),
    ("no head count", {"num_attention_heads": ...}, "num_attention_heads"),
    *[(f"{name} = {value}", {name: value}, f"{name} must be positive and finite")
      for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor")
      for value in (0, 0.0, -1e-6, math.nan, math.inf, -math.inf)],
    *[(f"initializer_range = {value}", {"initializer_range": value}, "initializer_range")
      for value in (-0.02, math.nan, math.inf)],
    *[(f"{name} = {value}", {name: value}, name)
      for name in ("bos_token_id", "eos_token_id", "pad_token_id") for value in (-1, 129280, True, 1.5)],
    ("one id of several beyond the vocabulary", {"eos_token_id": [1, 129280]}, "eos_token_id"),
    ("a negative id among several", {"eos_token_id": [-1, 1]}, "eos_token_id"),
    *[(f"rope_scaling {key} = {value}", {"rope_scaling": {**YARN, key: value}}, key)
      for key in without(YARN, "type") for value in (True, math.nan, math.inf)],
    ("a rope_theta of true", {"rope_theta": True}, "rope_theta"),
    ("a rope_theta of true, elsewhere", {"rope_parameters": {"rope_type": "default", "rope_theta": True}}, "rope_theta"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_cannot_be_right_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    """A ConfigError that names the key at fault (... stands for a missing key)."""
    raw = {k: v for k, v in released(**changes).items() if v is not ...}
    with pytest.raises(ConfigError, match=key):
        ModelConfig.load(raw)


def test_the_edges_of_what_is_refused_are_allowed() -> None:
    """Nothing that a published configuration has is refused with them: null ids, the last token, no initial spread."""
    cfg = ModelConfig.load(
        released(pad_token_id=None, eos_token_id=[1, 129279], bos_token_id=None, initializer_range=0)
    )
    assert (cfg.pad_token_id, cfg.eos_token_ids, cfg.bos_token_id) == (None, (1, 129279), None)
    assert cfg.initializer_range == 0.0
    assert ModelConfig.load(released(pad_token_id=128815)).pad_token_id == 128815


@pytest.mark.parametrize("raw", [[], "text", 7])
def test_a_file_that_holds_something_else_is_refused(raw: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"config\.json.*expected an object"):
        ModelConfig.load(tmp_path)


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b'{"vocab_size": 12', b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
            ModelConfig.load(tmp_path)


def test_a_name_that_nothing_has_tells_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'deepseek-v3'.*presets: .*nano"):
        ModelConfig.load("deepsek-v3")
    with pytest.raises(ConfigError, match="there is no model at"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="bundled model"):
        resolve_model("rorqual-giga")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(tmp_path)


def test_bundled_models_are_found_by_name() -> None:
    path = resolve_model()
    assert path == resolve_model(DEFAULT_MODEL) == models_dir() / DEFAULT_MODEL
    assert ModelConfig.load(path).vocab_size > 0


# ---- run files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fin:
    length: float = 1.0
    colour: Literal["white", "grey"] = "grey"


@dataclass(frozen=True)
class Whale:
    name: str
    age: int = 3
    fins: tuple[Fin, ...] = ()
    tail: Fin = field(default_factory=Fin)
    speed: float | Literal["auto"] = "auto"
    notes: dict[str, Any] = field(default_factory=dict)
    partner: str | None = None
    sings: bool = False


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_from_dict_builds_nested_dataclasses_with_their_types() -> None:
    """Ints become floats where those are asked for, lists tuples, mappings dataclasses."""
    whale = from_dict(
        Whale, {"name": "Bo", "fins": [{"length": 2}, {"colour": "white"}], "speed": 4, "notes": {"a": 1}}
    )
    assert whale == Whale("Bo", fins=(Fin(2.0), Fin(colour="white")), speed=4.0, notes={"a": 1})
    assert isinstance(whale.fins[0].length, float)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"nam": "Bo"}, r"unknown key 'nam'; did you mean 'name'\?"),
        ({"name": "Bo", "tail": {"lenght": 1}}, r"tail: unknown key 'lenght'; did you mean 'length'\?"),
        ({"name": "Bo", "fins": [{}, {"color": "white"}]}, r"fins\[1\]: unknown key 'color'; did you mean 'colour'"),
        ({}, "lacks name"),
        ({"name": 5}, "name must be str, not int 5"),
        ({"name": "Bo", "age": "3"}, "age must be int"),
        ({"name": "Bo", "age": True}, "age must be int"),
        ({"name": "Bo", "age": 1.5}, "age must be int"),
        ({"name": "Bo", "sings": 1}, "sings must be bool"),
        ({"name": "Bo", "speed": "atuo"}, "speed"),
        ({"name": "Bo", "tail": {"colour": "gray"}}, r"colour is 'gray'; did you mean 'grey'\? \(choose from white, grey"),
        ({"name": "Bo", "tail": 3}, "tail must be Fin"),
        ({"name": "Bo", "fins": {}}, "fins must be"),
        ({"name": "Bo", "notes": []}, "notes must be"),
    ],
)  # fmt: skip
def test_from_dict_names_what_is_wrong(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Whale, raw, where="whale.toml")


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
fins = st.builds(Fin, finite, st.sampled_from(["white", "grey"]))
scalars = words | st.integers(-(2**63), 2**63 - 1) | finite | st.booleans()
keys = st.from_regex(r"[a-z_]{1,8}", fullmatch=True) | words
whales = st.builds(
    Whale,
    name=words,
    age=st.integers(-(2**63), 2**63 - 1),
    fins=st.lists(fins, max_size=3).map(tuple),
    tail=fins,
    speed=st.just("auto") | finite,
    notes=st.dictionaries(keys, scalars | st.dictionaries(keys, scalars | st.lists(scalars, max_size=2))),
    partner=st.none() | words,
    sings=st.booleans(),
)


@given(whales)
def test_a_dataclass_survives_a_round_trip_through_toml(tmp_path_factory: pytest.TempPathFactory, whale: Whale) -> None:
    """dump_toml and load_toml are inverse, whatever characters the strings hold; so are to_dict and from_dict."""
    path = tmp_path_factory.getbasetemp() / "whale.toml"
    path.write_text(dump_toml(whale), encoding="utf-8", newline="")
    assert load_toml(Whale, path) == whale
    assert from_dict(Whale, to_dict(whale)) == whale


def test_run_configurations_survive_a_round_trip_through_toml(tmp_path: Path) -> None:
    """Model tables, several sources, every kind of value: what is saved with a run repeats it."""
    run = RunConfig(
        out="out/a b",
        data=DataConfig((Source("x", 0.5), Source('quo"te\\', None)), val=(Source("y"),), seq_len=64),
        steps=7,
        batch=4,
        model={**RELEASED, "architectures": ["DeepseekV3ForCausalLM"]},
        micro_batch=2,
        compile=False,
        optim=OptimConfig(lr=3e-5, warmup_steps=0),
        balance=BalanceConfig(alpha=0.0),
        mtp=MTPConfig(weight=0.1),
    )
    saved = load_toml(RunConfig, write(tmp_path, dump_toml(run)))
    # TOML has no null: a key that is null in the table is left out, which means the same to ModelConfig.
    assert saved == run and ModelConfig.load(saved.model) == ModelConfig.load(run.model)


def test_overrides_are_toml_values_or_bare_words(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "Bo"\n[tail]\nlength = 2\n')
    told = [
        "age=12", "tail.length = 3e-4", "partner=out/trial-2", "sings=true", 'fins=[{length=1}, {colour="white"}]',
        "notes.deep.er=[1, 2]", 'name="a=b"', "speed=auto",
    ]  # fmt: skip
    assert load_toml(Whale, path, told) == Whale(
        "a=b", 12, (Fin(), Fin(colour="white")), Fin(3e-4), "auto", {"deep": {"er": [1, 2]}}, "out/trial-2", True
    )
    assert load_toml(Whale, path, ["name=x=y"]).name == "x=y"
    assert load_toml(Whale, path).tail == Fin(2.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("age", r"--set 'age': expected key=value \(for instance --set optim\.lr=3e-4\)"),
        ("=3", "expected key=value"),
        ("agee=3", "unknown key 'agee'; did you mean 'age'"),
        ("tail.lenght=3", "unknown key 'lenght'; did you mean 'length'"),
        ("name.first=Bo", "name is not a section"),
        ("age=old", "age must be int, not str 'old'"),
    ],
)
def test_a_wrong_override_says_which_and_why(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_toml(Whale, write(tmp_path, 'name = "Bo"\n'), [override])


def test_a_run_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run file .*nowhere\.toml \(see runs/"):
        load_toml(Whale, tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML.*line 1"):
        load_toml(Whale, write(tmp_path, "name = Bo\n"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(Whale, tmp_path)


@pytest.mark.parametrize(
    "run", sorted(Path(__file__).resolve().parents[2].glob("runs/**/*.toml")), ids=lambda p: p.stem
)
def test_the_run_files_in_the_repository_are_valid(run: Path) -> None:
    cfg = load_toml(RunConfig, run)
    if cfg.model:
        ModelConfig.load(cfg.model)
