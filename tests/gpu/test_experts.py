"""The Triton experts on CUDA: against the loop in fp32, row by row the same, captured in a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.ops.experts import experts_backends, experts_loop
from rorqual.ops.formats import Weight
from rorqual.ops.triton import experts as kernels

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

BOUND = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5}
# N, D, F, E, K; the largest two as a small model and as one layer of V3 with fewer experts.
SHAPES = [(1, 1024, 512, 64, 6), (8, 1024, 512, 64, 6), (64, 1024, 512, 64, 6), (1, 7168, 2048, 16, 8)]
RAGGED = [(3, 300, 70, 12, 4), (40, 300, 70, 6, 3), (130, 1408, 136, 5, 1)]


def plainly(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel on plain weights."""

    @functools.wraps(run)
    def call(x: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
        return run(x, Weight.plain(up.unflatten(1, (2, -1))), Weight.plain(down), *rest)

    return call


few_slots, many_slots, routed_experts = map(plainly, (kernels.few_slots, kernels.many_slots, kernels.routed_experts))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    n, d, width, e, k = shape
    x, up = torch.randn(n, d, device=CUDA), torch.randn(e, 2 * width, d, device=CUDA) / d**0.5
    down, gates = torch.randn(e, d, width, device=CUDA) / width**0.5, torch.rand(n, k, device=CUDA)
    chosen = torch.rand(n, max(k, e - 1), device=CUDA).topk(k).indices
    return x.to(dtype), up.to(dtype), down.to(dtype), gates, chosen


def exact(x: Tensor, up: Tensor, down: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    return experts_loop(x.double(), up.double(), down.double(), gates.double(), chosen)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("shape", SHAPES + RAGGED)
def test_triton_experts_equal_the_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = inputs(shape, dtype)
    want = exact(*values)
    ways = [experts_backends.get("triton"), *(lambda *v, run=run: run(*v, None) for run in (few_slots, many_slots))]
    for run in ways:
        got = run(*values)
        assert got.dtype == dtype and (got.double() - want).norm() <= BOUND[dtype] * want.norm()
    shared = torch.randn_like(values[0])
    got, want = routed_experts(*values, shared), want + shared.double()
    assert (got.double() - want).norm() <= BOUND[dtype] * want.norm()


@pytest.mark.parametrize("run", [few_slots, many_slots])
@pytest.mark.parametrize("shape", [(33, 1024, 512, 64, 6), (40, 300, 70, 6, 3)])
def test_a_row_alone_is_the_row_in_its_batch(run: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    x, up, down, gates, chosen = inputs(shape, torch.bfloat16)
    batch = run(x, up, down, gates, chosen, None)
    for n in range(len(x)):
        row = slice(n, n + 1)
        assert torch.equal(run(x[row], up, down, gates[row], chosen[row], None), batch[row])


@pytest.mark.parametrize("n", [1, 4, 64])
def test_a_captured_step_follows_its_inputs(n: int) -> None:
    shape = (n, 1024, 512, 64, 6)
    x, up, down, gates, chosen = inputs(shape, torch.bfloat16)
    run = experts_backends.get("triton")
    run(x, up, down, gates, chosen)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, up, down, gates, chosen)
    for _ in range(3):
        new_x, _, _, new_gates, new_chosen = inputs(shape, torch.bfloat16)
        for held, new in ((x, new_x), (gates, new_gates), (chosen, new_chosen)):
            held.copy_(new)
        graph.replay()
        assert torch.equal(out, run(x, up, down, gates, chosen))
        want = exact(x, up, down, gates, chosen)
        assert (out.double() - want).norm() <= BOUND[torch.bfloat16] * want.norm()
    chosen.fill_(63)  # everyone to one expert
    graph.replay()
    want = exact(x, up, down, gates, chosen)
    assert (out.double() - want).norm() <= BOUND[torch.bfloat16] * want.norm()
