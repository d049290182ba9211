"""Scheduling and the core over a runner whose pages can be read: right tokens, one ending each, nothing left behind."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.api import FinishReason, Grammar, Output, Request
from rorqual.engine.core import EngineCore
from rorqual.engine.pages import Published
from rorqual.engine.scheduler import Slice
from rorqual.errors import CapacityError, PromptTooLong, RequestError, RorqualError
from tests.unit.engine.fakes import VOCAB, Clock, expected, make_core, next_token, request


def drain(core: EngineCore) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    for _ in range(10_000):
        if not core.busy:
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def tokens(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def random_prompt(n: int) -> list[int]:
    return random.choices(range(2, VOCAB), k=n)


def assert_empty(core: EngineCore) -> None:
    pool = core.scheduler.pool
    assert core.scheduler.idle and pool.available == pool.usable


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_traffic_gives_the_right_tokens_and_leaves_nothing(data: st.DataObject) -> None:
    """Arrivals, aborts, shared prefixes, preemption and chunking at random, over a cache that is mostly too small."""
    pages = data.draw(st.integers(3, 20))
    core, _ = make_core(
        pages,
        max_model_len=60,
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_batched_tokens=data.draw(st.sampled_from([1, 6, 8, 30])),
    )
    limit = core.info.max_model_len
    requests: dict[str, Request] = {}
    outputs: dict[str, list[Output]] = {}
    aborted: set[str] = set()
    for n in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            prompt = [7] * data.draw(st.integers(0, limit - 2)) + data.draw(st.lists(st.integers(2, 4), max_size=6))
            prompt = (prompt or [5])[: limit - 1]
            req = request(str(n), prompt, max_tokens=data.draw(st.integers(1, limit - len(prompt))))
            req = replace(req, salt=data.draw(st.sampled_from(["", "ann", "bob"])))
            requests[req.id] = req
            core.add(req)
        elif action == "abort" and requests:
            victim = data.draw(st.sampled_from(sorted(requests)))
            aborted.add(victim)
            core.abort(victim)
        else:
            for output in core.step():
                outputs.setdefault(output.request_id, []).append(output)
        check_sharing(core)
    for id, rest in drain(core).items():
        outputs.setdefault(id, []).extend(rest)
    for id, req in requests.items():
        reasons = [o.finish_reason for o in outputs[id] if o.finish_reason]
        assert len(reasons) == 1 and outputs[id][-1].finish_reason == reasons[0]
        want = expected(req, limit)
        if reasons[0] is FinishReason.ABORT:
            assert id in aborted and tokens(outputs[id]) == want[: len(tokens(outputs[id]))]
        else:
            assert tokens(outputs[id]) == want
        assert len({o.cached_tokens for o in outputs[id] if o.token_ids}) <= 1
    assert_empty(core)


def check_sharing(core: EngineCore) -> None:
    """A page in two running jobs stands at the same place of the same, fully computed prefix, under the same salt; and a
    page that a job found or published is known by a key that begins at its own salt's root, whoever had the page before."""
    pool = core.scheduler.pool
    size = pool.page_size
    owners: dict[int, tuple[str, list[int]]] = {}
    for job in core.scheduler.running:
        parent = pool.root(job.request.salt)
        for i, page in enumerate(job.pages):
            held = (job.request.salt, job.tokens[: (i + 1) * size])
            if page in owners:
                assert owners[page] == held and i < len(job.keys)
            owners[page] = held
            if i < len(job.keys):
                own = Published.of(parent, job.tokens[i * size : (i + 1) * size])
                assert job.keys[i] == own.key and pool.entry(page) in (own, None)
                parent = own.key
    assert len({pool.root(salt) for salt in ("", "ann", "bob", "/ann", "ann/")}) == 5
    assert 0 not in owners
    assert all(not job.pages for job in core.scheduler.waiting)


def test_decoding_goes_on_beside_a_long_prompt_in_page_sized_chunks() -> None:
    core, runner = make_core(100, max_model_len=200, max_batched_tokens=10)
    core.add(request("short", random_prompt(3), max_tokens=30))
    core.step()
    core.add(request("long", random_prompt(90), max_tokens=2))
    drain(core)
    long = [(start, count) for plan in runner.plans for id, start, count in plan if id == "long"]
    assert all((start + count) % 4 == 0 for start, count in long if start + count < 90)
    assert all(any(id == "short" for id, _, _ in plan) for plan in runner.plans[: len(long)])
    assert all(sum(count for _, _, count in plan) <= 10 for plan in runner.plans)


