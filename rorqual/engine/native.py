"""A model packed for the CPU kernels, and one call that computes a step.

The torch model is taken apart layer by layer: its weights are packed (`ops.native.pack`) and let go, so that a
memory-mapped checkpoint is never twice in memory. What stays of torch is the embedding table. Nothing here decides
anything: `runner` brings tokens, positions and pages.
"""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.config import ModelConfig
from rorqual.engine.sampler import Wish
from rorqual.errors import BackendUnavailable
from rorqual.model.block import Block
from rorqual.model.layers import MLP, Embedding, Linear
from rorqual.model.moe import MoE, RoutedExperts
from rorqual.model.mtp import MTP
from rorqual.model.quantised import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, Stored
from rorqual.model.transformer import Transformer
from rorqual.ops.fp8 import Fp8Blocks
from rorqual.ops.native import build
from rorqual.ops.native.build import PANEL
from rorqual.ops.native.pack import (
    KINDS,
    Kind,
    Packed,
    Plain,
    interleave,
    one_by_one,
    pack_fp8,
    pack_integers,
    pack_plain,
    rows_of_blocks,
)
from rorqual.ops.packed import GROUP, PackedIntegers, quantize_groups, unpack_codes
from rorqual.ops.rope import cos_sin

log = logging.getLogger(__name__)
PAGE = 64
_WISH = struct.Struct("@P3dfi")  # build.Wish
INTEGERS: dict[str, int] = {"int8": 8, "int4": 4}


