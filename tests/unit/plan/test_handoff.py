"""Launch commands: right for this checkpoint, safe to paste, silent about nothing an engine would refuse."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.config import ModelConfig
from rorqual.errors import CheckpointError, ConfigError
from rorqual.plan import count
from rorqual.plan.handoff import USABLE, gpus_for, plan, shell, tensor_parallel_sizes

V3 = ModelConfig.load("deepseek-v3")
MTP = "model.layers.{}.eh_proj.weight"
FP8 = "model.layers.0.mlp.up_proj.weight_scale_inv"
HOST = {"HEAD_IP": "10.1.2.3", "PATH": os.environ["PATH"]}


def checkpoint(
    folder: Path, cfg: ModelConfig, tensors: dict[str, str] | None = None, *, total: int | None = None, **raw: Any
) -> Path:
    """A model directory: config.json, a tokenizer, and headers that claim the tensors (name -> dtype); total: an index
    alone, which claims so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**cfg.to_json(), **raw}))
    (folder / "tokenizer.json").write_text("{}")
    names = {"model.embed_tokens.weight": "BF16"} | (tensors or {})
    if total is not None:
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, "far.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        header = {
            name: {"dtype": d, "shape": [2], "data_offsets": [i, i + 1]} for i, (name, d) in enumerate(names.items())
        }
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


def engine(facts: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [e for e in facts["engines"] if e["engine"] == name]
    return found


def argv(command: str) -> list[str]:
    """The words as bash hands them to a program, with HEAD_IP set."""
    program, _, rest = command.partition(" ")
    script = f"show() {{ printf '%s\\0' \"$@\"; }}; show {shlex.quote(program)} {rest}"
    done = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, env=HOST, check=True)
    return done.stdout.split("\0")[:-1]


def flags(command: str) -> dict[str, str | None]:
    """Flag -> value; no flag stands twice."""
    words, out = argv(command), {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            assert word not in out, word
            value = words[i + 1] if i + 1 < len(words) else None
            out[word] = None if value is None or value.startswith("--") else value
    return out


def commands(facts: dict[str, Any], name: str) -> list[dict[str, str | None]]:
    found = engine(facts, name)
    assert found["refused"] is None, found
    return [flags(c) for c in found["commands"]]


# ---- the released model ---------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "DeepSeek-V3", V3, {MTP.format(61): "BF16", FP8: "F32"}, total=688_574_839_360)


def test_deepseek_v3_on_eight_gpus_of_141_gb(released: Path) -> None:
    """One host, its own context, MTP on, kernels and quantisation left to the engine."""
    facts = plan(released, 141)
    assert (facts["weights"], facts["weight_bytes"], facts["mtp_modules"]) == ("fp8", 688_574_839_360, 1)
    assert facts["tensor_parallel_sizes"] == [1, 2, 4, 8, 16] and facts["cache_bytes_per_token"] == 70_272
    assert facts["gpus"]["141"] == {"needed": 7, "tensor_parallel": 8, "pipeline_parallel": 1}
    assert facts["gpus"]["80"] == {"needed": 11, "tensor_parallel": 16, "pipeline_parallel": 1}
    [vllm] = commands(facts, "vLLM")
    assert vllm == {
        "--served-model-name": "DeepSeek-V3",
        "--max-model-len": "163840",
        "--tensor-parallel-size": "8",
        "--speculative-config": '{"method":"mtp","num_speculative_tokens":1}',
    }
    [sglang] = commands(facts, "SGLang")
    assert sglang == {
        "--model-path": str(released),
        "--served-model-name": "DeepSeek-V3",
        "--context-length": "163840",
        "--tp": "8",
        "--speculative-algorithm": "EAGLE",
        "--speculative-num-steps": "3",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "4",
    }
    assert not engine(facts, "vLLM")["warnings"] and not engine(facts, "SGLang")["warnings"]
    assert any("--kt-method FP8" in note for note in facts["notes"])


def test_sixteen_gpus_are_two_hosts_with_a_command_each(released: Path) -> None:
    vllm = commands(plan(released, 80), "vLLM")
    assert [(c["--nnodes"], c["--node-rank"], c["--master-addr"], "--headless" in c) for c in vllm] == [
        ("2", "0", "10.1.2.3", False), ("2", "1", "10.1.2.3", True),
    ]  # fmt: skip
    assert all(c["--tensor-parallel-size"] == "16" for c in vllm)
    sglang = commands(plan(released, 80), "SGLang")
    assert [(c["--node-rank"], c["--dist-init-addr"]) for c in sglang] == [
        ("0", "10.1.2.3:5000"),
        ("1", "10.1.2.3:5000"),
    ]
    line = engine(plan(released, 80), "vLLM")["commands"][0]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env={"PATH": HOST["PATH"]})
    assert done.returncode and "HEAD_IP: set it to the address of host 0" in done.stderr


