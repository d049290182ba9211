"""Every parameter of a chat completion reaches the engine as it was meant, and each list of the documentation is true."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from rorqual.data.special import END_THINK
from rorqual.engine.api import Grammar
from rorqual.engine.scripted import Script
from rorqual.serve.schemas import ACCEPTED, REFUSED
from tests.net.harness import Harness, some_text

HI = [{"role": "user", "content": "hi"}]


def post(server: Harness, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": HI} | body, timeout=20)


def test_sampling_parameters_reach_the_engine(server: Harness, rng: random.Random) -> None:
    server.script("x")
    numbers = {
        "temperature": rng.uniform(0, 2),
        "top_p": rng.uniform(0.1, 1),
        "top_k": rng.randint(1, 50),
        "min_p": rng.random(),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.5, 2),
        "min_tokens": rng.randint(1, 5),
        "seed": rng.randint(-(2**60), 2**60),
    }
    bias = {str(rng.randrange(300)): 5, "7": -100.0}
    assert (
        post(
            server, **numbers, max_tokens=20, logit_bias=bias, bad_words=["sea"], user_id="u-1", cache_salt="s"
        ).status_code
        == 200
    )
    request = server.engine.seen[-1]
    for name, value in numbers.items():
        assert getattr(request.params, name) == value
    assert dict(request.params.logit_bias) == {int(token): value for token, value in bias.items()}
    assert tuple(server.tokenizer.encode(" sea")) in request.params.bad_token_ids and request.params.bad_words == ()
    assert request.salt.endswith("u-1/s")


def test_n_choices_with_one_usage(server: Harness, rng: random.Random) -> None:
    answer = some_text(rng)
    ids = server.script(answer)
    before = len(server.engine.seen)
    client = server.client()
    whole = client.chat.completions.create(model="tiny", messages=HI, n=3, seed=5)
    assert [c.index for c in whole.choices] == [0, 1, 2] and {c.message.content for c in whole.choices} == {answer}
    assert sorted(r.params.seed for r in server.engine.seen[before:]) == [5, 6, 7]
    assert whole.usage.completion_tokens == 3 * (len(ids) + 1)
    assert whole.usage.prompt_tokens == len(server.engine.seen[-1].prompt)
    texts, ends, usage = ["", "", ""], [], None
    for chunk in client.chat.completions.create(
        model="tiny", messages=HI, n=3, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert texts == [answer] * 3 and sorted(ends) == [0, 1, 2]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_one_failing_choice_ends_all(server: Harness, rng: random.Random) -> None:
    server.script(some_text(rng), fail_after=3)
    assert post(server, n=4).status_code == 500


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1]}}}, {"enum": [1]}),
        ({"type": "text"}, None),
    ],
)
def test_a_response_format_is_a_grammar_behind_the_thought(
    server: Harness, wanted: dict[str, Any], schema: dict[str, Any] | None, thinking: bool
) -> None:
    server.script("{}", "hm" if thinking else None)
    mode = {"type": "enabled" if thinking else "disabled"}
    assert post(server, response_format=wanted, thinking=mode).status_code == 200
    grammar = server.engine.seen[-1].params.grammar
    if schema is None:
        assert grammar is None
    else:
        after = (server.tokenizer.special(END_THINK),) if thinking else ()
        assert grammar == Grammar("json_schema", json.dumps(schema), after)


def test_the_token_that_completes_a_grammar_is_shown(server: Harness) -> None:
    """The engine ends a complete document without an end of sequence."""
    ids = server.tokenizer.encode('{"a": 1}')
    server.engine.scripts[:] = [Script(tokens=ids)]
    body = post(server, stop_token_ids=[ids[-1]]).json()["choices"][0]
    assert (body["message"]["content"], body["finish_reason"]) == ('{"a": 1', "stop")  # asked for as a stop token
    body = post(server, max_tokens=len(ids)).json()["choices"][0]
    assert body["message"]["content"] == '{"a": 1}'


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_accepted_fields_are_named_in_a_header(server: Harness, name: str) -> None:
    server.script("x")
    response = post(server, **{name: "low"})
    assert response.status_code == 200 and response.headers["x-rorqual-ignored"] == name
    assert "x-rorqual-ignored" not in post(server).headers


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_fields_are_refused_unless_off(server: Harness, name: str) -> None:
    server.script("x")
    response = post(server, **{name: "please"})
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    for off in REFUSED[name]:
        response = post(server, **{name: off})
        assert response.status_code == 200 and "x-rorqual-ignored" not in response.headers


@pytest.mark.parametrize(("path", "body"), [("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [5]})])
def test_tokenising_refuses_what_it_does_not_know(server: Harness, path: str, body: dict[str, Any]) -> None:
    assert httpx.post(f"{server.url}/{path}", json=body).status_code == 200
    refused = httpx.post(f"{server.url}/{path}", json={**body, "colour": "blue"})
    assert refused.status_code == 400 and "colour" in refused.json()["error"]["message"]
