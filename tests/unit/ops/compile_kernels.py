"""Compiles the kernels of `rorqual.ops.triton` for Hopper on a machine without one. test_compiles.py runs it in processes of
its own, because the tests' process has Triton's interpreter on.

The package's own functions are called, on CPU tensors that nobody filled, in the dimensions of DeepSeek-V3 and of v3-16b:
dtypes, strides, constants and launch options are those that a card gets. A launch only compiles, so every result is
garbage, and memory that is never touched costs nothing.

    python compile_kernels.py I N    takes case I, I + N, I + 2 N, ...

Prints one JSON list of the launches: kernel ("file:name"), constants, and either bytes of shared memory and of spilled
registers, or the error. On standard error each launch begins with a line "compiling ..."; what follows is the compiler's.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from rorqual.ops.formats import FP8, PLAIN, Weight
from rorqual.ops.triton import (
    adamw,
    cross_entropy,
    decode,
    divergence,
    experts,
    fp8,
    fp8_hopper,
    fp8_products,
    fp8_quantise,
    fp8_train,
    fused,
    grouped,
    mla,
    overlap,
    routing,
    stream,
    training,
)

BF16, FP32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
KINDS = PLAIN, FP8, 8, 4


class Hopper:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


found: list[dict[str, Any]] = []
run = JITFunction.run


def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of `JITFunction.run`. An error is noted, and the caller goes on to the next kernel."""
    name = f"{Path(kernel.fn.__code__.co_filename).name}:{kernel.fn.__name__}"
    named = {key: value for key, value in options.items() if key.isupper() or key.startswith("num_")}
    constants = {key: value for key, value in named.items() if isinstance(value, int | str)}
    one = {"kernel": name, "constants": constants}
    print("compiling", name, constants, file=sys.stderr, flush=True)
    log = io.StringIO()
    try:
        with redirect_stdout(log):
            built = run(kernel, *args, grid=grid, warmup=True, **options)
    except Exception as error:
        found.append(one | {"error": told(error)})
        return
    spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
    # What was compiled before goes past ptxas.
    found.append(one | {"shared": built.metadata.shared, "spilled": int(spilled[1]) if spilled else 0})


