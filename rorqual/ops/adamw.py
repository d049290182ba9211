"""AdamW on fp32 weights with moments kept in a narrower dtype (DeepSeek-V3 section 3.3.2: m and v in bf16).

One update in fp32, whatever the moments are stored in; they are rounded to nearest once, on the way back. bf16 has steps
of 2^-8 relative: with beta2 = 0.95 v moves by up to 5 % a step and is followed; with 0.999 it would stand still, so
`train.config` refuses that. Left out: stochastic rounding (nothing published uses it here) and 8-bit moments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rorqual.ops.native import training as native
from rorqual.ops.triton.available import triton_missing
from rorqual.registry import Backends

AdamW = Callable[..., None]
adamw_backends: Backends[AdamW] = Backends("adamw")

BOUND = 1e-6
"""Largest absolute difference of a weight between backends after one step at lr 1, fp32 moments, weights of unit scale."""


@adamw_backends.register("reference")
@torch.no_grad()
def adamw_reference(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, factor: Tensor | None = None, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """Update weight (fp32), m and v (any float dtype) in place by a gradient of weight's shape in any float dtype, times
    factor (an fp32 scalar tensor: clipping). step counts from 1. copy: also becomes the new weight, in its own dtype."""
    beta1, beta2 = betas
    grad = grad.float() if factor is None else grad.float() * factor
    m32, v32 = m.float(), v.float()
    m32 = m32.lerp(grad, 1 - beta1)
    v32 = (v32 * beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.mul_(1 - lr * decay)
    denominator = (v32 / (1 - beta2**step)).sqrt_().add_(eps)
    weight.addcdiv_(m32, denominator, value=-lr / (1 - beta1**step))
    m.copy_(m32)
    v.copy_(v32)
    if copy is not None:
        copy.copy_(weight)


@adamw_backends.register("native", native.native_missing)
@torch.no_grad()
def adamw_native(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, factor: Tensor | None = None, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """The same in one pass on a CPU; the reference for dtypes and layouts that the kernel does not take."""
    fits = m.dtype == v.dtype and m.dtype in (torch.float32, torch.bfloat16)
    if not (fits and native.takes(weight) and all(t.is_contiguous() for t in (weight, m, v))):
        adamw_reference(weight, grad, m, v, step, lr, betas, eps, decay, factor, copy)
        return
    along = copy if copy is not None and copy.dtype == torch.bfloat16 and copy.is_contiguous() else None
    native.adamw_(weight, grad.float().contiguous(), m, v, step, lr, betas, eps, decay, factor, along)
    if copy is not None and along is None:
        copy.copy_(weight)


@adamw_backends.register("triton", triton_missing)
@torch.no_grad()
def adamw_triton(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, factor: Tensor | None = None, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """The same in one kernel."""
    from rorqual.ops.triton.adamw import adamw

    adamw(weight, grad.contiguous(), m, v, step, lr, betas, eps, decay, factor, copy)
