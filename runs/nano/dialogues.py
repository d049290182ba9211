"""Dialogues and simple prose written by SmolLM2-135M-Instruct, as training data for rorqual nano.

What: reads jobs from a prompt file (see `prompts.py`), lets the teacher answer them in one continuously refilled
batch, filters what comes out, and writes `OUT/part-K.jsonl.xz` plus `OUT/stats.json`.

Why this way: the teacher has 135 M parameters, so one GPU decodes thousands of rows at once and everything around the
matrix products decides the speed. Hence a forward of our own instead of a library's `generate`: preallocated key and
value caches, one CUDA graph for the whole step (sampling included), every row at its own position so that a finished
row is replaced at once, and one attention kernel that reads only the part of a row's cache that is filled. Text work
(decoding, filtering, tokenising new prompts) happens while the GPU runs the next steps. Every fast path has a slow
one behind it: no Triton or a wrong result of its kernel -> scaled_dot_product_attention; no graph -> eager steps.

Left out: speculative decoding, paged caches, several GPUs. The GGUF reader knows the three tensor types of this one
file (F32, Q4_1, Q8_0) and needs numpy only.

    python runs/nano/dialogues.py --gguf smollm2.gguf --prompts data/nano/prompts.jsonl.xz --out OUT --seconds 250
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
    def _decode_kernel(q, k, v, pos, out, cache_len, scale, GROUP: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr):
        """One program = one row and one key/value head: its GROUP queries over keys 0..pos[row], online softmax.

        q, out [B, KV*GROUP, 64]; k, v [B, KV, cache_len, 64]; all contiguous. Queries are padded to 16 for tl.dot.
        """
        pid = tl.program_id(0)
        row, head = pid // KV, pid % KV
        n = tl.load(pos + row) + 1
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
        q, k, v, pos, out, length, width**-0.5, GROUP=q.shape[1] // kv, KV=kv, BLOCK=64, num_warps=4
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


def penalise(logits: torch.Tensor, written: torch.Tensor, count: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens a row has already written less likely: positive logits / penalty, negative ones * penalty.

    logits [B, V], changed in place; written [B, max_new], valid below count [B]. A weak teacher loops without it.
    """
    valid = torch.arange(written.shape[1], device=written.device)[None, :] < count[:, None]
    ids = torch.where(valid, written, written[:, :1])  # the rest points at a token that is penalised anyway
    seen = logits.gather(1, ids)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    keep = logits.gather(1, ids[:, :1])
    logits.scatter_(1, ids, seen)
    fresh = (count == 0)[:, None]  # nothing written yet: column 0 is stale, put its logit back
    return logits.scatter_(1, ids[:, :1], torch.where(fresh, keep, seen[:, :1]))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: float, top_k: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] -> (token [B], its log-probability among the top k at temperature 1 [B]).

    Top-p among the top k: sorting 49,152 logits of every row would cost more than the model.
    """
    values, ids = logits.topk(top_k, dim=-1)
    values = values.float()
    probs = torch.softmax(values / temperature[:, None], -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs > top_p, 0.0)
    choice = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return ids.gather(1, choice).squeeze(1), torch.log_softmax(values, -1).gather(1, choice).squeeze(1)


# ------------------------------------------------------------------------------------------------- the engine


Done = Callable[[str, bool, float], bool]


@dataclass
class Request:
    """One generation: `prefix` (shared by many) + `text` go to the teacher verbatim.

    `done(reply, ended, score)` takes what it wrote and the mean log-probability of that, and says whether it is kept.
    """

    prefix: str
    text: str
    max_new: int
    temperature: float
    done: Done
    ids: list[int] = field(default_factory=list)
    start: int = 0  # how many tokens of the prompt come from the bank
    bank_row: int = 0


class Engine:
    """A fixed batch of rows, each at its own position; finished rows are replaced by prepared requests."""

    def __init__(self, teacher: Teacher, tok: Tokenizer, max_new: int, top_p: float, penalty: float) -> None:
        self.teacher, self.tok, self.top_p, self.penalty = teacher, tok, top_p, penalty
        device, rows = teacher.embed.device, teacher.rows
        self.device, self.n_rows, self.cache_len = device, rows, teacher.k.shape[3]
        self.stop = tok.token_to_id("<|im_end|>")
        self.also_stop = tok.token_to_id("<|endoftext|>")

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = torch.arange(rows, device=device)
        self.token, self.pos, self.count, self.limit = zeros(rows), zeros(rows), zeros(rows), zeros(rows)
        self.idle = zeros(rows, dtype=torch.bool).fill_(True)
        self.temperature = zeros(rows, dtype=torch.float32).fill_(1.0)
        self.score = zeros(rows, dtype=torch.float32)  # sum of the chosen tokens' log-probabilities
        self.out = zeros(rows, max_new)
        self.owner: list[Request | None] = [None] * rows
        self.prefixes: dict[str, tuple[int, int]] = {}  # text -> bank row, tokens
        self.generated = self.kept = self.prefilled = 0
        self.step: Callable[[], None] = self._step
        self.mode = "eager"

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every busy row, in place; idle rows compute along and change nothing that is read."""
        logits = self.teacher.decode(self.token, self.pos, self.rows)
        logits = penalise(logits, self.out, self.count, self.penalty)
        new, log_prob = sample(logits, self.temperature, self.top_p)
        busy = ~self.idle
        self.score += log_prob * busy
        at = self.count.clamp(max=self.out.shape[1] - 1)
        self.out[self.rows, at] = torch.where(busy, new, self.out[self.rows, at])
        self.token.copy_(torch.where(busy, new, self.token))
        self.count += busy
        self.idle |= (new == self.stop) | (new == self.also_stop) | (self.count >= self.limit)
        self.pos += ~self.idle

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step as one CUDA graph; on any trouble stay eager (about 1.5 times slower, not wrong)."""
        if self.device.type != "cuda":
            return
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            graph.replay()
            torch.cuda.synchronize()
            self.step, self.mode = graph.replay, "cuda graph"
        except Exception as problem:
            say(f"graph capture failed ({type(problem).__name__}: {problem}): eager steps")
            torch.cuda.synchronize()

    def prepare(self, requests: list[Request]) -> list[Request]:
        """Tokenise; those that do not fit the cache are answered at once with nothing."""
        for request, encoding in zip(requests, self.tok.encode_batch([r.text for r in requests]), strict=True):
            request.ids = encoding.ids
            request.bank_row, request.start = self._banked(request.prefix)
            if not request.start:
                request.ids = self.tok.encode(request.prefix).ids + request.ids
        room = self.cache_len - self.out.shape[1]
        fitting = [r for r in requests if r.start + len(r.ids) <= room]
        for request in requests:
            if request.start + len(request.ids) > room:
                request.done("", False, 0.0)
        return fitting

    @torch.inference_mode()
    def _banked(self, prefix: str) -> tuple[int, int]:
        """(bank row, tokens) of a shared prompt beginning, computed when first seen; (0, 0) when the bank is full."""
        if prefix not in self.prefixes and len(self.prefixes) < self.teacher.bank:
            ids = self.tok.encode(prefix).ids
            row = self.n_rows + len(self.prefixes)
            tokens = torch.tensor([ids], device=self.device)
            start = torch.zeros(1, dtype=torch.long, device=self.device)
            self.teacher.extend(tokens, start, torch.tensor([row], device=self.device), len(ids))
            self.prefixes[prefix] = (row, len(ids))
        return self.prefixes.get(prefix, (0, 0))

    @torch.inference_mode()
    def admit(self, free: list[int], requests: list[Request]) -> None:
        """Start `requests` (prepared) in rows `free` (as many), in chunks of similar prompt length."""
        pairs = sorted(zip(free, requests, strict=True), key=lambda pair: len(pair[1].ids))
        for i in range(0, len(pairs), 256):
            self._admit_chunk(pairs[i : i + 256])

    def _admit_chunk(self, pairs: list[tuple[int, Request]]) -> None:
        longest = max(len(r.ids) for _, r in pairs)
        padded = torch.tensor([r.ids + [0] * (longest - len(r.ids)) for _, r in pairs]).to(self.device)
        columns = [
            (row, r.bank_row, r.start, r.ids[-1], r.start + len(r.ids) - 1, min(r.max_new, self.out.shape[1]))
            for row, r in pairs
        ]
        rows, bank, start, token, pos, limit = torch.tensor(columns).to(self.device).unbind(1)
        shared = max(r.start for _, r in pairs)
        if shared:  # rows without a banked prefix copy row 0's and overwrite it
            self.teacher.copy(bank, rows, shared)
        self.teacher.extend(padded, start, rows, shared + longest)
        self.token[rows], self.pos[rows], self.limit[rows] = token, pos, limit
        self.temperature[rows] = torch.tensor([r.temperature for _, r in pairs], device=self.device)
        self.count[rows] = 0
        self.score[rows] = 0.0
        self.idle[rows] = False
        self.prefilled += padded.numel()
        for row, request in pairs:
            self.owner[row] = request

    def harvest(self) -> list[tuple[Request, list[int], float]]:
        """Waits for the GPU; takes the finished rows' tokens and mean log-probability, and frees the rows."""
        idle = self.idle.tolist()
        rows = [r for r in range(self.n_rows) if idle[r] and self.owner[r] is not None]
        if not rows:
            return []
        index = torch.tensor(rows, device=self.device)
        counts, out, scores = (t[index].tolist() for t in (self.count, self.out, self.score))
        finished = []
        for row, n, ids, score in zip(rows, counts, out, scores, strict=True):
            request = self.owner[row]
            assert request is not None
            finished.append((request, ids[:n], score / max(n, 1)))
            self.owner[row] = None
            self.generated += n
        return finished

    def deliver(self, finished: list[tuple[Request, list[int], float]]) -> None:
        """Texts to whoever asked. A reply that met its limit has not ended."""
        for request, ids, score in finished:
            ended = ids[-1] in (self.stop, self.also_stop)
            if request.done(self.tok.decode(ids[:-1] if ended else ids), ended, score):
                self.kept += len(ids)

    def free_rows(self) -> list[int]:
        return [r for r, owner in enumerate(self.owner) if owner is None]


