from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.gguf import KINDS, export_gguf, verify_gguf
from rorqual.checkpoint.names import released_tensors
from rorqual.checkpoint.source import Source
from rorqual.config import ModelConfig, resolve_model
from rorqual.data.tokenizer import Tokenizer, train_tokenizer
from rorqual.errors import CheckpointError
from tests.parity import YARN, build, draw

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parents[3]
BUNDLED = resolve_model()
Fields = dict[str, Any]
Tensors = dict[str, np.ndarray[Any, Any]]


def saved(cfg: ModelConfig, directory: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    model = build(cfg, seed)
    save_model(model, directory)
    return {name: value.detach().clone() for name, value in released_tensors(model)}


def read(path: Path) -> tuple[Fields, Tensors]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def plain(**changes: Any) -> ModelConfig:
    """Small, with sizes that blocks of 32 fit."""
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32, "intermediate_size": 96,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.08,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


@pytest.mark.parametrize("seed", range(8))
def test_every_weight_and_key_of_drawn_models(seed: int, tmp_path: Path) -> None:
    cfg = draw(seed)
    weights = saved(cfg, tmp_path / "model", seed)
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    fields, tensors = read(tmp_path / "m.gguf")
    assert verify_gguf(tmp_path / "m.gguf") == len(tensors)

    key = {k.removeprefix("deepseek2."): v for k, v in fields.items()}
    assert key["general.architecture"] == "deepseek2" and key["block_count"] == cfg.num_hidden_layers
    assert key["attention.q_lora_rank"] == (cfg.q_lora_rank or 0)
    assert key["attention.key_length"] == cfg.kv_lora_rank + cfg.qk_rope_head_dim
    assert key["expert_gating_func"] == 2 and key["expert_weights_norm"] == cfg.norm_topk_prob
    assert key["expert_weights_scale"] == pytest.approx(cfg.routed_scaling_factor)
    assert (key["expert_group_count"], key["expert_group_used_count"]) == (cfg.n_group, cfg.topk_group)
    assert ("rope.scaling.type" in key) == (cfg.rope_scaling is not None)
    assert key["tokenizer.ggml.model"] == "none"

    H, N, C = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank
    assert ("output.weight" in tensors) != cfg.tie_word_embeddings
    equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}."
        k_b, v_b = tensors[f"blk.{i}.attn_k_b.weight"], tensors[f"blk.{i}.attn_v_b.weight"]
        assert k_b.shape == (H, C, N)
        kv_b = np.concatenate((k_b.transpose(0, 2, 1), v_b), 1).reshape(-1, C)
        equal(kv_b, weights[f"{layer}self_attn.kv_b_proj.weight"])
        equal(tensors[f"blk.{i}.attn_kv_a_mqa.weight"], weights[f"{layer}self_attn.kv_a_proj_with_mqa.weight"])
        query = ("attn_q", "q_proj") if cfg.q_lora_rank is None else ("attn_q_b", "q_b_proj")
        equal(tensors[f"blk.{i}.{query[0]}.weight"], weights[f"{layer}self_attn.{query[1]}.weight"])
        if not cfg.is_moe(i):
            equal(tensors[f"blk.{i}.ffn_down.weight"], weights[f"{layer}mlp.down_proj.weight"])
            continue
        equal(tensors[f"blk.{i}.exp_probs_b.bias"], weights[f"{layer}mlp.gate.e_score_correction_bias"])
        equal(tensors[f"blk.{i}.ffn_up_shexp.weight"], weights[f"{layer}mlp.shared_experts.up_proj.weight"])
        for e in (0, cfg.n_routed_experts - 1):
            down = weights[f"{layer}mlp.experts.{e}.down_proj.weight"]
            equal(tensors[f"blk.{i}.ffn_down_exps.weight"][e], down)


