"""Every (op, backend) against its reference on fresh random inputs, and what each op promises."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from rorqual.errors import BackendUnavailable
from rorqual.ops import attention, balance, experts
from rorqual.ops.attention import absorbed_is_cheaper
from rorqual.ops.rope import cos_sin, inverse_frequencies, rotate
from rorqual.ops.router import route
from tests.unit.ops.ties import untied


def gradients(function, *inputs):  # type: ignore[no-untyped-def]
    """Output and input gradients for a fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape))  # not randn_like: it would follow the memory layout
    return [out, *(x.grad for x in leaves if x.grad is not None)]


def close(ours: list[torch.Tensor], reference: list[torch.Tensor], bound: float) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        assert (a - b).abs().max() <= bound * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("backend", [n for n in experts.experts_backends.names() if n not in ("loop", "triton")])
@pytest.mark.parametrize("shape", [(1, 16, 8, 4, 2), (33, 24, 16, 8, 3), (64, 16, 8, 8, 8), (5, 8, 8, 16, 1)])
def test_experts_backends_equal_the_loop(backend: str, shape: tuple[int, ...]) -> None:
    n, d, width, e, k = shape
    x, up, down = torch.randn(n, d), torch.randn(e, 2 * width, d) / d**0.5, torch.randn(e, d, width) / width**0.5
    gates = torch.rand(n, k)
    chosen = torch.rand(n, e).topk(k).indices
    run = [
        gradients(lambda x, u, w, g, b=b: experts.experts_backends.get(b)(x, u, w, g, chosen), x, up, down, gates)
        for b in (backend, "loop")
    ]
    close(*run, experts.BOUND)


