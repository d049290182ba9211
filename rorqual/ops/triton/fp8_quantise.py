"""`ops.triton.fp8_train`'s tiles and blocks in Gluon, measured on Hopper and used there: the same bits, faster.

What is slow in quantising is the transpose of codes: Triton gives each thread numbers of one row, and moves the transpose
through shared memory byte by byte. Here a thread has patches of four rows: four codes of a column are one word, which goes
into shared memory and out of it as a word. Rows and columns of the same numbers are two layouts with the same owners
(`Laid`), between which nothing moves.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rorqual.ops.triton import fp8_train
from rorqual.ops.triton.fp8_train import TILE, Quantised

WARPS = 4


class Laid(NamedTuple):
    """A thread's numbers of a tile of 128 x 128: `rows` with those of a row together, `columns` the same ones with those of
    a column together; `turned`: of the transpose, 16 codes of a row."""

    rows: gl.BlockedLayout
    columns: gl.DistributedLinearLayout
    turned: gl.BlockedLayout


def _laid(width: int) -> Laid:
    """width: numbers of a row that a thread reads at once, 16 bytes of them."""
    across = [2**i for i in range(7)]
    within = width.bit_length() - 1
    lanes = 7 - within  # bits of the lanes that go along a row; the others go down
    patch, threads = [[0, c] for c in across[:within]], [[0, c] for c in across[within:]]
    down = [[r, 0] for r in across]
    rest = 5 - lanes
    last = 2 + rest + WARPS.bit_length() - 1
    return Laid(
        gl.BlockedLayout([4, width], [2**rest, 2**lanes], [WARPS, 1], [1, 0]),
        gl.DistributedLinearLayout(
            down[:2] + patch + down[last:], threads + down[2 : 2 + rest], down[2 + rest : last], [], [TILE, TILE]
        ),
        gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0]),
    )  # fmt: skip


NARROW, WIDE = _laid(8), _laid(4)
"""Of 16 bits and less, of 32."""


@gluon.jit
def _over(value, divisor, inverse):
    """As in `fp8_train`."""
    near = value * inverse
    return gl.fma(gl.fma(-near, divisor, value), inverse, near)


@gluon.jit
def _bits(number):
    return number.to(gl.int32, bitcast=True)


@gluon.jit
def _number(bits):
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _scale(largest, POWER: gl.constexpr):
    part = _over(largest, gl.full_like(largest, 448.0), gl.full_like(largest, 1 / 448))
    part = gl.where(largest == float("inf"), largest, part)
    scale = gl.where(largest > 0, gl.maximum(part, 1.1754943508222875e-38), 1.0)
    if POWER:
        bits = _bits(scale)
        scale = _number(gl.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits))
    return scale


@gluon.jit
def _scales(largest, layout: gl.constexpr, POWER: gl.constexpr):
    """Scales and their inverses. Sixteen threads or more have the same rows and columns: what takes many instructions is
    done once, by a thread for each."""
    if POWER:
        scale = _scale(largest, True)
        inverse = _number(0x7F000000 - _bits(scale))
    else:
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        one = _scale(gl.convert_layout(largest, flat), False)
        scale = gl.convert_layout(one, layout)
        inverse = gl.convert_layout(gl.div_rn(gl.full_like(one, 1.0), one), layout)
    return scale, inverse


@gluon.jit
def _scaled(value, scale, inverse, axis: gl.constexpr, POWER: gl.constexpr):
    """value over its rows' scales (axis 1) or its columns' (axis 0)."""
    if POWER:
        scaled = value * gl.expand_dims(inverse, axis)
    else:
        scaled = _over(value, gl.expand_dims(scale, axis), gl.expand_dims(inverse, axis))
    return scaled


@gluon.jit
def _store_rows(value, codes, scales, mb, kb, M, K, POWER: gl.constexpr, OF_ROWS: gl.constexpr):
    """A tile of a matrix [M, K], in row tile mb and column tile kb, with its rows' scales."""
    m = mb * 128 + gl.arange(0, 128, gl.SliceLayout(1, OF_ROWS))
    k = kb * 128 + gl.arange(0, 128, gl.SliceLayout(0, OF_ROWS))
    scale, inverse = _scales(gl.max(gl.abs(value), 1), gl.SliceLayout(1, OF_ROWS), POWER)
    code = _scaled(value, scale, inverse, 1, POWER).to(codes.dtype.element_ty)
    gl.store(codes + (m.to(gl.int64)[:, None] * K + k[None, :]), code, mask=(m < M)[:, None] & (k < K)[None, :])
    gl.store(scales + kb * M + m, scale, mask=m < M)


