"""Attention over expanded heads, and over the latent itself (arXiv 2405.04434 section 2.1; DeepSeek-V3 section 2.1.1).

Multi-head latent attention has two equal forms. *Expanded*: every head gets its own keys and values from the latent,
as in ordinary attention; cheap per (query, key) pair, but each cached token must be expanded once. *Absorbed*: the
expansion is folded into the query and the output, so that all heads attend to the latent as one shared key and value;
each pair costs more, but the cache is read as it lies. `absorbed_is_cheaper` computes which wins.

Visibility is either causal (`visible_BTS=None`, T == S) or given per query and key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.registry import Backends

Attend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
attend_backends: Backends[Attend] = Backends("attention")

BOUND = 2e-5
"""Largest absolute difference between backends in fp32, for inputs of unit scale."""


@attend_backends.register("reference")
def attend_reference(
    q_BHTX: Tensor, k_BHSX: Tensor, v_BHSU: Tensor, scale: float, visible_BTS: Tensor | None
) -> Tensor:
    """softmax(q k^T * scale) v in fp32 -> [B, H, T, U] in q's dtype. A query that sees nothing returns zeros."""
    scores = torch.matmul(q_BHTX.float(), k_BHSX.float().transpose(-1, -2)) * scale
    if visible_BTS is None:
        visible_BTS = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None]
    probs = scores.masked_fill(~visible_BTS[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.matmul(probs, v_BHSU.float()).to(q_BHTX.dtype)


@attend_backends.register("sdpa")
def attend_sdpa(q_BHTX: Tensor, k_BHSX: Tensor, v_BHSU: Tensor, scale: float, visible_BTS: Tensor | None) -> Tensor:
    """PyTorch's fused attention; it chooses cuDNN, flash, memory-efficient or plain by shape and device."""
    mask = None if visible_BTS is None else visible_BTS[:, None]
    return F.scaled_dot_product_attention(q_BHTX, k_BHSX, v_BHSU, mask, is_causal=mask is None, scale=scale)


def attend_latent(q_BTHX: Tensor, latents_BSX: Tensor, latent_dim: int, scale: float, visible_BTS: Tensor) -> Tensor:
    """Absorbed attention: queries [B, T, H, C + R] against cached latents [B, S, C + R] shared by all heads.

    Returns the attended latents [B, T, H, C] in q's dtype; softmax in fp32. visible_BTS: which keys each query sees.
    """
    B, T, H, X = q_BTHX.shape
    q_BMX = q_BTHX.reshape(B, T * H, X)
    scores = torch.matmul(q_BMX, latents_BSX.transpose(1, 2)).float().view(B, T, H, -1) * scale
    probs = scores.masked_fill(~visible_BTS[:, :, None], float("-inf")).softmax(-1)
    probs_BMS = probs.to(q_BTHX.dtype).view(B, T * H, -1)
    return torch.matmul(probs_BMS, latents_BSX[..., :latent_dim]).view(B, T, H, latent_dim)


def absorbed_is_cheaper(queries: int, C: int, R: int, N: int, U: int) -> bool:
    """Whether attending in the latent costs fewer operations than expanding it, for this many queries per cached token.

    Per head and cached token: absorbed 2 (C + R + C) a query; expanded 2 (N + R + U) a query and 2 C (N + U) once.
    """
    return queries * (2 * C + R) <= queries * (N + R + U) + C * (N + U)
