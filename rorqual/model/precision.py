"""Which layers of a network are trained in FP8 (DeepSeek-V3 section 3.3.1), and turning them to it.

All linear layers but those that the paper keeps in higher precision: the embedding, the output head, the gates, the norms
and the attention itself; and `eh_proj` of the MTP modules, which the release stores unquantised. The parameters stay what
they are, fp32 master weights: FP8 is how they are multiplied.
"""

from __future__ import annotations

from functools import partial

from rorqual.model.layers import Linear
from rorqual.model.moe import MoE, RoutedExperts
from rorqual.model.transformer import Transformer
from rorqual.ops.fp8_train import Recipe, fp8_train_experts, fp8_train_linear, swiglu_down

KEPT = ("lm_head", "eh_proj")
"""Linear layers that stay in the activations' dtype, by the last part of their name."""


def train_in_fp8(model: Transformer, backend: str = "auto") -> list[str]:
    """Every other linear layer and all routed experts multiply in FP8 from now on; in place. Returns their names. Raises
    BackendUnavailable for a backend that cannot run here."""
    plain, changed = Recipe(backend=backend), []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, Linear) and last not in KEPT:
            recipe = Recipe(keep="e5m6", backend=backend) if last == "o_proj" else plain
            module.multiply = partial(fp8_train_linear, recipe=recipe)
        elif isinstance(module, RoutedExperts):
            module.run = partial(fp8_train_experts, recipe=plain)
        else:
            continue
        changed.append(name)
    for module in model.modules():
        if isinstance(module, MoE):
            module.shared_experts.down = partial(swiglu_down, recipe=plain)
    return changed
