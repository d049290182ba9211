"""`rorqual bench` on a tiny model: what it reports, not how fast anything is."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.cli import serving
from rorqual.cli.benchmarks import Weights, peer_model
from rorqual.cli.main import main
from rorqual.config import DEFAULT_MODEL, ModelConfig, resolve_model
from rorqual.engine.api import Output
from rorqual.engine.core import EngineCore
from rorqual.engine.scheduler import Job, Scheduler
from rorqual.errors import BackendUnavailable
from rorqual.model.transformer import Transformer
from rorqual.train import hardware


@pytest.mark.parametrize("from_disk", [False, True], ids=["preset", "directory"])
def test_loading_is_compared_with_reading(
    from_disk: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "test"
    if from_disk:
        model = str(tmp_path / "model")
        save_model(Transformer(ModelConfig.load("test"), dtype=torch.bfloat16), model, max_shard_bytes=200_000)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["bench", "load", "--model", model, "--rounds", "1", "--json", str(tmp_path / "load.json")])
    assert not end.value.code
    result = json.loads((tmp_path / "load.json").read_text())
    assert set(result) == {"kind", "model", "tensors", "bytes", "rounds", "rows", "seconds", "environment"}
    assert result["kind"] == "load" and result["model"] == model and result["tensors"] == 127
    assert 600_000 < result["bytes"] < 800_000
    rows = {row.pop("what"): row for row in result["rows"]}
    assert list(rows) == ["read", "map", "load_model"]
    for row in rows.values():
        assert {"warm_s", "warm_ratio"} <= set(row) and all(value > 0 for value in row.values())
    assert rows["load_model"]["warm_ratio"] == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("warm_ratio", "load_model", result["environment"]["commit"]))


def test_a_bundled_model_is_measured_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever the command is given."""
    monkeypatch.chdir(tmp_path)
    weights = Weights(DEFAULT_MODEL)
    assert weights.preset is None and weights.path == resolve_model() and weights.cfg == ModelConfig.load(weights.path)
    (tmp_path / DEFAULT_MODEL).mkdir()  # a directory of that name comes first, as everywhere
    save_model(Transformer(ModelConfig.load("test")), tmp_path / DEFAULT_MODEL)
    assert Weights(DEFAULT_MODEL).cfg.hidden_size == ModelConfig.load("test").hidden_size


def test_training_in_two_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "train.json"
    few = ["--model", "test", "--num-layers", "1", "--batch", "2", "--seq-len", "8", "--rounds", "1", "--no-peer"]
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", *few, "--precision", "fp32", "--precision", "fp8", "--json", str(file)])
    assert not end.value.code
    result = json.loads(file.read_text())
    assert result["kind"] == "train" and result["layers"] == 1 and result["bound_tokens_per_s"] > 0
    engines = result["engines"]
    assert list(engines) == ["rorqual fp32", "rorqual fp8"] and engines["rorqual fp32"]["ratio"] == 1
    assert all(e["tokens_per_s"] > 0 and e["of_bound"] > 0 and len(e["runs"]) == 1 for e in engines.values())
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", *few, "--precision", "int3"])
    assert end.value.code


def test_single_layers_in_bf16_and_fp8(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", "--layers", "test", "--batch", "1", "--seq-len", "8", "--json", str(file)])
    assert not end.value.code
    rows = json.loads(file.read_text())["rows"]
    assert [(row["layer"], row["precision"]) for row in rows] == [
        (layer, precision) for layer in ("dense", "moe") for precision in ("bf16", "fp8")
    ]
    assert all(row["microseconds"] > 0 and row["bf16 / this"] > 0 for row in rows)


def test_single_products_and_quantising(tmp_path: Path) -> None:
    code, result = bench(tmp_path, "train", "--products", "test", "--batch", "1", "--seq-len", "16")
    products = [row for row in result["rows"] if "product" in row]
    assert code == 0 and result["tokens"] == 16 and {row["way"] for row in products} == {"bf16", "expanded"}
    assert all(row["microseconds"] > 0 and row["bf16 / this"] > 0 for row in products)
    assert all(0 < row["error"] < 4e-3 for row in products)  # the result's rounding to bf16
    assert all(row["GB/s"] > 0 for row in result["rows"] if "product" not in row)


def test_a_way_of_multiplying_is_named_after_a_slash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--model", "test", "--batch", "1", "--seq-len", "8", "--rounds", "1", "--no-peer")
    code, result = bench(tmp_path, "train", *few, "--precision", "fp8/reference", "--precision", "fp8")
    assert code == 0 and list(result["engines"]) == ["rorqual fp8/reference", "rorqual fp8"]
    for wrong in ("bf16/triton", "fp8/", "fp8/cublas", "int3"):
        with pytest.raises(SystemExit) as end:
            main(["bench", "train", *few, "--precision", wrong])
        assert end.value.code
    assert "choose from" in capsys.readouterr().err
    for both in (("--products", "test", "--precision", "fp8"), ("--products", "test", "--layers", "test")):
        with pytest.raises(SystemExit) as end:
            main(["bench", "train", *both])
        assert end.value.code and "--products" in capsys.readouterr().err


def bench(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments, "--json", str(tmp_path / "out.json")])
    return int(end.value.code or 0), json.loads((tmp_path / "out.json").read_text())