# ------------------------------------------------------------------------------------------------- the filters

FANCY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ", "•": "-"})
# Plain substring and set tests on the lowered text: regular expressions with many branches cost more than the GPU's
# share of an answer.
OTHER_SELVES = [
    "smollm",
    "smol lm",
    "huggingface",
    "hugging face",
    "openai",
    "open ai",
    "chatgpt",
    "gpt-",
    "anthropic",
    "gemini",
    "alexa",
    "as an ai",
    "an ai ",
    "ai assistant",
    "ai model",
    "ai language",
    "ai system",
    "ai chatbot",
    "ai-",
    "artificial intelligence",
    "digital assistant",
    "virtual assistant",
]
JUNK_PHRASES = [
    "http",
    "www.",
    "```",
    "user:",
    "assistant:",
    "plan:",
    "ladies and gentlemen",
    "dear diary",
    "math homework",
    "creative writing",
    "i'm sorry, but",
    "i cannot provide",
    "i cannot help",
    "i cannot assist",
    "i can't provide",
    "i can't assist",
    "i'm not able to",
    "i'm unable to",
    "misunderstanding",
    "confusion",
    "couldn't find",
    "end the answer",
    "sorry for any",
    "sorry for the",
    "this answer",
    "feel free to ask",
    "here is a possible",
    "here's a possible",
    "here is the revised",
    "prompt",
    "this paragraph",
    "this sentence",
    "the sentence",
    "my training",
    "your loss",
    "great answer",
]
UNSAFE_WORDS = {
    "sex",
    "sexy",
    "sexual",
    "sexually",
    "porn",
    "rape",
    "raped",
    "rapist",
    "suicide",
    "suicidal",
    "murder",
    "murdered",
    "murderer",
    "murders",
    "nazi",
    "nazis",
    "nigger",
    "fuck",
    "fucking",
    "fucked",
    "shit",
    "bitch",
    "cocaine",
    "heroin",
    "genocide",
    "terrorist",
    "terrorism",
    "whore",
    "slut",
    "claude",
    "siri",
    "gpt",
    "smollm",
}
ODD_SIGNS = re.compile(r"[{}\\|#_=~^<>\[\]`@]")
SENTENCE_END = re.compile(r"[.!?][\"')]?(?=\s|$)")
WORD = re.compile(r"[a-z']+")


