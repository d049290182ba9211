"""Decoding on a GPU: captured graphs and the fused kernels against the same model computed plainly."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.load import build_core
from rorqual.engine.settings import EngineSettings
from rorqual.model.transformer import Transformer
from rorqual.ops.triton.overlap import overlapping

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def core(model: Transformer, graphs: bool, **settings: object) -> EngineCore:
    told = {"speculation": 0, **settings}
    made = build_core(model, EngineSettings("", device="cuda", **told), name="m", eos_token_ids=(1,))
    if not graphs:
        made.runner.graphs = None
    return made


def run(engine: EngineCore, requests: list[Request]) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    while engine.busy:
        for out in engine.step():
            assert out.error is None
            answers[out.request_id].extend(out.token_ids)
    return answers


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_graphs_give_the_tokens_of_the_plain_computation(q_lora_rank: int | None) -> None:
    torch.manual_seed(0)
    shape = replace(
        ModelConfig.load("test"), q_lora_rank=q_lora_rank, max_position_embeddings=1024, vocab_size=512, hidden_size=128,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    model = Transformer(shape, device="cuda")
    for name, tensor in model.named_parameters():
        if not name.endswith("norm.weight"):
            tensor.data.mul_(3)
    requests = [
        Request(str(i), tuple(torch.randint(2, 512, (n,)).tolist()), SamplingParams(temperature=0, max_tokens=90))
        for i, n in enumerate((3, 64, 200, 511, 17, 130))
    ]
    plain, captured = core(model, False), core(model, True)
    want = run(plain, requests)
    got = run(captured, requests)
    assert captured.runner.graphs.usable and captured.runner.graphs.graphs
    same = sum(a == b for i in want for a, b in zip(want[i], got[i], strict=False)) / sum(map(len, want.values()))
    assert same > 0.97, "fp32: only ties may differ"


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper card"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_that_overlap_give_the_same_bits(dtype: torch.dtype) -> None:
    """The same kernels in the same order: any difference is one that did not wait."""
    torch.manual_seed(0)
    model = Transformer(replace(ModelConfig.load("bench-cpu"), num_nextn_predict_layers=0), device="cuda", dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, logprobs=1)
    for rows in (1, 5):
        requests = [Request(str(i), tuple(range(2 + i, 90 + i)), params) for i in range(rows)]
        with overlapping(False):
            want = run(core(model, True), requests)
        for on in (True, True, None):
            with nullcontext() if on is None else overlapping(on):
                assert run(core(model, True), requests) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_prompts_give_the_bits_of_eager_ones(dtype: torch.dtype) -> None:
    """The same kernels over the same shapes; a prefix that is cached makes chunks that do not begin their sequence."""
    torch.manual_seed(0)
    model = Transformer(replace(ModelConfig.load("bench-cpu"), num_nextn_predict_layers=0), device="cuda", dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1)
    prompts = [tuple(torch.randint(2, 512, (n,)).tolist()) for n in (5, 8, 64, 300, 301, 900)]
    requests = [Request(str(i), p, params) for i, p in enumerate(prompts + [prompts[-1] + p for p in prompts[:3]])]
    settings = {"max_model_len": 2048, "max_batched_tokens": 512}
    eager, captured = (core(model, True, prompt_graphs=on, **settings) for on in (False, True))
    for _ in range(3):
        want = [run(eager, [r]) for r in requests]
        assert [run(captured, [r]) for r in requests] == want
        run(captured, requests)  # several at once: other shapes in between
    assert captured.runner.prompts.graphs


def test_sampling_and_logprobs_over_graphs() -> None:
    torch.manual_seed(1)
    model = Transformer(replace(ModelConfig.load("test"), num_nextn_predict_layers=0), device="cuda")
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=20, ignore_eos=True, logprobs=2)
    request = Request("a", (5, 6, 7), params)
    assert run(core(model, True), [request]) == run(core(model, False), [request])


def arriving(engine: EngineCore, requests: list[Request], aborted: str) -> dict[str, list[int]]:
    """One more request every few steps, one of them aborted on the way."""
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    waiting, steps = list(requests), 0
    while waiting or engine.busy:
        if waiting and steps % 3 == 0:
            engine.add(waiting.pop(0))
        if len(answers[aborted]) > 5:
            engine.abort(aborted)
        for out in engine.step():
            answers[out.request_id].extend(out.token_ids)
        steps += 1
    return answers


def test_steps_begun_ahead_change_nothing() -> None:
    """Arrivals, endings by length and by stop token, an abort, sampled mates, preemption in a small cache: every answer is
    what the request gets alone and plainly computed, up to ties."""
    torch.manual_seed(2)
    shape = replace(ModelConfig.load("test"), max_position_embeddings=512, vocab_size=128, num_nextn_predict_layers=0)
    model = Transformer(shape, device="cuda")
    requests = [
        Request(
            str(i),
            tuple(torch.randint(2, 128, (n,)).tolist()),
            SamplingParams(
                temperature=0.9 if i == 4 else 0,
                seed=i,
                max_tokens=40 + 13 * i,
                ignore_eos=True,
                stop_token_ids=(7,) if i in (2, 5) else (),
            ),
        )
        for i, n in enumerate((3, 64, 63, 128, 17, 130, 1, 191))
    ]
    plain = core(model, False, max_num_seqs=8)
    want = {request.id: run(plain, [request])[request.id] for request in requests}
    for cache_tokens in (4096, 448):
        engine = core(model, True, cache_tokens=cache_tokens, max_model_len=448)
        got = arriving(engine, requests, "3")
        assert engine.runner.graphs.usable
        assert engine.scheduler.pool.available == engine.scheduler.pool.usable, "nothing leaks"
        for i, tokens in want.items():
            same = sum(a == b for a, b in zip(tokens, got[i], strict=False))
            assert same >= 0.95 * (len(tokens) if i != "3" else len(got[i])), (cache_tokens, i, same, len(tokens))
        assert cache_tokens > 600 or engine.stats.preemptions


# ---- drafts ----------------------------------------------------------------------------------------------------------


def drafting_model(dtype: torch.dtype = torch.float32, vocab: int = 64, **changes: object) -> Transformer:
    """Random, but the token before counts most, for the head as for the MTP module: drafts are often right."""
    torch.manual_seed(3)
    shape = replace(ModelConfig.load("test"), vocab_size=vocab, max_position_embeddings=1024, **changes)
    model = Transformer(shape, dtype=dtype, device="cuda").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.endswith("norm.weight"):
                tensor.mul_(3)
        model.embed_tokens.weight.normal_()
        model.lm_head.weight.copy_(model.embed_tokens.weight.roll(1, 0))
        D = shape.hidden_size
        model.mtp[0].eh_proj.weight[:, :D] += 2 * torch.eye(D, dtype=dtype, device="cuda")
    return model


def mixed(lengths: tuple[int, ...], sampled: bool, **params: object) -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.3, "top_p": 0.9, "seed": 5},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 5, "seed": 9, "repetition_penalty": 1.2, "logprobs": 2},
    ]
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            str(i),
            tuple(torch.randint(2, 64, (n,), generator=generator).tolist()),
            SamplingParams(**{**kinds[i % 4 if sampled else 0], "max_tokens": 60, "ignore_eos": True, **params}),
        )
        for i, n in enumerate(lengths)
    ]


def alike(want: dict[str, list[int]], got: dict[str, list[int]]) -> float:
    return sum(a == b for i in want for a, b in zip(want[i], got[i], strict=True)) / sum(map(len, want.values()))


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "mixed"])
@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_over_graphs_give_the_tokens_without(depth: int, sampled: bool) -> None:
    model, requests = drafting_model(), mixed((5, 64, 65, 200, 3, 130, 333), sampled)
    plain = core(model, False)
    want = run(plain, requests)
    counts = []
    for graphs in (False, True):
        drafted = core(model, graphs, speculation=depth)
        assert alike(want, run(drafted, requests)) > 0.97, "fp32: only ties may differ"
        assert drafted.scheduler.pool.available == drafted.scheduler.pool.usable
        assert drafted.stats.steps < 0.9 * plain.stats.steps
        counts.append(drafted.stats.acceptance)
    assert any(key[0] == "drafts" for key in drafted.runner.graphs.graphs) and drafted.runner.graphs.usable
    assert counts[0] > 0.2 and abs(counts[0] - counts[1]) < 0.05, "captured steps draft as eager ones do"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("vocab", [64, 3000])
def test_the_device_draws_what_the_host_draws(depth: int, vocab: int) -> None:
    """With 3,000 tokens, candidates are chosen, and some nuclei are too wide for them."""
    model = drafting_model(vocab=vocab)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.5}, {"temperature": 0}, {"temperature": 0.9, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.05},
    ]  # fmt: skip
    requests = [
        replace(r, params=SamplingParams(**kinds[i % 4], seed=i, max_tokens=60, ignore_eos=True))
        for i, r in enumerate(mixed((5, 64, 65, 200, 3, 130, 333), False))
    ]
    host, device = (core(model, True, speculation=depth) for _ in range(2))
    host.runner.graphs.draws = False
    want = run(host, requests)
    assert alike(want, run(device, requests)) > 0.97
    assert not any(key[-1] is True for key in host.runner.graphs.graphs)
    assert device.runner.graphs.draws and any(key[-1] is True for key in device.runner.graphs.graphs)


def test_drafts_survive_arrivals_aborts_and_preemption() -> None:
    model, requests = drafting_model(), mixed((3, 64, 63, 128, 17, 130, 1, 191), True, max_tokens=150)
    plain = core(model, False)
    want = {request.id: run(plain, [request])[request.id] for request in requests}
    for cache_tokens, speculation in ((4096, 1), (448, 1), (448, 2), (4096, "auto")):
        engine = core(model, True, cache_tokens=cache_tokens, max_model_len=448, speculation=speculation)
        got = arriving(engine, requests, "3")
        assert engine.scheduler.pool.available == engine.scheduler.pool.usable, "nothing leaks"
        for i, tokens in want.items():
            same = sum(a == b for a, b in zip(tokens, got[i], strict=False))
            assert same >= 0.95 * (len(tokens) if i != "3" else len(got[i])), (cache_tokens, i, same)
        assert cache_tokens > 600 or engine.stats.preemptions


# ---- deterministic ---------------------------------------------------------------------------------------------------


def answers(engine: EngineCore, requests: list[Request]) -> dict[str, list[Any]]:
    for request in requests:
        engine.add(request)
    told: dict[str, list[Any]] = {r.id: [] for r in requests}
    while engine.busy:
        for out in engine.step():
            assert out.error is None
            told[out.request_id] += [(p.token_id, p.logprob, p.top) for p in out.logprobs]
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_deterministic_is_the_same_bits_in_every_batch(dtype: torch.dtype, q_lora_rank: int | None) -> None:
    requests = mixed((5, 64, 65, 200, 1, 130, 333, *range(20, 60)), True, logprobs=3, max_tokens=24)
    single = core(drafting_model(dtype, q_lora_rank=q_lora_rank), True, deterministic=True, prefix_cache=False)
    assert single.info.deterministic
    chosen = requests[:7]
    alone = {r.id: answers(single, [r])[r.id] for r in chosen}
    for graphs, settings in (
        (True, {}),
        (True, {"max_batched_tokens": 64, "max_num_seqs": 5}),
        (True, {"max_num_seqs": 47, "prefix_cache": True, "speculation": 1}),
        (False, {"max_batched_tokens": 192}),
        (True, {"cache_tokens": 640, "max_model_len": 448, "speculation": 2}),
    ):
        engine = core(
            drafting_model(dtype, q_lora_rank=q_lora_rank),
            graphs,
            **{"deterministic": True, "prefix_cache": False, **settings},
        )
        told = answers(engine, requests)
        assert {r.id: told[r.id] for r in chosen} == alone, settings


# ---- memory ----------------------------------------------------------------------------------------------------------


def leave(free: int) -> torch.Tensor:
    """A tensor that takes everything of the GPU but so many bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.empty(torch.cuda.mem_get_info()[0] - free, dtype=torch.uint8, device="cuda")


