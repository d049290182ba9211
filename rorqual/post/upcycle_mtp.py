"""A first multi-token-prediction module for a converted model, fitted instead of drawn at random.

The module's block starts as a copy of the model's last layer, and what that layer is used to reading is known: the
source's residual stream before it, at the position of the next token. So eh_proj is the least-squares map from what
the module is given (the next token's embedding and this position's final hidden state, both normed) to that stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.model.moe import MoE
from rorqual.model.mtp import MTP
from rorqual.model.transformer import Transformer
from rorqual.post.llama import Llama


@torch.no_grad()
def fit_mtp(model: Transformer, llama: Llama, rows_BT: Tensor, held_BT: Tensor) -> float:
    """Fill `model.mtp[0]` in place; returns its share of guesses, on held-back rows, that are the model's own choice."""
    module = model.mtp[0]
    assert isinstance(module, MTP)
    # A model of dense layers only has no routed layer to copy: its MTP block keeps experts that share the neurons.
    routed = [layer for layer in model.layers if isinstance(layer.mlp, MoE)]
    module.block.load_state_dict(routed[-1].state_dict())
    for norm in (module.enorm, module.hnorm):
        norm.weight.fill_(1.0)
    module.shared_head.norm.weight.copy_(model.norm.weight)
    size = 2 * model.cfg.hidden_size
    gram, cross = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size // 2, size, dtype=torch.float64)
    for row in rows_BT.split(1):
        h, stream = _last_layer(llama, row)
        given = torch.cat((module.enorm(llama.embed(row[:, 1:])), module.hnorm(h[:, :-1])), -1)[0].double()
        gram += given.T @ given
        cross += stream[0, 1:].double().T @ given
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    module.eh_proj.weight.copy_(torch.linalg.solve(gram, cross.T).T)
    return agreement(model, held_BT)


def _last_layer(llama: Llama, row_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states, and the residual stream that the last layer reads, both [B, T, D]."""
    rope = llama.rope(row_BT.shape[1])
    x = llama.embed(row_BT)
    for layer in llama.layers[:-1]:
        x = layer(x, rope)
    return llama.norm(llama.layers[-1](x, rope)), x


@torch.no_grad()
def agreement(model: Transformer, rows_BT: Tensor) -> float:
    """How often the module's greedy guess at a token is the model's own greedy choice for it."""
    same, counted = 0, 0
    for row in rows_BT.split(1):
        h, _ = model.hidden(row)
        (draft, *_), _ = model.predict_further(h[:, :-1], [row[:, 1:]])
        guess, own = model.head(draft).argmax(-1), model.head(h[:, 1:]).argmax(-1)
        same, counted = same + int((guess == own).sum()), counted + guess.numel()
    return same / counted
