"""A runner without a model whose "latents" are the tokens themselves, kept in pages.

What it draws is a hash of the tokens it reads back through a job's pages, so a page that was handed to two jobs, shared
wrongly or freed too early changes the answer, and `expected` says what the answer has to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from zlib import crc32

from rorqual.engine.api import EngineInfo, Request, SamplingParams
from rorqual.engine.core import Draw, EngineCore
from rorqual.engine.pages import PagePool
from rorqual.engine.scheduler import Scheduler, Slice
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
    """before: called with each plan, to fail or to look; faults: ids of requests whose rows are reported faulty."""

    def __init__(
        self, num_pages: int, page_size: int, before: Callable[[Sequence[Slice]], None] = lambda plan: None
    ) -> None:
        self.memory = [[-1] * page_size for _ in range(num_pages)]
        self.page_size, self.before = page_size, before
        self.faults: set[str] = set()
        self.wiped: list[int] = []
        self.plans: list[list[tuple[str, int, int]]] = []

    def run(self, plan: Sequence[Slice]) -> list[Draw]:
        self.plans.append([(s.job.request.id, s.start, s.count) for s in plan])
        self.before(plan)
        for s in plan:
            for at in range(s.start, s.start + s.count):
                self.memory[s.job.pages[at // self.page_size]][at % self.page_size] = s.job.tokens[at]
        return [self._draw(s) for s in plan]

    def wipe(self, pages: Sequence[int]) -> None:
        self.wiped += pages

    def _draw(self, s: Slice) -> Draw:
        if s.job.request.id in self.faults:
            return Draw(fault="told to fail")
        if not s.samples:
            return Draw()
        read = [t for page in s.job.pages for t in self.memory[page]][: s.start + s.count]
        return Draw(next_token(read))


def make_core(
    pages: int = 40,
    page_size: int = 4,
    max_model_len: int = 100,
    before: Callable[[Sequence[Slice]], None] = lambda plan: None,
    **options: int,
) -> tuple[EngineCore, MemoryRunner]:
    pool = PagePool(pages + 1, page_size)
    scheduler = Scheduler(pool, max_model_len=max_model_len, **options)
    runner = MemoryRunner(pages + 1, page_size, before)
    info = EngineInfo("fake", scheduler.max_model_len, VOCAB, (EOS,), pages * page_size)
    return EngineCore(runner, scheduler, info), runner


def request(id: str, prompt: Sequence[int], **params: object) -> Request:
    return Request(id, tuple(prompt), SamplingParams(**{"ignore_eos": True, **params}))  # type: ignore[arg-type]


# ---- builders for EngineProcess, importable in its child -------------------------------------------------------------


def build_fake(settings: EngineSettings) -> EngineCore:
    """One token takes a millisecond."""
    return make_core(400, 64, 20000, lambda plan: time.sleep(0.001))[0]


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
