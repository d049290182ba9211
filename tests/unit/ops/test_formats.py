"""FP8 blocks and packed integers: the formats' errors, ragged edges, each backend against its reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.ops import fp8
from rorqual.ops.experts import experts_loop
from rorqual.ops.formats import WeightFormat, experts_by_linear
from rorqual.ops.packed import PackedIntegers, pack_codes, unpack_codes
from rorqual.ops.triton.fp8 import expand, quantize_rows, tile_experts

SHAPES = [(128, 128), (576, 7 * 128), (192, 320), (1, 1), (130, 127), (7, 300)]
FORMATS: list[WeightFormat] = [fp8.Fp8Blocks(), fp8.Fp8Blocks(scale_fmt="ue8m0"), PackedIntegers(4), PackedIntegers(8)]


def by_hand(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Value by value, in fp64: no block arithmetic shared with the code under test."""
    out = codes.double()
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = codes[i, j].double() * scale[i // 128, j // 128].double()
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_blocks_are_within_the_formats_error(shape: tuple[int, int], scale_fmt: str | None) -> None:
    weight = torch.randn(shape) * torch.rand(shape[0], 1) ** 4
    codes, scale = fp8.quantize_blocks(weight, scale_fmt)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128)) and codes.dtype == torch.float8_e4m3fn
    back = fp8.dequantize_blocks(codes, scale)
    per_value = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert ((back - weight).abs() <= weight.abs() * fp8.STEP * 1.0001 + per_value * fp8.SMALLEST).all()
    if scale_fmt == "ue8m0":
        assert (torch.frexp(scale)[0] == 0.5).all()  # powers of two
    else:  # the largest value of a block uses the whole range
        assert codes.float().abs().max() == fp8.E4M3_MAX


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_fp8_expands_as_by_hand(shape: tuple[int, int]) -> None:
    codes, scale = fp8.quantize_blocks(torch.randn(shape))
    assert torch.equal(fp8.dequantize_blocks(codes, scale).double(), by_hand(codes, scale).float().double())


