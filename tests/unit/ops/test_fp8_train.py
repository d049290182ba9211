"""FP8 training against the definition in fp64, bit for bit where bits are promised, forward and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from rorqual.config import ModelConfig
from rorqual.model.layers import Linear
from rorqual.model.precision import train_in_fp8
from rorqual.model.transformer import Transformer
from rorqual.ops import fp8_train
from rorqual.ops.experts import experts_loop
from rorqual.ops.fp8_train import (
    BOUND,
    ERROR,
    Recipe,
    fp8_products,
    fp8_train_experts,
    fp8_train_linear,
    round_e5m6,
    swiglu_down,
)

SHAPES = [(1, 128, 128), (5, 640, 130), (130, 64, 256), (257, 200, 72)]
"""M tokens, K in, N out: K = 5 x 128 included, and ragged in every direction."""


def e4m3(x: float) -> float:
    """To the nearest E4M3 number, ties to even, by arithmetic alone."""
    if x == 0:
        return 0.0
    magnitude = min(abs(x), 448.0)
    exponent = max(torch.tensor(magnitude, dtype=torch.float64).frexp().exponent.item() - 1, -6)
    step = 2.0 ** (exponent - 3)
    return min(round(magnitude / step) * step, 448.0) * (1 if x > 0 else -1)


def slow_tiles(x: torch.Tensor, power: bool = False) -> torch.Tensor:
    """Rows quantised and expanded in tiles of 128, number by number."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row, start in itertools.product(range(x.shape[0]), range(0, x.shape[1], 128)):
        tile = x[row, start : start + 128]
        scale = (tile.abs().max() / torch.tensor(448.0)).item() or 1.0
        if power:
            mantissa, exponent = torch.tensor(scale).frexp()
            scale = 2.0 ** (exponent.item() - (mantissa.item() == 0.5))
        for i, value in enumerate(tile.tolist()):
            scaled = (torch.tensor(value) / torch.tensor(scale)).item()  # one fp32 division, as on hardware
            out[row, start + i] = (torch.tensor(e4m3(scaled)) * torch.tensor(scale)).item()
    return out


def slow_blocks(w: torch.Tensor) -> torch.Tensor:
    """Blocks of 128 x 128, each as one tile."""
    out = torch.empty(w.shape, dtype=torch.float64)
    for i, j in itertools.product(range(0, w.shape[0], 128), range(0, w.shape[1], 128)):
        block = w[i : i + 128, j : j + 128]
        scale = block.abs().max() / torch.tensor(448.0)
        codes = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[i : i + 128, j : j + 128] = (codes.float() * scale).double()
    return out


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def layer(shape: tuple[int, int, int], recipe: Recipe, seed: int = 0):  # type: ignore[no-untyped-def]
    """(x, w, dy, y, dx, dw) of one layer."""
    M, K, N = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).requires_grad_()
    w = (torch.randn(N, K, generator=g) / K**0.5).requires_grad_()
    dy = torch.randn(M, N, generator=g)
    y = fp8_train_linear(x, w, recipe)
    y.backward(dy)
    return x.detach(), w.detach(), dy, y.detach(), x.grad, w.grad


@pytest.mark.parametrize("fmt", [None, "ue8m0"])
def test_codes_and_scales_are_those_of_the_definition(fmt: str | None) -> None:
    x = torch.randn(3, 200) * torch.tensor([1e-6, 1.0, 300.0])[:, None]
    x[0, :5] = 0
    x[1, 130:] = 0
    ours = fp8_train.ReferenceQuantiser.tiles(x, fmt)
    assert torch.equal(fp8_train.dequantize_tiles(*ours).double(), slow_tiles(x, fmt is not None))
    along = fp8_train.ReferenceQuantiser.tokens(x, fmt)
    assert torch.equal(fp8_train.dequantize_tiles(*along).double(), slow_tiles(x.T.contiguous(), fmt is not None))


ON_CPU = [
    n for n in fp8_products.names() if n not in ("triton", "scaled_mm", "hopper") or not torch.cuda.is_available()
]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_products_equal_the_definition_in_fp64(backend: str, shape: tuple[int, int, int]) -> None:
    """y, dx and dW from operands quantised independently here, multiplied in fp64."""
    x, w, dy, y, dx, dw = layer(shape, Recipe(backend=backend))
    xq, wq, dyq = slow_tiles(x) if x.numel() < 9000 else fast(x), slow_blocks(w), fast(dy)
    assert relative(y, xq @ wq.T) <= BOUND
    assert relative(dx, dyq @ wq) <= BOUND
    again = fast(xq.float().T.contiguous())  # expanded, turned, quantised along the tokens
    assert relative(dw, fast(dy.T.contiguous()) @ again.T) <= BOUND


def fast(x: torch.Tensor) -> torch.Tensor:
    """`slow_tiles` by torch's own conversion."""
    pad = F.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = pad.abs().amax(-1, keepdim=True) / torch.tensor(448.0)
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (pad / scale).to(torch.float8_e4m3fn).float()
    return (codes * scale).flatten(1)[:, : x.shape[1]].double()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 1])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(keep="e5m6"), Recipe(input_fmt="ue8m0", grad_fmt="ue8m0")])
def test_a_layer_stays_close_to_fp32(shape: tuple[int, int, int], recipe: Recipe) -> None:
    x, w, dy, y, dx, dw = layer(shape, recipe)
    for ours, exact in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert 1e-3 < relative(ours, exact) <= ERROR