def equal(written: np.ndarray[Any, Any], weight: torch.Tensor) -> None:
    assert np.array_equal(written, weight.detach().float().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_dequantises_within_its_error(kind: str, tmp_path: Path) -> None:
    weights = saved(plain(), tmp_path / "model")
    assert export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", kind)  # no tokenizer
    _, tensors = read(tmp_path / "m.gguf")
    bound = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 0.01, "q5_1": 0.06, "q5_0": 0.07, "q4_1": 0.12, "q4_0": 0.14}
    for name, released in (("blk.1.ffn_up_exps", "mlp.experts.3.up_proj"), ("blk.1.attn_q_a", "self_attn.q_a_proj")):
        written = tensors[f"{name}.weight"]
        written = written[3] if written.ndim == 3 else written
        weight = weights[f"model.layers.1.{released}.weight"].numpy()
        assert np.linalg.norm(written - weight) <= bound.get(kind, 0.2) * np.linalg.norm(weight)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.attn_q_a.weight"] == kind.upper()
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.1.exp_probs_b.bias"] == kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == (kind if "f" in kind[:2] else "q8_0").upper()


def test_kinds_are_what_the_package_can_make_of_trained_weights() -> None:
    row, made = np.ones((1, 256), np.float32), set()
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.quantize(row, kind)
        except NotImplementedError:
            continue
        made.add(kind.name.lower())
    assert made - set(KINDS) <= {"tq1_0", "tq2_0", "nvfp4"} and set(KINDS) <= made


def test_rows_that_no_block_fits_are_wider_and_counted(tmp_path: Path) -> None:
    saved(plain(moe_intermediate_size=24), tmp_path / "model")
    warnings = export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == "F16" and kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert any(w.startswith("4 matrices") for w in warnings)


@pytest.mark.parametrize(
    ("scaling", "attn_factor", "multiplier"),
    [
        (YARN, None, 0.1),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, None, 0.0707),
        ({k: v for k, v in YARN.items() if "mscale" not in k}, 1.3688879, -0.0730519),
    ],
)
def test_yarn_is_solved_for(
    scaling: dict[str, Any], attn_factor: float | None, multiplier: float, tmp_path: Path
) -> None:
    cfg = plain(rope_scaling=scaling)
    saved(cfg, tmp_path / "model")
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields.get("deepseek2.rope.scaling.attn_factor") == (attn_factor and pytest.approx(attn_factor))
    assert fields["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(multiplier, rel=1e-5)


def test_all_groups_kept_is_written_as_one_group(tmp_path: Path) -> None:
    saved(plain(n_group=4, topk_group=4), tmp_path / "model")
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["deepseek2.expert_group_count"] == fields["deepseek2.expert_group_used_count"] == 1


@pytest.mark.parametrize(("rank", "count", "kept"), [(32, 1, 1), (32, 2, 1), (None, 1, 0)])
def test_prediction_block_goes_in_where_it_can_be_used(rank: int | None, count: int, kept: int, tmp_path: Path) -> None:
    weights = saved(plain(q_lora_rank=rank, num_nextn_predict_layers=count), tmp_path / "model")
    warnings = export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["deepseek2.block_count"] == 3 + kept
    assert fields.get("deepseek2.nextn_predict_layers", 0) == kept
    assert any("multi-token" in w for w in warnings) == (count != kept)
    assert ("blk.3.nextn.eh_proj.weight" in tensors) == bool(kept)
    if kept:
        equal(tensors["blk.3.nextn.eh_proj.weight"], weights["model.layers.3.eh_proj.weight"])
        equal(tensors["blk.3.nextn.shared_head_norm.weight"], weights["model.layers.3.shared_head.norm.weight"])


def test_differences_are_told(tmp_path: Path) -> None:
    saved(plain(rms_norm_eps=1e-5, rope_scaling=YARN | {"beta_fast": 16}), tmp_path / "model")
    warnings = export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f32")
    assert any("epsilon" in w for w in warnings) and any("--yarn-beta-fast 16" in w for w in warnings)


def test_other_depths_take_a_low_rank_query_and_v2_lites_do_not(tmp_path: Path) -> None:
    for depth, rank, refused in ((26, 32, True), (27, 32, True), (26, None, False), (25, 32, False)):
        cfg = plain(num_hidden_layers=depth, q_lora_rank=rank, first_k_dense_replace=depth, hidden_size=32)
        saved(cfg, tmp_path / "model")
        target = tmp_path / f"{depth}-{rank}.gguf"
        if refused:
            refuses(tmp_path / "model", target, "q_lora_rank")
        else:
            export_gguf(Source.open(tmp_path / "model"), target, "f32")


def refuses(model: Path, target: Path, match: str, kind: str = "f32") -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        export_gguf(Source.open(model), target, kind)
    assert caught.value.remedy
    assert not list(target.parent.glob(f"{target.name}*"))


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    saved(plain(rope_scaling=YARN | {"factor": 1.0, "attention_factor": 1.3}), tmp_path / "model")
    refuses(tmp_path / "model", tmp_path / "m.gguf", "rotary")
    refuses(tmp_path / "model", tmp_path / "m.gguf", "q3_k", kind="q3_k")
    saved(plain(), tmp_path / "model")
    wrong = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong | {"v_head_dim": 16}))
    refuses(tmp_path / "model", tmp_path / "m.gguf", "the config makes it")
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong | {"num_hidden_layers": 4}))
    refuses(tmp_path / "model", tmp_path / "m.gguf", "lacks")


