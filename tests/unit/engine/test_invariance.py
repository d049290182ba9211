"""The contract of the CPU kernels: what a request gets does not depend on anything but itself.

One set of requests (greedy and sampled, with log-probabilities) is answered alone, and then in batches, in other
chunks, with warm and disk caches, with drafts and without, and with so small a cache that some are preempted. Tokens
must be equal and log-probabilities equal bit for bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.engine.api import Output, Request, SamplingParams
from rorqual.engine.core import EngineCore
from rorqual.engine.load import build_core, load_core
from rorqual.engine.settings import EngineSettings
from rorqual.errors import BackendUnavailable, ConfigError
from rorqual.model.transformer import Transformer
from rorqual.ops.native import build

if build.compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

SHAPE = replace(ModelConfig.load("test"), vocab_size=64, max_position_embeddings=1024)
Answer = tuple[list[int], list[tuple[float, tuple[tuple[int, float], ...]]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with an MTP module, sharp enough that drafts are right now and then."""
    torch.manual_seed(3)
    network = Transformer(SHAPE)
    for name, tensor in network.named_parameters():
        if not name.endswith("norm.weight"):
            tensor.data.mul_(2)
    path = tmp_path_factory.mktemp("invariance") / "model"
    save_model(network, path)
    return path


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 64, (n,), generator=generator).tolist())

    shared = tokens(200)
    prompts = [
        *(tokens(5), tokens(64), tokens(65), shared),
        *((*shared[:130], *tokens(40)), (*shared, *tokens(90)), tokens(333)),
    ]
    sampled = {"temperature": 0.7, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 9}
    params = [
        SamplingParams(temperature=0, max_tokens=70, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=1.3, top_p=0.9, seed=5, max_tokens=50, ignore_eos=True, logprobs=0),
        SamplingParams(**sampled, max_tokens=40, ignore_eos=True, logprobs=2),
    ]
    return [Request(str(i), prompt, params[i % 3]) for i, prompt in enumerate(prompts)]


def make(model: Path, **settings: object) -> EngineCore:
    told = {"threads": 1, "speculation": 0, "prefix_cache": False, "kernels": "native", **settings}
    return load_core(EngineSettings(str(model), **told))


def run(core: EngineCore, requests: list[Request]) -> tuple[dict[str, Answer], dict[str, Output]]:
    for request in requests:
        core.add(request)
    answers: dict[str, Answer] = {r.id: ([], []) for r in requests}
    last: dict[str, Output] = {}
    while core.busy:
        for out in core.step():
            assert out.error is None
            answers[out.request_id][0].extend(out.token_ids)
            answers[out.request_id][1].extend((p.logprob, p.top) for p in out.logprobs)
            last[out.request_id] = out
    return answers, last


@pytest.fixture(scope="module")
def alone(model: Path, requests: list[Request]) -> dict[str, Answer]:
    core = make(model)
    return {r.id: run(core, [r])[0][r.id] for r in requests}


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_batched_tokens": 64},
        {"max_batched_tokens": 192, "max_num_seqs": 3},
        {"threads": 2},
        {"prefix_cache": True},
        {"speculation": 1},
        {"speculation": 3, "prefix_cache": True, "max_batched_tokens": 128},
    ],
    ids=str,
)
def test_batch_chunks_cache_and_drafts_change_nothing(
    model: Path, requests: list[Request], alone: dict[str, Answer], settings: dict[str, object], kind: str
) -> None:
    if kind != "float32":
        single = make(model, dtype=kind)
        alone = {r.id: run(single, [r])[0][r.id] for r in requests}
    core = make(model, dtype=kind, **settings)
    assert run(core, requests)[0] == alone
    again, last = run(core, requests[::-1])  # warm, and in another order
    assert again == alone
    if settings.get("prefix_cache"):
        assert any(out.cached_tokens for out in last.values())
    if settings.get("speculation"):
        assert core.stats.accepted > 0 and core.stats.draft_tokens > core.stats.accepted


def test_preemption_changes_nothing(model: Path, requests: list[Request], alone: dict[str, Answer]) -> None:
    for speculation in (0, 1):
        core = make(model, cache_tokens=512, max_model_len=448, speculation=speculation)
        answers, last = run(core, requests)
        assert answers == alone
        assert sum(out.stats.preemptions for out in last.values() if out.stats) > 0


def test_a_disk_cache_changes_nothing_and_survives_a_restart(
    model: Path, requests: list[Request], alone: dict[str, Answer], tmp_path: Path
) -> None:
    first = make(model, prefix_cache=True, cache_dir=str(tmp_path))
    assert run(first, requests)[0] == alone
    first.close()
    second = make(model, prefix_cache=True, cache_dir=str(tmp_path))
    answers, last = run(second, requests)
    assert answers == alone
    assert sum(out.stats.disk_tokens for out in last.values() if out.stats) > 0
    second.close()


def test_other_weights_of_the_same_shape_do_not_find_the_cache(
    model: Path, requests: list[Request], tmp_path: Path
) -> None:
    first = make(model, prefix_cache=True, cache_dir=str(tmp_path / "cache"))
    run(first, requests)
    first.close()
    torch.manual_seed(4)
    save_model(
        Transformer(replace(ModelConfig.load("test"), vocab_size=64, max_position_embeddings=1024)), tmp_path / "model"
    )
    second = make(tmp_path / "model", prefix_cache=True, cache_dir=str(tmp_path / "cache"))
    _, last = run(second, requests)
    assert sum(out.stats.disk_tokens for out in last.values() if out.stats) == 0
    second.close()


def test_another_config_or_storage_does_not_find_the_cache(
    model: Path, requests: list[Request], tmp_path: Path
) -> None:
    first = make(model, prefix_cache=True, cache_dir=str(tmp_path / "cache"))
    run(first, requests)
    first.close()
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    for path, dtype in ((tmp_path / "model", "auto"), (model, "bfloat16")):
        other = make(path, dtype=dtype, prefix_cache=True, cache_dir=str(tmp_path / "cache"))
        _, last = run(other, requests)
        assert sum(out.stats.disk_tokens for out in last.values() if out.stats) == 0
        other.close()


def test_a_model_in_memory_keeps_no_cache_on_disk_and_promises_no_bits(tmp_path: Path) -> None:
    network = Transformer(SHAPE)
    for refused, error in (({"cache_dir": str(tmp_path)}, ConfigError), ({"deterministic": True}, BackendUnavailable)):
        with pytest.raises(error):
            build_core(network, EngineSettings("", **refused), name="in memory", eos_token_ids=(1,))
