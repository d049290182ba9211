"""`sampler.sample` on the device, for rows that ask for nothing but temperature, top_k, top_p and min_p: a few tensor
operations that wait for nothing, so that a captured step can draw and the next one can begin.

The same rule and the same random numbers, hence the same token as on the host: probabilities by the same operations, sums
in fp64 (which the device may add in another order: a draw differs where it falls into the sixteenth digit). A nucleus that
does not end safely among the candidates is told as REDO, and the host draws again from the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.engine.api import SamplingParams
from rorqual.engine.sampler import CANDIDATES, uniform

REDO = -3
FIELDS = 5
"""temperature (0: the best token), top_k, top_p, min_p, the uniform number."""


def fields(params: SamplingParams, seed: int, position: int) -> tuple[float, ...]:
    """What `draw` is told of a row whose token stands at `position`."""
    if params.temperature == 0:
        return 0.0, 0.0, 1.0, 0.0, 0.0
    return params.temperature, params.top_k, params.top_p, params.min_p, uniform(seed, position)


def draw(logits_BV: Tensor, told_BF: Tensor) -> Tensor:
    """A token for each row, int64 [B]: -1 where its logits are not finite numbers, REDO where the host must draw. told:
    `fields`, fp64."""
    raw_BV = logits_BV.float()
    top_B, best_B = raw_BV.max(-1)
    temperature, top_k, top_p, min_p, u = told_BF.unbind(1)
    cold_B = temperature == 0
    scale_B1 = temperature.float().clamp(min=1e-30).masked_fill(cold_B, 1.0)[:, None]
    probs_BV = ((raw_BV - top_B[:, None]) / scale_B1).softmax(-1)
    cut_B, safe_B = _truncated(probs_BV, top_k[:, None], top_p[:, None], min_p[:, None], u)
    truncates_B = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    token_B = torch.where(truncates_B, cut_B.where(safe_B, REDO), _plain(probs_BV, u))
    return torch.where(top_B.isfinite(), torch.where(cold_B, best_B, token_B), -1)


def _plain(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which the cumulated mass exceeds u * total."""
    mass_BV = probs_BV.double().cumsum(-1)
    return torch.searchsorted(mass_BV, _target(mass_BV, u_B), right=True)[:, 0]


def _truncated(
    probs_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor, u_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The same among the tokens that truncation leaves, by (probability falling, id rising), and whether the candidates
    were enough."""
    V = probs_BV.shape[1]
    K = min(CANDIDATES, V)
    ids_BK = probs_BV.topk(K, sorted=False).indices.sort().values
    ranked_BK, order_BK = probs_BV.gather(1, ids_BK).sort(descending=True, stable=True)
    ids_BK, ranked_BK = ids_BK.gather(1, order_BK), ranked_BK.double()
    first_BK = torch.arange(K, device=probs_BV.device) < torch.where(top_k_B1 > 0, top_k_B1, V)
    mass_BK = (ranked_BK * first_BK).cumsum(-1)
    total_B1 = torch.where(top_k_B1 > 0, mass_BK[:, -1:], 1.0)
    nucleus_BK = (mass_BK - ranked_BK < top_p_B1 * total_B1) | (top_p_B1 >= 1.0)
    kept_BK = first_BK & nucleus_BK & (ranked_BK >= min_p_B1 * ranked_BK[:, :1]) & (ranked_BK > 0)
    mass_BK = (ranked_BK * kept_BK).cumsum(-1)
    place_B1 = (mass_BK <= _target(mass_BK, u_B)).sum(-1, keepdim=True).clamp(max=K - 1)
    token_B = ids_BK.gather(1, place_B1)[:, 0]
    if K == V:
        return token_B, torch.ones_like(token_B, dtype=torch.bool)
    edge_B = (kept_BK & (ranked_BK <= ranked_BK[:, -1:])).any(-1)
    return token_B, ~edge_B & (top_k_B1[:, 0] <= K)


def _target(mass_BN: Tensor, u_B: Tensor) -> Tensor:
    """[B, 1]. Rounding of u * total up to total itself would lead past the end."""
    total_B = mass_BN[:, -1]
    return torch.minimum(u_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))[:, None]
