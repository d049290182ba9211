"""A runner without a model whose "latents" are the tokens themselves, kept in pages.

What it draws is a hash of the tokens it reads back through a job's pages, so a page that was handed to two jobs, shared
wrongly or freed too early changes the answer, and `expected` says what the answer has to be.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal
from zlib import crc32

from rorqual.engine.api import EngineInfo, Request, SamplingParams, TokenLogprob
from rorqual.engine.core import Draw, EngineCore, GrammarCompiler, Masks
from rorqual.engine.disk import DiskCache
from rorqual.engine.pages import PagePool
from rorqual.engine.scheduler import Job, Scheduler, Slice
from rorqual.engine.settings import EngineSettings
from rorqual.errors import CheckpointError

VOCAB = 1000
EOS = 1


def next_token(tokens: Sequence[int]) -> int:
    return crc32(repr(list(tokens)).encode()) % VOCAB


def expected(request: Request, max_model_len: int) -> list[int]:
    """The tokens that any engine over `MemoryRunner` must generate for this request."""
    tokens = list(request.prompt)
    limit = request.params.max_tokens or max_model_len
    while len(tokens) - len(request.prompt) < limit and len(tokens) < max_model_len:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.params.stop_token_ids or (tokens[-1] == EOS and not request.params.ignore_eos):
            break
    return tokens[len(request.prompt) :]


class MemoryRunner:
    """before: called with each plan, to fail or to look; faults: ids of requests whose rows are reported faulty;
    draft_depth: it drafts as many tokens at most, right and wrong ones by `random`. A mask is a set of tokens; of
    those the drawn token is the next one upwards."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        before: Callable[[Sequence[Slice]], None] = lambda plan: None,
        draft_depth: int = 0,
    ) -> None:
        self.memory = [[-1] * page_size for _ in range(num_pages)]
        self.page_size, self.before, self.draft_depth = page_size, before, draft_depth
        self.page_bytes, self.read_bytes, self.on_device = 8 * page_size, 0.0, False
        self.random = random.Random(0)
        self.faults: set[str] = set()
        self.wiped: list[int] = []
        self.plans: list[list[tuple[str, int, int]]] = []

    def run(self, plan: Sequence[Slice], masks: Masks | None) -> list[list[Draw]]:
        self.plans.append([(s.job.request.id, s.start, s.count) for s in plan])
        self.before(plan)
        for s in plan:
            assert s.start == s.job.computed and not (s.drafts and not s.samples)
            for at, token in enumerate(s.tokens, s.start):
                self.memory[s.job.pages[at // self.page_size]][at % self.page_size] = token
        allowed = masks() if masks else [[] for _ in plan]
        return [self._draw(s, mask) for s, mask in zip(plan, allowed, strict=True)]

    def draft(self, done: Sequence[tuple[Slice, int]], depth: int) -> list[tuple[int, ...]]:
        assert 1 <= depth <= self.draft_depth
        return [self._guess(s.job, depth) if self._has_grown(s, new) else () for s, new in done]

    def wipe(self, pages: Sequence[int]) -> None:
        self.wiped += pages
        for page in pages:
            self.memory[page] = [-1] * self.page_size

    def shrink(self) -> int:
        pages = len(self.memory) * 3 // 4
        if pages < 2:
            return 0
        self.memory = [[-1] * self.page_size for _ in range(pages)]
        return pages

    def read_page(self, page: int) -> bytes:
        return array("q", self.memory[page]).tobytes()

    def write_page(self, page: int, data: bytes) -> None:
        self.memory[page] = array("q", data).tolist()

    def _draw(self, s: Slice, masks: Sequence[Collection[int]]) -> list[Draw]:
        if s.job.request.id in self.faults:
            return [Draw(fault="told to fail")]
        if not s.samples:
            return []
        read = self._read(s.job)
        draws = []
        for i in range(1 + len(s.drafts)):
            token = next_token(read[: s.start + s.count + i])
            if masks and not masks[i]:
                draws.append(Draw(fault="no token is allowed", asked=True))
                continue
            while masks and token not in masks[i]:
                token = (token + 1) % VOCAB
            draws.append(Draw(token, TokenLogprob(token, -1.0)))
        return draws

    def _read(self, job: Job) -> list[int]:
        return [t for page in job.pages for t in self.memory[page]]

    def _has_grown(self, s: Slice, new: int) -> bool:
        job = s.job
        assert job.computed == s.start + s.count + max(0, new - 1) and len(job.tokens) >= job.computed + (new > 0)
        assert self._read(job)[: job.computed] == job.tokens[: job.computed]
        return new > 0

    def _guess(self, job: Job, depth: int) -> tuple[int, ...]:
        guess: list[int] = []
        for _ in range(self.random.randint(0, depth)):
            guess.append(next_token(job.tokens + guess))
            if self.random.random() < 0.3:
                guess[-1] = self.random.randrange(VOCAB)
        return tuple(guess)


class Clock:
    """A clock that goes on by a second whenever it is read, and by `advance` when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_core(
    pages: int = 40,
    page_size: int = 4,
    max_model_len: int = 100,
    before: Callable[[Sequence[Slice]], None] = lambda plan: None,
    *,
    draft_depth: int = 0,
    speculation: int | Literal["auto"] = "auto",
    cache_dir: Path | None = None,
    capacity_bytes: int = 1 << 20,
    prefix_cache: bool = True,
    grammar_compiler: GrammarCompiler | None = None,
    on_device: bool = False,
    clock: Callable[[], float] = time.monotonic,
    **options: int,
) -> tuple[EngineCore, MemoryRunner]:
    pool = PagePool(pages + 1, page_size, prefix_cache=prefix_cache)
    scheduler = Scheduler(pool, max_model_len=max_model_len, **options)
    runner = MemoryRunner(pages + 1, page_size, before, draft_depth)
    runner.on_device = on_device
    info = EngineInfo("fake", scheduler.max_model_len, VOCAB, (EOS,), pages * page_size)
    disk = None
    if cache_dir:
        disk = DiskCache(cache_dir, page_bytes=runner.page_bytes, identity=b"", capacity_bytes=capacity_bytes)
    core = EngineCore(
        runner, scheduler, info, grammar_compiler=grammar_compiler, speculation=speculation, disk=disk, clock=clock
    )
    return core, runner


def request(id: str, prompt: Sequence[int], *, priority: int = 0, salt: str = "", **params: object) -> Request:
    told = SamplingParams(**{"ignore_eos": True, **params})  # type: ignore[arg-type]
    return Request(id, tuple(prompt), told, priority, salt)


# ---- builders for EngineProcess, importable in its child -------------------------------------------------------------


def build_fake(settings: EngineSettings) -> EngineCore:
    """One token takes a millisecond."""
    return make_core(400, 64, 20000, lambda plan: time.sleep(0.001))[0]


def build_single(settings: EngineSettings) -> EngineCore:
    """Like `build_fake`, one request at a time."""
    return make_core(400, 64, 20000, lambda plan: time.sleep(0.001), max_num_seqs=1)[0]


def build_slow(settings: EngineSettings) -> EngineCore:
    time.sleep(60)
    raise AssertionError


def build_refusing(settings: EngineSettings) -> EngineCore:
    raise CheckpointError("model.safetensors is truncated", remedy="copy it again")


def build_foreign(settings: EngineSettings) -> EngineCore:
    raise ZeroDivisionError("not one of ours")


def build_hanging(settings: EngineSettings) -> EngineCore:
    """Hangs in its first step."""
    return make_core(400, 64, 20000, lambda plan: time.sleep(60))[0]


def build_doomed(settings: EngineSettings) -> EngineCore:
    """Its runner fails, and wiping fails too: the device is gone."""

    def fail(plan: Sequence[Slice]) -> None:
        raise RuntimeError("device lost")

    core, runner = make_core(400, 64, 20000, fail)
    runner.wipe = fail  # type: ignore[method-assign, assignment]
    return core
