"""Single layers in training at true widths: forward and backward in bf16 and in FP8, and where the time goes.

One layer of DeepSeek-V3 has 11.3 B parameters: it fits a GPU in bf16 without an optimiser, so weights are bf16 here, in FP8
quantised anew in every forward as in a run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rorqual.config import ModelConfig
from rorqual.model.precision import train_in_fp8
from rorqual.model.transformer import Transformer
from rorqual.ops.rope import cos_sin

PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "_product_kernel", "_weight_gradient", "xmma", "splitk")
QUANTISING = ("_tile_kernel", "_block_kernel", "quantise_kernel", "_e5m6")
ATTENTION = ("cudnn", "flash", "fmha", "sdpa", "attention")


def table(
    cfg: ModelConfig,
    device: str,
    batch: int,
    seq_len: int,
    precisions: Sequence[str] = ("bf16", "fp8"),
    rounds: int = 10,
) -> list[dict[str, Any]]:
    """One row for each kind of layer and precision; the first one is what the others are compared with."""
    rows = []
    kinds = {"dense": 1, "moe": 0} if cfg.first_k_dense_replace else {"moe": 0}
    for kind, dense in kinds.items():
        one = cfg.replace(num_hidden_layers=1, first_k_dense_replace=dense, num_nextn_predict_layers=0, vocab_size=128)
        base = 0.0
        for precision in precisions:
            row = {"layer": kind, "precision": precision, **_measure(one, precision, device, batch, seq_len, rounds)}
            base = base or row["microseconds"]
            rows.append(row | {f"{precisions[0]} / this": base / row["microseconds"]})
    return rows


def _measure(cfg: ModelConfig, precision: str, device: str, batch: int, seq_len: int, rounds: int) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    gc.collect()  # the layer before has as much memory again
    if on_gpu:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = Transformer(cfg, dtype=dtype, device=device)
    precision, _, backend = precision.partition("/")
    if precision == "fp8":
        train_in_fp8(model, backend or "auto")
    rope = cos_sin(torch.arange(seq_len, device=device)[None], model.rope_speeds, model.rope_factor)
    x = torch.randn(batch, seq_len, cfg.hidden_size, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn_like(x)
    layer = model.layers[0]

    def step() -> None:
        layer(x, rope)[0].backward(dout)
        x.grad = None
        for p in layer.parameters():
            p.grad = None

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(step, on_gpu, rounds)
    row: dict[str, Any] = {"microseconds": 1e6 * seconds, "tokens_per_s": batch * seq_len / seconds}
    if on_gpu:
        row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30, **_shares(step)}
    return row


def _seconds(step: Callable[[], None], on_gpu: bool, rounds: int) -> float:
    """Median of a few, after two that do not count."""
    seconds = []
    for i in range(2 + rounds):
        start = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _shares(step: Callable[[], None]) -> dict[str, float]:
    """Of the time in kernels: products, quantising, attention, the rest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    total = dict.fromkeys(("products", "quantising", "attention", "rest"), 0.0)
    for event in seen.events() or ():
        if str(event.device_type).endswith("CUDA"):
            total[_kind(event.name)] += event.time_range.elapsed_us()
    whole = sum(total.values()) or 1.0
    return {f"{name} share": value / whole for name, value in total.items()}


def _kind(kernel: str) -> str:
    name = kernel.lower()
    if any(part in name for part in QUANTISING):
        return "quantising"
    if any(part in name for part in ATTENTION):
        return "attention"
    return "products" if any(part in name for part in PRODUCTS) else "rest"
