"""Released tensor names and where each lives in the model.

One list serves loading, saving and every converter. The routed experts are stacked in the model and separate in the
release, so a released name stands for a *place*: an attribute of a module, or a part of one. Copying into a place's
view loads it; where a whole attribute's places lie side by side in a file, the attribute becomes a view of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.layers import Embedding, Linear, RMSNorm
from rorqual.model.moe import MoE, RoutedExperts
from rorqual.model.mtp import MTP
from rorqual.model.quantised import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, Stored
from rorqual.model.transformer import Transformer


class Place(NamedTuple):
    """`getattr(module, attribute)[part]`, which has this shape; an empty part is the whole."""

    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    part: tuple[int | slice, ...] = ()

    @property
    def whole(self) -> Tensor:
        attribute: Tensor = getattr(self.module, self.attribute)
        return attribute

    @property
    def view(self) -> Tensor:
        return self.whole[self.part] if self.part else self.whole


def released_places(model: Transformer) -> Iterator[tuple[str, Place]]:
    """(name, place) of every tensor a released checkpoint needs, in file order; shared ones once.

    Quantised weights appear as their parts: `X.weight` and `X.weight_scale_inv`, or `X.weight_packed` and so on.
    """
    yield from _matrix("model.embed_tokens.", model.embed_tokens)
    for i, layer in enumerate(model.layers):
        yield from _block(f"model.layers.{i}.", layer)
    yield "model.norm.weight", _whole(model.norm, "weight")
    if not model.cfg.tie_word_embeddings:
        yield from _matrix("lm_head.", model.lm_head)
    for i, module in enumerate(model.mtp, len(model.layers)):
        assert isinstance(module, MTP)
        prefix = f"model.layers.{i}."
        yield f"{prefix}enorm.weight", _whole(module.enorm, "weight")
        yield f"{prefix}hnorm.weight", _whole(module.hnorm, "weight")
        yield from _matrix(f"{prefix}eh_proj.", module.eh_proj)
        yield from _block(prefix, module.block)
        yield f"{prefix}shared_head.norm.weight", _whole(module.shared_head.norm, "weight")


def released_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The same as (name, view)."""
    for name, place in released_places(model):
        yield name, place.view


def shared_copies(model: Transformer) -> Iterator[tuple[str, Place]]:
    """Places the release stores again for each MTP module although they are the model's own embedding and head."""
    head = model.embed_tokens if model.cfg.tie_word_embeddings else model.lm_head
    for i in range(len(model.layers), len(model.layers) + len(model.mtp)):
        yield from _matrix(f"model.layers.{i}.embed_tokens.", model.embed_tokens)
        yield from _matrix(f"model.layers.{i}.shared_head.head.", head)


def module_path(name: str, cfg: ModelConfig) -> str:
    """The module of our model that holds a released weight, as `named_modules` spells it.

    "model.layers.3.mlp.experts.7.up_proj.weight" -> "layers.3.mlp.experts.gate_up"; layer num_hidden_layers + k -> "mtp.k".
    """
    path = name.removeprefix("model.").rpartition(".")[0]
    parts = path.split(".")
    if parts[0] == "layers" and int(parts[1]) >= cfg.num_hidden_layers:
        inside = [] if parts[2] in ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens") else ["block"]
        parts[:2] = ["mtp", str(int(parts[1]) - cfg.num_hidden_layers), *inside]
    if "experts" in parts:
        parts[parts.index("experts") + 1 :] = ["down" if parts[-1] == "down_proj" else "gate_up"]
    return ".".join(parts)


def _block(prefix: str, block: nn.Module) -> Iterator[tuple[str, Place]]:
    for name, module in block.named_modules():
        if isinstance(module, MoE):
            gate = module.gate
            yield f"{prefix}{name}.gate.weight", _whole(gate, "weight")
            yield f"{prefix}{name}.gate.e_score_correction_bias", _whole(gate, "e_score_correction_bias")
            yield from _experts(f"{prefix}{name}.experts.", module.experts)
        elif isinstance(module, Linear | QuantizedLinear | RMSNorm):
            yield from _matrix(f"{prefix}{name}.", module)


def _experts(prefix: str, experts: nn.Module) -> Iterator[tuple[str, Place]]:
    """Expert by expert: gate, up, down."""
    if isinstance(experts, QuantizedExperts):
        gate_up = {suffix: tuple(part.shape[2:]) for suffix, part in experts.gate_up.parts.items()}
        down = {suffix: tuple(part.shape[1:]) for suffix, part in experts.down.parts.items()}
        for e in range(experts.down.shape[0]):
            for half, name in enumerate(("gate_proj", "up_proj")):
                for suffix, shape in gate_up.items():
                    yield f"{prefix}{e}.{name}.{suffix}", Place(experts.gate_up, suffix, shape, (e, half))
            for suffix, shape in down.items():
                yield f"{prefix}{e}.down_proj.{suffix}", Place(experts.down, suffix, shape, (e,))
        return
    assert isinstance(experts, RoutedExperts)
    count, D, F = experts.down_proj.shape
    gate, up = slice(0, F), slice(F, 2 * F)
    for e in range(count):
        yield f"{prefix}{e}.gate_proj.weight", Place(experts, "gate_up_proj", (F, D), (e, gate))
        yield f"{prefix}{e}.up_proj.weight", Place(experts, "gate_up_proj", (F, D), (e, up))
        yield f"{prefix}{e}.down_proj.weight", Place(experts, "down_proj", (D, F), (e,))


def _matrix(prefix: str, module: nn.Module) -> Iterator[tuple[str, Place]]:
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        stored: Stored = module.stored
        for suffix in stored.names:
            yield f"{prefix}{suffix}", _whole(stored, suffix)
    else:
        assert isinstance(module, Linear | Embedding | RMSNorm)
        yield f"{prefix}weight", _whole(module, "weight")


def _whole(module: nn.Module, attribute: str) -> Place:
    return Place(module, attribute, tuple(getattr(module, attribute).shape))
