"""The converter: every storage from every other, killed at any line and resumed to the same bytes, nothing overwritten, and
no more in memory than it says."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from rorqual.checkpoint import convert as module
from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.convert import SUMS, TARGETS, convert
from rorqual.checkpoint.names import released_tensors
from rorqual.cli.main import main
from rorqual.config import ModelConfig
from rorqual.data.tokenizer import train_tokenizer
from rorqual.errors import CheckpointError, ConfigError
from tests.parity import build
from tests.unit.checkpoint.conftest import (
    SMALL,
    config_of,
    expanded,
    put_tensors,
    same_bytes,
    set_config,
    tensors_of,
)  # fmt: skip

Made = Callable[..., Path]
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ERROR = {"fp8": 2.0**-4, "int8": 1 / 127, "int4": 1 / 6.9}
"""Largest error of a value, in units of the largest magnitude of its block or group."""


def building(dst: Path) -> Path:
    return dst.with_name(f".{dst.name}.converting")


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in directory.glob("*.safetensors")}


class Stop(Exception):
    """Raised by a test inside a conversion."""


def stop_after(shards: int, dst: Path) -> Callable[[int, int], None]:
    """Progress that raises when so many shards are finished."""

    def progress(done: int, total: int) -> None:
        if len(list(building(dst).glob("*.safetensors"))) >= shards:
            raise Stop

    return progress


def interrupted(src: Path, dst: Path, to: str, shards: int, **options: Any) -> dict[str, tuple[int, int]]:
    """A conversion that ended after some shards; what it left."""
    with pytest.raises(Stop):
        convert(src, dst, to, progress=stop_after(shards, dst), **options)
    assert not dst.exists()
    left = identities(building(dst))
    assert len(left) == shards
    return left


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("start", ["bf16", "fp16", "fp32", "fp8", "fp8+ue8m0", "int8", "int4"])
def test_every_storage_from_every_other(made: Made, start: str, to: str, tmp_path: Path) -> None:
    src = made(start, 1)
    done = convert(src, tmp_path / "out", to, scale_fmt="ue8m0" if start == "fp8+ue8m0" and to == "fp8" else None)
    was, now = expanded(src), expanded(tmp_path / "out")
    assert was.keys() == now.keys()
    for name, value in was.items():
        if to in PLAIN:
            kept = value if name.endswith("bias") else value.to(PLAIN[to]).float()
            assert torch.equal(now[name], kept), name
        else:
            assert (value - now[name]).abs().max() <= ERROR[to] * value.abs().max() + 1e-6, name
    if start.partition("+")[0] == to:
        same_bytes(tensors_of(src), tensors_of(tmp_path / "out"))
    assert done.total_bytes == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    model = load_model(tmp_path / "out")
    assert len(model.mtp) == 1
    assert ("quantization_config" in config_of(tmp_path / "out")) == (to not in PLAIN)
    assert config_of(tmp_path / "out")["torch_dtype"] == str(PLAIN.get(to, torch.bfloat16)).removeprefix("torch.")
    ignored = {"quantization_config", "torch_dtype"}
    a, b = ({k: v for k, v in config_of(d).items() if k not in ignored} for d in (src, tmp_path / "out"))
    assert a == b


def test_a_chain_of_conversions_loses_only_what_quantising_loses(made: Made, tmp_path: Path) -> None:
    last = made("bf16", 2)
    for i, to in enumerate(["fp32", "bf16"]):
        convert(last, last := tmp_path / f"{i}", to)
    same_bytes(tensors_of(made("bf16", 2)), tensors_of(last))
    for i, to in enumerate(["fp8", "fp32", "fp8", "int4", "fp32", "int4", "bf16"], 10):
        convert(last, last := tmp_path / f"{i}", to)
    assert expanded(last).keys() == expanded(made("bf16", 2)).keys()
    # FP8 blocks hold their largest value at a fixed code, so expanding and quantising again gives the same values.
    a, b = expanded(tmp_path / "10"), expanded(tmp_path / "12")
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=0.01, atol=1e-6), name


@pytest.mark.parametrize("to", TARGETS)
def test_small_shards_hold_the_same_as_one(made: Made, to: str, tmp_path: Path) -> None:
    src = made("bf16", 1)
    one = convert(src, tmp_path / "one", to)
    many = convert(src, tmp_path / "many", to, max_shard_bytes=200_000)
    assert len(one.files) == 1 and len(many.files) > 3
    same_bytes(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many"))
    count = len(many.files)
    assert list(many.files) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {t.name: file for file, ts in many.files.items() for t in ts}
    for planned in many.files.values():
        assert sum(t.nbytes for t in planned) <= 200_000 or len(planned) == 1
    a, b = (load_model(tmp_path / d) for d in ("one", "many"))
    for (name, value), (_, other) in zip(released_tensors(a), released_tensors(b), strict=True):
        assert torch.equal(value.view(torch.uint8), other.view(torch.uint8)), name


def test_every_tensor_has_a_shard_of_its_own_if_it_must(made: Made, tmp_path: Path) -> None:
    """A weight and its scale fall into different files then."""
    for to in ("fp8", "int4"):
        done = convert(made("bf16", -1), tmp_path / f"{to}-each", to, max_shard_bytes=1)
        convert(made("bf16", -1), tmp_path / to, to)
        assert all(len(planned) == 1 for planned in done.files.values())
        same_bytes(tensors_of(tmp_path / to), tensors_of(tmp_path / f"{to}-each"))
        load_model(tmp_path / f"{to}-each")


def test_embeddings_may_stay_plain(made: Made, tmp_path: Path) -> None:
    convert(made("bf16", 2), tmp_path / "out", "int4", embeddings=False)
    stored, before = tensors_of(tmp_path / "out"), tensors_of(made("bf16", 2))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.shared_head.head.weight"):
        assert torch.equal(stored[name], before[name])
        assert name.removesuffix(".weight") in config_of(tmp_path / "out")["quantization_config"]["ignore"]
    load_model(tmp_path / "out")


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_a_tied_embedding_may_be_stored_as_the_head_too(to: str, made: Made, tmp_path: Path) -> None:
    """Which changes no logit; where nothing is tied, it does nothing."""
    tied, untied = (
        convert(made("bf16", -1, tie_word_embeddings=True), tmp_path / f"{untie}", to, untie=untie)
        for untie in (False, True)
    )
    assert tied.cfg.tie_word_embeddings and not config_of(tmp_path / "True")["tie_word_embeddings"]
    assert {t.name.rpartition(".")[0] for t in _added(tied, untied)} == {"lm_head"}
    tokens = torch.arange(3, 20)[None]
    with torch.inference_mode():
        ours, theirs = (load_model(tmp_path / f"{untie}", dtype="float32")(tokens) for untie in (False, True))
    assert torch.equal(ours, theirs)
    assert not _added(*(convert(made("bf16", -1), tmp_path / f"plain {u}", to, untie=u) for u in (False, True)))


def _added(less: module.Conversion, more: module.Conversion) -> list[module.Planned]:
    one, other = ([t for planned in c.files.values() for t in planned] for c in (less, more))
    return [t for t in other if t not in one]


def test_what_is_ignored_is_what_is_plain(made: Made) -> None:
    """Engines decide by this list which layers they build packed; a wrong entry is a wrong model there."""
    for seed in (0, 1):
        stored = tensors_of(made("int4", seed))
        plain = {n.removesuffix(".weight") for n, t in stored.items() if n.endswith(".weight") and t.dim() == 2}
        assert set(config_of(made("int4", seed))["quantization_config"]["ignore"]) == plain


def test_the_same_twice_is_the_same_bytes(made: Made, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(made("bf16", 0), tmp_path / name, "fp8", max_shard_bytes=300_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.fixture
def with_tokenizer(copied: Made) -> Path:
    directory = copied("bf16", -1, vocab_size=300)
    train_tokenizer(["the whale takes in a whole ocean, and gives it back " * 20], 300).save(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }} 鲸")
    (directory / "special_tokens_map.json").write_text('{"bos_token": "x"}')
    (directory / "generation_config.json").write_text('{"temperature": 0.123}')
    return directory


def test_side_files_come_along(with_tokenizer: Path, tmp_path: Path) -> None:
    convert(with_tokenizer, tmp_path / "out", "int8")
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
             "generation_config.json"}  # fmt: skip
    made, given = contents(tmp_path / "out"), contents(with_tokenizer)
    assert all(made[name] == given[name] for name in names)
    assert made.keys() == names | {"config.json", SUMS, "model.safetensors", "model.safetensors.index.json"}


def test_progress_grows_to_the_total(made: Made, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = convert(made("bf16", 0), tmp_path / "out", "fp8", max_shard_bytes=300_000,
                   progress=lambda *at: seen.append(at))  # fmt: skip
    assert seen == sorted(seen) and len(seen) > 20
    assert seen[-1] == (done.total_bytes, done.total_bytes)
    assert {total for _, total in seen} == {done.total_bytes}


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Runs in a child; the signal that killed it, 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


class Clock:
    """Counts the lines that the checkpoint package runs, and kills the process at one of them."""

    def __init__(self, kill_at: int = -1) -> None:
        self.lines, self.kill_at = 0, kill_at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if "checkpoint" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_killed_at_any_line_and_resumed(made: Made, to: str, tmp_path: Path) -> None:
    """Every attempt is killed a random number of lines in, until one gets through; as an impatient operator might."""
    src, options = made("bf16", -1), {"max_shard_bytes": 60_000}
    clock = Clock()
    sys.settrace(clock)
    try:
        convert(src, tmp_path / "whole", to, **options)
    finally:
        sys.settrace(None)
    whole = contents(tmp_path / "whole")
    assert len([f for f in whole if f.endswith(".safetensors")]) >= 3
    rng = random.Random(7)
    for round_ in range(2):
        dst = tmp_path / f"killed-{round_}"
        kills, finished = 0, {}
        while not dst.exists():
            # early kills too, but mostly late ones, where directories move and files are listed
            at = rng.randint(1, clock.lines) if rng.random() < 0.7 else clock.lines - rng.randint(0, 150)

            def attempt(at: int = at, dst: Path = dst) -> None:
                sys.settrace(Clock(at))
                convert(src, dst, to, **options)

            killed = forked(attempt)
            assert killed in (0, signal.SIGKILL)
            kills += killed > 0
            if dst.exists():
                break
            journal = building(dst) / "convert.json"
            noted = json.loads(journal.read_text())["sums"] if journal.exists() else {}
            now = identities(building(dst)) if building(dst).exists() else {}
            for file in noted:
                assert finished.get(file, now[file]) == now[file], "a finished shard was written again"
            finished = {file: now[file] for file in noted}
            if kills == 8:
                convert(src, dst, to, **options)
        assert contents(dst) == whole
        assert not building(dst).exists()
        assert all(identities(dst)[file] == at for file, at in finished.items())


def test_killed_as_a_command_and_given_again(made: Made, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    command = [sys.executable, "-m", "rorqual", "convert", str(made("bf16", 4, n_routed_experts=64)), str(dst),
               "--to", "int4", "--max-shard-gb", "0.001"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(building(dst).glob("*.safetensors")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    journal = building(dst) / "convert.json"
    left = json.loads(journal.read_text())["sums"] if journal.exists() else {}
    before = identities(building(dst)) if building(dst).exists() else {}
    if not dst.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    after = identities(dst)
    assert all(after[file] == before[file] for file in left)
    convert(made("bf16", 4, n_routed_experts=64), tmp_path / "whole", "int4", max_shard_bytes=1_000_000)
    assert contents(dst) == contents(tmp_path / "whole")


def test_killed_at_the_very_end_keeps_every_shard(made: Made, tmp_path: Path) -> None:
    """All shards are written and the directory is about to get its name: no moment at which hours of work are lost."""
    src, dst = made("bf16", -1), tmp_path / "out"

    def killed_there() -> None:
        module.move_into_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        convert(src, dst, "fp8", max_shard_bytes=60_000)

    assert forked(killed_there) == signal.SIGKILL
    left = identities(building(dst))
    assert len(left) > 3
    convert(src, dst, "fp8", max_shard_bytes=60_000)
    assert identities(dst) == left


def test_finished_shards_are_kept(made: Made, tmp_path: Path) -> None:
    src, dst = made("bf16", 0), tmp_path / "out"
    left = interrupted(src, dst, "fp8", 3, max_shard_bytes=200_000)
    convert(src, dst, "fp8", max_shard_bytes=200_000)
    after = identities(dst)
    assert {f: after[f] for f in list(left)[:3] if after[f] == left[f]} == left
    convert(src, tmp_path / "fresh", "fp8", max_shard_bytes=200_000)
    assert contents(dst) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_a_finished_shard_that_changed_is_written_again(made: Made, damage: str, tmp_path: Path) -> None:
    src, dst = made("bf16", 0), tmp_path / "out"
    left = interrupted(src, dst, "fp8", 3, max_shard_bytes=200_000)
    first, second, _ = sorted(left)
    victim = building(dst) / second
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        victim.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    convert(src, dst, "fp8", max_shard_bytes=200_000)
    assert identities(dst)[first] == left[first]
    convert(src, tmp_path / "fresh", "fp8", max_shard_bytes=200_000)
    assert contents(dst) == contents(tmp_path / "fresh")


def other_value(src: Path) -> None:
    stored = tensors_of(src)
    stored["model.norm.weight"] += 1
    put_tensors(src, stored)


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "target": ({"to": "int8"}, lambda src: None),
    "shards": ({"max_shard_bytes": 150_000}, lambda src: None),
    "scales": ({"scale_fmt": "ue8m0"}, lambda src: None),
    "embeddings": ({"to": "int4", "embeddings": False}, lambda src: None),
    "weights": ({}, other_value),
    "config": ({}, lambda src: set_config(src, rms_norm_eps=1e-5)),
    "tokenizer": ({}, lambda src: (src / "tokenizer.json").write_text("{}")),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_another_conversion_is_not_resumed(copied: Made, kind: str, tmp_path: Path) -> None:
    """Nothing of the old one may be in the result."""
    changes, change_source = CHANGES[kind]
    src, dst = copied("bf16", 0), tmp_path / "out"
    options = {"to": "int4" if kind == "embeddings" else "fp8", "max_shard_bytes": 200_000}
    interrupted(src, dst, shards=2, **options)
    (building(dst) / "model-00009-of-00009.safetensors.part").write_bytes(b"half")
    change_source(src)
    convert(src, dst, **{**options, **changes})
    convert(src, tmp_path / "fresh", **{**options, **changes})
    assert contents(dst) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("journal", [b"", b"{", b"[]", b"null", b"\xff", b'{"fingerprint": 3}'])
def test_a_damaged_journal_starts_afresh(made: Made, journal: bytes, tmp_path: Path) -> None:
    src, dst = made("bf16", -1), tmp_path / "out"
    interrupted(src, dst, "fp8", 2, max_shard_bytes=60_000)
    (building(dst) / "convert.json").write_bytes(journal)
    convert(src, dst, "fp8", max_shard_bytes=60_000)
    convert(src, tmp_path / "fresh", "fp8", max_shard_bytes=60_000)
    assert contents(dst) == contents(tmp_path / "fresh")


def test_a_full_disk_is_reported_and_resumed_from(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = made("bf16", -1), tmp_path / "out"
    good, calls = module.write_shard, []

    def full(path: Path, *rest: Any) -> str:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return good(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", full)
        with pytest.raises(CheckpointError, match="No space left") as caught:
            convert(src, dst, "fp8", max_shard_bytes=60_000)
    assert caught.value.remedy and not dst.exists()
    left = identities(building(dst))
    assert len(left) == 2
    convert(src, dst, "fp8", max_shard_bytes=60_000)
    assert {f: identities(dst)[f] for f in left} == left
    convert(src, tmp_path / "fresh", "fp8", max_shard_bytes=60_000)
    assert contents(dst) == contents(tmp_path / "fresh")


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file"])
def test_what_exists_is_left_alone(made: Made, kind: str, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    if kind == "file":
        dst.write_text("mine")
    else:
        dst.mkdir()
        if kind == "directory":
            (dst / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out exists"):
        convert(made("bf16", -1), dst, "fp8")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert kind == "empty directory" or (dst if kind == "file" else dst / "mine").read_text() == "mine"


def test_a_dangling_link_is_refused_before_the_work(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"out exists"):
        convert(made("bf16", -1), tmp_path / "out", "fp8")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_appears_during_a_conversion_is_left_alone(made: Made, tmp_path: Path) -> None:
    """A conversion takes hours; whoever used the name meanwhile keeps what is there."""
    dst = tmp_path / "out"

    def progress(done: int, total: int) -> None:
        dst.mkdir(exist_ok=True)
        (dst / "mine").write_text("mine")

    with pytest.raises(CheckpointError, match=r"out exists"):
        convert(made("bf16", -1), dst, "fp8", progress=progress)
    assert (dst / "mine").read_text() == "mine"


def test_sums_are_those_of_sha256sum(made: Made, tmp_path: Path) -> None:
    convert(made("bf16", 0), tmp_path / "out", "fp8", max_shard_bytes=300_000)
    lines = (tmp_path / "out" / SUMS).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["flip", "remove", "outside", "not text", "blank line"])
def test_a_source_that_is_not_what_its_sums_say(made: Made, damage: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    convert(made("bf16", -1), src, "bf16", max_shard_bytes=60_000)
    victim = sorted(src.glob("*.safetensors"))[2]
    sums = src / SUMS
    if damage == "flip":
        content = victim.read_bytes()
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        sums.write_text(sums.read_text() + f"{'0' * 64}  {(victim := src / 'gone.safetensors').name}\n")
    elif damage == "outside":
        sums.write_text(sums.read_text() + f"{'0' * 64}  ../{victim.name}\n")
    elif damage == "not text":
        sums.write_bytes(sums.read_bytes() + b"\xff\xfe\n")
        victim = sums
    else:  # says nothing, and sha256sum passes over it with a warning
        sums.write_text(sums.read_text() + "\n")
        convert(src, tmp_path / "out", "fp8")
        return
    with pytest.raises(CheckpointError, match=victim.name):
        convert(src, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


def test_a_source_as_it_was_written_passes_its_sums(made: Made, tmp_path: Path) -> None:
    convert(made("bf16", -1), tmp_path / "src", "bf16", max_shard_bytes=60_000)
    assert module.verify_sums(tmp_path / "src") and not module.verify_sums(made("bf16", -1))
    convert(tmp_path / "src", tmp_path / "out", "fp8")
    text = (tmp_path / "src" / SUMS).read_text()
    (tmp_path / "src" / SUMS).write_text(text.replace("  ", " *"))  # binary mode is written so
    assert module.verify_sums(tmp_path / "src")


def test_unknown_targets_and_scales(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bf16, fp16, fp32, fp8, int8, int4"):
        convert(made("bf16", -1), tmp_path / "out", "int3")
    with pytest.raises((CheckpointError, ConfigError), match="ue7m1") as caught:
        convert(made("bf16", -1), tmp_path / "out", "fp8", scale_fmt="ue7m1")
    assert "damaged" not in str(caught.value), "the source is not at fault"
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written(made: Made, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        convert(made("bf16", -1), tmp_path / "file" / "out", "fp8")


def test_leftover_rotary_tables_are_dropped(copied: Made, tmp_path: Path) -> None:
    src = copied("bf16")
    good = tensors_of(src)
    put_tensors(src, {**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    convert(src, tmp_path / "out", "bf16")
    same_bytes(good, tensors_of(tmp_path / "out"))


# ---- memory ------------------------------------------------------------------------------------------------------------


def mapped_files(directory: Path) -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if f"{directory}/" in line})


def scatter(src: Path, target: Path, shards: int) -> None:
    """The same tensors, dealt out over files without any order, as no writer does but any may."""
    shutil.copytree(src, target)
    stored = tensors_of(target)
    put_tensors(target, stored)
    (target / "model.safetensors").unlink()
    from safetensors.torch import save_file

    names = sorted(stored)
    random.Random(3).shuffle(names)
    for i in range(shards):
        save_file({n: stored[n].clone() for n in names[i::shards]}, target / f"part-{i}.safetensors")


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("start", "to"), [
    ("bf16", "bf16"), ("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8"), ("int4", "bf16"), ("int4", "int4"),
])  # fmt: skip
def test_two_source_shards_are_mapped_at_most(made: Made, start: str, to: str, scattered: bool, tmp_path: Path) -> None:
    src = tmp_path / "src"
    if scattered:
        scatter(made(start, -1), src, 8)
    else:
        convert(made(start, -1), src, start, max_shard_bytes=30_000)
    assert len(list(src.glob("*.safetensors"))) >= 4
    seen: list[int] = []

    convert(src, tmp_path / "out", to, progress=lambda *_: seen.append(mapped_files(src)))
    assert 1 <= max(seen) <= 2, max(seen)


def private_bytes() -> int:
    """Of this process, without what it maps from files that it has not written to."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("start", "to"), [
    ("bf16", "bf16"), ("bf16", "fp32"), ("bf16", "fp8"), ("bf16", "int4"), ("bf16", "int8"), ("fp8", "bf16"),
    ("fp8", "fp8"), ("int4", "fp8"),
])  # fmt: skip
def test_memory_holds_a_tensor_not_a_shard(start: str, to: str, tmp_path: Path) -> None:
    """30 M weights in one output shard, the largest matrix 0.25 M: a few megabytes of working memory are enough."""
    cfg = ModelConfig(**{**SMALL, "hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 36,
                         "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0})  # fmt: skip
    save_model(build(cfg, 0, dtype=torch.bfloat16), tmp_path / "plain")
    src = tmp_path / "plain"
    if start != "bf16":
        convert(src, src := tmp_path / "src", start)
    gc.collect()
    before, peak = private_bytes(), 0

    def progress(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, private_bytes() - before)

    done = convert(src, tmp_path / "out", to, progress=progress)
    assert len(done.files) == 1
    assert peak < 12_000_000, f"{peak:,} bytes for a shard of {done.total_bytes:,}"


# ---- the command -------------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code: Any = 0
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        code = end.code or 0
    return (code, *capsys.readouterr())


def test_the_command_prints_perplexity_before_and_after(
    with_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import math
    import re

    from rorqual.data.tokenizer import Tokenizer

    text = tmp_path / "text.txt"
    text.write_text("a whole ocean takes in the whale " * 10)
    code, out, err = command(capsys, "convert", with_tokenizer, tmp_path / "out", "--to", "int4", "--text", text)
    assert code == 0, err
    found = re.search(r"perplexity on .*: ([\d.]+) before, ([\d.]+) after \(([+-][\d.]+)%\)", out)
    assert found
    before, after, percent = (float(x) for x in found.groups())
    assert before != after and abs(percent - 100 * (after / before - 1)) < 0.02
    tokenizer = Tokenizer.load(with_tokenizer)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text.read_text())]])
    assert 2 < ids.shape[1] < 500
    for directory, printed in ((with_tokenizer, before), (tmp_path / "out", after)):
        with torch.inference_mode():
            scores = load_model(directory, dtype=torch.float32)(ids)[0, :-1].log_softmax(-1)
        loss = -scores.gather(1, ids[0, 1:, None]).mean().item()
        assert abs(math.exp(loss) - printed) <= 1e-3 * printed


