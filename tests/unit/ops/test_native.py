"""The CPU kernels' products against plain ones, on fresh random inputs, and the rule that rows do not know each other."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.fp8 import dequantize_blocks, quantize_blocks
from rorqual.ops.native import build
from rorqual.ops.native.pack import (
    KINDS,
    PANEL,
    Packed,
    interleave,
    matrix_pointer,
    pack_fp8,
    pack_integers,
    pack_plain,
    quantise_rows,
    rows_of_blocks,
)
from rorqual.ops.packed import quantize_groups

if build.compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

BOUND = 3e-6
"""Largest relative error (Frobenius) of a product, beside fp64."""


def packed(kind: str, weight: Tensor) -> tuple[Packed, Tensor]:
    """A weight [count, out, in] in the kernels' form, and what it stores as plain numbers."""
    if kind in ("float32", "bfloat16"):
        return pack_plain(weight, kind), weight.to(getattr(torch, kind)).double()  # type: ignore[arg-type]
    if kind == "fp8":
        codes, scale = quantize_blocks(weight)
        return pack_fp8(codes, rows_of_blocks(scale, weight.shape[1])), dequantize_blocks(codes, scale).double()
    codes, scale = quantize_groups(weight, int(kind[3:]))
    dense = (codes.unflatten(-1, (-1, 32)).double() * scale.double()[..., None]).flatten(-2)
    return pack_integers(codes, scale, int(kind[3:])), dense


def product(weight: Packed, x: Tensor, which: int = 0, threads: int = 1) -> Tensor:
    lib = build.library()
    engine = lib.rq_open(threads)
    out = weight.shape[1]
    width = -(-out // PANEL) * PANEL
    y = torch.full((len(x), width), 7.0)
    lib.rq_linear(engine, matrix_pointer(weight), which, x.data_ptr(), x.stride(0), len(x), y.data_ptr(), width)
    lib.rq_close(engine)
    return y[:, :out]


def expect(kind: str, x: Tensor, dense: Tensor) -> Tensor:
    seen = quantise_rows(x) if kind in ("int8", "int4") else x
    return F.linear(seen.double(), dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 32), (40, 96), (200, 416), (130, 1056), (7, 64)])
def test_products_equal_the_plain_ones(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(KINDS.index(kind) * 1000 + sum(shape))
    form, dense = packed(kind, torch.randn(3, *shape))
    for rows in (1, 2, 3, 4, 5, 7, 8, 13, 27, 100):
        x = torch.randn(rows, shape[1]) * torch.rand(rows, 1) * 4
        for which in (0, 2):
            want = expect(kind, x, dense[which])
            assert float((product(form, x, which) - want).norm() / want.norm()) < BOUND, (rows, which)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_know_its_neighbours(kind: str) -> None:
    """Any number of rows, threads, and either way of widening: the same bits."""
    torch.manual_seed(1)
    form, _ = packed(kind, torch.randn(1, 150, 320))
    x = torch.randn(70, 320)
    alone = torch.cat([product(form, row[None]) for row in x])
    lib = build.library()
    for expand_from in (2, 99):
        lib.rq_expand_from(expand_from)
        for rows in (2, 3, 4, 5, 6, 8, 11, 12, 64, 70):
            assert torch.equal(product(form, x[:rows], threads=rows % 3 + 1), alone[:rows]), rows
    lib.rq_expand_from(4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_codes_and_activations_do_not_saturate(kind: str) -> None:
    bits = int(kind[3:])
    codes = torch.tensor([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1], dtype=torch.int8).repeat(16 * 16).view(1, 16, 32)
    codes[0, 1] = codes[0, 1].min()
    form = pack_integers(codes, torch.ones(1, 16, 1), bits)
    for sign in (1.0, -1.0):
        x = torch.full((1, 32), sign)
        assert torch.allclose(product(form, x), F.linear(x, codes[0].float()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(kind: str, bad: float) -> None:
    form, _ = packed(kind, torch.randn(1, 16, 64))
    x = torch.randn(2, 64)
    x[1, 40] = bad
    y = product(form, x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_rounding_mode_does_not_matter(threads: int) -> None:
    """Subnormal numbers count in every thread, and the caller finds its mode as it left it."""
    form, _ = packed("float32", torch.full((1, 640, 32), 2.0**-127))
    x = torch.ones(64, 32)
    want = product(form, x, threads=threads)
    assert want.min() > 0
    assert torch.set_flush_denormal(True)
    try:
        got = product(form, x, threads=threads)
        flushes = bool(torch.tensor(2.0**-127) * 0.5 == 0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want) and flushes


def test_zero_rows_give_zero() -> None:
    for kind in KINDS:
        form, _ = packed(kind, torch.randn(1, 32, 64))
        assert torch.equal(product(form, torch.zeros(2, 64)), torch.zeros(2, 32))


def test_gate_and_up_alternate() -> None:
    gate, up = torch.randn(20, 8), torch.randn(20, 8)
    both = interleave(gate, up)
    assert both.shape == (64, 8)
    assert torch.equal(both[:16], gate[:16]) and torch.equal(both[16:32], up[:16])
    assert torch.equal(both[32:36], gate[16:]) and not both[36:48].any()


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from rorqual.errors import BackendUnavailable

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendUnavailable, match="C\\+\\+ compiler") as caught:
        build.library_file()
    assert "g++" in str(caught.value.remedy)


def test_a_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from rorqual.errors import BackendUnavailable

    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'internal error' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BackendUnavailable, match="internal error"):
        build.build()
    assert not list((tmp_path / "rorqual").iterdir()), "no half-made library stays"
