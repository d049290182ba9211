"""From an engine's token ids to what people read: `produce` drives a job's engine requests and yields its events.

A job is one request of a client: an engine request for each of its choices. Leaving the iterator early aborts them all.

Log-probabilities travel with their text: when a possible stop string is held back, so are its tokens', and
when it was one, they are dropped with it, so that the tokens listed are the tokens of the text shown. Tokens
without text (the end of sequence, the markers) are counted in the usage and not listed, and those of tool calls are not
listed either.

Thought, answer and calls are told apart by token id. A call ends a thought even where the model forgot the marker, or
the call would be swallowed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from rorqual.data.reasoning import ReasoningSplitter
from rorqual.data.special import END_THINK, THINK
from rorqual.data.stop import StopMatcher
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import CallPiece, CallReader
from rorqual.engine.api import FinishReason, Output, Request, TokenLogprob
from rorqual.errors import RequestError, RorqualError
from rorqual.serve.errors import engine_gone
from rorqual.serve.events import Event, Finish, Logprobs, Reason, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from rorqual.serve.served import ServedModel


@dataclass(frozen=True, slots=True)
class Job:
    """requests: one for each choice, `n` of each prompt in a row; in_thinking: whether the prompt ends inside a thought;
    reads_calls: whether the markers of tool calls mean calls; plain: completions, where no marker means anything."""

    served: ServedModel
    requests: tuple[Request, ...]
    in_thinking: bool = False
    reads_calls: bool = False
    plain: bool = False
    n: int = 1

    @property
    def prompt_tokens(self) -> int:
        """Of each prompt once."""
        return sum(len(request.prompt) for request in self.requests[:: self.n])


@dataclass(slots=True)
class _Counts:
    """Sums over the choices; `cached` over the first of each prompt: the others read what it has written."""

    completion: int = 0
    reasoning: int = 0
    cached: int = 0


async def produce(job: Job) -> AsyncGenerator[Event, None]:
    """Raises what the engine raises or says; HTTPException 503 where the reason is that it is not alive."""
    counts = _Counts()
    choices = [_choice(job, i, counts) for i in range(len(job.requests))]
    try:
        async with aclosing(choices[0] if len(choices) == 1 else _merged(choices)) as events:
            async for event in events:
                yield event
        yield Usage(job.prompt_tokens, counts.completion, counts.reasoning, counts.cached)
    except Exception as error:
        if not job.served.engine.alive and not isinstance(error, RequestError):
            raise engine_gone() from error
        raise


async def _choice(job: Job, index: int, counts: _Counts) -> AsyncGenerator[Event, None]:
    request = job.requests[index]
    path = _TextPath(job, request, index)
    async with aclosing(job.served.engine.generate(request)) as outputs:
        async for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise output.error or RorqualError("the engine ended this request early")
            for event in path.read(output):
                yield event
            if path.ended:
                counts.completion += path.tokens
                counts.reasoning += path.reasoning_tokens
                counts.cached += output.cached_tokens if index % job.n == 0 else 0
                return
    raise RorqualError("the engine ended this request without a reason")


async def _merged(streams: list[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """The events of all as they come; the first error ends all."""
    news: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def drain(stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    news.put_nowait(event)
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    tasks = [asyncio.create_task(drain(stream)) for stream in streams]
    try:
        open_ = len(tasks)
        while open_:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_ -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:  # one whose task never ran was not closed by it
            await stream.aclose()


class _Plain:
    """A `ReasoningSplitter` for text that has no thoughts: every marker is shown."""

    in_thinking = False
    reasoning_tokens = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream = tokenizer.stream()

    def push(self, token_id: int) -> tuple[str, str]:
        return "", self._stream.push(token_id)

    def flush(self) -> tuple[str, str]:
        return "", self._stream.flush()

    leave = flush


@dataclass(slots=True)
class _TextPath:
    """Ids of one choice in, events out: thinking and calls split off by id, characters whole, stop strings found in the
    answer only."""

    job: Job
    request: Request
    index: int
    ended: bool = False
    tokens: int = 0
    _splitter: ReasoningSplitter | _Plain = field(init=False)
    _calls: CallReader = field(init=False)
    _matcher: StopMatcher = field(init=False)
    _markers: frozenset[int] = field(init=False)
    _stop_ids: frozenset[int] = field(init=False)
    _came: int = 0  # characters of the answer that came from the splitter
    _shown: int = 0  # ... of them, how many went out
    _held: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)  # (where in the answer it begins, the token)

    def __post_init__(self) -> None:
        job = self.job
        tokenizer = job.served.tokenizer
        names = () if job.plain else (THINK, END_THINK)
        self._markers = frozenset(tokenizer.special(name) for name in names if tokenizer.has_special(name))
        self._splitter = _Plain(tokenizer) if job.plain else ReasoningSplitter(tokenizer, job.in_thinking)
        self._calls = CallReader(tokenizer, job.served.template.tool_form)
        self._matcher = StopMatcher(self.request.params.stop)
        self._stop_ids = self.request.params.stop_ids(job.served.engine.info.eos_token_ids)

    @property
    def reasoning_tokens(self) -> int:
        return self._splitter.reasoning_tokens

    def read(self, output: Output) -> Iterator[Event]:
        """The last event of the choice is its Finish."""
        last = len(output.token_ids) - 1 if output.finish_reason is FinishReason.STOP else -1
        for i, token_id in enumerate(output.token_ids):
            self.tokens += 1
            if i == last and token_id in self._stop_ids:
                break
            yield from self._push(token_id, output.logprobs[i] if output.logprobs else None)
            if self._matcher.matched is not None:
                yield self._finish("stop")
                return
        if output.finish_reason is not None:
            yield from self._flush()
            yield self._finish("length" if output.finish_reason is FinishReason.LENGTH else "stop")

    def _finish(self, reason: Reason) -> Finish:
        self.ended = True
        if self._calls.count and reason == "stop":
            reason = "tool_calls"
        return Finish(reason, self._matcher.matched, self.index)

    def _push(self, token_id: int, logprob: TokenLogprob | None) -> Iterator[Event]:
        if self._calls.active or (self.job.reads_calls and token_id == self._calls.begin):
            if not self._calls.active:
                yield from self._before_calls()
            yield from self._call(self._calls.push(token_id))
            return
        if logprob is not None and not self._has_text(token_id):
            logprob = None
        thoughts: Logprobs = ()
        if logprob is not None and self._splitter.in_thinking:
            thoughts = (logprob,)
        elif logprob is not None:
            self._held.append((self._came, logprob))
        reasoning, text = self._splitter.push(token_id)
        if reasoning or thoughts:
            yield ReasoningDelta(reasoning, thoughts, self.index)
        yield from self._answer(text)

    def _before_calls(self) -> Iterator[Event]:
        """The thought and the answer are over; what was held back in them is text."""
        reasoning, text = self._splitter.leave()
        if reasoning:
            yield ReasoningDelta(reasoning, choice=self.index)
        yield from self._answer(text)
        if self._matcher.matched is None:
            yield from self._rest()

    def _call(self, piece: CallPiece | None) -> Iterator[Event]:
        if piece is None:
            return
        call_id = f"call_{uuid.uuid4().hex}" if piece.name is not None else None
        yield ToolCallDelta(piece.index, piece.arguments, call_id, piece.name, self.index)

    def _flush(self) -> Iterator[Event]:
        """What was held back in case more would follow."""
        if self._calls.active:
            yield from self._call(self._calls.flush())
            return
        reasoning, text = self._splitter.flush()
        if reasoning:
            yield ReasoningDelta(reasoning, choice=self.index)
        yield from self._answer(text)
        if self._matcher.matched is None:
            yield from self._rest()

    def _rest(self) -> Iterator[Event]:
        text, logprobs = self._matcher.flush(), tuple(logprob for _, logprob in self._held)
        self._held.clear()
        self._shown = self._came
        if text or logprobs:
            yield TextDelta(text, logprobs, self.index)

    def _has_text(self, token_id: int) -> bool:
        if token_id in self._markers:
            return False
        return bool(self.job.served.tokenizer.token_bytes(token_id, skip_special=True))

    def _answer(self, text: str) -> Iterator[Event]:
        safe, _ = self._matcher.push(text)
        self._came += len(text)
        self._shown += len(safe)
        logprobs = []
        while self._held and (self._held[0][0] < self._shown or self._shown == self._came):
            logprobs.append(self._held.popleft()[1])
        if safe or logprobs:
            yield TextDelta(safe, tuple(logprobs), self.index)
