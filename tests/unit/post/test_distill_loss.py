"""The chunked divergence against the plain computation, and the teacher's spelling against one made by lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.model.batch import Batch
from rorqual.ops.divergence import BOUND, divergence_backends
from rorqual.post.distill_loss import Target, divergence
from rorqual.post.expand import Expansion
from tests.unit.post.conftest import make_llama

N, D, V = 45, 12, 97
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(teacher_vocab: int = V) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = {
        "h": torch.randn(N, D, generator=draw),
        "head": torch.randn(V, D, generator=draw),
        "teacher_h": torch.randn(N, 8, generator=draw),
        "teacher_head": torch.randn(teacher_vocab, 8, generator=draw),
        "weights": torch.rand(N, generator=draw),
        "words": torch.randint(0, V, (N,), generator=draw),
    }
    return {name: tensor.to(DEVICE) for name, tensor in x.items()}


def taught(x: dict[str, torch.Tensor], own_N: torch.Tensor | None = None) -> Target:
    """By the teacher, but by the words themselves where own is true."""
    words = None if own_N is None else x["words"].where(own_N, -1)
    return Target(x["teacher_h"], lambda t: t @ x["teacher_head"].T, words)


def plain(x: dict[str, torch.Tensor], h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """KL over all logits at once, by PyTorch's own loss."""
    wanted = (x["teacher_h"] @ x["teacher_head"].T).softmax(-1)
    wanted = F.pad(wanted, (0, V - wanted.shape[1]))
    each = F.kl_div((h @ head.T).log_softmax(-1), wanted, reduction="none").sum(-1)
    return (each * x["weights"]).sum()


@pytest.mark.parametrize("backend", divergence_backends.names())
@pytest.mark.parametrize("chunk", [1, 7, 45, 1000])
@pytest.mark.parametrize("teacher_vocab", [V, 80])
def test_value_and_gradients_equal_the_plain_computation(chunk: int, backend: str, teacher_vocab: int) -> None:
    x = inputs(teacher_vocab)
    results = []
    for chunked in (True, False):
        h, head = x["h"].clone().requires_grad_(), x["head"].clone().requires_grad_()
        if chunked:
            loss = divergence(h, head, x["weights"], taught(x), chunk, backend)
        else:
            loss = plain(x, h, head)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, head.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", divergence_backends.names())
def test_a_word_as_target_is_its_cross_entropy(backend: str) -> None:
    x = inputs()
    h, g = x["h"].clone().requires_grad_(), x["h"].clone().requires_grad_()
    spoken = taught(x, torch.ones(N, dtype=torch.bool, device=DEVICE))
    loss = divergence(h, x["head"], x["weights"], spoken, 16, backend)
    wanted = (F.cross_entropy(g @ x["head"].T, x["words"], reduction="none") * x["weights"]).sum()
    loss.backward()
    wanted.backward()
    assert torch.allclose(loss, wanted) and torch.allclose(h.grad, g.grad, atol=1e-5)
    mixed = torch.arange(N, device=DEVICE) % 3 == 0
    both = divergence(x["h"], x["head"], x["weights"], taught(x, mixed), 16, backend)
    parts = [
        divergence(x["h"], x["head"], x["weights"] * mixed, spoken, 16, backend),
        divergence(x["h"], x["head"], x["weights"] * ~mixed, taught(x), 16, backend),
    ]
    assert torch.allclose(both, sum(parts))


