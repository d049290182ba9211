"""Whether Triton's kernels can run here; asked before anything of Triton is imported."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def triton_missing() -> str | None:
    """Why they cannot, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from triton import knobs

    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        return "it needs a CUDA device (or Triton's interpreter, for tests)"
    return None
