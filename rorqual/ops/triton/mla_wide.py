"""Decoding over pages for many heads on Hopper: `ops.triton.mla`'s first kernel for 64 heads a program, in Gluon.

Triton gives a product that feeds another one all its warps along the rows, so with 64 heads its two warp groups both
computed all scores, and it waits for scores before it queues the values' product. Here the warp groups share the keys of
the scores and the columns of the values, and per block of keys

    probabilities in shared memory -> queue P V of this block, Q K^T of the next one behind it
    P V done                       -> its buffer takes the block after the next, while Q K^T runs
    Q K^T done                     -> softmax

so that only the softmax finds the tensor cores idle. Two blocks of latents, the queries and the probabilities fill
225 of the 227 KiB of shared memory; the accumulator takes 128 registers of a thread. Rows beyond the last key are copies
of it and masked. Triton's interpreter does not know Gluon: tests run these steps in a machine of their own, which checks
waits, fences and barriers, and compile the kernel for sm_90; tests/gpu compares it on a card.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HEADS = KEYS = 64
WARPS = 8

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the latter up to Triton 3.6


def missing(q_NHX: Tensor, pages_PSX: Tensor, latent_dim: int) -> str | None:
    """Why the kernel cannot take these, or None: it is made for DeepSeek-V3's dimensions in 16 bits on a Hopper card."""
    (_, H, X), dtype = q_NHX.shape, q_NHX.dtype
    if H % HEADS or (latent_dim, X) != (512, 576) or pages_PSX.shape[1] % KEYS:
        return f"it takes a multiple of {HEADS} heads of 512 + 64 numbers and pages of a multiple of {KEYS} tokens"
    if dtype not in (torch.bfloat16, torch.float16) or dtype != pages_PSX.dtype:
        return "it takes queries and latents of 16 bits"
    if not q_NHX.is_cuda or torch.cuda.get_device_capability(q_NHX.device) != (9, 0):
        return "it needs a Hopper card"
    return None


