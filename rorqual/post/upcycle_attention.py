"""Grouped-query attention into multi-head latent attention, layer by layer, in closed form.

*One rotary key.* At one rotary speed the key of each head is a pair of numbers that turns as one. Mixing the heads' pairs
with an orthogonal matrix changes no score, as long as queries are mixed alike, so each speed's pairs go to their
principal axes: the first becomes the one rotary key that all heads share, and the rest, which hold little, lose their
rotation and are matched by content. `fold` neighbouring speeds are mixed together, which gathers more and pretends that
their speeds are one. Keys are first scaled by the rms of the queries that meet them, so that what is kept is what scores
are made of (after TransMLA, arXiv 2502.07864).

*One latent.* What is left of the keys, and the values, are linear in the layer's input x. The latent is their joint
principal subspace in the metric that matters: an error of a key weighs as much as the queries make of it, an error of a
value as much as the output projection makes of it.

*The latent's norm.* MLA divides the latent by its rms, which no linear map can undo. One latent dimension, the anchor, is
therefore the linear function of x closest to the constant 1, made so large that the rms is nearly constant; the
expansion is fitted to the *normed* latents. A latent as wide as the layer's input needs no anchor: it can be the
input as its RMSNorm left it, whose rms is constant by construction, and nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model.mla import LATENT_NORM_EPS
from rorqual.post.llama import LlamaBlock, LlamaConfig

ANCHOR_ENERGIES = (0.01, 1.0, 3.0, 9.0, 27.0)
"""Energies of the anchor against all other latent dimensions together that are tried in each layer. At 9 their fluctuation
moves the rms by a few per cent; where inputs have no common part, no function of them is constant, and less is better."""

RIDGE = 1e-2
"""Against the mean square of an input, what a square of the anchor's weights costs. Without it the anchor lives on inputs
that hardly vary, with weights hundreds of times those of its neighbours, and four bits leave nothing of it."""


@dataclass(frozen=True)
class LatentAttention:
    """The weights of one MLA layer, named as released, without low-rank queries; rotary pairs are neighbours."""

    q_proj: Tensor
    kv_a_proj_with_mqa: Tensor
    kv_a_layernorm: Tensor
    kv_b_proj: Tensor
    o_proj: Tensor


@dataclass(frozen=True)
class KeyAxes:
    """How keys split: rotary [d, G * d] is the shared rotary key from the stacked keys, content [G * d, G * d] what is
    left of each head's own key; queries [G, d, d] turns a query of group g into one for the shared key."""

    rotary: Tensor
    content: Tensor
    queries: Tensor


def convert_attention(
    block: LlamaBlock, cfg: LlamaConfig, x_ND: Tensor, rank: int, fold: int, key_weight: float
) -> LatentAttention:
    """x_ND: calibration inputs of the layer's attention, after its norm. rank: of the latent; from the hidden size on
    nothing is lost in it. key_weight: how much an error of keys counts against one of values. Computed in fp64."""
    attention = block.self_attn
    H, G, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    w_q, w_k, w_v, w_o = (
        p.weight.double() for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    )
    second_DD = (x_ND.T.double() @ x_ND.double()) / len(x_ND)
    axes = key_axes(w_q, w_k, second_DD, cfg, fold)
    wanted = torch.cat((axes.content @ w_k, w_v))  # [2 G d, D]: every head's content key, then every head's value
    if rank >= cfg.hidden_size:
        down, norm, up = _whole_input(block.input_layernorm.weight.double(), wanted, rank)
    else:
        metric = _metric(w_q, w_o, wanted, second_DD, cfg, key_weight)
        down, norm, up = _low_rank(x_ND.double(), second_DD, wanted, metric, rank)
    keys, values = up.view(2, G, d, rank)
    heads = torch.arange(H) // cfg.groups
    kv_b = torch.cat((keys[heads], values[heads]), 1).flatten(0, 1)
    queries = w_q.view(H, d, -1)
    rotary = axes.queries[heads] @ queries
    # V3 divides scores by sqrt(2 d), the source by sqrt(d).
    q = 2**0.5 * torch.cat((queries, rotary), 1).flatten(0, 1)
    kv_a = torch.cat((down, axes.rotary @ w_k))
    return LatentAttention(*(t.float() for t in (q, kv_a, norm, kv_b, w_o)))


