"""The routed experts in FP8 as grouped products: `ops.fp8_train.fp8_train_experts` without its loop over experts.

Rows are sorted by expert and every expert's rows are padded with zeros to whole tiles of 128, so that tiles along the
tokens, which the gradient of a weight needs, belong to one expert each and are those of the loop. A token is quantised
once and its codes are dispatched (section 3.3.3: in FP8, with power-of-two scales). FP8 codes of the tokens and of gate
and up wait for the backward, and the experts' outputs in their own dtype, for the gates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rorqual.ops.fp8 import BLOCK

Quantised = tuple[Tensor, Tensor]


class Places(NamedTuple):
    """place_M: where each slot's row lies; slot_P: the slot of each row, -1 in padding; tile_expert: of each 128 rows, E for
    none; tile_ends_E: where each expert's tiles end. All int32."""

    place_M: Tensor
    slot_P: Tensor
    tile_expert: Tensor
    tile_ends_E: Tensor


def places(chosen_NK: Tensor, experts: int) -> Places:
    """Rows by expert, each expert's padded to whole tiles; as many rows as could be needed at worst, so that nothing waits
    for the device."""
    from rorqual.ops.triton.routing import sort_by_expert

    place, _, ends = sort_by_expert(chosen_NK, experts)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    tile_ends = ((ends - starts + BLOCK - 1) // BLOCK).cumsum(0, dtype=torch.int32)
    padded = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1])) * BLOCK
    place = place + (padded - starts)[chosen_NK.flatten()]
    tiles = -(-len(place) // BLOCK) + experts
    slot = torch.full((tiles * BLOCK,), -1, dtype=torch.int32, device=place.device)
    slot[place.long()] = torch.arange(len(place), dtype=torch.int32, device=place.device)
    tile = torch.arange(tiles, dtype=torch.int32, device=place.device)
    return Places(place, slot, torch.searchsorted(tile_ends, tile, right=True, out_int32=True), tile_ends)


def fits(gate_up_E2FD: Tensor, down_EDF: Tensor) -> bool:
    """Whether gate and up end with whole tiles."""
    return down_EDF.shape[2] % BLOCK == 0


def _dispatch(x: Quantised, slot_P: Tensor, top_k: int) -> Quantised:
    """The codes of each row's token, and their scales."""
    from rorqual.ops.triton.grouped import gather_rows

    codes, scale = x
    rows = gather_rows(codes.view(torch.uint8), slot_P, top_k).view(codes.dtype)
    return rows, scale.T.index_select(1, slot_P.clamp_min(0) // top_k).T


def _products(backend: str, width: int) -> Any:
    """The module whose `product` and `weight_gradient` multiply."""
    from rorqual.ops.fp8_train import hopper_missing
    from rorqual.ops.triton import fp8_products

    if backend == "triton" or width % 16 or hopper_missing():
        return fp8_products
    from rorqual.ops.triton import fp8_hopper

    return fp8_hopper


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        gates_NK: Tensor,
        chosen_NK: Tensor,
        backend: str,
    ) -> Tensor:
        from rorqual.ops.fp8_train import kernel_quantiser
        from rorqual.ops.triton.experts import combine
        from rorqual.ops.triton.fused import swiglu

        ctx.products, ctx.quantiser = _products(backend, x_ND.shape[1]), kernel_quantiser(backend)
        product, quantiser = ctx.products.product, ctx.quantiser
        where, dtype = places(chosen_NK, len(down_EDF)), x_ND.dtype
        x = quantiser.tiles(x_ND, "ue8m0")
        (up, up_turned), (down, down_turned) = quantiser.weight(gate_up_E2FD), quantiser.weight(down_EDF)
        gu = product(_dispatch(x, where.slot_P, chosen_NK.shape[1]), up, True, dtype, where.tile_expert)
        h = quantiser.tiles(swiglu(*gu.chunk(2, -1)), None)
        y = product(h, down, True, dtype, where.tile_expert)
        ctx.save_for_backward(*x, *quantiser.tiles(gu, None), *up_turned, *down_turned, y, gates_NK, *where)
        ctx.dtypes = gate_up_E2FD.dtype, down_EDF.dtype
        return combine(y, where.place_M, gates_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from rorqual.ops.triton.experts import combine
        from rorqual.ops.triton.fp8_train import swiglu_backward
        from rorqual.ops.triton.grouped import gate_rows

        product, weight_gradient, quantiser = ctx.products.product, ctx.products.weight_gradient, ctx.quantiser
        saved = ctx.saved_tensors
        x, gu, up, down = (saved[i : i + 2] for i in (0, 2, 4, 6))
        y, gates, where = saved[8], saved[9], Places(*saved[10:])
        dtype, (up_dtype, down_dtype) = y.dtype, ctx.dtypes
        dy, dgates = gate_rows(grads[0].contiguous(), y, where.slot_P, gates)
        along, across = quantiser.both(dy, "ue8m0")
        F, G = gu[0].shape[1] // 2, gu[1].shape[1] // 2
        gate_up = (gu[0][:, :F], gu[1][:, :G]), (gu[0][:, F:], gu[1][:, G:])
        h, dgu = swiglu_backward(*gate_up, product(along, down, True, dtype, where.tile_expert))
        ddown = weight_gradient(across, quantiser.tokens(h, None), where.tile_ends_E, down_dtype)
        along, across = quantiser.both(dgu, None)
        rows = _dispatch(x, where.slot_P, gates.shape[1])
        dup = weight_gradient(across, quantiser.tokens(rows, None), where.tile_ends_E, up_dtype)
        dx = combine(product(along, up, True, dtype, where.tile_expert), where.place_M, torch.ones_like(gates))
        return dx, dup, ddown, dgates, None, None


def fp8_grouped_experts(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor, backend: str = "auto"
) -> Tensor:
    """`fp8_train_experts` by `ops.triton.fp8_hopper` on Hopper, by `ops.triton.fp8_products` elsewhere, where the backend is
    "triton" and where the width is no multiple of 16; the weights in any float dtype, contiguous."""
    y: Tensor = _GroupedExperts.apply(  # type: ignore[no-untyped-call]
        x_ND, gate_up_E2FD, down_EDF, gates_NK.contiguous(), chosen_NK.contiguous(), backend
    )
    return y
