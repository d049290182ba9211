"""Does rorqual compute what another engine computes? The same token ids go through both, and the log-probabilities of
the prompt's own tokens are compared.

Log-probabilities of given tokens, because every engine can be asked for them, nothing is sampled, and one wrong matrix,
rotation or bias shows in the first few. Where the peer hands out whole logits these are compared too. The peer goes
first: it says which ids it scored (a server that tells only about tokens of its own continues the prompt greedily), and
ours scores those. One prompt is in memory at a time; of it only sums stay.

What counts as equal depends on the arithmetic of the peer, so each kind has its own threshold: the largest difference
allowed, and for the mean a twentieth of it.

- transformers, fp32 on both sides: 1e-3. The two differ by the order of additions: largest 1.7e-5, mean 1.9e-6 on the
  built-in prompts and the bundled model. 1e-3 leaves room for long prompts, more layers and a GPU.
- llama.cpp with an fp32 file and cache: 5e-3. Here as near as transformers (2.5e-5, 2.1e-6), but builds for other
  processors round on the way. A quantised file needs a threshold of its own (q8_0: largest 2.2, mean 0.1).
- a server: 2. It runs in bf16. Eight bits of mantissa move a log-probability by a few hundredths on average, and where
  two experts are nearly tied the other one is chosen and a single token moves by 1 or more: the bundled model in bf16
  against itself in fp32 gave mean 0.046, 99 % below 0.37, largest 1.23 over 1,575 tokens. So the largest says little
  there, and the bound on the mean, 0.1, does the work.

Two engines that agree may still rank different tokens first where the two best are nearly equal. Differences of at most
d on each of the two can close a gap of at most 2d; a disagreement within that (d the largest difference found, or the
threshold if that is less) is a tie. One beyond it means that some token is further off than the threshold allows, and
where whole logits are compared it is a fault like the others.

Routing knows ties too, and there rounding decides which experts a token goes through: in fp32 two correct engines can
then differ by 1 in the logits of that token, and a little in all that follow. Where a prompt's difference is beyond the
threshold, and up to the first position that we routed by less than ROUTER_TIE is not, the rest of that prompt is left out
and counted as unsettled; a real fault shows before as well. It fails the comparison if that is half of all tokens.

Left out: sampling (equality of distributions implies it) and speed. FP8 weights are multiplied without quantising
activations on our side, since only weights are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rorqual.checkpoint.hf import load_model
from rorqual.checkpoint.verify_prompts import Prompt, Words
from rorqual.errors import CheckpointError
from rorqual.model.batch import Routing
from rorqual.model.moe import Gate, MoE

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
THRESHOLDS = {"transformers": 1e-3, "llama.cpp": 5e-3, "server": 2.0}
"""Largest difference of a log-probability, by kind of peer."""
MEAN_SHARE = 1 / 20
"""Of the threshold, for the mean difference."""
ROUTER_TIE = 2e-6
"""Biased affinities, or sums of two, that are nearer than this may be ranked either way in fp32."""
_CHUNK = 64
"""Positions whose whole distributions are in double precision at a time."""


# ---- two sides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What a peer says of one sequence. logprobs: of ids[first:], each given what stands before it; top: the token it
    ranks first at these places, -1 where it does not say. logits [tokens, vocabulary]: instead of both, where it has
    them."""

    ids: tuple[int, ...]
    first: int = 1
    logprobs: Floats | None = None
    top: Ids | None = None
    logits: npt.NDArray[np.float32] | None = None


class Peer(Protocol):
    """Another engine. kind: a key of THRESHOLDS; notes: what the reader of the report should know, complete after the
    last prompt."""

    kind: str
    name: str
    notes: list[str]

    def score(self, prompt: Prompt) -> Scores:
        """Raises BackendUnavailable where the peer fails."""
        ...

    def tokenise(self, text: str) -> list[int] | None:
        """Ids of plain text without beginning-of-sequence; None where it does not offer that."""
        ...

    def close(self) -> None: ...


class Ours:
    """rorqual's side."""

    def __init__(self, directory: str | Path, dtype: str = "float32", device: str = "cpu") -> None:
        """Raises what `load_model` raises."""
        self._device = device
        self._model = load_model(directory, dtype=dtype, device=device, activation_scheme="weight_only")

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], int]:
        """Logits [tokens, vocabulary] of one plain causal forward, and the first position that some layer routes by a
        tie; the number of tokens if there is none."""
        h_BTD, routings = self._model.hidden(torch.tensor([ids], device=self._device))
        logits: npt.NDArray[np.float32] = self._model.head(h_BTD)[0].float().cpu().numpy()
        gates = [layer.mlp.gate for layer in self._model.layers if isinstance(layer.mlp, MoE)]
        tied = torch.zeros(len(ids), dtype=torch.bool, device=self._device)
        for gate, routing in zip(gates, routings, strict=True):
            tied |= routing_margin(gate, routing) <= ROUTER_TIE
        places = tied.nonzero().flatten().tolist()
        return logits, places[0] if places else len(ids)


