"""The chunked loss against the plain one and against sums in fp64; what it may hold at once."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.ops import cross_entropy as room
from rorqual.ops.cross_entropy import BOUND, cross_entropy, cross_entropy_backends


def run(backend: str, h: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor):  # type: ignore[no-untyped-def]
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    a, b = (t.detach().to(device, copy=True).requires_grad_() for t in (h, head))
    loss = cross_entropy(a, b, targets.to(device), weights.to(device), backend)
    (loss * 0.37).backward()
    assert a.grad is not None and b.grad is not None
    return loss.detach().cpu(), a.grad.cpu(), b.grad.cpu()


@pytest.mark.parametrize("backend", [n for n in cross_entropy_backends.names() if n != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "d", "v", "rows"), [(1, 8, 5, 100), (37, 16, 301, 10), (40, 16, 64, 40), (40, 16, 64, 1)]
)
def test_chunks_add_up(backend: str, dtype: torch.dtype, n: int, d: int, v: int, rows: int, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(room, "CHUNK_BYTES", rows * 4 * v)
    monkeypatch.setattr(room, "FUSED_ROWS", rows)
    torch.manual_seed(n + v)
    h, head = torch.randn(n, d, dtype=dtype), torch.randn(v, d)
    targets, weights = torch.randint(0, v, (n,)), torch.randint(0, 2, (n,)).float() * 0.25
    weights[0] = 0.5
    ours, plain = (run(b, h, head, targets, weights) for b in (backend, "reference"))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= BOUND[dtype] * b.double().norm()
    if dtype == torch.float32:
        logits = h.double() @ head.double().T
        exact = -(logits.log_softmax(-1)[torch.arange(n), targets] * weights).sum()
        assert ours[0].item() == pytest.approx(exact.item(), rel=1e-5)


def test_huge_logits_do_not_overflow() -> None:
    h, head = torch.full((2, 4), 300.0), torch.eye(4) * 300
    loss, dh, dhead = run("chunked", h, head, torch.tensor([0, 3]), torch.ones(2))
    # Numbers at 90,000 are 1/128 apart in fp32.
    assert loss.item() == pytest.approx(2 * torch.tensor(4.0).log().item(), abs=2 / 128)
    assert dh.isfinite().all() and dhead.isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_all_logits_never_exist(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """No operation, forward or backward, returns more numbers than a chunk of logits or the head."""
    n, d, v, rows = 512, 4, 1000, 16
    monkeypatch.setattr(room, "CHUNK_BYTES", rows * 4 * v)
    monkeypatch.setattr(room, "FUSED_ROWS", rows)
    inputs = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,)), torch.ones(n)
    seen = {}
    chunks = ["chunked", *(["triton"] if torch.cuda.is_available() else [])]  # the interpreter copies everything
    for backend in (*chunks, "reference"):
        with Largest() as largest:
            run(backend, *inputs)
        seen[backend] = largest.elements
    assert all(seen[name] <= rows * v for name in chunks) and seen["reference"] >= n * v