def test_the_measured_cache_leaves_room_for_the_largest_steps(caplog: pytest.LogCaptureFixture) -> None:
    """With 14 GB left, of which the reserve takes its share, the cache takes most and the largest traffic still fits."""
    shape = replace(
        ModelConfig.load("bench-gpu"), max_position_embeddings=32768, num_hidden_layers=6, num_nextn_predict_layers=1
    )
    model = Transformer(shape, dtype=torch.bfloat16, device="cuda").eval()
    ballast = leave(14 * 2**30)
    with caplog.at_level(logging.INFO):
        engine = core(model, True, max_num_seqs=128, speculation=1, prefix_cache=False)
    assert "largest step" in caplog.text
    tokens = engine.info.cache_tokens
    assert engine.runner.latents.nbytes > 2**30
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=4, ignore_eos=True, seed=1)
    long = [Request("long", (7,) * (engine.info.max_model_len - 8), params)]
    many = [Request(str(i), (i + 2,) * 120, params) for i in range(128)]
    assert all(len(t) == 4 for t in run(engine, long).values())
    assert all(len(t) == 4 for t in run(engine, many).values())
    assert engine.info.cache_tokens == tokens, "nothing had to shrink"
    del ballast, engine, model
    gc.collect()
    torch.cuda.empty_cache()


def exhausting(hidden: Callable[..., Any], which: set[int]) -> Callable[..., Any]:
    count = iter(range(10**9))

    def compute(*arguments: Any) -> Any:
        if next(count) in which:
            torch.empty(2**46, dtype=torch.uint8, device="cuda")  # raises what really running out raises
        return hidden(*arguments)

    return compute


@pytest.mark.parametrize("depth", [0, 1])
def test_memory_that_runs_out_costs_no_request(depth: int) -> None:
    model, requests = drafting_model(), mixed((5, 64, 65, 200, 3, 130, 333), True)
    want = run(core(model, False), requests)
    engine = core(model, True, cache_tokens=4096, speculation=depth)
    reserved = engine.runner.latents.nbytes
    model.hidden = exhausting(model.hidden, {0, 4, 9})  # type: ignore[method-assign]
    assert alike(want, run(engine, requests)) > 0.97
    assert engine.info.cache_tokens < 4096 and engine.runner.latents.nbytes < 0.8 * reserved
    assert engine.scheduler.pool.available == engine.scheduler.pool.usable
    assert alike(want, run(engine, requests)) > 0.97