def routing_margin(gate: Gate, routing: Routing) -> Tensor:
    """How near each token came to other experts [N]: from the worst chosen to the best left out, of groups and within
    the kept groups."""
    choice_NE = routing.scores_NE + gate.e_score_correction_bias
    margin_N = torch.full_like(choice_NE[:, 0], math.inf)
    if gate.n_group > gate.topk_group:
        choice_NGM = choice_NE.unflatten(-1, (gate.n_group, -1))
        ranked = choice_NGM.topk(2, -1).values.sum(-1).sort(-1, descending=True)
        margin_N = ranked.values[:, gate.topk_group - 1] - ranked.values[:, gate.topk_group]
        left_out = ranked.indices[:, gate.topk_group :, None].expand(-1, -1, choice_NGM.shape[-1])
        choice_NE = choice_NGM.scatter(1, left_out, -math.inf).flatten(-2)
    if gate.top_k < choice_NE.shape[-1]:
        best = choice_NE.topk(gate.top_k + 1, -1).values
        margin_N = torch.minimum(margin_N, best[:, -2] - best[:, -1])
    return margin_N


# ---- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """Sums over compared tokens, so that rows add up to the total. nll: negative log-likelihoods; ranked: places where
    the peer says what it ranks first; logits_error, logits_size: squared norms, zero where there are no logits;
    unsettled: tokens not compared because they follow a routing tie."""

    tokens: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    nll_ours: float = 0.0
    nll_peer: float = 0.0
    ranked: int = 0
    agreed: int = 0
    ties: int = 0
    logits_error: float = 0.0
    logits_size: float = 0.0
    max_abs_any_token: float = 0.0
    unsettled: int = 0

    def within(self, limit: float) -> bool:
        """Whether nothing exceeds the limit; not-a-number does."""
        return not self.tokens or (self.max_abs <= limit and self.max_abs_any_token <= limit)

    def __add__(self, other: Tally) -> Tally:
        a, b = asdict(self), asdict(other)
        sums: dict[str, Any] = {k: _worst(a[k], b[k]) if k.startswith("max") else a[k] + b[k] for k in a}
        return Tally(**sums)

    def row(self, prompt: str) -> dict[str, Any]:
        """The figures as they are shown; None for what cannot be said."""
        n = self.tokens
        return {
            "prompt": prompt,
            "tokens": n,
            "unsettled": self.unsettled,
            "max_abs": self.max_abs,
            "mean_abs": self.sum_abs / n if n else 0.0,
            "argmax_agreement": self.agreed / self.ranked if self.ranked else None,
            "ties": self.ties,
            "disagreements": self.ranked - self.agreed - self.ties,
            "logits_relative": math.sqrt(self.logits_error / self.logits_size) if self.logits_size else None,
            "max_abs_any_token": self.max_abs_any_token if self.logits_size else None,
            "perplexity_ours": _exp(self.nll_ours / n) if n else None,
            "perplexity_peer": _exp(self.nll_peer / n) if n else None,
        }


def _worst(a: float, b: float) -> float:
    """The larger, where not-a-number is larger than all."""
    return a if math.isnan(a) or a > b else b


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Over the last axis, in double precision."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def compare(ours: npt.NDArray[np.float32], theirs: Scores, limit: float = math.inf) -> Tally:
    """One sequence: our logits [tokens, vocabulary] against what the peer says. limit: the largest difference that may
    excuse a disagreement as a tie.

    Raises CheckpointError where the two have vocabularies of different size.
    """
    if theirs.logits is not None and theirs.logits.shape != ours.shape:
        raise CheckpointError(
            f"the peer's logits are {list(theirs.logits.shape)}, ours {list(ours.shape)}",
            remedy="both sides must run one model",
        )
    last = len(theirs.ids) - 1
    starts = range(theirs.first - 1, last, _CHUNK)
    if not starts:
        return Tally()
    parts = [_part(ours, theirs, start, min(start + _CHUNK, last)) for start in starts]
    mine, peer, gap, ranked, agreed, widest = (np.concatenate(column) for column in zip(*parts, strict=True))
    difference = np.abs(mine - peer)
    bound = 2 * min(limit, _worst(float(difference.max()), float(widest.max())))
    error, size = _norms(ours, theirs.logits)
    return Tally(
        tokens=len(mine),
        max_abs=float(difference.max()),
        sum_abs=float(difference.sum()),
        nll_ours=float(-mine.sum()),
        nll_peer=float(-peer.sum()),
        ranked=int(ranked.sum()),
        agreed=int(agreed.sum()),
        ties=int((ranked & ~agreed & (gap <= bound)).sum()),
        logits_error=error,
        logits_size=size,
        max_abs_any_token=float(widest.max()),
    )


def _part(ours: npt.NDArray[np.float32], theirs: Scores, start: int, stop: int) -> tuple[npt.NDArray[Any], ...]:
    """For the tokens after positions start to stop: our and the peer's log-probability, our gap between the best two,
    whether the peer says what it ranks first, whether that is ours too, the largest difference of any token."""
    places, ids = np.arange(stop - start), np.array(theirs.ids[start + 1 : stop + 1])
    mine = log_softmax(ours[start:stop])
    if theirs.logits is not None:
        other = log_softmax(theirs.logits[start:stop])
        peer, top, widest = other[places, ids], other.argmax(-1), np.abs(mine - other).max(-1)
    else:
        assert theirs.logprobs is not None and theirs.top is not None
        part = slice(start - theirs.first + 1, stop - theirs.first + 1)
        peer, top, widest = theirs.logprobs[part].astype(np.float64), theirs.top[part], np.zeros(stop - start)
    best = np.partition(mine, -2, -1)[:, -2:]
    return mine[places, ids], peer, best[:, 1] - best[:, 0], top >= 0, top == mine.argmax(-1), widest


def compare_up_to_tie(ours: npt.NDArray[np.float32], theirs: Scores, limit: float, tie: int) -> Tally:
    """`compare`, without what follows from position `tie` on if that is all that is beyond the limit."""
    whole = compare(ours, theirs, limit)
    if whole.within(limit) or tie >= len(theirs.ids) - 1:
        return whole
    logits = None if theirs.logits is None else theirs.logits[:tie]
    before = compare(ours[:tie], replace(theirs, ids=theirs.ids[: tie + 1], logits=logits), limit)
    return replace(before, unsettled=whole.tokens - before.tokens) if before.within(limit) else whole


def _norms(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32] | None) -> tuple[float, float]:
    """Squared norms of the difference and of the peer's logits."""
    if theirs is None:
        return 0.0, 0.0
    error = size = 0.0
    for a, b in zip(ours, theirs, strict=True):
        error += float(((a.astype(np.float64) - b) ** 2).sum())
        size += float((b.astype(np.float64) ** 2).sum())
    return error, size


