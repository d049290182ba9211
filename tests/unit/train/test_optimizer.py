"""The optimisers against torch's own and a second computation, and the average of the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from rorqual.ops.adamw import BOUND, adamw_backends
from rorqual.train.config import EMAConfig, OptimConfig
from rorqual.train.ema import WeightAverage
from rorqual.train.optimizer import Optimizer
from tests.parity import build


def with_gradients(model: Transformer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("backend", adamw_backends.names())
def test_one_update_is_torchs(backend: str) -> None:
    """Three steps with fp32 moments against torch.optim.AdamW on the same numbers."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(33, 7), torch.nn.Parameter(torch.empty(33, 7))
    theirs.data.copy_(ours)
    m, v = torch.zeros(33, 7), torch.zeros(33, 7)
    adam = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in (1, 2, 3):
        theirs.grad = torch.randn(33, 7)
        adamw_backends.get(backend)(ours, theirs.grad, m, v, step, 0.1, (0.9, 0.95), 1e-8, 0.1)
        adam.step()
        assert (ours - theirs.data).abs().max() <= BOUND


@pytest.mark.parametrize("backend", adamw_backends.names())
def test_a_slow_second_moment_loses_no_digits(backend: str) -> None:
    """1 - beta2 in fp32 would be off by a ten-thousandth at 0.9999."""
    weight, grad, m, v = torch.zeros(40), torch.randn(40), torch.zeros(40), torch.zeros(40)
    adamw_backends.get(backend)(weight, grad, m, v, 1, 0.1, (0.9, 0.9999), 1e-8, 0.0)
    assert torch.allclose(v, (grad.double().square() * (1 - 0.9999)).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", adamw_backends.names())
def test_an_update_clips_and_copies_on_the_way(backend: str) -> None:
    """A 16-bit gradient and a factor are their product in fp32; the copy is the new weight rounded."""
    torch.manual_seed(0)
    weight, grad, factor = torch.randn(50, 60), torch.randn(50, 60).half(), torch.tensor(0.37)
    copy, other = torch.empty(50, 60).half(), weight.clone()
    state, plain = torch.zeros(2, 50, 60), torch.zeros(2, 50, 60)
    for step in (1, 2):
        adamw_backends.get(backend)(weight, grad, *state, step, 0.1, (0.9, 0.95), 1e-8, 0.1, factor, copy)
        adamw_backends.get("reference")(other, grad.float() * 0.37, *plain, step, 0.1, (0.9, 0.95), 1e-8, 0.1)
    assert (weight - other).abs().max() <= BOUND and torch.equal(copy, weight.half())


def test_narrow_moments_are_the_wide_ones_rounded_once() -> None:
    """bf16 m and v after a step equal the fp32 update of the bf16 ones before it, rounded to nearest."""
    g = torch.Generator().manual_seed(1)
    m, v = torch.zeros(500, dtype=torch.bfloat16), torch.zeros(500, dtype=torch.bfloat16)
    weight = torch.zeros(500)
    for step in range(1, 6):
        grad = torch.randn(500, generator=g)
        m64 = 0.9 * m.double() + 0.1 * grad.double()
        v64 = 0.95 * v.double() + 0.05 * grad.double() ** 2
        adamw_backends.get("reference")(weight, grad, m, v, step, 1e-3, (0.9, 0.95), 1e-8, 0.0)
        for mine, exact in ((m, m64), (v, v64)):
            assert ((mine.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-30).all()
    assert weight.dtype == torch.float32


def test_bf16_moments_follow_fp32_ones() -> None:
    """Over 40 steps of noisy gradients, the weights differ from those of fp32 moments by little of what they moved."""
    model = Transformer(ModelConfig.load("test"))
    start = copy.deepcopy(model.state_dict())
    ends = []
    for moments in ("float32", "bfloat16"):
        model.load_state_dict(start)
        optimizer = Optimizer(OptimConfig(moments=moments), model)  # type: ignore[arg-type]
        for step in range(40):
            with_gradients(model, step)
            optimizer.step(1e-3)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        if moments == "bfloat16":
            state = optimizer.state_dict()["narrow"]
            assert {t.dtype for t in (*state["m"], *state["v"])} == {torch.bfloat16}
    moved = ends[0] - torch.cat([start[n].flatten() for n, _ in model.named_parameters()])
    assert 0 < (ends[0] - ends[1]).norm() < 0.02 * moved.norm()


def test_muon_orthogonalises_each_matrix_alone() -> None:
    """Each matrix, for experts each gate, up and down, moves against the polar factor of its own gradient (by SVD), as far
    as AdamW would. Embedding, head and norms move as under AdamW: every entry by the learning rate."""
    model = build(ModelConfig.load("test"), 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(OptimConfig(name="muon", weight_decay=0.0), model)
    with_gradients(model, 0)
    optimizer.step(0.01)
    for name, p in model.named_parameters():
        moved = p.detach() - before[name]
        if "embed_tokens" in name or "lm_head" in name or p.ndim == 1:
            assert torch.allclose(moved.abs(), torch.full_like(moved, 0.01), rtol=2e-2), name
            continue
        assert p.grad is not None
        for matrix, grad in zip(parts(name, moved), parts(name, p.grad), strict=True):
            u, _, v = torch.linalg.svd(grad, full_matrices=False)
            assert torch.cosine_similarity(matrix.flatten(), -(u @ v).flatten(), dim=0) > 0.93, name
            assert matrix.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3), name


def parts(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The matrices in a parameter."""
    if tensor.ndim == 2:
        return [tensor]
    return list(tensor.unflatten(1, (2, -1)).flatten(0, 1) if "gate_up" in name else tensor)


@pytest.mark.parametrize(
    "options", [{}, {"moments": "bfloat16"}, {"name": "muon"}, {"name": "muon", "moments": "bfloat16"}]
)
def test_a_saved_optimiser_goes_on_to_the_bit(options: dict[str, str]) -> None:
    model = Transformer(ModelConfig.load("test"))
    optimizer = Optimizer(OptimConfig(**options), model)  # type: ignore[arg-type]
    for step in range(2):
        with_gradients(model, step)
        optimizer.step(1e-3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with_gradients(model, 7)
    optimizer.step(1e-3)
    other = Transformer(ModelConfig.load("test"))
    other.load_state_dict(weights)
    resumed = Optimizer(OptimConfig(**options), other)  # type: ignore[arg-type]
    assert resumed.bytes_to_come > 0 or options == {"moments": "bfloat16"}
    resumed.load_state_dict(state)
    with_gradients(other, 7)
    resumed.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="state of"):
        resumed.load_state_dict({"other": {}})


def test_the_average_of_the_weights_is_one() -> None:
    model = Transformer(ModelConfig.load("test"))
    average = WeightAverage(EMAConfig(decay=0.9, every=2), model)
    expected = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    for step in range(1, 7):
        average.before_update()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.after_update(step)
        if step % 2 == 0:
            expected = {
                n: 0.81 * e + 0.19 * p.detach() for (n, e), p in zip(expected.items(), model.parameters(), strict=True)
            }
    mine = {n: p.detach().clone() for n, p in model.named_parameters()}
    with average.in_place():
        for name, p in model.named_parameters():
            assert torch.allclose(p.double(), expected[name], atol=1e-5), name
    assert all(torch.equal(p, mine[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"moments": "bfloat16"}, {"name": "muon"}])
def test_frozen_parameters_are_none_of_its_business(options: dict[str, str]) -> None:
    """Neither decayed nor remembered, in whole stacks of experts either; nothing to train is an error."""
    model = Transformer(ModelConfig.load("test"))
    trained = {n for n, _ in model.named_parameters() if "experts" in n or n == "norm.weight"}
    whole = Optimizer(OptimConfig(**options), model).bytes_to_come  # type: ignore[arg-type]
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    optimizer = Optimizer(OptimConfig(**options), model)  # type: ignore[arg-type]
    assert optimizer.bytes_to_come < whole or options == {"moments": "bfloat16"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with_gradients(model, 0)  # what a frozen parameter has for a gradient must not matter either
    optimizer.step(1e-3)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained
    for name, p in model.named_parameters():
        p.requires_grad_(name == "embed_tokens.weight")
    with_gradients(model, 1)
    Optimizer(OptimConfig(**options), model).step(1e-3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        Optimizer(OptimConfig(**options), model.requires_grad_(False))  # type: ignore[arg-type]
