"""The teacher: SmolLM2-135M-Instruct out of its GGUF file, and a forward that one GPU runs for thousands of rows.

A library's `generate` keeps the GPU waiting at this size, so the forward is our own: caches allocated once, every row
at its own position, and an attention kernel that reads only the part of a row's cache that is filled. Without Triton,
or where its kernel fails the test at the start, scaled_dot_product_attention does the same. The reader knows the three
tensor types of this one file (F32, Q4_1, Q8_0) and needs numpy only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU path does without
    triton = None


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------- the GGUF file

GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGML_F32, GGML_Q4_1, GGML_Q8_0 = 0, 3, 8
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


class GGUFReader:
    """Metadata and tensors of a GGUF v3 file. `meta` is filled at once, tensors are dequantised on demand."""

    def __init__(self, path: Path) -> None:
        self.buf = memoryview(path.read_bytes())
        self.at = 0
        magic, version, n_tensors, n_meta = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise SystemExit(f"{path} is no GGUF v3 file (magic {magic!r}, version {version})")
        self.meta: dict[str, Any] = {}
        for _ in range(n_meta):
            key = self._string()
            self.meta[key] = self._value(self._unpack("<I")[0])
        self.infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name, n_dims = self._string(), self._unpack("<I")[0]
            shape = self._unpack(f"<{n_dims}Q")[::-1]  # GGUF lists the fastest dimension first
            self.infos[name] = (shape, *self._unpack("<IQ"))
        align = self.meta.get("general.alignment", 32)
        self.data_at = -(-self.at // align) * align

    def _unpack(self, fmt: str) -> tuple[Any, ...]:
        values = struct.unpack_from(fmt, self.buf, self.at)
        self.at += struct.calcsize(fmt)
        return values

    def _string(self) -> str:
        (n,) = self._unpack("<Q")
        self.at += n
        return bytes(self.buf[self.at - n : self.at]).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self._string()
        if kind == GGUF_ARRAY:
            item, n = self._unpack("<IQ")
            return [self._value(item) for _ in range(n)]
        return self._unpack("<" + GGUF_SCALARS[kind])[0]

    def tensor(self, name: str) -> torch.Tensor:
        """The named tensor in float32."""
        shape, kind, offset = self.infos[name]
        n, at = math.prod(shape), self.data_at + offset
        if kind == GGML_F32:
            flat = np.frombuffer(self.buf, "<f4", n, at).copy()
        elif kind == GGML_Q8_0:
            blocks = np.frombuffer(self.buf, Q8_0, n // 32, at)
            flat = blocks["d"][:, None].astype(np.float32) * blocks["qs"]
        elif kind == GGML_Q4_1:  # low nibbles hold the first 16 values of a block, high nibbles the last 16
            blocks = np.frombuffer(self.buf, Q4_1, n // 32, at)
            values = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=1).astype(np.float32)
            flat = blocks["d"][:, None].astype(np.float32) * values + blocks["m"][:, None].astype(np.float32)
        else:
            raise SystemExit(f"tensor {name}: type {kind} is not one of F32, Q4_1, Q8_0")
        return torch.from_numpy(np.ascontiguousarray(flat, dtype=np.float32).reshape(shape))


def read_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """SmolLM's byte-level BPE from the GGUF metadata: digits stand alone, then GPT-2's split."""
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    tok = Tokenizer(bpe)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return tok


# -------------------------------------------------------------------------------------------------- attention

if triton is not None:

    @triton.jit
    def _decode_kernel(
        q, k, v, pos, pos_stride, out, cache_len, scale, GROUP: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program = one row and one key/value head: its GROUP queries over keys 0..pos[row], online softmax.

        q, out [B, KV*GROUP, 64]; k, v [B, KV, cache_len, 64]; contiguous, pos need not be. Queries are padded to 16 for tl.dot.
        """
        pid = tl.program_id(0)
        row, head = pid // KV, pid % KV
        n = tl.load(pos + row * pos_stride) + 1
        g, d = tl.arange(0, 16), tl.arange(0, 64)
        q_at = (row * KV * GROUP + head * GROUP + g)[:, None] * 64 + d[None, :]
        query = tl.load(q + q_at, mask=(g < GROUP)[:, None], other=0.0)
        base = pid.to(tl.int64) * cache_len * 64
        top = tl.full([16], float("-inf"), tl.float32)
        total = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, 64], tl.float32)
        for start in range(0, n, BLOCK):
            t = start + tl.arange(0, BLOCK)
            keys = tl.load(k + base + t[None, :] * 64 + d[:, None], mask=(t < n)[None, :], other=0.0)
            score = tl.where((t < n)[None, :], tl.dot(query, keys) * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp(score - new_top[:, None])
            shrink = tl.exp(top - new_top)
            values = tl.load(v + base + t[:, None] * 64 + d[None, :], mask=(t < n)[:, None], other=0.0)
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None] + tl.dot(weight.to(values.dtype), values)
            top = new_top
        result = acc / total[:, None]
        tl.store(out + q_at, result.to(query.dtype), mask=(g < GROUP)[:, None])


