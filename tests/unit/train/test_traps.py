"""The silent mistakes of other implementations, each with a public bug report: here is the test that would have shown it.

What stands elsewhere: biased scores as gates, masked groups at -inf (tests/unit/ops/test_ops.py), MTP targets across
documents and the mean over depths (test_loss.py), bias through conversion (tests/unit/checkpoint/test_roundtrip.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.checkpoint import load_model, save_model
from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.errors import ConfigError
from rorqual.model.moe import Gate
from rorqual.model.transformer import Transformer
from rorqual.ops import balance
from rorqual.ops.fp8 import dynamic_backends, quantize_blocks
from rorqual.ops.router import route
from rorqual.train.config import BalanceConfig, DataConfig, OptimConfig, RunConfig, Source, resolve
from rorqual.train.loss import Targets, losses
from rorqual.train.replicas import ALONE, Replicas
from rorqual.train.trainer import Trainer
from tests.parity import build
from tests.unit.ops.ties import untied

TEST = ModelConfig.load("test").replace(num_nextn_predict_layers=1)


def trainer(cfg: ModelConfig = TEST, replicas: Replicas = ALONE, **changes: object) -> Trainer:
    run = RunConfig(
        out="", data=DataConfig(train=(Source("none"),), seq_len=24, packing="stream", mask_documents=False), steps=100,
        batch=4, micro_batch=2, model="x", device="cpu", dtype="float32", compile=False, optim=OptimConfig(warmup_steps=0),
    )  # fmt: skip
    return Trainer(dataclasses.replace(run, **changes), build(cfg, 0), replicas=replicas)  # type: ignore[arg-type]


def rows(cfg: ModelConfig = TEST, seed: int = 0, batch: int = 4) -> Rows:
    shape = (batch, 24 + 1 + cfg.num_nextn_predict_layers)
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)
    return Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))


def gates(model: Transformer) -> dict[str, Gate]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Gate)}


def test_every_bias_moves_by_gamma_also_in_the_mtp_module_and_in_mixed_networks() -> None:
    """MaxText #2494, DeepSeek-V3 #761 (never updated); torchtitan #4494 (not in MTP), #3686 (not past a dense layer)."""
    t = trainer()
    before = {n: g.e_score_correction_bias.clone() for n, g in gates(t.model).items()}
    assert any(n.startswith("mtp") for n in before) and t.model.cfg.first_k_dense_replace > 0
    result = t.step(0, lambda start, count: rows())
    for (name, gate), load in zip(gates(t.model).items(), result.loads, strict=True):
        expected = before[name] + 1e-3 * torch.sign(load.float().mean() - load.float())
        assert torch.equal(gate.e_score_correction_bias, expected) and not torch.equal(expected, before[name])
        assert load.sum() == 4 * 24 * t.model.cfg.num_experts_per_tok  # of the whole step, not of a micro-batch


def test_a_frozen_gate_keeps_its_bias() -> None:
    """The bias steers what the gate's weights chose: with the weights frozen, moving it would change a frozen network."""
    t = trainer(freeze=("layers.*",))
    before = {n: v.clone() for n, v in t.model.state_dict().items()}
    t.step(0, lambda start, count: rows())
    moved = {n for n, v in t.model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {n for n in before if not n.startswith("layers.")}


@pytest.mark.parametrize("tied", [False, True])
def test_a_pattern_that_freezes_nothing_is_named_and_a_tied_head_is_the_embedding(tied: bool) -> None:
    cfg = TEST.replace(tie_word_embeddings=tied)
    with pytest.raises(ConfigError, match=r"freeze: 'model\.layers\.\*' is the name of no parameter"):
        trainer(cfg, freeze=("norm.*", "model.layers.*"))
    model = trainer(cfg, freeze=("lm_head.*",)).model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_tokens.weight" if tied else "lm_head.weight"}


def test_alpha_does_not_come_from_a_model_config_that_lacks_it() -> None:
    """Megatron-Bridge #5165: the released config.json has no aux_loss_alpha, and a default of 0 crept in."""
    cfg = resolve(RunConfig(out="", data=DataConfig(train=(Source("s"),)), steps=1000, batch=1, model="deepseek-v3"),
                  kind="pretrain", cuda=False, cores=1)  # fmt: skip
    assert cfg.balance.alpha == 1e-4


def gate_gradients(t: Trainer) -> dict[str, torch.Tensor]:
    r = rows()
    t.gradients(0, Targets(*(torch.from_numpy(a) for a in r)))
    return {n: g.weight.grad.clone() for n, g in gates(t.model).items()}  # type: ignore[union-attr]


def test_the_balance_loss_reaches_the_gates_with_its_own_factor_for_any_micro_batch() -> None:
    """minimind #140, OLMoE #45: computed and unused, or over the wrong denominator. The gradient at alpha minus that at 0 is
    alpha times the gradient of the mean over all sequences."""
    clip = OptimConfig(warmup_steps=0, clip=1e9)
    none = gate_gradients(trainer(balance=BalanceConfig(alpha=0.0), optim=clip))
    model = build(TEST, 0)
    out = losses(
        model, Targets(*(torch.from_numpy(a) for a in rows())), torch.ones(2), mask_documents=False, balance_share=1.0
    )
    out.balance.backward()
    alone = {n: g.weight.grad for n, g in gates(model).items()}
    for micro in (1, 2, 4):
        some = gate_gradients(trainer(balance=BalanceConfig(alpha=2.0), optim=clip, micro_batch=micro))
        for name in none:
            assert alone[name] is not None
            assert torch.allclose(some[name] - none[name], 2.0 * alone[name], atol=1e-4), (name, micro)  # type: ignore[operator]


def test_no_balance_loss_hides_in_the_network() -> None:
    """NeMo-RL #3169: a default of 0.001 in the model wrecked RL. Whatever a config.json says, only `losses` adds one."""
    tokens = torch.randint(0, 256, (2, 12))
    grads = []
    for extra in ({}, {"aux_loss_alpha": 0.5, "seq_aux": True}):
        model = build(ModelConfig.from_released({**TEST.to_json(), **extra}), 0)
        model(tokens).float().square().sum().backward()
        grads.append(torch.cat([g.weight.grad.flatten() for n, g in gates(model).items() if "mtp" not in n]))  # type: ignore[union-attr]
    assert torch.equal(*grads)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32])
