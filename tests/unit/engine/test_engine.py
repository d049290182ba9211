"""The whole core over a small random model: whatever the batch, the chunks, the cache or a preemption, the same tokens
as a loop of full forwards, up to ties within rounding (ties.py)."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import FinishReason, Output, Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.load import build_core
from rorqual.engine.settings import EngineSettings
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from tests.unit.engine.ties import NEAR, same_text, same_texts

VOCAB = 300


def tiny(q_lora_rank: int | None = None, **changes: object) -> Transformer:
    cfg = ModelConfig.load("test").replace(
        vocab_size=VOCAB, q_lora_rank=q_lora_rank, num_nextn_predict_layers=0, initializer_range=0.1, **changes
    )
    return Transformer(cfg).eval()


@pytest.fixture(scope="module", params=[None, 24], ids=["q_proj", "q_lora"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny(request.param)


def engine(model: Transformer, **settings: object) -> EngineCore:
    options = {"name": "tiny", "eos_token_ids": (1,), "fingerprint": b"test"}
    return build_core(model, EngineSettings("", **settings), **options)  # type: ignore[arg-type]


def prompt(n: int) -> tuple[int, ...]:
    return tuple(random.randrange(2, VOCAB) for _ in range(n))


def request(id: str, ids: Sequence[int], **params: object) -> Request:
    defaults = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 12}
    return Request(id, tuple(ids), SamplingParams(**{**defaults, **params}))  # type: ignore[arg-type]


def run(core: EngineCore, requests: Sequence[Request]) -> dict[str, list[int]]:
    return {id: [t for o in outputs for t in o.token_ids] for id, outputs in outputs_of(core, requests).items()}


def outputs_of(core: EngineCore, requests: Sequence[Request]) -> dict[str, list[Output]]:
    for req in requests:
        core.add(req)
    outputs: dict[str, list[Output]] = {}
    while core.busy:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
            assert output.error is None
    pool = core.scheduler.pool
    assert core.scheduler.idle and pool.available == pool.usable
    return outputs


def assert_greedy(model: Transformer, req: Request, answer: Sequence[int]) -> None:
    """Every token is the best one after those before it, by one full forward without a cache; of tokens that are equal
    within rounding, any."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*req.prompt, *answer]]))[0, len(req.prompt) - 1 : -1]
    short = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert len(answer) == req.params.max_tokens and short.max() < NEAR


def test_greedy_equals_full_forwards(model: Transformer) -> None:
    """Prompts of less than a page, exactly pages, and many; decoding across page borders."""
    requests = [request(str(n), prompt(n), max_tokens=30) for n in (1, 5, 63, 64, 65, 128, 200)]
    answers = run(engine(model), requests)
    for req in requests:
        assert_greedy(model, req, answers[req.id])