def test_fp8_blocks_of_zeros_and_of_tiny_values() -> None:
    weight = torch.zeros(256, 128)
    weight[128:] = 1e-42
    codes, scale = fp8.quantize_blocks(weight)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (fp8.dequantize_blocks(codes, scale) - weight).abs().max() <= 1e-42


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_no_scale_can_carry_are_refused(form: WeightFormat, bad: float) -> None:
    weight = torch.randn(64, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        form.pack(weight)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_integers_pack_and_unpack(bits: int, rows: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, 32 * groups)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, groups * bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_within_the_formats_error(bits: int) -> None:
    weight, form = torch.randn(48, 96), PackedIntegers(bits)
    parts = form.pack(weight)
    step = parts["weight_scale"].float().repeat_interleave(32, 1)
    # Half a step, and at the ends of the range what rounding the scale to bf16 cuts off, or at eight steps of four bits one.
    steps = 0.5 if bits == 8 else 1.0
    assert ((form.dense(parts, torch.float32) - weight).abs() <= step * (steps + 2 ** (bits - 1) * 2**-8) + 1e-9).all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
def test_four_bits_err_no_more_than_one_fixed_scale_would_and_twice_not_at_all(spread: float) -> None:
    weight, form = spread * torch.randn(64, 256), PackedIntegers(4)
    parts = form.pack(weight)
    rounded = form.dense(parts, torch.float32)
    tiles = weight.unflatten(-1, (-1, 32))
    fixed = (tiles.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16).float()
    plain = (tiles / fixed).round().clamp(-8, 7) * fixed

    def errors(values: torch.Tensor) -> torch.Tensor:
        return (values.unflatten(-1, (-1, 32)) - tiles).square().sum(-1)

    assert (errors(rounded) <= errors(plain.flatten(-2)) * (1 + 1e-6)).all()
    assert errors(rounded).sum() < 0.95 * errors(plain.flatten(-2)).sum()
    assert all(torch.equal(a, b) for a, b in zip(form.pack(rounded).values(), parts.values(), strict=True))
    # Also what one fixed scale made, for files written so.
    assert torch.equal(form.dense(form.pack(plain.flatten(-2)), torch.float32), plain.flatten(-2))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_a_format_multiplies_as_its_expanded_weight(form: WeightFormat) -> None:
    weight, x = torch.randn(70, 160), torch.randn(2, 3, 160)
    parts = form.pack(weight)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == form.parts(weight.shape)
    assert form.shape(parts) == (70, 160)
    assert torch.allclose(form.linear(x, parts), F.linear(x, form.dense(parts, torch.float32)), atol=1e-5)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_experts_of_a_format_equal_the_loop_over_expanded_ones(form: WeightFormat) -> None:
    E, D, width, N, K = 5, 160, 96, 7, 2
    gate_up, down = form.pack(torch.randn(E, 2, width, D)), form.pack(torch.randn(E, D, width))
    x, gates = torch.randn(N, D), torch.rand(N, K)
    chosen = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    plain = form.dense(gate_up, torch.float32).flatten(1, 2), form.dense(down, torch.float32)
    want = experts_loop(x, *plain, gates, chosen)
    got = experts_by_linear(x, gates, chosen, (form, gate_up), (form, down))
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_dynamic_is_near_weight_only_and_not_equal() -> None:
    x, (codes, scale) = torch.randn(9, 576), fp8.quantize_blocks(torch.randn(192, 576))
    exact, dynamic = (fp8.fp8_linear(x, codes, scale, scheme) for scheme in ("weight_only", "dynamic"))
    assert 0 < (dynamic - exact).norm() / exact.norm() < fp8.DYNAMIC_ERROR


@pytest.mark.parametrize("shape", [(1, 128, 128), (5, 192, 320), (17, 64, 300), (70, 576, 256)])
@pytest.mark.parametrize("scheme", ["weight_only", "dynamic"])
def test_triton_equals_the_reference(shape: tuple[int, int, int], scheme: fp8.Scheme) -> None:
    rows, out, width = shape
    x, (codes, scale) = torch.randn(rows, width), fp8.quantize_blocks(torch.randn(out, width))
    want = fp8.fp8_linear(x, codes, scale, scheme, "reference")
    got = fp8.fp8_linear(x, codes, scale, scheme, "triton")
    assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_expands_to_the_same_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale = fp8.quantize_blocks(torch.randn(shape))
    assert torch.equal(expand(codes, scale, dtype), fp8.dequantize_blocks(codes, scale, dtype))


@pytest.mark.parametrize("shape", [(1, 128), (3, 300), (33, 256)])
def test_triton_quantises_rows_alike(shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * torch.rand(shape[0], 1) ** 6
    x[0] = 0
    (codes, scale), (want, want_scale) = quantize_rows(x), fp8.quantize_tiles(x)
    assert torch.equal(scale, want_scale)
    # The interpreter halves what rounds up to a power of two, and takes the neighbour for a few subnormals and ties;
    # tests/gpu asserts equality to the bit.
    got, want = codes.float(), want.float()
    halved = (torch.frexp(want)[0].abs() == 0.5) & (got * 2 == want)
    neighbour = (got - want).abs() <= want.abs() * 2**-3 + 2**-9
    assert (halved | neighbour).all()
    assert ((got != want) & ~halved).float().mean() < 0.01


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic"])
@pytest.mark.parametrize(("N", "K"), [(1, 2), (9, 3), (40, 2)])
def test_grouped_experts_equal_the_loop(scheme: fp8.Scheme, N: int, K: int) -> None:
    E, D, width = 6, 160, 96
    loop = fp8.Fp8Blocks(scheme, backend="reference")
    gate_up, down = loop.pack(torch.randn(E, 2, width, D)), loop.pack(torch.randn(E, D, width))
    x, gates = torch.randn(N, D), torch.rand(N, K)
    chosen = torch.stack([torch.randperm(E - 1)[:K] for _ in range(N)])  # one expert stays idle
    want = experts_by_linear(x, gates, chosen, (loop, gate_up), (loop, down))
    form = fp8.Fp8Blocks(scheme)
    got = tile_experts(x, form.weight(gate_up), form.weight(down), gates, chosen)
    assert not torch.isnan(got).any()
    # A value on the edge between two codes may round differently after another order of addition.
    bound = 1e-5 if scheme == "weight_only" else 1e-2
    assert (got - want).norm() <= bound * want.norm()
