"""Layers whose weights stay in a quantised format, and how a model gets them.

The network is built plainly; `use_formats` then replaces those layers whose weights a checkpoint stores quantised, one
by one by released name, so a checkpoint may mix formats as it likes. A quantised layer computes what the plain one
would with the expanded weight (`ops.formats.WeightFormat`). Its tensors are buffers: they are not trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rorqual.model.layers import Embedding, Linear
from rorqual.model.moe import RoutedExperts
from rorqual.ops.formats import Plain, Weight, WeightFormat, experts_by_linear
from rorqual.ops.fused import fuses

Choose = Callable[[str], WeightFormat | None]
"""Module path in our model ("layers.0.self_attn.o_proj", "layers.3.mlp.experts.down") -> its format, None for plain."""


class Stored(nn.Module):
    """One quantised matrix, or a stack of them: its parts as buffers under their released suffixes."""

    def __init__(self, form: WeightFormat, shape: tuple[int, ...], device: torch.device | str) -> None:
        super().__init__()
        self.form, self.shape = form, shape
        self.names = tuple(form.parts(shape))
        for name, (part, dtype) in form.parts(shape).items():
            self.register_buffer(name, torch.empty(part, dtype=dtype, device=device))

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    @property
    def kernel_weight(self) -> Weight | None:
        return self.form.weight(self.parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.form.dense(self.parts, dtype)


class QuantizedLinear(nn.Module):
    """`layers.Linear` over a stored weight."""

    def __init__(self, form: WeightFormat, shape: tuple[int, ...], device: torch.device | str) -> None:
        super().__init__()
        self.stored = Stored(form, shape, device)

    def forward(self, x: Tensor) -> Tensor:
        return self.stored.form.linear(x, self.stored.parts)

    @property
    def kernel_weight(self) -> Weight | None:
        return self.stored.kernel_weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.stored.dense(dtype)


class QuantizedEmbedding(nn.Module):
    """`layers.Embedding` over a stored weight: only the rows that are asked for are expanded."""

    def __init__(
        self, form: WeightFormat, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.stored, self.dtype = Stored(form, shape, device), dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = {name: part[ids.flatten()] for name, part in self.stored.parts.items()}
        return self.stored.form.dense(rows, self.dtype).view(*ids.shape, -1)

    @property
    def kernel_weight(self) -> Weight | None:
        return self.stored.kernel_weight

    def project(self, h: Tensor) -> Tensor:
        return self.stored.form.linear(h, self.stored.parts)


class QuantizedExperts(nn.Module):
    """`moe.RoutedExperts` over stored stacks: gate_up [E, 2, F, D], down [E, D, F], each in its own format."""

    def __init__(self, gate_up: WeightFormat, down: WeightFormat, plain: RoutedExperts) -> None:
        super().__init__()
        E, D, width = plain.down_proj.shape
        device = plain.down_proj.device
        self.gate_up = Stored(gate_up, (E, 2, width, D), device)
        self.down = Stored(down, (E, D, width), device)
        self.fixed = False

    @property
    def kernel_weights(self) -> tuple[Weight, Weight] | None:
        """Both stacks for the kernels of `ops.triton`, which expand weights as they read them."""
        gate_up, down = self.gate_up.kernel_weight, self.down.kernel_weight
        return None if gate_up is None or down is None else (gate_up, down)

    def forward(self, x_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        weights = self.kernel_weights
        if weights is not None and (self.fixed or (fuses(x_ND) and x_ND.dtype != torch.float32)):
            from rorqual.ops.triton.fp8 import tile_experts

            return tile_experts(x_ND, *weights, gates_NK, chosen_NK, self.fixed)
        gate_up, down = ((stored.form, stored.parts) for stored in (self.gate_up, self.down))
        return experts_by_linear(x_ND, gates_NK, chosen_NK, gate_up, down)


def use_formats(model: nn.Module, choose: Choose) -> None:
    """Replace every layer that `choose` gives a format, in place; the new layers' values are undefined."""
    for path, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, RoutedExperts):
            forms = choose(f"{path}.gate_up"), choose(f"{path}.down")
            if any(forms):
                plain = Plain(module.down_proj.dtype)
                new = QuantizedExperts(forms[0] or plain, forms[1] or plain, module)
        elif isinstance(module, Linear | Embedding) and (form := choose(path)) is not None:
            shape, device = tuple(module.weight.shape), module.weight.device
            new = (
                QuantizedLinear(form, shape, device)
                if isinstance(module, Linear)
                else QuantizedEmbedding(form, shape, device, module.weight.dtype)
            )
        if new is not None:
            model.set_submodule(path, new)


@torch.no_grad()
def quantise(model: nn.Module, form: WeightFormat, wanted: Callable[[str], bool]) -> None:
    """Pack the matrices whose paths `wanted` names (as `Choose` has them) into `form`, in place. Raises ValueError for
    values that are not finite."""
    values: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            values[f"{path}.gate_up"] = module.gate_up_proj.unflatten(1, (2, -1))
            values[f"{path}.down"] = module.down_proj
        elif isinstance(module, Linear | Embedding):
            values[f"{path}.stored"] = module.weight
    use_formats(model, lambda path: form if wanted(path) else None)
    for path, module in model.named_modules():
        if isinstance(module, Stored):
            for name, part in module.form.pack(values.pop(path)).items():
                getattr(module, name).copy_(part)


def expand_absorbed(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every attention layer its kv_b_proj plainly, in place: decoding multiplies by it in another order, and would
    expand it at each step. It is one weight in fifty."""
    for path, module in list(model.named_modules()):
        if path.endswith("kv_b_proj") and isinstance(module, QuantizedLinear):
            with torch.device("meta"):
                plain = Linear(*reversed(module.stored.shape))
            plain.weight = nn.Parameter(module.dense(dtype), requires_grad=False)
            model.set_submodule(path, plain)
