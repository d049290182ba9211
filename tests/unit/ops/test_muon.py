"""Batched Muon against torch's, which takes one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from rorqual.ops.muon import Muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_three_steps_equal_torchs_own() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 16), (16, 6), (4, 6, 16), (6, 16)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
    theirs = [[torch.nn.Parameter(m.detach().clone()) for m in p.view(-1, *p.shape[-2:])] for p in ours]
    flat = [m for matrices in theirs for m in matrices]
    wanted = torch.optim.Muon(flat, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    muon = Muon([(p, (slice(None),)) for p in ours], 0.9, 0.1)
    for _ in range(3):
        for p, matrices in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=draw)
            for m, g in zip(matrices, p.grad.view(-1, *p.shape[-2:]), strict=True):
                m.grad = g.clone()
        muon.step(0.01)
        wanted.step()
    for p, matrices in zip(ours, theirs, strict=True):
        for mine, other in zip(p.detach().view(-1, *p.shape[-2:]), matrices, strict=True):
            assert torch.allclose(mine, other, atol=2e-4)  # both orthogonalise in bf16, in another order of sums
