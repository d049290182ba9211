"""Random routing without ties: what is as close as fp32 rounds may be chosen either way."""

from __future__ import annotations

import torch
from torch import Tensor

APART = 1e-5
"""Affinities and sums of them round by about 1e-7, biased by 8 by 1e-6."""


def untied(logits_NE: Tensor, bias_E: Tensor, n_group: int = 1) -> Tensor:
    """The rows whose biased affinities, and whose groups' scores, are all apart: nearly all of them."""
    choice_NE = logits_NE.double().sigmoid() + bias_E.double()
    groups_NG = choice_NE.unflatten(-1, (n_group, -1)).topk(2, dim=-1).values.sum(-1)
    clear_N = torch.ones(len(logits_NE), dtype=torch.bool, device=logits_NE.device)
    for values in (choice_NE, groups_NG):
        clear_N &= (values.sort(-1).values.diff(dim=-1) > APART).all(-1)
    assert clear_N.float().mean() > 0.8
    return logits_NE[clear_N]
