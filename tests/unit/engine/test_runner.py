"""The torch runner: drafts and captured steps change no token, and memory that runs out loses no request.

Captured steps run here as they are, without the capture, over the same static buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import Output, Request, SamplingParams
from rorqual.engine.core import EngineCore, OutOfMemory
from rorqual.engine.drawing import REDO, draw, fields
from rorqual.engine.graphs import DecodeGraphs
from rorqual.engine.inputs import Span, as_chunk, bucket, pieces
from rorqual.engine.load import build_core
from rorqual.engine.memory import measured_room
from rorqual.engine.prompts import Prompts
from rorqual.engine.runner import ModelRunner
from rorqual.engine.sampler import Row, sample
from rorqual.engine.settings import EngineSettings
from rorqual.errors import CapacityError, ConfigError
from rorqual.model.transformer import Transformer
from tests.unit.engine.fakes import expected, make_core
from tests.unit.engine.fakes import request as fake_request
from tests.unit.engine.ties import same_texts

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Random, but the token before counts most, for the head as for the MTP module: drafts are often right."""
    torch.manual_seed(3)
    network = Transformer(replace(ModelConfig.load("test"), vocab_size=VOCAB, max_position_embeddings=1024)).eval()
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if not name.endswith("norm.weight"):
                tensor.mul_(3)
        network.embed_tokens.weight.normal_()
        network.lm_head.weight.copy_(network.embed_tokens.weight.roll(1, 0))
        (module,) = network.mtp
        D = network.cfg.hidden_size
        module.eh_proj.weight[:, :D] += 2 * torch.eye(D)
    return network


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "top_p": 0.9, "seed": 5},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5, "seed": 9, "repetition_penalty": 1.2, "logprobs": 2},
    ]
    return [
        Request(
            str(i),
            tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()),
            SamplingParams(**kinds[i % 4], max_tokens=24 + 3 * i, ignore_eos=True),
        )
        for i, n in enumerate((5, 64, 65, 200, 1, 130, 333))
    ]


def engine(model: Transformer, captured: bool = False, **settings: Any) -> EngineCore:
    told = {"prefix_cache": False, "speculation": 0, **settings}
    core = build_core(model, EngineSettings("", **told), name="m", eos_token_ids=(1,))
    if captured:
        assert isinstance(core.runner, ModelRunner)
        core.runner.graphs = DecodeGraphs(model, core.runner.latents, 64)
        core.scheduler.lookahead = core.runner.buckets = True
        core.runner.prompts = Prompts(model, core.runner.latents, True, True, core.runner.draft_depth > 0)
    return core


def outputs(core: EngineCore, requests: list[Request]) -> dict[str, list[Output]]:
    for request in requests:
        core.add(request)
    told: dict[str, list[Output]] = {r.id: [] for r in requests}
    while core.busy:
        for out in core.step():
            told[out.request_id].append(out)
    assert core.scheduler.pool.available == core.scheduler.pool.usable, "no page leaks"
    assert all([bool(o.finish_reason) for o in outs] == [False] * (len(outs) - 1) + [True] for outs in told.values())
    return told


def run(core: EngineCore, requests: list[Request]) -> dict[str, list[int]]:
    told = outputs(core, requests)
    assert not any(o.error for outs in told.values() for o in outs)
    return {id: [t for o in outs for t in o.token_ids] for id, outs in told.items()}


@pytest.fixture(scope="module")
def plain(model: Transformer, requests: list[Request]) -> dict[str, list[int]]:
    return run(engine(model), requests)


def test_a_prompt_whose_shape_comes_again_is_captured(model: Transformer, requests: list[Request]) -> None:
    """The first two times, the third (over what the second left in the buffers), with a shared prefix, in chunks."""
    core = engine(model, captured=True, prefix_cache=True, max_batched_tokens=128)
    assert isinstance(core.runner, ModelRunner)
    longer = [replace(r, prompt=(*requests[3].prompt[:130], *r.prompt)) for r in requests]
    want = [run(engine(model), batch) for batch in (requests, longer)]
    for _ in range(3):
        for batch, answers in zip((requests, longer), want, strict=True):
            assert run(core, batch) == answers
    made = core.runner.prompts.graphs
    assert len(made) > 5 and {shape.fresh for shape in made} == {True, False}


