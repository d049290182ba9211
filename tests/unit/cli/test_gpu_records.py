"""`scripts/gpu_records.py`: its command lines are right, and what is done, late or broken is told apart."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer

from rorqual.cli.bench_report import commit
from rorqual.cli.inspect import find
from rorqual.cli.main import app

ROOT = Path(__file__).parents[3]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_records")


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line understands. Raises click.UsageError for a misspelt option or a value of the wrong kind."""
    command: click.Command = typer.main.get_command(app)
    while (inner := getattr(command, "commands", None)) is not None:
        command, words = inner[words[0]], words[1:]
    return command.make_context("rorqual", words).params


@pytest.mark.parametrize("small", [False, True], ids=["measured", "rehearsed"])
def test_every_command_line_is_understood(small: bool, records: ModuleType) -> None:
    compare = importlib.util.spec_from_file_location("compare", ROOT / "runs" / "fp8-parity" / "compare.py")
    assert compare is not None and compare.loader is not None
    module = importlib.util.module_from_spec(compare)
    compare.loader.exec_module(module)
    for part in records.PARTS:
        words = records.command(part, Path("out"), small)
        assert words[0] == sys.executable and not any("{" in word for word in words)
        if words[1:3] == ["-m", "rorqual"]:
            told = parsed(words[3:])
            assert told["device"] == ("cpu" if small else "cuda"), part.name
            assert told["json_file"] == Path("out") / part.record
            if name := told.get("layers") or told.get("model"):
                assert find(name).num_hidden_layers
        elif words[1].endswith("compare.py"):
            assert module.arguments().parse_args(words[2:]).out == Path("out/parity")
        else:
            assert words[1:3] == ["-m", "pytest"]
            assert (ROOT / next(word for word in words if word.startswith("tests/"))).is_file()


def test_each_record_and_test_file_has_its_part(records: ModuleType) -> None:
    names = [part.name for part in records.PARTS]
    files = [part.record for part in records.PARTS if part.record]
    assert len(set(names)) == len(names) and len(set(files)) == len(files)
    old = {file.name for file in (ROOT / "benchmarks").glob("gpu-*.json")}
    assert old <= {*files}, "what is in benchmarks/ can be measured again"
    tested = {word for part in records.PARTS for word in shlex.split(part.command) if word.startswith("tests/")}
    assert tested == {f"tests/gpu/{file.name}" for file in (ROOT / "tests" / "gpu").glob("test_*.py")}


def part(records: ModuleType, name: str, code: str, **more: Any) -> Any:
    return records.Part(name, "tests", more.pop("seconds", 1), f"python -c {shlex.quote(code)}", **more)


def go(
    records: ModuleType, out: Path, parts: list[Any], within: float = 60.0, gpus: int = 1
) -> tuple[bool, dict[str, str]]:
    (out / "logs").mkdir(parents=True, exist_ok=True)
    run = records.Run(out, False, within, [str(i) for i in range(gpus)], 2)
    return run.all(parts), run.results


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_is_done_is_not_run_again(gpus: int, records: ModuleType, tmp_path: Path) -> None:
    append = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); print('said')"
    broken = part(records, "broken", "import sys; print('why'); sys.exit(3)", lane="beside")
    parts = [part(records, "a", append), broken, part(records, "c", append, lane="beside", after="broken")]
    ok, results = go(records, tmp_path / "out", parts, gpus=gpus)
    assert not ok and "said" in results["a"] and "FAILED with 3" in results["broken"] and "why" in results["broken"]
    assert results["c"] == "left out: it needs broken"
    parts[1] = part(records, "broken", "print('mended')", lane="cpu")
    ok, results = go(records, tmp_path / "out", parts, gpus=gpus)
    assert ok and results["a"] == "done before" and (tmp_path / "ran").read_text() == "xx"


def test_time_that_is_up_ends_a_part_and_starts_no_other(records: ModuleType, tmp_path: Path) -> None:
    slow = part(records, "slow", "import time; print('begun', flush=True); time.sleep(600)")
    ok, results = go(records, tmp_path, [slow, part(records, "next", "print(1)")], within=2.0)
    assert not ok and "FAILED with time" in results["slow"] and "do not fit" in results["next"]
    assert (tmp_path / "logs" / "slow.failed.txt").read_text() == "begun\n"


def test_a_part_that_keeps_what_it_did_begins_where_some_of_it_fits(records: ModuleType, tmp_path: Path) -> None:
    parts = [part(records, f"least{n}", "print(1)", seconds=900, least=n) for n in (5, 200)]
    ok, results = go(records, tmp_path, parts, within=60.0)
    assert not ok and results["least5"].startswith("0 s, expected 900") and "200 s do not fit" in results["least200"]


def test_only_measurements_are_collected(records: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.subprocess, "run", lambda *_, **__: None)
    out, target = tmp_path / "out", tmp_path / "benchmarks"
    (out / "logs").mkdir(parents=True)
    target.mkdir()
    for name in ("gpu-serve.json", "gpu-mtp.json"):
        (out / name).write_text(json.dumps({"name": name}))
    (out / "logs" / "serve.txt").touch()
    (out / "logs" / "mtp.failed.txt").touch()
    records.collect(out, target)
    assert [file.name for file in target.iterdir()] == ["gpu-serve.json"]
    (out / "REHEARSAL").touch()
    with pytest.raises(SystemExit):
        records.collect(out, target)


def test_a_copy_says_the_commit_that_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RORQUAL_COMMIT", "abc1234")
    assert commit() == "abc1234"
