"""Multi-head latent attention (DeepSeek-V3 section 2.1.1).

Keys and values of a token come from one latent of `kv_lora_rank` numbers, and position from one rotary key shared by
all heads: those C + R numbers are all that is cached. Training expands them into heads. Decoding need not: with
kv_b = [W_UK; W_UV] per head, q^T (W_UK c) = (W_UK^T q)^T c, so the query goes into the latent space instead, and W_UV
is applied after the attention. Both forms stand below and are tested against each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.batch import LayerPages
from rorqual.model.layers import Linear, RMSNorm
from rorqual.ops.attention import (
    absorbed_is_cheaper,
    attend_backends,
    attend_in_chunks,
    attend_latent,
    attend_pages,
)
from rorqual.ops.fused import fuses
from rorqual.ops.rope import rotate

LATENT_NORM_EPS = 1e-6
"""The released code leaves the two latent norms at their default epsilon, whatever rms_norm_eps says."""

CONTEXT_CHUNK = 4096
"""Cached tokens expanded at once while a prompt is read: bounds the memory, whatever the context's length."""


class MLA(nn.Module):
    """Names are the released ones. q_lora_rank null: one q_proj instead of q_a_proj, q_a_layernorm, q_b_proj."""

    def __init__(self, cfg: ModelConfig, backend: str = "sdpa") -> None:
        super().__init__()
        self.H, self.C = cfg.num_attention_heads, cfg.kv_lora_rank
        self.N, self.R, self.U = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.scale = cfg.softmax_scale
        self.attend = attend_backends.get(backend)
        if cfg.q_lora_rank is None:
            self.q_proj = Linear(cfg.hidden_size, self.H * (self.N + self.R))
        else:
            self.q_a_proj = Linear(cfg.hidden_size, cfg.q_lora_rank)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(cfg.q_lora_rank, self.H * (self.N + self.R))
        self.kv_a_proj_with_mqa = Linear(cfg.hidden_size, self.C + self.R)
        self.kv_a_layernorm = RMSNorm(self.C, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.C, self.H * (self.N + self.U))
        self.o_proj = Linear(self.H * self.U, cfg.hidden_size)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible_BTS: Tensor | None = None,
        cache: LayerPages | None = None,
    ) -> Tensor:
        """rope: cos, sin [B or 1, T, R/2]. With a cache, the new latents are written to it and attention reads all keys
        of each row from it, S = pages * page_size; without, the keys are the T tokens themselves."""
        if cache is not None and cache.lengths_B is not None:
            return self.o_proj(self.decode(x_BTD[:, 0], (rope[0][:, 0], rope[1][:, 0]), cache).flatten(-2))[:, None]
        q_nope_BTHN, q_rope_BTHR = self.queries(x_BTD, rope)
        latents_BSX = self.latents(x_BTD, rope)
        if cache is not None:
            latents_BSX = cache.through(latents_BSX)
        T = x_BTD.shape[1]
        if cache is not None and absorbed_is_cheaper(T, self.C, self.R, self.N, self.U):
            assert visible_BTS is not None
            out_BTHU = self.absorbed(q_nope_BTHN, q_rope_BTHR, latents_BSX, visible_BTS)
        else:
            chunk = CONTEXT_CHUNK if cache is not None else None
            out_BTHU = self.expanded(q_nope_BTHN, q_rope_BTHR, latents_BSX, visible_BTS, chunk)
        return self.o_proj(out_BTHU.flatten(-2))

    def decode(self, x_BD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerPages) -> Tensor:
        """One new token a row, absorbed, the pages read where they lie: [B, H, U]. rope: cos, sin [B, R/2]."""
        assert cache.lengths_B is not None
        q_nope, q_rope = self.project_queries(x_BD)
        kv_BX, slots_B = self.kv_a_proj_with_mqa(x_BD), cache.slots_BT[:, 0]
        if fuses(x_BD):
            from rorqual.ops.triton.fused import rotate_heads, write_latents

            write_latents(kv_BX, self.kv_a_layernorm.weight, LATENT_NORM_EPS, *rope, cache.pages, slots_B)
            q_rope = rotate_heads(q_rope, *rope)
        else:
            cache._replace(slots_BT=slots_B).write(self.latent(kv_BX, rope))
            q_rope = rotate(q_rope, rope[0][:, None], rope[1][:, None])
        w_uk, w_uv = self.kv_b_proj.dense(x_BD.dtype).view(self.H, self.N + self.U, self.C).split((self.N, self.U), 1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        q = torch.cat((q_latent, q_rope), -1)
        o_BHC = attend_pages(q, cache.pages, cache.page_table_BP, cache.lengths_B, self.C, self.scale)
        return torch.bmm(o_BHC.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def queries(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Per head: the part matched by content [B, T, H, N] and the part matched by position [B, T, H, R]."""
        q_nope, q_rope = self.project_queries(x_BTD)
        cos, sin = rope
        return q_nope, rotate(q_rope, cos[..., None, :], sin[..., None, :])

    def project_queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same before rotation, for x [..., D]."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.unflatten(-1, (self.H, -1)).split((self.N, self.R), -1)

    def latents(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What is cached for each token: the normed latent and the rotated shared key, [B, T, C + R]."""
        return self.latent(self.kv_a_proj_with_mqa(x_BTD), rope)

    def latent(self, kv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The same from the projection [..., C + R]."""
        c_kv, k_rope = kv.split((self.C, self.R), -1)
        return torch.cat((self.kv_a_layernorm(c_kv), rotate(k_rope, *rope)), -1)

    def expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latents_BSX: Tensor,
        visible_BTS: Tensor | None,
        chunk: int | None = None,
    ) -> Tensor:
        """Every head with its own keys and values; at most `chunk` of them at a time, if given. Returns [B, T, H, U]."""
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)

        def expand(start: int, end: int) -> tuple[Tensor, Tensor]:
            c_kv, k_rope = latents_BSX[:, start:end].split((self.C, self.R), -1)
            k_nope, v = self.kv_b_proj(c_kv).unflatten(-1, (self.H, -1)).split((self.N, self.U), -1)
            k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.H, -1)), -1)
            return k.transpose(1, 2), v.transpose(1, 2)

        S = latents_BSX.shape[1]
        if chunk is None or chunk >= S:
            return self.attend(q, *expand(0, S), self.scale, visible_BTS).transpose(1, 2)
        assert visible_BTS is not None
        return attend_in_chunks(q, expand, chunk, self.scale, visible_BTS).transpose(1, 2)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latents_BSX: Tensor, visible_BTS: Tensor) -> Tensor:
        """All heads over the latent itself. Returns [B, T, H, U]."""
        kv_b = self.kv_b_proj.dense(q_nope.dtype).view(self.H, self.N + self.U, self.C)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, kv_b[:, : self.N])
        o_latent = attend_latent(torch.cat((q_latent, q_rope), -1), latents_BSX, self.C, self.scale, visible_BTS)
        return torch.einsum("bthc,huc->bthu", o_latent, kv_b[:, self.N :])
