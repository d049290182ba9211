"""The kernels of a training step, forward and gradients, against their references, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from rorqual.ops import balance, rms_norm, rope, router
from rorqual.ops.experts import experts_loop

pytest.importorskip("rorqual.ops.triton.training", reason="triton is not installed")
from rorqual.ops import training
from rorqual.ops.triton import routing
from rorqual.ops.triton import training as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def compare(
    ours: Callable[..., object], theirs: Callable[..., object], inputs: list[torch.Tensor], bound: float = 2e-6
) -> None:
    """Outputs and gradients under random cotangents, by Frobenius norms."""
    results = []
    for run in (ours, theirs):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = run(*leaves)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point()]  # type: ignore[union-attr]
        sum((o.float() * draw(*o.shape, seed=i)).sum() for i, o in enumerate(outs, 5)).backward()  # type: ignore[union-attr]
        results.append([o.detach() for o in outs] + [leaf.grad for leaf in leaves if leaf.requires_grad])
    for mine, exact in zip(*results, strict=True):
        assert mine.shape == exact.shape and mine.dtype == exact.dtype
        assert (mine.float() - exact.float()).norm() <= bound * exact.float().norm() + 1e-12


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 100), (50, 16)])
def test_norms(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 16)  # 50 rows: strips of four, the last one short
    x, y, w = draw(*shape), draw(*shape, seed=1), draw(shape[-1])
    compare(lambda x, w: training.rms_norm(x, w, 1e-6), lambda x, w: rms_norm.reference(x, w, 1e-6), [x, w])

    def plain(x, y, w):  # type: ignore[no-untyped-def]
        return x + y, rms_norm.reference(x + y, w, 1e-6)

    compare(lambda x, y, w: training.add_norm(x, y, w, 1e-6), plain, [x, y, w])
    compare(lambda x, y, w: training.add_norm(x, y, w, 1e-6)[1], lambda *a: plain(*a)[1], [x, y, w])
    compare(lambda x, w: training.norm_beside(x, w, 1e-6), lambda x, w: (x * 1, rms_norm.reference(x, w, 1e-6)), [x, w])


def test_products_of_one_input() -> None:
    inputs = [draw(2, 7, 12), draw(5, 12), draw(6, 12), draw(3, 12)]
    compare(training.products, lambda x, *ws: tuple(F.linear(x, w) for w in ws), inputs)


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 1100)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    compare(training.swiglu, lambda g, u: F.silu(g) * u, [draw(*shape), draw(*shape, seed=1)])
    compare(
        lambda x: training.swiglu(*x.chunk(2, -1)),
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        [draw(*shape)],
    )


@pytest.mark.parametrize("heads", [2, 20])
def test_attentions_inputs(heads: int) -> None:
    """Queries turned, the latent normed and its key turned, keys and values laid out: against `model.mla`'s operations."""
    B, T, N, R, U, C = 2, 5, 12, 8, 10, 24
    cos, sin = rope.cos_sin(torch.arange(T, device=DEVICE), torch.rand(R // 2, device=DEVICE), 1.2)

    def queries(q):  # type: ignore[no-untyped-def]
        nope, turned = q.unflatten(-1, (heads, -1)).split((N, R), -1)
        return torch.cat((nope, rope.rotate(turned, cos[:, None], sin[:, None])), -1).flatten(2) * 1

    compare(lambda q: training.rotate_queries_(q * 1, cos, sin, heads) * 1, queries, [draw(B, T, heads * (N + R))])

    def latent(kv, w):  # type: ignore[no-untyped-def]
        c, k = kv.view(B, T, -1).split((C, R), -1)
        return rms_norm.reference(c, w, 1e-6).flatten(0, 1), rope.rotate(k, cos, sin).flatten(0, 1)

    compare(lambda kv, w: training.latent(kv, w, 1e-6, cos, sin), latent, [draw(B * T, C + R), draw(C)])

    def keys(kv, k):  # type: ignore[no-untyped-def]
        return torch.cat((kv[..., :N], k[:, None].expand(-1, heads, -1)), -1), kv[..., N:]

    compare(lambda kv, k: training.keys_values(kv, k, N), keys, [draw(B * T, heads, N + U), draw(B * T, R)])


@pytest.mark.parametrize(("groups", "kept", "normalise"), [(1, 1, True), (4, 2, True), (1, 1, False)])
def test_routing(groups: int, kept: int, normalise: bool) -> None:
    """Gates laid out by expert: which of a token's slots holds which expert is free."""
    N, E, K = 40, 16, 3
    bias = draw(E) * 0.1

    def by_expert(run):  # type: ignore[no-untyped-def]
        def laid_out(logits):  # type: ignore[no-untyped-def]
            gates, chosen, scores = run(logits, bias, K, groups, kept, normalise, 2.5)
            return torch.zeros(N, E, device=DEVICE).scatter(1, chosen, gates), scores

        return laid_out

    compare(by_expert(training.route), by_expert(router.reference), [draw(N, E)])


def test_the_gates_product_is_an_fp32_one() -> None:
    x, w = draw(50, 256).bfloat16(), draw(16, 256)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    out = training.gate_logits(*leaves)
    dout = draw(50, 16, seed=3)
    out.backward(dout)
    exact = x.double() @ w.double().T
    assert (out.double() - exact).norm() <= 1e-6 * exact.norm()
    assert (leaves[1].grad.double() - dout.double().T @ x.double()).norm() <= 2e-5 * leaves[1].grad.double().norm()
    dx = dout.double() @ w.double()
    assert (leaves[0].grad.double() - dx).norm() <= 2.0**-8 * dx.norm()


@pytest.mark.parametrize(("T", "E", "K"), [(7, 8, 2), (70, 20, 3)])
def test_balance(T: int, E: int, K: int) -> None:
    scores = draw(3 * T, E).sigmoid()
    scores[4] = 0
    ours, theirs = training.sequence_balance_loss, balance.sequence_balance_loss
    # Where all affinities are equal, which of them are the top ones is free: that token is in its own test.
    rest = [i for i in range(3 * T) if not 0 <= i < T]
    compare(lambda s: ours(s, T, K), lambda s: theirs(s, T, K), [scores[rest]], 1e-5)
    (grad,) = torch.autograd.grad(ours(scores.requires_grad_(), T, K), scores)
    assert grad.isfinite().all() and (grad[4] == 0).all()


@pytest.mark.parametrize(("n", "k", "experts"), [(1, 1, 2), (700, 3, 12), (300, 6, 100)])
def test_sorting_is_stable(n: int, k: int, experts: int) -> None:
    chosen = torch.randint(0, experts - 1, (n, k), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    place, slot, ends = routing.sort_by_expert(chosen, experts)
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(slot.long(), order) and torch.equal(place.long()[order], torch.arange(n * k, device=DEVICE))
    assert torch.equal(ends.long(), torch.bincount(chosen.flatten(), minlength=experts).cumsum(0))


def test_experts_equal_the_loop_with_gradients() -> None:
    N, D, width, E, K = 90, 64, 32, 6, 2
    x, up, down = draw(N, D), draw(E, 2 * width, D) / 8, draw(E, D, width) / 6
    gates = torch.rand(N, K, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    chosen = draw(N, E - 1).topk(K).indices  # the last expert gets nothing
    add, more = draw(N, D, seed=7), draw(N, D, seed=8)
    compare(
        lambda x, up, down, gates, add, more: training.experts(x, up, down, gates, chosen, add, more),
        lambda x, up, down, gates, add, more: experts_loop(x, up, down, gates, chosen) + add + more,
        [x, up, down, gates, add, more],
        1e-5,
    )
    compare(
        lambda x, gates: training.experts(x, up, down, gates, chosen),
        lambda x, gates: experts_loop(x, up, down, gates, chosen),
        [x, gates],
        1e-5,
    )