def test_an_outlier_spoils_its_tile_and_no_other() -> None:
    """Why tiles: under one scale for all, a loud channel rounds every other one to nothing."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 512, generator=g), torch.randn(128, 512, generator=g)
    clean = fp8_train_linear(x, w, Recipe())
    loud = x.clone()
    loud[:, 7] *= 1e6
    others = slice(128, 512)
    spoilt = fp8_train_linear(loud[:, others].contiguous(), w[:, others].contiguous(), Recipe())
    assert torch.equal(spoilt, fp8_train_linear(x[:, others].contiguous(), w[:, others].contiguous(), Recipe()))
    one_scale = (loud / (loud.abs().max() / 448)).to(torch.float8_e4m3fn).float() * (loud.abs().max() / 448)
    rest = relative(one_scale[:, others], x[:, others])
    tiles = relative(
        fp8_train.dequantize_tiles(*fp8_train.ReferenceQuantiser.tiles(loud, None))[:, others], x[:, others]
    )
    assert tiles < 0.04 < 0.5 < rest and clean.isfinite().all()


def test_e5m6_keeps_six_bits_of_mantissa() -> None:
    x = torch.randn(9, 300) * torch.logspace(-3, 3, 300)
    rounded = round_e5m6(x).float()
    assert relative(rounded, x) < 2.0**-7
    top = F.pad(x, (0, 84)).unflatten(1, (-1, 128)).abs().amax(-1, keepdim=True).expand(-1, -1, 128).flatten(1)[:, :300]
    normal = x.abs() > top * 2.0**-28
    assert ((rounded - x).abs()[normal] <= x.abs()[normal] * 2.0**-6).all()
    mantissa = rounded.frexp().mantissa * 2**7
    assert torch.equal(mantissa, mantissa.round())  # six bits after the leading one
    assert torch.equal(round_e5m6(rounded).float(), rounded)
    assert torch.equal(round_e5m6(torch.zeros(2, 130)), torch.zeros(2, 130, dtype=torch.bfloat16))


def test_swiglu_and_its_projection_are_their_parts() -> None:
    """The output is the linear layer's on silu(gate) * up; the gradients are those of the FP8 layer at the gate and up that
    were kept in FP8."""
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(70, 150, generator=g) for _ in range(2))
    w, dy = torch.randn(90, 150, generator=g) / 12, torch.randn(70, 90, generator=g)
    a, b, c = (t.clone().requires_grad_() for t in (gate, up, w))
    y = swiglu_down(a, b, c, Recipe())
    y.backward(dy)
    assert torch.equal(y, fp8_train_linear(F.silu(gate) * up, w, Recipe()))
    a2, b2, c2 = fast(gate).float().requires_grad_(), fast(up).float().requires_grad_(), w.clone().requires_grad_()
    h = F.silu(a2) * b2
    h.retain_grad()
    # The product in the middle is computed again, not kept: it is quantised once, along the tokens.
    fp8_train_linear(h, c2, Recipe()).backward(dy)
    assert h.grad is not None and a.grad is not None and b.grad is not None and c.grad is not None
    assert relative(a.grad, a2.grad) < 1e-5 and relative(b.grad, b2.grad) < 1e-5
    exact = fast(dy.T.contiguous()) @ fast((F.silu(a2) * b2).detach().T.contiguous()).T
    assert relative(c.grad, exact) <= BOUND


def test_experts_are_close_to_the_loop_with_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(40, 128, generator=g),
        torch.randn(4, 96, 128, generator=g) / 11,
        torch.randn(4, 128, 48, generator=g) / 7,
    )
    gates, chosen = (
        torch.rand(40, 2, generator=g),
        torch.rand(40, 3, generator=g).topk(2).indices,
    )  # expert 3 gets nothing
    results = []
    for run in (experts_loop, lambda *args: fp8_train_experts(*args, recipe=Recipe())):
        leaves = [t.clone().requires_grad_() for t in (x, up, down, gates)]
        out = run(*leaves, chosen)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for exact, ours in zip(*results, strict=True):
        assert 0 < relative(ours, exact) < 2 * ERROR
    assert torch.equal(results[1][2][3], torch.zeros(96, 128))


def test_not_a_number_comes_through() -> None:
    x = torch.randn(4, 256)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    y = fp8_train_linear(x, torch.randn(8, 256), Recipe())
    assert y[[0, 3]].isfinite().all() and not y[[1, 2]].isfinite().any()


def test_the_layers_kept_in_higher_precision_are_the_papers() -> None:
    cfg = ModelConfig.load("test").replace(tie_word_embeddings=False, num_nextn_predict_layers=1)
    model = Transformer(cfg)
    changed = train_in_fp8(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, Linear)}
    assert linears - set(changed) == {"lm_head", "mtp.0.eh_proj"}
    assert {n for n in changed if n not in linears} == {
        n for n, _ in model.named_modules() if n.endswith("mlp.experts")
    }
    tokens = torch.randint(0, cfg.vocab_size, (2, 16))
    loss = model(tokens).float().logsumexp(-1).sum()
    loss.backward()
    # MTP took no part; the gates route in fp32 and learn as before.
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for n, p in model.named_parameters() if "mtp" not in n
    )