def test_groups_of_one_shape_in_a_step_keep_their_own_results(model: Transformer) -> None:
    """Lengths of 8 and 5 are one bucket and two groups: the second must not overwrite the first's end."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    pair = [Request("a", tuple(range(2, 10)), params), Request("b", tuple(range(20, 25)), params)]
    core, want = engine(model, captured=True), run(engine(model), pair)
    assert all(run(core, pair) == want for _ in range(3))


def test_prompts_that_cannot_be_captured_are_computed_all_the_same(
    model: Transformer, requests: list[Request], plain: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = engine(model, captured=True)
    assert isinstance(core.runner, ModelRunner)
    monkeypatch.setattr("rorqual.engine.prompts._Prompt", lambda *_: 1 / 0)
    assert run(core, requests) == run(core, requests) == plain
    assert not core.runner.prompts.graphs and core.runner.prompts.most < 64


def test_prompts_come_in_few_lengths() -> None:
    """Little padding, eight lengths an octave; a length that is one stays."""
    lengths = [*range(1, 3000), 16383, 16384]
    assert all(n <= bucket(n) <= max(n + 7, n * 9 / 8) and bucket(bucket(n)) == bucket(n) for n in lengths)
    assert len({bucket(n) for n in range(1025, 2049)}) == 8 and bucket(16384) == 16384
    spans = [Span([5] * n, 0, [1, 2]) for n in (100, 90)]
    tokens, batch, last = as_chunk(spans, torch.zeros(1, 3, 64, 4), 64, buckets=True)
    assert tokens.shape == (2, 104) and last.tolist() == [99, 89] and batch.cache is not None
    assert (batch.cache.slots_BT[:, 100:] < 64).all(), "padding is written to the scrap page"


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_drafts_and_captured_steps_change_no_token(
    model: Transformer, requests: list[Request], plain: dict[str, list[int]], depth: int, captured: bool
) -> None:
    core = engine(model, captured, speculation=depth, max_batched_tokens=128)
    assert run(core, requests) == plain
    if depth:
        assert core.stats.draft_tokens > core.stats.accepted > 10
    growing = [
        replace(r, prompt=requests[3].prompt[i : i + 60], params=replace(r.params, max_tokens=72))
        for i, r in enumerate(requests[:4])
    ]
    small = engine(model, captured, speculation=depth, cache_tokens=384, max_model_len=192)
    assert run(small, growing) == run(engine(model), growing) and small.stats.preemptions
    if captured:  # begun ahead, or verified and drafted at once
        greedy = [r for r in requests if r.params.temperature == 0]
        assert run(engine(model, captured, speculation=depth), greedy) == {r.id: plain[r.id] for r in greedy}


def test_captured_steps_draft_as_eager_ones(model: Transformer, requests: list[Request]) -> None:
    """Neither the static buffers nor the device's own choice lose acceptance."""
    # A prompt of one token is decoded ahead of the host and gets no draft then.
    longer = [r for r in requests if len(r.prompt) > 1]
    for chosen in (longer, [r for r in longer if r.params.temperature == 0]):
        counts = []
        for captured in (False, True):
            core = engine(model, captured, speculation=2)
            run(core, chosen)
            counts.append((core.stats.draft_tokens, core.stats.accepted))
        assert counts[0] == counts[1]