# ---- killed and resumed -------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def stop_after(tensors: int) -> Callable[[int, int], None]:
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        assert done <= total
        if len(seen) == tensors:
            raise Killed

    return progress


def test_resumed_is_the_same_file(tmp_path: Path) -> None:
    saved(plain(), tmp_path / "model")
    source, target = Source.open(tmp_path / "model"), tmp_path / "m.gguf"
    export_gguf(source, tmp_path / "whole.gguf", "q8_0")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for _ in range(3):
        with pytest.raises(Killed):
            export_gguf(source, target, "q8_0", stop_after(7))
        assert not target.exists()
    assert len((tmp_path / "m.gguf.journal").read_text().splitlines()) == 1 + 21
    damaged = bytearray((tmp_path / "m.gguf.part").read_bytes())
    damaged[len(damaged) // 2] ^= 1  # a kept tensor is not what it was: it is written again, with all behind it
    (tmp_path / "m.gguf.part").write_bytes(damaged + b"torn")
    with (tmp_path / "m.gguf.journal").open("a") as journal:
        journal.write('{"tensor": 21, "sha')
    export_gguf(source, target, "q8_0")
    assert target.read_bytes() == whole
    assert {p.name for p in tmp_path.glob("m.gguf*")} == {"m.gguf"}


def test_another_conversion_is_not_resumed(tmp_path: Path) -> None:
    saved(plain(), tmp_path / "model")
    target = tmp_path / "m.gguf"
    with pytest.raises(Killed):
        export_gguf(Source.open(tmp_path / "model"), target, "f32", stop_after(9))
    time.sleep(0.01)
    saved(plain(), tmp_path / "model", seed=1)
    export_gguf(Source.open(tmp_path / "model"), target, "f32")
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "whole.gguf", "f32")
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_killed_by_the_system_and_resumed(tmp_path: Path) -> None:
    saved(plain(num_hidden_layers=40), tmp_path / "model")  # so many tensors that it is killed among them
    source, target = Source.open(tmp_path / "model"), tmp_path / "m.gguf"
    script = (
        "import sys, time; from rorqual.checkpoint.gguf import export_gguf; from rorqual.checkpoint.source import Source\n"
        "export_gguf(Source.open(sys.argv[1]), sys.argv[2], 'bf16', lambda d, t: time.sleep(0.02))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script, str(source.directory), str(target)], env=environment)
    journal = tmp_path / "m.gguf.journal"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() and (tmp_path / "m.gguf.part").exists()
    written: list[int] = []
    export_gguf(source, target, "bf16", lambda done, total: written.append(done))
    export_gguf(source, tmp_path / "whole.gguf", "bf16")
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(written) <= verify_gguf(target) - 11


def test_a_cut_file_is_found(tmp_path: Path) -> None:
    saved(plain(), tmp_path / "model")
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf", "f16")
    whole = (tmp_path / "m.gguf").read_bytes()
    for cut in (whole[:-40], whole + bytes(32), whole[:100], b"not a model"):
        (tmp_path / "m.gguf").write_bytes(cut)
        with pytest.raises(CheckpointError):
            verify_gguf(tmp_path / "m.gguf")


# ---- tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fields, Tensors]:
    path = tmp_path_factory.mktemp("bundled") / "m.gguf"
    assert not any("vocabulary" in warning for warning in export_gguf(Source.open(BUNDLED), path, "bf16"))
    return read(path)


def test_the_bundled_tokenizer_comes_along(bundled: tuple[Fields, Tensors]) -> None:
    spec = json.loads((BUNDLED / "tokenizer.json").read_text())
    tokenizer = Tokenizer.load(BUNDLED)
    fields, _ = bundled
    key = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    [*_, last] = spec["pre_tokenizer"]["pretokenizers"]
    assert key["model"] == "gpt2" and key["pre"] == ("smollm" if last["use_regex"] else "deepseek-v3")
    assert [key["tokens"][i] for i in spec["model"]["vocab"].values()] == list(spec["model"]["vocab"])
    assert key["merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    types = {token: key["token_type"][i] for i, token in enumerate(key["tokens"])}
    assert types["<think>"] == 4 and types["<｜User｜>"] == types["<｜end▁of▁sentence｜>"] == 3 and types["a"] == 1
    assert (key["bos_token_id"], key["eos_token_id"], key["add_bos_token"]) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        True,
    )
    assert key["padding_token_id"] == tokenizer.pad_id
    assert fields["tokenizer.chat_template"] == tokenizer.config["chat_template"]


def with_tokenizer(directory: Path, change: Callable[[dict[str, Any]], None], rows: int = 306) -> None:
    """One of 300 words."""
    saved(plain(vocab_size=rows), directory)
    train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")], 300).save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    change(spec)
    (directory / "tokenizer.json").write_text(json.dumps(spec))


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    with_tokenizer(tmp_path / "model", lambda spec: None)
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "m.gguf")
    fields, _ = read(tmp_path / "m.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == 306
    assert fields["tokenizer.ggml.tokens"][-6:] == [f"[PAD{i}]" for i in range(300, 306)]
    assert fields["tokenizer.ggml.token_type"][-6:] == [5] * 6


def test_another_pre_tokenizer_is_named_or_refused(tmp_path: Path) -> None:
    def gpt2(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    def digits(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"

    def lower(spec: dict[str, Any]) -> None:
        spec["normalizer"] = {"type": "Lowercase"}

    with_tokenizer(tmp_path / "model", gpt2)
    export_gguf(Source.open(tmp_path / "model"), tmp_path / "gpt2.gguf")
    assert read(tmp_path / "gpt2.gguf")[0]["tokenizer.ggml.pre"] == "gpt-2"
    for change, match in ((digits, "pre-tokenizer"), (lower, "normalises")):
        with_tokenizer(tmp_path / "model", change)
        refuses(tmp_path / "model", tmp_path / "m.gguf", match)
    with_tokenizer(tmp_path / "model", lambda spec: None, rows=290)
    refuses(tmp_path / "model", tmp_path / "m.gguf", "rows")


def test_the_bundled_model_keeps_its_weights(bundled: tuple[Fields, Tensors]) -> None:
    """Four-bit ones as what they stand for."""
    _, tensors = bundled
    weights = dict(released_tensors(load_model(BUNDLED, dequantize=True)))
    equal(tensors["blk.3.attn_output.weight"], weights["model.layers.3.self_attn.o_proj.weight"])
