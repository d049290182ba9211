"""From logits to tokens, each row by its own parameters, in fp32.

Three properties matter more here than speed:
 - *exact*: top-p keeps the smallest set of tokens whose mass reaches top_p, the crossing token included; top-k keeps
   exactly k (of equals, the lower id); the draw inverts the distribution function of what is left, in fp64.
 - *reproducible*: the uniform number of a draw is a hash of (seed, position) and nothing else. Batch mates, preemption,
   chunking and a restart do not change it; no generator state exists that could get out of step.
 - *independent of the batch*: how a row is treated follows from its own parameters and logits.

The nucleus is nearly always small, so only the best CANDIDATES are sorted; a row whose nucleus does not end safely
among them is sorted whole. Both ways give the same token, because both order tokens by (probability, id).

Log-probabilities come from the raw logits, before temperature and truncation, as the API promises.
Left out: penalties and grammar masks (they belong to the logits, before `sample`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.engine.api import SamplingParams, TokenLogprob
from rorqual.engine.core import Draw

CANDIDATES = 1024
_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from (seed, position) alone: two rounds of splitmix64, 53 bits of the result."""
    z = _mix(_mix(seed & _MASK) + position * 0x9E3779B97F4A7C15)
    return (z >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> list[Draw]:
    """One draw per row. -inf logits are tokens that cannot be drawn; a row with NaN, +inf or no finite logit at all
    comes back with a fault and no token."""
    logits_BV = logits_BV.float()
    finite_B = logits_BV.amax(-1).isfinite()
    tokens_B = logits_BV.argmax(-1)
    # A faulty row is treated as greedy: its token is thrown away, and it must not disturb the arithmetic of others.
    usable = finite_B.tolist()
    plain = [i for i, p in enumerate(params) if usable[i] and p.temperature > 0 and not _truncates(p)]
    cut = [i for i, p in enumerate(params) if usable[i] and p.temperature > 0 and _truncates(p)]
    for rows, draw in ((plain, _draw_plain), (cut, _draw_truncated)):
        if rows:
            u_B = torch.tensor([uniforms[i] for i in rows], dtype=torch.float64, device=logits_BV.device)
            tokens_B[rows] = draw(
                probabilities(logits_BV[rows], [params[i] for i in rows]), [params[i] for i in rows], u_B
            )
    chosen = tokens_B.tolist()
    logprobs = _logprobs(logits_BV, params, tokens_B)
    return [
        Draw(chosen[i], logprobs.get(i)) if usable[i] else Draw(fault="its logits are not finite numbers")
        for i in range(len(params))
    ]


def probabilities(logits_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """softmax(logits / temperature), fp32, for rows with temperature > 0. The maximum is subtracted first, so that no
    temperature, however small, overflows."""
    temperatures = torch.tensor([max(p.temperature, 1e-30) for p in params], device=logits_BV.device)
    return ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperatures[:, None]).softmax(-1)


def _truncates(p: SamplingParams) -> bool:
    return p.top_p < 1.0 or p.top_k > 0


def _draw_plain(probs_BV: Tensor, params: Sequence[SamplingParams], u_B: Tensor) -> Tensor:
    return _invert(probs_BV.double(), u_B)


def _draw_truncated(probs_BV: Tensor, params: Sequence[SamplingParams], u_B: Tensor) -> Tensor:
    ranked_BK, ids_BK = _best(probs_BV, min(CANDIDATES, probs_BV.shape[1]))
    kept_BK = _keep(ranked_BK, params)
    places_B = _invert(ranked_BK.double() * kept_BK, u_B)
    tokens_B: Tensor = ids_BK.gather(1, places_B[:, None])[:, 0]
    if ranked_BK.shape[1] < probs_BV.shape[1]:
        # Safe only if the last candidate and everything equal to it is cut off: what lies beyond cannot matter then.
        edge = (kept_BK & (ranked_BK <= ranked_BK[:, -1:])).any(-1).tolist()
        for i in (i for i, p in enumerate(params) if edge[i] or p.top_k > ranked_BK.shape[1]):
            ranked, ids = probs_BV[i : i + 1].sort(descending=True, stable=True)
            kept = _keep(ranked, params[i : i + 1])
            tokens_B[i] = ids[0, _invert(ranked.double() * kept, u_B[i : i + 1])[0]]
    return tokens_B


def _best(probs_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens of each row, by (probability falling, id rising), and their ids."""
    ids_BK = probs_BV.topk(count, sorted=False).indices.sort().values
    ranked_BK, order_BK = probs_BV.gather(1, ids_BK).sort(descending=True, stable=True)
    return ranked_BK, ids_BK.gather(1, order_BK)


def _keep(ranked_BK: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Which of the ranked tokens may be drawn: the first top_k, and of those, renormalised, the first whose mass
    reaches top_p. A token stays if the mass before it is still below top_p, so the best one always does."""
    device, width = ranked_BK.device, ranked_BK.shape[1]
    top_k = torch.tensor([p.top_k or width for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    first_k = torch.arange(width, device=device) < top_k[:, None]
    mass = (ranked_BK.double() * first_k).cumsum(-1)
    # Without top_k the mass is the whole row's, also where only the candidates are at hand.
    total = torch.where(torch.tensor([p.top_k > 0 for p in params], device=device), mass[:, -1], 1.0)
    before = mass - ranked_BK.double() * first_k
    nucleus = (before < (top_p * total)[:, None]) | (top_p >= 1.0)[:, None]
    return first_k & nucleus & (ranked_BK > 0)


def _invert(weights_BK: Tensor, u_B: Tensor) -> Tensor:
    """The first index at which the cumulated weights exceed u * total. Indices of weight 0 are never chosen."""
    mass_BK = weights_BK.cumsum(-1)
    target_B = u_B * mass_BK[:, -1]
    index_B = torch.searchsorted(mass_BK, target_B[:, None], right=True)[:, 0]
    # Rounding of u * total up to total itself would lead past the end: then the last token of positive weight.
    last_B = weights_BK.shape[1] - 1 - (weights_BK > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index_B, last_B)


def _logprobs(logits_BV: Tensor, params: Sequence[SamplingParams], tokens_B: Tensor) -> dict[int, TokenLogprob]:
    rows = [i for i, p in enumerate(params) if p.logprobs is not None]
    if not rows:
        return {}
    raw_BV = logits_BV[rows].log_softmax(-1)
    chosen = raw_BV.gather(1, tokens_B[rows][:, None])[:, 0].tolist()
    width = max(params[i].logprobs or 0 for i in rows)
    top, ids = raw_BV.topk(min(width, raw_BV.shape[1]))
    out = {}
    for row, logprob, values, tokens, token in zip(
        rows, chosen, top.tolist(), ids.tolist(), tokens_B[rows].tolist(), strict=True
    ):
        n = params[row].logprobs or 0
        out[row] = TokenLogprob(token, logprob, tuple(zip(tokens[:n], values[:n], strict=True)))
    return out