@pytest.mark.parametrize("depth", [0, 2])
def test_the_device_draws_what_the_host_draws(model: Transformer, requests: list[Request], depth: int) -> None:
    """Steps are begun ahead then; and now and then the device asks the host."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.5},
        {"temperature": 0},
        {"temperature": 0.9, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.05, "min_tokens": 1},
    ]
    asked = [
        replace(r, params=SamplingParams(**kinds[i % 4], seed=i, max_tokens=25, ignore_eos=True))
        for i, r in enumerate(requests)
    ]
    want = run(engine(model), asked)
    core = engine(model, True, speculation=depth)
    assert isinstance(core.runner, ModelRunner) and core.runner.graphs
    assert run(core, asked) == want
    assert any(key[-1] is True for key in core.runner.graphs.graphs), "a step with draws on the device was captured"


def test_draws_on_the_device_equal_the_sampler() -> None:
    generator = torch.Generator().manual_seed(1)
    V = 1000
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.01}, {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 0.7, "top_k": 20}, {"temperature": 2.0, "top_k": 300}, {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 100.0, "top_p": 0.95}, {"temperature": 1.0, "top_k": 50, "top_p": 0.7, "min_p": 0.01},
    ]  # fmt: skip
    params = [SamplingParams(**kinds[i % len(kinds)]) for i in range(9 * 40)]
    logits = 3 * torch.randn(len(params), V, generator=generator)
    logits[::7] = logits[::7].round()  # equal probabilities
    logits[5, 3], logits[6, 4], logits[20] = float("nan"), float("inf"), float("-inf")
    logits[30, ::2] = float("-inf")
    rows = [Row(p, i, (5,) * (i % 50), 1) for i, p in enumerate(params)]
    told = torch.tensor([fields(p, i, i % 50) for i, p in enumerate(params)], dtype=torch.float64)
    got = draw(logits, told).tolist()
    redo = [i for i, token in enumerate(got) if token == REDO]
    assert {i % len(kinds) for i in redo} == {5, 7}, "only where the nucleus is wider than the candidates"
    for i, want in enumerate(sample(logits, rows)):
        assert got[i] == REDO or got[i] == (-1 if want.fault else want.token_id), (i, params[i])


def test_a_step_that_the_device_cannot_draw_is_drawn_by_the_host(model: Transformer) -> None:
    """300 tokens that are nearly equal: the nucleus has more than the device sorts."""
    wide = Transformer(model.cfg.replace(vocab_size=400)).eval()
    params = SamplingParams(temperature=2.0, top_p=0.95, seed=4, max_tokens=30, ignore_eos=True)
    asked = [Request("a", (5, 6, 7), params), Request("b", (8,), replace(params, temperature=0))]
    want = run(engine(wide), asked)
    for depth in (0, 1):
        core = engine(wide, True, speculation=depth)
        assert same_texts(wide, asked, run(core, asked), want)
        assert isinstance(core.runner, ModelRunner) and core.runner.graphs and core.runner.graphs.rest > 0


def test_drafting_goes_on_and_off(model: Transformer, requests: list[Request], plain: dict[str, list[int]]) -> None:
    core = engine(model, True, speculation=1)
    turns = iter(range(10**6))
    core.speculation.choose = lambda batch, fresh=False: next(turns) // 7 % 2  # type: ignore[method-assign]
    assert run(core, requests) == plain and core.stats.accepted > 0


def test_a_draft_that_is_no_number_leaves_nothing_behind(model: Transformer) -> None:
    """A draft whose embedding is NaN falls, and what it wrote is gone when its page has another owner."""
    network = Transformer(model.cfg).eval()
    network.load_state_dict(model.state_dict())
    prompt = tuple(range(2, 22))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    want = run(engine(network), [Request("a", prompt, params)])["a"]
    bad = next(t for t in range(2, VOCAB) if t not in {*prompt, *want})
    network.embed_tokens.weight.data[bad] = float("nan")
    for captured in (False, True):
        core = engine(network, captured, speculation=1, cache_tokens=128, max_model_len=128)
        assert isinstance(core.runner, ModelRunner)
        core.runner.draft = partial(_spoilt, core.runner.draft, bad)  # type: ignore[method-assign]
        for n in range(4):
            assert run(core, [Request(str(n), prompt, params)])[str(n)] == want
        assert core.stats.draft_tokens and core.runner.latents.isfinite().all()


def _spoilt(draft: Callable[..., Any], token: int, done: Any, depth: int) -> list[tuple[int, ...]]:
    """Drafts made as ever, and this token given instead."""
    return [(token,) for _ in draft(done, depth)]


def test_pieces_keep_the_order_and_the_bound() -> None:
    spans = [Span(list(range(n)), 10 * i, [i]) for i, n in enumerate((3, 7, 1, 12))]
    cut = list(pieces(spans, 5))
    assert all(sum(len(s.tokens) for s in piece) <= 5 for piece in cut)
    flat = [(s.pages[0], s.start + j, t) for piece in cut for s in piece for j, t in enumerate(s.tokens)]
    assert flat == [(i, 10 * i + j, j) for i, span in enumerate(spans) for j in range(len(span.tokens))]


# ---- deterministic ---------------------------------------------------------------------------------------------------


def fix_row_by_row(model: Transformer) -> None:
    """What `model.fixed` promises, for a CPU: every block and the head compute one row after another, with no more pages
    than the row has."""

    def by_row(work: Callable[..., Any]) -> Callable[..., Any]:
        def block(x: torch.Tensor, rope: Any, visible: Any, cache: Any) -> Any:
            assert cache.lengths_B is not None, "everything is in rows form"
            rows = []
            for n, length in enumerate(cache.lengths_B.tolist()):
                one = cache._replace(
                    page_table_BP=cache.page_table_BP[n : n + 1, : -(-length // 64)],
                    slots_BT=cache.slots_BT[n : n + 1],
                    lengths_B=cache.lengths_B[n : n + 1],
                )
                rows.append(work(x[n : n + 1], (rope[0][n : n + 1], rope[1][n : n + 1]), None, one)[0])
            return torch.cat(rows), None

        return block

    for block in [*model.layers, *(module.block for module in model.mtp)]:
        block.forward = by_row(block.forward)
    for module in model.mtp:
        project = module.eh_proj.forward
        module.eh_proj.forward = lambda x, project=project: torch.cat([project(row[None]) for row in x])
    head = model.head
    model.head = lambda h: torch.cat([head(row[None]) for row in h])  # type: ignore[method-assign]


@pytest.fixture
def fixed_model(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transformer]:
    monkeypatch.setattr("rorqual.engine.load.make_fixed", fix_row_by_row)
    network = Transformer(model.cfg).eval()
    network.load_state_dict(model.state_dict())
    yield network


def bits(core: EngineCore, requests: list[Request]) -> dict[str, list[Any]]:
    told = outputs(core, requests)
    return {id: [(p.token_id, p.logprob, p.top) for o in outs for p in o.logprobs] for id, outs in told.items()}


def test_deterministic_is_the_same_bits_alone_batched_chunked_and_drafted(
    fixed_model: Transformer, requests: list[Request]
) -> None:
    asked = [
        replace(r, prompt=r.prompt[: 68 - 20 * i], params=replace(r.params, logprobs=2, max_tokens=7))
        for i, r in enumerate(requests[1:4])
    ]
    single = engine(fixed_model, deterministic=True)
    assert single.info.deterministic
    alone = {r.id: bits(single, [r])[r.id] for r in asked}
    variants: list[dict[str, Any]] = [
        {"max_batched_tokens": 64},
        {"captured": True},
        {"speculation": 2, "captured": True, "prefix_cache": True},
        {"speculation": 1, "cache_tokens": 192, "max_model_len": 128},
    ]
    for settings in variants:
        fresh = Transformer(fixed_model.cfg).eval()
        fresh.load_state_dict(fixed_model.state_dict())
        core = engine(fresh, deterministic=True, **settings)
        assert isinstance(core.runner, ModelRunner)
        core.runner._at_once = lambda spans: 23  # type: ignore[method-assign]
        assert bits(core, asked) == alone, settings


# ---- memory ----------------------------------------------------------------------------------------------------------


def exhaust(core: EngineCore, which: set[int]) -> None:
    """The model's forwards of these numbers find no memory."""
    assert isinstance(core.runner, ModelRunner)
    hidden, count = core.runner.model.hidden, iter(range(10**9))

    def fail(*arguments: Any) -> Any:
        if next(count) in which:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return hidden(*arguments)

    core.runner.model = _Replaced(core.runner.model, fail)  # type: ignore[assignment]


