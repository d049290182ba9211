"""Keeping experts busy without paying for it in the loss (DeepSeek-V3 section 2.1.2; arXiv 2408.15664).

The bias update moves an expert's bias a fixed step up when it got fewer tokens than the mean over the whole step's
batch, and down when it got more. The sequence-wise loss is a small guard against imbalance inside one sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.ops import training
from rorqual.ops.fused import trains


def load(chosen_NK: Tensor, n_experts: int) -> Tensor:
    """Tokens per expert [E], int64, without waiting for the device."""
    if trains(chosen_NK):
        from rorqual.ops.triton.routing import count_by_expert

        return count_by_expert(chosen_NK, n_experts)
    experts = torch.arange(n_experts, device=chosen_NK.device)
    return (chosen_NK.reshape(-1, 1) == experts).sum(0)


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio: how far the busiest expert exceeds the mean, max_i load_i / mean - 1 (arXiv 2408.15664)."""
    return load_E.max() / load_E.float().mean() - 1


@torch.no_grad()
def update_bias_(bias_E: Tensor, load_E: Tensor, gamma: float) -> None:
    """b_i += gamma * sign(mean load - load_i), in place; bias fp32. gamma 0 leaves it alone."""
    load32 = load_E.float()
    bias_E += gamma * torch.sign(load32.mean() - load32)


def sequence_balance_loss(scores_NE: Tensor, sequence_length: int, top_k: int) -> Tensor:
    """Equation 17-20 without its factor alpha: mean over sequences of sum_i f_i P_i.

    f_i counts how often expert i is among the top-k of the *unbiased* affinities, scaled so that perfect balance is 1;
    P_i is its mean normalised affinity. scores: [B*T, E] fp32, row-major by sequence; the gradient flows through P.
    """
    if trains(scores_NE):
        return training.sequence_balance_loss(scores_NE, sequence_length, top_k)
    E = scores_NE.shape[-1]
    scores_BTE = scores_NE.view(-1, sequence_length, E)
    # No epsilon: with one, a router could shrink all affinities below it and make the loss vanish. Where they underflow
    # together, the token says nothing.
    total_BT1 = scores_BTE.sum(-1, keepdim=True)
    P_BE = torch.where(total_BT1 > 0, scores_BTE / total_BT1.where(total_BT1 > 0, 1.0), 1 / E).mean(1)
    chosen = scores_BTE.detach().topk(top_k, dim=-1).indices
    f_BE = F.one_hot(chosen, E).sum(2).float().mean(1) * (E / top_k)
    return (f_BE * P_BE).sum(-1).mean()
