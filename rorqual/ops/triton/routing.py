"""Routing in training: the gates' gradient, the sequence-wise balance loss, and sorting tokens by expert.

Counts are integers added atomically, which gives the same sum in any order; everything in floating point is added in a
fixed one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _route_backward_kernel(
    scores, gates, chosen, dgates, dscores, dlogits, scale,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, WITH: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    s = tl.load(scores + n * E + e, mask=e < E, other=0.0)
    ds = tl.zeros((BLOCK_E,), tl.float32)
    if WITH:
        ds += tl.load(dscores + n * E + e, mask=e < E, other=0.0)
    total, dot = 0.0, 0.0
    for k in tl.static_range(K):
        at = tl.load(chosen + n * K + k)
        total += tl.sum(tl.where(e == at, s, 0.0))
        dot += tl.load(dgates + n * K + k) * tl.load(gates + n * K + k)
    factor = scale
    if NORMALISE:
        # gate = scale * s / total: d s = scale / total * (d gate - sum(d gate * gate) / scale)
        total += 1e-20
        factor = scale / total
    for k in tl.static_range(K):
        at = tl.load(chosen + n * K + k)
        d = tl.load(dgates + n * K + k) * factor
        if NORMALISE:
            d -= dot / total
        ds += tl.where(e == at, d, 0.0)
    tl.store(dlogits + n * E + e, ds * s * (1.0 - s), mask=e < E)


def route_backward(
    scores_NE: Tensor, gates_NK: Tensor, chosen_NK: Tensor, dgates_NK: Tensor, dscores_NE: Tensor | None,
    normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of the router's logits [N, E] fp32 from those of gates and affinities, all contiguous fp32."""
    (N, E), K = scores_NE.shape, gates_NK.shape[1]
    dlogits = torch.empty_like(scores_NE)
    _route_backward_kernel[(N,)](
        scores_NE, gates_NK, chosen_NK, dgates_NK, dscores_NE, dlogits, scale, E=E, K=K, NORMALISE=normalise,
        WITH=dscores_NE is not None, BLOCK_E=triton.next_power_of_2(E), num_warps=1,
    )  # fmt: skip
    return dlogits


@triton.jit
def _balance_kernel(
    scores, counts, shares, T, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """ROWS tokens of one sequence: how often each expert is among a token's top K affinities, and the sums of the tokens'
    normalised affinities."""
    b, part = tl.program_id(0), tl.program_id(1)
    t, e = part * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    real = (t < T)[:, None] & (e < E)[None, :]
    rows = (b * T + t).to(tl.int64)[:, None] * E + e[None, :]
    s = tl.load(scores + rows, mask=real, other=0.0)
    total = tl.sum(s, 1)[:, None]
    share = tl.where(total > 0, s / tl.where(total > 0, total, 1.0), 1.0 / E)
    place = shares + (b * tl.num_programs(1) + part) * E + e
    tl.store(place, tl.sum(tl.where(real, share, 0.0), 0), mask=e < E)
    left = tl.where(real, s, -1.0)
    taken = tl.zeros((ROWS, BLOCK_E), tl.int32)
    for _ in tl.static_range(K):
        top = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == top, e[None, :], BLOCK_E), 1)[:, None]
        hit = (e[None, :] == first) & real
        taken += hit.to(tl.int32)
        left = tl.where(e[None, :] == first, -2.0, left)
    tl.atomic_add(counts + b * E + e, tl.sum(taken, 0), mask=e < E)


def balance_parts(scores_NE: Tensor, T: int, K: int) -> tuple[Tensor, Tensor]:
    """Of sequences of T tokens: how often each expert is among the top K affinities (int32 [B, E]; of equals the lower
    expert), and the mean normalised affinity P (fp32 [B, E])."""
    N, E = scores_NE.shape
    B, rows = N // T, 32
    counts = torch.zeros(B, E, dtype=torch.int32, device=scores_NE.device)
    shares = torch.empty(B, triton.cdiv(T, rows), E, dtype=torch.float32, device=scores_NE.device)
    _balance_kernel[(B, shares.shape[1])](
        scores_NE, counts, shares, T, E=E, K=K, ROWS=rows, BLOCK_E=triton.next_power_of_2(E), num_warps=4
    )
    return counts, shares.sum(1) / T


@triton.jit
def _balance_backward_kernel(scores, dp, ds, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    s = tl.load(scores + n * E + e, mask=e < E, other=0.0)
    g = tl.load(dp + n // T * E + e, mask=e < E, other=0.0)
    total = tl.sum(s)
    safe = tl.where(total > 0, total, 1.0)
    grad = (g - tl.sum(g * s) / safe) / safe
    tl.store(ds + n * E + e, tl.where(total > 0, grad, 0.0), mask=e < E)


def balance_backward(scores_NE: Tensor, dshare_BE: Tensor, T: int) -> Tensor:
    """Gradient of the affinities from that of each token's normalised affinity, which is the same for all of a sequence."""
    N, E = scores_NE.shape
    ds = torch.empty_like(scores_NE)
    _balance_backward_kernel[(N,)](scores_NE, dshare_BE, ds, T, E=E, BLOCK_E=triton.next_power_of_2(E), num_warps=1)
    return ds


# ---- sorting -------------------------------------------------------------------------------------------------------


@triton.jit
def _count_kernel(chosen, counts, slots, blocks, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    expert = tl.load(chosen + i, mask=i < slots, other=E).to(tl.int32)
    count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + e * blocks + tl.program_id(0), count, mask=e < E)


@triton.jit
def _place_kernel(chosen, counts, ends, place, slot, slots, blocks, E: tl.constexpr, BLOCK: tl.constexpr):
    local = tl.arange(0, BLOCK)
    i = tl.program_id(0) * BLOCK + local
    expert = tl.load(chosen + i, mask=i < slots, other=E).to(tl.int32)
    before = tl.sum(((expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])).to(tl.int32), 1)
    at = expert * blocks + tl.program_id(0)
    mine = (i < slots) & (expert < E)
    start = tl.load(ends + at, mask=mine, other=0) - tl.load(counts + at, mask=mine, other=0)
    tl.store(place + i, (start + before).to(tl.int32), mask=mine)
    tl.store(slot + start + before, i.to(tl.int32), mask=mine)


def _counts(flat_M: Tensor, experts: int) -> tuple[Tensor, int]:
    """Of each expert in each block of slots, int32 [E, blocks], and a block's size."""
    block = 256 if experts <= 64 else 128
    blocks = triton.cdiv(len(flat_M), block)
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=flat_M.device)
    if blocks:
        _count_kernel[(blocks,)](
            flat_M, counts, len(flat_M), blocks, E=experts, BLOCK=block, BLOCK_E=triton.next_power_of_2(experts),
            num_warps=8,
        )  # fmt: skip
    return counts, block


def count_by_expert(chosen_NK: Tensor, experts: int) -> Tensor:
    """Slots of each expert, int64 [E]."""
    return _counts(chosen_NK.reshape(-1), experts)[0].sum(1)


def sort_by_expert(chosen_NK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort of the N * K slots: (place of each slot, slot at each place, where each expert's places end),
    all int32. Nothing waits for the device."""
    flat = chosen_NK.reshape(-1)
    slots, (counts, block) = len(flat), _counts(flat, experts)
    blocks = counts.shape[1]
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    place, slot = torch.empty(2, slots, dtype=torch.int32, device=chosen_NK.device)
    _place_kernel[(blocks,)](flat, counts, ends, place, slot, slots, blocks, E=experts, BLOCK=block, num_warps=8)
    return place, slot, ends.view(experts, blocks)[:, -1].contiguous()
