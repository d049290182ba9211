"""Reasoning and stop strings: what is streamed does not depend on how it was cut."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import special
from rorqual.data.reasoning import ReasoningSplitter
from rorqual.data.stop import StopMatcher
from rorqual.data.tokenizer import Tokenizer

FORGERY = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from(["<think>", "</think>", "🐋", "鲸"])), max_size=6
).map("".join)


def split(splitter: ReasoningSplitter, ids: list[int]) -> tuple[str, str]:
    parts = [*(splitter.push(i) for i in ids), splitter.flush()]
    return "".join(r for r, _ in parts), "".join(c for _, c in parts)


@settings(deadline=None, max_examples=100)
@given(thought=FORGERY, answer=FORGERY)
def test_reasoning_and_content_are_told_apart_by_token(small: Tokenizer, thought: str, answer: str) -> None:
    inside, outside = small.encode(thought), small.encode(answer)
    tail = [small.special("</think>"), *outside, small.eos_id]
    prompted = ReasoningSplitter(small, in_thinking=True)
    assert split(prompted, inside + tail) == (thought, answer)
    opened = ReasoningSplitter(small, in_thinking=False)
    assert split(opened, [small.special("<think>"), *inside, *tail]) == (thought, answer)
    assert prompted.reasoning_tokens == opened.reasoning_tokens == len(inside)
    assert split(ReasoningSplitter(small, in_thinking=False), outside) == ("", answer)
    assert split(ReasoningSplitter(small, in_thinking=True), inside) == (thought, "")


def test_half_a_character_stays_on_its_side_of_the_border(small: Tokenizer) -> None:
    whale = "🐋".encode()
    by_byte = {small.token_bytes(i): i for i in range(small.vocab_size)}
    ids = [by_byte[bytes([b])] for b in whale]
    splitter = ReasoningSplitter(small, in_thinking=True)
    assert split(splitter, [*ids[:2], small.special("</think>"), *ids]) == ("\ufffd", "🐋")


@given(data=st.data())
def test_the_end_marker_of_a_model_without_thinking_changes_nothing(deepseek: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(FORGERY)
    splitter = ReasoningSplitter(deepseek, in_thinking=False)
    assert split(splitter, [deepseek.special("</think>"), *deepseek.encode(text)]) == ("", text)


LETTERS = st.text("ab c🐋", max_size=30)
STOPS = st.lists(st.text("ab c🐋", min_size=1, max_size=5), max_size=4)


def definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first; of several complete at once, the longest."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400)
@given(text=LETTERS, stops=STOPS, data=st.data())
def test_any_chunking_gives_what_the_definition_says(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopMatcher(tuple(stops))
    shown, hit = "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        safe, hit = matcher.push(text[start:end])
        shown += safe
        assert definition(text, stops)[0].startswith(shown), "shown text is never taken back"
        if not hit and stops:
            held = text[len(shown) : end]
            assert held == "" or any(s.startswith(held) for s in stops), "nothing is held back without reason"
    if not hit:
        shown += matcher.flush()
    assert (shown, hit) == definition(text, stops)
    assert (matcher.matched in stops) == hit


def test_stops_across_tokens_overlaps_and_after_the_end() -> None:
    matcher = StopMatcher(("\nUser:", "User: x", "###"))
    assert matcher.push("hello\nUs") == ("hello", False)
    assert matcher.push("er") == ("", False)
    assert matcher.push(": x") == ("", True)
    assert matcher.matched == "\nUser:"
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""
    assert StopMatcher(()).push("all of it") == ("all of it", False)
    restarted = StopMatcher(("aab",))
    assert [restarted.push(c) for c in "aaab"] == [("", False), ("", False), ("a", False), ("", True)]


def test_long_hostile_stop_strings_cost_no_more_than_their_text() -> None:
    matcher = StopMatcher(tuple("a" * n + "b" for n in (5000, 7000)))
    rng = random.Random(0)
    shown = "".join(matcher.push("a" * rng.randint(1, 9))[0] for _ in range(4000))
    assert set(shown) == {"a"}


def test_special_names_are_distinct() -> None:
    assert len(set(special.SPECIAL_TOKENS)) == len(special.SPECIAL_TOKENS) == 22
