"""A fixed model computes what the model computes; that its bits are fixed is shown on a GPU (tests/gpu)."""

from __future__ import annotations

import pytest
import torch

from rorqual.checkpoint.convert import FORMATS, is_quantised
from rorqual.config import ModelConfig
from rorqual.errors import BackendUnavailable
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.fixed import fix
from rorqual.model.quantised import expand_absorbed, quantise
from rorqual.model.transformer import Transformer
from rorqual.ops.fp8 import Fp8Blocks
from tests.parity import build

PAGE, TOKENS = 16, 11


def model(form: str) -> Transformer:
    # Widths in whole groups of 32.
    made = build(ModelConfig.load("test").replace(hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2), 0)
    if form in FORMATS:
        packed = FORMATS[form]
        experts = "experts.gate_up", "experts.down"
        quantise(made, packed, lambda path: path.endswith(experts) or is_quantised(f"{path}.weight", packed))
        expand_absorbed(made, torch.float32)
    return made.eval()


def rows(latents: torch.Tensor) -> Batch:
    """All tokens of one prompt, each as a row."""
    at = torch.arange(TOKENS)
    table = torch.ones(TOKENS, 1, dtype=torch.int64)
    return Batch(at[:, None], cache=LatentPages(latents, table, (PAGE + at)[:, None], at + 1))


@pytest.mark.parametrize("form", ["plain", "int4", "fp8"])
@torch.inference_mode()
def test_tokens_as_fixed_rows_equal_the_prompt(form: str) -> None:
    tokens = torch.randint(0, 256, (1, TOKENS))
    plain = model(form)
    want = plain(tokens)[0]
    fixed = model(form)
    fix(fixed)
    fix(fixed)
    latents = torch.zeros(plain.cfg.num_hidden_layers + 1, 2, PAGE, plain.cfg.cache_dim)
    got = fixed(tokens.T, rows(latents))[:, 0]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_format_without_a_kernel_is_refused() -> None:
    made = build(ModelConfig.load("test"), 0)
    form = Fp8Blocks(backend="reference")
    quantise(made, form, lambda path: path.endswith("o_proj"))
    with pytest.raises(BackendUnavailable, match="o_proj"):
        fix(made)
