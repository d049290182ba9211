"""Weights as `kernels.cpp` reads them: panels of 16 outputs, in one of five forms.

f32 and bf16 hold the numbers themselves, fp8 the released codes and block scales; int8 and int4 hold the codes and
scales of `ops.packed`, four inputs of an output side by side. Packing happens once, at load, and the packed form is all
that stays in memory. `Packed.reference` computes the same product plainly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.fp8 import BLOCK
from rorqual.ops.native.build import PANEL, Matrix
from rorqual.ops.packed import GROUP

Kind = Literal["float32", "bfloat16", "fp8", "int8", "int4"]
Plain = Literal["float32", "bfloat16"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "fp8", "int8", "int4")


@dataclass(frozen=True)
class Packed:
    """A stack of `count` matrices [out, in]. data: codes in panels; scales: None for f32 and bf16."""

    kind: Kind
    shape: tuple[int, int, int]
    data: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def struct(self) -> Matrix:
        """For the kernels; valid as long as this object lives."""
        count, out, width = self.shape
        scales = self.scales
        return Matrix(
            self.data.data_ptr(), None if scales is None else scales.data_ptr(), self.data[0].nbytes,
            0 if scales is None else scales[0].nbytes, KINDS.index(self.kind), out, width, count,
        )  # fmt: skip


def pack_plain(weight: Tensor, kind: Plain) -> Packed:
    """[count, out, in] of any float dtype."""
    count, out, width = weight.shape
    return Packed(kind, (count, out, width), _panels(weight.to(getattr(torch, kind))), None)


def pack_fp8(codes: Tensor, scale: Tensor) -> Packed:
    """E4M3 codes [count, out, in] with scales [count, out, ceil(in/128)], equal within a panel: a block's scale at each
    of its rows (`rows_of_blocks`)."""
    count, out, width = codes.shape
    return Packed("fp8", (count, out, width), _panels(codes.view(torch.uint8)), scale[:, ::PANEL].float().contiguous())


def rows_of_blocks(scale: Tensor, out: int) -> Tensor:
    """Block scales [..., ceil(out/128), n] at each of the `out` rows."""
    return scale.repeat_interleave(BLOCK, -2)[..., :out, :]


def pack_integers(codes: Tensor, scale: Tensor, bits: int) -> Packed:
    """int8 codes [count, out, in] and scales [count, out, in/32] (`ops.packed.quantize_groups`)."""
    count, out, width = codes.shape
    assert width % GROUP == 0
    # [count, panel, in/4, 16, 4]
    panels = _rows(codes).unflatten(1, (-1, PANEL)).unflatten(-1, (-1, 4)).transpose(2, 3)
    if bits == 4:
        unsigned = (panels + 8).to(torch.uint8)
        panels = unsigned[:, :, 0::2] | (unsigned[:, :, 1::2] << 4)
    kind: Kind = "int4" if bits == 4 else "int8"
    return Packed(kind, (count, out, width), panels.contiguous(), _panels(scale.to(torch.bfloat16)))


def one_by_one(count: int, make: Callable[[int], Packed]) -> Packed:
    """A stack of `count` matrices from those that make(i) packs singly, so that what packing needs is needed for one."""
    first = make(0)
    whole = [None if t is None else t.new_empty(count, *t.shape[1:]) for t in (first.data, first.scales)]
    for i in range(count):
        packed = first if i == 0 else make(i)
        for to, part in zip(whole, (packed.data, packed.scales), strict=True):
            if to is not None and part is not None:
                to[i] = part[0]
    data, scales = whole
    assert data is not None
    return Packed(first.kind, (count, *first.shape[1:]), data, scales)


def quantise_rows(x: Tensor) -> Tensor:
    """What the integer kernels make of activations [..., in]: eight bits for every 32 inputs, expanded again, fp64."""
    tiles = x.float().unflatten(-1, (-1, GROUP))
    largest = tiles.abs().amax(-1, keepdim=True)
    # In fp64, where the product is exact: the kernels round it once, in a fused multiply-add.
    codes = torch.where(largest > 0, tiles.double() * torch.div(torch.tensor(127.0), largest).double(), 0.0).round()
    return (codes * (largest / 127).double()).flatten(-2)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up projections [..., F, in], F a multiple of 16 or padded to one, as alternating panels [..., 2F', in]."""
    gate, up = (F.pad(w, (0, 0, 0, -w.shape[-2] % PANEL)) for w in (gate, up))
    pairs = torch.stack((gate.unflatten(-2, (-1, PANEL)), up.unflatten(-2, (-1, PANEL))), -3)
    return pairs.flatten(-4, -2)


def _panels(weight: Tensor) -> Tensor:
    """[count, out, n] -> [count, out/16, n, 16]."""
    return _rows(weight).unflatten(1, (-1, PANEL)).transpose(2, 3).contiguous()


def _rows(weight: Tensor) -> Tensor:
    """Padded with zero rows to whole panels."""
    return F.pad(weight, (0, 0, 0, -weight.shape[1] % PANEL)) if weight.shape[1] % PANEL else weight


def matrix_pointer(packed: Packed) -> ctypes.Array[Matrix]:
    return (Matrix * 1)(packed.struct())
