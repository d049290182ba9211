"""Tiny Llama models with random weights, and a tokenizer of real text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.data.tokenizer import train_tokenizer
from rorqual.post.llama import Llama, LlamaConfig
from rorqual.post.llama_files import save_llama
from rorqual.post.llama_tokenizer import TokenizerFiles

ROOT = Path(__file__).resolve().parents[3]
TINY = LlamaConfig(
    vocab_size=384, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=96, rope_theta=1000.0, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip


def make_llama(seed: int = 0, **changes: object) -> Llama:
    """Weights large enough that attention looks somewhere and neurons differ; norms away from 1."""
    model = Llama(replace(TINY, **changes))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else noise * p.shape[-1] ** -0.5)
        model.embed_tokens.weight.copy_(torch.randn(model.embed_tokens.weight.shape, generator=draw))
    return model.eval()


@pytest.fixture(scope="session")
def corpus_files() -> list[Path]:
    return sorted((ROOT / "rorqual").rglob("*.py"))


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory, corpus_files: list[Path]) -> TokenizerFiles:
    """A byte-level tokenizer of 384 words, many of its special tokens free."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f.read_text() for f in corpus_files], TINY.vocab_size).save(folder)
    read = [json.loads((folder / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json")]
    vocab = read[0]["model"]["vocab"]
    for token in read[0]["added_tokens"]:
        vocab.pop(token["content"], None)
        token |= {"special": True, "content": f"<spare_{token['id']}>"}
        vocab[token["content"]] = token["id"]
    read[1] |= dict(zip(("bos_token", "eos_token", "pad_token"), ("<spare_0>", "<spare_1>", "<spare_2>"), strict=True))
    return TokenizerFiles(*read)


@pytest.fixture
def llama_dir(tmp_path: Path, tokenizer_files: TokenizerFiles) -> Callable[..., Path]:
    """Writes a tiny model as a Hugging Face directory."""

    def write(name: str = "llama", seed: int = 0, **changes: object) -> Path:
        save_llama(make_llama(seed, **changes), tmp_path / name, tokenizer_files, torch.float32)
        return tmp_path / name

    return write