def test_the_command_lists_its_targets(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "convert", made("bf16", -1), tmp_path / "out", "--to", "int3")
    assert code == 1 and not out
    assert "Traceback" not in err
    assert all(target in err for target in (*TARGETS, "gguf", "int3"))


def test_the_command_refuses_an_existing_place(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    code, out, err = command(capsys, "convert", made("bf16", -1), tmp_path / "out")
    assert code == 1 and not out and "exists" in err and "remove it" in err


def test_the_command_warns_of_odd_widths(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "convert", made("bf16", 0), tmp_path / "out", "--to", "int4")
    kept = [n for n in tensors_of(tmp_path / "out") if n.endswith("_proj.weight") and "eh_proj" not in n]
    assert code == 0 and kept
    assert f"warning: {len(kept)} matrices stay bf16" in err and "multiple of 32" in err
    code, out, err = command(capsys, "convert", made("bf16", 0), tmp_path / "fp8", "--to", "fp8")
    assert code == 0 and "warning" not in err
    total = sum(t.nbytes for t in tensors_of(tmp_path / "fp8").values())
    assert f"{total:,} bytes in 1 file" in out


def test_the_command_cuts_and_scales_as_told(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "convert", made("bf16", 4), tmp_path / "out", "--to", "fp8",
                             "--scale-fmt", "ue8m0", "--max-shard-gb", "0.001")  # fmt: skip
    assert code == 0, err
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and f"in {len(files)} files" in out
    same_bytes(tensors_of(tmp_path / "out"), tensors_of(made("fp8+ue8m0", 4)))


def test_the_conversion_tells_what_it_could_not_pack(made: Made, tmp_path: Path) -> None:
    done = convert(made("bf16", 0), tmp_path / "out", "int8")
    stored = tensors_of(tmp_path / "out")
    assert done.kept_plain and all(stored[name].shape[1] % 32 for name in done.kept_plain)
