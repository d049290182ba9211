"""The published schedules at their own size, and that every budget is the same picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rorqual.cli.main import app
from rorqual.config import load_toml
from rorqual.errors import ConfigError
from rorqual.train.config import BalanceConfig, DataConfig, OptimConfig, Piece, RunConfig, ScheduleConfig, Source
from rorqual.train.dry_run import draw, sparkline
from rorqual.train.schedule import Timeline, value

T = 1e12


def v3(tokens: int, batch: int = 15360, seq_len: int = 4096, **more: object) -> Timeline:
    cfg = RunConfig(
        out="x", data=DataConfig(train=(Source("s"),), seq_len=seq_len), tokens=tokens, batch=batch, model="test",
        optim=OptimConfig(lr=2.2e-4), schedule=ScheduleConfig("deepseek-v3"),
    )  # fmt: skip
    return Timeline(dataclasses.replace(cfg, **more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def published() -> Timeline:
    return v3(int(14.8 * T))


def step_at(line: Timeline, tokens: float) -> int:
    """The step in which this token is learned, by bisection over the layout."""
    low, high = 0, line.steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if line.tokens(middle + 1) >= tokens else (middle + 1, high)
    return low


def test_the_published_run_has_the_published_numbers(published: Timeline) -> None:
    """DeepSeek-V3 section 4.2, in its own tokens and steps."""

    def lr(tokens: float) -> float:
        return published.learning_rate(step_at(published, tokens))

    # A warm-up of 2,000 steps, although nothing here is said in steps.
    peak = next(s for s in range(5000) if published.learning_rate(s) == pytest.approx(2.2e-4, rel=1e-9))
    assert abs(peak - 2000) <= 2
    assert published.learning_rate(1000) == pytest.approx(1.1e-4, rel=0.15)
    assert lr(5 * T) == lr(9.99 * T) == pytest.approx(2.2e-4)
    assert lr(12.15 * T) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)  # the middle of the cosine
    assert lr(14.31 * T) == lr(14.6 * T) == pytest.approx(2.2e-5)
    assert lr(14.64 * T) == lr(14.8 * T) == pytest.approx(7.3e-6)
    assert published.batch(0) == 3072 and published.batch(step_at(published, 0.47 * T)) == 15360
    assert published.batch(step_at(published, 0.2345 * T)) == pytest.approx((3072 + 15360) / 2, rel=1e-3)
    assert [published.gamma(step_at(published, t * T)) for t in (1, 14.29, 14.31, 14.8)] == [1e-3, 1e-3, 0, 0]
    weights = [published.mtp_weight(step_at(published, t * T)) for t in (1, 9.99, 10.01, 14.8)]
    assert weights == pytest.approx([0.3, 0.3, 0.1, 0.1])


def test_the_layout_adds_up(published: Timeline) -> None:
    """A fixed batch would take 235,240 steps; the ramp takes more, by its integral."""
    assert published.tokens(published.steps) >= 14.8 * T > published.tokens(published.steps - 1)
    import math

    slope = 12288 / 469e9
    ramp = math.log(15360 / 3072) / (slope * 4096)
    assert published.steps == pytest.approx(ramp + (14.8e12 - 469e9) / (15360 * 4096), rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(200_000, 30_000_000), batch=st.integers(4, 64))
def test_any_budget_is_a_faithful_miniature(tokens: int, batch: int) -> None:
    """At equal fractions of the tokens, equal values, but for the width of a step."""
    small = v3(tokens, batch, 64)
    covered = [small.batch(s) for s in range(small.steps)]
    assert sum(covered) == small.first_row(small.steps) and covered == sorted(covered)
    assert all(small.first_row(s + 1) - small.first_row(s) == n for s, n in enumerate(covered))
    for s in range(0, small.steps, max(1, small.steps // 50)):
        x = small.fraction(s)
        expected = 2.2e-4 * (1.0 if 0.0019 < x <= 10 / 14.8 else 0.1 if 14.3 / 14.8 < x <= 14.633 / 14.8 else -1)
        if expected > 0:
            assert small.learning_rate(s) == pytest.approx(expected)
        assert small.gamma(s) == (1e-3 if x <= 14.3 / 14.8 else 0)
    assert small.learning_rate(small.steps - 1) == pytest.approx(7.3e-6)


def test_pieces_in_a_run_file_stand_instead_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "out = 'x'\ntokens = 64000\nbatch = 10\nmodel = 'test'\n[data]\nseq_len = 64\n[[data.train]]\npath = 's'\n"
        "[[schedule.lr]]\nuntil = 0.5\nto = 1.0\nshape = 'linear'\nstart = 0.5\n[[schedule.lr]]\nuntil = 1.0\nto = 0.25\n"
        "[[schedule.batch]]\nuntil = 1.0\nto = 0.5\n"
    )
    line = Timeline(load_toml(RunConfig, path, ["optim.lr=2.0"]))
    assert line.steps == 200 and {line.batch(s) for s in range(200)} == {5}
    assert line.learning_rate(49) == pytest.approx(1.5) and line.learning_rate(99) == pytest.approx(2.0)
    assert line.learning_rate(100) == line.learning_rate(199) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": ScheduleConfig(lr=(Piece(0.5, 1.0),))}, "end at 1.0"),
        ({"schedule": ScheduleConfig(lr=(Piece(0.5, 1.0), Piece(0.5, 0.1), Piece(1.0, 0.1)))}, "must rise"),
        ({"schedule": ScheduleConfig(batch=(Piece(1.0, 1.0, "linear"),))}, "needs a `start`"),
        ({"schedule": ScheduleConfig(batch=(Piece(1.0, 2.0),))}, r"\(0, 1\]"),
        ({"optim": OptimConfig(warmup_steps=7)}, "optim.warmup_steps has no effect"),
        ({"balance": BalanceConfig(off_fraction=0.5)}, "balance.off_fraction has no effect"),
        ({"steps": 100}, "steps or as tokens"),
        ({"optim": OptimConfig(beta2=0.999, moments="bfloat16")}, "moments = float32"),
        ({"optim": OptimConfig(momentum=0.9)}, "momentum belongs to"),
    ],
)
def test_schedules_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        v3(10_000_000, 8, 64, **change)


def test_a_ramp_needs_its_budget_in_tokens() -> None:
    cfg = RunConfig(
        out="x", data=DataConfig(train=(Source("s"),)), steps=10, batch=8, model="test",
        schedule=ScheduleConfig("deepseek-v3"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="tokens instead of steps"):
        Timeline(cfg)


def test_curves_meet_at_their_borders() -> None:
    pieces = (Piece(0.25, 2.0, "linear"), Piece(0.75, 1.0, "cosine"), Piece(1.0, 0.5))
    assert [value(pieces, x) for x in (0.0, 0.125, 0.25, 0.5, 0.75, 0.76, 1.0)] == pytest.approx(
        [0.0, 1.0, 2.0, 1.5, 1.0, 0.5, 0.5]
    )


def test_every_schedule_is_drawn(tmp_path: Path) -> None:
    line = v3(1_000_000, 16, 64)
    assert draw(line, tmp_path / "schedules.svg")
    text = (tmp_path / "schedules.svg").read_text()
    assert text.count('id="axes_') == len(line.curves()) == 4
    x, y = line.curves()["batch (sequences)"]
    assert y[0] == line.batch(0) and y[-1] == 16 and x[-1] == line.tokens(line.steps)
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"


def test_a_dry_run_shows_everything_and_trains_nothing(tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[3] / "runs" / "v3-miniature" / "pretrain.toml"
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--set", f"out={tmp_path}/run"])
    assert result.exit_code == 0, result.output
    line = Timeline(load_toml(RunConfig, file))
    for words in (
        'recipe = "deepseek-v3"',
        f"2,000,000 tokens in {line.steps} steps",
        "0.3 at first",
        "micro_batch = 15",
    ):
        assert words in result.output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["schedules.png"]
    assert (tmp_path / "run" / "schedules.png").read_bytes().startswith(b"\x89PNG")
