"""A step's next kernel begins while this one still ends: programmatic dependent launch, on Hopper cards and later ones.

A decoding step is some hundred kernels of a few microseconds, one after another, and between two of them the card drains and
fills again. A kernel that is launched with `options()` may start as soon as every program of the one before has called
`begin`; its own `begin` waits until that one has ended and everything it wrote can be seen. What stands before `begin` in a
kernel therefore runs beside the kernel before: nothing there may read what a step writes, only weights, and nothing may be
written. Every program of such a kernel calls `begin`, also one that has nothing to do, because the kernel after it relies on
it for all that was before. Between other kernels and these nothing changes: they wait for one another whole.

Whether that pays depends on the kernels (on an H200, at batch 1: bench-gpu 5 % faster, v3-16b in FP8 8 %, in bf16 4 %
slower, in int4 24 %): programs that wait already hold a multiprocessor's registers, and lie where there was room, not
where it would be best. So a step that is captured is captured both ways, and what is faster is kept (`engine.replay`).
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
_on: ContextVar[bool | None] = ContextVar("overlapping kernels", default=None)


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Whether kernels launched or captured meanwhile overlap, where the card can, whatever was measured."""
    before = _on.set(on)
    try:
        yield
    finally:
        _on.reset(before)


def options() -> dict[str, bool]:
    """Of the launch of a kernel that calls `begin`."""
    return {"launch_pdl": True} if _on.get() and _possible() else {}


def choices() -> tuple[bool, ...]:
    """For `overlapping`: what there is to choose from, one of them where it is said already or the card cannot."""
    said = _on.get()
    return (said,) if said is not None else (False, True) if _possible() else (False,)


def _possible() -> bool:
    return torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def begin():
    if not INTERPRETED and tl.target_info.cuda_capability_geq(9, 0):
        gdc_launch_dependents()
        gdc_wait()
