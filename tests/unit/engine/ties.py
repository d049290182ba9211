"""When two engines may say different things: on torch's operations a token's logits depend in their last bits on what else
is computed beside it, so that a draw between two tokens may fall on either side. What follows it is another text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from rorqual.engine import sampler
from rorqual.engine.api import Request
from rorqual.engine.sampler import Row, sample
from rorqual.model.transformer import Transformer

NEAR = 1e-4
"""Logits as near are equal within rounding; rounding itself is of the order of 1e-6."""
BETWEEN = 1e-5
"""The same for a random number and the border between two tokens."""


def same_texts(
    model: Transformer,
    requests: Sequence[Request],
    one: Mapping[str, Sequence[int]],
    other: Mapping[str, Sequence[int]],
) -> bool:
    """Equal answers to all of these, each up to a draw that rounding decides."""
    return one.keys() == other.keys() and all(same_text(model, r, one[r.id], other[r.id]) for r in requests)


def same_text(model: Transformer, request: Request, one: Sequence[int], other: Sequence[int]) -> bool:
    """model: computes the logits where the two part."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if at is None:
        return True
    tokens = [*request.prompt, *one[:at]]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]))[0, -1].float()
    if request.params.temperature == 0:
        return bool(logits.max() - logits[[one[at], other[at]]].min() < NEAR)
    return {one[at], other[at]} <= drawn_around(logits, request, tokens)


def drawn_around(logits_V: torch.Tensor, request: Request, tokens: Sequence[int]) -> set[int | None]:
    """What the request draws here, and what with numbers a little smaller and larger."""
    exact, found = sampler.uniform, set()
    row = Row(request.params, request.params.seed or 0, tokens, len(request.prompt))
    for shift in (-BETWEEN, 0.0, BETWEEN):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "uniform", lambda *at, shift=shift: min(max(exact(*at) + shift, 0.0), 1 - 2**-53))
            found.add(sample(logits_V[None], [row])[0].token_id)
    return found
