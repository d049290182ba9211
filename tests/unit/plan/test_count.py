"""Closed forms against what was published, what is saved, and counting by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig, presets
from rorqual.model.transformer import Transformer
from rorqual.plan import count
from rorqual.plan.headers import read_weights

V3 = ModelConfig.load("deepseek-v3")
TINY = ModelConfig.load("test")
# No preset's shape: a query latent, groups, two MTP modules, a tied head, ragged blocks and groups.
ODD = TINY.replace(
    q_lora_rank=24, n_group=2, topk_group=1, num_nextn_predict_layers=2, tie_word_embeddings=True, hidden_size=72,
    first_k_dense_replace=2, n_shared_experts=3, moe_intermediate_size=36,
)  # fmt: skip


def test_the_fp8_release_of_deepseek_v3_to_the_byte() -> None:
    """91,991 tensors and 688,574,839,360 bytes, MTP module and the tables it stores again included."""
    assert count.stored_tensors(V3, "fp8", copies=True) == 91_991
    assert count.stored_bytes(V3, "fp8", copies=True) == 688_574_839_360


def test_published_sizes_of_the_family() -> None:
    """The papers' figures, which leave the two tables out for Moonlight."""
    assert count.totals(V3) == (671_026_419_200, 37_552_297_472)
    moonlight = ModelConfig.load("moonlight-16b-a3b")
    tables = 2 * moonlight.vocab_size * moonlight.hidden_size
    assert [f"{(n - tables) / 1e9:.2f}" for n in count.totals(moonlight)] == ["15.29", "2.24"]
    total, active = count.totals(ModelConfig.load("kimi-k2"))
    assert f"{total / 1e12:.2f}" == "1.03" and 32e9 < active < 33e9


@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("mtp", [True, False])
def test_every_parameter_is_stored_once(name: str, mtp: bool) -> None:
    """Without the copies, elements in the tensor list and parameters by part are the same number."""
    cfg = ModelConfig.load(name)
    elements = sum(t.rows * t.cols * t.count for t in count.stored(cfg, mtp))
    assert elements == count.totals(cfg)[0] + (count.parts(cfg)[-1].total if mtp else 0)


@pytest.mark.parametrize("cfg", [TINY, ODD, TINY.replace(num_nextn_predict_layers=0)], ids=["test", "odd", "no MTP"])
@pytest.mark.parametrize(("form", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_what_is_saved_is_what_is_counted(
    cfg: ModelConfig, form: count.Form, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Number of tensors and bytes, as the files' headers have them."""
    save_model(Transformer(cfg), tmp_path / "model", dtype=dtype)
    weights = read_weights(tmp_path / "model")
    assert len(weights.names) == count.stored_tensors(cfg, form, copies=True)
    assert weights.nbytes == count.stored_bytes(cfg, form, copies=True)


def test_ragged_blocks_and_groups_are_rounded_up() -> None:
    """576 x 7168 has 5 x 56 scales; 36 columns pack into 5 words with 2 scales in int4, 9 words in int8."""
    assert count.Tensors("linear", 576, 7168).bytes_in("fp8") == 576 * 7168 + 5 * 56 * 4
    assert count.Tensors("linear", 10, 36, 3).bytes_in("int4") == 3 * 10 * (5 * 4 + 2 * 2)
    assert count.Tensors("linear", 10, 36, 3).bytes_in("int8") == 3 * 10 * (9 * 4 + 2 * 2)
    assert count.Tensors("table", 10, 64).bytes_in("int4") == 10 * 64 * (0.5 + 2 / 32)
    assert count.Tensors("table", 10, 64).bytes_in("int8") == 10 * 64 * (1 + 2 / 32)


def test_what_a_form_leaves_alone() -> None:
    """Tables stay bf16 in FP8; router, norms and eh_proj stay bf16 everywhere; correction biases are always fp32."""
    assert count.Tensors("table", 10, 64).bytes_in("fp8") == 10 * 64 * 2
    for form in ("bf16", "fp8", "int8", "int4"):
        assert count.Tensors("kept", 10, 64).bytes_in(form) == 10 * 64 * 2
        assert count.Tensors("bias", 1, 64).bytes_in(form) == 64 * 4
    assert count.Tensors("kept", 10, 64).bytes_in("fp32") == 10 * 64 * 4
    kept = [(t.rows, t.cols, t.count) for t in count.stored(V3) if t.kind == "kept"]
    assert (7168, 2 * 7168, 1) in kept, "eh_proj"
    assert (256, 7168, 59) in kept, "58 routers and the module's"
    assert [(t.cols, t.count) for t in count.stored(V3) if t.kind == "bias"] == [(256, 59)]


def test_the_forms_are_ordered_and_v3_fits_where_it_is_known_to() -> None:
    """FP8 is a little more than a byte a parameter, int4 a little more than 0.56, MTP adds to each."""
    total = count.totals(V3)[0] + count.parts(V3)[-1].total
    sizes = [count.stored_bytes(V3, form) for form in ("fp32", "bf16", "int8", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True), "int8 has more scales than FP8"
    assert 1.00 < count.stored_bytes(V3, "fp8") / total < 1.01
    assert 0.5625 < count.stored_bytes(V3, "int4") / total < 0.565
    for form in count.FORMS:
        assert count.stored_bytes(V3, form, mtp=False) < count.stored_bytes(V3, form)


def test_cache_bytes() -> None:
    """70,272 bytes a token in bf16, 40,016 in FlashMLA's FP8 form (656 a layer)."""
    assert count.cache_bytes_per_token(V3) == 70_272
    assert count.fp8_cache_bytes_per_token(V3) == 61 * 656
    assert count.fp8_cache_bytes_per_token(TINY) == 3 * (32 + 4 + 2 * 8)


@pytest.mark.parametrize("name", presets())
def test_operations_are_weights_and_attention(name: str) -> None:
    cfg, context = ModelConfig.load(name), 4096
    assert count.forward_flops_per_token(cfg, context) == count.weight_flops_per_token(
        cfg
    ) + count.attention_flops_per_token(cfg, context / 2)
    assert count.training_flops_per_token(cfg, context) >= 3 * count.forward_flops_per_token(cfg, context)


def test_operations_of_deepseek_v3() -> None:
    """By hand: a pair costs 2 x (192 + 128) expanded and 2 x (576 + 512) absorbed, in 128 heads and 61 layers; the
    weights are the active ones but for the embedding."""
    assert count.weight_flops_per_token(V3) == 2 * (37_552_297_472 - 129_280 * 7168)
    assert count.attention_flops_per_token(V3, 1) == 61 * 128 * 640
    assert count.attention_flops_per_token(V3, 1, absorbed=True) == 61 * 128 * 2176
    assert count.decode_flops_per_token(V3, 1000) == count.weight_flops_per_token(V3) + 61 * 128 * 2176 * 1000
    tied = V3.replace(tie_word_embeddings=True)
    assert count.weight_flops_per_token(tied) == count.weight_flops_per_token(V3), "a tied head still multiplies"
