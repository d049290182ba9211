"""The small modules: a linear layer and a norm that compute in the dtype of what they are given.

Parameters may be kept in a wider dtype than the activations (fp32 master weights under bf16 compute): a weight is cast
where it is used, and its gradient arrives in its own dtype. No autocast, so that what runs is what is written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.ops import training
from rorqual.ops.formats import Weight
from rorqual.ops.fused import fuses, trains
from rorqual.ops.native import training as native
from rorqual.ops.rms_norm import rms_norm


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


class Linear(nn.Module):
    """y = x W^T without bias; weight [out, in]. Left uninitialised: `Transformer.init_weights` or a checkpoint fills it.
    `multiply` is how: plainly, or in FP8 (`model.precision`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.multiply: Callable[[Tensor, Tensor], Tensor] = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)

    @property
    def is_plain(self) -> bool:
        """Whether it multiplies by its weight as it is."""
        return self.multiply is multiply

    @property
    def kernel_weight(self) -> Weight | None:
        """What a kernel that stands in for this product reads; None where it is another product."""
        return Weight.plain(self.weight) if self.multiply is multiply else None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as plain numbers, for who multiplies in another order (`mla.absorbed`)."""
        return self.weight.to(dtype)


def plain(*modules: nn.Module) -> bool:
    """Whether all are linear layers that multiply plainly."""
    return all(isinstance(m, Linear) and m.is_plain for m in modules)


class Embedding(nn.Module):
    """weight [V, D]: looked up on the way in, and multiplied by on the way out where the head is tied."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    @property
    def kernel_weight(self) -> Weight:
        return Weight.plain(self.weight)

    def project(self, h: Tensor) -> Tensor:
        """The tied head: h [..., D] -> logits [..., V]."""
        return F.linear(h, self.weight.to(h.dtype))


class RMSNorm(nn.Module):
    """weight [D]; see ops.rms_norm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and its norm."""
        return training.norm_beside(x, self.weight, self.eps) if trains(x) else (x, self(x))

    def after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, and its norm: one kernel where that can be."""
        if fuses(x):
            from rorqual.ops.triton.decode import add_norm

            both = add_norm(x.flatten(0, -2), y.flatten(0, -2), self.weight, self.eps)
            return both[0].view_as(x), both[1].view_as(x)
        if trains(x):
            return training.add_norm(x, y, self.weight, self.eps)
        x = x + y
        return x, rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The dense layers' feed-forward, and the shared experts as one. `down`, where it
    is set, computes all after gate and up in one (`model.precision`)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)
        self.down: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its products are plain ones."""
        return self.down is None and plain(self.gate_proj, self.up_proj, self.down_proj)

    @property
    def kernel_weights(self) -> tuple[Weight, Weight, Weight] | None:
        """Gate, up and down for a kernel that computes all of it; None where they are not multiplied plainly."""
        gate, up, down = (part.kernel_weight for part in (self.gate_proj, self.up_proj, self.down_proj))
        if self.down is not None or gate is None or up is None or down is None:
            return None
        return gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        if trains(x) and self.is_plain:
            gate, up = training.products(x, self.gate_proj.weight, self.up_proj.weight)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        if self.down is not None:
            return self.down(gate, up, self.down_proj.weight)
        if fuses(x):
            from rorqual.ops.triton.fused import swiglu

            return self.down_proj(swiglu(gate, up))
        if trains(x):
            return self.down_proj(training.swiglu(gate, up))
        if torch.is_grad_enabled() and native.takes(gate, up):
            return self.down_proj(native.swiglu(gate, up))
        return self.down_proj(F.silu(gate) * up)
