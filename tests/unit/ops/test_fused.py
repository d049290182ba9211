"""The small fused kernels against their plain references, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from rorqual.ops import rms_norm as plain_norm
from rorqual.ops import rope, router
from tests.unit.ops.ties import untied

fused = pytest.importorskip("rorqual.ops.triton.fused", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (2, 2, 100), (5, 1024)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[-1], device=DEVICE)
    want = plain_norm.reference(x, weight, 1e-6)
    assert torch.allclose(
        fused.rms_norm(x, weight, 1e-6), want, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6
    )
    strided = torch.randn(4, 2 * shape[-1], device=DEVICE).to(dtype)[:, : shape[-1]]
    want = plain_norm.reference(strided, weight, 1e-6)
    assert torch.allclose(fused.rms_norm(strided, weight, 1e-6), want, rtol=2e-3, atol=1e-6)


def test_queries_are_rotated_in_place() -> None:
    q = torch.randn(4, 3, 12 + 8, device=DEVICE)
    cos, sin = rope.cos_sin(torch.tensor([0, 5, 100, 9], device=DEVICE), torch.rand(4, device=DEVICE), 1.2)
    want = torch.cat((q[..., :12], rope.rotate(q[..., 12:], cos[:, None], sin[:, None])), -1)
    wide = torch.cat((q.flatten(1), torch.full((4, 5), 9.0, device=DEVICE)), 1)
    assert fused.rotate_queries_(wide[:, :60], cos, sin, 3).data_ptr() == wide.data_ptr()
    assert torch.allclose(wide[:, :60], want.flatten(1), atol=1e-6) and (wide[:, 60:] == 9).all()


@pytest.mark.parametrize("heads", [3, 20])
def test_keys_are_expanded(heads: int) -> None:
    kv, shared = torch.randn(5, heads, 24 + 10, device=DEVICE), torch.randn(5, 30, device=DEVICE)[:, 20:]
    want = torch.cat((kv[..., :24], shared[:, None].expand(-1, heads, -1)), -1)
    assert torch.equal(fused.expanded_keys(kv, shared, 24), want)


def test_latents_are_normed_rotated_and_put_in_their_slots() -> None:
    kv, weight = torch.randn(5, 48 + 12, device=DEVICE), torch.randn(48, device=DEVICE)
    cos, sin = rope.cos_sin(torch.arange(5, device=DEVICE) * 7, torch.rand(6, device=DEVICE), 1.0)
    pages = torch.full((3, 8, 60), 9.0, device=DEVICE)
    slots = torch.tensor([17, 3, 0, 23, 8], device=DEVICE)
    fused.write_latents(kv, weight, 1e-6, cos, sin, pages, slots)
    want = torch.cat((plain_norm.reference(kv[:, :48], weight, 1e-6), rope.rotate(kv[:, 48:], cos, sin)), -1)
    flat = pages.view(-1, 60)
    assert torch.allclose(flat[slots], want, atol=1e-6)
    untouched = torch.ones(24, dtype=torch.bool)
    untouched[slots.cpu()] = False
    assert (flat[untouched.to(DEVICE)] == 9.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_swiglu(dtype: torch.dtype) -> None:
    halves = torch.randn(2, 3, 1400, device=DEVICE).to(dtype).chunk(2, -1)
    whole = torch.randn(2, 4, 1100, device=DEVICE).to(dtype).unbind()
    for gate, up in (halves, whole):
        want = torch.nn.functional.silu(gate) * up
        assert torch.allclose(fused.swiglu(gate, up), want, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "experts,k,groups,kept,normalise", [(12, 4, 1, 1, True), (32, 3, 4, 2, True), (24, 6, 3, 1, False)]
)
def test_routing(experts: int, k: int, groups: int, kept: int, normalise: bool) -> None:
    bias = torch.randn(experts, device=DEVICE) - 1.5
    logits = untied(torch.randn(40, experts, device=DEVICE) * 2, bias, groups)
    want = router.reference(logits, bias, k, groups, kept, normalise, 2.5)
    gates, chosen, scores = fused.route(logits, bias, k, groups, kept, normalise, 2.5)
    assert torch.allclose(scores, want[2], atol=1e-6)
    order, wanted = chosen.sort(-1), want[1].sort(-1)
    assert torch.equal(order.values, wanted.values)
    assert torch.allclose(gates.gather(1, order.indices), want[0].gather(1, wanted.indices), rtol=1e-5)


def test_routing_of_what_is_not_a_number_stays_inside() -> None:
    logits = torch.full((2, 16), float("nan"), device=DEVICE)
    _, chosen, _ = fused.route(logits, torch.zeros(16, device=DEVICE), 4, 1, 1, True, 1.0)
    assert ((chosen >= 0) & (chosen < 16)).all()
