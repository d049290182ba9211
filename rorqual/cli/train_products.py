"""Single products of a layer's training, and quantising for them: microseconds of every way, and relative errors.

Three products of dense weights (forward, the gradient of x, the gradient of W) and of all routed experts, each of which has
its even share of the tokens. FP8 operands are quantised beforehand; what that costs has rows of its own. The error is
against the same operands in fp32 (of experts, the first one's), in FP8 the expanded codes. A way that would hand the shape
on to another one is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.cli.layers import timed
from rorqual.config import ModelConfig
from rorqual.ops.fp8 import dequantize_blocks, dequantize_tiles
from rorqual.ops.fp8_train import (
    Quantised,
    Quantiser,
    fp8_products,
    fp8_quantisers,
    hopper_missing,
    kernel_quantiser,
    scaled_mm_takes,
)

TILE = 128
Ways = dict[str, Callable[[], Tensor]]


def table(cfg: ModelConfig, device: str, tokens: int) -> list[dict[str, Any]]:
    """Products, then quantising. tokens: of a micro-batch."""
    on_gpu = device.startswith("cuda")
    quantiser = kernel_quantiser("auto") if on_gpu else fp8_quantisers.get("reference")
    D, F_, H = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_attention_heads
    dense = {
        "kv_a_proj": (cfg.cache_dim, D), "kv_b_proj": (H * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank),
        "o_proj": (D, H * cfg.v_head_dim), "dense gate_proj": (cfg.intermediate_size, D),
        "shared down_proj": (D, F_ * cfg.n_shared_experts),
    }  # fmt: skip
    rows = []
    for name, (out, width) in dense.items():
        for kind, ways, part, rights in _dense(quantiser, device, tokens, out, width):
            rows += _rows(f"{name} {kind}", tokens, out, width, 1, ways, part, rights)
    each = max(1, tokens * cfg.num_experts_per_tok // cfg.n_routed_experts // TILE) * TILE
    if on_gpu:
        for name, (out, width) in {"gate_up": (2 * F_, D), "down": (D, F_)}.items():
            for kind, ways, part, rights in _experts(quantiser, device, each, cfg.n_routed_experts, out, width):
                rows += _rows(f"experts {name} {kind}", each, out, width, cfg.n_routed_experts, ways, part, rights)
    quantisers = [name for name in fp8_quantisers.names() if on_gpu != (name == "reference")]
    return rows + [row for way in quantisers for row in _quantising(way, device, tokens, D)]


def _rows(
    name: str, tokens: int, out: int, width: int, experts: int, ways: Ways, part: Callable[[Tensor], Tensor],
    rights: tuple[Tensor, Tensor],
) -> list[dict[str, Any]]:  # fmt: skip
    """One for each way. Shapes are experts, tokens, outputs, inputs. rights: what `part` of the result should be, of numbers
    in bf16 and of their codes."""
    rows, flops, base = [], 2 * tokens * out * width * experts, 0.0
    for way, work in ways.items():
        right = rights[way != "bf16"].double()
        error = float((part(work()).double() - right).norm() / right.norm())
        seconds = timed(work)
        base = base or seconds
        rows.append({
            "product": name, "shape": f"{experts}x" * (experts > 1) + f"{tokens}x{out}x{width}", "way": way,
            "microseconds": 1e6 * seconds, "TFLOP/s": flops / seconds / 1e12, "bf16 / this": base / seconds, "error": error,
        })  # fmt: skip
    return rows


def _dense(
    quantiser: type[Quantiser], device: str, tokens: int, out: int, width: int
) -> Iterator[tuple[str, Ways, Callable[[Tensor], Tensor], tuple[Tensor, Tensor]]]:
    x, w, dy = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((tokens, width), (out, width), (tokens, out))
    )
    (weight, turned), xs, (along, across) = quantiser.weight(w), quantiser.tiles(x, None), quantiser.both(dy, None)
    wide = [t.float() for t in (x, w, dy)]
    pairs: dict[str, tuple[Quantised, Quantised, bool, Callable[[], Tensor], Tensor]] = {
        "forward": (xs, weight, True, lambda: x @ w.T, wide[0] @ wide[1].T),
        "dgrad": (along, turned, True, lambda: dy @ w, wide[2] @ wide[1]),
        "wgrad": (across, quantiser.tokens(x, None), False, lambda: dy.T @ x, wide[2].T @ wide[0]),
    }
    for kind, (a, b, blocks, plain, exact) in pairs.items():
        right = dequantize_tiles(*a) @ (dequantize_blocks if blocks else dequantize_tiles)(*b).T
        ways: Ways = {"bf16": plain}
        ways |= {
            name: partial(product, a, b, blocks, torch.bfloat16)
            for name, product in _products(a, b, blocks, device).items()
        }
        yield kind, ways, lambda y: y, (exact, right)


def _products(a: Quantised, b: Quantised, blocks: bool, device: str) -> dict[str, Callable[..., Tensor]]:
    """The ways that multiply these by themselves."""
    if not device.startswith("cuda"):
        return {"expanded": fp8_products.get("expanded")}
    names = ["triton"]
    if scaled_mm_takes(a, b, blocks):
        names.append("scaled_mm")
    if hopper_missing() is None:
        from rorqual.ops.triton import fp8_hopper

        if fp8_hopper.missing(a, b) is None:
            names.append("hopper")
    return {name: fp8_products.get(name) for name in names}


def _experts(
    quantiser: type[Quantiser], device: str, each: int, experts: int, out: int, width: int
) -> Iterator[tuple[str, Ways, Callable[[Tensor], Tensor], tuple[Tensor, Tensor]]]:
    from rorqual.ops.triton import fp8_products as triton_products

    M = each * experts
    x, w, dy = (
        torch.randn(*shape, device=device, dtype=torch.bfloat16)
        for shape in ((M, width), (experts, out, width), (M, out))
    )
    tile_expert = torch.arange(experts, dtype=torch.int32, device=device).repeat_interleave(each // TILE)
    tile_ends = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (each // TILE)
    ends = tile_ends * TILE
    (weight, turned), xs, (along, across) = quantiser.weight(w), quantiser.tiles(x, None), quantiser.both(dy, None)
    x_tokens = quantiser.tokens(x, None)
    modules: dict[str, Any] = {"triton": triton_products}
    if hopper_missing() is None and width % 16 == out % 16 == 0:
        from rorqual.ops.triton import fp8_hopper

        modules["hopper"] = fp8_hopper
    first_x, first_w, first_dy = x[:each].float(), w[0].float(), dy[:each].float()
    for kind, a, b, plain, exact in (
        ("forward", xs, weight, lambda: F.grouped_mm(x, w.mT, offs=ends), first_x @ first_w.T),
        ("dgrad", along, turned, lambda: F.grouped_mm(dy, w, offs=ends), first_dy @ first_w),
    ):
        right = dequantize_tiles(a[0][:each], a[1][:each]) @ dequantize_blocks(b[0][0], b[1][0]).T
        ways: Ways = {"bf16": plain}
        ways |= {
            name: partial(module.product, a, b, True, torch.bfloat16, tile_expert) for name, module in modules.items()
        }
        yield kind, ways, lambda y: y[:each], (exact, right)
    right = (dequantize_tiles(*across)[:, :each]) @ dequantize_tiles(*x_tokens)[:, :each].T
    ways = {"bf16": lambda: F.grouped_mm(dy.T, x, offs=ends)}
    ways |= {
        name: partial(module.weight_gradient, across, x_tokens, tile_ends, torch.bfloat16)
        for name, module in modules.items()
    }
    yield "wgrad", ways, lambda y: y[0], (first_dy.T @ first_x, right)


def _quantising(way: str, device: str, tokens: int, width: int) -> list[dict[str, Any]]:
    """Beside the time: how many bytes a second that are read and written."""
    quantiser = fp8_quantisers.get(way)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    w, kept = torch.randn(8 * width, width, device=device), quantiser.tiles(x, None)
    half = w.bfloat16()
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "tiles of x": (lambda: quantiser.tiles(x, None), 3 * x.numel()),
        "tiles of x both ways": (lambda: quantiser.both(x, None), 4 * x.numel()),
        "kept tiles turned": (lambda: quantiser.tokens(kept, None), 2 * x.numel()),
        "an fp32 weight both ways": (lambda: quantiser.weight(w), 6 * w.numel()),
        "a bf16 weight both ways": (lambda: quantiser.weight(half), 4 * w.numel()),
    }
    rows = []
    for name, (work, size) in works.items():
        seconds = timed(work)
        rows.append({"quantising": name, "way": way, "microseconds": 1e6 * seconds, "GB/s": size / seconds / 1e9})
    return rows
