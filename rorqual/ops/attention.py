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

from rorqual.errors import BackendUnavailable
from rorqual.ops.native import training as native
from rorqual.ops.triton.available import triton_missing
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
    """PyTorch's fused attention; it chooses cuDNN, flash, memory-efficient or plain by shape and device. Trained on a CPU
    it is `native` where that can be; else values are padded to the keys' width: torch's flash attention takes no other
    there, and skips what is not causal."""
    if q_BHTX.device.type == "cpu" and torch.is_grad_enabled() and native.attends(q_BHTX, k_BHSX, v_BHSU, scale):
        return attend_native(q_BHTX, k_BHSX, v_BHSU, scale, visible_BTS)
    mask = None if visible_BTS is None else visible_BTS[:, None]
    X, U = q_BHTX.shape[-1], v_BHSU.shape[-1]
    if q_BHTX.device.type == "cpu" and U < X and torch.is_grad_enabled():
        v_BHSX = F.pad(v_BHSU, (0, X - U))
        return F.scaled_dot_product_attention(q_BHTX, k_BHSX, v_BHSX, mask, is_causal=mask is None, scale=scale)[
            ..., :U
        ]
    return F.scaled_dot_product_attention(q_BHTX, k_BHSX, v_BHSU, mask, is_causal=mask is None, scale=scale)


@attend_backends.register("native", native.native_missing)
def attend_native(q_BHTX: Tensor, k_BHSX: Tensor, v_BHSU: Tensor, scale: float, visible_BTS: Tensor | None) -> Tensor:
    """The CPU kernels', with gradients. Raises BackendUnavailable for what they do not take (`native.attends`)."""
    if not native.attends(q_BHTX, k_BHSX, v_BHSU, scale):
        raise BackendUnavailable(
            "attention backend 'native' takes fp32 on a CPU, as many keys as queries, heads of a multiple of 16 numbers",
            remedy="use 'sdpa', which chooses by itself",
        )
    return native.Attend.apply(q_BHTX, k_BHSX, v_BHSU, scale, visible_BTS)  # type: ignore[no-untyped-call]


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


AttendPages = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
attend_pages_backends: Backends[AttendPages] = Backends("attention over pages")
PAGES_BOUND = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest relative error |out - reference| / |reference| (Frobenius norms) of a backend of `attend_pages` by dtype, against
the reference in fp32 on the same numbers: 16-bit backends round the probabilities and the result."""


@attend_pages_backends.register("reference")
def attend_pages_reference(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, latent_dim: int, scale: float
) -> Tensor:
    """The pages of each row gathered, then `attend_latent` in fp32."""
    size = pages_PSX.shape[1]
    visible_NS = torch.arange(table_NP.shape[1] * size, device=q_NHX.device) < lengths_N[:, None]
    pages_NP = table_NP.where(visible_NS[:, ::size], 0)
    latents_NSX = pages_PSX[pages_NP].flatten(1, 2).float().masked_fill(~visible_NS[..., None], 0.0)
    out_NHC = attend_latent(q_NHX.float()[:, None], latents_NSX, latent_dim, scale, visible_NS[:, None])[:, 0]
    return out_NHC.masked_fill(lengths_N[:, None, None] == 0, 0.0).to(q_NHX.dtype)


@attend_pages_backends.register("triton", triton_missing)
def attend_pages_triton(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, latent_dim: int, scale: float
) -> Tensor:
    """The pages are read where they lie; can be captured in a CUDA graph."""
    from rorqual.ops.triton.mla import decode

    return decode(q_NHX, pages_PSX, table_NP, lengths_N, latent_dim, scale)


def attend_pages_missing() -> str | None:
    """Why nothing faster than the reference can run here, or None."""
    return triton_missing()


def attend_pages(
    q_NHX: Tensor, pages_PSX: Tensor, table_NP: Tensor, lengths_N: Tensor, latent_dim: int, scale: float,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Absorbed attention of N queries [N, H, C + R], each over its own pages of a latent cache -> [N, H, C] in q's dtype.

    pages_PSX: [pages, page_size, C + R], contiguous; table_NP: int, each query's pages in order; lengths_N: int, the keys
    each query sees, from its first page on (drafted tokens of one row are queries of growing lengths). Length 0 gives
    zeros. What lies beyond a length, in the table or in a page, does not matter. backend "auto": triton on a GPU.
    Raises BackendUnavailable for a named backend that cannot run here.
    """
    if backend == "auto":
        backend = "triton" if q_NHX.is_cuda and attend_pages_missing() is None else "reference"
    return attend_pages_backends.get(backend)(q_NHX, pages_PSX, table_NP, lengths_N, latent_dim, scale)


def attend_in_chunks(
    q_BHTX: Tensor,
    expand: Callable[[int, int], tuple[Tensor, Tensor]],
    chunk: int,
    scale: float,
    visible_BTS: Tensor,
) -> Tensor:
    """`attend_reference` over keys that are made chunk by chunk, so that never more than `chunk` of them exist expanded.

    expand(start, end) -> keys [B, H, end - start, X] and values [B, H, end - start, U]. Each chunk is attended for itself
    and the parts are merged by their log-sum-exp, in fp32. A query that sees nothing returns zeros.
    """
    out: Tensor | None = None
    for start in range(0, visible_BTS.shape[2], chunk):
        end = min(start + chunk, visible_BTS.shape[2])
        k, v = expand(start, end)
        scores = torch.matmul(q_BHTX, k.transpose(-1, -2)).float() * scale
        scores = scores.masked_fill(~visible_BTS[:, None, :, start:end], float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        seen = lse > float("-inf")
        probs = (scores - lse.where(seen, 0.0)).exp()
        part = torch.matmul(probs.to(v.dtype), v).float()
        if out is None:
            out, total = part, lse
            continue
        both = torch.logaddexp(total, lse)
        safe = both.where(both > float("-inf"), 0.0)
        out = out * (total - safe).exp() + part * (lse - safe).exp()
        total = both
    assert out is not None
    return out.to(q_BHTX.dtype)


def absorbed_is_cheaper(queries: int, C: int, R: int, N: int, U: int) -> bool:
    """Whether attending in the latent costs fewer operations than expanding it, for this many queries per cached token.

    Per head and cached token: absorbed 2 (C + R + C) a query; expanded 2 (N + R + U) a query and 2 C (N + U) once.
    """
    return queries * (2 * C + R) <= queries * (N + R + U) + C * (N + U)
