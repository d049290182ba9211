"""The real server with the bundled model, as a newcomer starts it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def bundled_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(base URL, process) of `rorqual serve --port 0`; ended with SIGTERM."""
    command = [sys.executable, "-m", "rorqual", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        deadline = time.monotonic() + 120
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"chat: (http://\S+)", line):
                break
            assert time.monotonic() < deadline, "".join(lines)
        else:
            raise AssertionError("".join(lines))
        try:
            yield found[1], process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
