"""FP8 training on a GPU against its emulation, at sizes the interpreter has no time for (the small ones, in
tests/unit/ops/test_fp8_kernels.py, run on a GPU too)."""

from __future__ import annotations

import pytest
import torch

from rorqual.ops.fp8 import dequantize_blocks, dequantize_tiles
from rorqual.ops.fp8_train import (
    Recipe,
    TritonQuantiser,
    fp8_products,
    fp8_quantisers,
    fp8_train_experts,
    fp8_train_linear,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")
HARDWARE = 1e-3
"""The FP8 units keep about 14 bits within 128 products."""


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 2816), (1000, 7168), (300, 1432), (37, 48)])
def test_quantisers_agree_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Gluon's with Triton's: tiles of rows, columns and both, kept ones turned, blocks of one weight and of a stack."""
    ours, theirs = fp8_quantisers.get("gluon"), TritonQuantiser
    x = (torch.randn(*shape, device=CUDA) * torch.logspace(-4, 4, shape[1], device=CUDA)).to(dtype)
    x[:, 3], x[5] = 0, 0
    kept, stack = theirs.tiles(x, None), torch.stack((x, 3 * x, x.flip(0)))
    pairs = [
        pair
        for fmt in (None, "ue8m0")
        for pair in (
            (ours.tiles(x, fmt), theirs.tiles(x, fmt)),
            (ours.tokens(x, fmt), theirs.tokens(x, fmt)),
            *zip(ours.both(x, fmt), theirs.both(x, fmt), strict=True),
        )
    ]
    pairs.append((ours.tokens(kept, None), theirs.tokens(kept, None)))
    for weight in (x, stack):
        pairs += zip(ours.weight(weight), theirs.weight(weight), strict=True)
    for a, b in pairs:
        assert torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("backend", ["triton", "scaled_mm", "hopper"])
@pytest.mark.parametrize("recipe", [{}, {"keep": "e5m6"}, {"input_fmt": "ue8m0", "grad_fmt": "ue8m0"}])
@pytest.mark.parametrize("shape", [(2048, 1024, 3072), (512, 640, 576), (1000, 2816, 1024), (4096, 7168, 320)])
def test_a_layer_is_its_emulation(shape: tuple[int, int, int], recipe: dict[str, str], backend: str) -> None:
    M, K, N = shape
    x, w, dy = (torch.randn(*s, device=CUDA) for s in ((M, K), (N, K), (M, N)))
    seen = []
    for name in (backend, "expanded"):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = fp8_train_linear(*leaves, Recipe(backend=name, **recipe))  # type: ignore[arg-type]
        y.backward(dy)
        seen.append([y.detach(), *(t.grad for t in leaves)])
    for ours, exact in zip(*seen, strict=True):
        assert ours.dtype == exact.dtype and relative(ours, exact) <= HARDWARE


@pytest.mark.parametrize(("backend", "D"), [("triton", 1024), ("hopper", 1024), ("hopper", 720)])
def test_grouped_experts_are_the_loop(backend: str, D: int) -> None:
    N, F, E, K = 2000, 512, 16, 4
    chosen = torch.rand(N, E, device=CUDA).topk(K).indices
    gates = torch.rand(N, K, device=CUDA)
    inputs = [
        torch.randn(N, D, device=CUDA),
        torch.randn(E, 2 * F, D, device=CUDA) / 32,
        torch.randn(E, D, F, device=CUDA) / 23,
    ]
    dout, seen = torch.randn(N, D, device=CUDA), []
    for grouped in (True, False):
        leaves = [t.clone().requires_grad_() for t in (*inputs, gates)]
        out = fp8_train_experts(*leaves, chosen, Recipe(backend=backend if grouped else "expanded"))
        out.backward(dout)
        seen.append([out.detach(), *(t.grad for t in leaves)])
    for ours, exact in zip(*seen, strict=True):
        # A product's last bits move some codes of what is quantised next by a step.
        assert relative(ours, exact) <= 2e-2


def test_hoppers_products_by_expert() -> None:
    """Rows by expert and an expert's weight gradient, one expert without rows, tiles that end beyond the last column."""
    fp8_products.get("hopper")
    from rorqual.ops.triton import fp8_hopper

    E, N, K = 4, 1344, 1024
    tile_expert = torch.tensor([0] * 5 + [2] * 11 + [3] + [E] * 3, dtype=torch.int32, device=CUDA)
    tile_ends = torch.tensor([5, 5, 16, 17], dtype=torch.int32, device=CUDA)
    M = len(tile_expert) * 128
    x, dy, w = (torch.randn(*s, device=CUDA) for s in ((M, K), (M, N), (E, N, K)))
    a, (weight, _) = TritonQuantiser.tiles(x, None), TritonQuantiser.weight(w)
    across, tokens = TritonQuantiser.tokens(dy, None), TritonQuantiser.tokens(x, None)
    rows = fp8_hopper.product(a, weight, True, torch.float32, tile_expert)
    grads = fp8_hopper.weight_gradient(across, tokens, tile_ends, torch.float32)
    begin = 0
    for e, end in enumerate(tile_ends.tolist()):
        part = slice(begin * 128, end * 128)
        if end == begin:
            assert not grads[e].any()
            continue
        y = dequantize_tiles(a[0][part], a[1][part]) @ dequantize_blocks(weight[0][e], weight[1][e]).T
        assert relative(rows[part], y) <= HARDWARE
        dw = dequantize_tiles(*across)[:, part] @ dequantize_tiles(*tokens)[:, part].T
        assert relative(grads[e], dw) <= HARDWARE
        begin = end
