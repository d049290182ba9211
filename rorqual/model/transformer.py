"""The whole network: embedding, layers, final norm, head, and the MTP modules that share embedding and head.

Shape letters, for the whole package: B batch, T tokens, S keys, D hidden, H heads, C kv latent, Q q latent, N nope,
R rope, U value, X = C + R (a cached latent) or N + R (a key), E experts, K top-k, F expert width, V vocabulary, M = N*K
(token, slot) pairs where N counts tokens, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.model.batch import Batch, Routing
from rorqual.model.block import Block
from rorqual.model.layers import Embedding, Linear, RMSNorm
from rorqual.model.mtp import MTP
from rorqual.model.quantised import Choose, use_formats
from rorqual.ops.native.training import native_missing
from rorqual.ops.rope import cos_sin, inverse_frequencies
from rorqual.ops.triton.available import triton_missing


class Transformer(nn.Module):
    """`Transformer(cfg)(tokens_BT)` -> logits [B, T, V].

    dtype: of the parameters; compute_dtype: of the activations (None: the same). fp32 parameters under bf16 activations
    are the training form. Initialised as in the paper (section 4.2): every weight N(0, initializer_range), norms 1,
    correction biases 0; the caller seeds torch. experts: "auto" is the grouped op on CUDA (with a backward of its own where
    Triton is) and the loop on CPU.
    formats: which weights stay quantised (`quantised.use_formats`); the config's quantization_config says how a
    checkpoint is stored and builds nothing by itself. allocate=False leaves every weight on the meta device, for a
    loader that brings its own.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        experts: str = "auto",
        attention: str = "sdpa",
        formats: Choose | None = None,
        init: bool = True,
        allocate: bool = True,
    ) -> None:
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        device = torch.device(device)
        if experts == "auto":
            if device.type == "cuda":
                experts = "grouped" if triton_missing() else "fused"
            else:
                experts = "loop" if native_missing() else "native"
        with torch.device("meta"):
            self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
            self.layers = nn.ModuleList(Block(cfg, i, experts, attention) for i in range(cfg.num_hidden_layers))
            self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
            if not cfg.tie_word_embeddings:
                self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
            depths = range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
            self.mtp = nn.ModuleList(MTP(cfg, i, experts, attention) for i in depths)
        speeds, self.rope_factor = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
        self._set_dtype(dtype)
        if formats is not None:
            use_formats(self, formats)
        if allocate and device.type != "meta":
            self.to_empty(device=device)
        self.rope_speeds: Tensor
        self.register_buffer("rope_speeds", torch.tensor(speeds, dtype=torch.float32, device=device), persistent=False)
        if init and allocate and device.type != "meta":
            self.init_weights()

    def _set_dtype(self, dtype: torch.dtype) -> None:
        """Of the parameters; fp32 buffers stay fp32."""
        if dtype != torch.float32:
            for parameter in self.parameters():
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of standard deviation `initializer_range`, ones in norms, zero biases; in place."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.cfg.initializer_range)
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def forward(self, tokens_BT: Tensor, batch: Batch | None = None) -> Tensor:
        """Logits [B, T, V] in the compute dtype."""
        return self.head(self.hidden(tokens_BT, batch)[0])

    def hidden(self, tokens_BT: Tensor, batch: Batch | None = None) -> tuple[Tensor, list[Routing]]:
        """The hidden states after the final norm [B, T, D], and what each routed layer decided."""
        batch = batch or Batch()
        rope, visible = self._rope(tokens_BT, batch), self._visible(tokens_BT, batch)
        x, routings = self.embed(tokens_BT), []
        for i, layer in enumerate(self.layers):
            x, routing = layer(x, rope, visible, batch.cache and batch.cache.layer(i))
            if routing is not None:
                routings.append(routing)
        return self.norm(x), routings

    def predict_further(
        self, h_BTD: Tensor, later_tokens: Sequence[Tensor], batch: Batch | None = None
    ) -> tuple[list[Tensor], list[Routing]]:
        """Multi-token prediction: module k reads the hidden states of the one before (the model's own, after the final
        norm, for k = 0) and the tokens k + 1 places later, later_tokens[k] [B, T]; it predicts those k + 2 places later.

        Returns the normed hidden states of each depth, for `head`, and the modules' routing decisions.
        """
        batch = batch or Batch()
        rope, visible = self._rope(later_tokens[0], batch), self._visible(later_tokens[0], batch)
        hs, routings = [], []
        for i, (module, tokens_BT) in enumerate(zip(self.mtp, later_tokens, strict=False), len(self.layers)):
            cache = batch.cache and batch.cache.layer(i)
            h_BTD, routing = module(h_BTD, self.embed(tokens_BT), rope, visible, cache)
            hs.append(h_BTD)
            if routing is not None:
                routings.append(routing)
        return hs, routings

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x = self.embed_tokens(tokens_BT)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def head(self, h_BTD: Tensor) -> Tensor:
        """Logits over the vocabulary; the tied form uses the embedding."""
        if self.cfg.tie_word_embeddings:
            return self.embed_tokens.project(h_BTD)
        return self.lm_head(h_BTD)

    @property
    def head_weight(self) -> Tensor:
        """What `head` multiplies by, [V, D], of an unquantised model: for losses that never hold all logits."""
        return self.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def _rope(self, tokens_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        positions = batch.positions_BT
        if positions is None:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return cos_sin(positions, self.rope_speeds, self.rope_factor)

    def _visible(self, tokens_BT: Tensor, batch: Batch) -> Tensor | None:
        """Which keys each query sees, [B, T, S]; None is plain causal over the tokens themselves."""
        if batch.cache is not None and (batch.cache.fresh or batch.cache.lengths_B is not None):
            return None  # plain causal; said by the lengths
        if batch.cache is not None:
            assert batch.positions_BT is not None
            page_size = batch.cache.latents.shape[2]
            keys_S = torch.arange(batch.cache.page_table_BP.shape[1] * page_size, device=tokens_BT.device)
            return keys_S <= batch.positions_BT[..., None]
        if batch.documents_BT is not None:
            same = batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :]
            return same.tril()
        return None
