"""A step's next kernel begins while this one still ends: programmatic dependent launch, on Hopper cards and later ones.

A decoding step is some hundred kernels of a few microseconds, one after another, and between two of them the card drains and
fills again. A kernel that is launched with `options()` may start as soon as every program of the one before has called
`begin`; its own `begin` waits until that one has ended and everything it wrote can be seen. What stands before `begin` in a
kernel therefore runs beside the kernel before: nothing there may read what a step writes, only weights, and nothing may be
written. Every program of such a kernel calls `begin`, also one that has nothing to do, because the kernel after it relies on
it for all that was before. Between other kernels and these nothing changes: they wait for one another whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_on = ContextVar("overlapping kernels", default=True)


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Whether kernels launched or captured meanwhile overlap, where the card can; by default they do."""
    before = _on.set(on)
    try:
        yield
    finally:
        _on.reset(before)


def options() -> dict[str, bool]:
    """Of the launch of a kernel that calls `begin`."""
    return {"launch_pdl": True} if _on.get() and torch.cuda.get_device_capability()[0] >= 9 else {}


@triton.jit
def begin():
    if not INTERPRETED and tl.target_info.cuda_capability_geq(9, 0):
        gdc_launch_dependents()
        gdc_wait()
