"""What a step minimises: next token, further tokens (MTP), and the small sequence-wise balance guard."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.model.batch import Batch, Routing
from rorqual.model.transformer import Transformer
from rorqual.ops.balance import sequence_balance_loss
from rorqual.ops.cross_entropy import cross_entropy


class Losses(NamedTuple):
    """Scalars, each a share of the step's mean: the micro-batches of a step add up. `routings` in layer order."""

    lm: Tensor
    mtp: Tensor
    balance: Tensor
    routings: list[Routing]


class Targets(NamedTuple):
    """Rows of T + 1 + D tokens (D MTP modules): documents number a row's documents, mask says what is learned (2: from the
    token itself, also where a teacher is distilled)."""

    tokens: Tensor
    documents: Tensor
    mask: Tensor

    def weights(self, ahead: int, T: int, within_document: bool) -> Tensor:
        """Which positions of T learn the token `ahead` places later: fp32 [B, T] of 0 and 1."""
        learn = (self.mask[:, ahead : ahead + T] > 0).float()
        if within_document:
            learn = learn * (self.documents[:, ahead : ahead + T] == self.documents[:, :T])
        return learn


def token_loss(model: Transformer, h_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum of weighted cross-entropies in nats; never all logits at once (`ops.cross_entropy`)."""
    return cross_entropy(h_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), weights_BT.flatten())


def losses(
    model: Transformer,
    rows: Targets,
    counts: Tensor,
    *,
    mask_documents: bool,
    balance_share: float | Tensor,
) -> Losses:
    """counts [1 + D]: how many targets of each depth the whole step has, so that micro-batches add up to its mean.
    balance_share: this micro-batch's share of the step's sequences. MTP targets never cross a document; next-token
    targets do in plain pretraining, where attention does as well."""
    depth = len(model.mtp)
    T = rows.tokens.shape[1] - 1 - depth
    batch = Batch(documents_BT=rows.documents[:, :T]) if mask_documents else None
    h_BTD, routings = model.hidden(rows.tokens[:, :T], batch)
    lm = token_loss(model, h_BTD, rows.tokens[:, 1 : T + 1], rows.weights(1, T, mask_documents)) / counts[0]
    mtp = torch.zeros_like(lm)
    if depth:
        later = [rows.tokens[:, 1 + k : 1 + k + T] for k in range(depth)]
        hs, more = model.predict_further(h_BTD, later, batch)
        routings = routings + more
        for k, h in enumerate(hs):
            targets, weights = rows.tokens[:, 2 + k : 2 + k + T], rows.weights(2 + k, T, True)
            mtp = mtp + token_loss(model, h, targets, weights) / counts[1 + k] / depth
    return Losses(lm, mtp, balance_guard(model, routings, T, balance_share), routings)


def balance_guard(model: Transformer, routings: list[Routing], T: int, share: float | Tensor) -> Tensor:
    """The sequence-wise balance loss of all routed layers, times this micro-batch's share of the step's sequences."""
    guards = [sequence_balance_loss(r.scores_NE, T, model.cfg.num_experts_per_tok) for r in routings]
    return torch.stack(guards).sum() * share if guards else torch.zeros((), device=model.device)
