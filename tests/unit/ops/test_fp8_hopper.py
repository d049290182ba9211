"""FP8 products in Gluon: their Python in a machine of the test's own. test_compiles.py compiles them for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rorqual.ops.fp8 import dequantize_blocks, dequantize_tiles
from rorqual.ops.fp8_train import ReferenceQuantiser
from tests.unit.ops.gluon_machine import Descriptor, Machine

pytest.importorskip("triton.experimental.gluon")
from rorqual.ops.triton import fp8_hopper


@pytest.fixture(params=[False, True], ids=["at once", "when waited for"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine, kernel = Machine(request.param), fp8_hopper.hopper_product_kernel.fn

    class Launched:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *args, num_warps, **constants: machine.launch(kernel, grid, *args, **constants)

    for name, value in machine.names("mbarrier", "tma").items():
        monkeypatch.setattr(fp8_hopper, name, value)
    for helper in ("_tile", "_load", "_multiply", "_added", "_store"):
        monkeypatch.setattr(fp8_hopper, helper, getattr(fp8_hopper, helper).fn)
    monkeypatch.setattr(fp8_hopper, "TensorDescriptor", Descriptor)
    monkeypatch.setattr(fp8_hopper, "processors", lambda device: 2)  # so that programs take several tiles
    for name in ("COLUMNS", "STAGES", "GROUP"):
        monkeypatch.setattr(fp8_hopper, name, Constant(getattr(fp8_hopper, name).value))
    monkeypatch.setattr(fp8_hopper, "hopper_product_kernel", Launched())
    return machine


class Constant(int):
    """A number for kernel and host."""

    @property
    def value(self) -> int:
        return int(self)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.logspace(-2, 2, shape[-1])


def tiles(x: torch.Tensor) -> Any:
    return ReferenceQuantiser.tiles(x, None)


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.isfinite().all() and (ours.double() - exact.double()).norm() <= 1e-5 * exact.double().norm()


@pytest.mark.parametrize("size", [(128, 128, 128), (5, 16, 16), (130, 640, 304), (300, 208, 528), (1154, 128, 300)])
def test_blocks_and_tiles(machine: Machine, size: tuple[int, int, int]) -> None:
    """Fewer steps than buffers, as many, and more; tiles that end beyond the last row and column; more row tiles than go
    through the columns together."""
    M, K, N = size
    a, w = tiles(draw(M, K)), draw(N, K)
    blocks, turned = ReferenceQuantiser.weight(w)
    near(
        fp8_hopper.product(a, blocks, True, torch.float32),
        dequantize_tiles(*a) @ dequantize_blocks(*blocks).T,
    )
    b = tiles(w)
    near(fp8_hopper.product(a, b, False, torch.float32), dequantize_tiles(*a) @ dequantize_tiles(*b).T)
    if N % 16 == 0:
        dy = tiles(draw(M, N))
        got = fp8_hopper.product(dy, turned, True, torch.float32)
        near(got, dequantize_tiles(*dy) @ dequantize_blocks(*turned).T)


def test_rows_by_expert(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert with two tiles, one with none, tiles of nobody; behind the last column lies another expert, and the sum does
    not end with a tile."""
    E, N, K = 3, 320, 400
    expert = torch.tensor([0, 0, 2, E, E], dtype=torch.int32)
    a = tiles(draw(len(expert) * 128, K))
    stack = [ReferenceQuantiser.weight(draw(N, K))[0] for _ in range(E)]
    codes, scales = (torch.stack([w[i] for w in stack]) for i in (0, 1))
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, float("nan"), **how))
    got = fp8_hopper.product(a, (codes, scales), True, torch.float32, expert)
    for tile, e in enumerate(expert.tolist()):
        rows = slice(tile * 128, tile * 128 + 128)
        if e == E:
            assert got[rows].isnan().all(), "written"
        else:
            near(got[rows], dequantize_tiles(*a)[rows] @ dequantize_blocks(*stack[e]).T)


def test_turned_weights_by_expert(machine: Machine) -> None:
    """A stack's transpose, whose scales lie across."""
    from rorqual.ops.fp8_train import TritonQuantiser

    E, N, K = 2, 256, 128
    w = torch.stack([draw(N, K) for _ in range(E)])
    _, (codes, scales) = TritonQuantiser.weight(w)
    dy = tiles(draw(2 * 128, N))
    expert = torch.tensor([1, 0], dtype=torch.int32)
    got = fp8_hopper.product(dy, (codes, scales), True, torch.float32, expert)
    for tile, e in enumerate(expert.tolist()):
        rows = slice(tile * 128, tile * 128 + 128)
        near(got[rows], dequantize_tiles(*dy)[rows] @ dequantize_blocks(codes[e], scales[e]).T)


def test_gradients_of_experts_weights(machine: Machine) -> None:
    """With no rows, with one step, with more steps than buffers."""
    ends = torch.tensor([0, 1, 7, 7, 9], dtype=torch.int32)
    N, K, M = 136, 272, int(ends[-1]) * 128
    a, b = tiles(draw(N, M)), tiles(draw(K, M))
    got = fp8_hopper.weight_gradient(a, b, ends, torch.float32)
    wide_a, wide_b, begin = dequantize_tiles(*a), dequantize_tiles(*b), 0
    for e, end in enumerate(ends.tolist()):
        part = slice(begin * 128, end * 128)
        near(got[e], wide_a[:, part] @ wide_b[:, part].T) if end > begin else None
        assert end > begin or not got[e].any()
        begin = end


def test_bf16_is_the_rounded_sum(machine: Machine) -> None:
    a, b = tiles(draw(128, 256)), tiles(draw(256, 256))
    wide = fp8_hopper.product(a, b, False, torch.float32)
    assert torch.equal(fp8_hopper.product(a, b, False, torch.bfloat16), wide.bfloat16())


def test_what_it_does_not_take_is_said() -> None:
    """The sum of no tokens, rows of codes that no bulk copy takes, fewer than 16 numbers."""
    whole = tiles(draw(32, 128))
    for M, K in ((32, 0), (0, 128), (32, 24)):
        a = torch.empty(M, K, dtype=whole[0].dtype), torch.empty(M, 1)
        assert "multiple of 16" in (fp8_hopper.missing(a, whole) or "")
    turned = whole[0].T.contiguous().T, whole[1]
    assert "contiguous" in (fp8_hopper.missing(turned, whole) or "")
    assert torch.cuda.is_available() or "Hopper" in (fp8_hopper.missing(whole, whole) or "")
