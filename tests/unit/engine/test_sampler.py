"""Draws follow the exact distribution and depend on (seed, position) alone; penalties, masks and truncation do what
their definitions say; drafts that are kept by comparison with a draw change no distribution."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine import sampler
from rorqual.engine.api import EngineInfo, Request, SamplingParams, check_request
from rorqual.engine.core import Draw
from rorqual.engine.native import draw
from rorqual.engine.sampler import Row, sample, uniform
from rorqual.errors import BackendUnavailable, RequestError
from rorqual.ops.native import build


@pytest.fixture(params=["torch", "kernel"], autouse=True)
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything here holds for torch's operations and for the CPU kernel."""
    if request.param == "torch":
        yield
        return
    try:
        lib = build.library()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    engine = lib.rq_open(random.choice([1, 2]))
    monkeypatch.setitem(globals(), "sample", partial(sampler.sample, kernel=partial(draw, lib, engine)))
    yield
    lib.rq_close(engine)


def bitset(allowed: Sequence[int], vocab: int) -> NDArray[np.uint32]:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def row(params: SamplingParams, seed: int = 0, tokens: Sequence[int] = (0,), prompt: int = 1, **more: Any) -> Row:
    return Row(params, seed, tokens, prompt, **more)


def draws(logits_V: Tensor, params: SamplingParams, n: int) -> Tensor:
    """n tokens of one distribution, of n seeds."""
    seed = random.getrandbits(64)
    result = sample(logits_V.expand(n, -1), [row(params, seed + i) for i in range(n)])
    return torch.tensor([d.token_id for d in result])


def at(u: float, logits_BV: Tensor, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> list[Draw]:
    """Draws with a given uniform number."""
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda seed, position: u)
        return sample(logits_BV, [row(params)] * len(logits_BV))


def reference(logits: Sequence[float], row: Row) -> list[float]:
    """The distribution of a row by definition: loops over tokens, Python's floats."""
    p, vocab = row.params, len(logits)
    generated = list(row.tokens[row.prompt :])
    x = list(logits)
    for t in range(vocab):
        if row.mask is not None and not int(row.mask[t // 32]) >> t % 32 & 1:
            x[t] = -math.inf
        for token, bias in p.logit_bias:
            x[t] += bias if token == t else 0.0
        for bad in p.bad_token_ids:
            k = len(bad) - 1
            if t == bad[-1] and k <= len(generated) and generated[len(generated) - k :] == list(bad[:-1]):
                x[t] = -math.inf
        if len(generated) < p.min_tokens and t in (*row.eos, *p.stop_token_ids):
            x[t] = -math.inf
        if t in row.tokens:
            x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        count = generated.count(t)
        x[t] -= count * p.frequency_penalty + (count > 0) * p.presence_penalty
    if max(x) == -math.inf:
        return [0.0] * vocab
    if p.temperature == 0:
        return [float(t == x.index(max(x))) for t in range(vocab)]
    weights = [math.exp((v - max(x)) / p.temperature) for v in x]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(vocab), key=lambda t: (-probs[t], t))[: p.top_k or None]
    total, mass, kept = sum(probs[t] for t in order), 0.0, []
    for t in order:
        if (mass < p.top_p * total or p.top_p == 1.0) and probs[t] >= p.min_p * probs[order[0]]:
            kept.append(t)
        mass += probs[t]
    left = sum(probs[t] for t in kept)
    return [probs[t] / left if t in kept else 0.0 for t in range(vocab)]


def z_of_chi_square(seen: Sequence[float], want: Sequence[float]) -> float:
    """How many standard deviations the statistic is too high; above 4.8 once in a million by chance. Cells with few
    expected draws are pooled until each has 25, as the statistic requires: one draw in a cell of a hundredth would be
    taken for ten deviations. A draw that cannot be is infinitely unlikely."""
    if any(s and not w for s, w in zip(seen, want, strict=True)):
        return math.inf
    cells, pool = [], (0.0, 0.0)
    for w, s in sorted(zip(want, seen, strict=True)):  # what is left in the end is less than any cell
        pool = pool[0] + s, pool[1] + w
        if pool[1] >= 25:
            cells.append(pool)
            pool = 0.0, 0.0
    chi2 = sum((s - w) ** 2 / w for s, w in cells)
    k = max(1, len(cells) - 1)
    # Wilson-Hilferty: (chi2 / k)^(1/3) is nearly normal.
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.2, min_p=0.2),
        SamplingParams(temperature=1.7, top_k=9, top_p=0.7, min_p=0.1),
    ],
)
def test_frequencies_fit_the_exact_distribution(params: SamplingParams) -> None:
    logits = torch.randn(16) * 1.5
    n = 40_000
    seen = draws(logits, params, n).bincount(minlength=16).tolist()
    assert z_of_chi_square(seen, [n * p for p in reference(logits.tolist(), row(params))]) < 4.8


