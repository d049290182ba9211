"""Decoding over a paged latent cache in Triton: every head attends to the latents where they lie in their pages.

A row's keys are cut into splits, which run side by side and are merged in order by their log-sum-exp. With one size of split
(SPLIT) a row's result depends neither on the rows beside it nor on the width of the page table; `busy_split` gives that
up for speed. Lengths and tables are read on the device alone: a captured CUDA graph replays over other ones.

With few heads the latents are the left operand of both products (scores^T = K q^T, out^T = K^T p^T): a Hopper matrix
unit wants 64 or more rows of it, while a program has 16 or 32 heads. With 64 heads or more these are the left operand, and
the latents are read half as often. Either way one copy of a block of latents in shared memory serves as keys and as
values. Slots beyond a row's length are never read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.triton.overlap import begin, options

SPLIT = 512
"""Keys of one split where nothing else is asked for."""
PROGRAMS = 2048
"""Programs that a launch aims at. A table may be much wider than its rows are long; programs beyond their row's last
split return at once, but even those take their turn on a processor, so from here on programs take several splits."""
MERGED = 8
"""Splits that are merged at once."""
PROCESSORS = 132
"""An H100's multiprocessors."""
LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Launch parameters: keys of a block, heads of a program, whether heads are the left operand, warps, and blocks in
    flight."""

    keys: int
    heads: int
    left: bool
    warps: int
    stages: int


def tiles(heads: int, dtype: torch.dtype) -> Tiles:
    """By measurement on an H200 for C = 512: a block of keys and those on their way in shared memory, the accumulators in
    registers."""
    if dtype == torch.float32:
        return Tiles(16, 16, False, 8, 2)
    if heads >= 64:
        return Tiles(64, 64, True, 8, 2)
    return Tiles(64, 32, False, 8, 2) if heads >= 32 else Tiles(32, 16, False, 4, 5)


@triton.jit(do_not_specialize=["table_stride", "width", "splits"])
def _split_kernel(
    q, pages, table, lengths, out, lse, scale_log2, table_stride, width, splits,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, DIRECT: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_H heads of one row over its splits program_id(1), + num_programs(1), ... DIRECT: there is but
    one split, and out is the result; otherwise out [N, H, splits, C] and lse (to base 2) [N, H, splits] are parts."""
    begin()
    # Blocks of heads run next to each other: they read the same latents.
    head_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    n = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(1)
    length = tl.minimum(tl.load(lengths + n).to(tl.int32), width * PAGE)
    if DIRECT:
        last = 1  # a row without keys is written too
    else:
        last = tl.cdiv(length, SPLIT)
    if first >= last:
        return
    c, r, key = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, KEYS)
    in_c, in_r = (c < C)[None, :], (r < R)[None, :]
    q_rows = q + (n * H + h)[:, None] * (C + R)
    q_c = tl.load(q_rows + c[None, :], mask=(h < H)[:, None] & in_c, other=0.0)
    q_r = tl.load(q_rows + C + r[None, :], mask=(h < H)[:, None] & in_r, other=0.0)
    for split in range(first, last, tl.num_programs(1)):
        end = tl.minimum(length, split * SPLIT + SPLIT)
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_C) if LEFT else (BLOCK_C, BLOCK_H), tl.float32)
        for start in range(split * SPLIT, end, KEYS):
            page = tl.load(table + n * table_stride + start // PAGE).to(tl.int64)
            rows = pages + (page * PAGE + start % PAGE + key)[:, None] * (C + R)
            seen = start + key < end
            k_c = tl.load(rows + c[None, :], mask=seen[:, None] & in_c, other=0.0).to(q_c.dtype)
            k_r = tl.load(rows + C + r[None, :], mask=seen[:, None] & in_r, other=0.0).to(q_c.dtype)
            # The largest is finite: a block holds at least one key that is seen.
            if LEFT:
                scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
                scores = tl.dot(q_r, tl.trans(k_r), scores, input_precision="ieee")
                scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
                now = tl.maximum(largest, tl.max(scores, 1))
                fade = tl.exp2(largest - now)
                probs = tl.exp2(scores - now[:, None])
                total = total * fade + tl.sum(probs, 1)
                acc = tl.dot(probs.to(q_c.dtype), k_c, acc * fade[:, None], input_precision="ieee")
            else:
                scores = tl.dot(k_c, tl.trans(q_c), input_precision="ieee")
                scores = tl.dot(k_r, tl.trans(q_r), scores, input_precision="ieee")
                scores = tl.where(seen[:, None], scores * scale_log2, float("-inf"))
                now = tl.maximum(largest, tl.max(scores, 0))
                fade = tl.exp2(largest - now)
                probs = tl.exp2(scores - now[None, :])
                total = total * fade + tl.sum(probs, 0)
                acc = tl.dot(tl.trans(k_c), probs.to(q_c.dtype), acc * fade[None, :], input_precision="ieee")
            largest = now
        share = 1.0 / tl.where(total > 0, total, 1.0)
        at = (n * H + h) * splits + split
        if LEFT:
            place, mask = out + at[:, None] * C + c[None, :], (h < H)[:, None] & in_c
            acc = acc * share[:, None]
        else:
            place, mask = out + at[None, :] * C + c[:, None], (h < H)[None, :] & (c < C)[:, None]
            acc = acc * share[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=mask)
        if not DIRECT:
            tl.store(lse + at, largest + tl.log2(total), mask=h < H)


@triton.jit(do_not_specialize=["width", "splits"])
def _merge_kernel(
    part, lse, lengths, out, width, splits,
    H: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_C: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """One head of one row: the splits' parts, weighted by their share of the sum of exponentials."""
    begin()
    n, row = tl.program_id(0), (tl.program_id(0) * H + tl.program_id(1)).to(tl.int64)
    c, s = tl.arange(0, BLOCK_C), tl.arange(0, MERGED)
    last = tl.cdiv(tl.minimum(tl.load(lengths + n).to(tl.int32), width * PAGE), SPLIT)
    largest, total = float("-inf"), 0.0
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, last, MERGED):
        at, there = row * splits + start + s, start + s < last
        lse_s = tl.load(lse + at, mask=there, other=float("-inf"))
        part_sc = tl.load(part + at[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        now = tl.maximum(largest, tl.max(lse_s, 0))
        fade, weight = tl.exp2(largest - now), tl.exp2(lse_s - now)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(part_sc * weight[:, None], 0)
        largest = now
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * C + c, acc.to(out.dtype.element_ty), mask=c < C)


def decode(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, latent_dim: int, scale: float,
    out: Tensor | None = None, split: int = SPLIT, how: Tiles | Literal["wide"] | None = None,
) -> Tensor:  # fmt: skip
    """`ops.attention.attend_pages`: queries [N, H, C + R] over pages [pages, page_size, C + R] -> [N, H, C].

    Nothing comes back to the host, and scratch is allocated inside, so the call can be captured in a CUDA graph. Entries
    of the table beyond a row's length are never read. page_size: a power of two, 16 or more; 64 is what this is made
    for. out: contiguous, in q's dtype. split: keys of one split, a multiple of the page. how: the first kernel's tiles, or
    "wide": `mla_wide`'s kernel; by default the latter where `wide_missing` has nothing against it, else `tiles`.
    """
    (N, H, _), page, width, C = q_NHX.shape, pages_PSX.shape[1], table_NP.shape[1], latent_dim
    if out is None:
        out = q_NHX.new_empty(N, H, C)
    assert out.shape == (N, H, C) and out.dtype == q_NHX.dtype and out.is_contiguous()
    if N == 0:
        return out
    if width * page <= split:
        _launch(q_NHX, pages_PSX, table_NP, lengths_N, C, scale, out, None, split, how)
        return out
    part, lse = parts(q_NHX, pages_PSX, table_NP, lengths_N, C, scale, split, how)
    _merge_kernel[(N, H)](
        part, lse, lengths_N, out, width, part.shape[2],
        H=H, C=C, PAGE=page, SPLIT=split, BLOCK_C=max(16, triton.next_power_of_2(C)), MERGED=MERGED, num_warps=4,
        **options(),
    )  # fmt: skip
    return out


def parts(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, latent_dim: int, scale: float,
    split: int = SPLIT, how: Tiles | Literal["wide"] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, not merged: each split's result [N, H, splits, C], and the logarithm to base 2 of its sum of exponentials
    [N, H, splits], fp32; undefined in splits beyond a row's length."""
    N, H, _ = q_NHX.shape
    splits = max(1, triton.cdiv(table_NP.shape[1] * pages_PSX.shape[1], split))
    part = torch.empty(N, H, splits, latent_dim, dtype=torch.float32, device=q_NHX.device)
    lse = torch.empty(N, H, splits, dtype=torch.float32, device=q_NHX.device)
    if N:
        _launch(q_NHX, pages_PSX, table_NP, lengths_N, latent_dim, scale, part, lse, split, how)
    return part, lse


def wide_missing(q_NHX: Tensor, pages_PSX: Tensor, latent_dim: int) -> str | None:
    """Why `mla_wide` cannot take these, or None."""
    try:
        from rorqual.ops.triton import mla_wide
    except ImportError as error:  # Gluon is experimental: it may change its place
        return f"this Triton has no Gluon as it is known here ({error})"
    return mla_wide.missing(q_NHX, pages_PSX, latent_dim)


def busy_split(rows: int, heads: int, keys: int) -> int:
    """Keys of a split with which every multiprocessor has as many programs as fit it: short ones for few rows, where a split
    is a chain of loads that one processor waits for, and long ones for many, where parts are memory moved for nothing."""
    how = tiles(heads, torch.bfloat16)
    programs = rows * triton.cdiv(heads, how.heads)
    wanted = max(1, (1 if how.left else 2) * PROCESSORS // programs)
    return min(8192, max(128, triton.next_power_of_2(triton.cdiv(keys, wanted))))


def _launch(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, C: int, scale: float,
    out: Tensor, lse: Tensor | None, split: int, how: Tiles | Literal["wide"] | None,
) -> None:  # fmt: skip
    """lse None: one split, and out is the result."""
    N, H, X = q_NHX.shape
    page, width = pages_PSX.shape[1], table_NP.shape[1]
    assert pages_PSX.is_contiguous() and pages_PSX.shape[2] == X and 0 < C < X, (q_NHX.shape, pages_PSX.shape, C)
    assert page >= 16 and page & (page - 1) == 0 and table_NP.stride(1) == lengths_N.stride(0) == 1
    assert split % page == 0, "a split is whole pages"
    splits = max(1, triton.cdiv(width * page, split))
    strides = table_NP.stride(0), width, splits
    args = (q_NHX.contiguous(), pages_PSX, table_NP, lengths_N, out, lse, scale * LOG2_E, *strides)
    if how == "wide" or (how is None and wide_missing(q_NHX, pages_PSX, C) is None):
        from rorqual.ops.triton import mla_wide

        row_programs = N * (H // mla_wide.HEADS)
        mla_wide.kernel[(row_programs, min(splits, triton.cdiv(PROGRAMS, row_programs)))](
            *args, H=H, C=C, R=X - C, PAGE=page, SPLIT=split, KEYS=mla_wide.KEYS, BLOCK_H=mla_wide.HEADS, DIRECT=lse is None,
            num_warps=mla_wide.WARPS,
        )  # fmt: skip
        return
    how = how or tiles(H, q_NHX.dtype)
    row_programs = N * triton.cdiv(H, how.heads)
    _split_kernel[(row_programs, min(splits, triton.cdiv(PROGRAMS, row_programs)))](
        *args, H=H, C=C, R=X - C, PAGE=page, SPLIT=split, KEYS=min(page, how.keys), BLOCK_H=how.heads,
        BLOCK_C=max(16, triton.next_power_of_2(C)), BLOCK_R=max(16, triton.next_power_of_2(X - C)), DIRECT=lse is None,
        LEFT=how.left, num_warps=how.warps, num_stages=how.stages, **options(),
    )  # fmt: skip
