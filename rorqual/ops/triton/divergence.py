"""A row's divergence from what it should say, and the gradient of its logits, which replaces them where they lie.

Student's and teacher's logits are read twice: for their sums of exponentials, then for the two distributions, which exist
nowhere but in registers. The divergence is added up in the second pass, of differences of log-probabilities: from sums of
the first (sum p (t - s) - lse_t + lse_s) it would be a small difference of large numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _grown(largest, total, x):
    """The largest so far and the sum of exponentials relative to it, in each lane, with x added. One exponential does for
    both cases: it shrinks whichever of the two is smaller."""
    shrunk = tl.exp(-tl.abs(x - largest))
    total = tl.where(x > largest, total * shrunk + 1.0, total + shrunk)
    return tl.maximum(largest, x), total


@triton.jit
def _over_lanes(largest, total):
    """The row's own."""
    top = tl.max(largest, 0)
    return top, tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def _divergence_kernel(
    logits, teacher, words, weights, losses, V, W, stride, teacher_stride, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    row, taught, at = logits + n * stride, teacher + n * teacher_stride, tl.arange(0, BLOCK)
    weight = tl.load(weights + n)
    if weight == 0:
        tl.store(losses + n, 0.0)
        for start in range(0, V, BLOCK):
            tl.store(row + start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + at < V)
    else:
        word, width = -1, W
        if WORDS:  # the teacher of a row of one word is sure of it, and none of the logits there are is read
            word = tl.load(words + n)
            width = tl.where(word < 0, W, 0)
        s_top = tl.full((BLOCK,), -1e38, tl.float32)  # finite: nothing may be infinitely far from it both ways
        t_top, s_total, t_total = s_top, tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            c = start + at
            s = tl.load(row + c, mask=c < V, other=-float("inf")).to(tl.float32)
            t = tl.load(taught + c, mask=c < width, other=-float("inf")).to(tl.float32)
            s_top, s_total = _grown(s_top, s_total, s)
            t_top, t_total = _grown(t_top, t_total, tl.where(c == word, 0.0, t) if WORDS else t)
        s_largest, s_log = _over_lanes(s_top, s_total)
        t_largest, t_log = _over_lanes(t_top, t_total)
        tl.debug_barrier()  # every thread has read the row before any of it is replaced
        loss = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            c = start + at
            s = tl.load(row + c, mask=c < V, other=-float("inf")).to(tl.float32)
            t = tl.load(taught + c, mask=c < width, other=-float("inf")).to(tl.float32)
            # The largest goes first, and the logarithm after: where logits are large, their sum would have eaten it.
            log_q = s - s_largest - s_log
            log_p = (tl.where(c == word, 0.0, t) if WORDS else t) - t_largest - t_log
            p = tl.exp(log_p)
            loss += tl.where(log_p == -float("inf"), 0.0, p * (log_p - log_q))
            slope = (tl.exp(log_q) - p) * weight
            tl.store(row + c, slope.to(logits.dtype.element_ty), mask=c < V)
        tl.store(losses + n, tl.sum(loss, 0) * weight)


def divergence_and_slope_(logits_NV: Tensor, teacher_NW: Tensor, words_N: Tensor | None, weights_N: Tensor) -> Tensor:
    """Weighted divergences of the rows [N] fp32; the logits become their gradients."""
    (N, V), W = logits_NV.shape, teacher_NW.shape[1]
    assert logits_NV.stride(1) == 1 and teacher_NW.stride(1) == 1 and len(teacher_NW) == N and W <= V
    losses = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    if N:
        _divergence_kernel[(N,)](
            logits_NV, teacher_NW, losses if words_N is None else words_N, weights_N, losses, V, W, logits_NV.stride(0),
            teacher_NW.stride(0), WORDS=words_N is not None, BLOCK=min(2048, triton.next_power_of_2(V)), num_warps=8,
        )  # fmt: skip
    return losses
