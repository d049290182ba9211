"""A missed prefix cache says where the prompt diverged and why; nobody learns anything of others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.diagnosis import PromptRecord, asked
from rorqual.serve.events import Usage
from tests.net.harness import Harness, running

SYSTEM = {"role": "system", "content": "the whale takes in a whole sea " * 20}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}
DIG = {"type": "function", "function": {"name": "dig", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Harness]:
    with running(tokenizer, context=4096) as harness:
        yield harness


def said(*texts: str) -> list[dict[str, Any]]:
    """A conversation behind the system message."""
    roles = ("user", "assistant")
    return [SYSTEM, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


def ask(server: Harness, user: str, messages: list[dict[str, Any]], named: str | None = None, **more: Any) -> Any:
    body = {"user_id": user} | more.pop("extra_body", {})
    if named:
        body["prompt_cache_options"] = {"comparison_response_id": named}
    return server.client().chat.completions.create(model="tiny", messages=messages, extra_body=body, **more)


OTHER = SYSTEM | {"content": "the sea " + SYSTEM["content"]}
CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "first message": ({"messages": [OTHER, *said("a")[1:]]}, "input_changed", "messages[0]"),
    "a turn": ({"messages": said("krill", "b", "c")}, "input_changed", "messages[1]"),
    "fewer": ({"messages": said("a")}, "context_compacted", "messages[1]"),
    "tools": ({"messages": said("a", "b", "c"), "tools": [PAINT]}, "tools_changed", "tools"),
    "order": ({"messages": said("a", "b", "c"), "tools": [DIG, PAINT]}, "tools_changed", "tools"),
    "model": ({"messages": said("a", "b", "c"), "tools": [PAINT, DIG]}, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_reason_and_the_place(server: Harness, change: str) -> None:
    server.script("ok")
    user = f"u{random.randrange(1 << 40)}"
    tools = {"tools": [PAINT, DIG]} if change != "fewer" and change != "a turn" and change != "first message" else {}
    first = ask(server, user, said("a", "b", "c"), **tools)
    fields, reason, part = CHANGES[change]
    found = ask(server, user, **fields).to_dict().get("prompt_cache_diagnostics")
    prompts = [request.prompt for request in server.engine.seen[-2:]]
    shared = next((i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b), min(map(len, prompts)))
    if not reason:
        assert found == {"type": "cache_hit"} and shared == len(prompts[0])
        return
    assert (found["type"], found["reason"], found["comparison_response_id"]) == ("cache_miss", reason, first.id)
    assert found["diverged_at"] == {"token": shared, "part": part} and str(shared) in found["message"]
    assert found["cache_missed_tokens"] == len(prompts[1]) - shared
    assert found["comparison_reusable_tokens"] == shared // 64 * 64
    # The same by the name of the answer, though others came since, and streamed.
    ask(server, user, said("z"))
    stream = ask(server, user, **fields, named=first.id, stream=True, stream_options={"include_usage": True})
    assert list(stream)[-1].to_dict()["prompt_cache_diagnostics"] == found


def test_going_on_is_a_hit_and_the_first_has_nothing_to_compare_with(server: Harness) -> None:
    server.script("ok")
    user = f"u{random.randrange(1 << 40)}"
    assert "prompt_cache_diagnostics" not in ask(server, user, said("a")).to_dict()
    for found in (ask(server, user, said("a", "b", "c")), ask(server, user, said("a", "b", "c", "d", "e"))):
        assert found.to_dict()["prompt_cache_diagnostics"] == {"type": "cache_hit"}


def test_other_users_answers(server: Harness) -> None:
    """Within a key a named answer of another user is a reason; without its name it is not looked at."""
    server.script("ok")
    ann, bob = (f"u{random.randrange(1 << 40)}" for _ in range(2))
    first = ask(server, ann, said("a"))
    assert "prompt_cache_diagnostics" not in ask(server, bob, said("a")).to_dict()
    found = ask(server, bob, said("a", "b", "c"), first.id).to_dict()["prompt_cache_diagnostics"]
    assert found["reason"] == "prompt_cache_key_changed"
    found = ask(server, bob, said("a", "b", "c"), "chatcmpl-none").to_dict()["prompt_cache_diagnostics"]
    assert found["type"] == "comparison_response_not_found"


def test_responses_and_anthropic(server: Harness) -> None:
    server.script("ok")
    client, text = server.client(), SYSTEM["content"]
    user = {"user_id": f"u{random.randrange(1 << 40)}"}
    one = client.responses.create(model="tiny", instructions=text, input="a", extra_body=user)
    options = {"comparison_response_id": one.id}
    two = client.responses.create(
        model="tiny", instructions=text, input="b", prompt_cache_options=options, extra_body=user
    )  # type: ignore[arg-type]
    told = two.prompt_cache_diagnostics
    assert told is not None and told.type == "cache_miss" and told.reason == "input_changed"
    assert told.comparison_reusable_tokens and told.comparison_reusable_tokens >= 64

    messages = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0).messages
    ask_: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]}
    first = messages.create(**ask_, system=text)
    assert first.diagnostics is None
    for system, kind in ((text, None), (text + "!", "system_changed")):
        with messages.stream(**ask_, system=system, diagnostics={"previous_message_id": first.id}) as stream:
            deltas = [event for event in stream if event.type == "message_delta"]
        whole = messages.create(**ask_, system=system, diagnostics={"previous_message_id": first.id})
        reason = whole.diagnostics and whole.diagnostics.cache_miss_reason
        assert (reason and reason.type) == kind
        assert (deltas[0].diagnostics or {}).get("cache_miss_reason", {}).get("type") == kind  # type: ignore[attr-defined]
    unknown = messages.create(**ask_, diagnostics={"previous_message_id": "msg_none"})
    assert unknown.diagnostics and unknown.diagnostics.cache_miss_reason
    assert unknown.diagnostics.cache_miss_reason.type == "previous_message_not_found"


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_where_two_prompts_part(one: list[int], two: list[int]) -> None:
    record = PromptRecord()
    messages = [{"role": "user", "content": str(ids)} for ids in (one, two)]
    shape = {"model": "m", "thinking": False}
    assert record.compare("k", "", asked("1", one, messages[:1], [], **shape), None) is None
    comparison = record.compare("k", "", asked("2", two, messages[1:], [], **shape), None)
    assert comparison is not None
    found = comparison.diagnose(Usage(len(two), 0, 0, 0))
    shared = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    if shared < len(one):
        assert found["diverged_at"]["token"] == shared
    else:
        assert found["type"] == "unavailable"


def test_the_record_is_bounded() -> None:
    record, shape = PromptRecord(max_bytes=4000), {"model": "m", "thinking": False}
    for i in range(100):
        record.compare("k", f"u{i % 3}", asked(str(i), range(100), [], [], **shape), None)
    known = [
        i for i in range(100) if (c := record.compare("k", "x", asked("n", (), [], [], **shape), str(i))) and c.before
    ]
    assert known == list(range(known[0], 100)) and 8 <= len(known) <= 10
