"""Choosing experts: sigmoid affinity, correction bias, group-limited top-k (DeepSeek-V3 section 2.1.2).

All in fp32: bf16 affinities tie and flip choices. The bias steers the choice alone and never the gate. Excluded
groups are at -inf, not 0: with negative biased affinities a masked expert could win otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.ops.fused import fuses


def route(
    logits_NE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 router logits -> (gates [N, K] fp32, chosen experts [N, K] int64, affinities [N, E] fp32), in one kernel where
    that can be (`ops.fused.fuses`)."""
    if fuses(logits_NE):
        from rorqual.ops.triton.fused import route as fused

        return fused(logits_NE, bias_E, top_k, n_group, topk_group, normalise, scale)
    return reference(logits_NE, bias_E, top_k, n_group, topk_group, normalise, scale)


def reference(
    logits_NE: Tensor,
    bias_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition.

    A group's score is the sum of its two best biased affinities; the best `topk_group` groups stay. Gates are the
    unbiased affinities of the chosen, normalised to one where asked, times `scale`.
    """
    scores_NE = logits_NE.sigmoid()
    choice_NE = scores_NE.detach() + bias_E
    if n_group > topk_group:
        choice_NGM = choice_NE.unflatten(-1, (n_group, -1))
        group_scores_NG = choice_NGM.topk(2, dim=-1).values.sum(-1)
        kept_NG = torch.zeros_like(group_scores_NG, dtype=torch.bool)
        kept_NG.scatter_(-1, group_scores_NG.topk(topk_group, dim=-1, sorted=False).indices, True)
        choice_NE = choice_NGM.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2)
    chosen_NK = choice_NE.topk(top_k, dim=-1, sorted=False).indices
    gates_NK = scores_NE.gather(-1, chosen_NK)
    if normalise:
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
    return gates_NK * scale, chosen_NK, scores_NE
