"""Several replicas of a run are one run: the same curve, one set of files, one decision."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rorqual.cli.train import launched
from rorqual.config import load_toml
from rorqual.errors import ConfigError
from rorqual.train import checkpoints, trainer
from rorqual.train import replicas as module
from rorqual.train.config import EMAConfig, OptimConfig, RunConfig, resolve
from rorqual.train.loss import Losses
from rorqual.train.pretrain import pretrain
from rorqual.train.record import read_metrics
from rorqual.train.replicas import Replicas
from tests.replicas import finish, start

from . import test_traps
from .test_run import REPRODUCIBLE, weights

COMPARED = (*REPRODUCIBLE, "val_loss", "val_loss_ema", "batch", "skipped")


def follows(a: Path, b: Path, rel: float = 1e-5, keys: Sequence[str] = COMPARED) -> None:
    """The same steps with the same numbers, but for rounding. Over many steps, or in 16 bits, that may send a token to
    another expert, which `max_violation` shows and the loss hardly."""
    first, second = (read_metrics(run / "metrics.jsonl") for run in (a, b))
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for x, y in zip(first, second, strict=True):
        for key in keys:
            assert x.get(key) == (None if y.get(key) is None else pytest.approx(y[key], rel=rel)), (x["step"], key)


def files(run: Path) -> list[str]:
    """All but the events, whose names are times."""
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if "events" not in p.name)


@pytest.fixture
def together(tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(cfg: RunConfig, world: int = 2) -> None:
        codes = finish(start(world, lambda replicas: pretrain(cfg, replicas=replicas), tmp_path))
        assert codes == [0] * world, [p.read_text() for p in tmp_path.glob("[0-9].txt")]

    return run


RAMP = ("steps=0", "tokens=1280", "schedule.batch=[{until=0.5,to=1.0,shape='linear',start=0.125},{until=1.0,to=1.0}]")


@pytest.mark.parametrize(
    "extra",
    [
        ("micro_batch=1", "ema.decay=0.9"),
        ("micro_batch=2", "optim.name='muon'", "data.mask_documents=true", "steps=2"),  # it makes steps of rounding
        ("micro_batch=2", *RAMP),  # the first steps have no micro-batch for the second replica, or a smaller one
    ],
    ids=["several", "muon", "ramp"],
)
def test_two_follow_one(run_file, together, tmp_path: Path, extra: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    """Losses, gradient norms, validations, loads and weights; with MTP."""
    extra = (*extra, "export_dtype='float32'", "eval_rows=7")
    pretrain(load_toml(RunConfig, run_file("one", batch=8), extra))
    together(load_toml(RunConfig, run_file("two", batch=8), extra))
    one, two = tmp_path / "one", tmp_path / "two"
    follows(one, two)
    assert (one / "expert_load.jsonl").read_bytes() == (two / "expert_load.jsonl").read_bytes()
    assert files(one) == files(two) and len(list(two.glob("events.*"))) == 1
    mine, theirs = weights(one / "model"), weights(two / "model")
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in mine)


def test_sixteen_bit_gradients_meet_in_fp32(run_file, together, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Copies' gradients too, with one micro-batch for each replica: the first step is that of two micro-batches."""
    extra = ("dtype='bfloat16'", "micro_batch=2", "steps=3", "optim.moments='bfloat16'")
    pretrain(load_toml(RunConfig, run_file("one"), extra))
    together(load_toml(RunConfig, run_file("two"), extra))
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert all(one[0][key] == pytest.approx(two[0][key], rel=1e-6) for key in REPRODUCIBLE)
    follows(tmp_path / "one", tmp_path / "two", 2e-3, ["loss", "lr"])


