"""What `rorqual verify` reads: built-in texts of several kinds and a chat, a file's paragraphs, or ids drawn at random.

The rule for both sides: one beginning-of-sequence token in front of plain text, and a chat as the directory's template
writes it. Ids are made here, once, so that no other tokenizer has a say in the comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from rorqual.config import ModelConfig
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Prompt:
    """ids: what both sides read, beginning-of-sequence included. text or messages: where they came from, if anywhere."""

    name: str
    ids: tuple[int, ...]
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Words:
    """What a directory knows of text; without a tokenizer, nothing."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None

    @classmethod
    def load(cls, directory: Path) -> Words:
        """Raises DataError for a damaged tokenizer; a template of another family is as good as none."""
        if not (directory / "tokenizer.json").is_file():
            return cls(None, None)
        try:
            template = ChatTemplate.load(directory)
        except DataError:
            template = None
        return cls(Tokenizer.load(directory), template)


def make_prompts(
    cfg: ModelConfig, words: Words, text: Path | None = None, count: int | None = None, max_tokens: int = 256
) -> list[Prompt]:
    """Built-in texts and a chat, or a file's paragraphs; ids drawn at random where there is no tokenizer.

    Each is cut to max_tokens and to the model's context. Raises DataError for a file without two tokens of text or
    given without a tokenizer, CheckpointError for a tokenizer with more ids than the model has rows.
    """
    longest = max(2, min(max_tokens, cfg.max_position_embeddings - 1))
    tokenizer = words.tokenizer
    if tokenizer is None:
        if text is not None:
            raise DataError(
                "the model directory has no tokenizer to read text with", remedy="leave --text out: ids are drawn"
            )
        return _random_prompts(cfg, 4 if count is None else count, longest)
    if text is not None:
        found = [Prompt(f"paragraph {i}", (), p) for i, p in enumerate(_paragraphs(text), 1)]
    else:
        built_in = json.loads(resources.files("rorqual.checkpoint").joinpath("verify_prompts.json").read_text("utf-8"))
        found = [Prompt(t["name"], (), t["text"]) for t in built_in["texts"]]
        found += [Prompt(c["name"], (), None, tuple(c["messages"])) for c in built_in["chats"] if words.template]
    prompts = []
    for prompt in found[:count]:
        if prompt.messages is not None and words.template is not None:
            ids = words.template.encode(tokenizer, prompt.messages)
        else:
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt.text or "")]
        if max(ids) >= cfg.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives id {max(ids)}, the model has {cfg.vocab_size} rows",
                remedy="tokenizer and weights must be of one model",
            )
        prompts.append(Prompt(prompt.name, tuple(ids[:longest]), prompt.text, prompt.messages))
    return prompts


def _paragraphs(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    found = [p.strip("\n") for p in text.replace("\r\n", "\n").split("\n\n") if p.strip()]
    if not found:
        raise DataError(f"{file} holds no text", remedy="paragraphs are separated by empty lines")
    return found


def _random_prompts(cfg: ModelConfig, count: int, length: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    start = [] if cfg.bos_token_id is None else [cfg.bos_token_id]
    drawn = rng.integers(0, cfg.vocab_size, (count, min(length, 128) - len(start))).tolist()
    return [Prompt(f"random ids {i}", tuple(start + ids)) for i, ids in enumerate(drawn, 1)]
