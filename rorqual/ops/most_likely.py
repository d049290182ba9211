"""The most likely token of each row, or a fault: what greedy decoding asks of logits, on whichever device they are."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops.fused import fuses


def most_likely(logits_NV: Tensor) -> Tensor:
    """The largest of each row of logits [N, V] (of equals the first, on a GPU), int64 [N]; -1 where any is NaN or infinite
    upwards, or all are -inf."""
    if fuses(logits_NV):
        from rorqual.ops.triton.decode import most_likely as fused

        return fused(logits_NV)
    top_N, best_N = logits_NV.max(-1)
    return torch.where(top_N.isfinite(), best_N, -1)