def some_params(vocab: int) -> SamplingParams:
    """Any mixture of the fields, each as often off as on."""
    some: dict[str, Any] = {
        "temperature": random.choice([0.0, 0.5, 1.0, 3.0]),
        "top_k": random.choice([1, 3, 10]),
        "top_p": random.choice([0.3, 0.9, 0.99]),
        "min_p": random.choice([0.01, 0.2]),
        "min_tokens": random.randrange(8),
        "repetition_penalty": random.choice([0.5, 1.3, 4.0]),
        "presence_penalty": random.uniform(-2, 2),
        "frequency_penalty": random.uniform(-2, 2),
        "logit_bias": {random.randrange(vocab): random.choice([-100, -1.5, 2.5]) for _ in range(4)},
        "bad_token_ids": [[random.randrange(vocab) for _ in range(random.randint(1, 3))] for _ in range(vocab)],
        "stop_token_ids": random.sample(range(vocab), 2),
    }
    return SamplingParams(**{name: value for name, value in some.items() if random.random() < 0.5})


@pytest.mark.parametrize("vocab", [8, 33, 130])
def test_every_field_does_what_its_definition_says(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With evenly spaced numbers in place of random ones every token must be drawn as often as its probability says, to
    within one draw."""
    n = 200
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / n)
    for _ in range(40):
        params, logits = some_params(vocab), torch.randn(vocab) * 2
        tokens = [random.randrange(vocab) for _ in range(random.randint(1, 12))]
        mask = bitset(random.sample(range(vocab), vocab // 2), vocab) if random.random() < 0.5 else None
        like = Row(params, 0, tokens, random.randint(1, len(tokens)), mask, (0, 1))
        result = sample(logits.expand(n, -1), [like._replace(seed=i) for i in range(n)])
        want = reference(logits.tolist(), like)
        if any(want):
            seen = Counter(d.token_id for d in result)
            # A token that crosses the nucleus' border within fp32's rounding may be on either side of it.
            moved = [params.top_p] if params.top_p == 1.0 else [params.top_p * (1 + e) for e in (0.0, 1e-6, -1e-6)]
            assert any(
                all(abs(seen[t] - n * p) < 1.01 for t, p in enumerate(reference(logits.tolist(), at_border)))
                for at_border in (like._replace(params=replace(params, top_p=top_p)) for top_p in moved)
            )
            assert None not in seen
        else:
            assert all(d.token_id is None and "no token is allowed" in (d.fault or "") for d in result)


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[4.0, -1.0, 3.0, 2.9]])
    tokens, prompt = [0, 2, 2], 1  # token 0 in the prompt, token 2 twice in the completion

    def best(**fields: Any) -> int | None:
        return sample(logits, [row(SamplingParams(temperature=0, **fields), 0, tokens, prompt)])[0].token_id

    assert best() == 0 and best(presence_penalty=2.0, frequency_penalty=2.0) == 0  # a prompt is not penalised by these
    assert best(repetition_penalty=1.5) == 3  # 4 / 1.5 and 3 / 1.5 against 2.9
    assert best(presence_penalty=-1.5) == 2 and best(frequency_penalty=-0.6) == 2
    assert best(frequency_penalty=-0.4) == 0  # twice 0.4 is not enough
    assert best(logit_bias={"1": 6}) == 1 and best(logit_bias=[(0, -100)]) == 2
    assert best(bad_token_ids=[[0], [2, 2, 2]]) == 3
    assert best(bad_token_ids=[[0, 2, 2, 0]]) == 0  # it would have begun in the prompt
    assert best(bad_token_ids=[[2, 0]]) == 2
    assert best(min_tokens=3, stop_token_ids=[0]) == 2 and best(min_tokens=2, stop_token_ids=[0]) == 0


@pytest.mark.parametrize("vocab", [50, 3000, 9000])
def test_truncation_keeps_exactly_the_defined_set(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the nucleus is larger than the candidates that are sorted first."""
    for _ in range(30):
        logits = torch.randn(vocab) * random.choice([0.05, 1.0, 4.0])
        params = SamplingParams(
            temperature=random.choice([0.5, 1.0, 3.0]),
            top_k=random.choice([0, 0, 1, 3, 40, 256, 1500, 10_000]),
            top_p=random.choice([1e-9, 0.3, 0.9, 0.97, 0.999, 1.0]),
            min_p=random.choice([0.0, 0.0, 1e-3, 0.3]),
        )
        # fp64, as the loops of `reference` would take long here.
        probs = (logits.double() / params.temperature).softmax(-1)
        ranked, order = probs.sort(descending=True, stable=True)
        ranked = torch.where(torch.arange(vocab) < (params.top_k or vocab), ranked, 0.0)
        before = (ranked.cumsum(-1) - ranked) / ranked.sum()
        kept = ((before < params.top_p) | (params.top_p == 1.0)) & (ranked >= params.min_p * ranked[0]) & (ranked > 0)
        if params == SamplingParams(temperature=params.temperature):
            continue  # nothing is cut and nothing sorted
        lowest, highest = (at(u, logits[None], params, monkeypatch)[0].token_id for u in (0.0, 1.0 - 2**-53))
        assert lowest == order[0]
        place, last = order.tolist().index(highest), int(kept.sum()) - 1
        # The sampler's fp32 moves the nucleus' border by about 1e-6 of mass; elsewhere only the sums' rounding counts.
        rounding = 1e-5 if params.top_p < 1.0 else vocab * 2**-53
        assert probs[order][min(place, last) + 1 : max(place, last)].sum() < rounding


@pytest.mark.parametrize("vocab", [5, 100, 6144, 50_001])
def test_the_kernel_draws_what_torch_draws(vocab: int) -> None:
    """But for a draw that falls into the rounding between two tokens."""
    rows, logits = [], torch.randn(400, vocab) * torch.rand(400, 1) * 8
    logits[torch.rand(400, vocab) < 0.1] = -math.inf
    logits[::7] = logits[::7].round()  # equals
    for i in range(len(logits)):
        params = SamplingParams(
            temperature=random.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=random.choice([0, 0, 1, 20, 1000]),
            top_p=random.choice([1.0, 0.2, 0.95]),
            min_p=random.choice([0.0, 0.0, 0.05]),
        )
        bits = torch.rand(-(-vocab // 32) * 32) < random.choice([2 / vocab, 0.5, 1.0])  # the first may leave nothing
        mask = np.packbits(bits.numpy(), bitorder="little").view(np.uint32)
        rows.append(row(params, i, mask=random.choice([None, mask])))
    ours, theirs = sample(logits, rows), sampler.sample(logits, rows)
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 8
    assert [d.fault for d in ours] == [d.fault for d in theirs]


def test_what_is_forbidden_hides_no_fault() -> None:
    """A logit that is no number is one, also where its token may not be drawn."""
    for wrong in (math.nan, math.inf):
        logits = torch.zeros(2, 40)
        logits[0, 7] = wrong
        one = Row(SamplingParams(temperature=0, min_tokens=3), 1, [1], 1, eos=(7,))
        bad, good = sample(logits, [one, one])
        assert bad.token_id is None and bad.fault == sampler.NO_NUMBERS and not bad.asked
        assert good.token_id == 0


def test_the_crossing_token_belongs_to_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert set(draws(logits, SamplingParams(top_p=0.55), 300).tolist()) == {0, 1}
    assert set(draws(logits, SamplingParams(top_p=0.45), 300).tolist()) == {0}
    assert set(draws(logits, SamplingParams(top_p=0.95), 300).tolist()) == {0, 1, 2}
    assert set(draws(logits, SamplingParams(min_p=0.5), 300).tolist()) == {0, 1}


@pytest.mark.parametrize("vocab", [8, 3000])
def test_equals_at_the_border_are_cut_by_id(vocab: int) -> None:
    logits = torch.zeros(vocab)
    assert set(draws(logits, SamplingParams(top_k=3), 200).tolist()) == {0, 1, 2}
    half = draws(logits, SamplingParams(top_p=0.5), 2000)
    assert half.max() < vocab // 2 + 1
    result = sample(logits[None], [row(SamplingParams(logprobs=5))])[0].logprob
    assert result is not None and [t for t, _ in result.top] == [0, 1, 2, 3, 4]


def test_extremes_of_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 100) * 20
    greedy = [d.token_id for d in at(0.9, logits, SamplingParams(temperature=0), monkeypatch)]
    assert greedy == logits.argmax(-1).tolist()
    for cold in (1e-6, 1e-44):
        for params in (SamplingParams(temperature=cold), SamplingParams(temperature=cold, top_p=0.9)):
            assert [d.token_id for d in at(0.9, logits, params, monkeypatch)] == greedy


def test_impossible_tokens_are_never_drawn_and_faulty_rows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(6, 40)
    logits[0, 1:] = float("-inf")
    logits[1, 5] = float("nan")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    before = logits.clone()
    for params in (
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=0),
        SamplingParams(logprobs=2),
        SamplingParams(repetition_penalty=1.5, logit_bias={7: 3}),
    ):
        for u in (0.0, 0.5, 1.0 - 2**-53):
            result = at(u, logits, params, monkeypatch)
            assert result[0].token_id == 0
            assert all(d.token_id is None and d.fault for d in result[1:4])
            assert all(d.token_id is not None and d.fault is None for d in result[4:])
    assert torch.equal(logits, before) or logits.isnan().any()


def test_a_mask_bounds_the_draw_and_an_empty_one_faults_its_row_only() -> None:
    vocab = 77
    logits, some = torch.randn(3, vocab), random.sample(range(vocab), 5)
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.9, temperature=5.0)):
        rows = [row(params), row(params, mask=bitset([], vocab)), row(params, mask=bitset(some, vocab))]
        for seed in range(20):
            free, none, bound = sample(logits, [r._replace(seed=seed) for r in rows])
            assert free.fault is None and none.token_id is None and "no token is allowed" in (none.fault or "")
            assert bound.token_id in some
    only_end = row(SamplingParams(min_tokens=4), mask=bitset([1], vocab), eos=(1,))
    assert sample(logits[:1], [only_end])[0].fault and sample(logits[:1], [only_end._replace(eos=())])[0].token_id == 1


