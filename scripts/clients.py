"""Runs the snippets of docs/clients.md with the clients themselves, against the bundled model and a scripted one.

    python scripts/clients.py [--quick] [NAME ...]

Each client has an environment of its own under out/clients, because they want different versions of one another; those
that are part of the development environment are taken from there. --quick: only these and the ones of Node. A snippet
passes if it streams text, has a tool called with arguments that fit, and reads the usage that the server counted; aider's
and Continue's if they wrote a file as the script says, and answered a question. Open WebUI (3 GB, and a browser walks
through it: open_webui.py) runs only where it is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rorqual.cli.scripted_server import scripted_server
from rorqual.config import DEFAULT_MODEL, resolve_model
from rorqual.data.special import TOOL_CALLS_BEGIN, TOOL_OUTPUT_BEGIN
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import tool_calls
from rorqual.engine.scripted import Script

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "clients.md"
CACHE = ROOT / "out" / "clients"
ADDRESS = "http://127.0.0.1:8000"
SAID = "Rivers bring salt to the sea."
ASKED, TITLE, TAG = "# Why is the sea salty?", "Salt in the sea", "rivers"

# What aider and Open WebUI ask for in words, and an answer of the form that they read.
FORMS = {
    "MUST use this *file listing* format": f"sea.md\n```\n{ASKED}\n\n{SAID}\n```\n",
    "Generate a concise title": json.dumps({"title": TITLE}),
    "Generate 1-3 broad tags": json.dumps({"tags": [TAG]}),
}
SUFFIXES = {"python": "py", "javascript": "mjs", "sh": "sh"}

# What keeps aider and Continue to themselves: no reports of their use, no look for a newer one, no page in a browser.
ALONE = {
    "AIDER_ANALYTICS_DISABLE": "true",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_SHOW_MODEL_WARNINGS": "false",
    "AIDER_SHOW_RELEASE_NOTES": "false",
    "BROWSER": "true",
    "CONTINUE_TELEMETRY_ENABLED": "0",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
}


@dataclass(frozen=True)
class Snippet:
    """One client's: its section's title, what to install with what (pip, npm), and the code in a language of SUFFIXES."""

    name: str
    language: str
    installer: str
    packages: tuple[str, ...]
    code: str

    @property
    def quick(self) -> bool:
        """Whether the development environment has it, or npm in seconds."""
        return self.packages[0] in ("openai", "anthropic", "ai")

    @property
    def heavy(self) -> bool:
        return self.packages[0] == "open-webui"


def snippets() -> list[Snippet]:
    found = []
    for section in GUIDE.read_text(encoding="utf-8").split("\n## ")[1:]:
        block = re.search(r"```(\w+)\n(?:#|//) (pip|npm) install (.*?)\n(.*?)```", section, re.DOTALL)
        if block:
            language, installer, packages, code = block.groups()
            found.append(Snippet(section.splitlines()[0], language, installer, tuple(packages.split()), code))
    return found


# ---- the clients ----------------------------------------------------------------------------------------------------


def installed(snippet: Snippet, folder: Path) -> list[str]:
    """What runs its code; the environment is made in the folder where it is missing."""
    if snippet.installer == "npm":
        if not (folder / "node_modules" / snippet.packages[0]).exists():
            (folder / "package.json").write_text('{"private": true}\n')
            npm = shutil.which("npm")
            assert npm, "Node's clients need npm"
            subprocess.run(
                [npm, "install", "--silent", "--no-audit", "--no-fund", *snippet.packages], cwd=folder, check=True
            )
        return ["sh"] if snippet.language == "sh" else ["node"]
    if snippet.quick:
        return [sys.executable]
    python = folder / "venv" / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder / "venv", with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if snippet.heavy:  # first and by itself, as in setup.sh: else gigabytes for a GPU come along
            index = ["--retries", "0", "--timeout", "10", "--index-url", "https://download.pytorch.org/whl/cpu"]
            if subprocess.run([*pip, *index, "torch==2.13.0"], stderr=subprocess.DEVNULL, check=False).returncode:
                subprocess.run([*pip, "torch==2.13.0"], check=True, stderr=subprocess.DEVNULL)
        subprocess.run([*pip, *snippet.packages], check=True, stderr=subprocess.DEVNULL)
        ready.touch()
    return ["sh"] if snippet.language == "sh" else [str(python)]


def prepare(snippet: Snippet, url: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs it, and the environment: the client's programs first, and a home that is not the user's."""
    folder = CACHE / re.sub(r"\W+", "-", snippet.name).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    code = folder / f"snippet.{SUFFIXES[snippet.language]}"
    code.write_text(snippet.code.replace(ADDRESS, url), encoding="utf-8")
    environment = dict(os.environ)
    if snippet.language == "sh":
        path = [str(folder / "venv" / "bin"), str(folder / "node_modules" / ".bin"), os.environ["PATH"]]
        environment |= {"PATH": os.pathsep.join(path), "HOME": str(folder), **ALONE}
    return [*installed(snippet, folder), str(code)], environment


def run(snippet: Snippet, url: str) -> str:
    """What it printed, in a folder of its own: aider and Continue write there. Raises AssertionError where it failed."""
    command, environment = prepare(snippet, url)
    with tempfile.TemporaryDirectory() as folder:
        # Without a terminal they ask nothing.
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
    if done.returncode:
        raise AssertionError(done.stdout[-1000:] + done.stderr[-3000:])
    return done.stdout


