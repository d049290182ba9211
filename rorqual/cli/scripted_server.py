"""A whole server in a process of its own, with a scripted engine: for measuring and testing what is above the engine.

The process answers questions about itself over a pipe, so that its CPU time and memory can be asked for while it
serves, without /proc. The tokenizer and template are a real model's; what the engine says is scripted.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rorqual.engine.scripted import Script

Scripts = Callable[[Path], list[Script]]
"""From the model's directory to what the engine says. It crosses a process border: a module's function, or a partial."""


@dataclass(frozen=True, slots=True)
class ScriptedServer:
    """url: where it listens; model: by which name; process: what serves."""

    url: str
    model: str
    process: multiprocessing.process.BaseProcess
    _pipe: Connection

    def cpu_s(self) -> float:
        """Seconds of CPU that the server's process has used, system time included."""
        return float(self._ask("cpu"))

    def memory_bytes(self) -> int:
        """What of the process is in memory now."""
        return int(self._ask("memory"))

    def live(self) -> int:
        """Requests that the engine has not ended."""
        return int(self._ask("live"))

    def _ask(self, what: str) -> float:
        self._pipe.send(what)
        return float(self._pipe.recv())


@contextlib.contextmanager
def scripted_server(
    directory: Path, scripts: Scripts, *, core: int | None = None, max_body_bytes: int = 8 << 20
) -> Iterator[ScriptedServer]:
    """directory: a model's, for its tokenizer and template; core: the only one the server may use."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, directory, scripts, core, max_body_bytes), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ScriptedServer(str(ours.recv()), directory.name, process, ours)
    finally:
        process.terminate()
        process.join(10)


def _serve(pipe: Connection, directory: Path, scripts: Scripts, core: int | None, max_body_bytes: int) -> None:
    from rorqual.data.template import ChatTemplate
    from rorqual.data.tokenizer import Tokenizer
    from rorqual.engine.api import EngineInfo
    from rorqual.engine.scripted import ScriptedEngine
    from rorqual.serve.app import ServedModel, Settings, create_app
    from rorqual.serve.run import serve

    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    tokenizer = Tokenizer.load(directory)
    info = EngineInfo("scripted", 1 << 16, tokenizer.vocab_size, (tokenizer.eos_id,), cache_tokens=1 << 20)
    engine = ScriptedEngine(scripts(directory), info)
    served = ServedModel(engine, tokenizer, ChatTemplate.load(directory), name=directory.name, created=0)
    app = create_app({served.name: served}, Settings(max_body_bytes=max_body_bytes))

    def memory() -> float:
        engine.forget()  # its records are a test's matter and not the server's
        gc.collect()
        return _resident_bytes()

    answers: dict[str, Callable[[], float]] = {
        "cpu": time.process_time,
        "memory": memory,
        "live": lambda: len(engine.live),
    }

    def answer() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                pipe.send(answers[pipe.recv()]())

    def ready(url: str) -> None:
        pipe.send(url)
        threading.Thread(target=answer, daemon=True).start()

    serve(app, port=0, grace_s=1, on_ready=ready)


def _resident_bytes() -> float:
    pages = Path("/proc/self/statm")
    if pages.exists():
        return float(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # the most so far: bytes on macOS
