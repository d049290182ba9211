"""Replicas of a run as processes of this test: what torchrun does, without importing everything once more for each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from rorqual.train.replicas import Replicas


def start(world: int, work: Callable[[Replicas], object], errors: Path) -> list[BaseProcess]:
    """`work` in `world` processes; what one raises is written to `errors`/RANK.txt, and its exit code is then 1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def one(rank: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            work(Replicas(rank, world))
        except BaseException:
            (errors / f"{rank}.txt").write_text(traceback.format_exc())
            raise

    started: list[BaseProcess] = [
        multiprocessing.get_context("fork").Process(target=one, args=(r,)) for r in range(world)
    ]
    for process in started:
        process.start()
    return started


def finish(started: list[BaseProcess], timeout_s: float = 60) -> list[int | None]:
    """Their exit codes; None for one that hangs, which is killed."""
    for process in started:
        process.join(timeout_s)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes
