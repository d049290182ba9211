"""A run end to end on a CPU: records, resuming to the bit, the exported model, and clear errors."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import load_model
from rorqual.config import load_toml
from rorqual.errors import CheckpointError, ConfigError, DataError
from rorqual.train import checkpoints
from rorqual.train.config import RunConfig
from rorqual.train.pretrain import pretrain
from rorqual.train.record import read_metrics

REPRODUCIBLE = ("step", "tokens", "loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation", "lr")


def metrics(run: Path) -> list[dict[str, float]]:
    return [{k: line[k] for k in REPRODUCIBLE} for line in read_metrics(run / "metrics.jsonl")]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_model(model).state_dict()


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_a_run_leaves_what_the_contract_names(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    record = pretrain(load_toml(RunConfig, run_file()))
    run = tmp_path / "run"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    keys = "tokens loss lm_loss mtp_loss lr grad_norm tokens_per_s mfu max_violation memory_bytes elapsed_s"
    assert all(set(keys.split()) <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["tokens"] == 8 * 4 * 32
    assert "val_loss" in lines[3] and "val_loss" in lines[7]
    assert record.model is not None and load_model(record.model).dtype == torch.bfloat16
    assert (record.model / "tokenizer.json").is_file()
    assert load_toml(RunConfig, run / "config.toml").steps == 8
    assert list(run.glob("events.*"))
    assert checkpoints.steps(run) == [6, 8]


def test_a_finished_run_called_again_changes_nothing(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    cfg = load_toml(RunConfig, run_file())
    pretrain(cfg)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert pretrain(cfg).step == 8
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.timeout(3600)
def test_an_experiment_leaves_its_curves_alone(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    record = pretrain(load_toml(RunConfig, run_file(checkpoint_every=0)))
    assert record.model is None and record.step == 8 and len(metrics(tmp_path / "run")) == 8
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob("checkpoints/*"))
    with pytest.raises(ConfigError, match="rewind needs checkpoints"):
        load_toml(RunConfig, run_file("two", checkpoint_every=0), ["guard.policy='rewind'"])


def test_killed_at_any_instant_and_resumed_equals_never_killed(
    run_file, tmp_path: Path, request: pytest.FixtureRequest
) -> None:  # type: ignore[no-untyped-def]
    """kill -9 at random moments, every other one while a checkpoint is being written, then to the end: the same metrics,
    weights and average, bit for bit. Batch ramp, bf16 moments and average included."""
    kills, seed = request.config.getoption("--kills"), random.SystemRandom().randrange(10**6)
    print("seed", seed)
    moments, steps = random.Random(seed), 30 * kills
    extra = ["optim.moments='bfloat16'", "ema.decay=0.9", "schedule.recipe='deepseek-v3'", "optim.warmup_steps=100"]
    top = {"steps": 0, "tokens": steps * 4 * 32, "checkpoint_every": 2, "eval_every": 10}
    pretrain(load_toml(RunConfig, run_file("whole", **top), extra))
    options = [word for item in extra for word in ("--set", item)]
    command = [sys.executable, "-m", "rorqual", "train", str(run_file("killed", **top)), *options]
    killed, done = tmp_path / "killed", 0
    for kill in range(kills):
        at = max(checkpoints.steps(killed), default=0)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and max(checkpoints.steps(killed), default=0) <= at:
                time.sleep(0.001)
            if kill % 2:
                while process.poll() is None and not list(killed.glob("checkpoints/.step-*")):
                    time.sleep(0.0005)
            else:
                time.sleep(moments.uniform(0, 0.2))
            done += process.poll() is None
            process.kill()
    assert done >= min(kills, 3), "the run ended before it could be killed"
    subprocess.run(command, check=True, capture_output=True)
    assert metrics(killed) == metrics(tmp_path / "whole")
    last = max(checkpoints.steps(killed))
    a, b = killed / "checkpoints" / f"step-{last}", tmp_path / "whole" / "checkpoints" / f"step-{last}"
    assert same(a, b)
    average, other = (torch.load(run / "ema.pt", weights_only=True) for run in (a, b))
    assert all(torch.equal(average[name], other[name]) for name in average)


def test_micro_batches_add_up_to_the_step(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, micro in (("one", 4), ("four", 1)):
        pretrain(load_toml(RunConfig, run_file(name, steps=3, micro_batch=micro)))
    a, b = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "four"))
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4) and x["grad_norm"] == pytest.approx(
            y["grad_norm"], rel=1e-3
        )


def test_fine_tuning_starts_from_a_model_and_learns_the_answers(run_file, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from rorqual.data.prepare import prepare
    from rorqual.post.sft import sft

    base = pretrain(load_toml(RunConfig, run_file("base", export_dtype="float32"))).model
    chats = tmp_path / "chats.jsonl"
    answer = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    chats.write_text("\n".join(json.dumps({"messages": answer}) for _ in range(40)))
    prepare([chats], tmp_path / "chats", corpus / "tokenizer")
    text = f"out = '{tmp_path}/sft'\nsteps = 30\nbatch = 2\ninit_from = '{base}'\n[data]\nseq_len = 32\n"
    (tmp_path / "sft.toml").write_text(
        text + f"[[data.train]]\npath = '{tmp_path}/chats/train'\n[optim]\nwarmup_steps = 1\nlr = 0.01\n"
    )
    cfg = load_toml(RunConfig, tmp_path / "sft.toml")
    record = sft(cfg)
    saved = load_toml(RunConfig, tmp_path / "sft" / "config.toml")
    assert saved.data.packing == "samples" and saved.data.mask_documents is True
    assert record.last["lm_loss"] < 0.5
    with pytest.raises(ConfigError, match="init_from"):
        sft(load_toml(RunConfig, run_file("x")))


def test_experts_stay_balanced_without_an_auxiliary_loss(run_file) -> None:  # type: ignore[no-untyped-def]
    """Real text, alpha 0: the bias update alone brings MaxVio down, MTP block included; without it, it stays high."""
    last = {}
    for gamma in (0.0, 0.01):
        cfg = load_toml(
            RunConfig, run_file(f"g{gamma}", steps=260, batch=8, checkpoint_every=1000, eval_every=1000),
            [f"balance.gamma={gamma}", "balance.alpha=0.0", "balance.off_fraction=0.0"],
        )  # fmt: skip
        lines = read_metrics(pretrain(cfg).directory / "metrics.jsonl")
        last[gamma] = sum(line["max_violation"] for line in lines[-20:]) / 20
    assert last[0.01] < 0.6 * last[0.0] and last[0.01] < 1.0, last


def test_wrong_run_files_are_told_apart(run_file, corpus: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    good = run_file()
    with pytest.raises(ConfigError, match="did you mean 'weight_decay'"):
        load_toml(RunConfig, good, ["optim.weight_dekay=0.1"])
    with pytest.raises(ConfigError, match="steps"):
        load_toml(RunConfig, good, ["steps=0"])
    with pytest.raises(ConfigError, match=r"must be float"):
        load_toml(RunConfig, good, ["optim.lr=fast"])
    with pytest.raises(ConfigError, match="does not divide"):
        load_toml(RunConfig, good, ["micro_batch=3"])
    with pytest.raises(DataError, match=r"rorqual data prepare|does not exist|no shards|index"):
        pretrain(load_toml(RunConfig, good, ['data.train=[{path="nowhere"}]']))
    with pytest.raises(DataError, match="vocabulary"):
        pretrain(load_toml(RunConfig, good, ["model.vocab_size=300"]))
    pretrain(load_toml(RunConfig, good))
    with pytest.raises(ConfigError, match="other settings"):
        pretrain(load_toml(RunConfig, good, ["optim.lr=0.1"]))


def test_damage_is_named(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    record = pretrain(load_toml(RunConfig, run_file()))
    assert record.model is not None
    shard = record.model / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        load_model(record.model)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model.safetensors"):
        load_model(record.model)
    shard.write_bytes(content)
    config = json.loads((record.model / "config.json").read_text())
    (record.model / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 20}))
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa.*\[24, 32\].*\[28, 32\]"):
        load_model(record.model)
    (record.model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        load_model(record.model)


def test_fp8_is_one_word_and_follows_bf16(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Same data and seed: the losses differ, by little; a resumed FP8 run is the undisturbed one; precision is part of what
    a run is."""
    curves = {}
    for precision in ("bf16", "fp8"):
        cfg = load_toml(RunConfig, run_file(precision, steps=12, precision=precision))
        pretrain(cfg)
        curves[precision] = [line["loss"] for line in metrics(tmp_path / precision)]
        assert load_toml(RunConfig, tmp_path / precision / "config.toml").dtype == "bfloat16"
    assert curves["fp8"] != curves["bf16"]
    errors = [abs(a - b) / b for a, b in zip(curves["fp8"], curves["bf16"], strict=True)]
    assert max(errors) < 0.01, errors
    with pytest.raises(ConfigError, match=r"other settings \(precision\)"):
        pretrain(load_toml(RunConfig, run_file("fp8", steps=12, precision="bf16")))
    with pytest.raises(ConfigError, match="contradicts"):
        load_toml(RunConfig, run_file(precision="bf16", dtype="float32"))
