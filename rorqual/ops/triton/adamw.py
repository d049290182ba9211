"""AdamW in one pass over memory: weight, gradient and moments are read once and written once, and the narrow copy of the
weight that the next step multiplies by is written on the way."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adamw_kernel(
    weight, grad, m, v, copy, factor, count, keep, lr, beta1, beta2, correction, eps,
    COPY: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(factor)
    w = tl.load(weight + at, mask=inside, other=0.0)
    m0 = tl.load(m + at, mask=inside, other=0.0).to(tl.float32)
    v0 = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    m1 = m0 + (g - m0) * (1.0 - beta1)
    v1 = v0 * beta2 + g * g * (1.0 - beta2)
    w = w * keep - lr * m1 / (tl.sqrt(v1 * correction) + eps)
    tl.store(weight + at, w, mask=inside)
    tl.store(m + at, m1.to(m.dtype.element_ty), mask=inside)
    tl.store(v + at, v1.to(v.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


def adamw(
    weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
    decay: float, factor: Tensor | None, copy: Tensor | None,
) -> None:  # fmt: skip
    """`ops.adamw` on contiguous tensors of one shape."""
    assert all(t.is_contiguous() for t in (weight, grad, m, v) if t is not None)
    count, (beta1, beta2) = weight.numel(), betas
    _adamw_kernel[(triton.cdiv(count, 2048),)](
        weight, grad, m, v, copy, factor, count, 1 - lr * decay, lr / (1 - beta1**step), beta1, beta2,
        1 / (1 - beta2**step), eps, COPY=copy is not None, SCALED=factor is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
