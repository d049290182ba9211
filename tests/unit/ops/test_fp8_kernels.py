"""The kernels of FP8 training against the emulation, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rorqual.ops.fp8 import dequantize_blocks, dequantize_tiles
from rorqual.ops.fp8_train import (
    Recipe,
    ReferenceQuantiser,
    TritonQuantiser,
    fp8_quantisers,
    fp8_train_experts,
    product_reference,
    round_e5m6,
)

pytest.importorskip("rorqual.ops.triton.fp8_train", reason="triton is not installed")
from rorqual.ops import fp8_experts
from rorqual.ops.triton import fp8_products
from rorqual.ops.triton import fp8_train as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 128), (5, 200), (260, 130), (128, 384)]
KERNELS = [fp8_quantisers.get(name) for name in fp8_quantisers.names() if name != "reference"]
quantisers = pytest.mark.parametrize("quantiser", KERNELS)
"""Gluon's on a Hopper card alone: elsewhere test_fp8_quantise.py runs it."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def same(ours: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(ours[1], exact[1]) and torch.equal(ours[0].float(), exact[0].float())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@quantisers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", [None, "ue8m0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_along_both_ways_in_one_pass(
    shape: tuple[int, int], fmt: str | None, dtype: torch.dtype, quantiser: type[TritonQuantiser]
) -> None:
    x = (draw(*shape) * torch.logspace(-3, 3, shape[1], device=DEVICE)).to(dtype)
    x[:, :3] = 0
    x[-1] = 0
    for ours, exact in zip(quantiser.both(x, fmt), ReferenceQuantiser.both(x, fmt), strict=True):
        same(ours, exact)
    wide = torch.cat((x, x), 1)[:, : shape[1]]
    same(quantiser.tiles(wide, fmt), ReferenceQuantiser.tiles(x, fmt))
    kept = ReferenceQuantiser.tiles(x, fmt)
    codes, scale = kept[0], kept[1].T.contiguous().T
    same(quantiser.tokens((codes, scale), None), ReferenceQuantiser.tokens(kept, None))


@quantisers
@pytest.mark.parametrize("fmt", [None, "ue8m0"])
def test_an_infinity_is_seen(fmt: str | None, quantiser: type[TritonQuantiser]) -> None:
    """Its tile may be lost, but not become small numbers that nobody would notice."""
    x = draw(4, 256)
    x[1, 3] = float("inf")
    codes, scale = quantiser.tiles(x, fmt)
    read = codes.float().view(4, 2, 128) * scale[..., None]
    assert read[[0, 2, 3]].isfinite().all() and read[1, 1].isfinite().all() and not read[1, 0].isfinite().all()


@quantisers
def test_powers_of_two_stay_themselves(quantiser: type[TritonQuantiser]) -> None:
    x = torch.zeros(1, 128, device=DEVICE)
    for largest, scale in ((448.0, 1.0), (449.0, 2.0), (224.0, 0.5), (448 * 2.0**-20, 2.0**-20)):
        x[0, 5] = largest
        assert quantiser.tiles(x, "ue8m0")[1].item() == scale


def test_e5m6() -> None:
    x = draw(20, 300) * torch.logspace(-9, 9, 300, device=DEVICE)
    x[3] = 0
    x[5, 7], x[6, :128] = 127.4, 2.0**-80
    assert torch.equal(kernels.round_e5m6(x), round_e5m6(x))


def test_swiglus_gradient() -> None:
    """From gate and up in tiles of a width that is no whole tiles."""
    gate, up = (TritonQuantiser.tiles(draw(20, 200, seed=i), None) for i in (1, 2))
    wide = [dequantize_tiles(*t).requires_grad_() for t in (gate, up)]
    h, dh = F.silu(wide[0]) * wide[1], draw(20, 200)
    h.backward(dh)
    ours, dgu = kernels.swiglu_backward(gate, up, dh)
    assert relative(ours, h.detach()) < 1e-6
    for mine, exact in zip(dgu.chunk(2, -1), wide, strict=True):
        assert exact.grad is not None and relative(mine, exact.grad) < 1e-6


@quantisers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (130, 260), (64, 72)])
def test_a_weight_and_its_transpose(
    shape: tuple[int, int], dtype: torch.dtype, quantiser: type[TritonQuantiser]
) -> None:
    w = draw(*shape).to(dtype)
    for ours, exact in zip(quantiser.weight(w), ReferenceQuantiser.weight(w), strict=True):
        same(ours, exact)
    stack = torch.stack((w, 3 * w))
    (codes, scale), (turned, turned_scale) = quantiser.weight(stack)
    alone, back = quantiser.weight(3 * w)
    assert torch.equal(codes[1].float(), alone[0].float()) and torch.equal(scale[1], alone[1])
    assert torch.equal(turned[1].float(), back[0].float()) and torch.equal(turned_scale[1], back[1])