def test_llama_cpp_converts_first(released: Path) -> None:
    facts = plan(released)
    convert, serve = engine(facts, "llama.cpp")["commands"]
    gguf = f"{released}.gguf"
    assert argv(convert) == ["rorqual", "convert", str(released), gguf, "--to", "gguf"]
    assert argv(serve)[0] == "llama-server"
    assert flags(serve) == {
        "--model": gguf, "--alias": "DeepSeek-V3", "--ctx-size": "163840", "--parallel": "1", "--jinja": None,
    }  # fmt: skip


def test_more_than_splits_allow_goes_in_stages_without_drafting(released: Path) -> None:
    """24 GB cards: as few as possible, equally many on every host; neither engine drafts across stages."""
    facts = plan(released, 24)
    need = facts["gpus"]["24"]
    total = need["tensor_parallel"] * need["pipeline_parallel"]
    assert need["needed"] == 36 and total == 40
    for name, stages in (("vLLM", "--pipeline-parallel-size"), ("SGLang", "--pp-size")):
        for c in commands(facts, name):
            assert c[stages] == str(need["pipeline_parallel"]) and c["--nnodes"] == "5"
            assert not any("speculative" in flag for flag in c)
        assert any("MTP stays off" in w for w in engine(facts, name)["warnings"])


# ---- what differs from checkpoint to checkpoint -----------------------------------------------------------------------


PLAIN = V3.replace(quantization_config=None)


def test_mtp_flags_stand_only_where_the_weights_are(tmp_path: Path) -> None:
    """transformers writes num_nextn_predict_layers 1 even where it dropped the module."""
    facts = plan(checkpoint(tmp_path / "m", PLAIN))
    assert facts["mtp_modules"] == 0
    for name in ("vLLM", "SGLang"):
        for c in commands(facts, name):
            assert not any("speculative" in flag for flag in c)
        assert any("promises 1 MTP modules, the weights hold 0" in w for w in engine(facts, name)["warnings"])
    none = plan(checkpoint(tmp_path / "n", PLAIN.replace(num_nextn_predict_layers=0)))
    assert not engine(none, "vLLM")["warnings"], "nothing promised, nothing missed"


def test_two_modules_are_one_too_many_for_sglang(tmp_path: Path) -> None:
    two = PLAIN.replace(num_nextn_predict_layers=2)
    facts = plan(checkpoint(tmp_path / "m", two, {MTP.format(61): "BF16", MTP.format(62): "BF16"}))
    assert facts["mtp_modules"] == 2
    assert "--speculative-config" in commands(facts, "vLLM")[0]
    assert "--speculative-algorithm" not in commands(facts, "SGLang")[0]
    assert any("num_nextn_predict_layers 1" in w for w in engine(facts, "SGLang")["warnings"])


@pytest.mark.parametrize(
    ("latent", "rope", "odd"), [(512, 64, False), (256, 64, True), (512, 32, True), (544, 32, True)]
)
def test_other_latents_need_the_triton_kernels(latent: int, rope: int, odd: bool, tmp_path: Path) -> None:
    cfg = PLAIN.replace(kv_lora_rank=latent, qk_rope_head_dim=rope)
    facts = plan(checkpoint(tmp_path / "m", cfg))
    assert commands(facts, "vLLM")[0].get("--attention-backend") == ("TRITON_MLA" if odd else None)
    assert commands(facts, "SGLang")[0].get("--attention-backend") == ("triton" if odd else None)
    assert bool(facts["notes"]) != odd, "KTransformers' attention is built for 512 + 64"


