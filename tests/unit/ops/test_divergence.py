"""The divergence from a teacher: every backend against autograd in fp64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rorqual.ops.divergence import BOUND, divergence_and_slope_, divergence_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def draw(n: int, v: int, w: int, own: str, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Inputs:
    """Logits, the teacher's, words and weights: some of them 0, none of the first row's."""
    logits, teacher = (scale * torch.randn(n, width, device=DEVICE) for width in (v, w))
    words = torch.randint(0, v, (n,), device=DEVICE)
    share = {"no": 0.0, "some": 0.5, "all": 1.0}[own]
    words = words.where(torch.rand(n, device=DEVICE) < share, -1)
    weights = torch.rand(n, device=DEVICE) * (torch.rand(n, device=DEVICE) < 0.7)
    weights[0] = 0.5
    return logits.to(dtype), teacher.to(dtype), words, weights


def exact(
    logits: torch.Tensor, teacher: torch.Tensor, words: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By PyTorch's own losses and autograd."""
    student = logits.double().requires_grad_()
    wanted = F.pad(teacher.double(), (0, logits.shape[1] - teacher.shape[1]), value=-float("inf")).softmax(-1)
    divergence = F.kl_div(student.log_softmax(-1), wanted, reduction="none").sum(-1)
    losses = weights * torch.where(words < 0, divergence, F.cross_entropy(student, words.clamp(0), reduction="none"))
    return losses.detach(), torch.autograd.grad(losses.sum(), student)[0]


@pytest.mark.parametrize("backend", divergence_backends.names())
@pytest.mark.parametrize("own", ["no", "some", "all"])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize(
    ("n", "v", "w"), [(1, 1, 1), (9, 5, 5), (12, 97, 80), (6, 4099, 4099), (5, 5000, 2049), (5, 4096, 1)]
)
def test_losses_and_slopes(
    backend: str, own: str, dtype: torch.dtype, teacher_dtype: torch.dtype, n: int, v: int, w: int
) -> None:
    """Also where a row ends within a block, or the teacher blocks before it."""
    logits, teacher, words, weights = draw(n, v, w, own, dtype)
    teacher = teacher.to(teacher_dtype)
    losses, slope = exact(logits, teacher, words, weights)
    ours, our_slope = divergence_and_slope_(logits.clone(), teacher, words, weights, backend)
    assert ours.dtype == torch.float32 and our_slope.dtype == dtype
    assert (ours.double() - losses).norm() <= BOUND[torch.float32] * losses.norm() + 1e-12
    assert (our_slope.double() - slope).norm() <= BOUND[dtype] * slope.norm() + 1e-12
    assert not ours[weights == 0].any() and not our_slope[weights == 0].any()


@pytest.mark.parametrize("backend", divergence_backends.names())
def test_no_words_are_words_for_nobody(backend: str) -> None:
    logits, teacher, words, weights = draw(7, 300, 200, "no")
    spoken = divergence_and_slope_(logits.clone(), teacher, words, weights, backend)
    for a, b in zip(spoken, divergence_and_slope_(logits.clone(), teacher, None, weights, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", divergence_backends.names())
@pytest.mark.parametrize("own", ["no", "some"])
def test_large_logits_neither_overflow_nor_lose_the_small_divergences(backend: str, own: str) -> None:
    """Around 1,000, where numbers in fp32 are 6e-5 apart; and far below it, where every exponential is 0 alone."""
    logits, teacher, words, weights = draw(8, 300, 300, own, scale=0.01)
    for offset in (1000.0, -1000.0):
        high, above = logits + offset, teacher + 2 * offset  # rounded here, so that everybody reads the same
        losses, slope = exact(high, above, words, weights)
        ours, our_slope = divergence_and_slope_(high, above, words, weights, backend)
        assert ours.isfinite().all() and (ours.double() - losses).norm() <= 2e-5 * losses.norm() + 1e-6
        assert (our_slope.double() - slope).norm() <= 2e-5 * slope.norm() + 1e-8
    logits, teacher, words, weights = draw(8, 300, 280, own, scale=1000.0)
    losses, slope = exact(logits, teacher, words, weights)
    ours, our_slope = divergence_and_slope_(logits, teacher, words, weights, backend)
    assert (ours.double() - losses).norm() <= 2e-5 * losses.norm()
    assert (our_slope.double() - slope).norm() <= 1e-4 * slope.norm()


def test_the_kernel_works_where_the_logits_lie_and_reads_no_row_of_weight_0() -> None:
    """Rows of a wider tensor, as a product into a larger room would give them; and what lies beside them stays."""
    if "triton" not in divergence_backends.names():
        pytest.skip("triton is not installed")
    logits, teacher, words, weights = draw(8, 90, 70, "some")
    weights[3] = 0
    room, other = (torch.full((8, 128), float("nan"), device=DEVICE) for _ in range(2))
    room[:, :90], other[:, :70] = logits, teacher
    room[3] = other[3] = float("nan")
    losses, slope = divergence_and_slope_(room[:, :90], other[:, :70], words, weights, "triton")
    assert slope.data_ptr() == room.data_ptr() and room[:, 90:].isnan().all()
    rest = torch.arange(8, device=DEVICE) != 3
    wanted, wanted_slope = exact(logits[rest], teacher[rest], words[rest], weights[rest])
    assert torch.allclose(losses[rest].double(), wanted, rtol=1e-4, atol=1e-6) and losses[3] == 0
    assert torch.allclose(slope[rest].double(), wanted_slope, rtol=1e-4, atol=1e-6) and not slope[3].any()
