"""Routed experts with plain weights for few tokens, in Triton: what a decoding step needs on a GPU.

Such a step reads the weights of the experts it chose and multiplies almost nothing, so all that counts is that every
multiprocessor reads all the time, and that there are few launches. Two ways, chosen by shapes alone (`FEW`):

Few slots (a slot is one of a token's K experts): two launches, matrix times vector, one row of h for each slot. A
program takes some weight rows and streams them along the reduction into lanes of fp32 sums, which are added once, at
the end. The slots are the fastest axis of the grid, so that two slots of one expert read its rows at about the same
time, the second from the cache. The second launch goes through a token's slots in order and writes the result.

More: rows are sorted by expert and multiplied in tiles of 16 by the kernel of `ops.triton.fp8`, then added in slot
order. Sorting is one launch as well: a slot's place is counted by comparing it with all others.

Nothing waits for the device and launch shapes depend on shapes only: a step can be captured in a CUDA graph. Which
blocks are used depends on D, F and K, never on N, and every reduction is one fixed loop: a row's result does not depend
on the rows beside it, as long as both batches take the same of the two ways.

Left out: gradients, and experts sharded over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from rorqual.ops.triton.fp8 import Tiling, launch
from rorqual.ops.triton.fused import swiglu

FEW = 2
"""Up to so many slots an expert on average, each slot reads its expert's weights for itself."""
TILE = Tiling(block_m=16, block_n=64, splits=1, warps=4, stages=3)
"""For more. Fixed, not `ops.triton.fp8.tiling`, whose splits depend on the number of rows."""
PROCESSORS = 132
"""An H100's multiprocessors."""


class Streams(NamedTuple):
    """How few slots read weights: rows of gate (and as many of up) a program, rows of down, columns a step, and steps
    in flight."""

    gate_rows: int
    down_rows: int
    columns: int
    warps: int
    stages: int


def streams(D: int, F: int, K: int) -> Streams:
    """The most rows a program with which one token alone still gives every multiprocessor something to read."""
    gate = next((rows for rows in (16, 8) if rows * PROCESSORS <= K * F), 4)
    down = next((rows for rows in (16, 8) if rows * (PROCESSORS - 4) <= D), 4)  # 1,024 wide: 128 programs of 8
    return Streams(gate, down, 256, 4, 3)


