"""Released tensor names and where each lives in the model.

One list serves loading, saving and every later converter. The routed experts are stacked in the model and separate in
the release, so a released name stands for a *view* of a parameter: copying into the view loads it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from rorqual.model.layers import Linear, RMSNorm
from rorqual.model.moe import MoE
from rorqual.model.mtp import MTP
from rorqual.model.transformer import Transformer


def released_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, view) of every tensor a released checkpoint needs, in file order; shared ones once."""
    yield "model.embed_tokens.weight", model.embed_tokens.weight
    for i, layer in enumerate(model.layers):
        yield from _block(f"model.layers.{i}.", layer)
    yield "model.norm.weight", model.norm.weight
    if not model.cfg.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight
    for i, module in enumerate(model.mtp, len(model.layers)):
        assert isinstance(module, MTP)
        prefix = f"model.layers.{i}."
        yield f"{prefix}enorm.weight", module.enorm.weight
        yield f"{prefix}hnorm.weight", module.hnorm.weight
        yield f"{prefix}eh_proj.weight", module.eh_proj.weight
        yield from _block(prefix, module.block)
        yield f"{prefix}shared_head.norm.weight", module.shared_head.norm.weight


def shared_copies(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Tensors the release stores again for each MTP module although they are the model's own embedding and head."""
    head = model.embed_tokens.weight if model.cfg.tie_word_embeddings else model.lm_head.weight
    for i in range(len(model.layers), len(model.layers) + len(model.mtp)):
        yield f"model.layers.{i}.embed_tokens.weight", model.embed_tokens.weight
        yield f"model.layers.{i}.shared_head.head.weight", head


def _block(prefix: str, block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in block.named_modules():
        if isinstance(module, MoE):
            yield f"{prefix}{name}.gate.weight", module.gate.weight
            yield f"{prefix}{name}.gate.e_score_correction_bias", module.gate.e_score_correction_bias
            width = module.experts.down_proj.shape[-1]
            for e in range(module.experts.down_proj.shape[0]):
                yield f"{prefix}{name}.experts.{e}.gate_proj.weight", module.experts.gate_up_proj[e, :width]
                yield f"{prefix}{name}.experts.{e}.up_proj.weight", module.experts.gate_up_proj[e, width:]
                yield f"{prefix}{name}.experts.{e}.down_proj.weight", module.experts.down_proj[e]
        elif isinstance(module, Linear | RMSNorm):
            yield f"{prefix}{name}.weight", module.weight
