"""What may go wrong in a run: jumps of the loss, signals, a full disk, no memory, damaged data."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rorqual.config import load_toml
from rorqual.errors import DataError, TrainingError
from rorqual.train import checkpoints, trainer
from rorqual.train import pretrain as module
from rorqual.train.config import GuardConfig, RunConfig
from rorqual.train.guard import Guard
from rorqual.train.loss import Losses
from rorqual.train.pretrain import model_config, open_rows, pretrain, resolve
from rorqual.train.record import read_metrics

from .test_run import metrics, same


def poison(monkeypatch: pytest.MonkeyPatch, cfg: RunConfig, steps: set[int], factor: float) -> None:
    """The loss of the rows that belong to these steps (from 0) is multiplied, whenever they come."""
    plain = trainer.losses
    cfg = resolve(cfg, kind="pretrain", cuda=False, cores=1)
    view = open_rows(cfg, model_config(cfg), cfg.data.train)
    bad = [torch.from_numpy(view.rows(s * cfg.batch, cfg.batch).tokens) for s in steps]

    def losses(model, rows, *args, **options):  # type: ignore[no-untyped-def]
        out: Losses = plain(model, rows, *args, **options)
        hit = any(torch.equal(rows.tokens, b) for b in bad)
        return out._replace(lm=out.lm * factor) if hit else out

    monkeypatch.setattr(trainer, "losses", losses)


def test_a_step_without_a_number_changes_nothing(run_file, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cfg = load_toml(RunConfig, run_file(checkpoint_every=1, keep_checkpoints=20))
    poison(monkeypatch, cfg, {4}, float("nan"))
    said: list[str] = []
    pretrain(cfg, say=said.append)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("skipped", False) for line in lines] == [False] * 4 + [True] + [False] * 3
    assert lines[4]["loss"] is None and all(math.isfinite(line["loss"]) for line in lines if line["step"] != 5)
    where = tmp_path / "run" / "checkpoints"
    assert same(where / "step-4", where / "step-5") and not same(where / "step-5", where / "step-6")
    assert any("step 5 is not applied: its loss is nan" in line for line in said)


def test_rewinding_is_as_if_the_rows_had_never_been(run_file, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Back to step 3, on with the rows after step 5: the same as a run told from the start to pass over those rows."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "guard.json").write_text(json.dumps({"rewinds": [{"from_step": 3, "rows": 8}]}))
    pretrain(load_toml(RunConfig, run_file("other")))
    cfg = load_toml(RunConfig, run_file(), ["guard.policy='rewind'"])
    poison(monkeypatch, cfg, {4}, float("nan"))
    pretrain(cfg)
    assert json.loads((tmp_path / "run" / "guard.json").read_text()) == json.loads((other / "guard.json").read_text())
    assert metrics(tmp_path / "run") == metrics(other)
    assert same(tmp_path / "run" / "model", other / "model")


def test_a_run_that_only_jumps_is_ended(run_file, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cfg = load_toml(RunConfig, run_file(steps=20), ["guard.in_a_row=3"])
    poison(monkeypatch, cfg, set(range(2, 20)), float("inf"))
    with pytest.raises(TrainingError, match=r"4 steps in a row were refused.*lower optim.lr"):
        pretrain(cfg)
    cfg = load_toml(RunConfig, run_file("back", steps=20), ["guard.policy='rewind'", "guard.rewinds=2"])
    with pytest.raises(TrainingError, match="after 2 rewinds"):
        pretrain(cfg)


def test_the_guard_tells_a_jump_from_noise() -> None:
    noise = random.Random(0)
    losses = [3 + 2 * 0.99**i + noise.gauss(0, 0.05) for i in range(2000)]
    guard = Guard(GuardConfig())
    assert [guard.objection(loss, 1.0) for loss in losses] == [None] * 2000
    assert "deviations above" in (guard.objection(4.5, 1.0) or "")
    assert guard.objection(3.0, 1.0) is None  # the jump itself is forgotten
    assert "gradient norm is inf" in (guard.objection(3.0, float("inf")) or "")
    resumed = Guard(GuardConfig(), [*((loss, False) for loss in losses), (4.5, True), (3.0, False), (3.0, True)])
    assert [resumed.objection(x, 1.0) for x in (4.5, 3.1)] == [guard.objection(x, 1.0) for x in (4.5, 3.1)]
    assert Guard(GuardConfig(policy="off")).objection(float("nan"), 1.0) is None


def test_rounded_weights_are_judged_among_themselves(run_file, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What the loss gains where training for int4 begins is no jump, also for a run resumed after it."""
    cfg = load_toml(RunConfig, run_file(steps=40, checkpoint_every=5, keep_checkpoints=9), ["quantise.to='int4'"])
    run = tmp_path / "run"
    poison(monkeypatch, cfg, set(range(30, 40)), 3.0)
    pretrain(cfg)
    whole = metrics(run)
    assert not any(line.get("skipped") for line in read_metrics(run / "metrics.jsonl"))
    shutil.rmtree(checkpoints.directory(run, 40))
    pretrain(cfg)
    assert metrics(run) == whole
    plain = load_toml(RunConfig, run_file("plain", steps=40), ["guard.in_a_row=30"])
    pretrain(plain)
    skipped = [line["step"] for line in read_metrics(tmp_path / "plain" / "metrics.jsonl") if line.get("skipped")]
    assert skipped == list(range(31, 41))


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """No file grows beyond `most` bytes in here: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sigterm_saves_and_a_full_disk_costs_nothing(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = {"steps": 60, "checkpoint_every": 20}
    pretrain(load_toml(RunConfig, run_file("whole", **options)))
    run, file = tmp_path / "run", run_file(**options)
    command = [sys.executable, "-m", "rorqual", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(run.glob("checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    stopped = max(checkpoints.steps(run))
    assert process.returncode == 0 and f"stopped after step {stopped};" in said and 20 <= stopped < 60
    # With room for the weights but not for the optimiser's state, and with room for neither.
    for most in (300_000, 100_000):
        with (
            small_disk(most),
            pytest.raises(TrainingError, match=rf"no room for a checkpoint.*step {stopped} stands saved.*same command"),
        ):
            pretrain(load_toml(RunConfig, file))
        assert checkpoints.steps(run) == [stopped] and not list(run.glob("checkpoints/.*"))
    with small_disk(2000), pytest.raises(TrainingError, match=r"is full.*make room"):
        pretrain(load_toml(RunConfig, file))
    pretrain(load_toml(RunConfig, file))
    assert metrics(run) == metrics(tmp_path / "whole") and same(run / "model", tmp_path / "whole" / "model")


def test_no_memory_names_the_micro_batch_that_fits(run_file, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    plain, most = trainer.losses, 2

    def losses(model, rows, *args, **options):  # type: ignore[no-untyped-def]
        if len(rows.tokens) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nmore")
        return plain(model, rows, *args, **options)

    monkeypatch.setattr(trainer, "losses", losses)
    with pytest.raises(
        TrainingError, match=r"step 1 with micro_batch 12: CUDA out of memory.*\(micro_batch 2 fits: --set"
    ):
        pretrain(load_toml(RunConfig, run_file(batch=12, micro_batch=12)))
    pretrain(load_toml(RunConfig, run_file(batch=12, micro_batch=2)))
    most = 0
    with pytest.raises(TrainingError, match="even one sequence does not fit"):
        pretrain(load_toml(RunConfig, run_file("none")))


def test_a_model_that_does_not_fit_is_one_line(run_file, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def build(*args: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(module, "build_model", build)
    with pytest.raises(TrainingError, match=r"the weights alone take 2\d\d kB in fp32 \(train a smaller model\)"):
        pretrain(load_toml(RunConfig, run_file()))


def test_an_error_that_is_not_about_memory_stays_itself(run_file, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def losses(*args, **options):  # type: ignore[no-untyped-def]
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer, "losses", losses)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pretrain(load_toml(RunConfig, run_file()))


def test_a_flipped_bit_in_a_shard_is_found_before_training(run_file, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shards = tmp_path / "shards"
    shutil.copytree(corpus / "shards" / "train", shards)
    victim = shards / "shard-00000.tokens"
    content = bytearray(victim.read_bytes())
    content[1000] ^= 1
    victim.write_bytes(content)
    cfg = load_toml(RunConfig, run_file(), [f'data.train=[{{path="{shards}"}}]'])
    with pytest.raises(DataError, match=r"shard-00000.tokens is damaged: its checksum differs"):
        pretrain(cfg)
    assert not (tmp_path / "run").exists()