def some_row(vocab: int) -> Row:
    more = random.choice([{}, {"mask": bitset(random.sample(range(vocab), vocab // 2), vocab)}])
    chosen = random.choice([{}, {"logprobs": 3}, {"top_p": 0.999, "temperature": 4.0}])
    params = random.choice([SamplingParams(**chosen), some_params(vocab)])
    tokens = [random.randrange(vocab) for _ in range(20)]
    return Row(params, random.getrandbits(64), tokens, random.randrange(20), eos=(1,), **more)


@pytest.mark.parametrize("vocab", [50, 2000, 4097])
def test_a_row_does_not_depend_on_its_mates(vocab: int) -> None:
    """To the bit, log-probabilities included."""
    n = 24
    logits, rows = torch.randn(n, vocab) * 3, [some_row(vocab) for _ in range(n)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(n)]
    order = random.sample(range(n), n)
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert together == alone and [together[i] for i in order] == shuffled


@pytest.mark.parametrize("vocab", [7, 129, 1021, 6144, 16_385])
def test_logprobs_are_the_same_bits_in_any_batch(vocab: int) -> None:
    params = SamplingParams(temperature=0, logprobs=20)
    logits = (torch.randn(8, vocab) * random.choice([1, 5, 20])).bfloat16()  # of which many are equal
    together = sample(logits, [row(params)] * 8)
    assert together == [sample(logits[i : i + 1], [row(params)])[0] for i in range(8)]


def test_logprobs_are_raw_and_sorted() -> None:
    logits = torch.randn(3, 50)
    fields: dict[str, Any] = {"temperature": 0.2, "top_k": 2, "repetition_penalty": 2.0, "logit_bias": {3: 5.0}}
    result = sample(logits, [row(SamplingParams(logprobs=n, **fields)) for n in (0, 4, None)])
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


# ---- speculation -----------------------------------------------------------------------------------------------------

VOCAB, DRAWS = 16, 50_000
PARAMS = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)


class Toy:
    """A model of one token of context with a grammar of one token of context, behind the sampler. Always the same one,
    so that the draft's probability is known to be neither too small nor too large to tell rules apart."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.logits = torch.from_numpy(rng.normal(size=(VOCAB, VOCAB)) * 1.2).float()
        self.prompt, self.draft = [3, 5, 5], 7
        self.logits[5, 7] = self.logits[5].max() + 1.5
        self.masks = [bitset([7, *rng.permutation(VOCAB)[:11].tolist()], VOCAB) for _ in range(VOCAB)]

    def row(self, seed: int, tokens: Sequence[int]) -> Row:
        known = [*self.prompt, *tokens]
        return Row(PARAMS, seed, known, len(self.prompt), self.masks[known[-1]])

    def draw(self, seeds: Sequence[int], contexts: Sequence[Sequence[int]]) -> list[int | None]:
        rows = [self.row(seed, tokens) for seed, tokens in zip(seeds, contexts, strict=True)]
        return [d.token_id for d in sample(self.logits[[r.tokens[-1] for r in rows]], rows)]

    def law(self, tokens: Sequence[int]) -> list[float]:
        row = self.row(0, tokens)
        return reference(self.logits[row.tokens[-1]].tolist(), row)


def test_keeping_a_draft_that_equals_the_draw_changes_no_distribution() -> None:
    """The joint law of two tokens, with a draft for the first of them: the engine's rule passes, and the test has the
    power to reject a rule that keeps drafts which the model finds likely."""
    toy, base = Toy(), random.getrandbits(64)
    seeds, draft = range(base, base + DRAWS), toy.draft
    first = toy.draw(seeds, [[]] * DRAWS)
    behind = toy.draw(seeds, [[draft]] * DRAWS)  # in the same step, before it is known whether the draft stands
    wrong = [i for i, token in enumerate(first) if token != draft]
    second = list(behind)
    for i, token in zip(wrong, toy.draw([seeds[i] for i in wrong], [[first[i] or 0] for i in wrong]), strict=True):
        second[i] = token  # of the next step

    law = toy.law([])
    assert 0.35 < law[draft] < 0.8
    want = [DRAWS * p * q for t, p in enumerate(law) for q in (toy.law([t]) if p else [0.0] * VOCAB)]

    def misfit(first: Sequence[int | None], second: Sequence[int | None]) -> float:
        seen = Counter(zip(first, second, strict=True))
        return z_of_chi_square([seen[a, b] for a in range(VOCAB) for b in range(VOCAB)], want)

    assert misfit(first, second) < 4.8
    assert misfit([draft] * DRAWS if law[draft] > 0.3 else first, behind) > 4.8


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("min_tokens", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", [3]),
        ("logit_bias", {1: math.nan}),
        ("bad_token_ids", [[]]),
        ("bad_token_ids", [3]),
        ("bad_words", [""]),
        ("bad_words", 5),
        ("stop", [""]),
        ("n", 0),
        ("n", 1000),
    ],
)
def test_fields_out_of_range_are_named(param: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert caught.value.param == param


def test_more_least_tokens_than_most() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"
    SamplingParams(min_tokens=4, max_tokens=4)


def test_collections_are_brought_to_one_form() -> None:
    params = SamplingParams(
        logit_bias={"3": -1, 5: 2},  # type: ignore[arg-type]
        bad_token_ids=[[1, 2]],  # type: ignore[arg-type]
        bad_words="x",  # type: ignore[arg-type]
    )
    assert params.logit_bias == ((3, -1.0), (5, 2.0)) and params.bad_token_ids == ((1, 2),)
    spelled = params.spelled(lambda text: [ord(c) for c in text])
    assert spelled.bad_words == () and spelled.bad_token_ids == ((1, 2), (120,), (32, 120))
    assert spelled.spelled(lambda text: []) is spelled and hash(spelled)


@pytest.mark.parametrize("param", ["logit_bias", "bad_token_ids", "stop_token_ids", "bad_words"])
def test_ids_outside_the_vocabulary_and_unspelled_words_are_refused(param: str) -> None:
    info = EngineInfo("m", 100, 50, (1,), 100)
    values: dict[str, Any] = {"logit_bias": {50: 1}, "bad_token_ids": [[3, 50]], "stop_token_ids": [-1]}
    with pytest.raises(RequestError) as caught:
        check_request(Request("", (1,), SamplingParams(**{param: values.get(param, "word")})), info)
    assert caught.value.param == param
