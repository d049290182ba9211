"""The kernels of a training step on a GPU, at the sizes it has there; the interpreter has compared them with their
references on small ones (tests/unit/ops/test_training_kernels.py, which runs on a GPU too)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.ops import cross_entropy as loss_room
from rorqual.ops import experts, training
from rorqual.ops.adamw import adamw_backends
from rorqual.ops.cross_entropy import cross_entropy
from rorqual.ops.divergence import BOUND as DIVERGENCE_BOUND
from rorqual.post.distill_loss import Target, divergence
from rorqual.train.config import DataConfig, OptimConfig, RunConfig, Source
from rorqual.train.pretrain import build_model
from rorqual.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", [(1, 64, 32, 8, 2), (700, 256, 80, 12, 4), (4096, 1024, 512, 64, 6)])
@pytest.mark.parametrize("run", [training.experts, experts.experts_dense])
def test_experts_equal_the_loop_in_fp64(run: experts.Experts, shape: tuple[int, ...]) -> None:
    n, d, width, e, k = shape
    x, up = torch.randn(n, d, device=CUDA), torch.randn(e, 2 * width, d, device=CUDA) / d**0.5
    down, gates = torch.randn(e, d, width, device=CUDA) / width**0.5, torch.rand(n, k, device=CUDA)
    chosen = torch.rand(n, e, device=CUDA).topk(k).indices
    leaves = [t.bfloat16().requires_grad_() for t in (x, up, down)] + [gates.clone().requires_grad_()]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    out, exact = run(*leaves, chosen), experts.experts_loop(*doubles, chosen)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    exact.backward(cotangent.double())
    assert relative(out, exact) <= 1e-2
    for ours, wanted in zip(leaves, doubles, strict=True):
        assert ours.grad is not None and wanted.grad is not None and relative(ours.grad, wanted.grad) <= 2e-2


def test_the_gates_product_keeps_fp32() -> None:
    x, w = torch.randn(4096, 1024, device=CUDA).bfloat16(), torch.randn(64, 1024, device=CUDA) / 32
    assert relative(training.gate_logits(x, w), x.double() @ w.double().T) <= 1e-6


@pytest.mark.parametrize(("n", "d", "v"), [(5000, 256, 32768), (300, 128, 129280)])
def test_the_loss_and_its_gradients(n: int, d: int, v: int) -> None:
    h, head = torch.randn(n, d, device=CUDA).bfloat16(), torch.randn(v, d, device=CUDA) / d**0.5
    targets, weights = torch.randint(0, v, (n,), device=CUDA), torch.rand(n, device=CUDA) / n
    seen = []
    for backend, wide in (("triton", False), ("reference", True)):
        leaves = [(t.float() if wide else t).clone().requires_grad_() for t in (h, head)]
        value = cross_entropy(*leaves, targets, weights, backend)
        value.backward()
        seen.append([value.detach(), *(t.grad for t in leaves)])
    for ours, exact in zip(*seen, strict=True):
        assert relative(ours, exact) <= loss_room.BOUND[torch.bfloat16]


@pytest.mark.parametrize(("n", "v", "w", "chunk"), [(5000, 49152, 49152, 2048), (300, 32001, 32000, 128)])
def test_the_divergence_and_its_gradients(n: int, v: int, w: int, chunk: int) -> None:
    """bf16 by the kernel, which a GPU chooses by itself, and fp32 as defined; a vocabulary whose rows are not aligned."""
    h, head = torch.randn(n, 256, device=CUDA).bfloat16(), torch.randn(v, 256, device=CUDA) / 16
    taught = torch.randn(n, 192, device=CUDA).bfloat16(), (torch.randn(w, 192, device=CUDA) / 12).bfloat16()
    words = torch.randint(0, v, (n,), device=CUDA).where(torch.rand(n, device=CUDA) < 0.2, -1)
    weights = torch.rand(n, device=CUDA) * (torch.rand(n, device=CUDA) < 0.8) / n
    seen = []
    for backend, dtype in (("auto", torch.bfloat16), ("reference", torch.float32)):
        leaves = [h.detach().to(dtype).requires_grad_(), head.clone().requires_grad_()]
        target = Target(taught[0].to(dtype), lambda t: t @ taught[1].to(t.dtype).T, words)
        value = divergence(*leaves, weights, target, chunk, backend)
        value.backward()
        seen.append([value.detach(), *(t.grad for t in leaves)])
    for ours, exact in zip(*seen, strict=True):
        assert relative(ours, exact) <= DIVERGENCE_BOUND[torch.bfloat16]


def test_the_divergence_never_waits_for_the_gpu() -> None:
    h, head = (torch.randn(shape, device=CUDA, requires_grad=True) for shape in ((300, 64), (1000, 64)))
    words = torch.arange(300, device=CUDA).where(torch.rand(300, device=CUDA) < 0.5, -1)
    weights, target = torch.rand(300, device=CUDA), Target(torch.randn(300, 900, device=CUDA), lambda t: t, words)
    torch.cuda.set_sync_debug_mode("error")
    try:
        divergence(h, head, weights, target, 128).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_equals_the_reference() -> None:
    seen = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        weight, grad = torch.randn(3_000_001, device=CUDA), torch.randn(3_000_001, device=CUDA).bfloat16()
        state, copy = torch.zeros(2, 3_000_001, device=CUDA).bfloat16(), torch.empty_like(grad)
        factor = torch.tensor(0.3, device=CUDA)
        for step in (1, 2, 3):
            adamw_backends.get(backend)(weight, grad, *state, step, 1e-2, (0.9, 0.95), 1e-8, 0.1, factor, copy)
        seen.append((weight, copy))
    (a, a16), (b, b16) = seen
    assert (a - b).abs().max() <= 1e-4 and torch.equal(b16, b.bfloat16()) and torch.equal(a16, a.bfloat16())


@pytest.mark.parametrize(("precision", "micro"), [("bf16", 8), ("bf16", 4), ("fp8", 8)])
def test_a_captured_step_is_the_plain_one(precision: str, micro: int) -> None:
    """Over changing rows and factors, with an MTP module. Not to the bit: the GPU's attention adds the gradient of
    its queries in any order."""
    cfg = ModelConfig.load("test").replace(moe_intermediate_size=128)
    shape = (8, 128 + 1 + cfg.num_nextn_predict_layers)
    data = DataConfig(train=(Source("none"),), seq_len=128, packing="stream", mask_documents=False)

    def fetch(start: int, count: int) -> Rows:
        tokens = np.random.default_rng(start).integers(0, cfg.vocab_size, shape)
        return Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))

    runs = []
    for graph in (False, True):
        run = RunConfig(
            out="", data=data, steps=12, batch=8, micro_batch=micro, model="x", device="cuda", dtype="bfloat16",
            precision=precision, compile=False, graph=graph, optim=OptimConfig(moments="bfloat16", warmup_steps=2),
        )  # fmt: skip
        t = Trainer(run, build_model(run, cfg, CUDA))
        values = torch.stack([t.step(s, fetch).values for s in range(12)])
        assert (t.graph is not None) is graph
        runs.append((values, [p.detach().clone() for p in t.model.parameters()]))
    (plain, weights), (captured, same) = runs
    assert torch.equal(plain[0, :4], captured[0, :4]) and torch.allclose(plain[:, :5], captured[:, :5], rtol=1e-3)
    assert all(relative(a, b) < 1e-3 for a, b in zip(weights, same, strict=True))


@pytest.mark.parametrize(
    ("moments", "micro", "recompute"),
    [("float32", 8, "none"), ("bfloat16", 4, "none"), ("bfloat16", 8, "selective"), ("bfloat16", 8, "block")],
)
def test_a_step_of_kernels_follows_plain_fp32(moments: str, micro: int, recompute: str) -> None:
    cfg = ModelConfig.load("test")
    shape = (8, 128 + 1 + cfg.num_nextn_predict_layers)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape)
    fixed = Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))
    data = DataConfig(train=(Source("none"),), seq_len=128, packing="stream", mask_documents=False)
    runs = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        run = RunConfig(
            out="", data=data, steps=1000, batch=8, micro_batch=micro, model="x", device=device, dtype=dtype,
            compile=False, recompute=recompute, optim=OptimConfig(moments=moments),
        )  # fmt: skip
        t = Trainer(run, build_model(run, cfg, torch.device(device)))
        runs.append([t.step(s, lambda start, count: fixed).values[1].item() for s in range(12)])
    exact, fast = runs
    assert exact[-1] < exact[0]
    assert max(abs(a - b) / a for a, b in zip(exact, fast, strict=True)) < 0.01