def told(error: BaseException) -> str:
    """The last lines, from the kernel down to the helper where the compiler stopped."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None:
        lines += [line for line in f"{type(at).__name__}: {at}".splitlines() if line.strip()]
        at = at.__cause__
    return "\n".join(lines[-15:])


# ---- tensors ---------------------------------------------------------------------------------------------------------


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def bf16(*shape: int) -> Tensor:
    return empty(BF16, *shape)


def fp32(*shape: int) -> Tensor:
    return empty(FP32, *shape)


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def int64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def stored(kind: int, *shape: int, dynamic: bool = False, dtype: torch.dtype = BF16) -> Weight:
    """A matrix, or a stack of them."""
    *lead, out, width = shape
    if kind == PLAIN:
        return Weight.plain(empty(dtype, *shape))
    if kind == FP8:
        return Weight(FP8, empty(E4M3, *shape), fp32(*lead, -(-out // 128), -(-width // 128)), dynamic)
    words = empty(torch.int32, *lead, out, width * kind // 32)
    return Weight(kind, words, bf16(*lead, out, width // 32))


def quantised(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """In tiles along the width."""
    return empty(E4M3, rows, width), fp32(-(-width // 128), rows).T


# ---- by file ---------------------------------------------------------------------------------------------------------


def of_adamw() -> None:
    w = fp32(2048, 1408)
    adamw.adamw(
        w, bf16(*w.shape), bf16(*w.shape), bf16(*w.shape), 1, 1e-3, (0.9, 0.95), 1e-8, 0.1, fp32(), bf16(*w.shape)
    )
    adamw.adamw(w, w, w, w, 1, 1e-3, (0.9, 0.95), 1e-8, 0.1, None, None)


def of_cross_entropy() -> None:
    for logits in (bf16(8, 102400), fp32(8, 129280)):
        for grad in (True, False):
            cross_entropy.loss_and_slope_(logits, int64(8), fp32(8), grad)


def of_decode() -> None:
    for T, H, dtype in ((1, 128, BF16), (16, 16, BF16), (16, 16, FP32)):
        decode.add_norm(empty(dtype, T, 7168), empty(dtype, T, 7168), fp32(7168), 1e-6)
        w_uk, w_uv = empty(dtype, H, 256, 512).split((128, 128), 1)
        angles = fp32(T, 32)
        decode.absorbed_queries(empty(dtype, T, H * 192), w_uk, angles, angles, 64)
        decode.merged_values(fp32(T, H, 8, 512), fp32(T, H, 8), int32(T), w_uv, dtype, 4096, 64, 512)
        decode.most_likely(empty(dtype, T, 129280))


def of_divergence() -> None:
    for logits, teacher in (
        (bf16(8, 49152), bf16(8, 49152)),
        (bf16(8, 102400), fp32(8, 32001)),
        (fp32(8, 129280),) * 2,
    ):
        for words in (int64(8), None):
            divergence.divergence_and_slope_(logits, teacher, words, fp32(8))


def of_experts() -> None:
    def routed(
        x: Tensor, kind: int, F: int, E: int, K: int, own: int, add: Tensor | None, dynamic: bool = False
    ) -> None:
        def weight(*shape: int) -> Weight:
            return stored(kind, *shape, dynamic=dynamic, dtype=x.dtype)

        (N, D), both = x.shape, weight(2, own * F, x.shape[1])
        shared = (both.view(0), both.view(1), weight(D, own * F)) if own else None
        experts.routed_experts(x, weight(E, 2, F, D), weight(E, D, F), fp32(N, K), int64(N, K), add, shared)

    for kind in KINDS:
        routed(bf16(1, 7168), kind, 2048, 16, 8, 1, bf16(1, 7168))  # few slots
        routed(bf16(2, 2048), kind, 1408, 64, 6, 0, None)
        routed(bf16(32, 2048), kind, 1408, 16, 6, 2, bf16(32, 2048))  # many
        routed(bf16(64, 7168), kind, 2048, 16, 8, 0, None)
    routed(bf16(1, 7168), FP8, 2048, 16, 8, 1, bf16(1, 7168), dynamic=True)
    routed(fp32(1, 2048), PLAIN, 1408, 16, 6, 2, fp32(1, 2048))
    routed(fp32(64, 2048), PLAIN, 1408, 16, 6, 2, fp32(64, 2048))


def of_fp8() -> None:
    for rows in (1, 100, 4096):
        fp8.quantize_rows(bf16(rows, 7168))
    for dtype in (BF16, FP32):
        w = stored(FP8, 1408, 2048)
        fp8.expand(w.data, w.scale, dtype)
        for kind in (4, 8):
            fp8.expand_packed(stored(kind, 1408, 2048), dtype)
    for kind, dynamic in ((FP8, False), (FP8, True), (8, False), (4, False)):
        for rows in (1, 256):
            fp8.tile_rows(bf16(rows, 7168), stored(kind, 1536, 7168, dynamic=dynamic))
        w, d = stored(kind, 16, 2, 2048, 7168, dynamic=dynamic), stored(kind, 16, 7168, 2048, dynamic=dynamic)
        fp8.tile_experts(bf16(512, 7168), w, d, fp32(512, 8), int64(512, 8))
    fp8.tile_rows(bf16(16, 200), stored(FP8, 128, 200))  # not in whole blocks
    fp8.tile_rows(fp32(16, 7168), stored(FP8, 1536, 7168))
    fp8.tile_rows(fp32(256, 7168), stored(PLAIN, 1536, 7168, dtype=FP32))  # the most shared memory


def of_fp8_products() -> None:
    M, N, K = 256, 1408, 2048
    for dtype in (BF16, FP32):
        b = stored(FP8, N, K)
        fp8_products.product(quantised(M, K), (b.data, b.scale), True, dtype)
        fp8_products.product(quantised(N, M), quantised(K, M), False, dtype)
        fp8_products.weight_gradient(quantised(N, M), quantised(K, M), int32(16), dtype)
    stack = stored(FP8, 16, N, K)
    fp8_products.product(quantised(M, K), (stack.data, stack.scale), True, BF16, int32(2))
    turned = empty(E4M3, 16, K, N), stack.scale.mT
    fp8_products.product(quantised(M, N), turned, True, BF16, int32(2))
    odd = stored(FP8, 128, 200)
    fp8_products.product(quantised(M, 200), (odd.data, odd.scale), True, BF16)


def of_fp8_hopper() -> None:
    """By expert, of blocks and of tiles."""
    M, N, K = 256, 1408, 2048
    stack = stored(FP8, 16, N, K)
    fp8_hopper.product(quantised(M, K), (stack.data, stack.scale), True, BF16, int32(2))
    fp8_hopper.weight_gradient(quantised(N, M), quantised(K, M), int32(16), FP32)
    fp8_hopper.product(quantised(M, K), (stack.data[0], stack.scale[0]), True, BF16)
    fp8_hopper.product(quantised(M, K), quantised(N, K), False, FP32)


def of_fp8_quantise() -> None:
    x = bf16(256, 2048)
    for rows, columns, power in ((True, False, True), (False, True, False), (True, True, True), (True, True, False)):
        fp8_quantise.tiles(x, rows, columns, power)
    fp8_quantise.tiles(quantised(256, 2048), False, True, False)
    fp8_quantise.tiles(fp32(256, 2048), True, True, False)
    for dtype in (BF16, FP32):
        fp8_quantise.blocks(empty(dtype, 1408, 2048))
        fp8_quantise.blocks(empty(dtype, 16, 2816, 2048))


def of_fp8_train() -> None:
    x = bf16(256, 2048)
    for rows, columns, power in ((True, False, True), (False, True, False), (True, True, True)):
        fp8_train.tiles(x, rows, columns, power)
    fp8_train.tiles(quantised(256, 2048), False, True, False)
    for dtype in (BF16, FP32):
        fp8_train.blocks(empty(dtype, 1408, 2048))
        fp8_train.blocks(empty(dtype, 16, 2816, 2048))
    gu, scale = quantised(256, 2816)
    fp8_train.swiglu_backward((gu[:, :1408], scale[:, :11]), (gu[:, 1408:], scale[:, 11:]), bf16(256, 1408))
    fp8_train.round_e5m6(x)


def of_fused() -> None:
    for dtype in (BF16, FP32):
        fused.rms_norm(empty(dtype, 16, 7168), bf16(7168), 1e-6)
        fused.rms_norm(empty(dtype, 16, 512), fp32(512), 1e-6)
        fused.swiglu(*empty(dtype, 16, 4096).chunk(2, -1))
        kv, q, cos = empty(dtype, 16, 576), empty(dtype, 16, 128 * 192), fp32(16, 32)
        fused.write_latents(kv, bf16(512), 1e-6, cos, cos, empty(dtype, 9, 64, 576), int64(16, 2)[:, 0])
        fused.rotate_queries_(q, cos, cos, 128)
        fused.expanded_keys(empty(dtype, 16, 128, 256), kv[:, 512:], 128)
    fused.route(fp32(16, 256), fp32(256), 8, 8, 4, True, 2.5)
    fused.route(fp32(16, 64), fp32(64), 6, 1, 1, False, 1.0)


def of_grouped() -> None:
    grouped.gather_rows(bf16(64, 2048), int32(384), 6)
    grouped.gather_rows(empty(torch.uint8, 64, 2048), int32(384), 6)
    for F in (1408, 2048):
        grouped.gated_backward(bf16(384, 2 * F), bf16(384, F), int32(384), fp32(64, 6))
    grouped.gate_rows(bf16(64, 7168), bf16(384, 7168), int32(384), fp32(64, 6))


def of_mla() -> None:
    for H, dtype in ((16, BF16), (32, BF16), (128, BF16), (16, FP32)):
        for width in (8, 64):  # one split, several
            pages, table = empty(dtype, 9, 64, 576), int64(4, width)
            for how in (None, mla.tiles(H, dtype)):
                mla.decode(empty(dtype, 4, H, 576), pages, table, int32(4), 512, 0.1, how=how)


def of_routing() -> None:
    for E, K in ((256, 8), (64, 6)):
        scores, gates, chosen = fp32(64, E), fp32(64, K), int64(64, K)
        for more in (scores, None):
            routing.route_backward(scores, gates, chosen, gates, more, True, 2.5)
        routing.balance_parts(scores, 32, K)
        routing.balance_backward(scores, fp32(2, E), 32)
        routing.count_by_expert(chosen, E)
        routing.sort_by_expert(chosen, E)


def of_stream() -> None:
    for kind in KINDS:
        stream.rows_dot(bf16(1, 7168), stored(kind, 1536, 7168), stored(kind, 576, 7168))
    stream.rows_dot(bf16(4, 1408), stored(PLAIN, 256, 1408, dtype=FP32), dtype=FP32)
    stream.rows_dot(fp32(4, 2048), stored(FP8, 2048, 2048))


def of_training() -> None:
    cos, weight = fp32(32, 32), fp32(512)
    for dtype in (BF16, FP32):
        x = empty(dtype, 64, 2048)
        training.norm_backward(x, fp32(2048), 1e-6, x, x)
        training.norm_backward(empty(dtype, 64, 7168), fp32(7168), 1e-6, empty(dtype, 64, 7168))
        training.swiglu_backward(*empty(dtype, 64, 2816).chunk(2, -1), empty(dtype, 64, 1408))
        for back in (False, True):
            training.rotate_queries_(empty(dtype, 64, 16 * 192), cos, cos, 16, back)
        kv = empty(dtype, 64, 576)
        training.latent(kv, weight, 1e-6, cos, cos)
        training.latent_backward(kv, weight, 1e-6, cos, cos, kv[:, :512].clone(), kv[:, 512:].clone())
        training.keys_backward(empty(dtype, 64, 16, 192), empty(dtype, 64, 16, 128), 128)


# Two processes take every second one: the longest stand first.
CASES: list[Callable[[], None]] = [
    of_fp8, of_experts, of_routing, of_mla, of_fp8_hopper, of_fp8_products, of_decode, of_fp8_train, of_fp8_quantise,
    of_fused, of_training, of_adamw, of_stream, of_grouped, of_cross_entropy, of_divergence,
]  # fmt: skip


def main(first: int, step: int) -> None:
    assert not knobs.runtime.interpret
    knobs.nvidia.dump_ptxas_log = True
    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only
    torch.Tensor.is_cuda = True  # where there are two ways, the card's
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)
    with overlap.overlapping(True):
        for case in CASES[first::step]:
            case()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