def test_prompts_are_served_in_order_of_arrival() -> None:
    core, runner = make_core(100, max_model_len=200, max_batched_tokens=16)
    for n in range(5):
        core.add(request(str(n), random_prompt(40), max_tokens=2))
    drain(core)
    first = [next(i for i, plan in enumerate(runner.plans) if any(id == str(n) for id, _, _ in plan)) for n in range(5)]
    assert first == sorted(first)


def test_the_latest_arrival_is_preempted_and_still_gives_the_same_tokens() -> None:
    core, runner = make_core(10, max_model_len=40, max_batched_tokens=40)
    requests = [request(str(n), random_prompt(7), max_tokens=25) for n in range(3)]
    for req in requests:
        core.add(req)
    outputs = drain(core)
    starts = {id: sum(start == 0 for plan in runner.plans for i, start, _ in plan if i == id) for id in "012"}
    assert starts["0"] == 1, "the first arrival is never thrown out"
    restarted = sum(sum(c for p in runner.plans for i, _, c in p if i == r.id) > 7 + 24 for r in requests)
    assert restarted > 0, "this cache is too small for all three at once"
    assert all(tokens(outputs[r.id]) == expected(r, 40) for r in requests)
    assert_empty(core)


def test_prefix_hits_are_reported_and_not_computed_again() -> None:
    core, runner = make_core(100, max_model_len=200)
    prompt = random_prompt(50)
    core.add(request("cold", prompt, max_tokens=3))
    cold = drain(core)["cold"]
    core.add(request("warm", prompt, max_tokens=3))
    warm = drain(core)["warm"]
    assert cold[0].cached_tokens == 0 and warm[0].cached_tokens == 48
    assert tokens(cold) == tokens(warm)
    assert runner.plans[3] == [("warm", 48, 2)]


def test_what_cannot_fit_is_refused_at_once() -> None:
    core, _ = make_core(10, max_model_len=1000, max_waiting=2)
    assert core.info.max_model_len == 40
    with pytest.raises(PromptTooLong):
        core.add(request("long", random_prompt(41)))
    with pytest.raises(PromptTooLong):
        core.add(request("long", random_prompt(10), max_tokens=31))
    with pytest.raises(RequestError):
        core.add(request("empty", []))
    for n in range(2):
        core.add(request(str(n), random_prompt(10), max_tokens=2))
    assert not core.has_room
    with pytest.raises(CapacityError):
        core.add(request("third", random_prompt(10), max_tokens=2))
    with pytest.raises(RequestError):
        core.add(request("1", random_prompt(10), max_tokens=2))
    assert set(drain(core)) == {"0", "1"}
    assert_empty(core)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_everything_at_once(steps: int) -> None:
    core, _ = make_core(40, max_model_len=100, max_batched_tokens=8)
    core.add(request("a", random_prompt(20), max_tokens=50))
    for _ in range(steps):
        core.step()
    core.abort("a")
    core.abort("a")
    core.abort("never seen")
    assert_empty(core)
    assert [o.finish_reason for o in core.step()] == [FinishReason.ABORT]
    assert not core.busy and core.step() == []


def test_endings_by_token() -> None:
    core, _ = make_core()
    prompt = random_prompt(5)
    core.add(request("free", prompt, max_tokens=10))
    answer = tokens(drain(core)["free"])
    core.add(request("stopped", prompt, max_tokens=10, stop_token_ids=(answer[3],)))
    outputs = drain(core)["stopped"]
    assert tokens(outputs) == answer[: answer.index(answer[3]) + 1] and outputs[-1].finish_reason is FinishReason.STOP
    core.add(request("full", random_prompt(90)))
    outputs = drain(core)["full"]
    assert len(tokens(outputs)) == 10 and outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_faulty_row_ends_its_request_alone_and_wipes_its_pages() -> None:
    core, runner = make_core()
    good, bad = request("good", random_prompt(9), max_tokens=20), request("bad", random_prompt(9), max_tokens=20)
    core.add(good)
    core.add(bad)
    outputs = core.step()
    held = set(core.scheduler.running[1].pages[2:])
    runner.faults.add("bad")
    outputs += [o for rest in drain(core).values() for o in rest]
    assert [o.finish_reason for o in outputs if o.request_id == "bad"] == [None, FinishReason.ERROR]
    assert isinstance(outputs[-1].error or next(o.error for o in outputs if o.error), RorqualError)
    assert tokens([o for o in outputs if o.request_id == "good"]) == expected(good, 100)
    assert held <= set(runner.wiped)
    assert_empty(core)


def test_faulty_prompts_are_never_shared() -> None:
    core, runner = make_core()
    prompt = random_prompt(30)
    runner.faults.add("bad")
    core.add(request("bad", prompt, max_tokens=5))
    drain(core)
    core.add(request("next", prompt, max_tokens=5))
    assert drain(core)["next"][0].cached_tokens == 0


