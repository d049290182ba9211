"""Any order of arrivals, aborts, steps, faults, lack of memory and restarts: every page is accounted for after every step,
every request ends exactly once, and its tokens are the right ones, with speculation, priorities, preemption, both caches
or without."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rorqual.engine.api import FinishReason, Output, Request
from rorqual.engine.core import EngineCore, OutOfMemory
from rorqual.engine.scheduler import Slice
from rorqual.errors import CapacityError, PromptTooLong, RequestError
from tests.unit.engine.fakes import VOCAB, expected, make_core, request

PAGE = 4
FILE_BYTES = 200  # more than a page's file, less than two


def assert_accounted(core: EngineCore) -> None:
    """Free, idle and referenced pages are all there are; references are the owners'; a page with several owners stands
    at the same place of the same, fully computed prefix."""
    pool = core.scheduler.pool
    owners: Counter[int] = Counter()
    content: dict[int, list[int]] = {}
    for job in core.scheduler.running:
        assert len(job.pages) >= pool.pages_for(job.computed)
        for i, page in enumerate(job.pages):
            owners[page] += 1
            tokens = job.tokens[: (i + 1) * PAGE]
            if page in content:
                assert content[page] == tokens and i < len(job.keys) and pool.entry(page)
            content[page] = tokens
    assert all(not job.pages and not job.drafts for job in core.scheduler.waiting)
    assert 0 not in owners
    assert all(pool.references(page) == owners[page] for page in range(pool.num_pages))
    assert pool.free + pool.idle + len(owners) == pool.usable
    assert core.stats.pages_used == len(owners) and core.stats.pages_free == pool.available


ARRIVAL = st.tuples(
    st.integers(0, 40),
    st.lists(st.integers(2, 3), max_size=5),
    st.integers(1, 30),
    st.integers(0, 2),
    st.sampled_from(["", "", "tenant"]),
    st.booleans(),
)
"""Tokens that all prompts begin with, own tokens, max_tokens, priority, salt, ignore_eos."""


class Engine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.directory = Path(tempfile.mkdtemp())
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.fails = self.exhausted = False
        self.shrunk = 0
        self.may_fail: set[str] = set()

    @initialize(
        pages=st.integers(3, 20),
        max_num_seqs=st.integers(1, 5),
        max_batched_tokens=st.sampled_from([1, 6, 8, 30]),
        draft_depth=st.integers(0, 3),
        measured=st.booleans(),
        on_disk=st.booleans(),
        capacity=st.sampled_from([3, 1000]),
        prefix_cache=st.booleans(),
        lookahead=st.booleans(),
    )
    def start(
        self,
        pages: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        draft_depth: int,
        measured: bool,
        on_disk: bool,
        capacity: int,
        prefix_cache: bool,
        lookahead: bool,
    ) -> None:
        def build() -> EngineCore:
            core, self.runner = make_core(
                pages,
                PAGE,
                max_model_len=50,
                before=self.before,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max_batched_tokens,
                max_waiting=4,
                draft_depth=draft_depth,
                speculation="auto" if measured else draft_depth,
                prefix_cache=prefix_cache,
                lookahead=lookahead,
                cache_dir=self.directory if on_disk and prefix_cache else None,
                capacity_bytes=capacity * FILE_BYTES,
            )
            return core

        self.build = build
        self.core = build()
        self.limit = self.core.info.max_model_len

    def before(self, plan: Sequence[Slice]) -> None:
        budget = max(self.core.scheduler.max_batched_tokens, len(plan)) + PAGE
        assert sum(len(s.tokens) for s in plan) <= budget
        if self.exhausted:
            self.exhausted = False
            self.shrunk += 1
            raise OutOfMemory("told to")
        if self.fails:
            self.fails = False
            self.may_fail |= {s.job.request.id for s in plan}
            raise RuntimeError("told to fail")

    @rule(arrivals=st.lists(ARRIVAL, min_size=1, max_size=4))
    def add(self, arrivals: list[tuple[int, list[int], int, int, str, bool]]) -> None:
        for arrival in arrivals:
            self.add_one(*arrival)

    def add_one(self, shared: int, own: list[int], max_tokens: int, priority: int, salt: str, ignore_eos: bool) -> None:
        name = str(len(self.requests))
        prompt = [7] * shared + own
        # A stop token that one answer in ten comes upon.
        stop = range(9, VOCAB, 300)
        new = request(
            name,
            prompt,
            priority=priority,
            salt=salt,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop,
        )
        limit = self.core.info.max_model_len
        try:
            self.core.add(new)
        except RequestError as error:
            too_long, full = len(prompt) + max_tokens > limit, not self.core.has_room
            assert not prompt or (too_long if isinstance(error, PromptTooLong) else full)
            assert isinstance(error, PromptTooLong | CapacityError) or not prompt
        else:
            self.requests[name], self.outputs[name] = new, []

    @rule(times=st.integers(1, 25))
    def step(self, times: int) -> None:
        for _ in range(times):
            for output in self.core.step():
                self.outputs[output.request_id].append(output)
            assert_accounted(self.core)
            if self.core.disk:
                self.core.disk.flush()  # so that a failing example fails again

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.core.abort(data.draw(st.sampled_from(sorted(self.requests))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), whole_step=st.booleans())
    def fail(self, data: st.DataObject, whole_step: bool) -> None:
        """The next step, or one request in whatever step computes it."""
        self.fails = whole_step
        if not whole_step:
            self.runner.faults.add(data.draw(st.sampled_from(sorted(self.requests))))
            self.may_fail |= self.runner.faults

    @rule()
    def run_out_of_memory(self) -> None:
        """The next step finds no memory: at worst, what no longer fits ends; where nothing can shrink, that step's do."""
        self.exhausted = True

    @rule()
    def restart(self) -> None:
        """Memory is lost, the disk is not."""
        self.drain()
        self.core.close()
        self.core = self.build()

    @invariant()
    def pages_are_accounted_for(self) -> None:
        if hasattr(self, "core"):
            assert_accounted(self.core)

    def drain(self) -> None:
        for _ in range(2000):
            if not self.core.busy:
                break
            self.step(1)
        pool = self.core.scheduler.pool
        assert not self.core.busy and self.core.scheduler.idle and pool.available == pool.usable

    def teardown(self) -> None:
        if hasattr(self, "core"):
            self.drain()
            self.core.close()
            for name, sent in self.requests.items():
                check_answer(sent, self.outputs[name], self.limit)
                error = self.outputs[name][-1].error
                assert name in self.may_fail or not error or (self.shrunk and "memory" in str(error))
        shutil.rmtree(self.directory)
        logging.disable(logging.NOTSET)


def check_answer(sent: Request, outputs: list[Output], limit: int) -> None:
    assert [bool(o.finish_reason) for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [bool(o.stats) for o in outputs] == [bool(o.finish_reason) for o in outputs]
    tokens = [t for o in outputs for t in o.token_ids]
    assert [p.token_id for o in outputs for p in o.logprobs] == tokens
    want = expected(sent, limit)
    last = outputs[-1]
    if last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        assert tokens == want[: len(tokens)] and bool(last.error) == (last.finish_reason is FinishReason.ERROR)
    else:
        assert tokens == want
    assert len({o.cached_tokens for o in outputs if o.token_ids}) <= 1
    stats = last.stats
    assert stats and stats.accepted <= stats.drafted and stats.disk_tokens <= stats.cached_tokens <= len(sent.prompt)


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
