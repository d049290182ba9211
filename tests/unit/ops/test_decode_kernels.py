"""A decoding step's small kernels, in the interpreter (or on a GPU where there is one), against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.ops.attention import PAGES_BOUND, attend_pages
from rorqual.ops.formats import Weight, WeightFormat
from rorqual.ops.fp8 import Fp8Blocks
from rorqual.ops.packed import PackedIntegers
from rorqual.ops.rms_norm import rms_norm
from rorqual.ops.rope import rotate
from rorqual.ops.triton.decode import absorbed_queries, add_norm, merged_values, most_likely
from rorqual.ops.triton.fp8 import expand_packed, fixed_tiling, tile_rows
from rorqual.ops.triton.mla import busy_split, parts
from rorqual.ops.triton.stream import rows_dot
from tests.unit.ops.test_mla_kernel import case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert float((got.float() - want.float()).norm()) <= BOUND[dtype] * float(want.float().norm())


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(("N", "D", "outs"), [(1, 64, (40,)), (3, 520, (33, 7)), (2, 1024, (200, 16)), (4, 30, (1, 5))])
def test_projections_of_few_rows(N: int, D: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(N, 2 * D, device=DEVICE).to(dtype)[:, :D]
    weights = [torch.randn(out, D + 3, device=DEVICE).to(dtype)[:, :D] for out in outs]
    stored = [Weight.plain(w) for w in weights]
    got = rows_dot(x, *stored)
    for y, w in zip(got, weights, strict=True):
        assert y.dtype == dtype
        close(y, x.float() @ w.float().T, dtype)
    (exact,) = rows_dot(x, stored[0], dtype=torch.float32)
    close(exact, x.float() @ weights[0].float().T, torch.float32)
    alone = rows_dot(x[-1:], *stored)
    assert all(torch.equal(one[0], many[-1]) for one, many in zip(alone, got, strict=True))


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_adding_and_norming(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 5, 88, device=DEVICE).to(dtype)
    weight = torch.rand(88, device=DEVICE)
    total, normed = add_norm(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)
    close(normed, rms_norm(x + y, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(("H", "N", "R", "C"), [(4, 32, 16, 64), (3, 24, 8, 100)])
def test_queries_go_into_the_latent_space(H: int, N: int, R: int, C: int, dtype: torch.dtype) -> None:
    T = 3
    q = torch.randn(T, H * (N + R), device=DEVICE).to(dtype)
    w_uk = torch.randn(H, N + 7, C, device=DEVICE).to(dtype)[:, :N]
    angle = torch.rand(T, R // 2, device=DEVICE) * 6
    got = absorbed_queries(q, w_uk, angle.cos(), angle.sin(), R)
    nope, rope = q.float().view(T, H, N + R).split((N, R), -1)
    rotated = rotate(rope, angle.cos()[:, None], angle.sin()[:, None])
    close(got, torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk.float()), rotated), -1), dtype)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("split", [64, 128, 1024])
def test_parts_become_values(split: int, dtype: torch.dtype) -> None:
    H, C, R, U = 5, 48, 16, 20
    q, pages, table, lengths = (t.to(DEVICE) for t in case(H, C, R, [700, 0, 1, 64, 65], dtype))
    w_uv = torch.randn(H, U, C, device=DEVICE).to(dtype)
    part, lse = parts(q, pages, table, lengths, C, 0.1, split)
    got = merged_values(part, lse, lengths, w_uv, dtype, table.shape[1] * 64, 64, split)
    o = attend_pages(q.float(), pages.float(), table, lengths, C, 0.1, "reference")
    want = torch.einsum("thc,huc->thu", o, w_uv.float())
    assert float((got.float() - want).norm()) <= PAGES_BOUND[dtype] * float(want.norm())
    assert not got[1].any()


def test_splits_are_whole_pages_and_shorter_for_fewer_rows() -> None:
    sizes = [busy_split(rows, 16, 4096) for rows in (1, 8, 64, 512)]
    assert sizes == sorted(sizes) and all(size % 64 == 0 for size in sizes) and sizes[0] < sizes[-1]
    assert busy_split(1, 128, 64) == 128


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("form", [Fp8Blocks(), PackedIntegers(4), PackedIntegers(8)], ids=lambda form: form.name)
@pytest.mark.parametrize(("N", "D", "outs"), [(1, 160, (40,)), (3, 544, (36, 8)), (2, 1056, (300, 16))])
def test_stored_projections(N: int, D: int, outs: tuple[int, ...], form: WeightFormat, dtype: torch.dtype) -> None:
    x = torch.randn(N, D, device=DEVICE).to(dtype)
    parts = [form.pack(torch.randn(out, D, device=DEVICE)) for out in outs]
    weights = [form.weight(p) for p in parts]
    for y, p, w in zip(rows_dot(x, *weights), parts, weights, strict=True):
        want = x.float() @ form.dense(p, torch.float32).T
        close(y, want, dtype)
        close(tile_rows(x, w), want, dtype)
        fixed = tile_rows(x, w, fixed_tiling(w.data.shape[:1] + (D,), N))
        close(fixed, want, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(9, 32), (3, 5, 96), (1, 1056)])
def test_packed_integers_expand_to_the_same_bits(shape: tuple[int, ...], bits: int) -> None:
    form = PackedIntegers(bits)
    parts = form.pack(torch.randn(shape, device=DEVICE))
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(expand_packed(form.weight(parts), dtype), form.dense(parts, dtype))


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("V", [5, 4096, 9000])
def test_the_most_likely_token(V: int, dtype: torch.dtype) -> None:
    logits = torch.randn(7, V + 3, device=DEVICE).to(dtype)[:, :V]
    logits[1, V // 2 :] = logits[1].max()  # the first of equals
    logits[2, 3], logits[3, V - 1] = float("nan"), float("inf")
    logits[4] = float("-inf")
    logits[5, 1:] = float("-inf")
    want = logits.max(-1).indices.tolist()
    got = most_likely(logits)
    assert got.dtype == torch.int64
    assert [*got.tolist()[:2], *got.tolist()[5:]] == [want[0], logits[1].tolist().index(logits[1].max()), 0, want[6]]
    assert got[2:5].tolist() == [-1, -1, -1]
