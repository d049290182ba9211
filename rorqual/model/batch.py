"""What a forward needs beyond the tokens, as an argument instead of hidden state.

`batch=None` means training as published: positions 0..T-1, plain causal attention, no cache. Everything else is said
here: where the tokens stand, which document they belong to (packed fine-tuning), and where the latent cache is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One MoE layer's decisions, for the bias update and the balance loss (`ops.balance`).

    scores_NE: sigmoid affinities, fp32, differentiable; chosen_NK: int64 expert ids. N = B*T tokens.
    """

    scores_NE: Tensor
    chosen_NK: Tensor


@dataclass(frozen=True, slots=True)
class LatentPages:
    """A paged latent cache and the part of it that belongs to this batch.

    latents: [layers, pages, page_size, kv_lora_rank + qk_rope_head_dim], written in place by the forward;
    page_table_BP: int64, the pages of each row in order; slots_BT: int64, page * page_size + offset for each new token.
    A key's place in its row's pages is its absolute position. Page 0 is scrap: padding points there.
    fresh: every row begins at position 0, so its keys are its T tokens themselves.
    lengths_B: set while decoding one token a row on a GPU: keys each row sees, its own included; attention then reads the
    pages where they lie.
    """

    latents: Tensor
    page_table_BP: Tensor
    slots_BT: Tensor
    lengths_B: Tensor | None = None
    fresh: bool = False

    def layer(self, index: int) -> LayerPages:
        """One layer's pages; MTP modules follow the model's layers."""
        return LayerPages(self.latents[index], self.page_table_BP, self.slots_BT, self.lengths_B, self.fresh)


class LayerPages(NamedTuple):
    """`LatentPages` narrowed to one layer: pages [pages, page_size, C + R]."""

    pages: Tensor
    page_table_BP: Tensor
    slots_BT: Tensor
    lengths_B: Tensor | None = None
    fresh: bool = False

    def write(self, latents_BTX: Tensor) -> None:
        """The new tokens' latents into their slots."""
        self.pages.view(-1, self.pages.shape[-1])[self.slots_BT] = latents_BTX.to(self.pages.dtype)

    def through(self, latents_BTX: Tensor) -> Tensor:
        """Write the new latents into the pages; return all keys of each row in order, [B, S, C + R]."""
        self.write(latents_BTX)
        return latents_BTX if self.fresh else self.keys(latents_BTX.dtype)

    def keys(self, dtype: torch.dtype) -> Tensor:
        """All keys of each row in order, [B, S, C + R]; S = T where the rows are fresh."""
        keys_BSX = self.pages[self.page_table_BP].flatten(1, 2)
        return (keys_BSX[:, : self.slots_BT.shape[1]] if self.fresh else keys_BSX).to(dtype)


@dataclass(frozen=True, slots=True)
class Batch:
    """positions_BT: int64 absolute positions (None: 0..T-1 in every row); documents_BT: int ids, tokens attend only
    within their own (None: everything before); cache: new latents go there and attention reads from there."""

    positions_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    cache: LatentPages | None = None