def test_an_exception_in_the_runner_ends_that_step_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    fail = [False]

    def before(plan: Sequence[Slice]) -> None:
        if fail.pop():
            raise ValueError("out of something")
        fail.append(False)

    core, _ = make_core(before=before)
    requests = [request(str(n), random_prompt(9), max_tokens=9) for n in range(4)]
    core.add(requests[0])
    core.add(requests[1])
    core.step()
    fail[0] = True
    with caplog.at_level(logging.CRITICAL):
        outputs = core.step()
    assert {o.request_id: o.finish_reason for o in outputs} == {"0": FinishReason.ERROR, "1": FinishReason.ERROR}
    assert all("out of something" in str(o.error) for o in outputs)
    assert_empty(core)
    fail.append(False)
    core.add(requests[2])
    assert tokens(drain(core)["2"]) == expected(requests[2], 100)


def test_priority_decides_who_starts_and_arrival_among_equals() -> None:
    core, runner = make_core(100, max_model_len=200, max_num_seqs=1)
    for name, priority in [("a", 0), ("late", 5), ("b", 1), ("c", 1), ("urgent", -1)]:
        core.add(request(name, random_prompt(9), max_tokens=3, priority=priority))
    drain(core)
    assert list(dict.fromkeys(id for plan in runner.plans for id, _, _ in plan)) == ["urgent", "a", "b", "c", "late"]


def test_the_lowest_priority_is_preempted_first() -> None:
    core, _ = make_core(18, max_model_len=40)
    requests = [request(str(n), random_prompt(7), max_tokens=25, priority=p) for n, p in enumerate([2, 0, 1])]
    for req in requests:
        core.add(req)
    ends = {id: outputs[-1] for id, outputs in drain(core).items()}
    assert {id: o.stats.preemptions > 0 for id, o in ends.items() if o.stats} == {"0": True, "1": False, "2": False}
    assert core.stats.preemptions > 0


def test_a_waiting_request_is_never_overtaken_by_its_equals() -> None:
    """A stream of small requests does not keep a large one from starting."""
    core, runner = make_core(20, max_model_len=80, max_num_seqs=8)
    core.add(request("0", random_prompt(3), max_tokens=40))
    core.step()
    core.add(request("large", random_prompt(70), max_tokens=5))
    for n in range(1, 200):
        core.add(request(str(n), random_prompt(3), max_tokens=10))
        core.step()
        if any(id == "large" for id, _, _ in runner.plans[-1]):
            return
    raise AssertionError("the large one starves")


def test_salts_share_nothing() -> None:
    core, _ = make_core(100, max_model_len=200)
    prompt = random_prompt(50)
    for salt, hit in [("", 0), ("a", 0), ("b", 0), ("a", 48), ("", 48)]:
        core.add(request("r", prompt, max_tokens=2, salt=salt))
        assert drain(core)["r"][0].cached_tokens == hit


class Evens:
    """A grammar of `length` even numbers and then nothing."""

    def __init__(self, length: int) -> None:
        self.left, self.fails = length, False
        self.gives_up = self.forbids_all = False

    @property
    def stopped(self) -> bool:
        return self.left == 0

    def masks(self, drafts: Sequence[int]) -> list[range]:
        if self.fails:
            raise ValueError("too complex")
        if self.gives_up:
            raise RequestError("the grammar has become too large")
        if self.forbids_all:
            return [range(0)] * (1 + len(drafts))
        standing = len(list(takewhile(lambda draft: draft % 2 == 0, drafts)))
        # As of a real one: behind a draft that is not allowed, nothing is.
        return [range(2 if i <= standing else VOCAB, VOCAB, 2) for i in range(1 + len(drafts))]

    def accept(self, token: int) -> None:
        assert token % 2 == 0 and self.left > 0
        self.left -= 1


class EvensCompiler:
    def __init__(self) -> None:
        self.made: list[Evens] = []

    def matcher(self, grammar: Grammar) -> Evens:
        if grammar.kind != "regex":
            raise RequestError("not a grammar", param="grammar")
        self.made.append(Evens(int(grammar.text)))
        return self.made[-1]


