"""Speculation changes how fast the tokens come and nothing else, and goes on only where it is faster."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from rorqual.engine.core import EngineCore
from rorqual.engine.scheduler import Slice
from rorqual.engine.speculation import INTERVAL, TRIAL, WARM_UP, Controller
from rorqual.errors import ConfigError
from tests.unit.engine.fakes import Clock, expected, make_core, request


def play(controller: Controller, steps: int, drafting_s: float, plain_s: float, batch: int = 1) -> list[bool]:
    """The arms that so many decoding steps run, if a token costs so many seconds with drafts (2 a step) and without."""
    arms = []
    for n in range(steps):
        on = controller.choose(batch, fresh=n % 50 == 0) > 0
        controller.observe(batch, on, 2 * drafting_s if on else plain_s, 2 if on else 1)
        arms.append(on)
    return arms


@pytest.mark.parametrize("pays", [True, False])
def test_both_arms_are_tried_and_the_faster_one_runs(pays: bool) -> None:
    controller = Controller(1)
    arms = play(controller, 5000, 0.01 if pays else 0.03, 0.02)
    first = 2 * (TRIAL + WARM_UP)
    assert set(arms[:first]) == {True, False}
    assert arms[first : first + INTERVAL] == [pays] * INTERVAL
    rare = arms[first:].count(not pays)
    assert TRIAL <= rare < 0.06 * len(arms), "the slower arm is looked at now and then"
    assert controller.seconds_per_token(1) == pytest.approx((0.01 if pays else 0.03, 0.02))


def test_the_choice_follows_the_measurement_when_it_turns() -> None:
    controller = Controller(2)
    assert play(controller, 2000, 0.01, 0.02)[-1]
    assert not play(controller, 2000, 0.03, 0.02)[-1]
    assert play(controller, 2000, 0.01, 0.02)[-1]


def test_batch_sizes_are_judged_apart() -> None:
    controller = Controller(1)
    for _ in range(20):
        play(controller, 100, 0.01, 0.02, batch=1)
        play(controller, 100, 0.03, 0.02, batch=5)
    assert controller.choose(1) == 1 and controller.choose(4) == controller.choose(7) == 0


def test_a_trial_of_drafting_waits_for_a_prompt() -> None:
    controller = Controller(1)
    play(controller, 100, 0.03, 0.02)
    for _ in range(3 * INTERVAL):
        assert controller.choose(1) == 0
        controller.observe(1, False, 0.02, 1)
    assert controller.choose(1, fresh=True) == 1


def test_a_hiccup_does_not_decide() -> None:
    controller = Controller(1)
    for n in range(2 * (TRIAL + WARM_UP) + 1):
        on = controller.choose(1) > 0
        hiccup = 5.0 if n == 7 else 0.0
        controller.observe(1, on, hiccup + (0.02 if on else 0.018), 2 if on else 1)
    assert controller.choose(1) == 1


def test_fixed_depth_is_always_on_and_zero_always_off() -> None:
    for depth in (0, 2):
        controller = Controller(depth, measured=False)
        assert play(controller, 1000, 0.03, 0.02) == [depth > 0] * 1000
    assert not any(play(Controller(0), 100, 0.01, 0.02))


def run(core: EngineCore, count: int = 4) -> dict[str, list[int]]:
    """Answers to `count` requests; each equals what has to come."""
    requests = [request(str(n), [5 + n] * (3 + 5 * n), max_tokens=30 + n) for n in range(count)]
    answers: dict[str, list[int]] = {r.id: [] for r in requests}
    for r in requests:
        core.add(r)
    while core.busy:
        for output in core.step():
            answers[output.request_id] += output.token_ids
            assert len(output.logprobs) == len(output.token_ids)
    assert answers == {r.id: expected(r, core.info.max_model_len) for r in requests}
    return answers


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_save_steps_and_change_no_token(depth: int) -> None:
    plain, _ = make_core(100)
    drafting, _ = make_core(100, draft_depth=depth, speculation=depth)
    assert run(plain) == run(drafting)
    stats = drafting.stats
    assert stats.steps < plain.stats.steps and 0.2 < stats.acceptance < 1
    assert stats.new_tokens == plain.stats.new_tokens
    assert stats.decode_tokens + stats.accepted == plain.stats.decode_tokens


def test_drafts_give_way_to_budget_and_pages() -> None:
    most, across = [0], [0]

    def before(plan: Sequence[Slice]) -> None:
        most[0] = max(most[0], sum(len(s.tokens) for s in plan if s.job.generated))
        across[0] += sum(s.start // 4 != (s.start + len(s.drafts)) // 4 for s in plan)

    core, _ = make_core(100, before=before, draft_depth=3, speculation=3, max_batched_tokens=6)
    run(core)
    assert most[0] == 6 and across[0] > 0, "drafts go on into a new page"
    small, _ = make_core(10, max_model_len=40, draft_depth=3, speculation=3)
    requests = [request(str(n), [5 + n], max_tokens=39) for n in range(2)]
    for r in requests:
        small.add(r)
    preempted = 0
    while small.busy:
        free_before = small.scheduler.pool.available
        small.step()
        if small.scheduler.preemptions > preempted:
            preempted = small.scheduler.preemptions
            assert free_before == 0, "a draft's page is never worth a preemption"


def test_drafting_that_fails_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    core, runner = make_core(100, draft_depth=1, speculation=1)

    def fail(*arguments: object) -> list[tuple[int, ...]]:
        raise RuntimeError("no memory for drafts")

    runner.draft = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.CRITICAL):
        run(core)
    assert core.stats.draft_depth == 0 and core.stats.draft_tokens == 0


def test_the_engine_stops_drafting_where_it_is_slower() -> None:
    clock = Clock()

    def before(plan: Sequence[Slice]) -> None:
        clock.advance(10 if not any(s.drafts for s in plan) else 40)

    core, _ = make_core(300, max_model_len=900, before=before, draft_depth=1, clock=clock)
    core.add(request("long", [5], max_tokens=600))
    while core.busy:
        core.step()
    assert core.stats.draft_depth == 0
    with_drafts, plain = core.speculation.seconds_per_token(1)
    assert with_drafts > plain > 0


def test_a_depth_without_a_drafter_is_refused() -> None:
    with pytest.raises(ConfigError, match="can draft no tokens"):
        make_core(speculation=1)
    with pytest.raises(ConfigError, match="at most 1"):
        make_core(draft_depth=1, speculation=2)
    assert make_core(draft_depth=3)[0].speculation.depth == 1
