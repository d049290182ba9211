"""/openapi.json is true: what it forbids is refused, what it allows makes no server error, and every answer fits it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from rorqual.data.tokenizer import Tokenizer
from rorqual.serve.app import PREFIXES, Settings
from tests.net.harness import Harness, running
from tests.net.test_anthropic import script_call

POSTS = (
    "/chat/completions", "/completions", "/responses", "/messages", "/messages/count_tokens", "/tokenize", "/detokenize",
)  # fmt: skip
GETS = ("/health", "/ready", "/metrics", "/models", "/models/{name}")
HI = [{"role": "user", "content": "hi"}]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[Harness]:
    with running(tokenizer, context=4096) as harness:
        yield harness


@pytest.fixture(scope="module")
def document(server: Harness) -> Json:
    return dict(httpx.get(f"{server.url}/openapi.json").json())


@pytest.fixture(scope="module")
def schema(server: Harness) -> Any:
    load_all_checks()
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_of_the_api_is_in_it(document: Json) -> None:
    assert set(POSTS) | set(GETS) <= set(document["paths"])
    assert [one["url"] for one in document["servers"]] == [prefix or "/" for prefix in PREFIXES]
    assert "HTTPValidationError" not in json.dumps(document)


def test_it_needs_a_key_where_all_else_does(tokenizer: Tokenizer) -> None:
    with running(tokenizer, Settings(api_keys=("k",))) as server:
        assert httpx.get(f"{server.url}/openapi.json").status_code == 401
        assert httpx.get(f"{server.url}/openapi.json", headers={"x-api-key": "k"}).status_code == 200


def fuzz(schema: Any, label: str, mode: GenerationMode, examples: int) -> Counter[int]:
    """Statuses. The server may know better than the schema whether fields go together, so a 400 to what it allows is no
    fault; everything else that schemathesis checks is one."""
    method, path = label.split()
    found: Counter[int] = Counter()
    lenient = [CHECKS.get_one("positive_data_acceptance")]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            make_plausible(case.body)
        response = case.call_and_validate(excluded_checks=lenient)
        found[response.status_code] += 1

    run()
    return found


def make_plausible(body: Json) -> None:
    """What no schema can say: which model there is, and which fields contradict each other."""
    body["model"] = "tiny"
    for message in [m for m in body.get("messages") or [] if isinstance(m, dict)]:
        if message.get("content") is None:
            message["content"] = "x"
    for name in ("tool_choice", "reasoning", "min_tokens", "top_logprobs", "logit_bias", "stop_token_ids"):
        body.pop(name, None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = 1 + body[name] % 50


@pytest.mark.parametrize("path", POSTS)
def test_what_it_forbids_is_refused(server: Harness, schema: Any, path: str, request: pytest.FixtureRequest) -> None:
    server.script("It is.")
    found = fuzz(schema, f"POST {path}", GenerationMode.NEGATIVE, request.config.getoption("--examples"))
    assert set(found) <= {400, 404, 405, 413}


@pytest.mark.parametrize("path", POSTS)
def test_what_it_allows_is_answered(server: Harness, schema: Any, path: str, request: pytest.FixtureRequest) -> None:
    server.script("It is.")
    found = fuzz(schema, f"POST {path}", GenerationMode.POSITIVE, request.config.getoption("--examples"))
    assert set(found) <= {200, 400, 404}


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read(schema: Any, path: str) -> None:
    assert set(fuzz(schema, f"GET {path}", GenerationMode.POSITIVE, 5)) <= {200, 404}


def test_no_route_of_conversations_and_search_fails(
    tokenizer: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A few requests to each, as few of them can be valid: most name a conversation that must be there."""
    load_all_checks()
    examples = max(3, request.config.getoption("--examples") // 3)
    with running(tokenizer, Settings(database_url=f"sqlite:///{tmp_path}/chats.sqlite3")) as server:
        server.script("It is.")
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        ours = [o for o in operations if o.path not in (*POSTS, *GETS)]
        assert {"/chats", "/tools/search"} <= {o.path for o in ours}
        for operation in ours:
            found = fuzz(schema, f"{operation.method.upper()} {operation.path}", GenerationMode.POSITIVE, examples)
            assert set(found) <= {200, 204, 400, 404, 409}, (operation.label, found)


# ---- answers of every kind ------------------------------------------------------------------------------------------

PAINT = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
ASKED: list[tuple[str, Json]] = [
    ("/chat/completions", {}),
    ("/chat/completions", LOGPROBS),
    ("/chat/completions", {"n": 2, "thinking": {"type": "enabled"}} | LOGPROBS),
    ("/chat/completions", {"tools": [PAINT]}),
    ("/chat/completions", {"max_tokens": 1}),
    ("/completions", {"prompt": ["one", "two"], "logprobs": 1, "stop": "t"}),
    ("/completions", {"prompt": [5, 6], "suffix": None, "echo": True}),
    ("/responses", {"input": "hi", "instructions": "be", "reasoning": {"effort": "high"}, "top_logprobs": 1}),
    (
        "/responses",
        {"input": "hi", "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]},
    ),
    ("/messages", {"thinking": {"type": "enabled"}, "diagnostics": {"previous_message_id": "msg_0"}}),
    ("/messages", {"tools": [{"name": "weather", "input_schema": {"type": "object"}}]}),
]


@pytest.mark.parametrize(("path", "fields"), ASKED)
def test_answers_and_events_fit(server: Harness, document: Json, path: str, fields: Json) -> None:
    if "tools" in fields:
        script_call(server, "so", "hm")
    else:
        server.script("It is so. " * 3, thought="hm" if "thinking" in fields or "reasoning" in fields else None)
    body = {"model": "tiny", **fields}
    if path in ("/chat/completions", "/messages"):
        body = {"messages": HI, "max_tokens": 300, **body}
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    components = {"components": document["components"]}
    whole = httpx.post(server.url + path, json=body)
    assert whole.status_code == 200, whole.text
    jsonschema.validate(whole.json(), content["application/json"]["schema"] | components)
    more = {"stream": True} | ({"stream_options": {"include_usage": True}} if "completions" in path else {})
    stream = httpx.post(server.url + path, json={**body, **more})
    assert stream.headers["content-type"].startswith("text/event-stream")
    form = content["text/event-stream"]["itemSchema"]["properties"]["data"]
    assert ("anyOf" in form) == ("completions" in path)
    done, form = form.get("anyOf", (None, form))
    assert done in (None, {"const": "[DONE]"})
    event = form["contentSchema"] | components
    data = [line[6:] for line in stream.text.splitlines() if line.startswith("data: ")]
    assert (data[-1] == "[DONE]") == ("completions" in path)
    for text in data:
        if text != "[DONE]":
            jsonschema.validate(json.loads(text), event)


def test_a_wrong_method_is_told_all_that_would_do(server: Harness) -> None:
    for path, methods in (("/v1/chat/completions", "POST"), ("/anthropic/v1/models", "GET"), ("/models/tiny", "GET")):
        answer = httpx.request("PATCH", server.url + path)
        assert answer.status_code == 405 and answer.headers["allow"] == methods, path
