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
