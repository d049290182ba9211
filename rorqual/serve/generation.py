"""From an engine's token ids to what people read: the one event stream that every dialect speaks from.

`produce` drives one engine request and yields `Delta`s (new final text of thought and answer, with
log-probabilities if asked) and at last one `End`. Streaming, non-streaming, and later completions, Responses
and Anthropic messages differ only in how they spell these. Leaving the iterator early aborts the engine's
request.

Log-probabilities travel with their text: when a possible stop string is held back, so are its tokens', and
when it was one, they are dropped with it, so that the tokens listed are the tokens of the text shown. Tokens
without text (the end of sequence, the thinking markers) are counted in the usage and not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rorqual.data.reasoning import ReasoningSplitter
from rorqual.data.special import END_THINK, THINK
from rorqual.data.stop import StopMatcher
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import FinishReason, Output, Request, TokenLogprob
from rorqual.errors import RequestError, RorqualError
from rorqual.serve.errors import engine_gone
from rorqual.serve.served import ServedModel

Logprobs = tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one request. `completion_tokens` includes thought, markers and the end of sequence."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int

    def openai(self) -> dict[str, Any]:
        """OpenAI's keys and DeepSeek's: clients of both read one or the other."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


@dataclass(frozen=True, slots=True)
class Delta:
    reasoning: str = ""
    content: str = ""
    reasoning_logprobs: Logprobs = ()
    content_logprobs: Logprobs = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.reasoning_logprobs or self.content_logprobs)

    def __add__(self, other: Delta) -> Delta:
        return Delta.join((self, other))

    @classmethod
    def join(cls, deltas: Sequence[Delta]) -> Delta:
        """All of them as one. A long answer is joined once at its end: adding up would copy it for every token."""
        return cls(
            "".join(delta.reasoning for delta in deltas),
            "".join(delta.content for delta in deltas),
            tuple(logprob for delta in deltas for logprob in delta.reasoning_logprobs),
            tuple(logprob for delta in deltas for logprob in delta.content_logprobs),
        )


@dataclass(frozen=True, slots=True)
class End:
    finish_reason: FinishReason
    usage: Usage


Event = Delta | End


async def produce(served: ServedModel, request: Request, in_thinking: bool) -> AsyncGenerator[Event, None]:
    """Raises what the engine raises or says; HTTPException 503 where the reason is that it is not alive."""
    text = _TextPath(served.tokenizer, request.params.stop, in_thinking)
    try:
        async with aclosing(served.engine.generate(request)) as outputs:
            async for output in outputs:
                reason = output.finish_reason
                if reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise output.error or RorqualError("the engine ended this request early")
                delta = text.read(output)
                if reason is not None and not text.hit:
                    delta += text.finish()
                if text.hit:
                    reason = FinishReason.STOP
                if delta:
                    yield delta
                if reason is not None:
                    yield End(reason, text.usage(len(request.prompt), output.cached_tokens))
                    return
        raise RorqualError("the engine ended this request without a reason")
    except Exception as error:
        if not served.engine.alive and not isinstance(error, RequestError):
            raise engine_gone() from error
        raise


class _TextPath:
    """Ids in, text out: thinking split off by id, characters whole, stop strings found in the answer only."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], in_thinking: bool) -> None:
        self.hit = False
        self._tokenizer = tokenizer
        self._markers = {tokenizer.special(name) for name in (THINK, END_THINK) if tokenizer.has_special(name)}
        self._splitter = ReasoningSplitter(tokenizer, in_thinking)
        self._matcher = StopMatcher(stop)
        self._tokens = 0
        self._came = 0  # characters of the answer that came from the splitter
        self._shown = 0  # ... of them, how many went out
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # (where in the answer the token begins, itself)

    def read(self, output: Output) -> Delta:
        delta = Delta()
        ended = output.finish_reason is FinishReason.STOP  # then the last id is the stop token, which is not text
        for i, token_id in enumerate(output.token_ids):
            self._tokens += 1
            if ended and i == len(output.token_ids) - 1:
                break
            delta += self._push(token_id, output.logprobs[i] if output.logprobs else None)
            if self.hit:
                break
        return delta

    def finish(self) -> Delta:
        """What was held back in case more would follow."""
        reasoning, content = self._splitter.flush()
        delta = self._answer(content)
        if self.hit:
            return Delta(reasoning) + delta
        rest = self._matcher.flush()
        logprobs = tuple(logprob for _, logprob in self._held)
        return Delta(reasoning) + delta + Delta(content=rest, content_logprobs=logprobs)

    def usage(self, prompt_tokens: int, cached_tokens: int) -> Usage:
        return Usage(prompt_tokens, self._tokens, self._splitter.reasoning_tokens, cached_tokens)

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> Delta:
        if logprob is not None and not self._has_text(token_id):
            logprob = None
        thoughts: Logprobs = ()
        if logprob is not None and self._splitter.in_thinking:
            thoughts = (logprob,)
        elif logprob is not None:
            self._held.append((self._came, logprob))
        reasoning, content = self._splitter.push(token_id)
        return Delta(reasoning, reasoning_logprobs=thoughts) + self._answer(content)

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._markers and bool(self._tokenizer.token_bytes(token_id, skip_special=True))

    def _answer(self, content: str) -> Delta:
        safe, self.hit = self._matcher.push(content)
        self._came += len(content)
        self._shown += len(safe)
        logprobs = []
        while self._held and (self._held[0][0] < self._shown or self._shown == self._came):
            logprobs.append(self._held.popleft()[1])
        return Delta(content=safe, content_logprobs=tuple(logprobs))
