"""Log-probabilities as OpenAI's API writes them, for chat and for completions."""

from __future__ import annotations

from typing import Any

from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import TokenLogprob
from rorqual.serve.events import Logprobs

SMALLEST_LOGPROB = -9999.0  # OpenAI's; JSON has no minus infinity


def chat_logprobs(tokenizer: Tokenizer, content: Logprobs, reasoning: Logprobs) -> dict[str, Any]:
    """OpenAI's object, with DeepSeek's `reasoning_content` beside `content`."""
    return {
        "content": [_entry(tokenizer, logprob) for logprob in content],
        "reasoning_content": [_entry(tokenizer, logprob) for logprob in reasoning] or None,
    }


def completion_logprobs(tokenizer: Tokenizer, logprobs: Logprobs, offset: int) -> dict[str, Any]:
    """The older object of completions: lists side by side. offset: where in the text the first token begins."""
    offsets, tokens = [], []
    for logprob in logprobs:
        offsets.append(offset)
        tokens.append(_text(tokenizer, logprob.token_id))
        offset += len(tokens[-1])
    return {
        "tokens": tokens,
        "token_logprobs": [max(logprob.logprob, SMALLEST_LOGPROB) for logprob in logprobs],
        "top_logprobs": [
            {_text(tokenizer, token_id): max(value, SMALLEST_LOGPROB) for token_id, value in logprob.top}
            for logprob in logprobs
        ],
        "text_offset": offsets,
    }


def _entry(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    top = [_spell(tokenizer, token_id, value) for token_id, value in logprob.top]
    return {**_spell(tokenizer, logprob.token_id, logprob.logprob), "top_logprobs": top}


def _spell(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, SMALLEST_LOGPROB), "bytes": list(raw)}


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
