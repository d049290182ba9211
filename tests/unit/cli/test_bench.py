"""`rorqual bench load` on a tiny model: what it reports, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.cli.main import main
from rorqual.config import ModelConfig
from rorqual.model.transformer import Transformer


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
