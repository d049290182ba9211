"""Attention over pages: the kernel against the reference, and what a row's result must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.errors import BackendUnavailable
from rorqual.ops.attention import PAGES_BOUND, attend_latent, attend_pages
from rorqual.ops.triton.mla import decode

LENGTHS = [700, 0, 1, 513, 63, 64, 65]
STALE = 3e4  # what an unseen slot may hold: large, and finite in fp16


def case(
    H: int, C: int, R: int, lengths: list[int], dtype: torch.dtype, width: int = 0, page: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, pages in no order, tables whose surplus entries name the stale page 0, lengths. Unseen slots are stale."""
    width = max(width, -(-max(lengths) // page))
    needed = [-(-n // page) for n in lengths]
    free = (torch.randperm(sum(needed)) + 1).tolist()
    pages = torch.full((len(free) + 1, page, C + R), STALE)
    table = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine = [free.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(mine, dtype=torch.int64)
        for i, at in enumerate(mine):
            seen = min(page, length - i * page)
            pages[at, :seen] = torch.randn(seen, C + R)
    return torch.randn(len(lengths), H, C + R).to(dtype), pages.to(dtype), table, torch.tensor(lengths)


def agree(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.float() - want).norm() <= PAGES_BOUND[dtype] * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("H", "C", "R", "lengths"),
    [
        (4, 64, 16, LENGTHS),
        (16, 64, 16, LENGTHS),
        (20, 128, 32, LENGTHS),
        (40, 64, 16, [513, 0, 130]),
        (70, 64, 16, [513, 0, 130]),  # heads as the left operand
        (16, 512, 64, [70, 0, 513]),
        (3, 48, 24, [65, 129]),  # masked up to the next power of two
    ],
)
def test_the_kernel_equals_the_reference(H: int, C: int, R: int, lengths: list[int], dtype: torch.dtype) -> None:
    q, pages, table, lens = case(H, C, R, lengths, dtype)
    scale = (C + R) ** -0.5
    want = attend_pages(q.float(), pages.float(), table, lens, C, scale, "reference")
    ints = torch.int32 if dtype == torch.float16 else torch.int64
    got = attend_pages(q, pages, table.to(ints), lens.to(ints), C, scale, "triton")
    agree(got, want, dtype)
    assert not got[lens == 0].any()


def test_the_result_goes_where_it_is_wanted() -> None:
    q, pages, table, lens = case(4, 64, 16, [10, 0], torch.float32)
    out = torch.full((2, 4, 64), float("nan"))
    assert decode(q, pages, table, lens, 64, 0.1, out=out) is out
    assert torch.equal(out, decode(q, pages, table, lens, 64, 0.1))


def test_the_reference_is_attention_over_each_rows_keys() -> None:
    q, pages, table, lens = case(3, 32, 16, [65, 0, 17], torch.float32, page=16)
    got = attend_pages(q, pages, table, lens, 32, 0.3)
    for row, n in enumerate(lens.tolist()):
        keys = pages[table[row]].flatten(0, 1)[:n]
        want = attend_latent(q[row][None, None], keys[None], 32, 0.3, torch.ones(1, 1, n, dtype=torch.bool))
        assert torch.allclose(got[row], want[0, 0], atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_no_query_sees_does_not_matter(backend: str) -> None:
    q, pages, table, lens = case(4, 64, 16, [0, 65, 600], torch.float32)
    before = attend_pages(q, pages, table, lens, 64, 0.1, backend)
    pages[pages == STALE] = float("nan")
    table[1, 2:] = -1
    assert torch.equal(attend_pages(q, pages, table, lens, 64, 0.1, backend), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_alone_equals_the_row_in_a_batch_to_the_bit(dtype: torch.dtype) -> None:
    q, pages, table, lens = case(4, 64, 16, [513, 65, 64, 0, 300], dtype)
    together = decode(q, pages, table, lens, 64, 0.1)
    for row, n in enumerate(lens.tolist()):
        for width in (max(1, -(-n // 64)), table.shape[1]):  # narrow tables need no merging
            alone = decode(q[row : row + 1], pages, table[row : row + 1, :width].contiguous(), lens[row][None], 64, 0.1)
            assert torch.equal(alone[0], together[row])


def test_a_program_may_take_several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs to a row, and more splits than are merged at once: the same bits."""
    q, pages, table, lens = case(4, 32, 16, [4700, 1500], torch.float16)
    every = decode(q, pages, table, lens, 32, 0.2)
    monkeypatch.setattr("rorqual.ops.triton.mla.PROGRAMS", 4)
    assert torch.equal(decode(q, pages, table, lens, 32, 0.2), every)
    agree(every, attend_pages(q.float(), pages.float(), table, lens, 32, 0.2, "reference"), torch.float16)


def test_scores_far_from_zero_neither_overflow_nor_vanish() -> None:
    q, pages, table, lens = case(4, 64, 16, [600, 3], torch.float32)
    want = attend_pages(q * 100, pages, table, lens, 64, 1.0, "reference")
    got = attend_pages(q * 100, pages, table, lens, 64, 1.0, "triton")
    assert torch.isfinite(got).all() and (got - want).norm() <= 1e-3 * want.norm()


def test_no_rows_and_no_pages() -> None:
    q, pages, table, lens = case(4, 64, 16, [1], torch.float32)
    assert decode(q[:0], pages, table[:0], lens[:0], 64, 0.1).shape == (0, 4, 64)
    assert not decode(q, pages, table[:, :0], lens * 0, 64, 0.1).any()


def test_a_name_that_is_no_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="no backend 'flash'"):
        attend_pages(*case(1, 16, 16, [1], torch.float32), 16, 0.1, "flash")