def key_axes(w_q: Tensor, w_k: Tensor, second_DD: Tensor, cfg: LlamaConfig, fold: int) -> KeyAxes:
    """second_DD: E[x x^T] of the inputs. `fold` divides the number of rotary pairs."""
    H, G, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    folds = d // 2 // fold
    queries = (w_q @ second_DD @ w_q.T).diagonal().view(G, H // G, d // 2, 2)
    energy_GP = queries.mean((1, 3))
    scale_GP = energy_GP.clamp_min(1e-12 * energy_GP.max()).sqrt()  # rms of the queries that meet pair p of head g
    covariance = (w_k @ second_DD @ w_k.T).view(G, d // 2, 2, G, d // 2, 2)
    rotary, content = w_k.new_zeros(d // 2, G, d // 2), torch.zeros(G, d // 2, G, d // 2, dtype=w_k.dtype)
    for f in range(folds):
        pairs = slice(f * fold, (f + 1) * fold)
        scale = scale_GP[:, pairs].flatten()
        both = covariance[:, pairs, :, :, pairs]
        inside = both.diagonal(dim1=2, dim2=5).sum(-1).flatten(0, 1).flatten(1)  # real and imaginary parts alike
        _, vectors = torch.linalg.eigh(scale[:, None] * inside * scale)
        axes = vectors.flip(-1).T  # rows, largest first
        kept, rest = axes[:fold], axes[fold:]
        rotary[pairs, :, pairs] = (kept * scale).view(fold, G, fold)
        content[:, pairs, :, pairs] = ((rest.T @ rest) * scale / scale[:, None]).view(G, fold, G, fold)
    # The query of group g meets the shared key through the same axes, divided by the scale instead.
    shared = rotary / scale_GP.square()
    both_parts = torch.eye(2, dtype=w_k.dtype)
    queries_Gdd = torch.einsum("pgq,ab->gpaqb", shared, both_parts).reshape(G, d, d)
    rotary_w = torch.einsum("pgq,ab->pagqb", rotary, both_parts).reshape(d, G * d)
    content_w = torch.einsum("hpgq,ab->hpagqb", content, both_parts).reshape(G * d, G * d)
    return KeyAxes(rotary_w, content_w, queries_Gdd)


def _metric(w_q: Tensor, w_o: Tensor, wanted: Tensor, second_DD: Tensor, cfg: LlamaConfig, key_weight: float) -> Tensor:
    """A square root M^(1/2) [2 G d, 2 G d] of the quadratic form by which errors of the wanted are judged."""
    H, G, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q = w_q.view(G, H // G, d, -1)
    by_queries = torch.einsum("ghad,de,ghbe->gab", q, second_DD, q)
    o = w_o.view(-1, G, H // G, d)
    by_output = torch.einsum("ngha,nghb->gab", o, o)
    energy = [torch.einsum("gab,gbd,de,gae->", form, part, second_DD, part).clamp_min(1e-30) for form, part in
              zip((by_queries, by_output), wanted.view(2, G, d, -1), strict=True)]  # fmt: skip
    by_queries = by_queries * (key_weight * energy[1] / energy[0])
    return torch.block_diag(*(_square_root(form) for form in (*by_queries, *by_output)))


def _square_root(form: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(form)
    return vectors @ torch.diag(values.clamp_min(values.max() * 1e-9).sqrt()) @ vectors.T


def _low_rank(
    x_ND: Tensor, second_DD: Tensor, wanted: Tensor, metric: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Down projection [rank, D], norm weight [rank], expansion [2 G d, rank]."""
    D = len(second_DD)
    ridge = RIDGE * second_DD.diagonal().mean() * torch.eye(D, dtype=second_DD.dtype)
    solve = torch.linalg.inv(second_DD + ridge)
    anchor_D = solve @ x_ND.mean(0)  # the linear function of x closest to 1
    along = second_DD @ anchor_D
    rest_DD = second_DD - torch.outer(along, along) / (anchor_D @ along)  # what the anchor does not explain
    weighted = metric @ wanted
    _, vectors = torch.linalg.eigh(weighted @ rest_DD @ weighted.T)
    chosen = vectors.flip(-1)[:, : rank - 1].T @ weighted
    chosen = chosen - torch.outer(chosen @ along, anchor_D) / (anchor_D @ along)
    rest_energy = torch.einsum("rd,de,re->", chosen, second_DD, chosen).clamp_min(1e-30)
    goal_N = x_ND @ wanted.T
    tried = []
    for energy in ANCHOR_ENERGIES:
        # Mean square 1 in all: then the norm's epsilon, and its weight of 1, do nothing.
        size = rank / (1 + energy)
        parts = (anchor_D[None] * (size * energy / (anchor_D @ along)).sqrt(), chosen * (size / rest_energy).sqrt())
        down = torch.cat(parts)
        up, error = _expansion(x_ND @ down.T, goal_N, metric)
        tried.append((error, down, up))
    _, down, up = min(tried, key=lambda t: t[0])
    # The anchor is many times as large as its neighbours, and its column of the expansion as much smaller: four-bit groups
    # would round it away. The norm's weight, which nobody rounds, takes the difference over; the cache loses its outlier.
    norm = torch.ones(rank, dtype=down.dtype)
    sizes = up.norm(dim=0)
    norm[0] = (sizes[0] / sizes[1:].median().clamp_min(1e-12)).clamp(1e-3, 1.0) if rank > 1 else 1.0
    up[:, 0] /= norm[0]
    return down, norm, up


def _expansion(latents_NC: Tensor, goal_NY: Tensor, metric: Tensor) -> tuple[Tensor, float]:
    """The linear map from the normed latents closest to the goal, and its error in the metric."""
    normed = latents_NC * torch.rsqrt(latents_NC.square().mean(-1, keepdim=True) + LATENT_NORM_EPS)
    gram = normed.T @ normed
    gram += 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    up = torch.linalg.solve(gram, normed.T @ goal_NY).T
    return up, ((normed @ up.T - goal_NY) @ metric.T).square().sum().item()


def _whole_input(norm_D: Tensor, wanted: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The latent is the input as its RMSNorm left it, before that norm's own weight; further dimensions stay empty."""
    D = len(norm_D)
    down = wanted.new_zeros(rank, D)
    down[:D] = torch.diag(torch.where(norm_D.abs() > 1e-12, 1 / norm_D, 0.0)) * (rank / D) ** 0.5
    up = wanted.new_zeros(len(wanted), rank)
    up[:, :D] = wanted * norm_D * (D / rank) ** 0.5
    return down, wanted.new_ones(rank), up
