"""Inference whose bits do not depend on what else is computed beside a token: `fix` makes a model so, on a GPU.

A library's product adds in another order for another number of rows, and so do attention whose splits follow the batch and
experts that choose a kernel by the number of tokens. Here every product is made in tiles whose reduction is one fixed loop
(`ops.triton.fp8.fixed_tiling`), attention is cut into splits of one size, and the router reads its weights token by token.
Every token must then be computed as a row of its own that attends to the pages (`LatentPages.lengths_B`), prompts too: how
a prompt was cut into chunks is a number of rows as well.

Left out: training, and prompts attending in the expanded form, which would be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.errors import BackendUnavailable
from rorqual.model.layers import Embedding, Linear
from rorqual.model.mla import MLA
from rorqual.model.moe import Gate, MoE, RoutedExperts
from rorqual.model.quantised import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from rorqual.ops.formats import Weight
from rorqual.ops.triton.available import triton_missing


class FixedLinear(nn.Module):
    """`layers.Linear` over the weight of another one."""

    def __init__(self, inner: Linear | QuantizedLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.inner.kernel_weight)

    kernel_weight = None  # no other kernel may stand in for it

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.inner.dense(dtype)


class FixedEmbedding(nn.Module):
    """`layers.Embedding` over the weight of another one."""

    def __init__(self, inner: Embedding | QuantizedEmbedding) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.inner(ids)
        return out

    def project(self, h: Tensor) -> Tensor:
        return _product(h, self.inner.kernel_weight)


def fix(model: nn.Module) -> None:
    """In place; idempotent. Raises BackendUnavailable where the kernels cannot run, or for a weight's format they do not
    read."""
    if reason := triton_missing():
        raise BackendUnavailable(f"results that do not depend on the batch need Triton: {reason}")
    for path, module in list(model.named_modules()):
        if path.endswith(".inner") or isinstance(module, FixedLinear | FixedEmbedding):
            continue
        readable = True
        if isinstance(module, Linear | QuantizedLinear):
            readable = module.kernel_weight is not None
            model.set_submodule(path, FixedLinear(module))
        elif isinstance(module, Embedding | QuantizedEmbedding):
            readable = module.kernel_weight is not None
            model.set_submodule(path, FixedEmbedding(module))
        elif isinstance(module, RoutedExperts | QuantizedExperts):
            readable = module.kernel_weights is not None
            module.fixed = True
        elif isinstance(module, MoE | MLA | Gate):
            module.fixed = True
        if not readable:
            raise BackendUnavailable(f"{path} is stored in a format that no fixed kernel reads")


def _product(x: Tensor, weight: Weight | None) -> Tensor:
    from rorqual.ops.triton.fp8 import fixed_tiling, tile_rows

    assert weight is not None
    rows = x.numel() // x.shape[-1]
    return tile_rows(x, weight, fixed_tiling((len(weight.data), x.shape[-1]), rows))