def check(snippet: Snippet, url: str, scripted: bool) -> None:
    """Raises AssertionError, or what its program did."""
    if snippet.heavy:
        from open_webui import walk

        walk(*prepare(snippet, url), scripted)
    elif snippet.language == "sh":
        (judge_edit if "aider" in snippet.name else judge_write)(run(snippet, url), scripted)
    else:
        judge(run(snippet, url), scripted)


def judge(printed: str, scripted: bool) -> None:
    """Raises AssertionError with what was printed instead."""
    usage = re.search(r"^usage: (\d+) \+ (\d+)$", printed, re.MULTILINE)
    assert usage and int(usage[1]) > 3 and int(usage[2]) > 3, f"no usage in {printed!r}"
    tool = re.search(r"^tool: [Ww]eather (.*)$", printed, re.MULTILINE)
    assert tool, f"no tool call in {printed!r}"
    assert json.loads(tool[1].replace("'", '"'))["city"] in ("Paris", "Rome")
    text = printed.partition("\nusage:" if not printed.startswith("city=") else "tool:")[0]
    assert "city=" in text or (SAID in text if scripted else len(text) > 20), f"no text in {printed!r}"


def judge_edit(printed: str, scripted: bool) -> None:
    """aider's two runs: the edit, which the bundled model is too small for, and the question with the server's count."""
    counted = re.findall(r"^Tokens: ([\d.]+k?) sent, (\d+) received", printed, re.MULTILINE)
    assert len(counted) == 2 and all(int(received) > 3 for _, received in counted), f"no two answers in {printed!r}"
    answer = re.findall(r"^Repo-map: .*?\n(.*?)^Tokens: ", printed, re.MULTILINE | re.DOTALL)[-1].strip()
    assert answer == SAID if scripted else len(answer) > 20, f"no answer in {printed!r}"
    if scripted:
        assert re.search(rf"^Commit \w+ {SAID}$", printed, re.MULTILINE), f"no commit in {printed!r}"
        assert printed.endswith(f"\n{ASKED}\n\n{SAID}\n"), f"no edit in {printed!r}"


def judge_write(printed: str, scripted: bool) -> None:
    """Continue's two runs: a file by way of a tool, which the bundled model is too small to use, and a question."""
    lines = [line for line in printed.splitlines() if line.strip()]
    wanted = [SAID, SAID, SAID]  # after the tool, in the file, and to the question
    assert lines == wanted if scripted else len(" ".join(lines)) > 20, f"not the answers: {printed!r}"


# ---- the servers ----------------------------------------------------------------------------------------------------


def scripts(directory: Path) -> list[Script]:
    """A sentence, slowly where that is wanted; where there are tools a call, of one that writes if it can be; the FORMS."""
    tokenizer = Tokenizer.load(directory)
    begin, done = tokenizer.special(TOOL_CALLS_BEGIN), tokenizer.special(TOOL_OUTPUT_BEGIN)

    def call(prompt: tuple[int, ...]) -> list[int]:
        names = re.findall(r"### (\w+)", tokenizer.decode(prompt))
        name, arguments = names[0], {"city": "Rome"}
        if "Write" in names:
            name, arguments = "Write", {"filepath": "sea.md", "content": f"{SAID}\n"}
        calls = [{"function": {"name": name, "arguments": json.dumps(arguments)}}]
        return [
            token
            for segment in tool_calls("bare", calls)
            for token in ([tokenizer.special(segment.text)] if segment.special else tokenizer.encode(segment.text))
        ]

    def asks(words: str) -> Callable[[tuple[int, ...]], bool]:
        return lambda prompt: words in tokenizer.decode(prompt)

    said = tokenizer.encode(SAID)
    return [
        Script(tokens=call, when=lambda prompt: begin in prompt and done not in prompt),
        *(Script(tokens=tokenizer.encode(form), when=asks(words)) for words, form in FORMS.items()),
        Script(tokens=said, when=asks("slowly"), delay_s=0.2),
        Script(tokens=said),
    ]


@contextlib.contextmanager
def bundled() -> Iterator[str]:
    """`rorqual serve` with the bundled model, and under a name where it thinks."""
    alias = f"deepseek-reasoner={DEFAULT_MODEL}:thinking"
    serve = [sys.executable, "-m", "rorqual", "serve", "--port", "0", "--alias", alias]
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
    found = snippets()
    chosen = [s for s in found if (any(name in s.name for name in options.names) if options.names else not s.heavy)]
    if options.quick:
        chosen = [s for s in chosen if s.quick]
    failed = 0
    directory = resolve_model(DEFAULT_MODEL)
    with scripted_server(directory, partial(scripts)) as server, bundled() as url:
        for snippet in chosen:
            for kind, address in (("scripted", server.url), ("bundled", url)):
                began = time.monotonic()
                try:
                    check(snippet, address, kind == "scripted")
                    said = "ok"
                except (AssertionError, subprocess.SubprocessError, ValueError) as error:
                    failed, said = failed + 1, f"FAILED: {error}"
                print(f"{snippet.name}, {kind}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
