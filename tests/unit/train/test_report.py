"""What a run shows afterwards, and how sources are mixed."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rorqual.config import load_toml
from rorqual.errors import BackendUnavailable, ConfigError
from rorqual.train import report
from rorqual.train.config import RunConfig, Source
from rorqual.train.pretrain import mixture, model_config, open_rows, pretrain, resolve
from rorqual.train.record import read_metrics
from rorqual.train.schedule import Timeline


def test_a_run_leaves_a_page_with_its_curves_and_its_experts(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    record = pretrain(
        load_toml(RunConfig, run_file(steps=40, eval_every=20, report=True), ["ema.decay=0.5"]), say=said.append
    )
    run = record.directory
    lines = read_metrics(run / "metrics.jsonl")
    assert all(line["eta_s"] >= 0 and line["memory_bytes"] > 0 and line["mfu"] > 0 for line in lines)
    assert lines[-1]["eta_s"] == 0 and lines[-1]["val_loss_ema"] != lines[-1]["val_loss"]
    assert (run / "model-ema" / "config.json").is_file()
    loads = read_metrics(run / "expert_load.jsonl")
    assert [line["step"] for line in loads] == [10, 20, 30, 40]
    assert np.array(loads[0]["loads"]).sum(1).tolist() == [4 * 32 * 2] * 2  # one routed layer and the MTP module
    page = (run / "report.html").read_text()
    assert f"curves and expert loads: {run / 'report.html'}" in said
    for words in ("<h2>Curves</h2>", "<h2>Schedules</h2>", "<h2>Load of the experts</h2>", f"{lines[-1]['loss']:.4f}"):
        assert words in page
    for picture in page.split("<svg")[1:]:
        ET.fromstring("<svg" + picture[: picture.index("</svg>") + 6])
    assert page.count("<svg") == 3 and "src=" not in page and "<script" not in page and "<link" not in page


def test_loads_are_relative_to_the_mean_of_their_layer() -> None:
    lines = [{"step": s, "loads": [[8, 0, 2, 2], [3, 3, 3, 3]]} for s in range(1000)]
    heat = report.relative_loads(lines)
    assert heat.shape == (2, 4, report.COLUMNS)
    assert np.allclose(heat[0, :, 0], [8 / 3, 0, 2 / 3, 2 / 3]) and np.allclose(heat[1], 1)
    assert report.smoothed([5.0] * 4) == pytest.approx([5.0] * 4)
    assert report.smoothed([1.0, 0.0])[1] == pytest.approx(0.09 / 0.19)


def test_a_page_of_a_run_without_a_number_is_written_all_the_same(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = pretrain(load_toml(RunConfig, run_file())).directory
    lines = read_metrics(run / "metrics.jsonl")
    lines[-1] |= {"loss": None, "skipped": True}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.write(run)
    assert page is not None and "not a number" in page.read_text()
    assert report.write(tmp_path) is None


def test_epochs_are_what_the_sources_get(run_file, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Three epochs of one source and the rest of another, by the rows that a run draws."""
    val, train = (f"{corpus}/shards/{split}" for split in ("val", "train"))
    cfg = resolve(load_toml(RunConfig, run_file(steps=20000)), kind="pretrain", cuda=False, cores=1)
    budget = Timeline(cfg).total_tokens
    view = open_rows(cfg, model_config(cfg), (Source(val, epochs=3.0), Source(train)), budget)
    seen = view.epochs_seen(budget // cfg.data.seq_len)
    assert seen[0] == pytest.approx(3.0, rel=0.02)


def test_mixtures_by_weight_size_and_epochs() -> None:
    a, b, c = Source("a", epochs=2.0), Source("b", 3.0), Source("c", 1.0)
    assert mixture([a, b, c], [100, 10, 10], 1000) == pytest.approx([0.2, 0.6, 0.2])
    assert mixture([a, Source("b"), Source("c")], [100, 30, 10], 1000) == pytest.approx([0.2, 0.6, 0.2])
    assert mixture([b, c], [1, 1], 10) == [3.0, 1.0] and mixture([Source("x"), Source("y")], [1, 1], 10) is None
    with pytest.raises(ConfigError, match=r"200 tokens of a budget of 1,000.*set tokens=200"):
        mixture([a], [100], 1000)
    with pytest.raises(ConfigError, match="fewer epochs"):
        mixture([a, b], [600, 1], 1000)
    with pytest.raises(ConfigError, match="a weight, or none"):
        mixture([b, Source("x")], [1, 1], 10)
    with pytest.raises(ConfigError, match=r"data\.val"):
        mixture([a], [1], None)
    with pytest.raises(ConfigError, match="not both"):
        Source("x", 1.0, 1.0)


def test_a_dashboard_gets_every_step(run_file, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Against a stand-in with trackio's names; where it is not installed, one line says so before anything is trained."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(BackendUnavailable, match="pip install trackio"):
        pretrain(load_toml(RunConfig, run_file(dashboard="trackio")))
    seen: dict[str, list[object]] = {"init": [], "log": [], "finish": []}
    stand_in = ModuleType("trackio")
    stand_in.init = lambda **told: seen["init"].append(told)  # type: ignore[attr-defined]
    stand_in.log = lambda values, step: seen["log"].append((step, values))  # type: ignore[attr-defined]
    stand_in.finish = lambda: seen["finish"].append(None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    pretrain(load_toml(RunConfig, run_file(dashboard="trackio")))
    (told,) = seen["init"]
    assert (
        isinstance(told, dict) and told["name"] == "run" and told["resume"] == "allow" and told["config"]["batch"] == 4
    )
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in seen["log"]] == [line["step"] for line in lines]  # type: ignore[misc]
    assert all(values["loss"] == line["loss"] for (_, values), line in zip(seen["log"], lines, strict=True))  # type: ignore[misc, index]
    assert len(seen["finish"]) == 1
