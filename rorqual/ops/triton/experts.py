"""Routed experts for few tokens, in Triton, however their weights are stored: what a decoding step needs on a GPU.

Such a step reads the weights of the experts it chose and multiplies almost nothing, so all that counts is that every
multiprocessor reads all the time, and that there are few launches. Two ways, chosen by shapes alone (`FEW`):

Few slots (a slot is one of a token's K experts): two launches, matrix times vector, one row of h for each slot. A
program takes some weight rows and streams them along the reduction into lanes of fp32 sums, which are added once, at
the end. The slots are the fastest axis of the grid, so that two slots of one expert read its rows at about the same
time, the second from the cache. The second launch goes through a token's slots in order and writes the result.

More: rows are sorted by expert and multiplied in tiles of 16 or 32 by the kernel of `ops.triton.fp8`, then added in slot
order. Sorting is one launch as well: each expert counts the slots before its own.

Nothing waits for the device and launch shapes depend on shapes only: a step can be captured in a CUDA graph. Every
reduction is one fixed loop, whose order depends on D, F and K, never on N: a row's result does not depend on the rows
beside it, as long as both batches take the same of the two ways.

Left out: gradients, and experts sharded over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from rorqual.ops.formats import FP8, PLAIN, Weight
from rorqual.ops.triton.fp8 import Tiling, launch, tile_rows
from rorqual.ops.triton.fused import swiglu
from rorqual.ops.triton.overlap import begin, options
from rorqual.ops.triton.stream import add_columns, no_sums

FEW = {PLAIN: 2, FP8: 0.5, 8: 0.5, 4: 0.5}
"""By kind of weight: up to so many slots an expert on average, each slot reads its expert's weights for itself. Expanding
quantised ones again for each slot costs more than reading them."""
TILE = Tiling(block_m=16, block_n=64, splits=1, warps=4, stages=3)
"""For more; 32 rows from 16 an expert on, which changes no order of additions. Not `ops.triton.fp8.tiling`, whose splits
depend on the number of rows."""


class Streams(NamedTuple):
    """How few slots read weights: rows of a program and columns of a step, of gate and up and of down."""

    gate_rows: int
    gate_columns: int
    down_rows: int
    down_columns: int
    warps: int = 4


STREAMS = {
    PLAIN: Streams(4, 1024, 4, 1024), FP8: Streams(4, 1024, 4, 2048), 8: Streams(8, 1024, 8, 1024),
    4: Streams(8, 1024, 8, 2048),
}  # fmt: skip
"""By kind of weight, measured on an H200. So many columns at once that nothing is left to fetch ahead; fewer rows leave
registers for more programs."""


@triton.jit(do_not_specialize=["stride_se", "stride_sh", "stride_s", "stride_own_s"])
def _swiglu_kernel(
    x, w, w_scale, gate, gate_scale, up, up_scale, h, chosen,
    stride_x, stride_we, stride_wh, stride_w, stride_se, stride_sh, stride_s, stride_own, stride_own_s,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h[slot, f] = silu(gate_f x) (up_f x), fp32, for ROWS of the f of one slot. A token has K slots of chosen experts and
    then S slots of F rows each of the shared expert (gate and up)."""
    begin()
    slot = tl.program_id(0)
    token, k = slot // (K + S), slot % (K + S)
    f = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(f, F - 1).to(tl.int64)  # past the end: the last row again, never stored
    if k < K:
        expert = tl.load(chosen + token * K + k).to(tl.int64)
        gate_w, gate_s, stride, stride_scale = w + expert * stride_we, w_scale + expert * stride_se, stride_w, stride_s
        up_w, up_s = gate_w + stride_wh, gate_s + stride_sh
    else:
        row += (k - K).to(tl.int64) * F
        gate_w, gate_s, stride, stride_scale = gate, gate_scale, stride_own, stride_own_s
        up_w, up_s = up, up_scale
    x += token.to(tl.int64) * stride_x
    gates = no_sums(KIND, ROWS, COLUMNS)
    ups = no_sums(KIND, ROWS, COLUMNS)
    for at in range(0, D, COLUMNS):
        gates = add_columns(
            gates, x, gate_w, gate_s, row, at, 1.0, D, stride, stride_scale, KIND, COLUMNS, D % COLUMNS == 0
        )
        ups = add_columns(ups, x, up_w, up_s, row, at, 1.0, D, stride, stride_scale, KIND, COLUMNS, D % COLUMNS == 0)
    gate_f = tl.sum(gates, 1)
    tl.store(h + slot.to(tl.int64) * F + f, gate_f * tl.sigmoid(gate_f) * tl.sum(ups, 1), mask=f < F)


