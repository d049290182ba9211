"""How a matrix may be stored other than plainly: the interface that FP8 blocks and packed integers fill.

A format knows its released tensor suffixes (`weight_scale_inv`, `weight_packed`, ...), and how to multiply by what they
hold. `model.quantised` builds layers on it; `checkpoint` reads and writes through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.experts import by_expert

Parts = Mapping[str, Tensor]
"""The tensors of one stored matrix (or of a stack of them, with leading dimensions), by released suffix."""


PLAIN, FP8 = 0, 1


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored matrix (or a stack) as the kernels of `ops.triton` read it. kind: PLAIN; FP8, E4M3 with one scale a block of
    128 x 128; or the bits of packed integers with one scale for 32 inputs (`ops.packed`). scale: of a plain one the
    data again, which nobody reads as a scale. dynamic: activations are quantised as well (FP8 only)."""

    kind: int
    data: Tensor
    scale: Tensor
    dynamic: bool = False

    @classmethod
    def plain(cls, data: Tensor) -> Weight:
        return cls(PLAIN, data, data)

    def view(self, index: Any) -> Weight:
        """A part or another view of the stack: the same index into both, which leaves the last two dimensions."""
        return Weight(self.kind, self.data[index], self.scale[index], self.dynamic)


class WeightFormat(Protocol):
    """One way to store matrices [..., out, in]. Formats are values: equal ones multiply alike."""

    @property
    def name(self) -> str:
        """fp8, int8, int4 or plain."""

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Released suffix -> shape and dtype, for a matrix (stack) of this shape."""

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """The inverse: the shape of the matrix (stack) that these parts store."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise [..., out, in]. Raises ValueError for values that are not finite."""

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The stored matrix as plain numbers, [..., out, in]; computed in fp32, rounded once."""

    def linear(self, x: Tensor, parts: Parts) -> Tensor:
        """x [..., in] -> x W^T [..., out] in x's dtype."""

    def weight(self, parts: Parts) -> Weight | None:
        """For kernels that expand a weight as they read it; None where the format multiplies in a way of its own."""

    def describe(self, plain: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` for config.json; `plain` are the modules that stay unquantised."""


def finite(weight: Tensor) -> Tensor:
    """The weight in fp32. Raises ValueError if it holds NaN or infinity, which no scale can carry."""
    weight = weight.float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinite values")
    return weight


@dataclass(frozen=True)
class Plain:
    """No quantisation, as a format: for a stack whose neighbour is quantised."""

    dtype: torch.dtype
    name: str = "plain"

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": (tuple(shape), self.dtype)}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts["weight"].shape)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": finite(weight).to(self.dtype)}

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return parts["weight"].to(dtype)

    def linear(self, x: Tensor, parts: Parts) -> Tensor:
        return F.linear(x, parts["weight"].to(x.dtype))

    def weight(self, parts: Parts) -> Weight | None:
        return Weight.plain(parts["weight"])

    def describe(self, plain: Sequence[str]) -> dict[str, Any]:
        return {}


def experts_by_linear(
    x_ND: Tensor,
    gates_NK: Tensor,
    chosen_NK: Tensor,
    gate_up: tuple[WeightFormat, Parts],
    down: tuple[WeightFormat, Parts],
) -> Tensor:
    """The routed experts (`ops.experts`) through each format's own product, expert by expert: gate_up stored as
    [E, 2, F, D], down as [E, D, F]. The reference of every grouped form."""

    def run(expert: int, rows: Tensor) -> Tensor:
        form, parts = gate_up
        gate, up = (form.linear(rows, {k: v[expert, half] for k, v in parts.items()}) for half in (0, 1))
        form, parts = down
        return form.linear(F.silu(gate) * up, {k: v[expert] for k, v in parts.items()})

    return by_expert(x_ND, gates_NK, chosen_NK, next(iter(down[1].values())).shape[0], run)
