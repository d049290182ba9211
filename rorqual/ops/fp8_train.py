"""Linear layers trained in FP8 as DeepSeek-V3 was (section 3.3): all three products of a layer in E4M3, fp32 accumulation.

    forward   y  = x  W^T   x in tiles of 1 x 128 along its channels, W in blocks of 128 x 128
    dgrad     dx = dy W     dy in tiles of 1 x 128 along its channels, the same codes of W
    wgrad     dW = dy^T x   both in tiles of 128 x 1, along the tokens

Every scale is the largest magnitude now over 448, in fp32. What the backward keeps of x is its FP8 codes; they are expanded
and quantised anew along the tokens for wgrad, as section 3.5.2 describes. After attention, x is kept in E5M6 with
power-of-two scales instead, because it is read along both ways (`keep="e5m6"`). In the routed layers the inputs of SwiGLU
are kept in FP8 and its output computed again (`swiglu_down`), and what crosses the network has power-of-two scales. These
choices are `Recipe`; which layers take part is `model.precision`.

On a CPU the codes and scales are the very bits the hardware would have; the products are fp32 sums of 128 promoted
block by block (`reference`), or of everything at once (`expanded`, one matrix product). Quantising and multiplying are two
tables of backends, `fp8_quantisers` and `fp8_products`: what a GPU does registers there under one name, and `Recipe.backend`
names it. A gradient is always in the dtype of what it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops.experts import by_expert
from rorqual.ops.fp8 import (
    BLOCK,
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
)
from rorqual.registry import Backends

Quantised = tuple[Tensor, Tensor]
"""E4M3 codes and fp32 scales: of tiles (scales [M, ceil(K/128)]) or of blocks (scales [ceil(N/128), ceil(K/128)])."""
Product = Callable[[Quantised, Quantised, bool], Tensor]
"""(a [M, K] in tiles along K, b, whether b is blocks) -> fp32 [M, N] = a b^T; b [N, K] in blocks, or in tiles along K."""
fp8_products: Backends[Product] = Backends("fp8 product")
Layout = Literal["tiles", "tokens", "blocks"]
"""tiles: 1 x 128 along K. tokens: the transpose, 1 x 128 along M. blocks: 128 x 128."""
Quantise = Callable[[Tensor, Layout, str | None], Quantised]
fp8_quantisers: Backends[Quantise] = Backends("fp8 quantiser")
"""[M, K] of any float dtype -> codes and scales, equal to the reference's to the bit."""

BOUND = 1e-5
"""Largest relative error (Frobenius norms) of a backend's product against the reference, on the same codes. The FP8 units
of an H100 keep about 14 bits within 128 products: a backend on them has its own bound, 1e-3."""
ERROR = 6e-2
"""Largest relative error of a layer's output or gradient against the same layer in fp32, for data without outliers: both
operands are rounded to three mantissa bits."""


@dataclass(frozen=True)
class Recipe:
    """keep: how x waits for the backward; input_fmt and grad_fmt: "ue8m0" for power-of-two scales of x and of dy, None for
    fp32 ones; backend: of the products, "auto" is the fastest on this device."""

    keep: Literal["e4m3", "e5m6"] = "e4m3"
    input_fmt: str | None = None
    grad_fmt: str | None = None
    backend: str = "auto"


@fp8_products.register("reference")
def product_reference(a: Quantised, b: Quantised, blocks: bool) -> Tensor:
    """Codes are multiplied 128 at a time, and each part is scaled and added in fp32."""
    (a_codes, a_scale), (b_codes, b_scale) = a, b
    if blocks:
        b_scale = b_scale.repeat_interleave(BLOCK, 0)[: b_codes.shape[0]]
    out = a_codes.new_zeros((a_codes.shape[0], b_codes.shape[0]), dtype=torch.float32)
    for i in range(a_scale.shape[1]):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        out += (a_codes[:, part].float() @ b_codes[:, part].float().T) * (a_scale[:, i, None] * b_scale[:, i])
    return out


@fp8_products.register("expanded")
def product_expanded(a: Quantised, b: Quantised, blocks: bool) -> Tensor:
    """Both sides expanded to fp32 and multiplied at once."""
    return dequantize_tiles(*a) @ (dequantize_blocks(*b) if blocks else dequantize_tiles(*b)).T


@fp8_quantisers.register("reference")
def quantise_reference(x_MK: Tensor, layout: Layout, fmt: str | None) -> Quantised:
    """`ops.fp8`, after a transposition where tokens are to lie together: codes [K, M], scales [K, ceil(M/128)]."""
    if layout == "blocks":
        return quantize_blocks(x_MK, fmt)
    return quantize_tiles(x_MK.T.contiguous() if layout == "tokens" else x_MK, fmt)


def _product(recipe: Recipe) -> Product:
    return fp8_products.get("expanded" if recipe.backend == "auto" else recipe.backend)


def _quantise(recipe: Recipe) -> Quantise:
    return fp8_quantisers.get(recipe.backend if recipe.backend in fp8_quantisers.table else "reference")


# ---- what waits for the backward -------------------------------------------------------------------------------------