def test_replicas_stay_the_same_bits(tmp_path: Path) -> None:
    """Weights, biases and average after some steps, though neither ever sends its own to the other."""

    def work(replicas: Replicas) -> None:
        with replicas.joined(torch.device("cpu")):
            t = test_traps.trainer(
                replicas=replicas, micro_batch=1, optim=OptimConfig(name="muon", warmup_steps=0), ema=EMAConfig(0.9)
            )
            for step in range(6):
                t.step(step, lambda start, count: test_traps.rows(seed=start))
        assert t.average is not None
        torch.save((t.model.state_dict(), t.average.state_dict()), tmp_path / f"{replicas.rank}.pt")

    assert finish(start(3, work, tmp_path)) == [0, 0, 0], [p.read_text() for p in tmp_path.glob("*.txt")]
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_nothing_of_the_group_outlives_it(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Threads that do abort Python's own end now and then."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs Linux")

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def work(replicas: Replicas) -> None:
        before = threads()
        with replicas.joined(torch.device("cpu")):
            import_module("torch.distributed.nn.functional")  # as the first optimiser does
            replicas.wait()
            assert threads() > before
        assert threads() == before

    monkeypatch.delattr("torch.distributed.nn.functional", raising=False)
    monkeypatch.delitem(sys.modules, "torch.distributed.nn.functional", raising=False)
    assert finish(start(2, work, tmp_path)) == [0, 0], [p.read_text() for p in tmp_path.glob("*.txt")]


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_loss_that_one_refuses_is_refused_by_all(
    run_file, together, tmp_path: Path, monkeypatch, policy: str
) -> None:  # type: ignore[no-untyped-def]
    """No number in one micro-batch of step 5, which one replica alone sees; a rewind reads files that the other wrote."""
    from rorqual.train.pretrain import model_config, open_rows

    cfg = load_toml(RunConfig, run_file("one"), [f"guard.policy='{policy}'", "micro_batch=1"])
    resolved, plain = resolve(cfg, kind="pretrain", cuda=False, cores=1), trainer.losses
    bad = torch.from_numpy(open_rows(resolved, model_config(cfg), cfg.data.train).rows(4 * 4 + 1, 1).tokens)

    def losses(model, rows, *args, **options):  # type: ignore[no-untyped-def]
        out: Losses = plain(model, rows, *args, **options)
        return out._replace(lm=out.lm * float("nan")) if torch.equal(rows.tokens, bad) else out

    monkeypatch.setattr(trainer, "losses", losses)
    pretrain(cfg)
    together(load_toml(RunConfig, run_file("two"), [f"guard.policy='{policy}'", "micro_batch=1"]))
    follows(tmp_path / "one", tmp_path / "two")
    if policy == "rewind":
        assert (tmp_path / "one" / "guard.json").read_text() == (tmp_path / "two" / "guard.json").read_text()


@pytest.mark.parametrize(("rank", "after"), [(1, 2), (0, 1)], ids=["second told, two go on", "first told, one goes on"])
def test_one_signal_ends_both_and_any_number_goes_on(run_file, together, tmp_path: Path, rank: int, after: int) -> None:  # type: ignore[no-untyped-def]
    options = {"steps": 60, "checkpoint_every": 20, "batch": 4, "micro_batch": 1}
    pretrain(load_toml(RunConfig, run_file("one", **options)))
    cfg, run = load_toml(RunConfig, run_file("two", **options)), tmp_path / "two"
    processes = start(2, lambda replicas: pretrain(cfg, replicas=replicas), tmp_path)
    deadline = time.monotonic() + 60
    while not checkpoints.steps(run) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert processes[rank].pid is not None
    os.kill(processes[rank].pid, signal.SIGTERM)
    assert finish(processes) == [0, 0], [p.read_text() for p in tmp_path.glob("[0-9].txt")]
    assert 20 <= max(checkpoints.steps(run)) < 60 and not (run / "model").exists()
    together(cfg, after)
    follows(tmp_path / "one", run, 1e-3, ["loss", "lr", "tokens"])


def test_a_replica_that_fails_ends_the_other(run_file, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    plain = trainer.losses

    def losses(model, rows, *args, **options):  # type: ignore[no-untyped-def]
        if dist.get_rank() == 1 and len(rows.tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, rows, *args, **options)

    monkeypatch.setattr(trainer, "losses", losses)
    cfg = load_toml(RunConfig, run_file(batch=12, micro_batch=6))
    assert finish(start(2, lambda replicas: pretrain(cfg, replicas=replicas), tmp_path)) == [1, 1]
    assert "micro_batch 3 fits" in (tmp_path / "1.txt").read_text()
    assert "TrainingError: another replica has ended" in (tmp_path / "0.txt").read_text()


def test_torchrun_starts_them(run_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The command of the documentation; one of them speaks."""
    pretrain(load_toml(RunConfig, run_file("one", steps=4)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "rorqual", "train", str(run_file("two", steps=4))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained to step 4") == 1 and done.stderr.count("2 × ") == 1
    assert done.stderr.count("step 4/4") == 1
    follows(tmp_path / "one", tmp_path / "two")


def test_a_batch_that_cannot_be_shared_is_said(run_file) -> None:  # type: ignore[no-untyped-def]
    def shared(replicas: int, **top: object) -> RunConfig:
        cfg = load_toml(RunConfig, run_file(**top))
        return resolve(cfg, kind="pretrain", cuda=False, cores=1, replicas=replicas)

    with pytest.raises(ConfigError, match=r"batch 4 cannot be shared by 3 replicas.*multiple of 3"):
        shared(3)
    with pytest.raises(ConfigError, match=r"micro_batch 4 does not divide 2.*set micro_batch=2, or batch.* of 8"):
        shared(2, micro_batch=4)
    assert [shared(n, batch=24).micro_batch for n in (1, 2, 3)] == [24, 12, 8]
    with pytest.raises(ConfigError, match=r"batch 4 cannot be shared"):
        pretrain(load_toml(RunConfig, run_file()), replicas=Replicas(0, 3))


def test_what_torchrun_says_is_read(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == Replicas(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="one host"):
        launched()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert launched() == Replicas(2, 4) and not launched().first
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one host"):
        launched()


def test_a_gpu_for_each(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Replicas(3, 4).device("cuda") == torch.device("cuda", 3)
    assert Replicas(3, 4).device("cpu") == torch.device("cpu")
    assert Replicas().device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="one GPU for 2 replicas"):
        Replicas(0, 2).device("cuda:1")
    with pytest.raises(ConfigError, match=r"8 replicas on 4 GPUs.*--nproc-per-node 4"):
        Replicas(0, 8).device("cuda")


def test_many_small_tensors_are_few_calls(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Of any shape, dtype and layout, in place; one alike replica beside makes every sum the double."""
    calls = []

    def double(tensor: torch.Tensor, op: object) -> None:
        calls.append(tensor.nbytes)
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", double)
    monkeypatch.setattr(module, "BUCKET", 4000)
    draw = torch.Generator().manual_seed(0)
    sizes = [(3,), (7, 5), (), (40, 30), (0,), *[(2, n) for n in range(1, 40)]]
    tensors = [torch.randn(size, generator=draw) for size in sizes]
    tensors += [torch.randn(6, 4, generator=draw).T, torch.arange(9), torch.ones(5, dtype=torch.bfloat16)]
    before = [t.clone() for t in tensors]
    Replicas(0, 2).sum_(tensors)
    assert all(torch.equal(t, 2 * b) for t, b in zip(tensors, before, strict=True))
    assert len(calls) == 6 and max(calls) == 4800 and sum(calls) == sum(t.nbytes for t in tensors)
    Replicas(0, 1).sum_(tensors)
    assert len(calls) == 6
