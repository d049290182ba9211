"""Runs the snippets of docs/clients.md with the clients themselves, against the bundled model and a scripted one.

    python scripts/clients.py [--quick] [NAME ...]

Each client has an environment of its own under out/clients, because they want different versions of one another; those
that are part of the development environment are taken from there. --quick: only these and the ones of Node. A snippet
passes if it streams text, has a tool called with arguments that fit, and reads the usage that the server counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rorqual.cli.scripted_server import scripted_server
from rorqual.config import DEFAULT_MODEL, resolve_model
from rorqual.data.special import TOOL_CALLS_BEGIN
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import tool_calls
from rorqual.engine.scripted import Script

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "clients.md"
CACHE = ROOT / "out" / "clients"
ADDRESS = "http://127.0.0.1:8000"
SAID = "Rivers bring salt to the sea."


@dataclass(frozen=True)
class Snippet:
    """One client's: its section's title, what to install with pip or npm, and the code."""

    name: str
    packages: tuple[str, ...]
    code: str
    node: bool

    @property
    def here(self) -> bool:
        """Whether the development environment has it."""
        return not self.node and self.packages[0] in ("openai", "anthropic")


def snippets() -> list[Snippet]:
    found = []
    for section in GUIDE.read_text(encoding="utf-8").split("\n## ")[1:]:
        block = re.search(r"```(python|javascript)\n(.*?)```", section, re.DOTALL)
        if block:
            first = block[2].splitlines()[0]
            packages = re.sub(r"^(# pip|// npm) install ", "", first).split()
            found.append(Snippet(section.splitlines()[0], tuple(packages), block[2], block[1] == "javascript"))
    return found


# ---- the clients ----------------------------------------------------------------------------------------------------


def command(snippet: Snippet, code: Path) -> list[str]:
    """What runs the code; the environment is made where it is missing."""
    folder = code.parent
    if snippet.node:
        if not (folder / "node_modules" / snippet.packages[0]).exists():
            (folder / "package.json").write_text('{"private": true}\n')
            npm = shutil.which("npm")
            assert npm, "Node's clients need npm"
            subprocess.run(
                [npm, "install", "--silent", "--no-audit", "--no-fund", *snippet.packages], cwd=folder, check=True
            )
        return ["node", str(code)]
    if snippet.here:
        return [sys.executable, str(code)]
    python = folder / "venv" / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder / "venv", with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *snippet.packages]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        ready.touch()
    return [str(python), str(code)]


def run(snippet: Snippet, url: str) -> str:
    """What it printed. Raises CalledProcessError."""
    folder = CACHE / re.sub(r"\W+", "-", snippet.name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / ("snippet.mjs" if snippet.node else "snippet.py")
    code.write_text(snippet.code.replace(ADDRESS, url), encoding="utf-8")
    done = subprocess.run(command(snippet, code), capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-3000:])
    return done.stdout


def judge(printed: str, scripted: bool) -> None:
    """Raises AssertionError with what was printed instead."""
    usage = re.search(r"^usage: (\d+) \+ (\d+)$", printed, re.MULTILINE)
    assert usage and int(usage[1]) > 3 and int(usage[2]) > 3, f"no usage in {printed!r}"
    tool = re.search(r"^tool: [Ww]eather (.*)$", printed, re.MULTILINE)
    assert tool, f"no tool call in {printed!r}"
    assert json.loads(tool[1].replace("'", '"'))["city"] in ("Paris", "Rome")
    text = printed.partition("\nusage:" if not printed.startswith("city=") else "tool:")[0]
    assert "city=" in text or (SAID in text if scripted else len(text) > 20), f"no text in {printed!r}"


# ---- the servers ----------------------------------------------------------------------------------------------------


def scripts(directory: Path) -> list[Script]:
    """A sentence; with tools in the prompt a call of the first of them."""
    tokenizer = Tokenizer.load(directory)
    begin = tokenizer.special(TOOL_CALLS_BEGIN)

    def call(prompt: tuple[int, ...]) -> list[int]:
        name = re.findall(r"### (\w+)", tokenizer.decode(prompt))[0]
        calls = [{"function": {"name": name, "arguments": '{"city": "Rome"}'}}]
        return [
            token
            for segment in tool_calls("bare", calls)
            for token in ([tokenizer.special(segment.text)] if segment.special else tokenizer.encode(segment.text))
        ]

    return [Script(tokens=call, when=lambda prompt: begin in prompt), Script(tokens=tokenizer.encode(SAID))]


@contextlib.contextmanager
def bundled() -> Iterator[str]:
    """`rorqual serve` with the bundled model."""
    serve = [sys.executable, "-m", "rorqual", "serve", "--port", "0"]
    process = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"chat: (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1]
                return
        raise AssertionError("".join(lines))
    finally:
        process.terminate()
        process.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    chosen = [s for s in snippets() if not options.names or any(name in s.name for name in options.names)]
    if options.quick:
        chosen = [s for s in chosen if s.node or s.here]
    failed = 0
    directory = resolve_model(DEFAULT_MODEL)
    with scripted_server(directory, partial(scripts)) as server, bundled() as url:
        for snippet in chosen:
            for kind, address in (("scripted", server.url), ("bundled", url)):
                began = time.monotonic()
                try:
                    judge(run(snippet, address), kind == "scripted")
                    said = "ok"
                except (AssertionError, subprocess.SubprocessError, ValueError) as error:
                    failed, said = failed + 1, f"FAILED: {error}"
                print(f"{snippet.name}, {kind}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
