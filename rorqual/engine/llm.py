"""The engine for programs: text (or ids, or messages) in, completions out, in this process.

    llm = LLM("rorqual-mini")
    for completion in llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=64)):
        print(completion.text)

It adds to the core what the core does not know: the tokenizer, the chat template, thinking, and stop strings. All
prompts of a call are computed together, in as many batches as the cache and `max_num_seqs` allow; a `stream` may be
open at the same time. With `SamplingParams.n` above 1 each prompt has as many completions, one after the other in the
list; with a seed, number i draws as seed + i does, so that number 0 is the answer without `n`. Left out: threads (one
thread uses an LLM) and a server (that is `rorqual serve`).
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rorqual.config import resolve_model
from rorqual.data.reasoning import ReasoningSplitter
from rorqual.data.stop import StopMatcher
from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo, FinishReason, Output, Request, SamplingParams, TokenLogprob, check_request
from rorqual.engine.core import EngineCore
from rorqual.engine.load import build_core, load_core
from rorqual.engine.settings import EngineSettings
from rorqual.engine.stats import EngineStats
from rorqual.errors import DataError, RequestError
from rorqual.model.transformer import Transformer

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]
Report = Callable[[int, int], None]  # requests done, tokens generated


@dataclass(frozen=True, slots=True)
class Usage:
    """completion_tokens includes thought, markers and the end of sequence; cached_tokens are among prompt_tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """text: without thought, special tokens and the stop string that ended it; token_ids: everything generated;
    logprobs: one per token id, if asked for; finish_reason: "stop" or "length"; index: which of the prompt's n."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    reasoning: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """New final text of a stream; the last one of a stream carries the whole completion."""

    text: str = ""
    reasoning: str = ""
    completion: Completion | None = None


class LLM:
    """model: a directory or a bundled name (None: the default one); the keywords are `EngineSettings`'.

    Raises ConfigError, CheckpointError, DataError or BackendUnavailable when the model cannot be loaded.
    """

    def __init__(
        self, model: str | Path | None = None, *, dtype: str = "auto", device: str = "auto", **settings: Any
    ) -> None:
        path = resolve_model(model)
        told = EngineSettings(str(path), dtype=dtype, device=device, **settings)
        self._start(load_core(told), Tokenizer.load(path), lambda: ChatTemplate.load(path))

    @classmethod
    def around(
        cls, model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None = None, **settings: Any
    ) -> LLM:
        """An engine around a model in memory, as rollouts and evaluations need it. The weights are shared: whoever
        changes them between calls passes prefix_cache=False, or answers would rest on latents of the old ones."""
        llm = cls.__new__(cls)
        told = EngineSettings("", **settings)
        core = build_core(model, told, name="in memory", eos_token_ids=model.cfg.eos_token_ids)
        llm._start(core, tokenizer, lambda: template or ChatTemplate("v3"))
        return llm

    def _start(self, core: EngineCore, tokenizer: Tokenizer, template: Callable[[], ChatTemplate]) -> None:
        self.tokenizer = tokenizer
        self._core, self._template = core, template
        # Also when the program ends: pages on their way to the disk are written then.
        self.close = weakref.finalize(self, core.close)
        self._live: dict[str, _Answer] = {}
        self._count = 0

    @property
    def info(self) -> EngineInfo:
        return self._core.info

    @property
    def stats(self) -> EngineStats:
        """What the engine has counted so far."""
        return self._core.stats

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def template(self) -> ChatTemplate:
        """Loaded when first needed: a base model need not have one that can be recognised."""
        return self._template()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """One completion (or `n`) per prompt, in order. Text gets a beginning-of-sequence token, ids are taken as they
        are.

        Raises RequestError (PromptTooLong) before anything is computed if a prompt cannot run, and RorqualError if the
        engine fails on one of them.
        """
        many = [prompts] if isinstance(prompts, str) else list(cast("Sequence[Prompt]", prompts))
        return self._run([(self._ids(p), None) for p in many], params, progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        thinking: bool = False,
        progress: bool = False,
    ) -> list[Completion]:
        """One completion (or `n`) per conversation; a single one may be given as it is. Raises as `generate`, and
        DataError for messages the template cannot render."""
        one = bool(messages) and isinstance(messages[0], Mapping)
        many = cast("Sequence[Messages]", [messages] if one else messages)
        return self._run([self._conversation(m, thinking) for m in many], params, progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The completion of one prompt as it appears. Closing the iterator aborts it. Raises RequestError for n > 1."""
        return self._stream(self._ids(prompt), None, params)

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, *, thinking: bool = False
    ) -> Iterator[Delta]:
        """The answer to one conversation as it appears. Closing the iterator aborts it. Raises as `stream`."""
        return self._stream(*self._conversation(messages, thinking), params)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        return (self.tokenizer.bos_id, *self.tokenizer.encode(prompt))

    def _conversation(self, messages: Messages, thinking: bool) -> tuple[tuple[int, ...], bool]:
        if thinking and not self.template.supports_thinking:
            raise DataError("this model's chat template knows no thinking", remedy="leave thinking out")
        ids = self.template.encode(self.tokenizer, messages, thinking=thinking)
        return tuple(ids), self.template.starts_in_thinking(thinking)

    def _run(
        self,
        prompts: Sequence[tuple[tuple[int, ...], bool | None]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[Completion]:
        each = _per_prompt(params, len(prompts))
        answers = [
            self._answer(ids, p, inside, index)
            for (ids, inside), asked in zip(prompts, each, strict=True)
            for index, p in enumerate(_alternatives(asked))
        ]
        queue = deque(answers)
        active: list[_Answer] = []
        done = tokens = 0
        with _progress_bar(len(answers)) if progress else _silence() as report:
            try:
                while queue or active:
                    while queue and self._core.has_room:
                        active.append(queue.popleft())
                        self._submit(active[-1])
                    self._step()
                    for answer in (a for a in active if a.ended):
                        if answer.error:
                            raise answer.error
                        done, tokens = done + 1, tokens + len(answer.token_ids)
                    active = [a for a in active if not a.ended]
                    report(done, tokens + sum(len(a.token_ids) for a in active))
            finally:
                self._abandon(active)
        return [a.completion() for a in answers]

    def _stream(self, ids: tuple[int, ...], in_thinking: bool | None, params: SamplingParams | None) -> Iterator[Delta]:
        params = params or SamplingParams()
        if params.n > 1:
            raise RequestError(f"a stream is one completion, not {params.n}", remedy="open several", param="n")
        return self._deltas(self._answer(ids, params, in_thinking))

    def _deltas(self, answer: _Answer) -> Iterator[Delta]:
        try:
            self._submit(answer)
            told = False
            while not told:
                if not answer.ended:  # it may have ended in a step that someone else asked for
                    self._step()
                if answer.error:
                    raise answer.error
                told = answer.ended
                text, reasoning = answer.news()
                if told or text or reasoning:
                    yield Delta(text, reasoning, answer.completion() if told else None)
        finally:
            self._abandon([answer])

    def _answer(
        self, ids: tuple[int, ...], params: SamplingParams, in_thinking: bool | None, index: int = 0
    ) -> _Answer:
        self._count += 1
        request = Request(f"{self._count}", ids, params.spelled(self.tokenizer.encode))
        check_request(request, self.info)
        stop_ids = request.params.stop_ids(self.info.eos_token_ids)
        return _Answer(request, self.tokenizer, in_thinking, index, stop_ids)

    def _submit(self, answer: _Answer) -> None:
        self._core.add(answer.request)
        self._live[answer.request.id] = answer

    def _step(self) -> None:
        """One step for everything that is open here, whoever asked for it."""
        for output in self._core.step():
            answer = self._live.get(output.request_id)
            if answer is not None:
                answer.read(output)
                if answer.ended:
                    del self._live[output.request_id]
                    if output.finish_reason is None:  # a stop string, of which the core knows nothing
                        self._core.abort(output.request_id)

    def _abandon(self, answers: Sequence[_Answer]) -> None:
        for answer in answers:
            if self._live.pop(answer.request.id, None):
                self._core.abort(answer.request.id)


class _Answer:
    """One completion while it grows: ids to text, thinking split off, stop strings found in the answer only."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, in_thinking: bool | None, index: int, stop_ids: frozenset[int]
    ) -> None:
        self.request, self.index = request, index
        self._stop_ids = stop_ids
        self.token_ids: list[int] = []
        self.ended = False
        self.error: Exception | None = None
        self._reason = FinishReason.LENGTH
        self._logprobs: list[TokenLogprob] = []
        self._cached = 0
        self._splitter = None if in_thinking is None else ReasoningSplitter(tokenizer, in_thinking)
        self._detokenizer = tokenizer.stream()
        self._matcher = StopMatcher(request.params.stop)
        self._text, self._reasoning = _Text(), _Text()

    def read(self, output: Output) -> None:
        self._cached, self.error = output.cached_tokens, output.error
        for i, token in enumerate(output.token_ids):
            self.token_ids.append(token)
            self._logprobs += output.logprobs[i : i + 1]
            last = i == len(output.token_ids) - 1
            stopped = output.finish_reason is FinishReason.STOP and last and token in self._stop_ids
            if not stopped and self._push(token):  # the token that stops is not text
                self._finish(FinishReason.STOP)
                return
        if output.finish_reason is not None:
            text = self._flush()
            shown, hit = self._matcher.push(text)
            self._text.add(shown if hit else shown + self._matcher.flush())
            self._finish(FinishReason.STOP if hit else output.finish_reason)

    def news(self) -> tuple[str, str]:
        """Text and thought since the last call."""
        return self._text.news(), self._reasoning.news()

    def completion(self) -> Completion:
        thought = self._splitter.reasoning_tokens if self._splitter else 0
        return Completion(
            text=self._text.all(),
            token_ids=tuple(self.token_ids),
            finish_reason=self._reason,
            usage=Usage(len(self.request.prompt), len(self.token_ids), self._cached, thought),
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
            reasoning=self._reasoning.all(),
            index=self.index,
        )

    def _push(self, token: int) -> bool:
        reasoning, text = self._splitter.push(token) if self._splitter else ("", self._detokenizer.push(token))
        self._reasoning.add(reasoning)
        shown, hit = self._matcher.push(text)
        self._text.add(shown)
        return hit

    def _flush(self) -> str:
        reasoning, text = self._splitter.flush() if self._splitter else ("", self._detokenizer.flush())
        self._reasoning.add(reasoning)
        return text

    def _finish(self, reason: FinishReason) -> None:
        self.ended, self._reason = True, reason


@dataclass(slots=True)
class _Text:
    parts: list[str] = field(default_factory=list)
    told: int = 0

    def add(self, text: str) -> None:
        if text:
            self.parts.append(text)

    def news(self) -> str:
        new, self.told = "".join(self.parts[self.told :]), len(self.parts)
        return new

    def all(self) -> str:
        return "".join(self.parts)


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{count} prompts were given with {len(params)} sampling parameters", param="params")
    return list(params)


def _alternatives(params: SamplingParams) -> Iterator[SamplingParams]:
    """What each of the n completions is asked with."""
    for i in range(params.n):
        yield replace(params, n=1, seed=None if params.seed is None else params.seed + i)


@contextmanager
def _progress_bar(total: int) -> Iterator[Report]:
    """A bar of finished requests with the rate of tokens."""
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # On standard error: what is generated may go to standard output.
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate="")
        begin = time.monotonic()

        def report(done: int, tokens: int) -> None:
            elapsed = max(time.monotonic() - begin, 1e-3)
            bar.update(task, completed=done, rate=f"{tokens / elapsed:.0f} tokens/s")

        yield report


@contextmanager
def _silence() -> Iterator[Report]:
    yield lambda done, tokens: None
