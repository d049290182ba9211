"""Decoding on a GPU: captured graphs and the fused kernels against the same model computed plainly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.load import build_core
from rorqual.engine.settings import EngineSettings
from rorqual.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def core(model: Transformer, graphs: bool, **settings: object) -> EngineCore:
    made = build_core(model, EngineSettings("", device="cuda", **settings), name="m", eos_token_ids=(1,))
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