@gluon.jit
def _copy(k_c, k_r, pages, row, start, end, C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, KEYS: gl.constexpr):
    """Queues the latents of the keys from start on into one buffer."""
    layout_c: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0])
    layout_r: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    base = pages + gl.load(row + start // PAGE).to(gl.int64) * (PAGE * (C + R))
    key_c = gl.minimum(start + gl.arange(0, KEYS, gl.SliceLayout(1, layout_c)), end - 1) % PAGE
    key_r = gl.minimum(start + gl.arange(0, KEYS, gl.SliceLayout(1, layout_r)), end - 1) % PAGE
    c = gl.arange(0, C, gl.SliceLayout(0, layout_c))
    r = gl.arange(0, R, gl.SliceLayout(0, layout_r)) + C
    async_copy.async_copy_global_to_shared(k_c, base + (key_c[:, None] * (C + R) + c[None, :]))
    async_copy.async_copy_global_to_shared(k_r, base + (key_r[:, None] * (C + R) + r[None, :]))
    async_copy.commit_group()


@gluon.jit
def _scores(q_c, q_r, k_c, k_r, zero):
    """Queues Q K^T. The copies of this block must have been waited for."""
    scores = warpgroup_mma(q_c, k_c.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_r, k_r.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _arrived():
    """Waits for the copies, and makes them visible to the tensor cores and to every warp."""
    async_copy.wait_group(0)
    fence_async_shared()
    _barrier()


@gluon.jit(do_not_specialize=["table_stride", "width", "splits"])
def kernel(
    q, pages, table, lengths, out, lse, scale_log2, table_stride, width, splits,
    H: gl.constexpr, C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr, KEYS: gl.constexpr,
    BLOCK_H: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    """As `mla._split_kernel`, whose arguments these are."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, KEYS // 2, 16])
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    heads_s: gl.constexpr = gl.SliceLayout(1, of_scores)
    heads_a: gl.constexpr = gl.SliceLayout(1, of_acc)
    layout_c: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0])
    layout_r: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    dtype: gl.constexpr = q.dtype.element_ty
    head_blocks: gl.constexpr = H // BLOCK_H
    n = (gl.program_id(0) // head_blocks).to(gl.int64)
    head = n * H + gl.program_id(0) % head_blocks * BLOCK_H
    length = gl.minimum(gl.load(lengths + n).to(gl.int32), width * PAGE)
    last = (length + SPLIT - 1) // SPLIT
    if DIRECT:
        last = 1  # a row without keys is written too
    row = table + n * table_stride
    q_c = gl.allocate_shared_memory(dtype, [BLOCK_H, C], shared)
    q_r = gl.allocate_shared_memory(dtype, [BLOCK_H, R], shared)
    k_c = gl.allocate_shared_memory(dtype, [2, KEYS, C], shared)
    k_r = gl.allocate_shared_memory(dtype, [2, KEYS, R], shared)
    p = gl.allocate_shared_memory(dtype, [BLOCK_H, KEYS], shared)
    h_c = gl.arange(0, BLOCK_H, gl.SliceLayout(1, layout_c))
    h_r = gl.arange(0, BLOCK_H, gl.SliceLayout(1, layout_r))
    c = gl.arange(0, C, gl.SliceLayout(0, layout_c))
    r = gl.arange(0, R, gl.SliceLayout(0, layout_r)) + C
    q_c.store(gl.load(q + head * (C + R) + (h_c[:, None] * (C + R) + c[None, :])))
    q_r.store(gl.load(q + head * (C + R) + (h_r[:, None] * (C + R) + r[None, :])))
    key = gl.arange(0, KEYS, gl.SliceLayout(0, of_scores))
    zero = gl.full([BLOCK_H, KEYS], 0.0, gl.float32, of_scores)
    for split in range(gl.program_id(1), last, gl.num_programs(1)):
        begin = split * SPLIT
        end = gl.minimum(length, begin + SPLIT)
        largest = gl.full([BLOCK_H], float("-inf"), gl.float32, heads_s)
        total = gl.full([BLOCK_H, KEYS], 0.0, gl.float32, of_scores)
        acc = gl.full([BLOCK_H, C], 0.0, gl.float32, of_acc)
        _barrier()  # the last split's products are done with the buffers
        if begin < end:
            _copy(k_c.index(0), k_r.index(0), pages, row, begin, end, C, R, PAGE, KEYS)
        _arrived()
        product = _scores(q_c, q_r, k_c.index(0), k_r.index(0), zero)
        if begin + KEYS < end:
            _copy(k_c.index(1), k_r.index(1), pages, row, begin + KEYS, end, C, R, PAGE, KEYS)
        scores = warpgroup_mma_wait(0, deps=(product,))
        at = 0
        for start in range(begin, end, KEYS):
            # The largest is finite: a block holds at least one key that is seen.
            scores = gl.where((start + key < end)[None, :], scores * scale_log2, float("-inf"))
            now = gl.maximum(largest, gl.max(scores, 1))
            fade = gl.exp2(largest - now)
            probs = gl.exp2(scores - now[:, None])
            total = total * fade[:, None] + probs  # added up over the keys at the end, not in every block
            largest = now
            p.store(probs.to(dtype))
            acc = acc * gl.convert_layout(fade, heads_a)[:, None]
            fence_async_shared()
            _barrier()
            queued = warpgroup_mma(p, k_c.index(at), acc, is_async=True)
            _arrived()
            # After the last block these are scores of a buffer's remains, which nobody reads.
            product = _scores(q_c, q_r, k_c.index(at ^ 1), k_r.index(at ^ 1), zero)
            acc = warpgroup_mma_wait(2, deps=(queued,))  # all but the two products of the scores
            _barrier()
            if start + 2 * KEYS < end:
                _copy(k_c.index(at), k_r.index(at), pages, row, start + 2 * KEYS, end, C, R, PAGE, KEYS)
            scores = warpgroup_mma_wait(0, deps=(product,))
            at ^= 1
        sums = gl.sum(total, 1)
        share = 1.0 / gl.where(sums > 0, sums, 1.0)
        acc = acc * gl.convert_layout(share, heads_a)[:, None]
        place = (head + gl.arange(0, BLOCK_H, heads_a)) * splits + split
        columns = gl.arange(0, C, gl.SliceLayout(0, of_acc))
        gl.store(out + (place[:, None] * C + columns[None, :]), acc.to(out.dtype.element_ty))
        if not DIRECT:
            place = (head + gl.arange(0, BLOCK_H, heads_s)) * splits + split
            gl.store(lse + place, largest + gl.log2(sums))
