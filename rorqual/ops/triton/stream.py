"""Matrices streamed past a vector or two: what a decoding step does with its weights, however they are stored.

With a few tokens a step every weight is read once and multiplied almost never, so all that counts is that every
multiprocessor reads all the time. A program takes a few rows of a matrix for one token, streams them into lanes of fp32
sums and adds those once; the tokens are the fastest axis of the grid, so that the second token finds the rows in the cache.
Quantised weights are expanded in registers, exactly: FP8 blocks scale the vector, packed integers scale their group's sum.

Inference only. The order of additions depends on shapes alone, never on the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.ops.formats import Weight
from rorqual.ops.triton.overlap import begin, options

TOKENS = 4
"""Up to so many tokens, reading weights once for each beats a product made for many rows."""


@triton.jit
def no_sums(KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where `add_columns` adds: one sum for each run of columns that a thread loads at once, 16 bytes of a row."""
    RUN: tl.constexpr = 32 if KIND >= 4 else (16 if KIND == 1 else 8)
    return tl.zeros((ROWS, COLUMNS // RUN), tl.float32)


@triton.jit
def add_columns(
    acc, x, w, scale, row, at, gate, width, stride_w, stride_s,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc (`no_sums`) plus w[row, at : at + COLUMNS] times gate x[at : ...]. KIND is `Weight.kind`; of FP8 blocks all rows
    must lie in one. EVEN: the columns end with the matrix."""
    if KIND >= 4:
        # A group of 32 is KIND words. In units of groups: a quotient by 32 would hide from the compiler what is aligned.
        PER: tl.constexpr = 32 // KIND
        group = tl.multiple_of(at // 32, COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
        inside = group < width // 32
        word = group[:, None] * KIND + tl.arange(0, KIND)[None, :]
        place = w + (row * stride_w)[:, None, None] + word[None, :, :]
        words = tl.load(place, mask=inside[None, :, None], other=0)
        scales = tl.load(scale + (row * stride_s)[:, None] + group[None, :], mask=inside[None, :], other=0.0)
        part = tl.zeros(words.shape, tl.float32)
        for j in tl.static_range(PER):
            # As the last bits of 2^23 a code is a float without a conversion, which is slower than all the rest.
            code = ((words >> (KIND * j)) & (2**KIND - 1)) | 0x4B000000
            value = tl.load(x + word * PER + j, mask=inside[:, None], other=0.0).to(tl.float32)
            part += (code.to(tl.float32, bitcast=True) - (8388608.0 + 2 ** (KIND - 1))) * value[None, :, :]
        acc += tl.sum(part, 2) * (scales.to(tl.float32) * gate)
    else:
        RUN: tl.constexpr = 16 if KIND == 1 else 8
        run = tl.arange(0, COLUMNS // RUN)
        d = at + run[:, None] * RUN + tl.arange(0, RUN)[None, :]
        place = w + (row * stride_w)[:, None, None] + d[None, :, :]
        if EVEN:
            value = tl.load(x + d).to(tl.float32) * gate
            weight = tl.load(place)
        else:
            value = tl.load(x + d, mask=d < width, other=0.0).to(tl.float32) * gate
            weight = tl.load(place, mask=(d < width)[None, :, :], other=0.0)
        product = tl.sum(weight.to(tl.float32) * value[None, :, :], 2)
        if KIND == 1:
            block = tl.minimum(at + run * RUN, width - 1) // 128
            product *= tl.load(scale + tl.min(row, 0) // 128 * stride_s + block)[None, :]
        acc += product
    return acc


@triton.jit(do_not_specialize=["stride_s1", "stride_s2"])
def _rows_dot_kernel(
    x, w1, w2, s1, s2, y1, y2, OUT1, OUT2, stride_x, stride_w1, stride_w2, stride_s1, stride_s2, stride_y1, stride_y2,
    D: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y1[n] = w1 x[n] and y2[n] = w2 x[n]: ROWS of the rows of either, for one token."""
    begin()
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    first = tl.cdiv(OUT1, ROWS)
    if block >= first:
        w, scale, y, out, stride_w, stride_s = w2, s2, y2 + n * stride_y2, OUT2, stride_w2, stride_s2
        block -= first
    else:
        w, scale, y, out, stride_w, stride_s = w1, s1, y1 + n * stride_y1, OUT1, stride_w1, stride_s1
    o = block * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(o, out - 1).to(tl.int64)
    acc = no_sums(KIND, ROWS, COLUMNS)
    for at in range(0, D, COLUMNS):
        acc = add_columns(
            acc, x + n * stride_x, w, scale, row, at, 1.0, D, stride_w, stride_s, KIND, COLUMNS, D % COLUMNS == 0
        )
    tl.store(y + o, tl.sum(acc, 1).to(y.dtype.element_ty), mask=o < out)


def rows_dot(x_ND: Tensor, *weights: Weight, dtype: torch.dtype | None = None) -> list[Tensor]:
    """x [N, D] by one or two matrices [out, D] of one kind in one launch -> [N, out] of each, in `dtype` or x's; sums in
    fp32."""
    a, b = weights[0], weights[-1]
    assert len(weights) <= 2 and a.kind == b.kind and x_ND.stride(1) == 1
    (N, D), outs = x_ND.shape, [len(w.data) for w in weights]
    ys = [torch.empty(N, out, dtype=dtype or x_ND.dtype, device=x_ND.device) for out in outs]
    second = outs[1] if len(outs) == 2 else 0
    rows = 8 if a.kind >= 4 else 2
    # So many columns at once that nothing is left to fetch ahead.
    columns = max(128, min(2048 if a.kind == 4 else 1024, triton.next_power_of_2(D)))
    _rows_dot_kernel[(N, triton.cdiv(outs[0], rows) + triton.cdiv(second, rows))](
        x_ND, a.data, b.data, a.scale, b.scale, ys[0], ys[-1], outs[0], second, x_ND.stride(0),
        a.data.stride(0), b.data.stride(0), a.scale.stride(0), b.scale.stride(0), ys[0].stride(0), ys[-1].stride(0),
        D=D, KIND=a.kind, ROWS=rows, COLUMNS=columns, num_warps=4, **options(),
    )  # fmt: skip
    return ys
