"""What `rorqual bench load` times: reading a checkpoint's bytes, and loading it until its weights are in memory.

Mapping a file costs nothing, whatever its size; what costs is each page's first use. So a load ends here when a byte of
every page of every weight was used, and is compared with two ways to have the same bytes: read into a buffer, which
copies them all, and mapped, a byte of every page used, which is what loading does when it does nothing else.

"Cold" means that this system has dropped the files from its page cache; a disk, or the host of a virtual one, may still
have them in its own. What is not on a disk (tmpfs) cannot be dropped: choose the folder by TMPDIR.
"""

from __future__ import annotations

import gc
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.checkpoint import load_model, save_model
from rorqual.config import ModelConfig
from rorqual.model.transformer import Transformer

STATES = ("cold", "warm") if hasattr(os, "posix_fadvise") else ("warm",)
LOAD = "load_model"
BUFFER_BYTES = 1 << 16
"""Fits the processor's own caches: reading into 256 KiB took three times as long."""


@contextmanager
def checkpoint(model: str) -> Iterator[Path]:
    """The model directory of that name, or a temporary one with a preset's random weights in bf16."""
    if Path(model).is_dir():
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_model(Transformer(ModelConfig.load(model), dtype=torch.bfloat16), Path(folder) / model)
        yield Path(folder) / model


def works(directory: Path) -> dict[str, Callable[[], float]]:
    """ "STATE WAY" -> a run, which returns its seconds; warm ones follow cold ones, which leave the files cached.

    "read": every byte into a buffer. "map": a byte of each page of the mapped files. "load_model": a byte of each page
    of the weights.
    """
    shards = sorted(directory.glob("*.safetensors"))
    ways: dict[str, Callable[[], None]] = {
        "read": lambda: read(shards),
        "map": lambda: use_map(shards),
        LOAD: lambda: use_model(directory),
    }

    def run(way: Callable[[], None], state: str) -> float:
        if state == "cold":
            drop(shards)
        start = time.perf_counter()
        way()
        return time.perf_counter() - start

    return {f"{state} {what}": partial(run, way, state) for state in STATES for what, way in ways.items()}


def table(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each way; by state the median seconds, and the median of what loading took of them in the same round."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        state, what = name.split()
        loads = zip(seconds[f"{state} {LOAD}"], values, strict=True)
        row = rows.setdefault(what, {"what": what})
        row[f"{state}_s"] = statistics.median(values)
        row[f"{state}_ratio"] = statistics.median(load / value for load, value in loads)
    return list(rows.values())


def drop(files: Sequence[Path]) -> None:
    """From the page cache. A page that is still mapped stays, hence the collection."""
    gc.collect()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Sequence[Path]) -> None:
    """Every byte, into one buffer again and again."""
    buffer = bytearray(BUFFER_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def use_map(files: Sequence[Path]) -> None:
    for file in files:
        _use_pages(np.memmap(file, np.uint8, "r"))


def use_model(directory: Path) -> None:
    model = load_model(directory)
    for weight in (*model.parameters(), *model.buffers()):
        # Experts may lie apart in the file; what lies together must not be walked row by row.
        runs = weight.detach().flatten(0 if weight.is_contiguous() else 1)
        _use_pages(runs.view(torch.uint8).numpy())


def _use_pages(data: np.ndarray[Any, Any]) -> None:
    data[..., :: mmap.PAGESIZE].sum()
