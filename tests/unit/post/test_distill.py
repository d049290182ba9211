"""Distillation runs on a CPU: healing, lessons, MTP alone, training for int4, resuming to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import load_model
from rorqual.checkpoint.convert import convert
from rorqual.config import load_toml
from rorqual.data.prepare import prepare
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import ConfigError
from rorqual.post.distill import distill, make_loss
from rorqual.post.llama import Llama
from rorqual.post.llama_files import save_llama
from rorqual.post.llama_tokenizer import TokenizerFiles
from rorqual.post.upcycle import UpcycleConfig, upcycle
from rorqual.train import checkpoints
from rorqual.train.config import RunConfig
from rorqual.train.loss import Targets
from rorqual.train.pretrain import pretrain
from rorqual.train.quantise import ShippedWeights
from rorqual.train.record import read_metrics
from rorqual.train.schedule import Timeline
from rorqual.train.working import WorkingCopies
from tests.replicas import finish, start
from tests.unit.post.conftest import make_llama


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: TokenizerFiles, corpus_files: list[Path]) -> Path:
    """teacher/, student/ (converted from it), text/ and lessons/ (conversations) as shards."""
    root = tmp_path_factory.mktemp("distill")
    save_llama(make_llama(hidden_size=32), root / "teacher", tokenizer_files, torch.float32)
    source = root / "source.txt"
    source.write_text("".join(f.read_text() for f in corpus_files[:20]))
    cfg = UpcycleConfig(rank=24, routed=6, top_k=3, tokens=1024, length=64, mtp=True)
    upcycle(root / "teacher", root / "student", [source], cfg, torch.float32)
    (root / "chats.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "forty-two"}]}
            )
            for i in range(60)
        )
    )
    prepare([source], root / "text", root / "student")
    prepare([root / "chats.jsonl"], root / "lessons", root / "student")
    return root


def run_file(ground: Path, out: Path, top: str = "", sections: str = "", lessons: bool = False, steps: int = 8) -> Path:
    path = out.with_suffix(".toml")
    more = f"[[data.train]]\npath = '{ground}/lessons/train'\ntarget = 'data'\nweight = 0.3\n" if lessons else ""
    path.write_text(
        f"out = '{out}'\ninit_from = '{ground}/student'\nsteps = {steps}\nbatch = 4\nthreads = 1\ncheckpoint_every = 3\n"
        f"export_dtype = 'float32'\n{top}\n[data]\nseq_len = 48\n[[data.train]]\npath = '{ground}/text/train'\n"
        f"weight = 0.7\n{more}[[data.val]]\npath = '{ground}/text/train'\n"
        "[optim]\nwarmup_steps = 2\nlr = 2e-3\nname = 'muon'\nweight_decay = 0.0\n[balance]\ngamma = 0.0\n"
        f"[distill]\nteacher = '{ground}/teacher'\nchunk = 50\n"
        f"expand = {{ '<｜User｜>' = '<spare_5>ask', '<｜Assistant｜>' = 'say', '</think>' = '' }}\n{sections}"
    )
    return path


def lines(out: Path) -> list[dict[str, float]]:
    return read_metrics(out / "metrics.jsonl")


def test_a_converted_model_heals(ground: Path, tmp_path: Path) -> None:
    """The divergence from the teacher falls, and is what the conversion measured to begin with."""
    record = distill(load_toml(RunConfig, run_file(ground, tmp_path / "heal", steps=60)))
    losses = [line["lm_loss"] for line in lines(tmp_path / "heal")]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert record.model is not None and load_model(record.model).cfg == load_model(ground / "student").cfg


def test_a_model_that_teaches_itself_has_nothing_to_learn(ground: Path, tmp_path: Path) -> None:
    path = run_file(ground, tmp_path / "self", steps=2)
    distill(load_toml(RunConfig, path, [f"distill.teacher={ground}/student", "distill.expand={}"]))
    assert lines(tmp_path / "self")[0]["lm_loss"] == pytest.approx(0, abs=1e-5)


def test_lessons_are_learned_from_their_own_words(ground: Path, tmp_path: Path) -> None:
    """The teacher has never said it; the student does in the end."""
    record = distill(load_toml(RunConfig, run_file(ground, tmp_path / "lessons", lessons=True, steps=80)))
    assert record.model is not None
    tokenizer, template = Tokenizer.load(record.model), ChatTemplate.load(record.model)
    messages = [{"role": "user", "content": "7?"}, {"role": "assistant", "content": "forty-two"}]
    ids, mask = template.encode_for_training(tokenizer, messages)
    nll = {}
    for name in (ground / "student", record.model):
        with torch.no_grad():
            logs = load_model(name, torch.float32)(torch.tensor([ids]))[0, :-1].log_softmax(-1)
        nll[name] = -sum(logs[i, ids[i + 1]].item() for i in range(len(ids) - 1) if mask[i + 1])
    assert nll[record.model] < 0.5 * nll[ground / "student"]


def test_rows_of_lessons_alone_do_not_ask_the_teacher(ground: Path, tmp_path: Path) -> None:
    """And the step's loss is the sum of its rows', whatever lies beside them."""
    cfg = load_toml(RunConfig, run_file(ground, tmp_path / "rows"), ["distill.teacher_dtype=float32"])
    model = load_model(ground / "student")
    loss = make_loss(cfg, model)
    assert isinstance(loss.teacher, Llama)
    tokens, mask = torch.randint(20, 200, (4, 34)), torch.ones(4, 34, dtype=torch.int64)
    mask[1], mask[2, 10:20], mask[3, :30] = 2, 2, 0
    rows, counts, asked = Targets(tokens, torch.zeros_like(tokens), mask), torch.ones(2), list[int]()
    hidden = loss.teacher.hidden
    loss.teacher.hidden = lambda tokens, batch=None: asked.append(len(tokens)) or hidden(tokens, batch)  # type: ignore[method-assign]

    def of(part: Targets) -> float:
        return loss(model, part, counts, mask_documents=False, balance_share=1.0).lm.item()

    together = of(rows)
    assert asked == [3]
    each = [of(Targets(*(t[i : i + 1] for t in rows))) for i in range(4)]
    assert together == pytest.approx(sum(each), rel=1e-5) and min(each) > 0.01


def test_mtp_alone_leaves_the_model_as_it_was(ground: Path, tmp_path: Path) -> None:
    freeze = "freeze = ['embed_tokens.*', 'layers.*', 'norm.*', 'lm_head.*']"
    cfg = load_toml(
        RunConfig,
        run_file(ground, tmp_path / "mtp", freeze, steps=40),
        ["distill.teacher=''", "mtp.weight=1.0", "optim.lr=1e-2"],
    )
    record = distill(cfg)
    assert record.model is not None
    before, after = (load_model(d, torch.float32).state_dict() for d in (ground / "student", record.model))
    for name, value in before.items():
        assert torch.equal(after[name], value) is not (name.startswith("mtp.") and "bias" not in name), name
    history = lines(tmp_path / "mtp")
    assert all(line["lm_loss"] == 0 for line in history)
    assert sum(x["mtp_loss"] for x in history[-5:]) < 0.8 * sum(x["mtp_loss"] for x in history[:5])


def test_killed_and_resumed_equals_never_killed(ground: Path, tmp_path: Path) -> None:
    """kill -9 during the run, with Muon, lessons and rounded weights: the same metrics and weights, bit for bit."""
    options = {"lessons": True, "steps": 30, "sections": "[quantise]\nto = 'int4'\nfraction = 0.6\n"}
    distill(load_toml(RunConfig, run_file(ground, tmp_path / "whole", **options)))  # type: ignore[arg-type]
    path, killed = run_file(ground, tmp_path / "killed", **options), tmp_path / "killed"  # type: ignore[arg-type]
    with subprocess.Popen(
        [sys.executable, "-m", "rorqual", "distill", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while max(checkpoints.steps(killed), default=0) < 15 and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert 15 <= max(checkpoints.steps(killed)) < 30
    distill(load_toml(RunConfig, path))
    keys = ("step", "loss", "lm_loss", "mtp_loss", "grad_norm", "lr")
    a, b = ([[line[k] for k in keys] for line in lines(tmp_path / name)] for name in ("whole", "killed"))
    assert a == b
    x, y = (load_model(tmp_path / n / "model").state_dict() for n in ("whole", "killed"))
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_two_replicas_follow_one(ground: Path, tmp_path: Path) -> None:
    """Four micro-batches, with MTP and lessons; each replica has the teacher. Not with Muon, nor with rounded weights: they
    make steps of differences in the last bit."""
    cfg, other = (
        load_toml(RunConfig, run_file(ground, tmp_path / name, lessons=True), ["micro_batch=1", "optim.name='adamw'"])
        for name in ("one", "two")
    )
    distill(other)
    codes = finish(start(2, lambda replicas: distill(cfg, replicas=replicas), tmp_path))
    assert codes == [0, 0], [p.read_text() for p in tmp_path.glob("[0-9].txt")]
    keys = ("step", "loss", "lm_loss", "mtp_loss", "grad_norm", "lr")
    one, two = ([[line[k] for k in keys] for line in lines(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 8 and all(a == pytest.approx(b, rel=1e-5) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("to", ["int4", "int8", "fp8"])
def test_rounded_weights_are_those_that_convert_stores(ground: Path, tmp_path: Path, to: str) -> None:
    cfg = load_toml(
        RunConfig,
        run_file(ground, tmp_path / "x"),
        ["steps=10", f"quantise.to={to}", "quantise.fraction=0.3"],
    )
    model = load_model(ground / "student", torch.float32, memory_map=False).train()
    exact = {k: v.clone() for k, v in model.state_dict().items()}
    shipped = ShippedWeights(cfg.quantise, model, Timeline(cfg))
    convert(ground / "student", tmp_path / to, to)
    stored = load_model(tmp_path / to, torch.float32, dequantize=True).state_dict()
    with shipped.during(6):
        assert all(torch.equal(v, exact[k]) for k, v in model.state_dict().items())
    with shipped.during(7):
        for name, value in model.state_dict().items():
            # What is not quantised is stored in bf16, which training does not imitate.
            quantised = not torch.equal(value, exact[name])
            assert torch.equal(value, stored[name]) if quantised else True, name
        assert sum(not torch.equal(v, exact[k]) for k, v in model.state_dict().items()) > 15
    assert all(torch.equal(v, exact[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError), shipped.during(9):
        raise RuntimeError
    assert all(torch.equal(v, exact[k]) for k, v in model.state_dict().items())


def test_sixteen_bit_copies_are_of_the_rounded_weights(ground: Path, tmp_path: Path) -> None:
    """What a GPU multiplies by while weights are rounded, and exact ones again after, also past an update."""
    cfg = load_toml(
        RunConfig, run_file(ground, tmp_path / "x"), ["steps=10", "quantise.to=int4", "quantise.fraction=0.5"]
    )
    model = load_model(ground / "student", torch.float32, memory_map=False).train()
    shipped, copies = ShippedWeights(cfg.quantise, model, Timeline(cfg)), WorkingCopies(model, torch.bfloat16)

    def held() -> dict[str, torch.Tensor]:
        with copies.in_place():
            return {k: p.detach().clone() for k, p in model.named_parameters() if p.dtype == torch.bfloat16}

    def narrowed() -> dict[str, torch.Tensor]:
        return {k: p.detach().to(torch.bfloat16) for k, p in model.named_parameters() if k in exact}

    exact = held()
    for step in (6, 7):
        with shipped.during(step):
            assert all(torch.equal(v, narrowed()[k]) for k, v in held().items())
            assert sum(not torch.equal(v, exact[k]) for k, v in held().items()) > 10
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.25)
        copies.refresh(everything=True)  # as the optimiser does
        exact = held()
        assert exact and all(torch.equal(v, narrowed()[k]) for k, v in exact.items())


def test_wrong_run_files_are_told_apart(ground: Path, tmp_path: Path) -> None:
    good = run_file(ground, tmp_path / "bad")
    with pytest.raises(ConfigError, match="this run file distils"):
        pretrain(load_toml(RunConfig, good))
    with pytest.raises(ConfigError, match="teacher is empty"):
        distill(load_toml(RunConfig, good, ["distill.teacher=''", f"out={tmp_path}/b1"]))
    with pytest.raises(ConfigError, match="no model"):
        distill(load_toml(RunConfig, good, ["distill.teacher=nowhere", f"out={tmp_path}/b2"]))
    with pytest.raises(ConfigError, match="did you mean 'chunk'"):
        load_toml(RunConfig, good, ["distill.chunks=3"])
