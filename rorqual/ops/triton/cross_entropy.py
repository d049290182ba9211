"""A row's loss and the gradient of its logits, which replaces them where they lie: logits are written once by the product,
read once more by the two products of the backward, and exist in no other form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _loss_kernel(logits, targets, weights, losses, V, stride, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    at = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row + start + at, mask=start + at < V, other=-float("inf")).to(tl.float32)
        now = tl.maximum(largest, x)
        safe = tl.where(now == -float("inf"), 0.0, now)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = now
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    target, weight = tl.load(targets + n), tl.load(weights + n)
    tl.store(losses + n, (lse - tl.load(row + target).to(tl.float32)) * weight)
    if GRAD:
        tl.debug_barrier()  # the target's logit is read before it is replaced
        for start in range(0, V, BLOCK):
            x = tl.load(row + start + at, mask=start + at < V, other=0.0).to(tl.float32)
            slope = (tl.exp(x - lse) - tl.where(start + at == target, 1.0, 0.0)) * weight
            tl.store(row + start + at, slope.to(logits.dtype.element_ty), mask=start + at < V)


def loss_and_slope_(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, grad: bool) -> Tensor:
    """Weighted losses of the rows [N] fp32; with grad, the logits become their gradients."""
    N, V = logits_NV.shape
    assert logits_NV.stride(1) == 1
    losses = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    if N:
        block = min(4096, triton.next_power_of_2(V))
        _loss_kernel[(N,)](
            logits_NV, targets_N, weights_N, losses, V, logits_NV.stride(0), GRAD=grad, BLOCK=block, num_warps=8
        )
    return losses
