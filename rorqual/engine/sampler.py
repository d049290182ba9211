"""From logits to tokens, each row by its own parameters, in fp32.

Three properties matter more here than speed:
 - *exact*: top-p keeps the smallest set of tokens whose mass reaches top_p, the crossing token included; top-k keeps
   exactly k (of equals, the lower id); the draw inverts the distribution function of what is left, in fp64.
 - *reproducible*: the uniform number of a draw is a hash of (seed, position) and nothing else. Batch mates, preemption,
   chunking and a restart do not change it; no generator state exists that could get out of step.
 - *independent of the batch*: what becomes of a row follows from its own logits, tokens and parameters, to the bit.

The order of a row's treatment, as users of vLLM and OpenAI expect it:
 1. what may be drawn at all: grammar mask, logit_bias, bad words, min_tokens. Forbidden is -inf, which nothing after it
    can undo, so these could stand in any order but for the bias, which must come before 2;
 2. repetition penalty, then presence and frequency penalty: the first scales a logit and the others shift it, so they
    do not commute. Up to here logits change, for greedy rows too;
 3. temperature, top_k, top_p of what top_k left, min_p. A greedy row skips them: none of them moves the best token.

Speculation needs no rule of its own: a draft is kept if it is what this sampler draws at its position. The draw is from
p, so a draft x stands with probability p(x), and otherwise the draw is distributed as p without x: that is rejection
sampling against a proposal that is certain of x, exact at every temperature. It also gives the very tokens that the
same seed gives without drafts.

The nucleus is nearly always small, so only the best CANDIDATES are sorted; a row whose nucleus does not end safely
among them is drawn again from 16 times as many. Whatever their number, the token is the same, because tokens are
ordered by (probability, id).

Log-probabilities come from the raw logits, before all of this, as the API promises.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.api import SamplingParams, TokenLogprob
from rorqual.engine.core import Draw

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

CANDIDATES = 256
NO_NUMBERS = "its logits are not finite numbers"
NOT_FINITE_AFTER = f"{NO_NUMBERS} after penalties"
NOTHING_LEFT = "grammar, bias, bad words and min_tokens forbid every token: no token is allowed"
NOT_FINITE, NOTHING_ALLOWED = -1, -2
"""What a kernel says in place of a token."""
_MASK = (1 << 64) - 1


class Row(NamedTuple):
    """What a draw depends on besides its logits.

    tokens: all before the one to draw (prompt, generated, drafts), the first `prompt` of them being the prompt;
    mask: uint32 bitset over the vocabulary, a set bit (of token t: bit t % 32 of word t // 32) allows its token;
    eos: ids that min_tokens forbids, besides the row's own stop ids.
    """

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    prompt: int
    mask: NDArray[np.uint32] | None = None
    eos: tuple[int, ...] = ()


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from (seed, position) alone: two rounds of splitmix64, 53 bits of the result."""
    z = _mix(_mix(seed & _MASK) + position * 0x9E3779B97F4A7C15)
    return (z >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Wish(NamedTuple):
    """What a kernel has to know of a row whose logits are ready but for the mask. u: its uniform number."""

    mask: NDArray[np.uint32] | None
    params: SamplingParams
    u: float


class Kernel(Protocol):
    def __call__(self, logits_BV: Tensor, wishes: Sequence[Wish], /) -> list[int]:
        """Steps 1 (masks only) and 3 of the module's order on fp32 logits: a token for each row, or NOT_FINITE, or
        NOTHING_ALLOWED where each logit is -inf."""
        ...


def sample(logits_BV: Tensor, rows: Sequence[Row], kernel: Kernel | None = None) -> list[Draw]:
    """One draw per row; `logits_BV` is not changed. -inf logits are tokens that cannot be drawn. A row with NaN, +inf
    or no finite logit, or one that may draw nothing, comes back with a fault and no token.

    kernel: draws in place of what follows here, by the same rule; sums may be rounded otherwise.
    """
    raw_BV = logits_BV.detach().float()
    if kernel:
        return _sample_by(kernel, raw_BV, rows)
    best, tokens = _best_tokens(raw_BV)
    faults = [None if math.isfinite(value) else NO_NUMBERS for value in best]
    adjusted = [i for i, row in enumerate(rows) if faults[i] is None and (row.mask is not None or _adjusts(row))]
    ready_BV = raw_BV
    if adjusted:
        ready_BV = raw_BV.clone()
        _adjust(ready_BV, rows, adjusted)
        for i, value, token in zip(adjusted, *_best_tokens(_pick(ready_BV, adjusted)), strict=True):
            best[i], tokens[i] = value, token
            if best[i] == -math.inf:
                faults[i] = NOTHING_LEFT
            elif not math.isfinite(best[i]):
                faults[i] = NOT_FINITE_AFTER
    warm = [i for i, row in enumerate(rows) if faults[i] is None and row.params.temperature > 0]
    plain = [i for i in warm if not _truncates(rows[i].params)]
    cut = [i for i in warm if _truncates(rows[i].params)]
    for chosen, draw in ((plain, _draw_plain), (cut, _draw_truncated)):
        if chosen:
            params = [rows[i].params for i in chosen]
            u = [uniform(rows[i].seed, len(rows[i].tokens)) for i in chosen]
            probs_BV = probabilities(_pick(ready_BV, chosen), params, [best[i] for i in chosen])
            for i, token in zip(chosen, draw(probs_BV, params, u), strict=True):
                tokens[i] = token
    return _told(raw_BV, rows, tokens, faults)


def _sample_by(kernel: Kernel, raw_BV: Tensor, rows: Sequence[Row]) -> list[Draw]:
    adjusted = [i for i, row in enumerate(rows) if _adjusts(row)]
    ready_BV = raw_BV
    faults: list[str | None] = [None] * len(rows)
    if adjusted:
        for i, value in zip(adjusted, _best_tokens(_pick(raw_BV, adjusted))[0], strict=True):
            if not math.isfinite(value):  # which an adjustment might hide
                faults[i] = NO_NUMBERS
        ready_BV = raw_BV.clone()
        _adjust(ready_BV, [row._replace(mask=None) for row in rows], adjusted)
    tokens = kernel(ready_BV, [Wish(r.mask, r.params, uniform(r.seed, len(r.tokens))) for r in rows])
    for i, token in enumerate(tokens):
        if token < 0:
            sound = math.isfinite(_best_tokens(raw_BV[i : i + 1])[0][0])
            faults[i] = (NOTHING_LEFT if token == NOTHING_ALLOWED else NOT_FINITE_AFTER) if sound else NO_NUMBERS
    return _told(raw_BV, rows, tokens, faults)


def _told(raw_BV: Tensor, rows: Sequence[Row], tokens: Sequence[int], faults: Sequence[str | None]) -> list[Draw]:
    logprobs = _logprobs(raw_BV, rows, tokens)
    return [
        Draw(token, logprobs.get(i)) if fault is None else Draw(fault=fault, asked=fault == NOTHING_LEFT)
        for i, (token, fault) in enumerate(zip(tokens, faults, strict=True))
    ]


def probabilities(logits_BV: Tensor, params: Sequence[SamplingParams], best: Sequence[float]) -> Tensor:
    """softmax(logits / temperature), fp32, for rows with temperature > 0. `best`, each row's largest logit, is
    subtracted first, so that no temperature, however small, overflows."""
    best_B = torch.tensor(best, device=logits_BV.device)
    temperature_B = torch.tensor([max(p.temperature, 1e-30) for p in params], device=logits_BV.device)
    return (logits_BV - best_B[:, None]).div_(temperature_B[:, None]).softmax(-1)


def _best_tokens(logits_BV: Tensor) -> tuple[list[float], list[int]]:
    """Each row's largest logit and its (lowest) id. NaN counts as the largest."""
    if logits_BV.device.type == "cpu":  # numpy's search is vectorised: a tenth of torch's time
        logits = logits_BV.numpy()
        ids = logits.argmax(-1)
        return logits[np.arange(len(ids)), ids].tolist(), ids.tolist()
    values_B, ids_B = logits_BV.max(-1)
    return values_B.tolist(), ids_B.tolist()


def _pick(x_BV: Tensor, rows: Sequence[int]) -> Tensor:
    """Those rows (rising), without a copy where it is all of them."""
    return x_BV if len(rows) == len(x_BV) else x_BV[rows]


# ---- the logits themselves -------------------------------------------------------------------------------------------


def is_greedy(row: Row) -> bool:
    """Whether the draw is the raw logits' argmax and nothing else is asked for."""
    return row.params.temperature == 0 and is_simple(row)


def is_simple(row: Row) -> bool:
    """Whether the draw asks for nothing but temperature and truncation (`drawing`); it goes on so for this request."""
    return row.params.logprobs is None and row.mask is None and not _adjusts(row)


def _adjusts(row: Row) -> bool:
    """Whether more than its mask changes the logits."""
    p = row.params
    return (
        p.repetition_penalty != 1.0
        or p.presence_penalty != 0.0
        or p.frequency_penalty != 0.0
        or bool(p.logit_bias)
        or bool(p.bad_token_ids)
        or len(row.tokens) - row.prompt < p.min_tokens
    )


def _adjust(logits_BV: Tensor, rows: Sequence[Row], which: Sequence[int]) -> None:
    """Steps 1 and 2 of the module's order, in place, for those rows. What they do to single logits is collected, so that
    few operations serve all rows; each touches its own row's logits, one by one, so that none depends on a mate."""
    biased, forbidden, repeated, frequent = _Cells(), _Cells(), _Cells(), _Cells()
    masks = []
    for i in which:
        p, generated = rows[i].params, rows[i].tokens[rows[i].prompt :]
        if (mask := rows[i].mask) is not None:
            masks.append((i, mask))
        if p.logit_bias:
            biased.add(i, *zip(*p.logit_bias, strict=True))
        for bad in p.bad_token_ids:
            if tuple(generated[len(generated) - len(bad) + 1 :]) == bad[:-1]:
                forbidden.add(i, bad[-1:])
        if len(generated) < p.min_tokens:
            forbidden.add(i, rows[i].eos + p.stop_token_ids)
        if p.repetition_penalty != 1.0:
            repeated.add(i, set(rows[i].tokens), p.repetition_penalty)
        if p.presence_penalty or p.frequency_penalty:
            counts = Counter(generated)
            frequent.add(i, counts, [p.presence_penalty + p.frequency_penalty * n for n in counts.values()])

    device = logits_BV.device
    if masks:
        _bar(logits_BV, masks)
    if biased.parts:
        at, bias = biased.on(device)
        logits_BV.index_put_(at, bias, accumulate=True)
    if forbidden.parts:
        at, _ = forbidden.on(device)
        logits_BV[at] = -math.inf
    if repeated.parts:
        at, penalty = repeated.on(device)
        logits = logits_BV[at]
        logits_BV[at] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if frequent.parts:
        at, penalty = frequent.on(device)
        logits_BV[at] -= penalty


_BARS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf
).astype(np.float32)
"""By byte of a mask: what to add to its eight logits."""


def _bar(logits_BV: Tensor, masks: Sequence[tuple[int, NDArray[np.uint32]]]) -> None:
    """-inf wherever a row's mask has no bit."""
    rows = [i for i, _ in masks]
    words = masks[0][1][None] if len(masks) == 1 else np.stack([mask for _, mask in masks])
    if logits_BV.device.type == "cpu":  # eight logits a look-up: a fourth of what unpacking the bits takes, or less
        bars_NV = _BARS.take(words.view(np.uint8), axis=0).reshape(len(rows), -1)[:, : logits_BV.shape[1]]
        logits = logits_BV.numpy()
        if len(rows) == len(logits):
            logits += bars_NV
        else:
            logits[rows] += bars_NV
    else:
        bits = np.unpackbits((~words).view(np.uint8), axis=1, count=logits_BV.shape[1], bitorder="little")
        barred = torch.from_numpy(bits.view(np.bool_)).to(logits_BV.device)
        rows_N = torch.tensor(rows, device=logits_BV.device)
        logits_BV[rows_N] = logits_BV[rows_N].masked_fill(barred, -math.inf)


class _Cells:
    """Logits of several rows, by row and token id, and a number for each."""

    def __init__(self) -> None:
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []

    def add(self, row: int, ids: Collection[int], values: float | Sequence[float] = 0.0) -> None:
        # numpy reads a list in a seventh of torch's time, and a long prompt is read at every step.
        tokens = np.fromiter(ids, np.int64, len(ids))
        self.parts.append((np.full(len(tokens), row), tokens, np.full(len(tokens), values, np.float32)))

    def on(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The index of the logits, and the numbers."""
        rows, tokens, numbers = (torch.from_numpy(np.concatenate(x)).to(device) for x in zip(*self.parts, strict=True))
        return (rows, tokens), numbers


# ---- the draw --------------------------------------------------------------------------------------------------------


def _truncates(p: SamplingParams) -> bool:
    return p.top_p < 1.0 or p.top_k > 0 or p.min_p > 0.0


def _draw_plain(probs_BV: Tensor, params: Sequence[SamplingParams], u: Sequence[float]) -> list[int]:
    """The first token at which the cumulated mass exceeds u * total. Tokens of probability 0 are never drawn."""
    mass_BV = probs_BV.double().cumsum(-1)
    total_B = mass_BV[:, -1]
    u_B = torch.tensor(u, dtype=torch.float64, device=probs_BV.device)
    # Rounding of u * total up to total itself would lead past the end.
    target_B = torch.minimum(u_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    return torch.searchsorted(mass_BV, target_B[:, None], right=True)[:, 0].tolist()


def _draw_truncated(
    probs_BV: Tensor, params: Sequence[SamplingParams], u: Sequence[float], candidates: int = CANDIDATES
) -> list[int]:
    """The same among the tokens that truncation leaves, in their order. The arithmetic is numpy's: on a few hundred
    numbers a torch operation is mostly overhead."""
    ranked_BK, ids_BK = _best(probs_BV, min(candidates, probs_BV.shape[1]))
    kept_BK = _keep(ranked_BK, params)
    mass_BK = (ranked_BK * kept_BK).cumsum(-1)
    total_B = mass_BK[:, -1]
    target_B = np.minimum(np.asarray(u) * total_B, np.nextafter(total_B, 0.0))
    places_B = (mass_BK > target_B[:, None]).argmax(-1)
    tokens = ids_BK[np.arange(len(places_B)), places_B].tolist()
    if candidates < probs_BV.shape[1]:
        # Safe only if the last candidate and everything equal to it is cut off: what lies beyond cannot matter then.
        edge_BK = kept_BK & (ranked_BK <= ranked_BK[:, -1:])
        again = [i for i, p in enumerate(params) if edge_BK[i].any() or p.top_k > candidates]
        if again:
            rest = [params[i] for i in again], [u[i] for i in again], candidates * 16
            for i, token in zip(again, _draw_truncated(_pick(probs_BV, again), *rest), strict=True):
                tokens[i] = token
    return tokens


def _best(probs_BV: Tensor, count: int) -> tuple[Floats, Ids]:
    """The `count` most probable tokens of each row, by (probability falling, id rising), as fp64, and their ids. Which
    of equals at the end of the list are in it is open."""
    if count == probs_BV.shape[1]:
        ranked_BK, ids_BK = probs_BV.sort(descending=True, stable=True)
    else:
        if probs_BV.device.type == "cpu":  # numpy's selection: torch's slows down where the vocabulary is large
            ids_BK = torch.from_numpy(np.argpartition(probs_BV.numpy(), -count)[:, -count:]).sort().values
        else:
            ids_BK = probs_BV.topk(count, sorted=False).indices.sort().values
        ranked_BK, order_BK = probs_BV.gather(1, ids_BK).sort(descending=True, stable=True)
        ids_BK = ids_BK.gather(1, order_BK)
    return ranked_BK.double().cpu().numpy(), ids_BK.cpu().numpy()


def _keep(ranked_BK: Floats, params: Sequence[SamplingParams]) -> NDArray[np.bool_]:
    """Which of the ranked tokens may be drawn: the first top_k, of those, renormalised, the first whose mass reaches
    top_p, and of those the ones not too far below the best. A token stays if the mass before it is still below top_p,
    so the best one always does."""
    width = ranked_BK.shape[1]
    top_k = np.array([[p.top_k or width] for p in params])
    top_p = np.array([[p.top_p] for p in params])
    min_p = np.array([[p.min_p] for p in params])
    first_k = np.arange(width) < top_k
    mass = (ranked_BK * first_k).cumsum(-1)
    # Without top_k the mass is the whole row's, also where only the candidates are at hand.
    total = np.where([[p.top_k > 0] for p in params], mass[:, -1:], 1.0)
    nucleus = (mass - ranked_BK < top_p * total) | (top_p >= 1.0)
    kept: NDArray[np.bool_] = first_k & nucleus & (ranked_BK >= min_p * ranked_BK[:, :1]) & (ranked_BK > 0)
    return kept


def _logprobs(raw_BV: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """By row index, for rows that ask. The alternatives are ordered by (log-probability falling, id rising)."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return {}
    out = {}
    for i, logprobs_V in zip(asking, _pick(raw_BV, asking).log_softmax(-1), strict=True):
        count = rows[i].params.logprobs or 0
        top: list[tuple[int, float]] = []
        if count:
            # Logits of a half-precision head have many equals, so that "the best n" needs the ids to be definite.
            least = logprobs_V.topk(min(count, len(logprobs_V))).values[-1]
            ids = (logprobs_V >= least).nonzero()[:, 0]
            values, order = logprobs_V[ids].sort(descending=True, stable=True)
            top = list(zip(ids[order].tolist(), values.tolist(), strict=True))[:count]
        out[i] = TokenLogprob(tokens[i], logprobs_V[tokens[i]].item(), tuple(top))
    return out
