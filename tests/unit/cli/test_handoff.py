"""`rorqual handoff`: what it prints is a shell script."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rorqual.cli.handoff import handoff
from rorqual.config import ModelConfig, resolve_model
from rorqual.errors import ConfigError
from rorqual.plan.handoff import plan

app = typer.Typer()
app.command()(handoff)


def run(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_whole_output_is_valid_bash_with_every_command() -> None:
    """Reasons are comments, commands stand free; nothing else is there."""
    shown, facts = run("rorqual-nano"), plan(resolve_model("rorqual-nano"))
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
    assert json.loads(run("rorqual-nano", "--json", "--gpu-gb", "24")) == plan(resolve_model("rorqual-nano"), 24)


def test_a_refusal_is_shown_in_place_of_commands(tmp_path: Path) -> None:
    cfg = ModelConfig.load("nano").replace(n_group=2, topk_group=2)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json()))
    shown = run(str(tmp_path))
    assert (
        "cannot serve it: topk_group = n_group = 2" in shown and "llama-server" not in shown and "vllm serve" in shown
    )


def test_no_model_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match="rorqual-nano"):
        CliRunner().invoke(app, ["no-such-model"], catch_exceptions=False)
