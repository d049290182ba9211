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
tables of backends, `fp8_quantisers` and `fp8_products`; `Recipe.backend` names one of the latter. On a GPU both are Triton
kernels (`ops.triton.fp8_train`, `ops.triton.fp8_products`), on Hopper kernels in Gluon (`ops.triton.fp8_quantise`,
`ops.triton.fp8_hopper`), or PyTorch's block-wise `scaled_mm` multiplies, and the experts go through grouped products
(`ops.fp8_experts`). A gradient is always in the dtype of what it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
    scaled_mm_missing,
)
from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

Quantised = tuple[Tensor, Tensor]
"""E4M3 codes and fp32 scales: of tiles (scales [M, ceil(K/128)]) or of blocks (scales [ceil(N/128), ceil(K/128)])."""
Product = Callable[[Quantised, Quantised, bool, torch.dtype], Tensor]
"""(a [M, K] in tiles along K, b, whether b is blocks, dtype) -> [M, N] = a b^T; b [N, K] in blocks, or in tiles along K."""
fp8_products: Backends[Product] = Backends("fp8 product")
PLAIN = ("reference", "expanded")
"""Those that are there to be understood, on any device: quantising beside them is plain too, and experts are a loop."""


class Quantiser(Protocol):
    """[M, K] of any float dtype -> codes and scales, equal to the reference's to the bit. fmt as in `Recipe`."""

    @staticmethod
    def tiles(x_MK: Tensor, fmt: str | None) -> Quantised:
        """1 x 128 along K."""

    @staticmethod
    def tokens(x_MK: Tensor | Quantised, fmt: str | None) -> Quantised:
        """The transpose [K, M], 1 x 128 along M; of numbers, or of what was in tiles along K."""

    @staticmethod
    def both(x_MK: Tensor, fmt: str | None) -> tuple[Quantised, Quantised]:
        """tiles and tokens."""

    @staticmethod
    def weight(weight_NK: Tensor) -> tuple[Quantised, Quantised]:
        """In blocks of 128 x 128, and the transpose in the same codes."""


fp8_quantisers: Backends[type[Quantiser]] = Backends("fp8 quantiser")

BOUND = 1e-5
"""Largest relative error (Frobenius norms) of a backend's product against the reference, on the same codes. The FP8 units
of an H100 keep about 14 bits within 128 products: a backend on them has its own bound, 1e-3."""
ERROR = 6e-2
"""Largest relative error of a layer's output or gradient against the same layer in fp32, for data without outliers: both
operands are rounded to three mantissa bits."""


@dataclass(frozen=True)
class Recipe:
    """keep: how x waits for the backward; input_fmt and grad_fmt: "ue8m0" for power-of-two scales of x and of dy, None for
    fp32 ones; backend: of the products, "auto" is the fastest on this device; beside "triton" Triton quantises too."""

    keep: Literal["e4m3", "e5m6"] = "e4m3"
    input_fmt: str | None = None
    grad_fmt: str | None = None
    backend: str = "auto"


