"""One conversation in two spellings: the student's ids as the teacher would have read them.

A converted model says `<｜User｜>` where its teacher expects `<|im_start|>user` and a newline. Everything else has the same
ids, so the teacher's text is the student's with some ids replaced by several (or none), and what the teacher predicts
after the last of them is what the student should predict after its one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ROUND = 64
"""Rows are padded to multiples of this, so that few shapes occur."""


class Expansion:
    """table: student's id -> the teacher's ids; ids without an entry stand for themselves."""

    def __init__(self, table: Mapping[int, Sequence[int]], vocab: int, device: torch.device) -> None:
        width = max([1, *map(len, table.values())])
        self.ids_VL = torch.zeros(vocab, width, dtype=torch.int64)
        self.ids_VL[:, 0] = torch.arange(vocab)
        self.lengths_V = torch.ones(vocab, dtype=torch.int64)
        for token, ids in table.items():
            self.lengths_V[token] = len(ids)
            self.ids_VL[token, : len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
        self.ids_VL, self.lengths_V = self.ids_VL.to(device), self.lengths_V.to(device)
        self.trivial = not table

    def __call__(self, tokens_BT: Tensor, documents_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's tokens and documents [B, S], and where in S the prediction after each student token stands [B, T]
        (after the row's first expansion, where the row begins with tokens that stand for nothing)."""
        if self.trivial:
            places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
            return tokens_BT, documents_BT, places
        lengths = self.lengths_V[tokens_BT]
        ends = lengths.cumsum(1)
        size = -(-max(int(ends[:, -1].max()), 1) // ROUND) * ROUND
        slots = torch.arange(self.ids_VL.shape[1], device=tokens_BT.device)
        to = (ends - lengths)[..., None] + slots
        to = torch.where(slots < lengths[..., None], to, size).flatten(1)  # one column more, for what is not there
        width = self.ids_VL.shape[1]
        tokens = tokens_BT.new_zeros(len(tokens_BT), size + 1).scatter(1, to, self.ids_VL[tokens_BT].flatten(1))
        spread = documents_BT.repeat_interleave(width, 1)
        documents = documents_BT.new_zeros(len(tokens_BT), size + 1).scatter(1, to, spread)
        return tokens[:, :size], documents[:, :size], (ends - 1).clamp(min=0)