def test_the_bias_survives_a_checkpoint_in_fp32(to: torch.dtype, tmp_path: Path) -> None:
    """Megatron-Bridge #4657, vLLM #23640, mlx-lm #67: lost or cast to bf16."""
    model = build(TEST, 0)
    for gate in gates(model).values():
        gate.e_score_correction_bias.copy_(5 + 1e-3 * torch.randn(TEST.n_routed_experts))  # bf16 would round to 1/32
    save_model(model, tmp_path / "m", dtype=to)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = gates(load_model(tmp_path / "m", dtype=dtype))
        for name, gate in gates(model).items():
            bias = loaded[name].e_score_correction_bias
            assert bias.dtype == torch.float32 and torch.equal(bias, gate.e_score_correction_bias)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_a_common_offset_of_all_biases_changes_nothing(groups: tuple[int, int]) -> None:
    """torchtitan #1506, and released biases near 5: neither a zero mean nor smallness may be assumed. No recentring, so an
    update moves the mean by gamma at most."""
    bias = torch.randn(16) * 0.1
    logits = untied(torch.randn(200, 16), bias, groups[0])
    plain, moved, back = (route(logits, bias + c, 4, *groups) for c in (0.0, 8.0, -8.0))
    for other in (moved, back):
        assert torch.equal(plain[1].sort(-1).values, other[1].sort(-1).values)
        assert torch.allclose(plain[0].sort(-1).values, other[0].sort(-1).values)


def test_shrinking_all_affinities_does_not_lower_the_balance_loss() -> None:
    """Megatron-LM #1545, OLMo-core #255: an epsilon of 1e-20 that a sigmoid router can hide below."""
    scores = torch.rand(48, 8).requires_grad_()
    full = balance.sequence_balance_loss(scores, 24, 2)
    for factor in (1e-3, 1e-15, 1e-25, 1e-36):
        assert balance.sequence_balance_loss(scores * factor, 24, 2).item() == pytest.approx(full.item(), rel=1e-3)
    gone = balance.sequence_balance_loss(torch.zeros(48, 8).requires_grad_(), 24, 2)
    gone.backward()
    assert gone.isfinite() and gone.item() == pytest.approx(1.0)


def test_the_mtp_module_reads_the_state_after_the_final_norm() -> None:
    """torchtitan feeds the state before it, checkpoints expect the one after (ATOM #1764): `model/mtp.py` says why."""
    model = build(TEST, 0)
    seen: list[torch.Tensor] = []
    model.mtp[0].hnorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = torch.randint(0, 256, (2, 14))
    with torch.no_grad():
        h, _ = model.hidden(tokens[:, :12])
        last: list[torch.Tensor] = []
        model.norm.register_forward_hook(lambda module, args, out: last.append(out))
        losses(model, Targets(tokens, torch.ones(2, 14), torch.ones(2, 14)), torch.ones(2), mask_documents=False,
               balance_share=1.0)  # fmt: skip
    assert torch.equal(seen[0], last[0]) and torch.equal(seen[0], h)


def test_the_mtp_loss_is_a_mean_over_its_targets_and_weighs_lambda() -> None:
    """Megatron-LM #1532: summed instead of averaged. Twice the rows, the same loss; the total is lm + lambda mtp."""
    t = trainer(balance=BalanceConfig(alpha=0.0))
    once = t.gradients(0, Targets(*(torch.from_numpy(a) for a in rows()))).values
    twice = Rows(*(np.concatenate([a, a]) for a in rows()))
    again = t.gradients(0, Targets(*(torch.from_numpy(a) for a in twice))).values
    assert torch.allclose(once[:3], again[:3], rtol=1e-4)
    assert once[0].item() == pytest.approx(once[1].item() + 0.3 * once[2].item(), rel=1e-6)


@pytest.mark.parametrize("width", [128, 640, 768, 896])
def test_scales_of_any_number_of_blocks_are_read_right(width: int) -> None:
    """pytorch #166752: block-wise products went wrong in silence where K / 128 is no multiple of 4."""
    x, w = torch.randn(16, width), torch.randn(256, width)
    w[:, -128:] *= 1e4  # the last block's scale is another
    codes, scale = quantize_blocks(w)
    for backend in dynamic_backends.names():
        if backend == "triton":
            continue  # its interpreter is compared in test_formats.py
        y = dynamic_backends.get(backend)(x, codes, scale)
        assert (y - x @ w.T).norm() < 0.05 * (x @ w.T).norm(), backend


def test_the_router_computes_in_fp32_under_bf16() -> None:
    """DeepSeek-V3 #696: bf16 affinities tie and flip. The gate equals the fp32 product of its bf16 inputs."""
    gate = next(iter(gates(build(TEST, 0)).values()))
    x = torch.randn(300, TEST.hidden_size).bfloat16()
    chosen_gates, _, scores = gate(x)
    exact = (x.double() @ gate.weight.double().T).sigmoid()
    assert scores.dtype == chosen_gates.dtype == torch.float32
    assert (scores - exact).abs().max() < 1e-6
    rounded = (x @ gate.weight.bfloat16().T).sigmoid()
    assert len(rounded.unique()) < len(scores.unique())  # what bf16 would have tied
