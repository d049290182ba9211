"""The routed experts of one layer as one grouped op: out[n] = sum_k gate[n,k] * SwiGLU_{expert[n,k]}(x[n]).

`loop` is the definition: expert by expert, only those that were chosen. `native` is the same for training on a CPU, with
kernels for what stands between its products. `grouped` sorts the (token, slot) pairs by expert and runs two grouped matrix
products, with no loop and no wait for the device, so that a step can be compiled or captured. `fused` is the same for
training, with a backward of its own that keeps and moves less. `dense` computes every expert for every token and lets the
gates silence those not chosen: for a few narrow experts that is less than moving rows about. `triton` is for decoding: few
tokens, where all that counts is how fast the chosen experts' weights are read. All but `dense` add a token's experts in
fp32 in slot order; none adds by atomics, so a row does not depend on the other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.errors import BackendUnavailable
from rorqual.ops import training
from rorqual.ops.fused import fuses
from rorqual.ops.native import training as native
from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
experts_backends: Backends[Experts] = Backends("experts")

BOUND = 2e-5
"""Largest absolute difference between backends in fp32, for outputs of unit scale."""


def _combine(y_MD: Tensor, rows_M: Tensor, gates_NK: Tensor) -> Tensor:
    """Bring expert outputs, laid out by expert, back to (token, slot) order and add a token's slots."""
    N, K = gates_NK.shape
    y_NKD = y_MD.new_empty(N * K, y_MD.shape[-1]).index_copy(0, rows_M, y_MD).view(N, K, -1)
    return (y_NKD.float() * gates_NK[..., None]).sum(1).to(y_MD.dtype)


def by_expert(
    x_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor, experts: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The loop itself, for any way of storing experts: run(expert, its rows [n, D]) -> [n, D], for those chosen."""
    order_M = chosen_NK.flatten().argsort(stable=True)
    counts = torch.bincount(chosen_NK.flatten(), minlength=experts).tolist()
    x_MD = x_ND[order_M // chosen_NK.shape[1]]
    # Split at once: the gradient of a slice is as large as the whole.
    out = [run(expert, rows) for expert, rows in enumerate(x_MD.split(counts)) if len(rows)]
    return _combine(torch.cat(out) if out else x_MD, order_M, gates_NK)


@experts_backends.register("loop")
def experts_loop(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """x [N, D], gate and up projections [E, 2F, D] (gate first), down projections [E, D, F], gates [N, K] fp32,
    chosen [N, K] int64 -> [N, D] in x's dtype. Waits for the device once, to learn the load."""

    gate_up, down = gate_up_E2FD.unbind(), down_EDF.unbind()

    def run(expert: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, gate_up[expert].to(rows.dtype)).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down[expert].to(rows.dtype))

    return by_expert(x_ND, gates_NK, chosen_NK, down_EDF.shape[0], run)


@experts_backends.register("native", native.native_missing)
def experts_native(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The loop for training in fp32 on a CPU, with a backward of its own and kernels between the products; else the loop."""
    if torch.is_grad_enabled() and native.takes(x_ND, gate_up_E2FD, down_EDF, gates_NK):
        return native.experts(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)
    return experts_loop(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)


@experts_backends.register("grouped")
def experts_grouped(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor
) -> Tensor:
    """The same through `torch.nn.functional.grouped_mm`: one product over all experts, rows given by offsets."""
    flat_M = chosen_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    x_MD = x_ND[order_M // chosen_NK.shape[1]]
    experts = torch.arange(down_EDF.shape[0], device=x_ND.device)
    # Not bincount: its result has a data-dependent shape on CUDA and would wait for the device.
    ends_E = (flat_M[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_MD, gate_up_E2FD.to(x_ND.dtype).mT, offs=ends_E).chunk(2, -1)
    y_MD = F.grouped_mm(F.silu(gate) * up, down_EDF.to(x_ND.dtype).mT, offs=ends_E)
    return _combine(y_MD, order_M, gates_NK)


@experts_backends.register("dense")
def experts_dense(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The same as one SwiGLU of E * F channels, each expert's times its gate, which is 0 where it was not chosen."""
    E, D, width = down_EDF.shape
    gates_NE = gates_NK.new_zeros(len(x_ND), E).scatter(1, chosen_NK, gates_NK)
    both_NEF = F.linear(x_ND, gate_up_E2FD.to(x_ND.dtype).flatten(0, 1)).unflatten(1, (E, 2 * width))
    gate_NEF, up_NEF = both_NEF.chunk(2, -1)
    h_NEF = (F.silu(gate_NEF) * up_NEF * gates_NE[..., None]).to(x_ND.dtype)
    return F.linear(h_NEF.flatten(1), down_EDF.to(x_ND.dtype).transpose(0, 1).reshape(D, E * width))


def narrow(down_EDF: Tensor, top_k: int) -> bool:
    """Whether on a GPU `dense` trains faster: what it computes for nothing, 18 (E - K) F D operations a token at 500
    TFLOP/s, against what `fused` moves, some twelve passes over K rows of D 16-bit numbers at 4 TB/s."""
    E, _, width = down_EDF.shape
    return (E - top_k) * width <= 160 * top_k


@experts_backends.register("fused", triton_missing)
def experts_fused(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """`ops.training.experts`, which a compiler leaves alone; `dense` to train narrow experts."""
    if not torch.is_grad_enabled() and not fuses(x_ND):
        return experts_grouped(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)
    if torch.is_grad_enabled() and narrow(down_EDF, chosen_NK.shape[1]):
        return experts_dense(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)
    if torch.compiler.is_compiling():  # said only here: as a decorator it would load the compiler, 150 MB, at import
        return torch.compiler.disable(training.experts)(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)
    return training.experts(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK)


@experts_backends.register("triton", triton_missing)
def experts_triton(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The same by `ops.triton.experts`, forward only. Raises BackendUnavailable where a gradient is asked for."""
    from rorqual.ops.formats import Weight
    from rorqual.ops.triton.experts import routed_experts

    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, gate_up_E2FD, down_EDF, gates_NK)):
        raise BackendUnavailable("experts backend 'triton' has no gradient", remedy="train with 'grouped'")
    gate_up = Weight.plain(gate_up_E2FD.unflatten(1, (2, -1)))
    return routed_experts(x_ND, gate_up, Weight.plain(down_EDF), gates_NK, chosen_NK)
