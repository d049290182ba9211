"""`model.fixed`: the bits of a token's logits, however many are computed beside it and however its prompt was cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.checkpoint.convert import FORMATS, is_quantised
from rorqual.config import ModelConfig
from rorqual.model.batch import Batch, LatentPages
from rorqual.model.fixed import fix
from rorqual.model.quantised import expand_absorbed, quantise
from rorqual.model.transformer import Transformer

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
PAGE, WIDTH = 64, 24


def model(form: str) -> Transformer:
    torch.manual_seed(0)
    cfg = ModelConfig.load("bench-gpu").replace(num_hidden_layers=3, vocab_size=1024)
    made = Transformer(cfg, dtype=torch.bfloat16, device=CUDA).eval()
    if form in FORMATS:
        packed = FORMATS[form]
        experts = "experts.gate_up", "experts.down"
        quantise(made, packed, lambda path: path.endswith(experts) or is_quantised(f"{path}.weight", packed))
        expand_absorbed(made, torch.bfloat16)
    fix(made)
    return made


class Sequence:
    """A prompt with pages of its own, computed in chunks of rows, together with other sequences' if wished."""

    def __init__(self, tokens: Tensor, first_page: int) -> None:
        self.tokens, self.pages, self.done = tokens, torch.arange(first_page, first_page + WIDTH, device=CUDA), 0

    def take(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and tables of the next rows."""
        at = torch.arange(self.done, min(self.done + count, len(self.tokens)), device=CUDA)
        self.done += len(at)
        return self.tokens[at], at, self.pages.expand(len(at), -1)


def step(model: Transformer, latents: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    tokens, at, table = (torch.cat(column) for column in zip(*parts, strict=True))
    slots = table.gather(1, at[:, None] // PAGE) * PAGE + at[:, None] % PAGE
    out = model(tokens[:, None], Batch(at[:, None], cache=LatentPages(latents, table, slots, at + 1)))[:, 0]
    return list(out.split([len(part[0]) for part in parts]))


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
@torch.inference_mode()
def test_bits_depend_on_nothing_beside_a_token(form: str) -> None:
    m = model(form)
    texts = [torch.randint(0, 1024, (n,), device=CUDA) for n in (1300, 70, 1)]
    logits = []
    for chunks in ([1300], [1, 7, 64, 200, 1100], [600, 1, 1, 700]):
        latents = torch.zeros(3, 1 + 3 * WIDTH, PAGE, m.cfg.cache_dim, dtype=torch.bfloat16, device=CUDA)
        sequences = [Sequence(text, 1 + i * WIDTH) for i, text in enumerate(texts)]
        out: list[Tensor] = []
        for i, count in enumerate(chunks):
            parts = [sequences[0].take(count)]
            if i == len(chunks) // 2:  # the others join, before it and after it
                parts = [sequences[1].take(70), *parts, sequences[2].take(1)]
            out.append(step(m, latents, parts)[len(parts) // 2])
        logits.append(torch.cat(out))
    assert all(x.shape == (1300, 1024) for x in logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