def stutters(words: list[str]) -> bool:
    """Whether one, two or three words come three times in a row."""
    for n in (1, 2, 3):
        run = 0
        for same in map(str.__eq__, words, words[n:]):
            run = run + 1 if same else 0
            if run >= 2 * n:
                return True
    return False


def loops(low: str, words: list[str]) -> bool:
    """Whether a text repeats itself: four words three times, a sentence or line twice, few distinct words."""
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if grams and max(grams.values()) > (2 if len(words) < 150 else 3):
        return True
    sentences = [s.strip() for s in re.split(r"[.!?\n]+", low) if s.count(" ") > 3]
    if len(set(sentences)) < len(sentences) or stutters(words):
        return True
    return len(words) > 40 and len(set(words)) < 0.42 * min(len(words), 120)


def unwanted(low: str, words: list[str]) -> str:
    """What else is wrong with a lowered text, or ""."""
    if any(p in low for p in OTHER_SELVES):
        return "identity"
    if ODD_SIGNS.search(low) or any(p in low for p in JUNK_PHRASES):
        return "junk"
    if not UNSAFE_WORDS.isdisjoint(words):
        return "unsafe"
    return "loop" if loops(low, words) else ""


def cut_at_sentence(text: str) -> str:
    """An unfinished text up to its last full sentence; empty where less than half would remain."""
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends and ends[-1] > 0.5 * len(text) else ""