def attend_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """q [B, H, 64], k and v [B, KV, L, 64], pos [B] -> [B, H, 64]; reads keys 0..pos only."""
    rows, kv, length, width = k.shape
    out = torch.empty_like(q)
    _decode_kernel[(rows * kv,)](
        q, k, v, pos, pos.stride(0), out, length, width**-0.5, GROUP=q.shape[1] // kv, KV=kv, BLOCK=64, num_warps=4
    )
    return out


def attend_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """The same by scaled_dot_product_attention over the whole cache: the heads of a group become query positions."""
    rows, kv, length, width = k.shape
    seen = torch.arange(length, device=q.device)[None, :] <= pos[:, None]
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    grouped = q.view(rows, kv, -1, width)
    bias = bias[:, None, None, :].expand(rows, kv, grouped.shape[2], length)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias).reshape(q.shape)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, Attend]:
    """Triton's kernel if it runs here and agrees with the plain one on random inputs, else the plain one."""
    if triton is None or device.type != "cuda":
        return "sdpa", attend_torch
    try:
        q = torch.randn(7, 9, 64, device=device, dtype=dtype)
        k, v = torch.randn(2, 7, 3, 256, 64, device=device, dtype=dtype)
        pos = torch.tensor([0, 1, 63, 64, 65, 200, 255], device=device)
        error = (attend_triton(q, k, v, pos) - attend_torch(q.float(), k.float(), v.float(), pos)).abs().max().item()
        if error < 0.06:  # two bf16 roundings of values up to 4; a wrong kernel is off by 1
            return "triton", attend_triton
        say(f"triton attention is off by {error:.3g}: falling back to sdpa")
    except Exception as problem:  # any compiler or driver trouble: the plain path still works
        say(f"triton attention failed ({type(problem).__name__}: {problem}): falling back to sdpa")
    return "sdpa", attend_torch


# -------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Sizes:
        return cls(
            layers=meta["llama.block_count"],
            hidden=meta["llama.embedding_length"],
            heads=meta["llama.attention.head_count"],
            kv_heads=meta["llama.attention.head_count_kv"],
            eps=meta["llama.attention.layer_norm_rms_epsilon"],
            theta=meta["llama.rope.freq_base"],
        )