def test_precision_is_what_is_stored(tmp_path: Path) -> None:
    """Whatever torch_dtype says: fp32 weights are served in bf16."""
    wide = plan(checkpoint(tmp_path / "a", PLAIN, {"model.embed_tokens.weight": "F32"}, torch_dtype="bfloat16"))
    assert wide["weights"] == "fp32"
    assert commands(wide, "vLLM")[0]["--dtype"] == commands(wide, "SGLang")[0]["--dtype"] == "bfloat16"
    half = plan(checkpoint(tmp_path / "b", PLAIN, {"model.embed_tokens.weight": "F16"}))
    assert half["weights"] == "fp16" and "--dtype" not in commands(half, "vLLM")[0]
    unseen = plan(checkpoint(tmp_path / "c", PLAIN, total=5, torch_dtype="float32"))
    assert unseen["weights"] == "fp32" and unseen["weight_bytes"] == 5


def test_without_weights_sizes_are_estimated_and_said_to_be(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", V3)
    (folder / "model.safetensors").unlink()
    facts = plan(folder)
    assert facts["weight_bytes"] == 688_574_839_360 and "estimated" in facts["weight_bytes_are"]
    assert any("no weights in this directory" in w for w in engine(facts, "vLLM")["warnings"])


def test_a_missing_tokenizer_is_said(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", PLAIN)
    (folder / "tokenizer.json").unlink()
    assert any("no tokenizer" in w for w in engine(plan(folder), "vLLM")["warnings"])


def test_kimi_k2_brings_code(tmp_path: Path) -> None:
    """Kept under its own model_type, its tokenizer is Python in the checkpoint; 384 experts are one group."""
    kimi = ModelConfig.load("kimi-k2")
    own = plan(checkpoint(tmp_path / "a", kimi, {FP8: "F32"}, model_type="kimi_k2"))
    assert "--trust-remote-code" in commands(own, "vLLM")[0] and "--trust-remote-code" in commands(own, "SGLang")[0]
    assert any("384 experts a group" in w for w in engine(own, "SGLang")["warnings"])
    renamed = plan(checkpoint(tmp_path / "b", kimi, {FP8: "F32"}))
    assert "--trust-remote-code" not in commands(renamed, "vLLM")[0]


def test_thirty_two_experts_a_group_are_no_warning(tmp_path: Path) -> None:
    facts = plan(checkpoint(tmp_path / "m", PLAIN, {MTP.format(61): "BF16"}))
    assert not engine(facts, "SGLang")["warnings"]
    wide = plan(checkpoint(tmp_path / "n", PLAIN.replace(n_group=4, topk_group=2), {MTP.format(61): "BF16"}))
    assert any("64 experts a group" in w for w in engine(wide, "SGLang")["warnings"])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "kept", "refused"), [(8, 8, True), (8, 4, False), (1, 1, False)])
def test_llama_cpp_cannot_keep_all_groups(groups: int, kept: int, refused: bool, tmp_path: Path) -> None:
    facts = plan(checkpoint(tmp_path / "m", PLAIN.replace(n_group=groups, topk_group=kept)))
    found = engine(facts, "llama.cpp")
    assert bool(found["refused"]) == refused == (not found["commands"])
    assert engine(facts, "vLLM")["refused"] is None


def test_yarn_without_mscale_is_another_model_in_llama_cpp(tmp_path: Path) -> None:
    assert V3.rope_scaling is not None
    bare = {k: v for k, v in V3.rope_scaling.items() if not k.startswith("mscale")}
    for scaling, warned in ((bare, True), (V3.rope_scaling, False), (None, False)):
        folder = checkpoint(tmp_path / str(len(scaling or {})), PLAIN.replace(rope_scaling=scaling))
        assert any("mscale" in w for w in engine(plan(folder), "llama.cpp")["warnings"]) == warned


def test_fp8_widths_that_are_no_blocks_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """Gate and up are one matrix: their widths must be multiples of the block even on one GPU."""
    nano = ModelConfig.load("nano").replace(quantization_config=V3.quantization_config, tie_word_embeddings=False)
    facts = plan(checkpoint(tmp_path / "a model", nano, {FP8: "F32"}))
    assert facts["tensor_parallel_sizes"] == [] and facts["gpus"] == {}
    for name in ("vLLM", "SGLang"):
        refusal = engine(facts, name)["refused"]
        command = refusal.split("`")[1]
        assert argv(command)[-2:] == ["--to", "bf16"] and str(tmp_path / "a model") in argv(command)
    assert engine(facts, "llama.cpp")["commands"]


