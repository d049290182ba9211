"""Two GPUs as replicas follow one: `pytest tests/gpu/test_replicas.py` on a host that has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.train.record import read_metrics
from tests.unit.train.conftest import make_corpus

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_corpus(tmp_path_factory.mktemp("corpus"))
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(ModelConfig.load("test").replace(vocab_size=384).to_json()))
    return root


def curve(corpus: Path, out: Path, replicas: int, graph: bool) -> list[dict[str, float]]:
    file = out.with_suffix(".toml")
    file.write_text(
        f"out = '{out}'\nmodel = '{corpus}/model'\nsteps = 30\nbatch = 16\nmicro_batch = 4\ngraph = {str(graph).lower()}\n"
        f"eval_every = 10\nreport = false\n[data]\nseq_len = 128\n[[data.train]]\npath = '{corpus}/shards/train'\n"
        f"[[data.val]]\npath = '{corpus}/shards/val'\n[optim]\nwarmup_steps = 5\nmoments = 'bfloat16'\n[ema]\ndecay = 0.9\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(replicas)]
    done = subprocess.run([*launcher, "-m", "rorqual", "train", str(file)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "captured"])
def test_two_follow_one(corpus: Path, tmp_path: Path, graph: bool) -> None:
    """The first step but for the order of additions; later ones as closely as a GPU repeats itself."""
    one, two = (curve(corpus, tmp_path / str(replicas), replicas, graph) for replicas in (1, 2))
    for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
        assert one[0][key] == pytest.approx(two[0][key], rel=1e-4), key
    for x, y in zip(one, two, strict=True):
        assert all(
            x[key] == pytest.approx(y[key], rel=1e-2) for key in ("loss", "val_loss", "val_loss_ema") if key in x
        )
    assert one[-1]["loss"] < 0.95 * one[0]["loss"]
