"""A computation over static buffers that is launched again and again: a CUDA graph where there is CUDA.

Where kernels can overlap (`ops.triton.overlap`) the graph is made both ways and the faster one kept; the bits are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rorqual.ops.triton.available import triton_missing

log = logging.getLogger(__name__)

Outputs = tuple[Tensor, ...]
TIMED = 10
"""Launches by which two graphs are compared."""


class Replay:
    """`step`, with outputs [..] that every call overwrites in place. On CUDA it is captured, after two runs in which
    kernels are compiled and workspaces taken, and a call is one launch; elsewhere a call computes it, so that everything
    but the capture can be tested without a GPU. pool: the memory pool that graphs share; both: whether it is worth trying
    both ways, over the inputs that lie there now."""

    def __init__(self, step: Callable[[], Outputs], device: torch.device, pool: Any, both: bool = True) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self.outputs = step()
            return
        made = _both_ways(step, pool) if both and triton_missing() is None else [_captured(step, pool)]
        self.graph, self.outputs = made[0] if len(made) == 1 else min(made, key=lambda pair: _seconds(pair[0]))

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for out, new in zip(self.outputs, self.step(), strict=True):
            out.copy_(new)


def _both_ways(step: Callable[[], Outputs], pool: Any) -> list[tuple[torch.cuda.CUDAGraph, Outputs]]:
    from rorqual.ops.triton.overlap import choices, overlapping

    made = []
    for on in choices():
        try:
            with overlapping(on):
                made.append(_captured(step, pool))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not made:
                raise
            log.warning("kernels that overlap cannot be captured: %s: %s", type(error).__name__, error)
    return made


def _captured(step: Callable[[], Outputs], pool: Any) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = step()
    return graph, outputs


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one launch; waits for the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(TIMED):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / TIMED


def pinned(count: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A buffer of zeros on the host that `device` copies to and from without waiting."""
    return torch.zeros(count, dtype=dtype, pin_memory=device.type == "cuda")