def clean(reply: str, ended: bool) -> tuple[str, str]:
    """(text, "") or ("", why it is rejected): what holds for every text the teacher writes."""
    text = reply.translate(FANCY).replace("**", "").strip()
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text))
    if not ended:
        text = cut_at_sentence(text).strip()
        if len(text) < 60:
            return "", "unfinished"
    if len(text) < 2:
        return "", "empty"
    if not text.isascii():
        return "", "not ascii"
    if text[0] in ",.;:)?!" or text[-1] in ",;:-(" or text.count('"') % 2:
        return "", "broken start or end"
    low = text.lower()
    reason = unwanted(low, WORD.findall(low))
    return ("", reason) if reason else (text, "")


def alike(a: str, b: str) -> bool:
    """Whether two texts share most of their three-word phrases."""
    grams = [set(zip(w, w[1:], w[2:], strict=False)) for w in (WORD.findall(a.lower()), WORD.findall(b.lower()))]
    return a == b or len(grams[0] & grams[1]) > 0.35 * max(1, min(len(g) for g in grams))


def stem(word: str) -> str:
    """Crude: enough to see whether 'volcanoes' is about 'volcano'."""
    return word[: max(3, len(word) - 2)] if len(word) > 4 else word[:3]


def off_topic(text: str, topic: str) -> bool:
    return bool(topic) and not any(stem(w) in text.lower() for w in topic.split() if w not in {"the", "a", "an", "and"})


COMMON = {
    "what",
    "which",
    "when",
    "where",
    "should",
    "could",
    "would",
    "about",
    "there",
    "their",
    "have",
    "this",
    "that",
    "with",
    "from",
    "your",
    "want",
    "like",
    "make",
    "good",
    "best",
    "better",
    "does",
    "more",
    "tell",
    "name",
    "three",
    "give",
    "write",
    "short",
    "story",
    "poem",
    "reasons",
    "things",
    "tips",
    "difference",
    "between",
    "sentence",
    "word",
    "find",
    "someone",
    "something",
    "feel",
    "today",
    "week",
    "play",
    "explain",
    "child",
    "remember",
    "only",
    "really",
    "think",
    "never",
    "learned",
    "going",
    "easy",
    "easily",
    "help",
    "people",
    "wear",
    "need",
    "many",
    "says",
    "reach",
}


EXAMPLE_NAMES = re.compile(r"\b(Theo|June|Luke|Nora|Mr\. Brown)\b")


def leaks(text: str, job: dict[str, Any], turns: list[str]) -> bool:
    """Whether the answer speaks of what the examples asked about (a bridge, a shoe) and the user did not."""
    asked = set(WORD.findall(" ".join(turns).lower()))
    examples = {w for shot in job["shots"] for said in shot[::2] for w in WORD.findall(said.lower()) if len(w) > 3}
    return not (examples - asked - COMMON).isdisjoint(WORD.findall(text.lower())) or bool(EXAMPLE_NAMES.search(text))