def round_e5m6(x: Tensor) -> Tensor:
    """To five bits of exponent and six of mantissa with one power-of-two scale for each 1 x 128 tile (the largest magnitude
    comes to lie in the top binade), as bf16, which holds those values exactly."""
    width = x.shape[-1]
    tiles = F.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    _, top = torch.frexp(tiles.abs().amax(-1, keepdim=True))
    _, exponent = torch.frexp(tiles)
    # 30 binades of normal numbers below the top, then equal steps.
    step = torch.ldexp(torch.ones_like(tiles), torch.maximum(exponent, top - 29) - 7)
    largest = torch.ldexp(torch.full_like(tiles, 127.0), top - 7)
    rounded = (tiles / step).round() * step
    return torch.minimum(torch.maximum(rounded, -largest), largest).flatten(-2)[..., :width].to(torch.bfloat16)


def _keep(x_MK: Tensor, quantised: Quantised, recipe: Recipe) -> tuple[Tensor, ...]:
    return (round_e5m6(x_MK),) if recipe.keep == "e5m6" else quantised


def _kept(saved: tuple[Tensor, ...]) -> Tensor:
    return saved[0].float() if len(saved) == 1 else dequantize_tiles(*saved)


# ---- a linear layer --------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
        quantise = _quantise(recipe)
        x, weight = quantise(x_MK, "tiles", recipe.input_fmt), quantise(weight_NK.detach(), "blocks", None)
        ctx.recipe, ctx.dtypes = recipe, (x_MK.dtype, weight_NK.dtype)
        ctx.save_for_backward(*weight, *_keep(x_MK, x, recipe))
        return _product(recipe)(x, weight, True).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, scale, *kept = ctx.saved_tensors
        dx, dw = _gradients(grads[0], (codes, scale), _kept(tuple(kept)), ctx.recipe, ctx.needs_input_grad)
        x_dtype, w_dtype = ctx.dtypes
        return None if dx is None else dx.to(x_dtype), None if dw is None else dw.to(w_dtype), None


def _gradients(
    dy_MN: Tensor, weight: Quantised, x_MK: Tensor, recipe: Recipe, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and dW [N, K] in fp32, each only if it is needed."""
    product, quantise, dx, dw = _product(recipe), _quantise(recipe), None, None
    if needed[0]:
        codes, scale = weight
        transposed = codes.view(torch.uint8).T.contiguous().view(codes.dtype), scale.T.contiguous()
        dx = product(quantise(dy_MN, "tiles", recipe.grad_fmt), transposed, True)
    if needed[1]:
        dw = product(quantise(dy_MN, "tokens", recipe.grad_fmt), quantise(x_MK, "tokens", None), False)
    return dx, dw


def fp8_train_linear(x: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """x [..., K] times weight [N, K] (fp32 master or any float) -> [..., N] in x's dtype, all three products in FP8."""
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight_NK, recipe)  # type: ignore[no-untyped-call]
    return y.unflatten(0, x.shape[:-1])


# ---- SwiGLU and the projection after it ------------------------------------------------------------------------------


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, weight_DF: Tensor, recipe: Recipe) -> Tensor:
        quantise = _quantise(recipe)
        h = quantise(F.silu(gate_MF) * up_MF, "tiles", recipe.input_fmt)
        weight = quantise(weight_DF.detach(), "blocks", None)
        ctx.recipe, ctx.dtypes = recipe, (gate_MF.dtype, weight_DF.dtype)
        ctx.save_for_backward(*weight, *quantise(gate_MF, "tiles", None), *quantise(up_MF, "tiles", None))
        return _product(recipe)(h, weight, True).to(gate_MF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        codes, scale, *kept = ctx.saved_tensors
        gate, up = dequantize_tiles(*kept[:2]), dequantize_tiles(*kept[2:])
        x_dtype, w_dtype = ctx.dtypes
        h = (F.silu(gate) * up).to(x_dtype)
        needed = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        dh, dw = _gradients(grads[0], (codes, scale), h, ctx.recipe, needed)
        dgate = dup = None
        if dh is not None:
            sigmoid = gate.sigmoid()
            dgate = (dh * up * sigmoid * (1 + gate * (1 - sigmoid))).to(x_dtype)
            dup = (dh * gate * sigmoid).to(x_dtype)
        return dgate, dup, None if dw is None else dw.to(w_dtype), None


def swiglu_down(gate: Tensor, up: Tensor, weight_DF: Tensor, recipe: Recipe) -> Tensor:
    """(silu(gate) * up) [..., F] times weight [D, F] -> [..., D]; gate and up wait for the backward in FP8, from which the
    product in the middle is computed again."""
    y: Tensor = _SwigluDown.apply(gate.flatten(0, -2), up.flatten(0, -2), weight_DF, recipe)  # type: ignore[no-untyped-call]
    return y.unflatten(0, gate.shape[:-1])


# ---- the routed experts ----------------------------------------------------------------------------------------------


def fp8_train_experts(
    x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, gates_NK: Tensor, chosen_NK: Tensor, recipe: Recipe
) -> Tensor:
    """`ops.experts` with every product in FP8, expert by expert: the definition of the grouped form. Dispatched activations
    and the gradient that comes back over the network have power-of-two scales (section 3.3.3)."""
    dispatched = Recipe(input_fmt="ue8m0", backend=recipe.backend)
    combined = Recipe(grad_fmt="ue8m0", backend=recipe.backend)

    def run(expert: int, rows: Tensor) -> Tensor:
        gate, up = fp8_train_linear(rows, gate_up_E2FD[expert], dispatched).chunk(2, -1)
        return swiglu_down(gate, up, down_EDF[expert], combined)

    return by_expert(x_ND, gates_NK, chosen_NK, down_EDF.shape[0], run)