class StepTokens:
    """The tokens of a step as the kernels read them: id, position, row (of the page table) and slot (page * 64 + place) of
    each, and the rows' pages, all in one array of int32.

    rows: (ids, first position, pages) of each row; a row's tokens stand together and in order.
    """

    def __init__(self, rows: Sequence[tuple[Sequence[int], int, Sequence[int]]]) -> None:
        self.ids: list[int] = []
        position: list[int] = []
        row: list[int] = []
        slot: list[int] = []
        width = max((start + len(ids) - 1) // PAGE + 1 for ids, start, _ in rows)
        pages: list[int] = []
        for i, (ids, start, held) in enumerate(rows):
            end = start + len(ids)
            self.ids += ids
            position += range(start, end)
            row += [i] * len(ids)
            slot += [held[p // PAGE] * PAGE + p % PAGE for p in range(start, end)]
            used = (end - 1) // PAGE + 1
            pages += [*held[:used], *[0] * (width - used)]
        n = len(self.ids)
        self.numbers = np.array([*self.ids, *position, *row, *slot, *pages], np.int32)
        base = self.numbers.__array_interface__["data"][0]
        self.struct = build.Tokens(*(base + 4 * n * i for i in range(5)), n, width)

    def __len__(self) -> int:
        return len(self.ids)


def draw(lib: ctypes.CDLL, engine: int | None, logits_NV: Tensor, wishes: Sequence[Wish]) -> list[int]:
    """`sampler.Kernel` on the threads of an engine (`rq_open`)."""
    N, V = logits_NV.shape
    assert engine and logits_NV.dtype == torch.float32 and logits_NV.stride(1) == 1 and len(wishes) == N
    assert all(m is None or (m.dtype == np.uint32 and 32 * m.size >= V and m.flags.c_contiguous) for m, _, _ in wishes)
    told = b"".join(
        _WISH.pack(
            0 if mask is None else mask.__array_interface__["data"][0],
            p.top_p, p.min_p, u, p.temperature and max(p.temperature, 1e-30), min(p.top_k, V),
        )
        for mask, p, u in wishes
    )  # fmt: skip
    tokens = np.empty(N, np.int32)
    lib.rq_draw(engine, logits_NV.data_ptr(), logits_NV.stride(0), V, N, told, tokens.__array_interface__["data"][0])
    return tokens.tolist()


class NativeModel:
    """kind: how plain weights are packed; None keeps what the checkpoint stores (bf16 and fp32 as they are). Weights that
    are stored quantised keep their format unless `kind` says otherwise. Router and norms are fp32 always.

    Takes the model apart: afterwards it is empty. Raises BackendUnavailable where the kernels cannot be built or do not
    fit the model's shape (`unsupported`).
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, *, kind: Kind | None, max_positions: int, threads: int = 1) -> None:
        cfg = model.cfg
        if reason := unsupported(cfg):
            raise BackendUnavailable(f"the CPU kernels do not take this model: {reason}")
        self.cfg, self.kind = cfg, kind
        self.lib = build.library()
        self.row_width = -(-cfg.cache_dim // PANEL) * PANEL
        self.packed_bytes = 0
        self._dense_bytes = self._expert_bytes = 0.0
        self._kept: list[object] = []  # tensors the structures point into
        positions = torch.arange(max_positions)
        self._cos, self._sin = (t.contiguous() for t in cos_sin(positions, model.rope_speeds.cpu(), model.rope_factor))
        self.layers = (build.Layer * (cfg.num_hidden_layers + len(model.mtp)))()
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block)
            self.layers[i] = self._layer(block)
            _let_go(block)
        routed = sum(_bytes(m) for layer in self.layers for m in (layer.gate_up, layer.down) if layer.router.out)
        count = sum(layer.router.out for layer in self.layers)
        self._dense_bytes = self.packed_bytes - routed
        self._expert_bytes = routed / count if count else 0.0
        self.mtp: list[tuple[ctypes.Array[build.Matrix], list[int]]] = []
        for i, module in enumerate(model.mtp, cfg.num_hidden_layers):
            assert isinstance(module, MTP)
            self.layers[i] = self._layer(module.block)
            eh_proj = (build.Matrix * 1)(self._matrix(module.eh_proj))
            norms = (module.enorm, module.hnorm, module.shared_head.norm)
            self.mtp.append((eh_proj, [self._vector(norm.weight) for norm in norms]))
            _let_go(module)
        self.norm = self._vector(model.norm.weight)
        # The head of an int4 model stays at eight bits: it decides between tokens, and it is read once a step.
        head_kind: Kind | None = "int8" if kind == "int4" else kind
        self.head = (build.Matrix * 1)(
            self._matrix(model.embed_tokens if cfg.tie_word_embeddings else model.lm_head, head_kind)
        )
        self._dense_bytes += _bytes(self.head[0])
        if not cfg.tie_word_embeddings:
            _let_go(model.lm_head)
        self.embed_tokens = _detach(model.embed_tokens)
        self._table: Tensor | None = None
        if isinstance(self.embed_tokens, QuantizedEmbedding):
            self.embed_tokens.dtype = torch.float32
        else:
            assert isinstance(self.embed_tokens, Embedding)
            weight = self.embed_tokens.weight.detach()
            self._table = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
        self.packed_bytes += sum(t.nbytes for t in (*self.embed_tokens.parameters(), *self.embed_tokens.buffers()))
        self.struct = build.Model(
            ctypes.addressof(self.layers), self.norm, self._cos.data_ptr(), self._sin.data_ptr(),
            None if self._table is None else self._table.data_ptr(),
            cfg.num_hidden_layers, cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_nope_head_dim,
            cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.n_routed_experts or 0, cfg.num_experts_per_tok or 0,
            cfg.n_group or 1, cfg.topk_group or 1, int(cfg.norm_topk_prob), cfg.rms_norm_eps, cfg.softmax_scale,
            cfg.routed_scaling_factor, int(self._table is not None and self._table.dtype == torch.bfloat16),
        )  # fmt: skip
        _trim()
        self.name = KINDS[self.layers[0].o.kind]
        self.engine: int | None = None
        self.set_threads(threads)

    def step_bytes(self, experts: int) -> float:
        """Weights a step must read at least, when `experts` of all layers' routed experts have tokens."""
        return self._dense_bytes + experts * self._expert_bytes

    def set_threads(self, threads: int) -> None:
        """Results do not depend on it."""
        self.close()
        self.threads, self.engine = threads, self.lib.rq_open(threads)

    def bandwidth(self) -> float:
        """Bytes/s that all threads together read from memory, measured over a buffer of 64 MB."""
        room = torch.ones(1 << 24, dtype=torch.float32, device="cpu")
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            self.lib.rq_read(self.engine, room.data_ptr(), room.numel())
            best = min(best, time.perf_counter() - start)
        return room.nbytes / best

    def probe(self) -> None:
        """Time how many rows it takes until widening a bf16 or fp8 weight once beats doing it per row. Both give the same
        bits."""
        matrix = (build.Matrix * 1)(self.layers[0].o)
        x, y = _room(8, matrix[0].in_).fill_(1.0), _room(8, -(-matrix[0].out // PANEL) * PANEL)
        begin = time.perf_counter()

        def seconds(expand_from: int, rows: int) -> float:
            self.lib.rq_expand_from(expand_from)
            best = math.inf
            for _ in range(5):
                start = time.perf_counter()
                self.lib.rq_linear(self.engine, matrix, 0, x.data_ptr(), x.stride(0), rows, y.data_ptr(), y.stride(0))
                best = min(best, time.perf_counter() - start)
            return best

        fits = [n for n in (2, 3, 4, 6, 8) if seconds(2, n) < seconds(99, n)]
        self.lib.rq_expand_from(fits[0] if fits else 9)
        log.debug("widening from %s rows on, found in %.0f ms", fits[:1], 1000 * (time.perf_counter() - begin))

    def close(self) -> None:
        if self.engine is not None:
            self.lib.rq_close(self.engine)
            self.engine = None

    def __del__(self) -> None:
        if getattr(self, "engine", None) is not None:
            self.close()

    def forward(self, tokens: StepTokens, latents: Tensor, loads: np.ndarray | None = None) -> Tensor:
        """Hidden states after the final norm, [n, D] fp32. latents [layers, pages, 64, row_width] fp32, written in place;
        loads: int64 [layers, E + 1], to which are added each expert's tokens and, last, how many experts had any."""
        x, h = self._embed(tokens), _room(len(tokens), self.cfg.hidden_size)
        self.lib.rq_forward(
            self.engine, self.struct, tokens.struct, x.data_ptr(), self._table is not None, latents.data_ptr(),
            latents.stride(0), h.data_ptr(), None if loads is None else loads.ctypes.data,
        )  # fmt: skip
        return h

    def predict(self, depth: int, tokens: StepTokens, h: Tensor, latents: Tensor) -> Tensor:
        """MTP module `depth`, from hidden states h [n, D] and the tokens after them, at the hidden states' positions
        -> [n, D], normed for the head."""
        eh_proj, (enorm, hnorm, norm) = self.mtp[depth]
        layer = self.cfg.num_hidden_layers + depth
        embedding, out = self._embed(tokens), torch.empty_like(h)
        self.lib.rq_mtp(
            self.engine, self.struct, ctypes.byref(self.layers[layer]), eh_proj, enorm, hnorm, norm, tokens.struct,
            embedding.data_ptr(), self._table is not None, h.data_ptr(), latents[layer].data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def _embed(self, tokens: StepTokens) -> Tensor:
        """[n, D] fp32; undefined where the kernels look the rows up themselves."""
        if self._table is not None:
            return _room(len(tokens), self.cfg.hidden_size)
        return self.embed_tokens(torch.tensor(tokens.ids)).float().contiguous()

    def logits(self, h: Tensor) -> Tensor:
        """h [n, D] fp32, contiguous -> [n, V] fp32."""
        width = -(-self.head[0].out // PANEL) * PANEL
        y = _room(h.shape[0], width)
        self.lib.rq_linear(self.engine, self.head, 0, h.data_ptr(), h.stride(0), h.shape[0], y.data_ptr(), width)
        return y[:, : self.cfg.vocab_size]

    def draw(self, logits_NV: Tensor, wishes: Sequence[Wish]) -> list[int]:
        """`sampler.Kernel`."""
        return draw(self.lib, self.engine, logits_NV, wishes)

    # ---- packing -----------------------------------------------------------------------------------------------------

    def _layer(self, block: Block) -> build.Layer:
        cfg, attention = self.cfg, block.self_attn
        layer = build.Layer(eps=cfg.rms_norm_eps)
        layer.input_norm, layer.post_norm = (
            self._vector(norm.weight) for norm in (block.input_layernorm, block.post_attention_layernorm)
        )
        if cfg.q_lora_rank is None:
            layer.q_b = self._matrix(attention.q_proj)
        else:
            layer.q_a, layer.q_b = self._matrix(attention.q_a_proj), self._matrix(attention.q_b_proj)
            layer.q_a_norm = self._vector(attention.q_a_layernorm.weight)
        layer.kv_a = self._matrix(attention.kv_a_proj_with_mqa)
        layer.kv_a_norm = self._vector(attention.kv_a_layernorm.weight)
        layer.uk, layer.uv = self._absorbed(attention.kv_b_proj)
        layer.o = self._matrix(attention.o_proj)
        mlp = block.mlp
        if isinstance(mlp, MoE):
            layer.bias = self._vector(mlp.gate.e_score_correction_bias)
            layer.router = self._keep(pack_plain(mlp.gate.weight[None], "float32"))
            layer.gate_up, layer.down = self._experts(mlp.experts)
            mlp = mlp.shared_experts
        layer.shared_gate_up, layer.shared_down = self._gate_up(mlp), self._matrix(mlp.down_proj)
        return layer

    def _absorbed(self, kv_b: Linear | QuantizedLinear) -> Iterator[build.Matrix]:
        """Per head: W_UK transposed [C, N], and W_UV [U, C]. Integer groups run along C and cannot be transposed, so
        these stay plain, bf16 beside integers."""
        cfg = self.cfg
        form = kv_b.stored.form if isinstance(kv_b, QuantizedLinear) else None
        integers = self.kind in INTEGERS or isinstance(form, PackedIntegers)
        kind: Plain = "bfloat16" if integers else self._plain(_dtype(kv_b))
        weight = kv_b.dense(_dtype(kv_b)).unflatten(0, (cfg.num_attention_heads, -1))
        w_uk, w_uv = weight.split((cfg.qk_nope_head_dim, cfg.v_head_dim), 1)
        for part in (w_uk.mT, w_uv):
            yield self._keep(pack_plain(part, kind))

    def _plain(self, dtype: torch.dtype) -> Plain:
        """The plain form for weights of this dtype."""
        if self.kind == "float32" or self.kind == "bfloat16":
            return self.kind
        return "bfloat16" if dtype == torch.bfloat16 else "float32"

    def _matrix(self, module: nn.Module, kind: Kind | None = None) -> build.Matrix:
        kind = kind or self.kind
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            parts = {name: part[None] for name, part in module.stored.parts.items()}
            return self._keep(self._pack_stored(module.stored, parts, kind))
        assert isinstance(module, Linear | Embedding)
        return self._keep(self._pack(module.weight[None], kind))

    def _gate_up(self, mlp: MLP) -> build.Matrix:
        gate, up = mlp.gate_proj, mlp.up_proj
        if isinstance(gate, QuantizedLinear) and isinstance(up, QuantizedLinear) and gate.stored.form == up.stored.form:
            one, two = gate.stored.parts, up.stored.parts
            return self._keep(self._pack_pairs(gate.stored, {k: torch.stack((one[k], two[k]))[None] for k in one}))
        both = interleave(gate.dense(_dtype(gate)), up.dense(_dtype(up)))
        return self._keep(self._pack(both[None], self.kind))

    def _experts(self, experts: nn.Module) -> tuple[build.Matrix, build.Matrix]:
        if isinstance(experts, QuantizedExperts):
            gate_up, down = experts.gate_up, experts.down
            count = gate_up.shape[0]

            def part(stored: Stored, i: int) -> dict[str, Tensor]:
                return {name: tensor[i : i + 1] for name, tensor in stored.parts.items()}

            pairs = one_by_one(count, lambda i: self._pack_pairs(gate_up, part(gate_up, i)))
            downs = one_by_one(count, lambda i: self._pack_stored(down, part(down, i), self.kind))
            return self._keep(pairs), self._keep(downs)
        assert isinstance(experts, RoutedExperts)
        gate, up = experts.gate_up_proj.chunk(2, 1)
        pairs = one_by_one(len(gate), lambda i: self._pack(interleave(gate[i : i + 1], up[i : i + 1]), self.kind))
        packed = one_by_one(len(gate), lambda i: self._pack(experts.down_proj[i : i + 1], self.kind))
        return self._keep(pairs), self._keep(packed)

    def _pack(self, weight: Tensor, kind: Kind | None) -> Packed:
        """[count, out, in] plain -> `kind`, where its groups fit."""
        if kind in INTEGERS and weight.shape[-1] % GROUP == 0:
            return pack_integers(*quantize_groups(weight.float(), INTEGERS[kind]), INTEGERS[kind])
        if kind in INTEGERS:
            return pack_plain(weight, "bfloat16")
        return pack_plain(weight, self._plain(weight.dtype))

    def _pack_stored(self, stored: Stored, parts: dict[str, Tensor], kind: Kind | None) -> Packed:
        """parts [count, ...] of matrices [out, in]."""
        form = stored.form
        if kind in (None, form.name):
            if isinstance(form, Fp8Blocks):
                codes = parts["weight"]
                return pack_fp8(codes, rows_of_blocks(parts["weight_scale_inv"], codes.shape[1]))
            if isinstance(form, PackedIntegers) and _fits(form):
                return pack_integers(unpack_codes(parts["weight_packed"], form.bits), parts["weight_scale"], form.bits)
        return self._pack(form.dense(parts, torch.float32), kind)

    def _pack_pairs(self, stored: Stored, parts: dict[str, Tensor]) -> Packed:
        """parts [count, 2, ...] of gate and up -> alternating panels."""
        form = stored.form
        if self.kind in (None, form.name):
            if isinstance(form, Fp8Blocks):
                codes = parts["weight"].view(torch.uint8)
                rows = rows_of_blocks(parts["weight_scale_inv"], codes.shape[-2])
                return pack_fp8(interleave(*codes.unbind(1)), interleave(*rows.unbind(1)))
            if isinstance(form, PackedIntegers) and _fits(form):
                codes = unpack_codes(parts["weight_packed"], form.bits)
                return pack_integers(
                    interleave(*codes.unbind(1)), interleave(*parts["weight_scale"].unbind(1)), form.bits
                )
        return self._pack(interleave(*form.dense(parts, torch.float32).unbind(1)), self.kind)

    def _vector(self, weight: Tensor) -> int:
        kept = weight.detach().float().clone()
        self._kept.append(kept)
        return kept.data_ptr()

    def _keep(self, packed: Packed) -> build.Matrix:
        self._kept.append(packed)
        self.packed_bytes += packed.nbytes
        return packed.struct()


def unsupported(cfg: ModelConfig) -> str | None:
    """Why the kernels cannot compute this shape; None where they can."""
    if cfg.kv_lora_rank % PANEL:
        return f"kv_lora_rank {cfg.kv_lora_rank} is no multiple of {PANEL}"
    if (cfg.num_experts_per_tok or 0) > 64:
        return f"{cfg.num_experts_per_tok} experts per token are more than 64"
    return None


def _room(*shape: int) -> Tensor:
    """For the kernels, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _bytes(matrix: build.Matrix) -> float:
    return float(matrix.count * (matrix.data_stride + matrix.scale_stride))


def _fits(form: PackedIntegers) -> bool:
    return form.group == GROUP and form.scale_dtype == torch.bfloat16


def _dtype(module: Linear | QuantizedLinear) -> torch.dtype:
    return torch.float32 if isinstance(module, QuantizedLinear) else module.weight.dtype


def _let_go(module: nn.Module) -> None:
    """Free the weights, and of a mapped file the memory that holds its pages."""
    for tensor in (*module.parameters(), *module.buffers()):
        _page_out(tensor)
    for part in module.modules():
        for name in list(part._parameters):
            part._parameters[name] = None
        for name in list(part._buffers):
            part._buffers[name] = None


def _page_out(tensor: Tensor) -> None:
    """Tell the system that a mapped file's pages are not needed; where that is unknown nothing happens."""
    page, advice = 4096, 21  # MADV_PAGEOUT: keeps contents, so it is safe whatever the memory is
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0 and (libc := _libc()) is not None:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _trim() -> None:
    """Give back what packing has freed; the C library would keep it."""
    if (libc := _libc()) is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.madvise  # noqa: B018
    except (OSError, AttributeError):
        return None
    return libc


def _detach(embedding: nn.Module) -> nn.Module:
    """The embedding in memory of its own, so that no part of a mapped shard stays open for it."""
    for part in embedding.modules():
        for name, tensor in list(part._parameters.items()):
            if tensor is not None:
                part._parameters[name] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
                _page_out(tensor)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = buffer.clone()
    return embedding
