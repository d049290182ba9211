"""The CPU kernels of a training step that have no other reference test: norms, SwiGLU; and what all of them promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.ops import rms_norm
from rorqual.ops.attention import attend_native, attend_sdpa
from rorqual.ops.cross_entropy import cross_entropy_native
from rorqual.ops.experts import experts_native
from rorqual.ops.native import training as native
from rorqual.train.loss import Targets, losses
from tests.unit.ops.test_ops import close, gradients

pytestmark = pytest.mark.skipif(native.native_missing() is not None, reason=str(native.native_missing()))

BOUND = 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 70, 16), (130, 100)])
def test_norms_and_swiglu_are_their_definitions(shape: tuple[int, ...]) -> None:
    x, y, weight = torch.randn(shape), torch.randn(shape) * 3, torch.randn(shape[-1])
    ours = gradients(lambda x, w: native.rms_norm(x, w, 1e-6), x, weight)
    close(ours, gradients(lambda x, w: rms_norm.reference(x, w, 1e-6), x, weight), BOUND)
    close(gradients(native.swiglu, x, y), gradients(lambda g, u: F.silu(g) * u, x, y), BOUND)


def test_gradients_that_lie_otherwise_in_memory() -> None:
    """What comes back through a transpose is not contiguous."""
    x, weight = torch.randn(5, 48), torch.randn(48)
    for ours, plain in (
        (lambda x: native.rms_norm(x, weight, 1e-6).T, lambda x: rms_norm.reference(x, weight, 1e-6).T),
        (lambda x: native.swiglu(*x.chunk(2, 1)).T, lambda x: (F.silu(x[:, :24]) * x[:, 24:]).T),
    ):
        close(gradients(ours, x), gradients(plain, x), BOUND)


def heads(*widths: int) -> list[Tensor]:
    """As the network makes them: [B, T, H, width], seen as [B, H, T, width]."""
    return [torch.randn(2, 130, 3, w).transpose(1, 2) for w in widths]


def test_a_query_that_sees_nothing_and_one_that_is_no_number() -> None:
    q, k, v = heads(32, 32, 16)
    visible = torch.ones(130, 130).tril().bool().expand(2, -1, -1).clone()
    visible[0, 3] = visible[1, 100:] = False
    out, *grads = gradients(lambda q, k, v: attend_native(q, k, v, 0.2, visible), q, k, v)
    assert out[0, :, 3].eq(0).all() and out[1, :, 100:].eq(0).all()
    assert all(g.isfinite().all() for g in grads) and grads[0][1, :, 100:].eq(0).all()
    q[0, 0, 5] = float("nan")
    out, *_ = gradients(lambda q, k, v: attend_native(q, k, v, 0.2, None), q, k, v)
    assert out[0, 0, 5].isnan().all() and out.isnan().sum() == 16


def test_a_gradient_that_is_one_number_for_all() -> None:
    """Its strides are 0: what the kernel reads is a copy, which must live until it is read."""
    q, k, v = (torch.randn(1, 4, 64, 16, requires_grad=True) for _ in range(3))
    attend_native(q, k, v, 0.25, None).sum().backward()
    assert v.grad is not None and (v.grad.sum(2) - 64).abs().max() < 1e-3


def test_no_second_derivative_is_an_error() -> None:
    q, x = torch.randn(1, 2, 8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    for out, leaf in (
        (attend_native(q, q * 1.0, q * 1.0, 0.2, None), q),
        (native.rms_norm(x, torch.ones(16), 1e-6), x),
        (native.swiglu(x, x * 2.0), x),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_a_target_outside_the_vocabulary_is_an_error() -> None:
    h, head = torch.randn(4, 8), torch.randn(50, 8)
    for target in (-100, -1, 50):
        with pytest.raises(IndexError, match="vocabulary of 50"):
            cross_entropy_native(h, head, torch.tensor([1, target, 2, 3]), torch.ones(4))


def test_selective_recomputation_keeps_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward of the kernel, although what comes before it is computed twice."""
    calls = []
    told = native._told
    monkeypatch.setattr(native, "_told", lambda *args, **heads: calls.append("dq" in heads) or told(*args, **heads))
    cfg = ModelConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, intermediate_size=40, first_k_dense_replace=1, moe_intermediate_size=8,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Transformer(cfg)
    for block in model.layers:
        block.recompute("selective")  # type: ignore[operator]
    model.hidden(torch.randint(0, 50, (2, 9)))[0].sum().backward()
    assert calls == [False, True]


def cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    x, head, chosen = torch.randn(300, 48), torch.randn(1000, 48), torch.rand(300, 8).topk(3).indices
    up, down, gates = torch.randn(8, 64, 48), torch.randn(8, 48, 32), torch.rand(300, 3)
    return {
        "attention": (lambda q, k, v: attend_native(q, k, v, 0.2, None), heads(32, 32, 16)),
        "loss": (lambda h, w: cross_entropy_native(h, w, torch.arange(300), torch.ones(300)), [x, head]),
        "experts": (lambda x, u, d, g: experts_native(x, u, d, g, chosen), [x, up, down, gates]),
        "norm": (lambda x, w: native.rms_norm(x, w, 1e-6), [x, torch.randn(48)]),
        "swiglu": (native.swiglu, [x, torch.randn(300, 48)]),
    }


@pytest.mark.parametrize("name", ["attention", "loss", "experts", "norm", "swiglu"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    function, inputs = cases()[name]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(function, *inputs))
    finally:
        torch.set_num_threads(before)
    # torch's own products may differ with its threads: only what the kernels alone compute is held to the bit.
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b) if name in ("attention", "norm", "swiglu") else torch.allclose(a, b, atol=1e-5)


def test_a_step_with_the_kernels_is_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it together, against torch's own operations: loss and every gradient."""
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, intermediate_size=40, moe_intermediate_size=20,
        n_routed_experts=8, num_experts_per_tok=3, num_nextn_predict_layers=1,
    )  # fmt: skip
    tokens = torch.randint(0, cfg.vocab_size, (3, 40 + cfg.num_nextn_predict_layers))
    rows = Targets(tokens, torch.ones_like(tokens).cumsum(1) // 13, torch.ones_like(tokens))
    counts = torch.full((1 + cfg.num_nextn_predict_layers,), 100.0)
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(native, "takes", lambda *tensors: False)
        torch.manual_seed(1)
        model = Transformer(cfg, experts="native" if kernels else "loop")
        loss = losses(model, rows, counts, mask_documents=True, balance_share=1.0)
        (loss.lm + loss.mtp + loss.balance).backward()
        found.append([loss.lm, *(p.grad for p in model.parameters() if p.grad is not None)])
    close(*found, 2e-5)


def test_torchs_attention_is_replaced_only_where_it_may_be() -> None:
    q, k, v = heads(32, 32, 16)
    assert native.attends(q, k, v, 0.2) and not native.attends(q, k[:, :, :100], v, 0.2)
    assert not native.attends(q, k, v, -0.2) and not native.attends(q, k[:, :1], v, 0.2)
    assert not native.attends(q.double(), k.double(), v.double(), 0.2) and not native.attends(*heads(24, 24, 16), 0.2)
    close([attend_sdpa(q, k, v, 0.2, None)], [attend_native(q, k, v, 0.2, None)], BOUND)
