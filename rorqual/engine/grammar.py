"""Grammars to token masks: which tokens may come next, so that the text in the end matches.

The parser is llguidance (Rust, MIT, without dependencies); docs/log.md says why. What is added here:
 - *text is text*: every added token is special to the parser, so that no JSON string can hold `<think>` or a turn
   marker as one token;
 - *errors reach whoever asked*: a schema or expression that does not compile, or that nothing can match, is a
   RequestError with the parser's own words. Keywords of JSON Schema that it cannot promise are refused, not ignored;
 - *speculation*: the masks along a draft come in one call, and the state is afterwards what it was;
 - white space between the parts of a JSON document is bounded, or a small model could go on with blanks for ever;
 - *a late beginning*: behind the token that ends a thought or opens tool calls (`LateMatcher`). The border is an id, so
   a model that writes about `</think>` in letters stays in its thought.
Characters stand in JSON strings as themselves; only control characters are escaped by number, which keeps halves of
surrogate pairs out.

The end-of-sequence token is kept from the parser: what it does with one, and with taking one back, depends on how the
text before it ended. Computing a mask and compiling release the interpreter lock.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rorqual.data.tokenizer import read_json
from rorqual.engine.api import Grammar
from rorqual.errors import BackendUnavailable, DataError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher

CACHED_GRAMMARS = 64
JSON_WHITE_SPACE = r" |\n[ \t]{0,64}"
"""Between two parts of a document: a blank, or a new line and the indentation of 16 levels of 4."""


class GrammarCompiler:
    """Of one tokenizer; shared by all requests. Reading a large vocabulary takes a second or two.

    tokenizer_file: a byte-level BPE tokenizer.json; vocab_size: the model's, padding included: padded ids are never
    allowed; eos_token_ids: what ends a text. Raises BackendUnavailable without llguidance, DataError for a file that it
    cannot read.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise BackendUnavailable(
                "structured output needs the package llguidance", remedy="pip install 'llguidance>=1.9'"
            ) from error
        spec = read_json(tokenizer_file)
        for token in spec.get("added_tokens") or []:
            token["special"] = True
        try:
            self._tokenizer = LLTokenizer(json.dumps(spec), n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise DataError(f"{tokenizer_file} cannot be used for structured output: {error}") from error
        self.vocab_size, self.eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._compiled = lru_cache(CACHED_GRAMMARS)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher | LateMatcher:
        """A matcher at the beginning of a text. A grammar seen before costs microseconds, a new one milliseconds.

        Raises RequestError, its param "response_format" for JSON and "grammar" for the others, when it does not compile
        or no text matches it.
        """
        compiled = self._compiled(replace(grammar, after=(), optional=False))
        matcher = Matcher(compiled.deep_copy(), self.vocab_size, self.eos_token_ids)
        if not grammar.after:
            return matcher
        forbidden = () if grammar.optional else self.eos_token_ids
        return LateMatcher(matcher, frozenset(grammar.after), self.vocab_size, forbidden)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if not matcher.is_error():
            # The lexer's states are made when first visited; copies inherit them, so the first visit is paid here.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return matcher


class Matcher:
    """How far one text has come in its grammar. Made by `GrammarCompiler.matcher`."""

    def __init__(self, parser: LLMatcher, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._parser, self._eos = parser, eos_token_ids
        self._ended = False
        self._words = -(-vocab_size // 32)
        self._rows: list[NDArray[np.uint32]] = []
        self._addresses: list[int] = []  # asking numpy each time would cost as much as a quick mask

    @property
    def stopped(self) -> bool:
        """The text is complete: nothing but the end of sequence can follow, or has followed."""
        return self._ended or self._parser.is_stopped()

    def masks(self, drafts: Sequence[int] = ()) -> list[NDArray[np.uint32]]:
        """What may come next, and what after drafts[:1], drafts[:2], ... up to all of them: len(drafts) + 1 bitsets of
        the vocabulary (token t: bit t % 32 of word t // 32). Behind a draft that is not allowed they are empty.

        The next call overwrites them. The matcher does not move. Raises RequestError once the
        parser has given up.
        """
        while len(self._rows) <= len(drafts):
            self._rows.append(np.zeros(self._words, np.uint32))
            self._addresses.append(self._rows[-1].ctypes.data)
        rows, ended, taken = self._rows[: len(drafts) + 1], self._ended, 0
        self._fill(0, ended)
        self._check()
        for i, draft in enumerate(drafts, 1):
            if not rows[i - 1][draft >> 5] >> (draft & 31) & 1:
                for behind in rows[i:]:
                    behind[:] = 0
                break
            if draft in self._eos:
                ended = True
            else:
                taken += self._parser.consume_token(draft)
            self._fill(i, ended)
        if taken:
            self._parser.rollback(taken)
        return rows

    def accept(self, token: int) -> None:
        """The text goes on with a token that the mask allowed. Raises RequestError if the parser gives up: the grammar
        has become too complex, or the token was not allowed."""
        if token in self._eos:
            self._ended = True
        elif not self._parser.consume_token(token):
            self._check()

    def _fill(self, i: int, ended: bool) -> None:
        if ended:  # nothing but another end follows an end
            row = self._rows[i]
            row[:] = 0
            for token in self._eos:
                row[token >> 5] |= np.uint32(1 << (token & 31))
            return
        self._parser.unsafe_compute_mask_ptr(self._addresses[i], 4 * self._words)
        if self._parser.is_error():  # it has filled in the end of sequence
            self._rows[i][:] = 0

    def _check(self) -> None:
        if self._parser.is_error():
            raise RequestError(_gist(self._parser.get_error()), param="grammar")


class LateMatcher:
    """A `Matcher` that begins behind the first of some tokens; before it, all but `forbidden` may be drawn."""

    def __init__(self, matcher: Matcher, after: frozenset[int], vocab_size: int, forbidden: Sequence[int]) -> None:
        self._matcher, self._after, self._begun = matcher, after, False
        self._free = np.zeros(-(-vocab_size // 32), np.uint32)
        bits = np.ones(vocab_size, np.uint8)
        bits[list(forbidden)] = 0
        self._free.view(np.uint8)[: -(-vocab_size // 8)] = np.packbits(bits, bitorder="little")

    @property
    def stopped(self) -> bool:
        return self._begun and self._matcher.stopped

    def masks(self, drafts: Sequence[int] = ()) -> list[NDArray[np.uint32]]:
        """As `Matcher.masks`. The rows before the beginning are one array that must not be written to."""
        if self._begun:
            return self._matcher.masks(drafts)
        rows = [self._free]
        for i, draft in enumerate(drafts):
            if draft in self._after:
                return rows + self._matcher.masks(drafts[i + 1 :])
            if not self._free[draft >> 5] >> (draft & 31) & 1:
                return rows + [np.zeros_like(self._free)] * (len(drafts) - i)
            rows.append(self._free)
        return rows

    def accept(self, token: int) -> None:
        if self._begun:
            self._matcher.accept(token)
        else:
            self._begun = token in self._after


def _source(grammar: Grammar) -> str:
    """In the parser's own notation. Raises RequestError for text that is no JSON object where a schema is due."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
    try:
        known = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise _refusal(grammar, f"it is not JSON: {error}") from error
    if not isinstance(known, dict):
        raise _refusal(grammar, "it is not a JSON object")
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITE_SPACE})
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error


def _refusal(grammar: Grammar, message: str) -> RequestError:
    what = {"json_schema": "JSON schema", "json_object": "JSON object", "regex": "regular expression"}
    return RequestError(
        f"the {what.get(grammar.kind, 'Lark grammar')} cannot be used: {_gist(message)}",
        param="response_format" if grammar.kind.startswith("json") else "grammar",
    )


def _gist(message: str) -> str:
    """The parser's message without the dump of its state."""
    first = message.split("\n<state>")[0].strip()
    return "no text can match it" if first.startswith("NoExtension") else first