@pytest.mark.parametrize("shape", [(40, 128, 130), (130, 300, 20), (16, 4096, 16)])
def test_products(shape: tuple[int, int, int]) -> None:
    """Blocks and tiles; a long sum, which is split, too."""
    M, K, N = shape
    a = ReferenceQuantiser.tiles(draw(M, K), None)
    a = a[0], a[1].T.contiguous().T
    blocks, tiles = ReferenceQuantiser.weight(draw(N, K))[0], ReferenceQuantiser.tiles(draw(N, K, seed=1), None)
    tiles = tiles[0], tiles[1].T.contiguous().T
    for b, is_blocks in ((blocks, True), (tiles, False)):
        ours = fp8_products.product(a, b, is_blocks, torch.float32)
        exact = dequantize_tiles(*a) @ (dequantize_blocks(*b) if is_blocks else dequantize_tiles(*b)).T
        assert relative(ours, exact) <= (1e-3 if DEVICE == "cuda" else 1e-5)
        assert relative(product_reference(a, b, is_blocks), exact) <= 1e-5


def test_rows_are_padded_to_tiles_of_one_expert() -> None:
    chosen = torch.tensor([[0, 3], [3, 1], [0, 3]] * 50, device=DEVICE)
    where = fp8_experts.places(chosen, 4)
    slots = where.slot_P[where.slot_P >= 0]
    assert slots.sort().values.tolist() == list(range(300))
    assert torch.equal(where.slot_P[where.place_M.long()], torch.arange(300, dtype=torch.int32, device=DEVICE))
    experts = chosen.flatten()[where.slot_P.clamp_min(0).long()].view(-1, 128)
    real = where.slot_P.view(-1, 128) >= 0
    assert ((experts == where.tile_expert[:, None]) | ~real).all() and where.tile_ends_E.tolist() == [1, 2, 2, 4]
    assert (where.tile_expert[4:] == 4).all() and not real[4:].any()


@pytest.mark.parametrize("skew", [False, True])
def test_grouped_experts_are_the_loop(skew: bool) -> None:
    """Output and gradients. skew: one expert gets no token, another most."""
    N, D, W, E, K = 150, 128, 128, 4, 2
    chosen = draw(N, E - skew).topk(K).indices
    if skew:
        chosen[:140] = torch.tensor([0, 2], device=DEVICE)
    gates = torch.rand(N, K, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = [draw(N, D), draw(E, 2 * W, D) / 11, draw(E, D, W) / 11, gates]
    results = []
    for run in (fp8_experts.fp8_grouped_experts, fp8_train_experts):
        leaves = [t.clone().requires_grad_() for t in inputs]
        more = {} if run is fp8_experts.fp8_grouped_experts else {"recipe": Recipe(backend="expanded")}
        out = run(*leaves, chosen, **more)
        out.backward(draw(N, D, seed=9))
        results.append([out.detach(), *(t.grad for t in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert ours is not None and exact is not None and ours.dtype == exact.dtype
        # Where a sum rounds differently, a code of what is quantised next moves by a step.
        assert relative(ours, exact) <= 1e-2


@pytest.mark.parametrize("constant", [True, False])
def test_a_product_and_its_correction_are_a_division(constant: bool) -> None:
    """`fp8_train._over` as the card computes it, its fused products in 64 bits of mantissa here: the rounded quotient for
    any mantissas, near a tie of E4M3 too. Without the correction it often is not."""
    random = np.random.default_rng()
    count = 1 << 20
    divisor = np.full(count, 448, np.float32) if constant else np.float32(2.0) ** random.uniform(-60, 20, count)
    divisor = divisor.astype(np.float32)
    value = (random.standard_normal(count) * divisor * 100).astype(np.float32)
    ties = random.integers(16, 32, count // 2) * np.float32(0.5) + np.float32(0.25)
    value[: count // 2] = ties.astype(np.float32) * divisor[: count // 2]
    inverse, wide = np.float32(1) / divisor, np.longdouble
    near = value * inverse
    left = (value.astype(wide) - near.astype(wide) * divisor.astype(wide)).astype(np.float32)
    quotient = (near.astype(wide) + left.astype(wide) * inverse.astype(wide)).astype(np.float32)
    np.testing.assert_array_equal(quotient, value / divisor)
    assert (near != value / divisor).mean() > 0.01