def evens(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        token = next_token(tokens)
        tokens.append(next(t % VOCAB for t in range(token, token + 4) if t % VOCAB >= 2 and t % 2 == 0))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("draft_depth", [0, 3])
def test_grammars_rule_what_is_drawn_and_end_the_text(draft_depth: int, on_device: bool) -> None:
    more = {"draft_depth": draft_depth, "speculation": draft_depth, "on_device": on_device}
    core, _ = make_core(100, grammar_compiler=EvensCompiler(), **more)  # type: ignore[arg-type]
    prompts = {"short": random_prompt(9), "cut": random_prompt(5)}
    core.add(request("short", prompts["short"], max_tokens=40, grammar=Grammar("regex", "12")))
    core.add(request("cut", prompts["cut"], max_tokens=20, grammar=Grammar("regex", "99")))
    core.add(free := request("free", random_prompt(6), max_tokens=20))
    outputs = drain(core)
    assert tokens(outputs["short"]) == evens(prompts["short"], 12)
    assert tokens(outputs["cut"]) == evens(prompts["cut"], 20)
    assert tokens(outputs["free"]) == expected(free, 100)
    reasons = [outputs[id][-1].finish_reason for id in ("short", "cut", "free")]
    assert reasons == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.LENGTH]
    core.close()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_grammar_that_fails_ends_its_request_alone(on_device: bool) -> None:
    compiler = EvensCompiler()
    core, _ = make_core(100, grammar_compiler=compiler, on_device=on_device)
    for name in ("good", "bad"):
        core.add(request(name, random_prompt(9), max_tokens=9, grammar=Grammar("regex", "9")))
    core.step()
    compiler.made[1].fails = True
    ends = {id: outputs[-1] for id, outputs in drain(core).items()}
    assert ends["good"].finish_reason is FinishReason.STOP
    assert ends["bad"].finish_reason is FinishReason.ERROR and "too complex" in str(ends["bad"].error)
    assert_empty(core)
    core.close()


@pytest.mark.parametrize(("how", "said"), [("gives_up", "too large"), ("forbids_all", "no token is allowed")])
def test_a_grammar_that_leaves_nothing_is_the_requests_own_fault(how: str, said: str) -> None:
    """A 400 above, not a 500: nothing has failed, and another try would end the same."""
    compiler = EvensCompiler()
    core, _ = make_core(100, grammar_compiler=compiler)
    for name in ("good", "bad"):
        core.add(request(name, random_prompt(9), max_tokens=9, grammar=Grammar("regex", "9")))
    core.step()
    setattr(compiler.made[1], how, True)
    ends = {id: outputs[-1] for id, outputs in drain(core).items()}
    assert ends["good"].finish_reason is FinishReason.STOP and ends["bad"].finish_reason is FinishReason.ERROR
    assert isinstance(ends["bad"].error, RequestError) and said in str(ends["bad"].error)
    assert_empty(core)
    core.close()


def test_grammars_that_cannot_be_are_refused_at_once() -> None:
    core, _ = make_core()
    with pytest.raises(RequestError, match="grammar"):
        core.add(request("r", [5], grammar=Grammar("regex", "9")))
    core, _ = make_core(grammar_compiler=EvensCompiler())
    with pytest.raises(RequestError, match="not a grammar"):
        core.add(request("r", [5], grammar=Grammar("lark", "9")))
    assert not core.busy and core.scheduler.idle
    core.close()


def test_statistics_account_for_every_token_and_second() -> None:
    clock = Clock()
    core, _ = make_core(100, max_num_seqs=1, max_batched_tokens=8, clock=clock, before=lambda plan: clock.advance(10))
    prompt = random_prompt(20)
    core.add(request("a", prompt, max_tokens=4))
    core.add(request("b", prompt, max_tokens=4))
    begin = clock.now
    first = drain(core)
    end = clock.now
    a, b = (first[id][-1].stats for id in "ab")
    assert a and b and all(o.stats is None for o in first["a"][:-1])
    assert (a.steps, a.cached_tokens, a.pages) == (3 + 3, 0, 6) and (b.steps, b.cached_tokens) == (1 + 3, 16)
    assert a.queue_s < 10 <= 30 <= a.prefill_s < 50 and 30 <= a.decode_s < 50
    assert b.queue_s >= a.prefill_s + a.decode_s - 10 and 10 <= b.prefill_s < 20
    assert end - begin - 5 <= b.queue_s + b.prefill_s + b.decode_s <= end
    stats = core.stats
    assert (stats.steps, stats.prefill_tokens, stats.decode_tokens) == (10, 20 + 4, 3 + 3)
    assert (stats.cache_hit_tokens, stats.cache_miss_tokens) == (16, 24) and stats.new_tokens == 8
    assert stats.run_s >= 100 and stats.last.requests == 1 and stats.last.decode_tokens == 1
    assert (stats.waiting, stats.running, stats.pages_used, stats.pages_free) == (0, 0, 0, 100)
    assert stats.pages_published > 0


def test_waiting_counts_to_the_queue_also_without_a_single_step() -> None:
    clock = Clock()
    core, _ = make_core(clock=clock)
    core.add(request("r", [5]))
    clock.advance(100)
    core.abort("r")
    stats = core.step()[0].stats
    assert stats and stats.queue_s > 100 and stats.steps == 0 and stats.prefill_s == stats.decode_s == 0
