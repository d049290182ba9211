"""An engine without a model: it answers from scripts, for tests and benchmarks of everything above the engine.

Why not mock the Engine protocol in each test: the interesting behaviour is in time and in endings (a client that
leaves, an engine that fails after seven tokens, a full queue), and those must be played the same way everywhere.
A script says which tokens follow a prompt, how fast, and how it ends; the engine keeps the rules that every engine
keeps (request checks, max_tokens, stop tokens, exactly one finish reason) and a record for assertions.

    engine = ScriptedEngine([Script(tokens=tokenizer.encode("Hello."), delay_s=0.01)])
    async for output in engine.generate(Request("r1", prompt)): ...
    assert engine.finished == {"r1": FinishReason.STOP} and not engine.live

Left out: sampling (temperature and seed are recorded with the request, not used) and prefix pages (cached_tokens
follows a rule: full units of 64 tokens that an earlier prompt of the same salt began with).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from rorqual.engine.api import EngineInfo, FinishReason, Output, Request, RequestStats, TokenLogprob, check_request
from rorqual.engine.stats import EngineStats
from rorqual.errors import CapacityError, RequestError, RorqualError

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """How to answer the prompts that `when` accepts; the first script that accepts a prompt plays.

    tokens: the ids of the answer without end-of-sequence (the engine adds it), or a function of the prompt;
    delay_s: before each output; tokens_per_output: how many ids one output carries; gate: awaited before each
    output (an `asyncio.Event().wait` holds the answer until the test sets it); stats: what the last output tells;
    refuse: raised by `generate` itself;
    fail_after: the request ends in `error` (or one that says so) once so many ids have been sent.
    """

    tokens: Sequence[int] | Callable[[Prompt], Sequence[int]] = ()
    when: Callable[[Prompt], bool] = lambda prompt: True
    delay_s: float = 0.0
    tokens_per_output: int = 1
    gate: Callable[[], Awaitable[object]] | None = None
    stats: RequestStats | None = None
    refuse: RequestError | None = None
    fail_after: int | None = None
    error: Exception | None = None

    def answer(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokens(prompt) if callable(self.tokens) else self.tokens)


SCRIPTED_INFO = EngineInfo(
    model="scripted", max_model_len=4096, vocab_size=129280, eos_token_ids=(1,), cache_tokens=1 << 20
)


class ScriptedEngine:
    """The Engine protocol over scripts. `seen`, `live`, `aborted` and `finished` are there for assertions:
    every request in `seen` ends up in exactly one of `aborted` (its reader left) and `finished`."""

    def __init__(
        self,
        scripts: Sequence[Script] = (),
        info: EngineInfo = SCRIPTED_INFO,
        *,
        max_live: int | None = None,
        cached_tokens: Callable[[Prompt], int] | None = None,
    ) -> None:
        self.scripts = list(scripts)
        self.max_live = max_live
        self.seen: list[Request] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.finished: dict[str, FinishReason] = {}
        self._info = info
        self._memory = _PrefixMemory()
        self._cached_tokens = (lambda request: cached_tokens(request.prompt)) if cached_tokens else self._memory
        self._counts = EngineStats()
        self._alive = True
        self._death: RorqualError | None = None

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def ready(self) -> bool:
        return self._alive

    @property
    def stats(self) -> EngineStats:
        return replace(self._counts, running=len(self.live))

    async def start(self) -> None:
        self._alive, self._death = True, None

    async def stop(self) -> None:
        self.die(RorqualError("the engine was stopped"))

    def die(self, error: RorqualError | None = None) -> None:
        """What a crash looks like from above: live requests end in `error` at their next output, new ones raise."""
        self._alive, self._death = False, error or RorqualError("the scripted engine died")

    def forget(self) -> None:
        """Drop the records, for tests of memory over many requests. Those that live stay."""
        self.seen.clear()
        self.aborted.clear()
        self.finished.clear()
        self._memory.prefixes.clear()

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if not self._alive:
            raise self._death or RorqualError("the engine is not running")
        check_request(request, self._info)
        script = next((s for s in self.scripts if s.when(request.prompt)), Script())
        if script.refuse is not None:
            raise script.refuse
        if self.max_live is not None and len(self.live) >= self.max_live:
            raise CapacityError(f"{len(self.live)} requests are running or waiting", remedy="try again later")
        return self._play(request, script)

    async def _play(self, request: Request, script: Script) -> AsyncGenerator[Output, None]:
        self.seen.append(request)
        self.live.add(request.id)
        cached = self._cached_tokens(request)
        self._counts.prefill_tokens += len(request.prompt) - cached
        self._counts.cache_hit_tokens += cached
        self._counts.cache_miss_tokens += len(request.prompt) - cached
        tokens, reason = self._cast(request, script)
        failing = script.fail_after is not None and script.fail_after < len(tokens)
        if failing:
            tokens = tokens[: script.fail_after]
        try:
            for start in range(0, len(tokens), script.tokens_per_output):
                await (script.gate() if script.gate else asyncio.sleep(script.delay_s))
                if self._death is not None:
                    yield self._end(request, FinishReason.ERROR, cached=cached, error=self._death)
                    return
                part = tokens[start : start + script.tokens_per_output]
                if start + len(part) < len(tokens) or failing:
                    yield Output(request.id, part, self._logprobs(request, part), cached)
                else:
                    yield replace(self._end(request, reason, part, cached), stats=script.stats)
            if failing:
                error = script.error or RorqualError("the scripted engine failed as its script says")
                yield self._end(request, FinishReason.ERROR, cached=cached, error=error)
        finally:
            if request.id in self.live:
                self.live.remove(request.id)
                self.aborted.append(request.id)

    def _cast(self, request: Request, script: Script) -> tuple[tuple[int, ...], FinishReason]:
        """The whole answer as the limits leave it, and how it ends."""
        params, eos = request.params, self._info.eos_token_ids
        room = self._info.max_model_len - len(request.prompt)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        answer = script.answer(request.prompt)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
        told = tuple(islice(cycle(answer or eos), limit)) if params.ignore_eos else (*answer, eos[0])[:limit]
        end = next((i for i, token in enumerate(told) if token in stops), None)
        if end is None:
            return told, FinishReason.LENGTH
        return told[: end + 1], FinishReason.STOP

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        cached: int = 0,
        error: Exception | None = None,
    ) -> Output:
        self.live.discard(request.id)
        self.finished[request.id] = reason
        return Output(request.id, tokens, self._logprobs(request, tokens), cached, reason, error)

    def _logprobs(self, request: Request, tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        """Plausible and fixed: the scripted token is likely, its neighbours in the vocabulary follow at a distance."""
        n = request.params.logprobs
        if n is None:
            return ()
        vocab = self._info.vocab_size
        return tuple(TokenLogprob(t, -0.1, tuple(((t + i) % vocab, -0.1 - 3.0 * i) for i in range(n))) for t in tokens)


class _PrefixMemory:
    """The rule behind `cached_tokens`: the longest run of full 64-token units that an earlier prompt of the same salt
    began with, never the whole prompt."""

    def __init__(self) -> None:
        self.prefixes: set[tuple[str, Prompt]] = set()

    def __call__(self, request: Request) -> int:
        salt, prompt = request.salt, request.prompt
        ends = range(64, len(prompt), 64)
        hit = max((end for end in ends if (salt, prompt[:end]) in self.prefixes), default=0)
        self.prefixes.update((salt, prompt[:end]) for end in range(64, len(prompt) + 1, 64))
        return hit
