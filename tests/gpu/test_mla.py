"""Decoding over pages on CUDA: against the reference in fp32, row by row the same, captured in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.ops.attention import PAGES_BOUND, attend_pages
from rorqual.ops.triton.mla import decode, tiles, wide_missing

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

LENGTHS = [700, 0, 1, 513, 63, 64, 65, 5000]
# H, C, R: V3's own, V3-16B's, a few heads, ragged ones, sizes that are masked.
SHAPES = [(128, 512, 64), (16, 512, 64), (4, 64, 16), (20, 128, 32), (3, 48, 24)]


def case(
    shape: tuple[int, int, int], lengths: list[int], dtype: torch.dtype, width: int = 80
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, pages, tables in no order (every row its own pages), lengths. What no query sees is large."""
    H, C, R = shape
    N = len(lengths)
    pages = torch.randn(N * width + 1, 64, C + R, device=CUDA)
    table = (torch.randperm(N * width, device=CUDA) + 1).view(N, width)
    lens = torch.tensor(lengths, device=CUDA)
    stale = torch.arange(width * 64, device=CUDA).view(width, 64) >= lens[:, None, None]
    pages[table] = pages[table].masked_fill(stale[..., None], 3e4)
    return torch.randn(N, H, C + R, device=CUDA, dtype=dtype), pages.to(dtype), table, lens


def exact(q: Tensor, pages: Tensor, table: Tensor, lens: Tensor, C: int, scale: float) -> Tensor:
    """On the same numbers, in fp32 throughout: on CUDA, fp32 products could be rounded to TF32."""
    rows = q.cpu().float(), pages.cpu().float(), table.cpu(), lens.cpu()
    return attend_pages(*rows, C, scale, "reference").to(CUDA)


def agree(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and torch.isfinite(got).all()
    for g, w in zip(got.float(), want, strict=True):  # row by row: short rows are the largest
        assert (g - w).norm() <= PAGES_BOUND[dtype] * w.norm()


@pytest.mark.parametrize("dtype", list(PAGES_BOUND), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    C, scale = shape[1], (shape[1] + shape[2]) ** -0.5
    for lengths in (LENGTHS, [300, 0, 512]):  # several splits; one, written at once
        q, pages, table, lens = case(shape, lengths, dtype, width=-(-max(lengths) // 64))
        want = exact(q, pages, table, lens, C, scale)
        for ints in (torch.int32, torch.int64):
            agree(attend_pages(q, pages, table.to(ints), lens.to(ints), C, scale), want, dtype)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_row_alone_equals_the_row_in_a_batch_to_the_bit(shape: tuple[int, int, int]) -> None:
    q, pages, table, lens = case(shape, LENGTHS, torch.bfloat16)
    together = decode(q, pages, table, lens, shape[1], 0.04)
    many = [t.repeat_interleave(40, 0) for t in (q, table, lens)]  # programs take several splits
    assert torch.equal(decode(many[0], pages, *many[1:], shape[1], 0.04)[::40], together)
    for row, n in enumerate(LENGTHS):
        for width in (max(1, -(-n // 64)), table.shape[1]):
            narrow = table[row : row + 1, :width].contiguous()
            alone = decode(q[row : row + 1], pages, narrow, lens[row : row + 1], shape[1], 0.04)
            assert torch.equal(alone[0], together[row]), (n, width)


def test_a_captured_graph_follows_its_buffers() -> None:
    shape, scale = (16, 512, 64), 0.04
    static = case(shape, LENGTHS, torch.bfloat16)
    out = torch.empty(len(LENGTHS), 16, 512, device=CUDA, dtype=torch.bfloat16)
    decode(*static, 512, scale, out=out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*static, 512, scale, out=out)
    for lengths in (LENGTHS, LENGTHS[::-1], [5120] * 8, [0] * 8, [1, 2, 3, 511, 512, 513, 1024, 1025]):
        fresh = case(shape, lengths, torch.bfloat16)
        for buffer, value in zip(static, fresh, strict=True):
            buffer.copy_(value)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, decode(*fresh, 512, scale))
        agree(out, exact(*fresh, 512, scale), torch.bfloat16)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [64, 128])
def test_the_kernel_for_many_heads_equals_the_other_one(heads: int, dtype: torch.dtype) -> None:
    """Many times over, because what a missing fence spoils is a matter of luck."""
    scale = 576**-0.5
    for lengths, split in (
        (LENGTHS, 512),
        ([8192] * 20, 4096),
        ([8191, 1, 0, 64, 4097] * 8, 8192),
        ([100, 0, 512], 512),
    ):
        q, pages, table, lens = case((heads, 512, 64), lengths, dtype, width=-(-max(lengths) // 64))
        assert wide_missing(q, pages, 512) is None
        want = decode(q, pages, table, lens, 512, scale, split=split, how=tiles(heads, dtype))
        first = decode(q, pages, table, lens, 512, scale, split=split, how="wide")
        agree(first, want.float(), dtype)
        for _ in range(20):
            assert torch.equal(decode(q, pages, table, lens, 512, scale, split=split, how="wide"), first)
