"""Block-scaled FP8 as DeepSeek-V3 was trained and released (section 3.3; the released `weight_scale_inv`).

A weight is E4M3 with one fp32 scale for every 128 x 128 block, in a grid of ceil(out/128) x ceil(in/128): the last
blocks may be ragged (`kv_a_proj_with_mqa` is 576 wide, grid 5 x 56). "inv" in the released name notwithstanding, the
value is code *times* scale. Loaders that divide the shape by the grid read ragged tensors wrongly; here a block is 128
wide, always.

`fp8_linear` multiplies by such a weight in two ways. `weight_only`: the weight is expanded to the activations' dtype
and multiplied plainly: exact for fp32 activations. `dynamic`: the activations are quantised too, one scale for every
token and 128 channels, as in training; that costs about two and a half percent of relative error and doubles the
arithmetic rate on hardware with FP8 units. References stand first; each backend is tested against its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.formats import FP8, Parts, Weight, finite
from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

BLOCK = 128
E4M3_MAX = 448.0
E4M3 = torch.float8_e4m3fn
STEP = 2.0**-4
"""Largest relative rounding error of a normal E4M3 number: half a unit of three mantissa bits."""
SMALLEST = 2.0**-10
"""Largest absolute rounding error of a subnormal E4M3 number, in units of the scale."""

Scheme = Literal["weight_only", "dynamic"]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
ExpertProduct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
weight_only_backends: Backends[Product] = Backends("fp8_linear weight_only")
dynamic_backends: Backends[Product] = Backends("fp8_linear dynamic")
BOUND = {
    "weight_only": {torch.float32: 2e-5, torch.bfloat16: 8e-3},
    # The FP8 units of an H100 keep about 14 bits while they add 128 products.
    "dynamic": {torch.float32: 1e-3, torch.bfloat16: 8e-3},
}
"""Largest relative error |y - reference| / |reference| (Frobenius norms) of a backend, by scheme and activation dtype."""
DYNAMIC_ERROR = 4e-2
"""Largest relative error of `dynamic` against `weight_only`, for activations whose tiles hold no outlier."""


# ---- quantising ----------------------------------------------------------------------------------------------------


def quantize_blocks(weight: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> E4M3 codes of that shape and fp32 scales [..., ceil(out/128), ceil(in/128)].

    A ragged block's scale comes from the values it has. scale_fmt "ue8m0": scales are powers of two (DeepSeek-V3.1).
    Raises ValueError for values that are not finite.
    """
    weight = finite(weight)
    out, width = weight.shape[-2:]
    padded = F.pad(weight, (0, -width % BLOCK, 0, -out % BLOCK))
    tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., GO, 128, GI, 128]
    scale = _scale(tiles.abs().amax((-3, -1)), scale_fmt)
    codes = _round(tiles / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :out, :width]
    return codes.contiguous(), scale


