"""`rorqual inspect` beyond the counts: storage, operations, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rorqual.cli.inspect import report
from rorqual.cli.main import main
from rorqual.config import ModelConfig
from rorqual.plan.picture import draw


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["inspect", *words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(scope="module")
def nano() -> dict[str, Any]:
    return report("nano", 1000)


def test_the_facts_hold_together(nano: dict[str, Any]) -> None:
    flops, sizes = nano["flops_per_token"], nano["stored_bytes"]
    assert flops["forward"] == flops["forward_weights"] + flops["forward_attention"]
    assert flops["decode"] == flops["forward_weights"] + flops["decode_attention"]
    assert flops["context"] == 1000 and flops["training"] > 3 * flops["forward"]
    assert list(sizes) == ["fp32", "bf16", "fp8", "int8", "int4"]
    assert sizes["fp32"] == 4 * nano["parameters"]["with_mtp"] == nano["weight_bytes"]["fp32"]
    biases = 12 * 8  # experts x (MoE layers + module), which stay fp32
    assert sizes["bf16"] == nano["weight_bytes"]["bf16"] + 2 * biases
    assert nano["quantization_config"] is None
    assert set(nano["fp8_release"]) == {"tensors", "bytes"} and nano["fp8_release"]["bytes"] > sizes["fp8"]


def test_the_release_of_deepseek_v3_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """In words and as JSON, the quantisation of its config.json included."""
    code, out, _ = run("deepseek-v3", capsys=capsys)
    assert code == 0
    for part in ("91,991 tensors", "688,574,839,360 bytes", "40,016 in FP8", "quant_method fp8", "128x128", "absorbed"):
        assert part in out, part
    code, out, _ = run("deepseek-v3.1", "--json", capsys=capsys)
    facts = json.loads(out)
    assert facts["quantization_config"]["scale_fmt"] == "ue8m0"
    assert facts["fp8_release"] == {"tensors": 91_991, "bytes": 688_574_839_360}
    assert facts["fp8_cache_bytes_per_token"] == 40_016


def test_the_picture_is_written_beside_the_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nano.svg"
    code, out, _ = run("nano", "--json", "--svg", str(file), capsys=capsys)
    assert code == 0 and json.loads(out)["layers"] == 8
    assert file.read_text(encoding="utf-8") == draw(ModelConfig.load("nano"), "nano")
    ElementTree.parse(file)


def test_a_directory_lends_the_picture_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ModelConfig.load("test").to_json()))
    code, _, _ = run(f"{folder}/", "--svg", str(tmp_path / "a.svg"), capsys=capsys)
    assert code == 0 and ">my-model</text>" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("test", "--svg", str(tmp_path / "none" / "a.svg"), capsys=capsys)
    assert code == 1 and not out and "cannot write" in err and "a.svg" in err and len(err.strip().splitlines()) == 1