def test_the_loop_is_the_sum_it_claims_to_be() -> None:
    x, up, down = torch.randn(6, 8), torch.randn(4, 20, 8), torch.randn(4, 8, 10)
    gates, chosen = torch.rand(6, 2), torch.rand(6, 4).topk(2).indices
    out = experts.experts_loop(x, up, down, gates, chosen)
    for n in range(6):
        expected = torch.zeros(8)
        for k in range(2):
            gate, u = (up[chosen[n, k]] @ x[n]).split(10)
            expected += gates[n, k] * (down[chosen[n, k]] @ (gate * gate.sigmoid() * u))
        assert (out[n] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("backend", [n for n in attention.attend_backends.names() if n != "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "X", "U"), [(17, 12, 7), (1, 16, 16), (17, 32, 16), (250, 48, 64)])
def test_attention_backends_equal_the_reference(backend: str, masked: bool, T: int, X: int, U: int) -> None:
    if backend == "native" and X % 16:
        with pytest.raises(BackendUnavailable, match="multiple of 16"):
            attention.attend_native(
                torch.randn(2, 3, T, X), torch.randn(2, 3, T, X), torch.randn(2, 3, T, U), 1.0, None
            )
        return
    q, k, v = torch.randn(2, 3, T, X), torch.randn(2, 3, T, X), torch.randn(2, 3, T, U)
    documents = torch.randint(0, 3, (2, T)).sort().values
    visible = (documents[:, :, None] == documents[:, None]).tril() if masked else None
    run = [
        gradients(lambda q, k, v, b=b: attention.attend_backends.get(b)(q, k, v, 0.3, visible), q, k, v)
        for b in (backend, "reference")
    ]
    close(*run, attention.BOUND)


def test_the_crossover_counts_operations() -> None:
    """V3: absorbed pays up to 170 new tokens (facts: 262,144 / 1,536), and always for one."""
    assert absorbed_is_cheaper(170, 512, 64, 128, 128) and not absorbed_is_cheaper(171, 512, 64, 128, 128)
    assert absorbed_is_cheaper(1, 512, 64, 128, 128)


def test_unknown_backends_name_the_known_ones() -> None:
    with pytest.raises(BackendUnavailable, match="loop, native, grouped"):
        experts.experts_backends.get("magic")


def slow_route(scores, bias, k, groups, kept, normalise, scale):  # type: ignore[no-untyped-def]
    """Section 2.1.2 in plain Python."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: -best[g])[:kept]
    candidates = [i for i in range(len(scores)) if i // size in allowed]
    chosen = sorted(candidates, key=lambda i: -biased[i])[:k]
    total = sum(scores[i] for i in chosen) if normalise else 1.0
    return {i: scores[i] / total * scale for i in chosen}


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_attention_in_chunks_is_attention(chunk: int) -> None:
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 37, 8), torch.randn(2, 3, 37, 5)
    visible = torch.rand(2, 9, 37) < 0.4
    visible[0, 0] = False  # sees nothing at all
    visible[1, 1, :20] = False  # sees nothing of the first chunks
    made: list[int] = []

    def expand(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(end - start)
        return k[:, :, start:end], v[:, :, start:end]

    out = attention.attend_in_chunks(q, expand, chunk, 0.3, visible)
    assert sum(made) == 37 and max(made) <= chunk
    assert torch.allclose(out, attention.attend_reference(q, k, v, 0.3, visible), atol=attention.BOUND)


@pytest.mark.parametrize("groups,kept,normalise", [(1, 1, True), (4, 2, True), (4, 3, False), (2, 1, True)])
def test_routing_equals_the_definition(groups: int, kept: int, normalise: bool) -> None:
    bias = torch.randn(16) - 1.5  # mostly negative: a zero mask would win
    logits = untied(torch.randn(40, 16) * 2, bias, groups)
    gates, chosen, scores = route(logits, bias, 3, groups, kept, normalise, 2.5)
    for n in range(len(logits)):
        expected = slow_route(scores[n].tolist(), bias.tolist(), 3, groups, kept, normalise, 2.5)
        ours = dict(zip(chosen[n].tolist(), gates[n].tolist(), strict=True))
        assert ours.keys() == expected.keys()
        assert all(math.isclose(ours[i], expected[i], rel_tol=1e-4) for i in ours)


def test_the_bias_steers_the_choice_and_never_the_gate() -> None:
    logits = torch.randn(9, 8)
    plain, _, scores = route(logits, torch.zeros(8), 2, normalise=False)
    steered, chosen, _ = route(logits, torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0]), 2, normalise=False)
    assert chosen.sort(-1).values.tolist() == [[0, 1]] * 9
    assert torch.allclose(steered, scores.gather(1, chosen))
    assert not torch.allclose(plain, steered)


def test_bias_update_moves_by_gamma_towards_balance() -> None:
    bias, load = torch.zeros(4), torch.tensor([10, 0, 5, 5])
    balance.update_bias_(bias, load, 0.01)
    assert torch.allclose(bias, torch.tensor([-0.01, 0.01, 0.0, 0.0]))
    assert balance.max_violation(load).item() == pytest.approx(1.0)
    chosen = torch.randint(0, 7, (50, 3))
    assert balance.load(chosen, 7).tolist() == [Counter(chosen.flatten().tolist())[i] for i in range(7)]


def test_sequence_balance_loss_is_equations_17_to_20() -> None:
    scores = torch.rand(3 * 11, 6)
    ours = balance.sequence_balance_loss(scores, 11, 2)
    expected = 0.0
    for b in range(3):
        part = scores[b * 11 : (b + 1) * 11]
        for i in range(6):
            f = 6 / (2 * 11) * sum(i in row.topk(2).indices.tolist() for row in part)
            expected += f * (part[:, i] / part.sum(-1)).mean().item() / 3
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_rotation_turns_neighbouring_pairs_by_position() -> None:
    speeds, factor = inverse_frequencies(6, 10000.0, None)
    assert factor == 1.0 and speeds == pytest.approx([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)])
    x = torch.randn(5, 6)
    out = rotate(x, *cos_sin(torch.arange(5), torch.tensor(speeds), factor))
    for t in range(5):
        for i, w in enumerate(speeds):
            z = complex(x[t, 2 * i], x[t, 2 * i + 1]) * complex(math.cos(t * w), math.sin(t * w))
            assert out[t, 2 * i].item() == pytest.approx(z.real, abs=1e-5)
            assert out[t, 2 * i + 1].item() == pytest.approx(z.imag, abs=1e-5)