def test_memory_is_told_only_where_it_is_counted(tmp_path: Path) -> None:
    few = ("--model", "test", "--batch", "1", "--seq-len", "8", "--rounds", "1", "--no-peer")
    code, result = bench(tmp_path, "train", *few)
    assert code == 0 and "peak GiB" not in result["engines"]["rorqual"]


def test_what_deterministic_costs_is_measured_in_the_same_run(tmp_path: Path) -> None:
    few = (
        "--model",
        "test",
        "--prompt",
        "8",
        "--new",
        "3",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--no-peer",
        "--no-llama",
    )
    code, result = bench(tmp_path, "decode", *few, "--deterministic")
    assert code == 0 and list(result["engines"]) == ["rorqual", "rorqual deterministic"]
    assert all(len(engine["runs"]) == 2 for engine in result["engines"].values())


def test_a_peer_that_cannot_load_the_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackendUnavailable, match=r"transformers cannot load .*--no-peer"):
        peer_model(ModelConfig.load("test"), torch.float32, "cpu", str(tmp_path))


def test_serving_counts_whole_rounds(tmp_path: Path) -> None:
    few = ("serve", "--model", "test", "--requests", "3", "--rounds", "2", "--threads", "1", "--no-llama")
    code, result = bench(tmp_path, *few)
    (row,) = result["rows"]
    assert code == 0 and result["rounds"] == 2 and row["tokens/s"] > 0 and "tokens/s when new" not in row


def test_serving_within_a_time_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["bench", "serve", "--model", "test", "--requests", "20", "--threads", "1", "--no-llama"]
    with pytest.raises(SystemExit) as end:
        main([*few, "--seconds", "0.000001", "--json", str(tmp_path / "out.json")])
    assert end.value.code == 1 and not (tmp_path / "out.json").exists()
    assert "raise --seconds" in capsys.readouterr().err


def test_requests_that_come_a_second_time_are_those_that_count() -> None:
    # Seconds of each pass; in the third round the second engine has no second one.
    clocks = {"rorqual": iter([4.0, 1.0, 4.0, 2.0, 4.0, 1.0]), "another": iter([5.0, 2.0, 5.0, 2.0, 5.0])}

    def serve(name: str, seed: int, until: float) -> serving.Served | None:
        seconds = next(clocks[name], None)
        return seconds and serving.Served(seconds, None, 100, 10, 5, [0.1, 0.2], [0.01, 0.02])  # type: ignore[return-value]

    said: list[str] = []
    (row, other), count = serving.rounds({name: partial(serve, name) for name in clocks}, 3, 60, True, said.append)
    assert count == 2 and row["tokens/s"] == 75 and row["tokens/s when new"] == 25
    assert list(other) == list(row) and other["tokens/s when new"] == 20
    assert "25 when its shapes were new" in said[0] and "cut short" in said[5]


def test_a_slow_moment_does_not_lower_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [0.0], iter([0.5] * 9)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        now[0] += next(spent, 0.01)
        return a

    monkeypatch.setattr(hardware.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hardware.torch, "mm", product)
    assert hardware.peak_flops(torch.device("cpu"))[0] == pytest.approx(2 * 1024**3 / 0.01)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_profile_sums_what_a_step_computes(kind: str, tmp_path: Path) -> None:
    asked = ("--model", "test", "--device", "cpu", "--batch", "3", "--prompt", "40", "--steps", "2")
    code, result = bench(tmp_path, "profile", "--kind", kind, *asked)
    assert code == 0 and result["kind"] == f"profile {kind}"
    rows = {row["kernel"]: row for row in result["rows"]}
    layers = ModelConfig.load("test").num_hidden_layers
    assert rows["aten::mm"]["calls / step"] >= 4 * layers, "a layer has at least four products"
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["us / step"] for row in rows.values()) == pytest.approx(result["kernels_us"])
    assert result["wall_us"] > 0


def test_a_soak_accounts_for_everything(tmp_path: Path) -> None:
    code, result = bench(
        tmp_path,
        "soak",
        "--model",
        "test",
        "--minutes",
        "0.15",
        "--rate",
        "30",
        "--threads",
        "1",
        "--cache-tokens",
        "600",
    )
    assert code == 0 and result["faults"] == [] and result["kind"] == "traffic soak"
    assert sum(result["finish_reasons"].values()) == result["requests"] > 150
    assert result["finish_reasons"]["abort"] > 0 and result["preemptions"] > 0 and result["cache_hit_tokens"] > 0
    assert [row["leaked pages"] for row in result["rows"]] == [0] * 5


def test_a_soak_finds_what_is_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page that does not come back, a request that ends twice, an error: each is told, and the command fails."""
    remove, end = Scheduler.remove, EngineCore.step
    seen: list[Output] = []

    def leak(self: Scheduler, job: Job) -> None:
        job.pages[:1] = [] if job.arrival == 3 else job.pages[:1]
        remove(self, job)

    def twice(self: EngineCore) -> list[Output]:
        outputs = end(self)
        if not seen and any(out.finish_reason for out in outputs):
            seen.append(next(out for out in outputs if out.finish_reason))
            outputs.append(replace(seen[0], error=RuntimeError("told to")))
        return outputs

    monkeypatch.setattr(Scheduler, "remove", leak)
    monkeypatch.setattr(EngineCore, "step", twice)
    code, result = bench(tmp_path, "soak", "--model", "test", "--minutes", "0.02", "--rate", "20", "--threads", "1")
    assert code == 1
    for word in ("ended 2 times", "told to", "pages leaked"):
        assert any(word in fault for fault in result["faults"]), word
