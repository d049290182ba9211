"""What only a GPU can show: `pytest tests/gpu` on a machine with CUDA. Not part of `make test`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.checkpoint import save_model
from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.ops import attention, experts, fp8
from rorqual.ops.formats import experts_by_linear
from rorqual.ops.triton.fp8 import expand, quantize_rows, tile_experts
from rorqual.train.config import DataConfig, RunConfig, Source
from rorqual.train.pretrain import build_model
from rorqual.train.trainer import Trainer
from tests.parity import build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 2e-2), (torch.float32, 1e-3)])
@pytest.mark.parametrize("shape", [(1, 64, 32, 8, 2), (700, 256, 80, 12, 4), (64, 128, 96, 64, 6)])
def test_grouped_experts_equal_the_loop_in_fp64(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    n, d, width, e, k = shape
    x, up = torch.randn(n, d, device=CUDA), torch.randn(e, 2 * width, d, device=CUDA) / d**0.5
    down, gates = torch.randn(e, d, width, device=CUDA) / width**0.5, torch.rand(n, k, device=CUDA)
    chosen = torch.rand(n, e, device=CUDA).topk(k).indices
    reference = experts.experts_loop(x.double(), up.double(), down.double(), gates.double(), chosen)
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, up, down)]
    out = experts.experts_grouped(*leaves, gates, chosen)
    assert (out.double() - reference).norm() <= bound * reference.norm()
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    doubles = [t.detach().double().requires_grad_() for t in (x, up, down)]
    experts.experts_loop(*doubles, gates.double(), chosen).backward(cotangent.double())
    for ours, exact in zip(leaves, doubles, strict=True):
        assert (ours.grad.double() - exact.grad).norm() <= 2 * bound * exact.grad.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_the_reference(masked: bool) -> None:
    q, k, v = (torch.randn(2, 4, 129, w, device=CUDA) for w in (192, 192, 128))
    documents = torch.randint(0, 3, (2, 129), device=CUDA).sort().values
    visible = (documents[:, :, None] == documents[:, None]).tril() if masked else None
    exact = attention.attend_reference(q, k, v, 0.07, visible)
    low = attention.attend_sdpa(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.07, visible)
    assert (low.float() - exact).norm() <= 1e-2 * exact.norm()


def trainer(cfg: ModelConfig, compile: bool, dtype: str) -> Trainer:
    data = DataConfig(train=(Source("none"),), seq_len=128, packing="stream", mask_documents=False)
    run = RunConfig(
        out="", data=data, steps=1000, batch=8, micro_batch=4, model="x", device="cuda", dtype=dtype, compile=compile
    )
    return Trainer(run, build_model(run, cfg, CUDA))


def rows(cfg: ModelConfig) -> Rows:
    shape = (8, 128 + 1 + cfg.num_nextn_predict_layers)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape)
    return Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))


def test_compiled_bf16_training_follows_eager_fp32() -> None:
    cfg = ModelConfig.load("test")
    fixed = rows(cfg)
    runs = []
    for compile, dtype in ((False, "float32"), (True, "bfloat16")):
        t = trainer(cfg, compile, dtype)
        runs.append([t.step(s, lambda start, count: fixed).values[1].item() for s in range(12)])
    exact, fast = runs
    assert exact[-1] < exact[0]
    assert max(abs(a - b) / a for a, b in zip(exact, fast, strict=True)) < 0.01


def test_the_engine_on_a_gpu_says_what_it_says_on_a_cpu(tmp_path: Path) -> None:
    from rorqual.engine.api import Request, SamplingParams
    from rorqual.engine.load import load_core
    from rorqual.engine.settings import EngineSettings

    save_model(build(ModelConfig.load("test"), 0), tmp_path / "model")
    prompts = torch.randint(0, 256, (5, 90)).tolist()
    said = []
    for device in ("cpu", "cuda"):
        core = load_core(EngineSettings(str(tmp_path / "model"), dtype="float32", device=device))
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            core.add(Request(str(i), tuple(prompt), params))
        tokens: dict[str, list[int]] = {}
        while core.busy:
            for out in core.step():
                tokens.setdefault(out.request_id, []).extend(out.token_ids)
        said.append(tokens)
    assert said[0] == said[1]


@pytest.mark.parametrize("scheme", ["weight_only", "dynamic"])
@pytest.mark.parametrize(
    "shape", [(1, 576, 7168), (5, 192, 320), (33, 1536, 7168), (300, 7168, 2048), (1000, 130, 300)]
)
def test_fp8_backends_equal_their_reference(shape: tuple[int, int, int], scheme: fp8.Scheme) -> None:
    rows, out, width = shape
    codes, scale = fp8.quantize_blocks(torch.randn(out, width, device=CUDA))
    table = fp8.weight_only_backends if scheme == "weight_only" else fp8.dynamic_backends
    for dtype, bound in fp8.BOUND[scheme].items():
        x = torch.randn(rows, width, device=CUDA, dtype=dtype)
        want = fp8.fp8_linear(x.float(), codes, scale, scheme, "reference")
        for backend in table.names():
            got = fp8.fp8_linear(x, codes, scale, scheme, backend)
            # scaled_mm answers in bf16 whatever it is asked.
            allowed = fp8.BOUND[scheme][torch.bfloat16] if backend == "scaled_mm" else bound
            assert got.dtype == dtype and (got.float() - want).norm() <= allowed * want.norm(), (backend, dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (32, 8), (700, 4)])
def test_grouped_fp8_experts_equal_the_loop(n: int, k: int, dynamic: bool) -> None:
    E, D, width = 40, 1024, 320
    form = fp8.Fp8Blocks("dynamic" if dynamic else "weight_only", backend="reference")
    gate_up = form.pack(torch.randn(E, 2, width, D, device=CUDA) / D**0.5)
    down = form.pack(torch.randn(E, D, width, device=CUDA) / width**0.5)
    x, gates = torch.randn(n, D, device=CUDA).bfloat16(), torch.rand(n, k, device=CUDA)
    chosen = torch.rand(n, E, device=CUDA).topk(k).indices
    want = experts_by_linear(x.float(), gates, chosen, (form, gate_up), (form, down))
    form = fp8.Fp8Blocks("dynamic" if dynamic else "weight_only")
    got = tile_experts(x, form.weight(gate_up), form.weight(down), gates, chosen)
    # In between, h is rounded to bf16, which moves some of its FP8 codes by one.
    assert (got.float() - want).norm() <= (2.5e-2 if dynamic else 8e-3) * want.norm()


def test_triton_quantises_rows_to_the_same_bits() -> None:
    x = torch.randn(300, 1000, device=CUDA) * torch.rand(300, 1, device=CUDA) ** 6
    for got, want in zip(quantize_rows(x), fp8.quantize_tiles(x), strict=True):
        assert torch.equal(got.float(), want.float())


def test_weights_quantise_and_expand_as_on_a_cpu() -> None:
    weight = torch.randn(700, 1000)
    for got, want in zip(fp8.quantize_blocks(weight.to(CUDA)), fp8.quantize_blocks(weight), strict=True):
        assert torch.equal(got.cpu().float(), want.float())
    codes, scale = fp8.quantize_blocks(weight.to(CUDA))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(expand(codes, scale, dtype), fp8.dequantize_blocks(codes, scale, dtype))
