"""Products of FP8 operands with scales on Hopper, in Gluon: `ops.triton.fp8_products` for what training multiplies.

One kernel is all of them: rows times a weight in blocks, rows grouped by expert times a stack of weights, tiles along the
tokens times tiles along the tokens, and the latter expert by expert. One warp queues bulk copies (TMA) of operands and of
the scales of tiles into a ring of buffers, as far ahead as it is long; warp groups multiply what has come and give the
buffer back. Each step of 128 is multiplied in two parts, and a part is scaled and added in fp32 (DeepSeek-V3 section 3.3.2)
before the other one is begun, because a whole tile's unscaled sums beside its scaled ones would not fit the registers. What
keeps the tensor cores busy meanwhile is the other of two warp groups (64 rows each of a tile of 128 x 256). A program for
each multiprocessor takes every so many-th tile of the output: while one is stored, the next one's operands come.

Triton's interpreter does not know Gluon: tests run these steps in a machine of their own, which checks copies, waits and
barriers, and compile the kernel for sm_90; tests/gpu compares it on a card.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rorqual.ops.triton.fp8_train import TILE, Quantised

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the latter up to Triton 3.6


COLUMNS = gl.constexpr(256)
"""Of an output's tile, which has 128 rows."""
STAGES = gl.constexpr(3)
"""Buffers."""
GROUP = gl.constexpr(8)
"""Row tiles that go through all columns together, so that tiles next to each other share rows and columns."""


