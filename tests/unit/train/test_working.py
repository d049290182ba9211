"""16-bit copies of the weights, and the step whose small operations are kernels: neither changes what is computed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.config import ModelConfig
from rorqual.data.packing import Rows
from rorqual.model.transformer import Transformer
from rorqual.train.config import DataConfig, OptimConfig, RunConfig, Source
from rorqual.train.loss import Targets, losses
from rorqual.train.optimizer import Optimizer
from rorqual.train.pretrain import build_model
from rorqual.train.trainer import Trainer
from rorqual.train.working import WorkingCopies
from tests.parity import build

CFG = ModelConfig.load("test")


def rows(batch: int, T: int = 24) -> Rows:
    shape = (batch, T + 1 + CFG.num_nextn_predict_layers)
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, shape)
    return Rows(tokens, np.ones(shape, np.int32), np.ones(shape, np.uint8))


def trainer(**options: object) -> Trainer:
    data = DataConfig(train=(Source("none"),), seq_len=24, packing="stream", mask_documents=False)
    told = {"batch": 4, "micro_batch": 4, "dtype": "bfloat16", "steps": 100, "compile": False, **options}
    run = RunConfig(out="", data=data, model="test", device="cpu", precision="bf16", **told)  # type: ignore[arg-type]
    return Trainer(run, build_model(run, CFG, torch.device("cpu")))


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 2}, {"optim": OptimConfig(moments="bfloat16")}, {"optim": OptimConfig(name="muon")}],
)
def test_copies_change_nothing(options: dict[str, object]) -> None:
    """Six steps with and without: what is multiplied is the same, so the losses are, to the bit; but for the last one of the
    gradient's norm, where the optimiser reads 16-bit gradients themselves."""
    seen, fixed = [], rows(4)
    for with_copies in (True, False):
        t = trainer(**options)
        assert t.copies is not None
        if not with_copies:
            t.copies = None
            t.optimizer = Optimizer(t.cfg.optim, t.model)
        values = [t.step(s, lambda start, count: fixed).values for s in range(6)]
        seen.append((torch.stack(values), [p.detach().clone() for p in t.model.parameters()]))
        assert all(p.dtype == torch.float32 and p.grad is None for p in t.model.parameters())
    (mine, weights), (plain, exact) = seen
    if t.cfg.optim.moments == "bfloat16":
        assert torch.allclose(mine, plain, rtol=1e-3) and torch.equal(mine[0, :4], plain[0, :4])
    else:
        assert torch.equal(mine, plain) and all(torch.equal(a, b) for a, b in zip(weights, exact, strict=True))


def test_copies_follow_whoever_writes_the_weights() -> None:
    model = build(CFG, 0)
    copies = WorkingCopies(model, torch.bfloat16)
    before = model.layers[0].self_attn.o_proj.weight
    for write in (lambda p: p.mul_(2), lambda p: p.copy_(torch.randn_like(p))):
        with torch.no_grad():
            for p in model.parameters():
                write(p)
        with copies.in_place():
            inside = model.layers[0].self_attn.o_proj.weight
            assert inside.dtype == torch.bfloat16 and torch.equal(inside, before.bfloat16())
        assert model.layers[0].self_attn.o_proj.weight is before


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_a_step_of_kernels_is_the_plain_step(q_lora_rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and every gradient of a whole network, kernels in the interpreter, against the definitions."""
    pytest.importorskip("triton")
    cfg = CFG.replace(q_lora_rank=q_lora_rank)
    torch.manual_seed(0)
    plain = build(cfg, 0)
    fused = Transformer(cfg, experts="fused")
    fused.load_state_dict(plain.state_dict())
    fixed = Targets(*(torch.from_numpy(np.ascontiguousarray(t)) for t in rows(2, 7)))
    counts = torch.full((1 + cfg.num_nextn_predict_layers,), 14.0)
    seen = []
    for model in (plain, fused):
        if model is fused:
            for room in ("model.layers", "model.mla", "model.moe", "ops.rms_norm", "ops.balance"):
                monkeypatch.setattr(f"rorqual.{room}.trains", lambda x: torch.is_grad_enabled())
        out = losses(model, fixed, counts, mask_documents=False, balance_share=1.0)
        (out.lm + 0.3 * out.mtp + 0.1 * out.balance).backward()
        seen.append((torch.stack(out[:3]), {n: p.grad for n, p in model.named_parameters()}))
    (ours, grads), (exact, wanted) = seen[1], seen[0]
    assert torch.allclose(ours, exact, rtol=1e-5)
    for name, grad in wanted.items():
        assert (grads[name] - grad).norm() <= 2e-4 * grad.norm() + 1e-8, name


class Attentions(TorchDispatchMode):
    """Counts fused attention's forwards and all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        if "scaled_dot_product" in name and "backward" not in name:
            self.seen["attention"] += 1
        elif name.split(".")[1] in ("mm", "addmm", "bmm"):
            self.seen["products"] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_recomputed_changes_nothing() -> None:
    """Losses and gradients to the bit; attention itself is computed again for whole blocks only."""
    fixed, seen = Targets(*(torch.from_numpy(np.ascontiguousarray(t)) for t in rows(2))), {}
    counts = torch.full((1 + CFG.num_nextn_predict_layers,), 48.0)
    layers = CFG.num_hidden_layers + CFG.num_nextn_predict_layers
    cfg = CFG.replace(v_head_dim=CFG.qk_nope_head_dim + CFG.qk_rope_head_dim)  # what a CPU's fused attention takes
    for what in ("none", "selective", "block"):
        model = build(cfg, 0)
        for block in [*model.layers, *(m.block for m in model.mtp)]:
            block.recompute(what)  # type: ignore[arg-type]
        with Attentions() as counted:
            out = losses(model, fixed, counts, mask_documents=False, balance_share=1.0)
            (out.lm + 0.3 * out.mtp + 0.1 * out.balance).backward()
        seen[what] = counted.seen
        grads = [p.grad for p in model.parameters()]
        if what == "none":
            exact, wanted = out, grads
        assert torch.equal(out.lm, exact.lm) and torch.equal(out.balance, exact.balance)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True) if a is not None and b is not None)
    attentions = {what: counted["attention"] for what, counted in seen.items()}
    assert attentions == {"none": layers, "selective": layers, "block": 2 * layers}
    assert seen["none"]["products"] < seen["selective"]["products"] < seen["block"]["products"]
