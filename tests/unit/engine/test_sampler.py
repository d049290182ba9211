"""Draws follow the exact distribution and depend on (seed, position) alone; truncation keeps what it should."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from rorqual.engine.api import SamplingParams
from rorqual.engine.sampler import sample, uniform


def draws(logits_V: Tensor, params: SamplingParams, n: int) -> Tensor:
    """n tokens of one distribution, at positions 0 .. n - 1 of one random seed."""
    seed = random.getrandbits(64)
    uniforms = [uniform(seed, i) for i in range(n)]
    result = sample(logits_V.expand(n, -1), [params] * n, uniforms)
    return torch.tensor([d.token_id for d in result])


def exact(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution by definition, in fp64 and plain steps."""
    p = (logits_V.double() / params.temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: (-p[i].item(), i))
    order = order[: params.top_k or None]
    total, mass, kept = sum(p[i].item() for i in order), 0.0, []
    for i in order:
        if mass < params.top_p * total or params.top_p == 1.0:
            kept.append(i)
        mass += p[i].item()
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.7, top_k=9, top_p=0.7),
    ],
)
def test_frequencies_fit_the_exact_distribution(params: SamplingParams) -> None:
    """Chi-square over 16 tokens and 40,000 draws; the bound is passed by chance once in a million."""
    logits = torch.randn(16) * 1.5
    n = 40_000
    seen = draws(logits, params, n).bincount(minlength=16).double()
    want = exact(logits, params) * n
    assert (seen[want == 0] == 0).all()
    # Cells with few expected draws are pooled, as the test statistic requires.
    small = (want > 0) & (want < 10)
    cells = [(seen[i].item(), want[i].item()) for i in range(16) if want[i] >= 10]
    if small.any():
        cells.append((seen[small].sum().item(), want[small].sum().item()))
    chi2 = sum((s - w) ** 2 / w for s, w in cells if w > 0)
    k = max(1, len(cells) - 1)
    # Wilson-Hilferty: (chi2 / k)^(1/3) is nearly normal.
    z = ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert z < 4.8


@pytest.mark.parametrize("vocab", [50, 3000])
def test_truncation_keeps_exactly_the_defined_set(vocab: int) -> None:
    """Also where the nucleus is larger than the candidates that are sorted first."""
    for _ in range(8):
        logits = torch.randn(vocab) * random.choice([0.05, 1.0, 4.0])
        params = SamplingParams(
            temperature=random.choice([0.5, 1.0, 3.0]),
            top_k=random.choice([0, 1, 3, 40, 1024, 1500, 10_000]),
            top_p=random.choice([1e-9, 0.3, 0.9, 0.97, 0.999, 1.0]),
        )
        want = exact(logits, params)
        lowest, highest = sample(logits.expand(2, -1), [params] * 2, [0.0, 1.0 - 2**-53])
        assert want[lowest.token_id] > 0 and want[highest.token_id] > 0
        if params.top_k or params.top_p < 1.0:
            ranked = sorted((i for i in range(vocab) if want[i] > 0), key=lambda i: (-want[i].item(), i))
            assert lowest.token_id == ranked[0]
            assert abs(ranked.index(highest.token_id or 0) - (len(ranked) - 1)) <= 1  # fp32 against fp64 at the border


def test_the_crossing_token_belongs_to_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert set(draws(logits, SamplingParams(top_p=0.55), 300).tolist()) == {0, 1}
    assert set(draws(logits, SamplingParams(top_p=0.45), 300).tolist()) == {0}
    assert set(draws(logits, SamplingParams(top_p=0.95), 300).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("vocab", [8, 3000])
def test_equals_at_the_border_are_cut_by_id(vocab: int) -> None:
    logits = torch.zeros(vocab)
    assert set(draws(logits, SamplingParams(top_k=3), 200).tolist()) == {0, 1, 2}
    half = draws(logits, SamplingParams(top_p=0.5), 2000)
    assert half.max() < vocab // 2 + 1


def test_extremes_of_temperature() -> None:
    logits = torch.randn(4, 100) * 20
    greedy = [d.token_id for d in sample(logits, [SamplingParams(temperature=0)] * 4, [0.9] * 4)]
    assert greedy == logits.argmax(-1).tolist()
    for cold in (1e-6, 1e-44):
        assert [d.token_id for d in sample(logits, [SamplingParams(temperature=cold)] * 4, [0.9] * 4)] == greedy
        assert [
            d.token_id for d in sample(logits, [SamplingParams(temperature=cold, top_p=0.9)] * 4, [0.9] * 4)
        ] == greedy


def test_masked_tokens_are_never_drawn_and_faulty_rows_are_told() -> None:
    logits = torch.randn(6, 40)
    logits[0, 1:] = float("-inf")
    logits[1, 5] = float("nan")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    for params in (
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=0),
        SamplingParams(logprobs=2),
    ):
        for u in (0.0, 0.5, 1.0 - 2**-53):
            result = sample(logits, [params] * 6, [u] * 6)
            assert result[0].token_id == 0
            assert all(d.token_id is None and d.fault for d in result[1:4])
            assert all(d.token_id is not None and d.fault is None for d in result[4:])


def test_a_row_does_not_depend_on_its_mates() -> None:
    vocab, n = 2000, 24
    logits = torch.randn(n, vocab) * 3
    kinds = [
        {},
        {"top_p": 0.9},
        {"top_k": 20},
        {"temperature": 0.0},
        {"logprobs": 3},
        {"top_p": 0.999, "temperature": 4.0},
    ]
    params = [SamplingParams(**random.choice(kinds)) for _ in range(n)]  # type: ignore[arg-type]
    uniforms = [random.random() for _ in range(n)]
    together = [d.token_id for d in sample(logits, params, uniforms)]
    alone = [sample(logits[i : i + 1], params[i : i + 1], uniforms[i : i + 1])[0].token_id for i in range(n)]
    order = random.sample(range(n), n)
    shuffled = sample(logits[order], [params[i] for i in order], [uniforms[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == [d.token_id for d in shuffled]


def test_logprobs_are_raw_and_sorted() -> None:
    logits = torch.randn(3, 50)
    params = [SamplingParams(temperature=0.2, top_k=2, logprobs=n) for n in (0, 4, None)]
    result = sample(logits, params, [0.3] * 3)
    raw = logits.log_softmax(-1)
    assert result[2].logprob is None
    for i, n in ((0, 0), (1, 4)):
        lp = result[i].logprob
        assert lp is not None and lp.token_id == result[i].token_id and len(lp.top) == n
        assert lp.logprob == pytest.approx(raw[i, lp.token_id].item(), abs=1e-5)
        best = raw[i].topk(n)
        assert [t for t, _ in lp.top] == best.indices.tolist()
        assert [v for _, v in lp.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    """Mean, variance, and no correlation between neighbours in position or in seed."""
    n = 20_000
    base = random.getrandbits(64)
    by_position = torch.tensor([uniform(base, i) for i in range(n)], dtype=torch.float64)
    by_seed = torch.tensor([uniform(base + i, 7) for i in range(n)], dtype=torch.float64)
    for u in (by_position, by_seed):
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
        assert abs(u.var() - 1 / 12) < 0.003
        assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 5 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack((by_position, by_seed)))[0, 1]) < 5 / math.sqrt(n)
    assert uniform(5, 9) == uniform(5, 9) and uniform(-1, 0) == uniform(2**64 - 1, 0)
