"""When an operation may run as one Triton kernel instead of as it is defined."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

_TRITON = find_spec("triton") is not None


def trains(x: Tensor) -> bool:
    """Whether the kernels with gradients (`ops.training`) may stand in: as `fuses`, where a gradient may be wanted."""
    return x.is_cuda and _TRITON and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def fuses(x: Tensor) -> bool:
    """On a GPU, where nothing wants a gradient and nothing is being compiled (a compiler fuses by itself)."""
    return x.is_cuda and _TRITON and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