class _Replaced:
    def __init__(self, model: Transformer, hidden: Callable[..., Any]) -> None:
        self._model, self.hidden = model, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@pytest.mark.parametrize("depth", [0, 1])
def test_memory_that_runs_out_shrinks_the_cache_and_loses_nothing(
    model: Transformer, requests: list[Request], plain: dict[str, list[int]], depth: int, caplog: Any
) -> None:
    core = engine(model, speculation=depth, cache_tokens=2048, prefix_cache=True)
    exhaust(core, {0, 9, 30})
    with caplog.at_level(logging.WARNING):
        assert run(core, requests) == plain
    assert core.info.cache_tokens == core.scheduler.pool.usable * 64 < 1024
    assert core.scheduler.max_batched_tokens == 512 and "shrunk" in caplog.text
    assert run(core, requests) == plain


def test_a_request_that_no_longer_fits_says_so_and_the_others_go_on(
    model: Transformer, requests: list[Request]
) -> None:
    core = engine(model, cache_tokens=576)
    exhaust(core, {3})
    long = Request("long", (5,) * 400, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    told = outputs(core, [requests[0], long])
    assert isinstance(told["long"][-1].error, CapacityError) and "memory" in str(told["long"][-1].error)
    assert told["0"][-1].error is None and sum(len(o.token_ids) for o in told["0"]) == 24
    with pytest.raises(CapacityError if core.info.max_model_len > 500 else Exception, match="tokens"):
        core.add(long)


def test_the_bookkeeping_survives_any_shrinking() -> None:
    """Without a model: pages that hold the tokens themselves show whatever would be mixed up."""

    def before(plan: Any) -> None:
        steps[0] += 1
        if steps[0] in (3, 4, 11, 40):
            raise OutOfMemory("told to")

    steps = [0]
    core, _ = make_core(60, before=before, draft_depth=2, max_model_len=60)
    sent = [fake_request(str(n), [7] * (3 * n) + [n + 2], max_tokens=20 + n, priority=n % 2) for n in range(8)]
    answers: dict[str, list[int]] = {r.id: [] for r in sent}
    for r in sent:
        core.add(r)
    while core.busy:
        for out in core.step():
            assert out.error is None
            answers[out.request_id] += out.token_ids
    assert answers == {r.id: expected(r, 60) for r in sent}
    assert core.scheduler.pool.usable < 30 and core.scheduler.pool.available == core.scheduler.pool.usable


def test_a_cache_that_cannot_shrink_fails_its_requests_and_goes_on() -> None:
    fails = [True]

    def before(plan: Any) -> None:
        if fails[0]:
            raise OutOfMemory("told to")

    core, runner = make_core(40, before=before)
    runner.shrink = lambda: 0  # type: ignore[method-assign]
    core.add(fake_request("a", [5], max_tokens=3))
    (out,) = core.step()
    assert out.error is not None and "memory" in str(out.error)
    fails[0] = False
    core.add(fake_request("b", [5], max_tokens=3))
    while core.busy:
        (out,) = core.step()
    assert out.error is None


class FakeMeter:
    """A device of 1,000 bytes, of which a step takes half a byte a token."""

    total = 1000

    def __init__(self) -> None:
        self.most = 0

    def begin(self) -> None:
        self.most = 0

    def peak(self) -> int:
        return self.most

    def free(self) -> int:
        return 900


def test_the_cache_gets_what_the_largest_step_leaves() -> None:
    meter = FakeMeter()

    def make(pages: int) -> Any:
        runner = make_core(pages, draft_depth=1)[1]

        def run(plan: Any, masks: Any) -> list[Any]:
            need = sum(len(s.tokens) for s in plan) // 2
            if need > limit:
                raise OutOfMemory("too much")
            meter.most = max(meter.most, need)
            return []

        runner.run = run  # type: ignore[method-assign]
        runner.draft = lambda done, depth: []  # type: ignore[method-assign, assignment]
        return runner

    limit = 10**6
    settings = EngineSettings("", max_num_seqs=4)
    assert measured_room(make, settings, 5000, 1200, meter) == (1200, 900 - 600 - 20)
    assert measured_room(make, settings, 101, 1200, meter) == (1200, 900 - 200 - 20), "four prompts of 100 tokens"
    limit = 400
    assert measured_room(make, settings, 5000, 1200, meter) == (600, 900 - 300 - 20)
    limit = 100
    with pytest.raises(ConfigError, match="does not fit"):
        measured_room(make, settings, 5000, 1200, meter)
