"""Quantising in Gluon: its Python in a machine of the test's own. test_compiles.py compiles it for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.ops.fp8_train import ReferenceQuantiser
from tests.unit.ops.gluon_machine import Machine

pytest.importorskip("triton.experimental.gluon")
from rorqual.ops.triton import fp8_quantise

FORMATS = pytest.mark.parametrize("fmt", [None, "ue8m0"])


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine, kernel = Machine(late=False), fp8_quantise.quantise_kernel.fn

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, num_warps, **constants: machine.launch(kernel, grid, *args, **constants)

    for name, value in machine.names().items():
        monkeypatch.setattr(fp8_quantise, name, value, raising=False)
    for helper in ("_over", "_scale", "_scales", "_scaled", "_store_rows", "_store_columns", "_store_turned"):
        monkeypatch.setattr(fp8_quantise, helper, getattr(fp8_quantise, helper).fn)
    monkeypatch.setattr(fp8_quantise, "_bits", lambda x: x.view(torch.int32))
    monkeypatch.setattr(fp8_quantise, "_number", lambda x: x.view(torch.float32))
    monkeypatch.setattr(fp8_quantise, "quantise_kernel", Launched())
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, float("nan"), **how))
    return machine


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes, some rows and columns all zero."""
    x = torch.randn(shape) * torch.logspace(-4, 4, shape[-1])
    x[..., 3], x[..., 5, :] = 0, 0
    return x.to(dtype)


def same(ours: Any, exact: Any) -> None:
    """But for the sign of a zero, which the step of correction takes away."""
    a, b = ([t[0].view(torch.uint8).where(t[0].float() != 0, 0), t[1]] for t in (ours, exact))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (16, 272), (300, 48)])
def test_tiles_of_rows_and_columns(shape: tuple[int, int], dtype: torch.dtype, fmt: str | None) -> None:
    x = draw(*shape, dtype=dtype)
    for rows, columns in ((True, False), (False, True), (True, True)):
        along, across = fp8_quantise.tiles(x, rows, columns, fmt is not None)
        assert (along is not None) == rows and (across is not None) == columns
        if rows:
            same(along, ReferenceQuantiser.tiles(x, fmt))
        if columns:
            same(across, ReferenceQuantiser.tokens(x, fmt))


@FORMATS
def test_kept_tiles_turned(fmt: str | None) -> None:
    codes, scales = ReferenceQuantiser.tiles(draw(200, 300), None)
    _, across = fp8_quantise.tiles((codes, scales.T.contiguous().T), False, True, fmt is not None)
    same(across, ReferenceQuantiser.tokens((codes, scales), fmt))


def test_a_strided_matrix() -> None:
    wide = draw(140, 700)
    along, across = fp8_quantise.tiles(wide[:, 200:456], True, True, False)
    same(along, ReferenceQuantiser.tiles(wide[:, 200:456].contiguous(), None))
    same(across, ReferenceQuantiser.tokens(wide[:, 200:456].contiguous(), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_one_weight_and_of_a_stack(dtype: torch.dtype) -> None:
    stack = draw(3, 200, 300, dtype=dtype)
    plain, turned = fp8_quantise.blocks(stack)
    for e, w in enumerate(stack):
        right = ReferenceQuantiser.weight(w)
        for ours, all_of_them, exact in zip(fp8_quantise.blocks(w), (plain, turned), right, strict=True):
            same(ours, exact)
            same([t[e] for t in all_of_them], exact)


def test_an_infinite_number() -> None:
    x = draw(128, 128)
    x[7, 9] = float("inf")
    along, _ = fp8_quantise.tiles(x, True, False, False)
    assert along is not None and along[1][7].isinf()
    same([t[:7] for t in along], [t[:7] for t in ReferenceQuantiser.tiles(x, None)])


def test_both_layouts_have_the_same_owners() -> None:
    """What a thread holds of a tile by rows it holds by columns: nothing moves between them."""
    for laid, width in ((fp8_quantise.NARROW, 8), (fp8_quantise.WIDE, 4)):
        assert laid.rows.size_per_thread == [4, width]
        columns = laid.columns
        assert columns.reg_bases[:2] == [[1, 0], [2, 0]]  # four rows of a column are a word
        lanes = laid.rows.threads_per_warp
        assert columns.lane_bases == [[0, width * 2**i] for i in range((lanes[1] - 1).bit_length())] + [
            [4 * 2**i, 0] for i in range((lanes[0] - 1).bit_length())
        ]
        assert columns.warp_bases == [[4 * lanes[0] * 2**i, 0] for i in range((fp8_quantise.WARPS - 1).bit_length())]
        every = columns.reg_bases + columns.lane_bases + columns.warp_bases
        assert sorted(map(tuple, every)) == sorted([(2**i, 0) for i in range(7)] + [(0, 2**i) for i in range(7)])