def dequantize_blocks(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_blocks`: codes [..., out, in] times their block's scale, in fp32, rounded to dtype."""
    out, width = codes.shape[-2:]
    value = codes.to(torch.float32)
    if out % BLOCK == 0 and width % BLOCK == 0:
        tiles = value.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        tiles.mul_(scale.float()[..., :, None, :, None])
    else:
        rows = torch.arange(out, device=codes.device) // BLOCK
        columns = torch.arange(width, device=codes.device) // BLOCK
        value.mul_(scale.float()[..., rows[:, None], columns])
    return value.to(dtype)


def quantize_tiles(x: Tensor, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    """Activations [..., K] -> E4M3 codes and fp32 scales [..., ceil(K/128)], one for each token and 128 channels."""
    width = x.shape[-1]
    tiles = F.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale(tiles.abs().amax(-1), scale_fmt)
    return _round(tiles / scale[..., None]).flatten(-2)[..., :width].contiguous(), scale


def dequantize_tiles(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., K] times their tile's scale, fp32."""
    width = codes.shape[-1]
    tiles = F.pad(codes.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    return (tiles * scale[..., None]).flatten(-2)[..., :width]


def _scale(largest: Tensor, scale_fmt: str | None) -> Tensor:
    """largest / 448; where all is zero, 1. Never so small that it would vanish."""
    # By a tensor: dividing by a Python number, CUDA multiplies by its reciprocal, and the last bit differs from a CPU's.
    scale = (largest / largest.new_full((), E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, 1.0)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    elif scale_fmt is not None:
        raise ValueError(f"scale_fmt {scale_fmt!r} is unknown")
    return scale


def _round(value: Tensor) -> Tensor:
    return value.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


# ---- multiplying ---------------------------------------------------------------------------------------------------


@weight_only_backends.register("reference")
def weight_only_reference(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times the expanded weight, in x's dtype."""
    return F.linear(x, dequantize_blocks(codes, scale, x.dtype))


@weight_only_backends.register("expand", triton_missing)
def weight_only_expand(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same with the weight expanded in one pass: for many rows, where expanding it once is little."""
    from rorqual.ops.triton.fp8 import expand

    return F.linear(x, expand(codes, scale, x.dtype))


@dynamic_backends.register("reference")
def dynamic_reference(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Quantised and expanded again on both sides, multiplied in fp32, rounded to x's dtype."""
    return F.linear(dequantize_tiles(*quantize_tiles(x)), dequantize_blocks(codes, scale)).to(x.dtype)


def scaled_mm_missing() -> str | None:
    """Why PyTorch's block-wise product cannot run here, or None."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability() < (9, 0):
        return "it needs compute capability 9.0"
    return None


def _tiles_fast(x: Tensor) -> tuple[Tensor, Tensor]:
    if triton_missing() is None:
        from rorqual.ops.triton.fp8 import quantize_rows

        return quantize_rows(x)
    return quantize_tiles(x)


@dynamic_backends.register("scaled_mm", scaled_mm_missing)
def dynamic_scaled_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """PyTorch's block-wise GEMM (1 x 128 times 128 x 128), bf16 out of the product.

    cuBLAS takes whole blocks, four of them along the input, and rows in sixteens: what is less is padded with zeros,
    the weight at every call, so `fp8_linear` chooses this one only where nothing of the weight needs padding.
    """
    from torch.nn.functional import ScalingType, scaled_mm

    out, width = codes.shape
    if width % (4 * BLOCK) or out % BLOCK:
        codes, scale = _pad_blocks(codes, scale)
    flat = x.reshape(-1, width)
    tokens = flat.shape[0]
    x8, x_scale = _tiles_fast(F.pad(flat, (0, codes.shape[1] - width, 0, -tokens % 16)))
    along_tokens = torch.empty_strided(x_scale.shape, (1, x_scale.shape[0]), device=x.device).copy_(x_scale)
    y = scaled_mm(
        x8, codes.t(), along_tokens, ScalingType.BlockWise1x128, scale.t(), ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return y[:tokens, :out].to(x.dtype).reshape(*x.shape[:-1], out)


def _pad_blocks(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out, width = codes.shape
    codes = F.pad(codes.view(torch.uint8), (0, -width % (4 * BLOCK), 0, -out % BLOCK)).view(E4M3)
    return codes, F.pad(scale, (0, codes.shape[1] // BLOCK - scale.shape[1]), value=1.0)


@weight_only_backends.register("triton", triton_missing)
def weight_only_triton(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The codes are expanded in registers, so that half the bytes of bf16 move."""
    from rorqual.ops.triton.fp8 import tile_rows

    return tile_rows(x, Weight(FP8, codes, scale))


@weight_only_backends.register("stream", triton_missing)
def weight_only_stream(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same row by row, for the few of a decoding step."""
    from rorqual.ops.triton.stream import rows_dot

    return rows_dot(x.reshape(-1, x.shape[-1]), Weight(FP8, codes, scale))[0].view(*x.shape[:-1], -1)


@dynamic_backends.register("triton", triton_missing)
def dynamic_triton(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Both sides in FP8; each block's product is scaled in fp32."""
    from rorqual.ops.triton.fp8 import tile_rows

    return tile_rows(x, Weight(FP8, codes, scale, dynamic=True))


def fp8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, activation_scheme: Scheme = "weight_only", backend: str = "auto"
) -> Tensor:
    """x [..., in] times a block-scaled weight (codes [out, in] E4M3, scale [ceil(out/128), ceil(in/128)] fp32), x W^T.

    Result in x's dtype. backend "auto": the reference on a CPU, on CUDA what measured fastest by shape. Raises
    BackendUnavailable for a named backend that cannot run here, KeyError for another scheme.
    """
    table = {"weight_only": weight_only_backends, "dynamic": dynamic_backends}[activation_scheme]
    if backend == "auto":
        backend = _fastest(x, codes, activation_scheme, table)
    return table.get(backend)(x, codes, scale)


MANY_ROWS = {"weight_only": 256, "dynamic": 128}
"""From this many rows on, expanding a weight once (weight_only) or cuBLAS (dynamic) beats our kernel on an H200."""


STREAMED_ROWS = 4
"""Up to so many rows, reading the weight once for each beats tiles."""


def _fastest(x: Tensor, codes: Tensor, scheme: Scheme, table: Backends[Product]) -> str:
    if not x.is_cuda or x.dtype == torch.float32:
        return "reference"
    whole = codes.shape[0] % BLOCK == 0 and codes.shape[1] % (4 * BLOCK) == 0
    rows = x.numel() // x.shape[-1]
    order = ["triton", "expand"] if scheme == "weight_only" else ["triton", "scaled_mm"]
    if rows >= MANY_ROWS[scheme] and (scheme == "weight_only" or whole):
        order.reverse()
    if rows <= STREAMED_ROWS and scheme == "weight_only":
        order.insert(0, "stream")
    return next((name for name in order if name in table.names()), "reference")


# ---- the format ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fp8Blocks:
    """`ops.formats.WeightFormat`: released suffixes weight (E4M3) and weight_scale_inv (fp32)."""

    activation_scheme: Scheme = "weight_only"
    scale_fmt: str | None = None
    backend: str = "auto"
    name: str = "fp8"

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        *lead, out, width = shape
        grid = (*lead, -(-out // BLOCK), -(-width // BLOCK))
        return {"weight": (tuple(shape), E4M3), "weight_scale_inv": (grid, torch.float32)}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        return tuple(parts["weight"].shape)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scale = quantize_blocks(weight, self.scale_fmt)
        return {"weight": codes, "weight_scale_inv": scale}

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        codes, scale = parts["weight"], parts["weight_scale_inv"]
        if codes.is_cuda and codes.dim() == 2 and codes.is_contiguous() and triton_missing() is None:
            from rorqual.ops.triton.fp8 import expand

            return expand(codes, scale, dtype)
        return dequantize_blocks(codes, scale, dtype)

    def linear(self, x: Tensor, parts: Parts) -> Tensor:
        return fp8_linear(x, parts["weight"], parts["weight_scale_inv"], self.activation_scheme, self.backend)

    def weight(self, parts: Parts) -> Weight | None:
        if self.backend not in ("auto", "triton"):
            return None
        return Weight(FP8, parts["weight"], parts["weight_scale_inv"], self.activation_scheme == "dynamic")

    def describe(self, plain: Sequence[str]) -> dict[str, Any]:
        more: Mapping[str, Any] = {} if self.scale_fmt is None else {"scale_fmt": self.scale_fmt}
        return {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK], **more,
        }  # fmt: skip
