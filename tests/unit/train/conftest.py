"""A small corpus of real text (the licences of installed packages), its tokenizer and its shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.data.prepare import prepare
from rorqual.data.tokenizer import train_tokenizer

TEXT = Path(__file__).resolve().parents[3]
MODEL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(root: Path) -> Path:
    """`tokenizer/`, `shards/train` and `shards/val` in a directory."""
    files = sorted((TEXT / "rorqual").rglob("*.py"))
    texts = [f.read_text() for f in files]
    (root / "text").mkdir()
    for i, text in enumerate(texts):
        (root / "text" / f"{i:03}.txt").write_text(text)
    train_tokenizer(texts, MODEL["vocab_size"]).save(root / "tokenizer")
    prepare([root / "text"], root / "shards", root / "tokenizer", val_fraction=0.1)
    return root


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes a run file; keyword arguments are lines of its top level."""

    def write(name: str = "run", **top: object) -> Path:
        lines = {
            "out": str(tmp_path / name),
            "steps": 8,
            "batch": 4,
            "eval_every": 4,
            "checkpoint_every": 3,
            "threads": 1,
            "report": False,
            **top,
        }
        model = "\n".join(f"{k} = {v}" for k, v in MODEL.items())
        text = "\n".join(f"{k} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in lines.items())
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f"{text}\n[model]\n{model}\n[data]\ntokenizer = '{corpus}/tokenizer'\nseq_len = 32\n"
            f"[[data.train]]\npath = '{corpus}/shards/train'\n[[data.val]]\npath = '{corpus}/shards/val'\n"
            "[optim]\nwarmup_steps = 2\n"
        )
        return path

    return write