@gluon.jit
def _store_columns(
    value, codes_t, scales_t, mb, kb, M, K, POWER: gl.constexpr, OF_COLUMNS: gl.constexpr, TURNED: gl.constexpr
):
    """The transpose of such a tile, with its columns' scales."""
    value = gl.convert_layout(value, OF_COLUMNS)
    scale, inverse = _scales(gl.max(gl.abs(value), 0), gl.SliceLayout(0, OF_COLUMNS), POWER)
    column = kb * 128 + gl.arange(0, 128, gl.SliceLayout(0, OF_COLUMNS))
    gl.store(scales_t + mb * K + column, scale, mask=column < K)
    _store_turned(_scaled(value, scale, inverse, 0, POWER), codes_t, mb, kb, M, K, TURNED)


@gluon.jit
def _store_turned(scaled, codes_t, mb, kb, M, K, TURNED: gl.constexpr):
    turned = gl.convert_layout(gl.permute(scaled.to(codes_t.dtype.element_ty), (1, 0)), TURNED)
    k = kb * 128 + gl.arange(0, 128, gl.SliceLayout(1, TURNED))
    m = mb * 128 + gl.arange(0, 128, gl.SliceLayout(0, TURNED))
    gl.store(codes_t + (k.to(gl.int64)[:, None] * M + m[None, :]), turned, mask=(k < K)[:, None] & (m < M)[None, :])


@gluon.jit
def quantise_kernel(
    x, x_scale, codes, scales, codes_t, scales_t, M, K, stride_e, stride_x, stride_xs,
    SCALED: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK: gl.constexpr, POWER: gl.constexpr,
    OF_ROWS: gl.constexpr, OF_COLUMNS: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """BLOCK: one scale for all of a tile, of a stack of matrices; else those of rows, columns or both."""
    kb, mb, e = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    m = mb * 128 + gl.arange(0, 128, gl.SliceLayout(1, OF_ROWS))
    k = kb * 128 + gl.arange(0, 128, gl.SliceLayout(0, OF_ROWS))
    inside = (m < M)[:, None] & (k < K)[None, :]
    m64 = m.to(gl.int64)
    value = gl.load(x + e * stride_e + (m64[:, None] * stride_x + k[None, :]), mask=inside, other=0.0).to(gl.float32)
    if SCALED:
        value = value * gl.load(x_scale + kb * stride_xs + m, mask=m < M, other=0.0)[:, None]
    if BLOCK:
        largest = gl.max(gl.max(gl.abs(value), 1), 0)
        rows: gl.constexpr = gl.SliceLayout(1, OF_ROWS)
        scale, inverse = _scales(gl.full([128], largest, gl.float32, rows), rows, POWER)
        scaled = _scaled(value, scale, inverse, 1, POWER)
        to = codes + e * M * K
        gl.store(to + (m64[:, None] * K + k[None, :]), scaled.to(codes.dtype.element_ty), mask=inside)
        tiles_m, tiles_k = (M + 127) // 128, (K + 127) // 128
        gl.store(scales + (e * tiles_m + mb) * tiles_k + kb + m * 0, scale, mask=m == mb * 128)
        _store_turned(gl.convert_layout(scaled, OF_COLUMNS), codes_t + e * M * K, mb, kb, M, K, TURNED)
    if ROWS:
        _store_rows(value, codes, scales, mb, kb, M, K, POWER, OF_ROWS)
    if COLUMNS:
        _store_columns(value, codes_t, scales_t, mb, kb, M, K, POWER, OF_COLUMNS, TURNED)


def _launch_tiles(
    source: Tensor, x_scale: Tensor | None, along: Quantised, across: Quantised, rows: bool, columns: bool, power: bool
) -> None:
    (M, K), laid = source.shape, _of(source)
    quantise_kernel[(triton.cdiv(K, TILE), triton.cdiv(M, TILE), 1)](
        source, source if x_scale is None else x_scale, *along, *across, M, K, 0, source.stride(0),
        0 if x_scale is None else x_scale.stride(1), SCALED=x_scale is not None, ROWS=rows, COLUMNS=columns, BLOCK=False,
        POWER=power, OF_ROWS=laid.rows, OF_COLUMNS=laid.columns, TURNED=laid.turned, num_warps=WARPS,
    )  # fmt: skip


def _launch_blocks(stack: Tensor, codes: Tensor, codes_t: Tensor, scales: Tensor) -> None:
    (E, N, K), laid = stack.shape, _of(stack)
    quantise_kernel[(triton.cdiv(K, TILE), triton.cdiv(N, TILE), E)](
        stack, stack, codes, scales, codes_t, scales, N, K, stack.stride(0), K, 0, SCALED=False, ROWS=False, COLUMNS=False,
        BLOCK=True, POWER=False, OF_ROWS=laid.rows, OF_COLUMNS=laid.columns, TURNED=laid.turned, num_warps=WARPS,
    )  # fmt: skip


def _of(source: Tensor) -> Laid:
    return WIDE if source.element_size() > 2 else NARROW


tiles = partial(fp8_train.tiles, launch=_launch_tiles)
blocks = partial(fp8_train.blocks, launch=_launch_blocks)
