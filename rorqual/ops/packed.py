"""Weight-only integers: 4 or 8 bits, symmetric, one bf16 scale for every 32 inputs of a row.

Stored as compressed-tensors' `pack-quantized`, so that vLLM and transformers read it: unsigned codes (value + 8, or
+ 128) packed into int32 from the low bits up along the input, `weight_packed`; `weight_scale` [out, in/32]; and
`weight_shape`. Rounding goes to the nearest code. The scale is the largest magnitude over 127.5, so
that both ends of the code range are used; of four bits over 7, 7.5 or 8, whichever errs least in that group (6.5 % less
than 7.5 alone, for Gaussian weights). What was rounded so, or by 7.5 alone, comes out as it was when it is rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.formats import Parts, Weight, finite
from rorqual.ops.fused import fuses

GROUP = 32
TILED_ROWS = 256
"""Up to so many rows a kernel expands a weight as it reads it; from there on it is expanded once and multiplied plainly."""


def quantize_groups(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> integer codes of that shape, int8 in [-2^(bits-1), 2^(bits-1) - 1], and scales [..., out, in/32]
    in bf16. `in` must be a multiple of the group. Raises ValueError for values that are not finite."""
    tiles = finite(weight).unflatten(-1, (-1, group))
    half = 2 ** (bits - 1)
    largest = tiles.abs().amax(-1)
    best = least = scale = torch.empty(0)
    for divisor in (half - 0.5, half - 1, half) if bits == 4 else (half - 0.5,):
        trial = torch.where(largest > 0, largest / divisor, 1.0).to(torch.bfloat16)
        trial = trial.clamp_min(torch.finfo(torch.bfloat16).tiny)
        wide = trial.float()[..., None]
        codes = (tiles / wide).round().clamp_(-half, half - 1)
        error = (codes * wide - tiles).square().sum(-1)
        if not len(scale):
            best, least, scale = codes, error, trial
        else:
            better = error < least
            least, scale = torch.where(better, error, least), torch.where(better, trial, scale)
            best = torch.where(better[..., None], codes, best)
    return best.flatten(-2).to(torch.int8), scale


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [..., in] -> int32 [..., in * bits / 32], the first code in the lowest bits."""
    per = 32 // bits
    unsigned = (codes.to(torch.int64) + 2 ** (bits - 1)).unflatten(-1, (-1, per))
    shifts = torch.arange(per, device=codes.device) * bits
    word = (unsigned << shifts).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse: int32 [..., n] -> int8 [..., n * 32 / bits]."""
    shifts = torch.arange(32 // bits, device=packed.device, dtype=torch.int32) * bits
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return (codes - 2 ** (bits - 1)).to(torch.int8).flatten(-2)


@dataclass(frozen=True)
class PackedIntegers:
    """`ops.formats.WeightFormat`: released suffixes weight_packed (int32) and weight_scale (bf16)."""

    bits: int
    group: int = GROUP
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        *lead, width = shape
        packed, scale = (*lead, width * self.bits // 32), (*lead, width // self.group)
        return {"weight_packed": (packed, torch.int32), "weight_scale": (scale, self.scale_dtype)}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        *lead, words = parts["weight_packed"].shape
        return (*lead, words * 32 // self.bits)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = quantize_groups(weight, self.bits, self.group)
        return {"weight_packed": pack_codes(codes, self.bits), "weight_scale": scale.to(self.scale_dtype)}

    def weight(self, parts: Parts) -> Weight | None:
        return Weight(self.bits, parts["weight_packed"], parts["weight_scale"]) if self.group == GROUP else None

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        weight = self.weight(parts)
        if weight is not None and fuses(weight.data) and weight.data.is_contiguous() and weight.scale.is_contiguous():
            from rorqual.ops.triton.fp8 import expand_packed

            return expand_packed(weight, dtype)
        codes, scale = unpack_codes(parts["weight_packed"], self.bits), parts["weight_scale"]
        return (codes.unflatten(-1, (-1, self.group)).float() * scale.float()[..., None]).flatten(-2).to(dtype)

    def linear(self, x: Tensor, parts: Parts) -> Tensor:
        weight, rows = self.weight(parts), x.numel() // x.shape[-1]
        if weight is None or not fuses(x) or rows > TILED_ROWS:
            return F.linear(x, self.dense(parts, x.dtype))
        from rorqual.ops.triton.fp8 import tile_rows
        from rorqual.ops.triton.stream import TOKENS, rows_dot

        if rows > TOKENS:
            return tile_rows(x, weight)
        return rows_dot(x.reshape(rows, -1), weight)[0].view(*x.shape[:-1], -1)

    def describe(self, plain: Sequence[str]) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group,
            "dynamic": False, "observer": "minmax",
        }  # fmt: skip
        group = {"targets": ["Linear", "Embedding"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(plain), "kv_cache_scheme": None,
        }  # fmt: skip