def unpermute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores q and k rows with rotary pairs adjacent; back to first half and second half."""
    return w.view(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


class Teacher:
    """The Llama forward over `rows + bank` cache rows of `length` tokens. Tensors: B rows, T tokens, D hidden.

    The first `rows` rows are decoded; the last `bank` rows hold prompt beginnings that many requests share.
    """

    def __init__(
        self, gguf: GGUFReader, rows: int, bank: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rows, self.bank = rows, bank
        self.sizes = s = Sizes.of(gguf.meta)
        self.attention, self.attend = choose_attention(device, dtype)

        def load(name: str) -> torch.Tensor:
            return gguf.tensor(name)

        def put(w: torch.Tensor) -> torch.Tensor:
            return w.to(device, dtype)

        self.embed = put(load("token_embd.weight"))
        self.final_norm = put(load("output_norm.weight"))
        self.layers = []
        for i in range(s.layers):
            b = f"blk.{i}."
            q = unpermute(load(b + "attn_q.weight"), s.heads)
            k = unpermute(load(b + "attn_k.weight"), s.kv_heads)
            layer = {
                "norm": load(b + "attn_norm.weight"),
                "qkv": torch.cat([q, k, load(b + "attn_v.weight")]),
                "out": load(b + "attn_output.weight"),
                "ffn_norm": load(b + "ffn_norm.weight"),
                "up": torch.cat([load(b + "ffn_gate.weight"), load(b + "ffn_up.weight")]),
                "down": load(b + "ffn_down.weight"),
            }
            self.layers.append({name: put(w) for name, w in layer.items()})
        freqs = s.theta ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), freqs)
        self.cos = put(torch.cat([angle.cos(), angle.cos()], 1))
        self.sin = put(torch.cat([-angle.sin(), angle.sin()], 1))  # signed, for `rotate`
        shape = (s.layers, rows + bank, s.kv_heads, length, 64)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def _qkv(self, x: torch.Tensor, layer: dict[str, torch.Tensor], cos: torch.Tensor, sin: torch.Tensor):
        """x [..., D] -> rotated queries [..., H, 64], rotated keys and values [..., KV, 64]."""
        s = self.sizes
        normed = F.rms_norm(x, (s.hidden,), layer["norm"], s.eps)
        heads = F.linear(normed, layer["qkv"]).unflatten(-1, (-1, 64))
        qk, v = heads.split([s.heads + s.kv_heads, s.kv_heads], dim=-2)
        qk = torch.addcmul(qk * cos, qk.roll(32, -1), sin)  # rolling by half swaps the halves
        q, k = qk.split([s.heads, s.kv_heads], dim=-2)
        return q, k, v

    def _ffn(self, x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up = F.linear(F.rms_norm(x, (self.sizes.hidden,), layer["ffn_norm"], self.sizes.eps), layer["up"]).chunk(
            2, -1
        )
        return x + F.linear(F.silu(gate) * up, layer["down"])

    def copy(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """The first `length` positions of cache rows `source` become those of rows `target`."""
        for i in range(self.sizes.layers):
            self.k[i][target, :, :length] = self.k[i][source, :, :length]
            self.v[i][target, :, :length] = self.v[i][source, :, :length]

    def extend(self, tokens: torch.Tensor, start: torch.Tensor, rows: torch.Tensor, reach: int) -> torch.Tensor:
        """tokens [R, T], padded on the right, at positions start [R].. of cache rows [R] -> hidden [R, T, D].

        `reach` bounds every position. Padding needs no mask: it comes after everything real, and decoding
        overwrites its keys before it reads them.
        """
        x = F.embedding(tokens, self.embed)
        reach = min(-(-reach // 16) * 16, self.k.shape[3])  # the masked attention kernels want aligned rows
        pos = start[:, None] + torch.arange(tokens.shape[1], device=x.device)
        pos = pos.clamp(max=self.k.shape[3] - 1)
        cos, sin = self.cos[pos][:, :, None], self.sin[pos][:, :, None]
        hidden_keys = torch.arange(reach, device=x.device) > pos[:, :, None]
        bias = torch.zeros(hidden_keys.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill_(hidden_keys, float("-inf"))[:, None]
        repeat = self.sizes.heads // self.sizes.kv_heads
        bias = bias.expand(-1, self.sizes.heads, -1, -1)
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos, sin)
            self.k[i][rows[:, None], :, pos] = k
            self.v[i][rows[:, None], :, pos] = v
            keys = self.k[i][rows, :, :reach].repeat_interleave(repeat, 1)
            values = self.v[i][rows, :, :reach].repeat_interleave(repeat, 1)
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias)
            x = self._ffn(x + F.linear(mixed.transpose(1, 2).flatten(2), layer["out"]), layer)
        return F.rms_norm(x, (self.sizes.hidden,), self.final_norm, self.sizes.eps)

    def decode(self, token: torch.Tensor, pos: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """token [B] at positions pos [B] of rows [B] = 0..B-1 -> logits [B, V]; appends to the caches."""
        x = F.embedding(token, self.embed)
        cos, sin = self.cos[pos][:, None], self.sin[pos][:, None]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(x, layer, cos, sin)
            self.k[i][rows, :, pos] = k
            self.v[i][rows, :, pos] = v
            mixed = self.attend(q.contiguous(), self.k[i, : self.rows], self.v[i, : self.rows], pos).flatten(1)
            x = self._ffn(x + F.linear(mixed, layer["out"]), layer)
        return F.linear(F.rms_norm(x, (self.sizes.hidden,), self.final_norm, self.sizes.eps), self.embed)
