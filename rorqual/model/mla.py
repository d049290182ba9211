"""Multi-head latent attention (DeepSeek-V3 section 2.1.1).

Keys and values of a token come from one latent of `kv_lora_rank` numbers, and position from one rotary key shared by
all heads: those C + R numbers are all that is cached. Training expands them into heads. Decoding need not: with
kv_b = [W_UK; W_UV] per head, q^T (W_UK c) = (W_UK^T q)^T c, so the query goes into the latent space instead, and W_UV
is applied after the attention. Both forms stand below and are tested against each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rorqual.config import ModelConfig
from rorqual.model.batch import LayerPages
from rorqual.model.layers import Linear, RMSNorm, plain
from rorqual.ops import training
from rorqual.ops.attention import (
    absorbed_is_cheaper,
    attend_backends,
    attend_in_chunks,
    attend_latent,
    attend_pages,
)
from rorqual.ops.fused import fuses, trains
from rorqual.ops.rope import rotate

LATENT_NORM_EPS = 1e-6
"""The released code leaves the two latent norms at their default epsilon, whatever rms_norm_eps says."""

CONTEXT_CHUNK = 4096
"""Cached tokens expanded at once while a prompt is read: bounds the memory, whatever the context's length."""


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Fused attention is kept, everything before it computed again from the layer's input."""
    attention = "scaled_dot_product" in str(op) or "rorqual.attend" in str(op)
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE


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
        self.recompute = False
        self.fixed = False  # `model.fixed`

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
        if cache is None and torch.is_grad_enabled():
            attended = self._train_fused if trains(x_BTD) else self._train
            if self.recompute:
                policy = partial(create_selective_checkpoint_contexts, _keep_attention)
                out = checkpoint(attended, x_BTD, rope, visible_BTS, use_reentrant=False, context_fn=policy)
            else:
                out = attended(x_BTD, rope, visible_BTS)
            return self.o_proj(out.flatten(-2))
        if cache is not None and fuses(x_BTD):
            q_BTHX, latents_BSX = self._read_fused(x_BTD, rope, cache)
        else:
            q_BTHX = self.queries(x_BTD, rope)
            latents_BSX = self.latents(x_BTD, rope)
            if cache is not None:
                latents_BSX = cache.through(latents_BSX)
        T, fresh = x_BTD.shape[1], cache is None or cache.fresh
        if not fresh and absorbed_is_cheaper(T, self.C, self.R, self.N, self.U):
            assert visible_BTS is not None
            out_BTHU = self.absorbed(q_BTHX, latents_BSX, visible_BTS)
        else:
            chunk = None if fresh else CONTEXT_CHUNK
            out_BTHU = self.expanded(q_BTHX, latents_BSX, visible_BTS, chunk)
        return self.o_proj(out_BTHU.flatten(-2))

    def _train(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_BTS: Tensor | None) -> Tensor:
        """Expanded attention over the tokens themselves: [B, T, H, U]."""
        return self.expanded(self.queries(x_BTD, rope), self.latents(x_BTD, rope), visible_BTS)

    def _train_fused(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], visible_BTS: Tensor | None) -> Tensor:
        """The same, what is between the products in a kernel each."""
        B, T, _ = x_BTD.shape
        cos, sin = (angles.reshape(-1, self.R // 2) for angles in rope)
        first, kv_a = self.q_proj if hasattr(self, "q_proj") else self.q_a_proj, self.kv_a_proj_with_mqa
        if plain(first, kv_a):
            q, kv = training.products(x_BTD, first.weight, kv_a.weight)
        else:
            q, kv = first(x_BTD), kv_a(x_BTD)
        if not hasattr(self, "q_proj"):
            q = self.q_b_proj(self.q_a_layernorm(q))
        kv_NX = kv.flatten(0, 1)
        c_kv, k_rope = training.latent(kv_NX, self.kv_a_layernorm.weight, LATENT_NORM_EPS, cos, sin)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.H, -1))
        k, v = (t.unflatten(0, (B, T)).transpose(1, 2) for t in training.keys_values(kv, k_rope, self.N))
        q = training.rotate_queries_(q, cos, sin, self.H).unflatten(-1, (self.H, -1)).transpose(1, 2)
        return self.attend(q, k, v, self.scale, visible_BTS).transpose(1, 2)

    def _read_fused(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerPages) -> tuple[Tensor, Tensor]:
        """Queries, and all keys' latents, the new ones written into their pages; few kernels."""
        from rorqual.ops.triton.fused import rotate_queries_, write_latents

        B, T, _ = x_BTD.shape
        cos, sin = (angles.expand(B, T, -1).reshape(B * T, -1) for angles in rope)
        kv = self.kv_a_proj_with_mqa(x_BTD).flatten(0, 1)
        slots = cache.slots_BT.flatten()
        write_latents(kv, self.kv_a_layernorm.weight, LATENT_NORM_EPS, cos, sin, cache.pages, slots)
        q = rotate_queries_(self.project(x_BTD).flatten(0, 1), cos, sin, self.H).view(B, T, self.H, -1)
        return q, cache.keys(x_BTD.dtype)

    def decode(self, x_BD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerPages) -> Tensor:
        """One new token a row, absorbed, the pages read where they lie: [B, H, U]. rope: cos, sin [B, R/2]."""
        assert cache.lengths_B is not None
        if self.fixed or fuses(x_BD):
            return self._decode_fused(x_BD, rope, cache)
        q_nope, q_rope = self.project_queries(x_BD)
        cache._replace(slots_BT=cache.slots_BT[:, 0]).write(self.latent(self.kv_a_proj_with_mqa(x_BD), rope))
        w_uk, w_uv = self._absorbing(x_BD.dtype)
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        q = torch.cat((q_latent, rotate(q_rope, rope[0][:, None], rope[1][:, None])), -1)
        o_BHC = attend_pages(q, cache.pages, cache.page_table_BP, cache.lengths_B, self.C, self.scale)
        return torch.bmm(o_BHC.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def _decode_fused(self, x_BD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerPages) -> Tensor:
        """The same in few launches: five for few rows of plain weights."""
        from rorqual.ops.triton.decode import absorbed_queries, merged_values
        from rorqual.ops.triton.fused import write_latents
        from rorqual.ops.triton.mla import SPLIT, busy_split, parts
        from rorqual.ops.triton.stream import TOKENS, rows_dot

        assert cache.lengths_B is not None
        kv_a = self.kv_a_proj_with_mqa
        first = self.q_proj if hasattr(self, "q_proj") else self.q_a_proj
        one, two = first.kernel_weight, kv_a.kernel_weight
        if len(x_BD) <= TOKENS and one and two and one.kind == two.kind and not (one.dynamic or two.dynamic):
            q, kv_BX = rows_dot(x_BD, one, two)
        else:
            q, kv_BX = first(x_BD), kv_a(x_BD)
        if not hasattr(self, "q_proj"):
            q = self.q_b_proj(self.q_a_layernorm(q))
        write_latents(kv_BX, self.kv_a_layernorm.weight, LATENT_NORM_EPS, *rope, cache.pages, cache.slots_BT[:, 0])
        w_uk, w_uv = self._absorbing(x_BD.dtype)
        q_BHX = absorbed_queries(q, w_uk, *rope, self.R)
        page = cache.pages.shape[1]
        keys = cache.page_table_BP.shape[1] * page
        split = SPLIT if self.fixed else busy_split(len(x_BD), self.H, keys)
        part, lse = parts(q_BHX, cache.pages, cache.page_table_BP, cache.lengths_B, self.C, self.scale, split)
        block = 32 if self.fixed else None
        return merged_values(part, lse, cache.lengths_B, w_uv, x_BD.dtype, keys, page, split, block)

    def _absorbing(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV [H, U, C]."""
        w = self.kv_b_proj.dense(dtype).view(self.H, self.N + self.U, self.C)
        w_uk, w_uv = w.split((self.N, self.U), 1)
        return w_uk, w_uv

    def queries(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, H, N + R]: per head the part matched by content, then the part matched by position, rotated."""
        q_nope, q_rope = self.project_queries(x_BTD)
        cos, sin = rope
        return torch.cat((q_nope, rotate(q_rope, cos[..., None, :], sin[..., None, :])), -1)

    def project_queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both parts before rotation, for x [..., D]."""
        q_nope, q_rope = self.project(x).unflatten(-1, (self.H, -1)).split((self.N, self.R), -1)
        return q_nope, q_rope

    def project(self, x: Tensor) -> Tensor:
        """Queries [..., H * (N + R)] as projected."""
        if hasattr(self, "q_proj"):
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def latents(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """What is cached for each token: the normed latent and the rotated shared key, [B, T, C + R]."""
        return self.latent(self.kv_a_proj_with_mqa(x_BTD), rope)

    def latent(self, kv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The same from the projection [..., C + R]."""
        c_kv, k_rope = kv.split((self.C, self.R), -1)
        return torch.cat((self.kv_a_layernorm(c_kv), rotate(k_rope, *rope)), -1)

    def expanded(
        self, q_BTHX: Tensor, latents_BSX: Tensor, visible_BTS: Tensor | None, chunk: int | None = None
    ) -> Tensor:
        """Every head with its own keys and values; at most `chunk` of them at a time, if given. Returns [B, T, H, U]."""
        q = q_BTHX.transpose(1, 2)

        def expand(start: int, end: int) -> tuple[Tensor, Tensor]:
            c_kv, k_rope = latents_BSX[:, start:end].split((self.C, self.R), -1)
            kv = self.kv_b_proj(c_kv).unflatten(-1, (self.H, -1))
            k_nope, v = kv.split((self.N, self.U), -1)
            if fuses(kv):
                from rorqual.ops.triton.fused import expanded_keys

                k = expanded_keys(kv.flatten(0, 1), k_rope.reshape(-1, self.R), self.N).view(*kv.shape[:3], -1)
                return k.transpose(1, 2), v.transpose(1, 2)
            k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.H, -1)), -1)
            return k.transpose(1, 2), v.transpose(1, 2)

        S = latents_BSX.shape[1]
        if chunk is None or chunk >= S:
            return self.attend(q, *expand(0, S), self.scale, visible_BTS).transpose(1, 2)
        assert visible_BTS is not None
        return attend_in_chunks(q, expand, chunk, self.scale, visible_BTS).transpose(1, 2)

    def absorbed(self, q_BTHX: Tensor, latents_BSX: Tensor, visible_BTS: Tensor) -> Tensor:
        """All heads over the latent itself. Returns [B, T, H, U]."""
        q_nope, q_rope = q_BTHX.split((self.N, self.R), -1)
        kv_b = self.kv_b_proj.dense(q_nope.dtype).view(self.H, self.N + self.U, self.C)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, kv_b[:, : self.N])
        o_latent = attend_latent(torch.cat((q_latent, q_rope), -1), latents_BSX, self.C, self.scale, visible_BTS)
        return torch.einsum("bthc,huc->bthu", o_latent, kv_b[:, self.N :])