# ---- the whole ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """rows: one a prompt, `Tally.row`; tokenisation: prompts whose text the peer turns into the same ids, and into
    others."""

    model: str
    peer: str
    kind: str
    threshold: float
    rows: list[dict[str, Any]]
    total: dict[str, Any]
    tokenisation: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def mean_threshold(self) -> float:
        return self.threshold * MEAN_SHARE

    @property
    def faults(self) -> list[str]:
        """Why the two are not equal; empty if they are. Not-a-number is never equal."""
        total, found = self.total, []
        if not total["tokens"]:
            found.append("nothing was compared")
        if not total["max_abs"] <= self.threshold:
            found.append(f"the largest difference, {total['max_abs']:.3g}, is beyond {self.threshold:g}")
        if not total["mean_abs"] <= self.mean_threshold:
            found.append(f"the mean difference, {total['mean_abs']:.3g}, is beyond {self.mean_threshold:g}")
        if total["unsettled"] > total["tokens"]:
            found.append(f"{total['unsettled']} tokens follow routing ties, which leaves too few to compare")
        if total["logits_relative"] is not None and total["disagreements"]:
            found.append(f"{total['disagreements']} places rank another token first, and not by a tie")
        if different := self.tokenisation["different"]:
            found.append(f"the peer turns {different} of the texts into other tokens")
        return found

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that JSON cannot hold become null."""
        facts = {
            **asdict(self), "mean_threshold": self.mean_threshold, "passed": self.passed, "faults": self.faults,
        }  # fmt: skip
        return {k: _finite(v) for k, v in facts.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    ours: Ours,
    peer: Peer,
    prompts: Sequence[Prompt],
    words: Words,
    *,
    model: str,
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Every prompt through both. The peer stays open. Raises what the peer raises."""
    limit = THRESHOLDS[peer.kind] if threshold is None else threshold
    rows, total = [], Tally()
    tokenisation = {"equal": 0, "different": 0}
    for done, prompt in enumerate(prompts, 1):
        theirs = peer.score(prompt)
        logits, tie = ours.forward(theirs.ids)
        tally = compare_up_to_tie(logits, theirs, limit, tie)
        rows.append(tally.row(prompt.name))
        total += tally
        if words.tokenizer and prompt.text is not None and (ids := peer.tokenise(prompt.text)) is not None:
            tokenisation["equal" if ids == words.tokenizer.encode(prompt.text) else "different"] += 1
        progress(done)
    notes = list(peer.notes)
    if total.unsettled:
        notes.append(
            f"{total.unsettled} tokens were left out: two experts or groups were within {ROUTER_TIE:g} before, so that "
            "rounding chose"
        )
    return Report(model, peer.name, peer.kind, limit, rows, total.row("total"), tokenisation, notes)
