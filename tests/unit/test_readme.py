"""The README's commands do what they say: its shell lines and its Python are run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Every `rorqual` command line but the server, continuation lines joined, comments cut."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"\s+#.*", "", line) for line in lines if line.startswith(".venv/bin/rorqual")]
    return [c for c in found if " serve" not in c and c != ".venv/bin/rorqual chat"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, so that `out/` lands in it."""
    for name in ("runs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_shell_commands_run_in_order(place: Path) -> None:
    assert len(commands()) >= 6
    for command in commands():
        line = command.replace(".venv/bin/rorqual", f"{sys.executable} -m rorqual")
        done = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "inspect" in command:
            assert "671,026,419,200" in done.stdout and "37.55 B" in done.stdout and "70,272" in done.stdout
        if "--think" in command:
            assert "47" in done.stdout


def test_the_python_example_runs(place: Path) -> None:
    [code] = [b for b in blocks("python") if "LLM(" in b]
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "completion_tokens=40" in done.stdout or "stop" in done.stdout


def test_what_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
