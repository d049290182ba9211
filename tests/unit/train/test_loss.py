"""The loss against a slow computation, and what its targets may not do."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from rorqual.config import ModelConfig
from rorqual.train.config import BalanceConfig, DataConfig, MTPConfig, OptimConfig, RunConfig, Source, resolve
from rorqual.train.loss import Targets, losses
from rorqual.train.schedule import Timeline
from tests.parity import build


def rows(n: int, width: int, documents: bool) -> Targets:
    tokens = torch.randint(0, 256, (n, width))
    ids = torch.randint(1, 4, (n, width)).sort(-1).values if documents else torch.ones(n, width)
    return Targets(tokens, ids.int(), torch.randint(0, 2, (n, width)).to(torch.uint8))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_losses_equal_a_loop_over_targets(depth: int, masked: bool) -> None:
    model = build(ModelConfig.load("test").replace(num_nextn_predict_layers=depth), depth)
    T = 14
    r = rows(2, T + 1 + depth, documents=True)
    counts = torch.rand(1 + depth) + 1
    out = losses(model, r, counts, mask_documents=masked, balance_share=1.0)

    def slow(b: int, ahead: int, logprobs: torch.Tensor, within: bool) -> float:
        total = 0.0
        for i in range(T):
            crosses = r.documents[b, i] != r.documents[b, i + ahead]
            if r.mask[b, i + ahead] and not (within and crosses):
                total -= logprobs[i, r.tokens[b, i + ahead]].item()
        return total

    from rorqual.model.batch import Batch

    batch = Batch(documents_BT=r.documents[:, :T]) if masked else None
    h, _ = model.hidden(r.tokens[:, :T], batch)
    lm = sum(slow(b, 1, model.head(h)[b].log_softmax(-1), masked) for b in range(2)) / counts[0].item()
    assert out.lm.item() == pytest.approx(lm, rel=1e-4, abs=1e-5)
    hs, _ = (
        model.predict_further(h, [r.tokens[:, 1 + k : 1 + k + T] for k in range(depth)], batch) if depth else ([], [])
    )
    mtp = [
        sum(slow(b, 2 + k, model.head(hs[k])[b].log_softmax(-1), True) for b in range(2)) / counts[1 + k].item()
        for k in range(depth)
    ]
    assert out.mtp.item() == pytest.approx(sum(mtp) / max(depth, 1), rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_mtp_targets_never_cross_a_document() -> None:
    """Changing only tokens that could be reached across a border changes no MTP loss."""
    model = build(ModelConfig.load("test"), 0)
    tokens = torch.randint(0, 256, (1, 12))
    documents = torch.tensor([[1] * 9 + [2] * 3])
    other = tokens.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 256
    ones = torch.ones(1, 12, dtype=torch.uint8)
    # Position 8 would predict token 10, across the border; positions 9.. see the changed tokens themselves.
    a, b = (
        losses(model, Targets(t, documents, ones), torch.ones(2), mask_documents=True, balance_share=1.0).mtp
        for t in (tokens, other)
    )
    weights = Targets(tokens, documents, ones).weights(2, 10, True)
    assert weights.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0, 0, 1]]
    assert a != b  # the pair inside the second document still counts


def config(**changes: object) -> RunConfig:
    base = RunConfig(out="x", data=DataConfig(train=(Source("s"),)), steps=1000, batch=8, model="test")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_the_simple_schedule_warms_up_holds_and_decays() -> None:
    line = Timeline(config(optim=OptimConfig(lr=1.0, warmup_steps=100, decay_fraction=0.5, min_lr_ratio=0.1)))
    lr = [line.learning_rate(s) for s in range(1000)]
    assert lr[0] == pytest.approx(0.01) and lr[99] == 1.0 and lr[499] == 1.0 and lr[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(lr[100:]))
    line = Timeline(config(mtp=MTPConfig(0.3, 0.1, 0.324), balance=BalanceConfig(1e-3, 0.034)))
    assert [line.mtp_weight(s) for s in (0, 675, 677, 999)] == pytest.approx([0.3, 0.3, 0.1, 0.1])
    assert [line.gamma(s) for s in (0, 965, 967, 999)] == [1e-3, 1e-3, 0, 0]
    always = Timeline(config(balance=BalanceConfig(1e-3, 0.0), optim=OptimConfig(warmup_steps=0, decay_fraction=0.0)))
    assert {always.gamma(s) for s in range(1000)} == {1e-3} and {always.learning_rate(s) for s in range(9)} == {1e-3}


def test_auto_is_resolved_by_kind_and_machine() -> None:
    pre = resolve(config(), kind="pretrain", cuda=False, cores=2)
    assert (pre.data.packing, pre.data.mask_documents, pre.device, pre.dtype, pre.compile) == (
        "stream",
        False,
        "cpu",
        "float32",
        False,
    )
    assert pre.micro_batch == 4 and pre.threads == 2
    fine = resolve(config(), kind="sft", cuda=True, cores=16)
    assert (fine.data.packing, fine.data.mask_documents, fine.device, fine.dtype, fine.compile) == (
        "samples",
        True,
        "cuda",
        "bfloat16",
        False,
    )
    assert fine.micro_batch == 8 and not fine.graph
    assert resolve(config(), kind="pretrain", cuda=True, cores=16).graph is True
    assert (pre.precision, fine.precision) == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("auto", "bfloat16", ("bf16", "bfloat16")),
        ("fp32", "auto", ("fp32", "float32")),
        ("bf16", "auto", ("bf16", "bfloat16")),
        ("fp8", "auto", ("fp8", "bfloat16")),
        ("fp8", "float32", ("fp8", "float32")),
    ],
)
@pytest.mark.parametrize("cuda", [False, True])
def test_precision_and_dtype_agree(precision: str, dtype: str, expected: tuple[str, str], cuda: bool) -> None:
    resolved = resolve(config(precision=precision, dtype=dtype), kind="pretrain", cuda=cuda, cores=2)
    assert (resolved.precision, resolved.dtype) == expected
    assert resolve(resolved, kind="pretrain", cuda=not cuda, cores=9) == resolved