@triton.jit
def _swiglu_kernel(
    x, w, shared_gate, shared_up, h, chosen, stride_x, stride_we, stride_w, stride_shared,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[slot, f] = silu(gate_f x) (up_f x), fp32, for ROWS of the f of one slot. A token has K slots of chosen experts and
    then S slots of F rows each of the shared expert."""
    slot = tl.program_id(0)
    token, k = slot // (K + S), slot % (K + S)
    f = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    row = tl.minimum(f, F - 1).to(tl.int64)  # past the end: the last row again, never stored
    if k < K:
        expert = tl.load(chosen + token * K + k).to(tl.int64)
        gate_row = w + expert * stride_we
        up_row, stride = gate_row + F * stride_w, stride_w
    else:
        gate_row = shared_gate + (k - K).to(tl.int64) * F * stride_shared
        up_row, stride = shared_up + (k - K).to(tl.int64) * F * stride_shared, stride_shared
    gate_rows = gate_row + row[:, None] * stride + d[None, :]
    up_rows = up_row + row[:, None] * stride + d[None, :]
    x_row = x + token.to(tl.int64) * stride_x + d
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in tl.range(0, D, COLUMNS, num_stages=STAGES):
        if D % COLUMNS == 0:
            value = tl.load(x_row + at).to(tl.float32)[None, :]
            gate += tl.load(gate_rows + at).to(tl.float32) * value
            up += tl.load(up_rows + at).to(tl.float32) * value
        else:
            inside = at + d < D
            value = tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(gate_rows + at, mask=inside[None, :], other=0.0).to(tl.float32) * value
            up += tl.load(up_rows + at, mask=inside[None, :], other=0.0).to(tl.float32) * value
    gate_f = tl.sum(gate, 1)
    tl.store(h + slot.to(tl.int64) * F + f, gate_f * tl.sigmoid(gate_f) * tl.sum(up, 1), mask=f < F)


@triton.jit
def _down_kernel(
    h, w, shared, gates, chosen, add, y, stride_we, stride_w, stride_shared, stride_add,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[n, d] = sum over slots of gate down_d h, for ROWS of the d of one token. One loop over slots and columns, so
    that the next expert's weights are on their way before this one's are used up."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    f = tl.arange(0, COLUMNS)
    at_d = tl.minimum(d, D - 1).to(tl.int64)[:, None]
    rows = w + at_d * stride_w + f[None, :]
    h += n * (K + S) * F
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    STEPS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    for step in tl.range(0, K * STEPS, num_stages=STAGES):
        k = step // STEPS
        at = step % STEPS * COLUMNS
        place = rows + tl.load(chosen + n * K + k).to(tl.int64) * stride_we + at
        gate = tl.load(gates + n * K + k).to(tl.float32)
        if F % COLUMNS == 0:
            acc += tl.load(place).to(tl.float32) * (tl.load(h + k * F + at + f) * gate)[None, :]
        else:
            inside = at + f < F
            value = tl.load(h + k * F + at + f, mask=inside, other=0.0) * gate
            acc += tl.load(place, mask=inside[None, :], other=0.0).to(tl.float32) * value[None, :]
    if S:
        # The shared expert's slots lie side by side in its rows.
        place = shared + at_d * stride_shared + f[None, :]
        h += K * F
        for at in tl.range(0, S * F, COLUMNS, num_stages=STAGES):
            inside = at + f < S * F
            value = tl.load(h + at + f, mask=inside, other=0.0)
            acc += tl.load(place + at, mask=inside[None, :], other=0.0).to(tl.float32) * value[None, :]
    total = tl.sum(acc, 1)
    if ADD:
        total += tl.load(add + n * stride_add + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + d, total.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _sort_kernel(
    chosen, place, token, tile_expert, tile_begin, row_end, slots,
    K: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each slot's place in the stable order by expert. The slot that opens a tile enters it in the list: an expert's
    tiles stand from start / TILE_ROWS + expert on, which leaves gaps and no two tiles in one place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + i, mask=i < slots, other=0)
    start = tl.zeros((BLOCK,), tl.int32)  # slots of the experts before
    rank = tl.zeros((BLOCK,), tl.int32)  # slots of this expert before
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, slots, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(chosen + j, mask=j < slots, other=2147483647)
        same = other[None, :] == expert[:, None]
        start += tl.sum((other[None, :] < expert[:, None]).to(tl.int32), 1)
        rank += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
        count += tl.sum(same.to(tl.int32), 1)
    tl.store(place + i, start + rank, mask=i < slots)
    tl.store(token + start + rank, i // K, mask=i < slots)
    opens = (i < slots) & (rank % TILE_ROWS == 0)
    tile = start // TILE_ROWS + expert + rank // TILE_ROWS
    tl.store(tile_expert + tile, expert.to(tl.int32), mask=opens)
    tl.store(tile_begin + tile, start + rank, mask=opens)
    tl.store(row_end + expert, start + count, mask=opens & (rank == 0))


@triton.jit
def _combine_kernel(
    y, place, gates, add, more, out, stride_add, K: tl.constexpr, D, ADD: tl.constexpr, MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        row = tl.load(place + n * K + k).to(tl.int64)
        value = tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(gates + n * K + k).to(tl.float32) * value
    if ADD:
        total += tl.load(add + n * stride_add + d, mask=d < D, other=0.0).to(tl.float32)
    if MORE:
        total += tl.load(more + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + n * D + d, total.to(out.dtype.element_ty), mask=d < D)


Shared = tuple[Tensor, Tensor, Tensor]
"""The shared expert's gate and up [W, D] and down [D, W], W a multiple of the routed experts' F."""


def routed_experts(
    x_ND: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gates_NK: Tensor,
    chosen_NK: Tensor,
    add_ND: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """The op of `ops.experts`: x [N, D], gate_up [E, 2F, D], down [E, D, F], gates [N, K], chosen [N, K] integers ->
    [N, D] in x's dtype. shared: an expert of every token, with gate 1. add [N, D] (the residual stream) joins the sum
    last, in fp32, before the one rounding. Weights of another dtype are converted as they are read. Chosen experts must
    exist: nothing checks them."""
    if x_ND.shape[0] == 0:
        return torch.empty_like(x_ND)
    rows = (x_ND, gate_up_E2FD, down_EDF, *(() if add_ND is None else (add_ND,)), *(shared or ()))
    assert all(t.stride(-1) == 1 for t in rows)
    gates_NK, chosen_NK = gates_NK.contiguous(), chosen_NK.contiguous()
    run = few_slots if chosen_NK.numel() <= FEW * down_EDF.shape[0] else many_slots
    return run(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK, add_ND, shared)


def few_slots(
    x_ND: Tensor, w_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor, add_ND: Tensor | None,
    shared: Shared | None = None, how: Streams | None = None,
) -> Tensor:  # fmt: skip
    (N, D), F, K = x_ND.shape, down_EDF.shape[2], chosen_NK.shape[1]
    how = how or streams(D, F, K)
    gate, up, down = shared or (w_E2FD[0], w_E2FD[0], down_EDF[0])  # not read without
    S = len(gate) // F if shared else 0
    assert not shared or (len(gate) == S * F and gate.stride(0) == up.stride(0)), "the shared expert is whole experts"
    h_MF = torch.empty(N * (K + S), F, dtype=torch.float32, device=x_ND.device)
    y_ND = torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device)
    _swiglu_kernel[(N * (K + S), triton.cdiv(F, how.gate_rows))](
        x_ND, w_E2FD, gate, up, h_MF, chosen_NK, x_ND.stride(0), w_E2FD.stride(0), w_E2FD.stride(1), gate.stride(0),
        K=K, S=S, D=D, F=F, ROWS=how.gate_rows, COLUMNS=how.columns, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
    _down_kernel[(N, triton.cdiv(D, how.down_rows))](
        h_MF, down_EDF, down, gates_NK, chosen_NK, add_ND, y_ND,
        down_EDF.stride(0), down_EDF.stride(1), down.stride(0), 0 if add_ND is None else add_ND.stride(0),
        K=K, S=S, D=D, F=F, ADD=add_ND is not None,
        ROWS=how.down_rows, COLUMNS=how.columns, STAGES=how.stages, num_warps=how.warps,
    )  # fmt: skip
    return y_ND


def many_slots(
    x_ND: Tensor, w_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor, add_ND: Tensor | None,
    shared: Shared | None = None, how: Tiling = TILE,
) -> Tensor:  # fmt: skip
    N, (E, _, F), K = len(x_ND), down_EDF.shape, chosen_NK.shape[1]
    more_ND = None
    if shared is not None:
        gate, up, down = (w.to(x_ND.dtype) for w in shared)
        more_ND = linear(swiglu(linear(x_ND, gate), linear(x_ND, up)), down)
    slots, tiles = N * K, N * K // how.block_m + E
    place_M, token_M = torch.empty(2, slots, dtype=torch.int32, device=x_ND.device)
    tile_expert = torch.full((tiles,), E, dtype=torch.int32, device=x_ND.device)  # E: no tile
    tile_begin, row_end = torch.empty_like(tile_expert), torch.empty(E, dtype=torch.int32, device=x_ND.device)
    _sort_kernel[(triton.cdiv(slots, 64),)](
        chosen_NK, place_M, token_M, tile_expert, tile_begin, row_end, slots, K=K, TILE_ROWS=how.block_m, BLOCK=64
    )
    listed = tile_expert, tile_begin, row_end
    h_MF = launch(x_ND, w_E2FD.unflatten(1, (2, F)), None, listed, token_M, slots, False, how)
    y_MD = launch(h_MF, down_EDF[:, None], None, listed, None, slots, False, how)
    return combine(y_MD, place_M, gates_NK, add_ND, more_ND)


def combine(
    y_MD: Tensor, place_M: Tensor, gates_NK: Tensor, add_ND: Tensor | None = None, more_ND: Tensor | None = None
) -> Tensor:
    """Experts' outputs [M, D], sorted by expert, into their tokens: slot i's row stands at place[i]; a token's slots are
    added in order in fp32, add [N, D] and more [N, D] (contiguous) last -> [N, D] in y's dtype."""
    (N, K), D = gates_NK.shape, y_MD.shape[1]
    out_ND = torch.empty(N, D, dtype=y_MD.dtype, device=y_MD.device)
    _combine_kernel[(N, triton.cdiv(D, 256))](
        y_MD, place_M, gates_NK, add_ND, more_ND, out_ND, 0 if add_ND is None else add_ND.stride(0),
        K=K, D=D, ADD=add_ND is not None, MORE=more_ND is not None, BLOCK=256, num_warps=2,
    )  # fmt: skip
    return out_ND
