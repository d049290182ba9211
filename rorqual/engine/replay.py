"""A computation over static buffers that is launched again and again: a CUDA graph where there is CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Replay:
    """`step`, with outputs [..] that every call overwrites in place. On CUDA it is captured once, after two runs in which
    kernels are compiled and workspaces taken, and a call is one launch; elsewhere a call computes it, so that everything
    but the capture can be tested without a GPU. pool: the memory pool that graphs share."""

    def __init__(self, step: Callable[[], tuple[Tensor, ...]], device: torch.device, pool: Any) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self.outputs = step()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = step()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for out, new in zip(self.outputs, self.step(), strict=True):
            out.copy_(new)


def pinned(count: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A buffer of zeros on the host that `device` copies to and from without waiting."""
    return torch.zeros(count, dtype=dtype, pin_memory=device.type == "cuda")
