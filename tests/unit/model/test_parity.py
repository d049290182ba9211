"""transformers' DeepseekV3ForCausalLM is the oracle: logits and gradients on random weights, both ways through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rorqual.checkpoint import load_model
from rorqual.checkpoint.names import released_tensors
from tests.parity import build, draw, twin

SEEDS = range(14)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_every_gradient_equal_transformers(seed: int, tmp_path: Path) -> None:
    cfg = draw(seed)
    model = build(cfg, seed)
    peer = twin(model, tmp_path / "model")
    tokens = torch.randint(0, cfg.vocab_size, (2, 81))
    targets = torch.randint(0, cfg.vocab_size, (2 * 81,))
    ours, theirs = model(tokens), peer(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4
    for logits in (ours, theirs):
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
    compared, whole = 0, sum(p.grad.norm().item() ** 2 for p in model.parameters() if p.grad is not None) ** 0.5
    for name, gradient in released_gradients(model):
        reference = peer_gradient(peer, name, gradient.shape)
        # With one expert a token the normalised gate is 1 and the router's gradient is nothing but rounding.
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() + 1e-7 * whole, name
        compared += 1
    assert compared > 10


def released_gradients(model):  # type: ignore[no-untyped-def]
    """Our gradients under transformers' parameter names (experts stacked, as both keep them)."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield (name if name.startswith("lm_head") else f"model.{name}"), parameter.grad


def peer_gradient(peer, name: str, shape: torch.Size) -> torch.Tensor:  # type: ignore[no-untyped-def]
    gradient = peer.get_parameter(name).grad
    assert gradient.shape == shape
    return gradient


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_what_transformers_saves_loads_here(seed: int, tmp_path: Path) -> None:
    cfg = draw(seed)
    model = build(cfg, seed)
    peer = twin(model, tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    tokens = torch.randint(0, cfg.vocab_size, (1, 40))
    ours = dict(released_tensors(model))
    assert all(torch.equal(view, ours[name]) for name, view in released_tensors(again))
    # Not to the bit: a matrix product may add in another order where the file aligns a weight differently.
    assert torch.allclose(again(tokens), model(tokens), atol=1e-5)


def test_every_feature_is_drawn() -> None:
    drawn = [draw(s) for s in SEEDS]
    assert {c.q_lora_rank is None for c in drawn} == {True, False}
    assert {c.n_group > 1 for c in drawn} == {True, False}
    assert {c.rope_scaling is None for c in drawn} == {True, False}
    assert {c.tie_word_embeddings for c in drawn} == {True, False}
    assert {c.first_k_dense_replace for c in drawn} >= {0, 1, 2, 3}
    assert any(c.hidden_size % 16 for c in drawn)
