"""The Triton experts in the interpreter (or on a GPU where there is one): equal to the loop, row by row the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from rorqual.errors import BackendUnavailable
from rorqual.ops import experts, fp8
from rorqual.ops.formats import PLAIN, Weight, WeightFormat, experts_by_linear
from rorqual.ops.packed import PackedIntegers
from rorqual.ops.triton import experts as kernels
from rorqual.ops.triton.experts import FEW, Streams
from rorqual.ops.triton.fp8 import tile_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: experts.BOUND, torch.float16: 2e-3}
# N, D, F, E, K: one token; blocks that divide nothing; exactly at the limit; more than a tile of one expert; K = E.
FEW_SLOTS = [(1, 24, 256, 9, 3), (2, 270, 22, 4, 2), (8, 24, 16, 8, 2), (1, 5, 3, 2, 1)]
MANY_SLOTS = [(9, 256, 128, 8, 2), (20, 300, 70, 4, 3), (70, 40, 130, 3, 1), (7, 64, 16, 3, 3), (50, 16, 8, 40, 2)]


def plainly(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel on plain weights."""

    @functools.wraps(run)
    def call(x: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
        return run(x, Weight.plain(up.unflatten(1, (2, -1))), Weight.plain(down), *rest)

    return call


few_slots, many_slots, routed_experts = map(plainly, (kernels.few_slots, kernels.many_slots, kernels.routed_experts))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The last expert stays idle where it can."""
    n, d, width, e, k = shape
    x, up = torch.randn(n, d), torch.randn(e, 2 * width, d) / d**0.5
    down, gates = torch.randn(e, d, width) / width**0.5, torch.rand(n, k)
    chosen = torch.rand(n, max(k, e - 1)).topk(k).indices
    return tuple(t.to(DEVICE) for t in (x.to(dtype), up.to(dtype), down.to(dtype), gates, chosen))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.float() - want).abs().max() <= BOUND[dtype] * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("shape", FEW_SLOTS + MANY_SLOTS)
def test_triton_equals_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, _, _, e, k = shape
    assert (n * k <= FEW[PLAIN] * e) == (shape in FEW_SLOTS)
    x, up, down, gates, chosen = inputs(shape, dtype)
    want = experts.experts_loop(x.float(), up.float(), down.float(), gates, chosen)
    close(experts.experts_backends.get("triton")(x, up, down, gates, chosen), want, dtype)
    residual = torch.randn_like(x)
    close(routed_experts(x, up, down, gates, chosen, residual), want + residual.float(), dtype)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, torch.float32), (2, torch.float32), (2, torch.float16)],  # the interpreter is slow, slowest in 16 bits
)
@pytest.mark.parametrize("shape", [*FEW_SLOTS, MANY_SLOTS[1]])
def test_the_shared_expert_joins(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, up, down, gates, chosen = inputs(shape, dtype)
    width, D = count * down.shape[2], x.shape[1]
    one, two = torch.randn(2, width, D, device=DEVICE).div(D**0.5).to(dtype)
    back = torch.randn(D, width, device=DEVICE).div(width**0.5).to(dtype)
    residual = torch.randn_like(x)
    want = experts.experts_loop(x.float(), up.float(), down.float(), gates, chosen) + residual.float()
    want += linear(silu(linear(x.float(), one.float())) * linear(x.float(), two.float()), back.float())
    close(routed_experts(x, up, down, gates, chosen, residual, tuple(map(Weight.plain, (one, two, back)))), want, dtype)


@pytest.mark.parametrize("run", [few_slots, many_slots])
@pytest.mark.parametrize("chosen", [0, 4], ids=lambda e: f"all to {e}")
def test_all_tokens_may_choose_one_expert(run: Callable[..., Tensor], chosen: int) -> None:
    x, up, down, gates, _ = inputs((19, 24, 16, 5, 1), torch.float32)
    one = torch.full((19, 1), chosen, device=DEVICE)
    close(run(x, up, down, gates, one, None), experts.experts_loop(x, up, down, gates, one), torch.float32)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("run", [few_slots, many_slots])
def test_a_row_alone_is_the_row_in_its_batch(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    shape = (10, 70, 20, 4, 1) if run is few_slots else (20, 200, 72, 4, 3)
    x, up, down, gates, chosen = inputs(shape, dtype)
    batch = run(x, up, down, gates, chosen, x)
    for n in (0, 7, len(x) - 1):
        row = slice(n, n + 1)
        assert torch.equal(run(x[row], up, down, gates[row], chosen[row], x[row]), batch[row])


@pytest.mark.parametrize("n", [2, 20])
def test_nan_stays_in_its_row_and_weights_may_have_another_dtype(n: int) -> None:
    x, up, down, gates, chosen = inputs((n, 32, 16, 6, 2), torch.float32)
    x[1, 3] = float("nan")
    half = up.half(), down.half()
    got = routed_experts(x, *half, gates, chosen)
    assert torch.equal(got.isnan().any(1), x.isnan().any(1))
    keep = ~x.isnan().any(1)
    close(got[keep], experts.experts_loop(x, *(w.float() for w in half), gates, chosen)[keep], torch.float32)


def test_rows_and_experts_may_be_slices_of_larger_tensors() -> None:
    x, up, down, gates, chosen = inputs((8, 32, 16, 8, 2), torch.float32)
    part = x[::2, :24], up[:, :, :24], down[:, :24], gates[::2], chosen[::2]
    want = experts.experts_loop(*(t.contiguous() for t in part))
    for run in (few_slots, many_slots):
        close(run(*(t if i < 3 else t.contiguous() for i, t in enumerate(part)), None), want, torch.float32)
    assert routed_experts(x[:0], up, down, gates[:0], chosen[:0]).shape == (0, 32)


def test_blocks_change_speed_only() -> None:
    values = inputs((2, 70, 40, 8, 2), torch.float32)
    want = experts.experts_loop(*values)
    for how in (Streams(8, 64, 16, 128), Streams(4, 512, 4, 256, 8)):
        close(few_slots(*values, None, None, how), want, torch.float32)


def test_a_gradient_is_refused() -> None:
    x, up, down, gates, chosen = inputs((1, 8, 8, 4, 2), torch.float32)
    with pytest.raises(BackendUnavailable, match="no gradient"):
        experts.experts_triton(x, up.requires_grad_(), down, gates, chosen)
    with torch.no_grad():
        experts.experts_triton(x, up, down, gates, chosen)


FORMS = [fp8.Fp8Blocks(), PackedIntegers(4), PackedIntegers(8)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 192, 160, 6, 2), torch.float16),
        ((1, 192, 160, 6, 2), torch.float32),
        ((3, 320, 32, 6, 2), torch.float32),
        ((9, 160, 32, 3, 2), torch.float32),
    ],
)
def test_stored_experts_equal_the_loop(shape: tuple[int, ...], form: WeightFormat, dtype: torch.dtype) -> None:
    x, up, down, gates, chosen = inputs(shape, dtype)
    stored = form.pack(up.unflatten(1, (2, -1))), form.pack(down)
    residual = torch.randn_like(x)
    # The definition multiplies by weights rounded to x's dtype, except FP8 blocks, which are scaled after multiplying.
    want = experts_by_linear(x.float(), gates, chosen, *((form, parts) for parts in stored))
    weights = tuple(form.weight(parts) for parts in stored)
    assert kernels.streams_experts(x, *weights, None)
    for run in (kernels.few_slots, kernels.many_slots):
        close(run(x, *weights, gates, chosen, residual), want + residual.float(), dtype)
    close(tile_experts(x, *weights, gates, chosen), want, dtype)
    close(tile_experts(x, *weights, gates, chosen, fixed=True), want, dtype)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("n", [2, 20])
def test_a_stored_shared_expert_joins(n: int, form: WeightFormat) -> None:
    x, up, down, gates, chosen = inputs((n, 160, 64, 4, 2), torch.float32)
    D, width = 160, 128
    own = [form.pack(torch.randn(shape, device=DEVICE) / 12) for shape in ((width, D), (width, D), (D, width))]
    gate, up_own, back = (form.dense(parts, torch.float32) for parts in own)
    stored = form.pack(up.unflatten(1, (2, -1))), form.pack(down)
    want = experts_by_linear(x, gates, chosen, *((form, parts) for parts in stored))
    want += linear(silu(linear(x, gate)) * linear(x, up_own), back)
    weights = tuple(form.weight(parts) for parts in stored)
    got = kernels.routed_experts(x, *weights, gates, chosen, None, tuple(form.weight(parts) for parts in own))
    close(got, want, torch.float32)
