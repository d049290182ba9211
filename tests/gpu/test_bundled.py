"""The bundled model in fp32: a GPU says what a CPU says, token by token, up to ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import load_model
from rorqual.checkpoint.convert import convert
from rorqual.config import resolve_model
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.load import load_core
from rorqual.engine.settings import EngineSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROMPTS, TOKENS, TIE = 200, 32, 1e-3


def prompts(path: Path) -> list[tuple[int, ...]]:
    """Pieces of our own documentation, of 8 to 39 tokens."""
    tokenizer = Tokenizer.load(path)
    root = Path(__file__).parents[2]
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(root.glob("docs/*.md")))
    ids = tokenizer.encode(text[:200_000])
    starts = range(0, len(ids) - 40, (len(ids) - 40) // PROMPTS)
    return [(tokenizer.bos_id, *ids[at : at + 8 + n % 32]) for n, at in enumerate(starts[:PROMPTS])]


def greedy(path: Path, device: str, asked: list[tuple[int, ...]]) -> list[list[int]]:
    core = load_core(EngineSettings(str(path), dtype="float32", device=device, kernels="torch", max_num_seqs=64))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for i, prompt in enumerate(asked):
        core.add(Request(str(i), prompt, params))
    said: list[list[int]] = [[] for _ in asked]
    while core.busy:
        for out in core.step():
            assert out.error is None
            said[int(out.request_id)] += out.token_ids
    core.close()
    return said


def test_the_bundled_model_says_the_same_on_both(tmp_path: Path) -> None:
    """Packed weights are expanded once, and not at every step."""
    path = tmp_path / "plain"
    convert(resolve_model(), path, "fp32")
    asked = prompts(path)
    assert len(asked) == PROMPTS
    on_gpu, on_cpu = greedy(path, "cuda", asked), greedy(path, "cpu", asked)
    parted = [
        (i, next(k for k in range(TOKENS) if a[k] != b[k]))
        for i, (a, b) in enumerate(zip(on_gpu, on_cpu, strict=True))
        if a != b
    ]
    model = load_model(path, dtype=torch.float32)
    gaps = []
    for i, k in parted:
        with torch.inference_mode():
            logits = model(torch.tensor([[*asked[i], *on_cpu[i][:k]]]))[0, -1]
        best, second = logits.topk(2)[0].tolist()
        assert {on_gpu[i][k], on_cpu[i][k]} == set(logits.topk(2)[1].tolist())
        gaps.append(best - second)
    print(f"{PROMPTS - len(parted)} of {PROMPTS} prompts alike in {TOKENS} tokens; gaps where they part: {gaps}")
    assert all(gap < TIE for gap in gaps)