@fp8_products.register("reference")
def product_reference(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes are multiplied 128 at a time, and each part is scaled and added in fp32."""
    (a_codes, a_scale), (b_codes, b_scale) = a, b
    if blocks:
        b_scale = b_scale.repeat_interleave(BLOCK, 0)[: b_codes.shape[0]]
    out = a_codes.new_zeros((a_codes.shape[0], b_codes.shape[0]), dtype=torch.float32)
    for i in range(a_scale.shape[1]):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        out += (a_codes[:, part].float() @ b_codes[:, part].float().T) * (a_scale[:, i, None] * b_scale[:, i])
    return out.to(dtype)


@fp8_products.register("expanded")
def product_expanded(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Both sides expanded to fp32 and multiplied at once."""
    return (dequantize_tiles(*a) @ (dequantize_blocks(*b) if blocks else dequantize_tiles(*b)).T).to(dtype)


@fp8_products.register("triton", triton_missing)
def product_triton(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """On FP8 units, each 128 products promoted to fp32."""
    from rorqual.ops.triton.fp8_products import product

    return product((a[0], _rows_together(a[1])), b if blocks else (b[0], _rows_together(b[1])), blocks, dtype)


def _rows_together(scale: Tensor) -> Tensor:
    """[M, G] with the rows of a column side by side."""
    return scale if scale.stride(0) == 1 else scale.T.contiguous().T


def scaled_mm_takes(a: Quantised, b: Quantised, blocks: bool) -> bool:
    """Not: sums that are no whole tiles, rows that are no multiple of 16, and blocks whose count along the sum is no
    multiple of four, which it would read wrongly (pytorch #166752)."""
    (M, K), N = a[0].shape, len(b[0])
    return not (K % (4 * BLOCK if blocks else BLOCK) or M % 16 or N % (BLOCK if blocks else 16))


@fp8_products.register("scaled_mm", scaled_mm_missing)
def product_scaled_mm(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """PyTorch's block-wise product (cuBLAS). What it does not take goes to `hopper`, or to `triton`."""
    from torch.nn.functional import ScalingType, scaled_mm

    if not scaled_mm_takes(a, b, blocks):
        return (product_triton if hopper_missing() else product_hopper)(a, b, blocks, dtype)
    kind, scale = ScalingType.BlockWise1x128, _rows_together(b[1])
    if blocks:
        kind, scale = ScalingType.BlockWise128x128, b[1].contiguous().t()
    return scaled_mm(a[0], b[0].t(), _rows_together(a[1]), ScalingType.BlockWise1x128, scale, kind, output_dtype=dtype)


def hopper_missing() -> str | None:
    """Why `ops.triton.fp8_hopper` and `ops.triton.fp8_quantise` cannot run here, or None."""
    if reason := triton_missing():
        return reason
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "it needs a Hopper card"
    try:
        from rorqual.ops.triton import fp8_hopper, fp8_quantise  # noqa: F401
    except (ImportError, AttributeError) as error:  # Gluon is experimental: it may change its place
        return f"this Triton has no Gluon as it is known here ({error})"
    return None


@fp8_products.register("hopper", hopper_missing)
def product_hopper(a: Quantised, b: Quantised, blocks: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """`ops.triton.fp8_hopper`; what it does not take goes to `triton`."""
    from rorqual.ops.triton import fp8_hopper

    return (product_triton if fp8_hopper.missing(a, b) else fp8_hopper.product)(a, b, blocks, dtype)


@fp8_quantisers.register("reference")
class ReferenceQuantiser:
    """`ops.fp8`, after a transposition where tokens are to lie together."""

    @staticmethod
    def tiles(x_MK: Tensor, fmt: str | None) -> Quantised:
        return quantize_tiles(x_MK, fmt)

    @staticmethod
    def tokens(x_MK: Tensor | Quantised, fmt: str | None) -> Quantised:
        x_MK = x_MK if isinstance(x_MK, Tensor) else dequantize_tiles(*x_MK)
        return quantize_tiles(x_MK.T.contiguous(), fmt)

    @staticmethod
    def both(x_MK: Tensor, fmt: str | None) -> tuple[Quantised, Quantised]:
        return ReferenceQuantiser.tiles(x_MK, fmt), ReferenceQuantiser.tokens(x_MK, fmt)

    @staticmethod
    def weight(weight_NK: Tensor) -> tuple[Quantised, Quantised]:
        codes, scale = quantize_blocks(weight_NK.detach())
        turned = codes.view(torch.uint8).T.contiguous().view(codes.dtype)
        return (codes, scale), (turned, scale.T)


@fp8_quantisers.register("triton", triton_missing)
class TritonQuantiser:
    """`ops.triton.fp8_train`: one pass each."""

    @classmethod
    def kernels(cls) -> Any:
        """The module whose `tiles` and `blocks` these are."""
        from rorqual.ops.triton import fp8_train

        return fp8_train

    @classmethod
    def tiles(cls, x_MK: Tensor, fmt: str | None) -> Quantised:
        along, _ = cls.kernels().tiles(_lying(x_MK), True, False, fmt is not None)
        assert along is not None
        return along

    @classmethod
    def tokens(cls, x_MK: Tensor | Quantised, fmt: str | None) -> Quantised:
        x = _lying(x_MK) if isinstance(x_MK, Tensor) else x_MK
        _, across = cls.kernels().tiles(x, False, True, fmt is not None)
        assert across is not None
        return across

    @classmethod
    def both(cls, x_MK: Tensor, fmt: str | None) -> tuple[Quantised, Quantised]:
        along, across = cls.kernels().tiles(_lying(x_MK), True, True, fmt is not None)
        assert along is not None and across is not None
        return along, across

    @classmethod
    def weight(cls, weight_NK: Tensor) -> tuple[Quantised, Quantised]:
        return cls.kernels().blocks(weight_NK)


@fp8_quantisers.register("gluon", hopper_missing)
class GluonQuantiser(TritonQuantiser):
    """`ops.triton.fp8_quantise`: the same bits, the transposes by words."""

    @classmethod
    def kernels(cls) -> Any:
        from rorqual.ops.triton import fp8_quantise

        return fp8_quantise


def _lying(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _product(recipe: Recipe, x: Tensor) -> Product:
    fast = "scaled_mm" if x.is_cuda and scaled_mm_missing() is None else "expanded"
    return fp8_products.get(fast if recipe.backend == "auto" else recipe.backend)


def _quantiser(recipe: Recipe, x: Tensor) -> type[Quantiser]:
    """The kernels wherever they run, but beside products that are there to be understood."""
    plain = recipe.backend in PLAIN or not x.is_cuda or triton_missing()
    return fp8_quantisers.get("reference") if plain else kernel_quantiser(recipe.backend)


def kernel_quantiser(backend: str) -> type[Quantiser]:
    """The fastest on this card; Triton's beside its own products."""
    return fp8_quantisers.get("triton" if backend == "triton" or hopper_missing() else "gluon")


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
    if recipe.keep == "e4m3":
        return quantised
    if issubclass(_quantiser(recipe, x_MK), TritonQuantiser):
        from rorqual.ops.triton.fp8_train import round_e5m6 as fast

        return (fast(_lying(x_MK)),)
    return (round_e5m6(x_MK),)


def _kept(saved: tuple[Tensor, ...]) -> Tensor | Quantised:
    return saved[0] if len(saved) == 1 else (saved[0], saved[1])


# ---- a linear layer --------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
        quantiser = _quantiser(recipe, x_MK)
        x, (weight, turned) = quantiser.tiles(x_MK, recipe.input_fmt), quantiser.weight(weight_NK)
        ctx.recipe, ctx.dtypes = recipe, (x_MK.dtype, weight_NK.dtype)
        ctx.save_for_backward(*turned, *_keep(x_MK, x, recipe))
        return _product(recipe, x_MK)(x, weight, True, x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, scale, *kept = ctx.saved_tensors
        dx, dw = _gradients(grads[0], (codes, scale), _kept(tuple(kept)), ctx.recipe, ctx.needs_input_grad, ctx.dtypes)
        return dx, dw, None


def _gradients(
    dy_MN: Tensor, turned: Quantised, x_MK: Tensor | Quantised, recipe: Recipe, needed: tuple[bool, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx [M, K] and dW [N, K] in their dtypes, each only if it is needed. turned: the weight's transpose in blocks."""
    product, quantiser = _product(recipe, dy_MN), _quantiser(recipe, dy_MN)
    if needed[0] and needed[1]:
        along, across = quantiser.both(dy_MN, recipe.grad_fmt)
    elif needed[0]:
        along = quantiser.tiles(dy_MN, recipe.grad_fmt)
    else:
        across = quantiser.tokens(dy_MN, recipe.grad_fmt)
    dx = product(along, turned, True, dtypes[0]) if needed[0] else None
    dw = product(across, quantiser.tokens(x_MK, None), False, dtypes[1]) if needed[1] else None
    return dx, dw


def fp8_train_linear(x: Tensor, weight_NK: Tensor, recipe: Recipe) -> Tensor:
    """x [..., K] times weight [N, K] (fp32 master or any float) -> [..., N] in x's dtype, all three products in FP8."""
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight_NK, recipe)  # type: ignore[no-untyped-call]
    return y.unflatten(0, x.shape[:-1])


# ---- SwiGLU and the projection after it ------------------------------------------------------------------------------


class _SwigluDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, weight_DF: Tensor, recipe: Recipe) -> Tensor:
        quantiser = _quantiser(recipe, gate_MF)
        h = quantiser.tiles(_swiglu(gate_MF, up_MF), recipe.input_fmt)
        weight, turned = quantiser.weight(weight_DF)
        ctx.recipe, ctx.dtypes = recipe, (gate_MF.dtype, weight_DF.dtype)
        ctx.save_for_backward(*turned, *quantiser.tiles(gate_MF, None), *quantiser.tiles(up_MF, None))
        return _product(recipe, gate_MF)(h, weight, True, gate_MF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        codes, scale, *kept = ctx.saved_tensors
        if issubclass(_quantiser(ctx.recipe, grads[0]), TritonQuantiser):
            return _swiglu_down_backward(grads[0], (codes, scale), kept, ctx.recipe, ctx.dtypes)
        gate, up = dequantize_tiles(*kept[:2]), dequantize_tiles(*kept[2:])
        x_dtype, w_dtype = ctx.dtypes
        h = (F.silu(gate) * up).to(x_dtype)
        needed = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        dh, dw = _gradients(grads[0], (codes, scale), h, ctx.recipe, needed, (torch.float32, w_dtype))
        dgate = dup = None
        if dh is not None:
            sigmoid = gate.sigmoid()
            dgate = (dh * up * sigmoid * (1 + gate * (1 - sigmoid))).to(x_dtype)
            dup = (dh * gate * sigmoid).to(x_dtype)
        return dgate, dup, dw, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if gate.is_cuda and triton_missing() is None:
        from rorqual.ops.triton.fused import swiglu

        return swiglu(gate, up)
    return F.silu(gate) * up


def _swiglu_down_backward(
    dy_MD: Tensor, turned: Quantised, kept: list[Tensor], recipe: Recipe, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor, None]:
    """The same by kernels, the gradient of the product in the middle in the activations' dtype."""
    from rorqual.ops.triton.fp8_train import swiglu_backward

    product, quantiser = _product(recipe, dy_MD), _quantiser(recipe, dy_MD)
    along, across = quantiser.both(dy_MD, recipe.grad_fmt)
    gate, up = (kept[0], kept[1]), (kept[2], kept[3])
    h, both = swiglu_backward(gate, up, product(along, turned, True, dtypes[0]))
    dgate, dup = both.chunk(2, -1)
    return dgate, dup, product(across, quantiser.tokens(h, None), False, dtypes[1]), None


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
    and the gradient that comes back over the network have power-of-two scales (section 3.3.3). Raises BackendUnavailable."""
    if recipe.backend != "auto":
        fp8_products.get(recipe.backend)
    if x_ND.is_cuda and recipe.backend not in PLAIN and triton_missing() is None:
        from rorqual.ops.fp8_experts import fits, fp8_grouped_experts

        if fits(gate_up_E2FD, down_EDF):
            return fp8_grouped_experts(x_ND, gate_up_E2FD, down_EDF, gates_NK, chosen_NK, recipe.backend)
    dispatched = Recipe(input_fmt="ue8m0", backend=recipe.backend)
    combined = Recipe(grad_fmt="ue8m0", backend=recipe.backend)

    gate_up, down_proj = gate_up_E2FD.unbind(), down_EDF.unbind()

    def run(expert: int, rows: Tensor) -> Tensor:
        gate, up = fp8_train_linear(rows, gate_up[expert], dispatched).chunk(2, -1)
        return swiglu_down(gate, up, down_proj[expert], combined)

    return by_expert(x_ND, gates_NK, chosen_NK, down_EDF.shape[0], run)