@gluon.jit
def _tile(index, place, M, N, steps, E, GROUPED: gl.constexpr, RAGGED: gl.constexpr):
    """Of a tile of the output: its row and column, its expert (E where the rows are nobody's, of which there is nothing to
    do) and its first step and the one after its last."""
    tiles_m, tiles_n = (M + 127) // 128, (N + COLUMNS - 1) // COLUMNS
    e, begin, end = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(steps)
    if RAGGED:
        e = gl.to_tensor(index // (tiles_m * tiles_n))
        index = index % (tiles_m * tiles_n)
        end = gl.load(place + e)
        begin = gl.load(place + (e - 1), mask=e > 0, other=0)
    per = GROUP * tiles_n
    first = index // per * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    tile_m = first + index % per % size
    if GROUPED:
        e = gl.load(place + tile_m)
        end = gl.where(e < E, end, 0)
    return tile_m * 128, index % per // size * COLUMNS, e, begin, end


@gluon.jit
def _load(
    a, sa, b, sb, buffers_a, buffers_sa, buffers_b, buffers_sb, ready, free, place, M, N, steps, E, tiles,
    BYTES: gl.constexpr, BLOCKS: gl.constexpr, GROUPED: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Copies the steps of both operands, each into the next buffer as soon as that is given back. `ready` counts bytes."""
    stage, phase = 0, 1  # a new barrier's phase before its first is over
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column, e, begin, end = _tile(index, place, M, N, steps, E, GROUPED, RAGGED)
        row_b = e * N + column if GROUPED else column
        for k in range(begin, end):
            mbarrier.wait(free.index(stage), phase)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(a, [row, k * 128], bar, buffers_a.index(stage))
            tma.async_copy_global_to_shared(sa, [k, row], bar, buffers_sa.index(stage))
            tma.async_copy_global_to_shared(b, [row_b, k * 128], bar, buffers_b.index(stage))
            if not BLOCKS:
                tma.async_copy_global_to_shared(sb, [k, row_b], bar, buffers_sb.index(stage))
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1


@gluon.jit
def _added(
    acc, part, scale, buffers_sb, stage, first: gl.constexpr, columns: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """acc + part times its rows' scales, and its columns' where they have some. The empty assembly is a place: without it
    the compiler moves all additions behind all products, and has no registers for that."""
    if not BLOCKS:
        part = part * buffers_sb.index(stage).reshape([COLUMNS]).slice(first, 128, 0).load(columns)[None, :]
    acc = acc + part * scale[:, None]
    return gl.inline_asm_elementwise("", "=f,0", [acc], gl.float32, is_pure=False, pack=1)


@gluon.jit
def _store(c, acc, row, column, M, N, of_part: gl.constexpr):
    m = row + gl.arange(0, 64, gl.SliceLayout(1, of_part))
    n = column + gl.arange(0, 128, gl.SliceLayout(0, of_part))
    to = c + (m.to(gl.int64)[:, None] * N + n[None, :])
    gl.store(to, acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@gluon.jit
def _multiply(
    buffers_a, buffers_sa, buffers_b, buffers_sb, ready, free, c, sb, place, M, N, steps, stride_b, stride_bk, stride_be, E,
    tiles,
    FIRST: gl.constexpr, BLOCKS: gl.constexpr, GROUPED: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows from FIRST on, in two parts of 128 columns."""
    of_part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    rows: gl.constexpr = gl.SliceLayout(1, of_part)
    columns: gl.constexpr = gl.SliceLayout(0, of_part)
    stage, phase = 0, 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column, e, begin, end = _tile(index, place, M, N, steps, E, GROUPED, RAGGED)
        zero = gl.full([64, 128], 0.0, gl.float32, of_part)
        acc_0, acc_1 = zero, zero
        if BLOCKS:
            scales_b = sb + (column // 128) * stride_b
            if GROUPED:
                scales_b += gl.minimum(e, E - 1).to(gl.int64) * stride_be
            # The second part's columns may be all beyond the last one.
            other = gl.minimum(1, (N - 1) // 128 - column // 128) * stride_b
            next_0, next_1 = gl.load(scales_b), gl.load(scales_b + other)
        for i in range(begin, end):
            mbarrier.wait(ready.index(stage), phase)
            codes_a, codes_b = buffers_a.index(stage), buffers_b.index(stage)
            mine = codes_a.slice(FIRST, 64, 0)
            b_0, b_1 = codes_b.slice(0, 128, 0), codes_b.slice(128, 128, 0)
            queued = warpgroup_mma(mine, b_0.permute((1, 0)), zero, use_acc=False, is_async=True)
            scale_0 = buffers_sa.index(stage).reshape([128]).slice(FIRST, 64, 0).load(rows)
            scale_1 = scale_0
            if BLOCKS:
                scale_0, scale_1 = scale_0 * next_0, scale_1 * next_1
                at = gl.minimum(i + 1, end - 1) * stride_bk
                next_0, next_1 = gl.load(scales_b + at), gl.load(scales_b + other + at)
            part = warpgroup_mma_wait(0, deps=(queued,))
            acc_0 = _added(acc_0, part, scale_0, buffers_sb, stage, 0, columns, BLOCKS)
            # Into the registers of the part before: ptxas would queue it before that one is added, and have none left.
            queued = warpgroup_mma(mine, b_1.permute((1, 0)), part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(queued,))
            acc_1 = _added(acc_1, part, scale_1, buffers_sb, stage, 128, columns, BLOCKS)
            _barrier()  # all four warps are done with the buffer
            mbarrier.arrive(free.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage, phase = 0, phase ^ 1
        to, inside = c, M
        if RAGGED:
            to = c + e.to(gl.int64) * M * N
        if GROUPED:
            inside = gl.where(e < E, M, 0)  # nobody's rows are not stored
        _store(to, acc_0, row + FIRST, column, inside, N, of_part)
        _store(to, acc_1, row + FIRST, column + 128, inside, N, of_part)


@gluon.jit
def hopper_product_kernel(
    a, sa, b, sb, c, place, M, N, steps, stride_b, stride_bk, stride_be, E, tiles,
    BLOCKS: gl.constexpr, GROUPED: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """a and b are descriptors of codes [rows, sum], sa of scales [steps, rows], as sb is unless BLOCKS, which has a pointer.
    place: each row tile's expert (GROUPED), or where each expert's steps end (RAGGED)."""
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32)
    size_a: gl.constexpr = 128 * (128 + 4)
    size_b: gl.constexpr = COLUMNS * 128 if BLOCKS else COLUMNS * (128 + 4)
    buffers_a = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 128], a.layout)
    buffers_b = gl.allocate_shared_memory(b.dtype, [STAGES, COLUMNS, 128], b.layout)
    buffers_sa = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], flat)
    buffers_sb = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 8 if BLOCKS else COLUMNS], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    _barrier()
    scales_b = c  # not read
    if BLOCKS:
        scales_b = sb
    gl.warp_specialize(
        [
            (_multiply, (buffers_a, buffers_sa, buffers_b, buffers_sb, ready, free, c, scales_b, place, M, N, steps,
                         stride_b, stride_bk, stride_be, E, tiles, 0, BLOCKS, GROUPED, RAGGED)),
            (_multiply, (buffers_a, buffers_sa, buffers_b, buffers_sb, ready, free, c, scales_b, place, M, N, steps,
                         stride_b, stride_bk, stride_be, E, tiles, 64, BLOCKS, GROUPED, RAGGED)),
            (_load, (a, sa, b, sb, buffers_a, buffers_sa, buffers_b, buffers_sb, ready, free, place, M, N, steps, E, tiles,
                     size_a + size_b, BLOCKS, GROUPED, RAGGED)),
        ],
        [4, 1], [232, 24],
    )  # fmt: skip


