"""`rorqual handoff`: what it prints is a shell script."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from rorqual.checkpoint import save_model
from rorqual.checkpoint.convert import convert
from rorqual.checkpoint.lint import lint
from rorqual.cli.handoff import handoff
from rorqual.cli.main import main
from rorqual.config import DEFAULT_MODEL, ModelConfig, resolve_model
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from rorqual.plan.handoff import plan

SMALL = ModelConfig.load("test")
app = typer.Typer()
app.command()(handoff)


def run(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model of the kind that every engine serves."""
    torch.manual_seed(0)
    save_model(Transformer(SMALL), tmp_path / "a model")
    return tmp_path / "a model"


def test_the_whole_output_is_valid_bash_with_every_command(plain: Path) -> None:
    """Reasons are comments, commands stand free; nothing else is there."""
    shown, facts = run(str(plain)), plan(plain)
    checked = subprocess.run(["bash", "-n"], input=shown, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    commands = [c for engine in facts["engines"] for c in engine["commands"]]
    assert len(commands) == 4 and all(c in shown for c in commands)
    bare = shown
    for command in commands:
        bare = bare.replace(command, "")
    assert all(line.startswith("#") or not line for line in bare.splitlines())
    for engine in facts["engines"]:
        assert engine["engine"] in shown and engine["endpoint"] in shown
        assert all(reason in shown for reason in (*engine["reasons"], *engine["warnings"]))


def test_json_is_the_plan() -> None:
    shown = json.loads(run(DEFAULT_MODEL, "--json", "--gpu-gb", "24"))
    assert shown == plan(resolve_model(), 24) and not engines_that_refuse(shown).get("llama.cpp")


@pytest.mark.parametrize(("tied", "storage"), [(True, "int4"), (False, "int4"), (True, "bf16")])
def test_an_embedding_that_is_packed_or_tied_is_converted_first(
    tied: bool, storage: str, plain: Path, tmp_path: Path
) -> None:
    """For those of whom lint says that they do not read it; the command that stands there makes what nobody refuses."""
    save_model(Transformer(SMALL.replace(tie_word_embeddings=tied)), plain)
    stored = tmp_path / "stored so"
    convert(plain, stored, storage)
    ids = ("embedding-packed", "embedding-packed-tied", "tied-without-head")
    unread = {engine for f in lint(stored).findings if f.id in ids for engine in f.engines}
    refused = engines_that_refuse(plan(stored))
    assert set(refused) == unread - {"transformers"}
    assert "embedding" in refused["SGLang"] and refused["SGLang"] in run(str(stored))
    command, then = shlex.split(refused["SGLang"].split("`")[1]), shlex.split(refused["SGLang"].split("`")[3])
    with pytest.raises(SystemExit) as ended:
        main(command[1:])
    assert not ended.value.code and then[:2] == ["rorqual", "handoff"]
    assert not engines_that_refuse(plan(Path(then[2]))) and not {f.id for f in lint(then[2]).findings} & {*ids}


def engines_that_refuse(facts: dict[str, Any]) -> dict[str, str]:
    return {engine["engine"]: engine["refused"] for engine in facts["engines"] if engine["refused"]}


def test_a_refusal_is_shown_in_place_of_commands(tmp_path: Path) -> None:
    cfg = ModelConfig.load("nano").replace(n_group=2, topk_group=2)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json()))
    shown = run(str(tmp_path))
    assert (
        "cannot serve it: topk_group = n_group = 2" in shown and "llama-server" not in shown and "vllm serve" in shown
    )


def test_no_model_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=DEFAULT_MODEL):
        CliRunner().invoke(app, ["no-such-model"], catch_exceptions=False)