@pytest.mark.parametrize("backend", divergence_backends.names())
def test_sixteen_bits_follow_fp32_and_the_heads_gradient_keeps_its_dtype(backend: str) -> None:
    """A head of fp32 under hidden states of bf16, as it is trained; fresh numbers, some of weight 0, some of one word."""
    x = {name: torch.randn_like(tensor) for name, tensor in inputs(80).items() if tensor.is_floating_point()}
    weights = x["weights"].abs() * (torch.rand(N, device=DEVICE) < 0.7)
    words = torch.randint(0, V, (N,), device=DEVICE).where(torch.rand(N, device=DEVICE) < 0.3, -1)
    h, teacher_h, teacher_head = (x[name].bfloat16() for name in ("h", "teacher_h", "teacher_head"))
    results = []
    for dtype, how in ((torch.bfloat16, backend), (torch.float32, "reference")):
        a, b = h.detach().to(dtype).requires_grad_(), x["head"].clone().requires_grad_()
        target = Target(teacher_h.to(dtype), lambda t: t @ teacher_head.to(t.dtype).T, words)
        loss = divergence(a, b, weights, target, 16, how)
        (0.37 * loss).backward()
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype and b.grad.dtype == torch.float32
        results.append((loss.detach(), a.grad.float(), b.grad))
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).norm() <= BOUND[torch.bfloat16] * wanted.norm()


def test_of_no_positions_there_is_nothing_to_learn() -> None:
    h, head = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    loss = divergence(h, head, torch.rand(0), Target(torch.randn(0, 8), lambda t: t @ torch.randn(8, V)), 16)
    loss.backward()
    assert loss == 0 and h.grad is not None and h.grad.shape == (0, D) and head.grad is None


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result of any operation had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_positions_by_all_words_is_ever_made() -> None:
    """Not in the forward, not kept for the backward, not in the backward: at most chunk x V, or the head itself."""
    x, chunk = inputs(), 5
    h, head = x["h"].requires_grad_(), x["head"].requires_grad_()
    with Largest() as seen:
        divergence(h, head, x["weights"], taught(x), chunk).backward()
    assert 0 < seen.numel <= max(chunk * V, V * D) < N * V


def test_only_wanted_gradients_are_formed() -> None:
    x = inputs()
    h = x["h"].requires_grad_()
    divergence(h, x["head"], x["weights"], taught(x), 8).backward()
    assert h.grad is not None and x["head"].grad is None


TABLE = {5: [50, 51, 52], 6: [60], 7: []}


def by_lists(row: list[int]) -> tuple[list[int], list[int]]:
    """The teacher's row and the place after each student token."""
    out: list[int] = []
    places = []
    for token in row:
        out += TABLE.get(token, [token])
        places.append(max(0, len(out) - 1))
    return out, places


def test_the_teachers_spelling_is_the_table_applied() -> None:
    tokens = torch.randint(4, 12, (6, 30), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(30)[None].expand(6, -1) // 11 + 1
    ours, their_documents, places = Expansion(TABLE, 97, torch.device("cpu"))(tokens, documents)
    for b, row in enumerate(tokens.tolist()):
        wanted, where = by_lists(row)
        assert ours[b, : len(wanted)].tolist() == wanted and places[b].tolist() == where
        spread = [d for t, d in zip(row, documents[b].tolist(), strict=True) for _ in TABLE.get(t, [t])]
        assert their_documents[b, : len(wanted)].tolist() == spread
        assert not their_documents[b, len(wanted) :].any()


def test_nothing_to_expand_changes_nothing() -> None:
    tokens = torch.randint(0, 97, (2, 9))
    documents = torch.ones_like(tokens)
    ours, their_documents, places = Expansion({}, 97, torch.device("cpu"))(tokens, documents)
    assert ours is tokens and their_documents is documents and places.tolist() == [list(range(9))] * 2


def test_predictions_after_expanded_tokens_are_those_of_the_text_spelled_out() -> None:
    teacher = make_llama()
    tokens = torch.tensor([[9, 5, 10, 11, 7, 6, 8]])
    spelled, documents, places = Expansion(TABLE, 384, torch.device("cpu"))(tokens, torch.ones_like(tokens))
    with torch.no_grad():
        logits = teacher(spelled, Batch(documents_BT=documents))[0, places[0]]
        wanted, where = by_lists(tokens[0].tolist())
        for i, place in enumerate(where):
            alone = teacher(torch.tensor([wanted[: place + 1]]))[0, -1]
            assert torch.allclose(logits[i], alone, atol=1e-4)