def processors(device: torch.device) -> int:
    """Multiprocessors: as many programs do all tiles, which are independent of one another."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def missing(a: Quantised, b: Quantised) -> str | None:
    """Why the kernel cannot take these operands, or None."""
    M, K = a[0].shape
    if (
        not M
        or not K
        or K % 16
        or not all(codes.is_contiguous() and codes.data_ptr() % 16 == 0 for codes in (a[0], b[0]))
    ):
        return "it takes rows of contiguous codes and sums of a multiple of 16"
    if not a[0].is_cuda or torch.cuda.get_device_capability(a[0].device) != (9, 0):
        return "it needs a Hopper card"
    return None


def product(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype, tile_expert: Tensor | None = None) -> Tensor:
    """As `fp8_products.product`, without splitting the sum."""
    N, grouped = b[0].shape[-2], tile_expert is not None
    assert blocks or not grouped
    out = torch.empty(len(a[0]), N, dtype=dtype, device=a[0].device)
    _launch(a, b, blocks, out, triton.cdiv(a[0].shape[1], TILE), tile_expert, len(b[0]) if grouped else 1, False)
    return out


def weight_gradient(a: Quantised, b: Quantised, tile_ends: Tensor, dtype: torch.dtype) -> Tensor:
    """As `fp8_products.weight_gradient`."""
    out = torch.empty(len(tile_ends), len(a[0]), len(b[0]), dtype=dtype, device=a[0].device)
    _launch(a, b, False, out, 0, tile_ends, 1, True)
    return out


def _launch(
    a: Quantised, b: Quantised, blocks: bool, out: Tensor, steps: int, place: Tensor | None, experts: int, ragged: bool,
) -> None:  # fmt: skip
    (a_codes, a_scale), (b_codes, b_scale), (M, N) = a, b, out.shape[-2:]
    assert a_codes.shape[1] % 16 == 0
    codes, numbers = gl.NVMMASharedLayout(128, 8), gl.NVMMASharedLayout(0, 32)
    of_b: TensorDescriptor | Tensor = b_scale
    if not blocks:
        of_b = TensorDescriptor.from_tensor(_by_step(b_scale), [1, COLUMNS.value], numbers)
    stride_b, stride_bk = b_scale.stride()[-2:]
    tiles = triton.cdiv(M, TILE) * triton.cdiv(N, COLUMNS.value) * (len(out) if ragged else 1)
    hopper_product_kernel[(min(tiles, processors(out.device)),)](
        TensorDescriptor.from_tensor(a_codes, [TILE, TILE], codes),
        TensorDescriptor.from_tensor(_by_step(a_scale), [1, TILE], numbers),
        TensorDescriptor.from_tensor(b_codes.view(-1, b_codes.shape[-1]), [COLUMNS.value, TILE], codes),
        of_b, out, place, M, N, steps, stride_b, stride_bk, b_scale.stride(0) if blocks and b_scale.dim() == 3 else 0,
        experts, tiles, BLOCKS=blocks, GROUPED=place is not None and not ragged, RAGGED=ragged, num_warps=4,
    )  # fmt: skip


def _by_step(scale: Tensor) -> Tensor:
    """Scales of tiles [rows, steps] as [steps, rows] with rows together, 16 bytes from one step to the next or a multiple of
    that."""
    turned = scale.T
    if turned.stride(1) != 1 or turned.stride(0) % 4 or turned.data_ptr() % 16:
        steps, rows = turned.shape
        lying = turned.new_empty(steps, rows + -rows % 4)[:, :rows]
        turned = lying.copy_(turned)
    return turned
