"""When memory or disk are full: how that looks in the errors of torch and the system, and what would fit."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OutOfMemory = (RuntimeError, MemoryError)
"""What to catch; `out_of_memory` then tells: torch's CPU allocator raises a bare RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def no_room(error: BaseException) -> bool:
    """Whether a disk (or a quota, or a file size limit) is full, anywhere in the chain of causes. torch's writer reports
    it as text alone."""
    return any(
        (isinstance(e, OSError) and e.errno in NO_ROOM)
        or (isinstance(e, RuntimeError) and "file write failed" in str(e))
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def size(count: float) -> str:
    """1.2 GB, for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