# ----------------------------------------------------------------------------------------------------- the jobs

SYSTEM = "You are a friendly assistant. You answer in simple words."
SYSTEM_PLAN = "Before answering, write a short plan for the answer in one or two sentences."
SYSTEM_PLANNED = "You are a friendly assistant. You answer in simple words and follow the plan."
SYSTEM_TEXT = "You write for children, in simple words."
LENGTHS = {"story": 260, "paragraph": 170, "poem": 110, "plan": 70, "user": 40}


def message(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def dialogue(turns: list[str]) -> str:
    return "".join(message("assistant" if i % 2 else "user", t) for i, t in enumerate(turns))


def opening(system: str, shots: list[list[str]]) -> str:
    return message("system", system) + "".join(dialogue(shot) for shot in shots)


class Director:
    """Turns jobs into requests, follows them through their turns, and hands finished lines to `write`."""

    def __init__(
        self, jobs: Iterator[dict[str, Any]], write: Callable[[dict[str, Any]], None], temperature: float
    ) -> None:
        self.jobs, self.write, self.temperature = jobs, write, temperature
        self.queue: deque[Request] = deque()
        self.rejected: Counter[str] = Counter()
        self.scores: dict[str, deque[float]] = {}
        self.lines: Counter[str] = Counter()

    def requests(self, want: int) -> list[Request]:
        """The next `want` requests: conversations under way before new jobs."""
        taken = []
        for _ in range(want):
            taken.append(self.queue.popleft() if self.queue else self._begin(next(self.jobs)))
        return taken

    def _begin(self, job: dict[str, Any]) -> Request:
        return {"chat": self._chat, "think": self._think, "text": self._text, "magpie": self._magpie}[job["kind"]](job)

    def _request(self, prefix: str, text: str, length: str, done: Done, heat: float = 0.0) -> Request:
        return Request(prefix, text, LENGTHS.get(length, 150), self.temperature + heat, done)

    def _keep(self, kind: str, line: dict[str, Any]) -> bool:
        self.lines[kind] += 1
        self.write(line)
        return True

    def _unlikely(self, key: str, score: float) -> bool:
        """Whether the teacher itself found its answer odd: in the lowest quarter of this category's last 300."""
        recent = self.scores.setdefault(key, deque(maxlen=300))
        recent.append(score)
        return len(recent) >= 20 and score < sorted(recent)[len(recent) // 4]

    def _checked(self, reply: str, ended: bool, score: float, job: dict[str, Any], turns: list[str]) -> str:
        """The cleaned answer, or "" with the reason counted."""
        text, reason = clean(reply, ended)
        if not reason and off_topic(text, job["topic"] if len(turns) == 1 else ""):
            reason = "off topic"
        if not reason and leaks(text, job, turns):
            reason = "talks of the example"
        if not reason and job["category"] == "news" and "sorry" in text.lower():
            reason = "sorry for good news"
        if not reason and "the user" in text.lower():
            reason = "speaks of the user"
        if not reason and any(alike(text, said) for said in turns[1::2]):
            reason = "same answer again"
        if not reason and job["category"] == "rewrite" and text.lower().rstrip(".") in turns[0].lower():
            reason = "nothing rewritten"
        if not reason and job["category"].startswith("list_") and len(turns) == 1 and text.count("\n") < 2:
            reason = "short list"
        if self._unlikely(f"{job['kind']} {job['category']} {len(turns)}", score) and not reason:
            reason = "unlikely"
        if reason:
            self.rejected[reason] += 1
            return ""
        return text

    def _chat(self, job: dict[str, Any], said: list[str] | None = None) -> Request:
        """The answer to the next user turn; `said` alternates user and assistant so far."""
        said = said or []
        turns = [*said, job["turns"][len(said) // 2]]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(reply, ended, score, job, turns)
            whole = [*turns, text] if text else said
            if text and len(whole) // 2 < len(job["turns"]):
                self.queue.append(self._chat(job, whole))
                return True
            if whole:
                roles = ("user", "assistant")
                messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(whole)]
                self._keep(f"chat, {len(whole) // 2} turns", {"messages": messages})
            return bool(text)

        prompt = dialogue(turns) + "<|im_start|>assistant\n"
        return self._request(opening(SYSTEM, job["shots"]), prompt, job["category"], done)

    def _think(self, job: dict[str, Any]) -> Request:
        """First a plan (unless the job brings one), then the answer that follows it."""
        question, start, plans = job["turns"][0], job["start"], job["plans"]
        if job["plan"]:
            return self._planned(job, job["plan"])

        def done(reply: str, ended: bool, score: float) -> bool:
            sentences = SENTENCE_END.split(reply.strip())
            text, reason = clean(f"{start} {reply.strip()}", ended)
            if not reason and (
                len(sentences) > 5 or "\n" in text or leaks(text, {"shots": [p[:1] for p in plans]}, [question, start])
            ):
                reason = "poor plan"
            if reason:
                self.rejected["plan: " + reason] += 1
                return False
            self.queue.append(self._planned(job, text))
            return True

        prompt = dialogue([question]) + "<|im_start|>assistant\n" + start
        return self._request(opening(SYSTEM_PLAN, [[q, p] for q, p, _ in plans]), prompt, "plan", done)

    def _planned(self, job: dict[str, Any], plan: str) -> Request:
        question = job["turns"][0]
        shots = [[f"{q}\n\nPlan: {p}", a] for q, p, a in job["plans"]]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(reply, ended, score, {**job, "shots": [p[::2] for p in job["plans"]]}, [question])
            if not text:
                return False
            answer = {"role": "assistant", "reasoning_content": plan, "content": text}
            return self._keep("think", {"messages": [{"role": "user", "content": question}, answer]})

        prompt = dialogue([f"{question}\n\nPlan: {plan}"]) + "<|im_start|>assistant\n"
        return self._request(opening(SYSTEM_PLANNED, shots), prompt, job["category"], done)

    def _text(self, job: dict[str, Any]) -> Request:
        start = job["start"]

        def done(reply: str, ended: bool, score: float) -> bool:
            text = self._checked(start + reply, ended, score, job, [job["turns"][0] + start])
            return bool(text) and len(text) > 150 and self._keep(job["category"], {"text": text})

        prompt = dialogue(job["turns"]) + "<|im_start|>assistant\n" + start
        return self._request(opening(SYSTEM_TEXT, job["shots"]), prompt, job["category"], done, heat=0.15)

    def _magpie(self, job: dict[str, Any]) -> Request:
        """The teacher writes the user's message, after `start`; then it answers it as in a chat."""

        def done(reply: str, ended: bool, score: float) -> bool:
            text, reason = clean(job["start"] + reply, ended)
            fine = 12 < len(text) < 160 and "\n" not in text and not re.search(r"\d", text) and text[-1] in ".?!"
            if reason or not fine or leaks(text, job, []):
                self.rejected["user turn: " + (reason or "poor")] += 1
                return False
            topic = max(WORD.findall(text.lower()), key=len)
            self.queue.append(self._chat({**job, "turns": [text], "shots": job["shots"][:2], "topic": topic}))
            return False

        prompt = "<|im_start|>user\n" + job["start"]
        return self._request(opening(SYSTEM, job["shots"]), prompt, "user", done, heat=0.3)


# ------------------------------------------------------------------------------------------------ the output


class Parts:
    """Lines into at most `parts` files of about equal time, each compressed in a thread while the next one fills."""

    def __init__(self, out: Path, seconds: float, parts: int = 7) -> None:
        self.out, self.each, self.last = out, seconds / parts, parts - 1
        self.pool = ThreadPoolExecutor(parts)  # lzma releases the interpreter lock
        self.jobs: list[Future[None]] = []
        self.lines: list[str] = []
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("part-*.jsonl.xz"):
            old.unlink()

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(json.dumps(line, ensure_ascii=True))
        full = (time.monotonic() - self.began) > self.each * (len(self.jobs) + 1)
        if full and len(self.jobs) < self.last:
            self._rotate()

    def _rotate(self) -> None:
        if self.lines:
            path = self.out / f"part-{len(self.jobs)}.jsonl.xz"
            self.jobs.append(self.pool.submit(self._compress, path, self.lines))
            self.lines = []

    @staticmethod
    def _compress(path: Path, lines: list[str]) -> None:
        path.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=4))

    def close(self) -> None:
        self._rotate()
        for job in self.jobs:
            job.result()


def read_jobs(path: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """All jobs in a shuffled order, again and again (a second answer to a prompt differs from the first)."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    lines = raw.decode("utf-8").splitlines()
    while True:
        rng.shuffle(lines)
        for line in lines:
            yield json.loads(line)


def generate(engine: Engine, director: Director, seconds: float, stride: int, report: Callable[[float], None]) -> float:
    """The loop: some steps on the GPU, meanwhile the texts of the rows that finished before. Returns seconds taken."""
    finished: list[tuple[Request, list[int], float]] = []
    ready: list[Request] = []
    began = last = time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        if now - last > 10:
            last = now
            report(now - began)
        free = engine.free_rows()
        if len(ready) < len(free):
            ready += engine.prepare(director.requests(len(free) - len(ready)))
        use = min(len(free), len(ready))
        if use:
            engine.admit(free[:use], ready[:use])
            ready = ready[use:]
        for _ in range(stride):
            engine.step()
        engine.deliver(finished)  # while the GPU works
        ready += engine.prepare(director.requests(max(0, engine.n_rows // 8 - len(ready))))
        finished = engine.harvest()
    engine.deliver(finished)
    return time.monotonic() - began


def say(text: str) -> None:
    print(text, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the teacher's GGUF file")
    parser.add_argument("--gguf-parts", type=Path, nargs="+", help="the same in pieces, joined first")
    parser.add_argument("--prompts", type=Path, required=True, help="what prompts.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--bank", type=int, default=512, help="cache rows for prompt beginnings that are shared")
    parser.add_argument("--cache", type=int, default=640, help="tokens a row can hold, a multiple of 64")
    parser.add_argument("--temperature", type=float, default=0.45)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--penalty", type=float, default=1.1, help="on tokens the answer already has")
    parser.add_argument("--stride", type=int, default=12, help="steps between two looks at what has finished")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def load_gguf(args: argparse.Namespace) -> GGUFReader:
    if args.gguf:
        return GGUFReader(args.gguf)
    if not args.gguf_parts:
        raise SystemExit("give --gguf FILE or --gguf-parts A B")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "teacher.gguf"
        with whole.open("wb") as file:
            for part in args.gguf_parts:
                file.write(part.read_bytes())
        return GGUFReader(whole)


def build(args: argparse.Namespace) -> Engine:
    began = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gguf = load_gguf(args)
    bank = args.bank if device.type == "cuda" else min(args.bank, 48)
    teacher = Teacher(gguf, args.batch, bank, args.cache, device, dtype)
    engine = Engine(teacher, read_tokenizer(gguf.meta), max(LENGTHS.values()), args.top_p, args.penalty)
    engine.capture()
    say(f"teacher ready in {time.monotonic() - began:.1f} s: {device}, {teacher.attention} attention, {engine.mode}")
    return engine


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # so that `finally` writes what is there
    engine = build(args)
    parts = Parts(args.out, args.seconds)
    director = Director(read_jobs(args.prompts, random.Random(args.seed)), parts.write, args.temperature)

    def report(elapsed: float) -> None:
        say(
            f"{elapsed:6.0f} s  {engine.generated / 1e6:7.3f} M tokens ({engine.generated / elapsed:,.0f}/s), "
            f"kept {engine.kept / 1e6:.3f} M ({engine.kept / max(engine.generated, 1):.0%}), "
            f"prefilled {engine.prefilled / 1e6:.2f} M, {sum(director.lines.values())} lines"
        )

    began, problem = time.monotonic(), ""
    try:
        generate(engine, director, args.seconds, args.stride, report)
    except Exception:
        problem = traceback.format_exc()
        say(problem)
    finally:
        elapsed = time.monotonic() - began
        parts.close()
        stats = {
            "seconds": round(elapsed, 1),
            "generated_tokens": engine.generated,
            "kept_tokens": engine.kept,
            "tokens_per_s": round(engine.generated / elapsed),
            "prefix_bank": len(engine.prefixes),
            "lines": dict(director.lines.most_common()),
            "rejected": dict(director.rejected.most_common()),
            "attention": engine.teacher.attention,
            "step": engine.mode,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "problem": problem,
        }
        (args.out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        say(json.dumps(stats, indent=2))
    sys.exit(1 if problem else 0)


if __name__ == "__main__":
    main()