def test_a_query_latent_that_is_no_block_is_said(tmp_path: Path) -> None:
    odd = V3.replace(q_lora_rank=1500)
    facts = plan(checkpoint(tmp_path / "m", odd, {FP8: "F32"}))
    assert any("q_lora_rank 1500" in w for w in engine(facts, "vLLM")["warnings"])


@pytest.mark.parametrize(
    ("block", "tensors", "said"),
    [
        (V3.quantization_config, {}, "no tensor is called *.weight_scale_inv"),
        ({"quant_method": "compressed-tensors"}, {FP8: "F32"}, "no tensor is called *.weight_packed"),
        (None, {FP8: "F32"}, "no quantization_config"),
        (None, {"lm_head.weight_packed": "I32"}, "no quantization_config"),
    ],
)
def test_config_and_weights_that_disagree_are_served_by_nobody(
    block: Any, tensors: dict[str, str], said: str, tmp_path: Path
) -> None:
    facts = plan(checkpoint(tmp_path / "m", V3.replace(quantization_config=block), tensors))
    for found in facts["engines"]:
        assert said in found["refused"] and "lint" in found["refused"] and not found["commands"]
    assert not facts["notes"]


def test_faults_of_the_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        plan(tmp_path / "none")
    folder = checkpoint(tmp_path / "m", V3)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        plan(folder)


# ---- arithmetic and quoting -------------------------------------------------------------------------------------------


@given(
    heads=st.sampled_from([4, 12, 16, 64, 96, 128]),
    width=st.sampled_from([80, 128, 1408, 2048, 2560]),
    dense=st.sampled_from([0, 1]),
    block=st.sampled_from([None, 32, 128]),
)
def test_every_size_offered_divides_and_no_other_does(heads: int, width: int, dense: int, block: int | None) -> None:
    cfg = PLAIN.replace(num_attention_heads=heads, moe_intermediate_size=width, first_k_dense_replace=dense)
    sizes = tensor_parallel_sizes(cfg, block)
    for t in range(1, 65):
        widths = [width, *([cfg.intermediate_size] if dense else [])]
        fits = heads % t == 0 and all(w % t == 0 for w in widths) and (t <= 8 or t % 8 == 0)
        if block:
            fits = fits and all(w // t % block == 0 for w in widths)
            per_head = (cfg.qk_head_dim, cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.v_head_dim)
            fits = fits and (t == 1 or all(heads // t * w % block == 0 for w in per_head))
        assert (t in sizes) == fits, t


@given(
    nbytes=st.integers(1, 10**13),
    memory=st.sampled_from([24, 80, 141]),
    sizes=st.sets(st.sampled_from([1, 2, 4, 8, 16])).map(lambda s: sorted({1, *s})),
)
def test_a_split_holds_the_weights_and_fills_its_hosts(nbytes: int, memory: int, sizes: list[int]) -> None:
    split = gpus_for(nbytes, memory, sizes)
    assert split.tensor_parallel in sizes and split.total >= split.needed
    assert split.total * memory * 1e9 * USABLE >= nbytes > (split.needed - 1) * memory * 1e9 * USABLE
    assert split.total % split.hosts == 0 and split.total // split.hosts <= 8
    if split.pipeline_parallel == 1:
        assert not [t for t in sizes if split.needed <= t < split.tensor_parallel]


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_words_come_out_of_the_shell_as_they_went_in(words: list[str]) -> None:
    assert shlex.split(shell([["serve", *words]])) == ["serve", *words]


def test_groups_are_lines_of_one_command() -> None:
    command = shell([["serve", "a b"], ["--name", "it's"], ["--flag"]])
    assert command.count("\\\n") == 2 and argv(command) == ["serve", "a b", "--name", "it's", "--flag"]


def test_hostile_names_stay_words(tmp_path: Path) -> None:
    """A directory may be called anything; nothing of it is run."""
    name = 'it\'s $(touch oops) `touch oops`; "x" & ~'
    facts = plan(checkpoint(tmp_path / name, PLAIN))
    for found in facts["engines"]:
        for command in found["commands"]:
            assert any(str(tmp_path / name) in word for word in argv(command))
    assert not Path("oops").exists()


def test_facts_are_plain_data(released: Path) -> None:
    facts = plan(released)
    assert json.loads(json.dumps(facts)) == facts
    assert count.stored_bytes(V3, "fp8", copies=True) == facts["weight_bytes"]
