"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (arXiv 1910.07467; released modelling code)."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops import training
from rorqual.ops.fused import fuses, trains
from rorqual.ops.native import training as native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] of any float dtype, weight [D]; returns x's shape and dtype. The normed value is rounded to x's dtype
    before the weight is applied, as in the released code, so that bf16 agrees with other engines to the bit."""
    if fuses(x):
        from rorqual.ops.triton.fused import rms_norm as fused

        return fused(x, weight, eps)
    if trains(x):
        return training.rms_norm(x, weight, eps)
    if torch.is_grad_enabled() and native.takes(x, weight):
        return native.rms_norm(x, weight, eps)
    return reference(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, operation by operation."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)