@triton.jit(do_not_specialize=["stride_se", "stride_s", "stride_own_s"])
def _down_kernel(
    h, w, w_scale, own, own_scale, gates, chosen, add, y, stride_we, stride_w, stride_se, stride_s, stride_own,
    stride_own_s, stride_add,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[n, d] = sum over slots of gate down_d h, for ROWS of the d of one token. One loop over slots and columns, so
    that lanes are added once."""
    begin()
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(d, D - 1).to(tl.int64)
    h += n * (K + S) * F
    acc = no_sums(KIND, ROWS, COLUMNS)
    STEPS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    for step in range(0, K * STEPS):
        k = step // STEPS
        at = step % STEPS * COLUMNS
        expert = tl.load(chosen + n * K + k).to(tl.int64)
        gate = tl.load(gates + n * K + k).to(tl.float32)
        acc = add_columns(
            acc, h + k * F, w + expert * stride_we, w_scale + expert * stride_se, row, at, gate, F, stride_w, stride_s,
            KIND, COLUMNS, F % COLUMNS == 0,
        )  # fmt: skip
    if S:
        # The shared expert's slots lie side by side in its rows.
        for at in range(0, S * F, COLUMNS):
            acc = add_columns(
                acc, h + K * F, own, own_scale, row, at, 1.0, S * F, stride_own, stride_own_s, KIND, COLUMNS,
                S * F % COLUMNS == 0,
            )  # fmt: skip
    total = tl.sum(acc, 1)
    if ADD:
        total += tl.load(add + n * stride_add + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + n * D + d, total.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _sort_kernel(
    chosen, place, token, tile_expert, tile_begin, row_end, slots,
    K: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert: where its slots go in the stable order by expert, and its tiles. They stand in the list from
    start / TILE_ROWS + expert on, up to where the next expert's begin, which leaves room that is named nobody's."""
    begin()
    expert, experts = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    other = tl.load(chosen + i, mask=i < slots, other=2147483647).to(tl.int32)
    mine = other == expert
    start = tl.sum((other < expert).to(tl.int32), 0)
    count = tl.sum(mine.to(tl.int32), 0)
    at = start + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(place + i, at, mask=mine)
    tl.store(token + at, i // K, mask=mine)
    tl.store(row_end + expert, start + count)
    first = start // TILE_ROWS + expert
    last = (start + count) // TILE_ROWS + expert + 1
    t = tl.arange(0, BLOCK)
    used = t * TILE_ROWS < count
    tl.store(tile_expert + first + t, tl.where(used, expert, experts), mask=first + t < last)
    tl.store(tile_begin + first + t, start + t * TILE_ROWS, mask=used)


@triton.jit
def _combine_kernel(
    y, place, gates, add, more, out, stride_add, K: tl.constexpr, D, ADD: tl.constexpr, MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    begin()
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


Shared = tuple[Weight, Weight, Weight]
"""The shared expert's gate and up [W, D] and down [D, W], W a multiple of the routed experts' F."""


def routed_experts(
    x_ND: Tensor,
    gate_up: Weight,
    down: Weight,
    gates_NK: Tensor,
    chosen_NK: Tensor,
    add_ND: Tensor | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """The op of `ops.experts`: x [N, D], gate_up [E, 2, F, D], down [E, D, F], gates [N, K], chosen [N, K] integers ->
    [N, D] in x's dtype. shared: an expert of every token, with gate 1. add [N, D] (the residual stream) joins the sum
    last, in fp32, before the one rounding. Weights are expanded as they are read. Chosen experts must exist: nothing
    checks them."""
    if x_ND.shape[0] == 0:
        return torch.empty_like(x_ND)
    assert x_ND.stride(1) == 1 and (add_ND is None or add_ND.stride(1) == 1)
    gates_NK, chosen_NK = gates_NK.contiguous(), chosen_NK.contiguous()
    few = chosen_NK.numel() <= FEW[gate_up.kind] * len(down.data) and streams_experts(x_ND, gate_up, down, shared)
    return (few_slots if few else many_slots)(x_ND, gate_up, down, gates_NK, chosen_NK, add_ND, shared)


def streams_experts(x_ND: Tensor, gate_up: Weight, down: Weight, shared: Shared | None) -> bool:
    """Whether `few_slots` takes them: activations as they are, rows of one program in one block of scales, and the shared
    expert stored as the others are."""
    kinds = {gate_up.kind, down.kind, *(w.kind for w in shared or ())}
    aligned = gate_up.kind == PLAIN or (gate_up.data.shape[2] % 16 == 0 and x_ND.shape[1] % 16 == 0)
    return len(kinds) == 1 and aligned and not any(w.dynamic for w in (gate_up, down, *(shared or ())))


def few_slots(
    x_ND: Tensor, gate_up: Weight, down: Weight, gates_NK: Tensor, chosen_NK: Tensor, add_ND: Tensor | None,
    shared: Shared | None = None, how: Streams | None = None,
) -> Tensor:  # fmt: skip
    (N, D), F, K = x_ND.shape, gate_up.data.shape[2], chosen_NK.shape[1]
    w, d = gate_up, down
    gate, up, own = shared or (w.view((0, 0)), w.view((0, 0)), d.view(0))  # not read without
    S = len(gate.data) // F if shared else 0
    assert not shared or len(gate.data) == S * F, "the shared expert is whole experts"
    assert gate.data.stride(0) == up.data.stride(0) and gate.scale.stride(0) == up.scale.stride(0)
    h_MF = torch.empty(N * (K + S), F, dtype=torch.float32, device=x_ND.device)
    y_ND = torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device)
    how = how or STREAMS[w.kind]
    _swiglu_kernel[(N * (K + S), triton.cdiv(F, how.gate_rows))](
        x_ND, w.data, w.scale, gate.data, gate.scale, up.data, up.scale, h_MF, chosen_NK,
        x_ND.stride(0), *w.data.stride()[:3], *w.scale.stride()[:3], gate.data.stride(0), gate.scale.stride(0),
        K=K, S=S, D=D, F=F, KIND=w.kind,
        ROWS=how.gate_rows, COLUMNS=how.gate_columns, num_warps=how.warps, **options(),
    )  # fmt: skip
    _down_kernel[(N, triton.cdiv(D, how.down_rows))](
        h_MF, d.data, d.scale, own.data, own.scale, gates_NK, chosen_NK, add_ND, y_ND,
        *d.data.stride()[:2], *d.scale.stride()[:2], own.data.stride(0), own.scale.stride(0),
        0 if add_ND is None else add_ND.stride(0),
        K=K, S=S, D=D, F=F, KIND=d.kind, ADD=add_ND is not None,
        ROWS=how.down_rows, COLUMNS=how.down_columns, num_warps=how.warps, **options(),
    )  # fmt: skip
    return y_ND


def many_slots(
    x_ND: Tensor, gate_up: Weight, down: Weight, gates_NK: Tensor, chosen_NK: Tensor, add_ND: Tensor | None,
    shared: Shared | None = None, how: Tiling = TILE,
) -> Tensor:  # fmt: skip
    N, E, K = len(x_ND), len(down.data), chosen_NK.shape[1]
    more_ND = None
    if shared is not None:
        gate, up, own = shared
        more_ND = _product(swiglu(_product(x_ND, gate), _product(x_ND, up)), own)
    if N * K > 16 * E:
        how = how._replace(block_m=32)
    slots, tiles = N * K, N * K // how.block_m + E
    place_M, token_M = torch.empty(2, slots, dtype=torch.int32, device=x_ND.device)
    tile_expert, tile_begin = torch.empty(2, tiles, dtype=torch.int32, device=x_ND.device)
    row_end = torch.empty(E, dtype=torch.int32, device=x_ND.device)
    _sort_kernel[(E,)](
        chosen_NK, place_M, token_M, tile_expert, tile_begin, row_end, slots,
        K=K, TILE_ROWS=how.block_m, BLOCK=max(16, triton.next_power_of_2(slots)), num_warps=1 if slots <= 256 else 4,
        **options(),
    )  # fmt: skip
    listed = tile_expert, tile_begin, row_end
    h_MF = launch(x_ND, gate_up, listed, token_M, slots, how)
    y_MD = launch(h_MF, down.view((slice(None), None)), listed, None, slots, how)
    return combine(y_MD, place_M, gates_NK, add_ND, more_ND)


def _product(x: Tensor, weight: Weight) -> Tensor:
    return linear(x, weight.data.to(x.dtype)) if weight.kind == PLAIN else tile_rows(x, weight)


def combine(
    y_MD: Tensor, place_M: Tensor, gates_NK: Tensor, add_ND: Tensor | None = None, more_ND: Tensor | None = None
) -> Tensor:
    """Experts' outputs [M, D], sorted by expert, into their tokens: slot i's row stands at place[i]; a token's slots are
    added in order in fp32, add [N, D] and more [N, D] (contiguous) last -> [N, D] in y's dtype."""
    (N, K), D = gates_NK.shape, y_MD.shape[1]
    out_ND = torch.empty(N, D, dtype=y_MD.dtype, device=y_MD.device)
    _combine_kernel[(N, triton.cdiv(D, 256))](
        y_MD, place_M, gates_NK, add_ND, more_ND, out_ND, 0 if add_ND is None else add_ND.stride(0),
        K=K, D=D, ADD=add_ND is not None, MORE=more_ND is not None, BLOCK=256, num_warps=2, **options(),
    )  # fmt: skip
    return out_ND