def test_alone_equals_batched_chunked_cached_and_preempted(model: Transformer) -> None:
    shared = prompt(130)
    requests = [
        request(str(n), (shared if n % 2 else ()) + prompt(random.randint(1, 150)), max_tokens=40) for n in range(6)
    ]
    core = engine(model, prefix_cache=False)
    alone = {req.id: run(core, [req])[req.id] for req in requests}
    assert same_texts(model, requests, run(engine(model), requests), alone)
    assert same_texts(model, requests, run(engine(model, max_batched_tokens=64), requests), alone)
    warm = engine(model)
    run(warm, requests)
    hits = outputs_of(warm, requests)
    again = {id: [t for o in outputs for t in o.token_ids] for id, outputs in hits.items()}
    assert same_texts(model, requests, again, alone)
    assert all(hits[r.id][0].cached_tokens == (len(r.prompt) - 1) // 64 * 64 for r in requests)
    for prefix_cache in (True, False):
        small = engine(model, cache_tokens=512, max_model_len=512, prefix_cache=prefix_cache)
        assert same_texts(model, requests, run(small, requests), alone)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_token_is_no_tie(model: Transformer, temperature: float) -> None:
    asked = request("a", prompt(20), temperature=temperature, seed=7)
    answer = run(engine(model), [asked])["a"]
    with torch.inference_mode():
        unlikely = int(model(torch.tensor([[*asked.prompt, *answer[:3]]]))[0, -1].argmin())
    assert same_text(model, asked, answer, answer)
    assert not same_text(model, asked, [*answer[:3], unlikely, *answer[4:]], answer)


def test_latents_from_disk_give_the_same_tokens(model: Transformer, tmp_path: Path) -> None:
    requests = [request(str(n), prompt(n), temperature=1.0, seed=n) for n in (70, 130, 200)]
    cold = engine(model, cache_dir=str(tmp_path))
    answers = run(cold, requests)
    cold.close()
    warm = engine(model, cache_dir=str(tmp_path))
    ends = {id: outputs[-1].stats for id, outputs in outputs_of(warm, requests).items()}
    assert {id: stats.disk_tokens for id, stats in ends.items() if stats} == {"70": 64, "130": 128, "200": 192}
    warm.close()
    again = engine(model, cache_dir=str(tmp_path))
    assert same_texts(model, requests, run(again, requests), answers)
    again.close()


def test_preemption_happens_and_changes_nothing(model: Transformer) -> None:
    requests = [request(str(n), prompt(60), max_tokens=100, temperature=1.0, seed=n) for n in range(4)]
    roomy = run(engine(model), requests)
    core = engine(model, cache_tokens=384, max_model_len=192, prefix_cache=False)
    for req in requests:
        core.add(req)
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    preempted = 0
    while core.busy:
        before = set(core.scheduler.running)
        for output in core.step():
            answers[output.request_id] += output.token_ids
        preempted += len(before & set(core.scheduler.waiting))
    assert preempted and same_texts(model, requests, answers, roomy)


def test_a_seed_gives_the_same_draws_in_every_batch(model: Transformer) -> None:
    ids = prompt(20)
    params = {"temperature": 1.0, "top_p": 0.9, "seed": random.getrandbits(64)}
    asked = request("a", ids, **params)
    alone = run(engine(model), [asked])["a"]
    mates = [request(str(n), prompt(random.randint(1, 90)), temperature=1.0) for n in range(5)]
    assert same_text(model, asked, run(engine(model), [*mates, asked])["a"], alone)
    others = run(engine(model), [request(str(n), ids, **{**params, "seed": n}) for n in range(8)])
    assert len({tuple(t) for t in others.values()}) > 1
    free = run(engine(model), [request(str(n), ids, temperature=1.0) for n in range(8)])
    assert len({tuple(t) for t in free.values()}) > 1


def test_logprobs_are_those_of_a_full_forward(model: Transformer) -> None:
    req = request("a", prompt(70), temperature=0.8, logprobs=4, max_tokens=8)
    outputs = outputs_of(engine(model), [req])["a"]
    answer = [t for o in outputs for t in o.token_ids]
    with torch.inference_mode():
        raw = model(torch.tensor([[*req.prompt, *answer]]))[0, len(req.prompt) - 1 : -1].log_softmax(-1)
    for at, lp in enumerate(lp for o in outputs for lp in o.logprobs):
        assert lp.token_id == answer[at] and len(lp.top) == 4
        assert lp.logprob == pytest.approx(raw[at, answer[at]].item(), abs=1e-4)
        assert [v for _, v in lp.top] == pytest.approx(raw[at].topk(4).values.tolist(), abs=1e-4)


def test_nan_fails_its_request_and_never_reaches_another() -> None:
    """One token's embedding is NaN: its requests fail, their pages and the scrap page are clean for the next."""
    model = tiny()
    sound = copy.deepcopy(model)
    good = [request(str(n), prompt(90)) for n in range(3)]
    before = run(engine(model), good)
    used = {t for r in good for t in (*r.prompt, *before[r.id])}
    bad = random.choice([t for t in range(2, VOCAB) if t not in used])
    with torch.no_grad():
        model.embed_tokens.weight[bad] = float("nan")
    core = engine(model, cache_tokens=640, max_model_len=300, max_batched_tokens=64)
    poisoned = request("bad", [*good[0].prompt[:70], bad, *prompt(90)])
    for req in (good[0], poisoned, good[1]):
        core.add(req)
    ends: dict[str, Output] = {}
    answers: dict[str, list[int]] = {r.id: [] for r in good}
    for round_ in range(2):
        while core.busy:
            for output in core.step():
                answers.get(output.request_id, []).extend(output.token_ids)
                if output.finish_reason:
                    ends[output.request_id] = output
        if round_ == 0:
            core.add(good[2])
    assert ends["bad"].finish_reason is FinishReason.ERROR
    assert all(ends[req.id].finish_reason is FinishReason.LENGTH for req in good)
    assert same_texts(sound, good, answers, before)
    assert core.scheduler.pool.available == core.scheduler.pool.usable


def test_sizes_are_checked_and_auto_is_bounded() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="max_model_len"):
        engine(model, max_model_len=513)
    with pytest.raises(ConfigError, match="cache"):
        engine(model, max_model_len=200, cache_tokens=64)
    assert engine(model, cache_tokens=100).info.max_model_len == 128
    info = engine(model, max_num_seqs=3).info
    assert info.max_model_len == 512 and info.cache_tokens == 3 * 512


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_batched_tokens", True),
        ("cache_tokens", "many"),
        ("speculation", -1),
        ("speculation", True),
        ("deterministic", "yes"),
        ("kernels", "cuda"),
        ("cache_disk_bytes", 0),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineSettings("m", **{name: value})  # type: ignore[arg-type]
