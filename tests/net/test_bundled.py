"""`make serve` as a client sees it: the official openai client against the bundled model in its own process."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.bundled import ROOT, bundled_server

MODEL = "rorqual-nano"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with bundled_server() as started:
        yield started


@pytest.fixture
def client(server: tuple[str, subprocess.Popen[str]]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, text: str, **options):  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL and model.model_extra and model.model_extra["thinking"] is True


def test_an_answer_streams(client: openai.OpenAI) -> None:
    stream = ask(client, "Who are you?", stream=True, temperature=0, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(texts) > 3 and "rorqual" in "".join(texts)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None and usage.model_extra is not None
    hit, miss = usage.model_extra["prompt_cache_hit_tokens"], usage.model_extra["prompt_cache_miss_tokens"]
    assert hit + miss == usage.prompt_tokens


def test_thinking_comes_first_and_apart(client: openai.OpenAI) -> None:
    answer = ask(client, "What is 47 + 38?", temperature=0, extra_body={"thinking": {"type": "enabled"}})
    message = answer.choices[0].message
    assert "85" in message.reasoning_content and "85" in (message.content or "")
    assert "think" not in (message.content or "")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 10


def test_greedy_answers_repeat_and_a_long_prefix_is_cached(client: openai.OpenAI) -> None:
    text = "Please listen to this. " + "The whale swims in the sea and sings a song. " * 12 + "What does the whale do?"
    first = ask(client, text, temperature=0, max_tokens=24)
    second = ask(client, text, temperature=0, max_tokens=24)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.model_extra["prompt_cache_hit_tokens"] == 0
    assert second.usage.model_extra["prompt_cache_hit_tokens"] >= 64


def test_two_at_once(client: openai.OpenAI) -> None:
    alone = [
        ask(client, q, temperature=0, max_tokens=32).choices[0].message.content for q in ("Hello!", "What is a dog?")
    ]
    together: dict[str, str] = {}

    def run(question: str) -> None:
        together[question] = ask(client, question, temperature=0, max_tokens=32).choices[0].message.content

    threads = [threading.Thread(target=run, args=(q,)) for q in ("Hello!", "What is a dog?")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [together["Hello!"], together["What is a dog?"]] == alone


def test_bad_requests_are_told_and_the_server_goes_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(client, "word " * 3000)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError):
        ask(client, "hi", max_tokens=-1)
    assert ask(client, "Hello!", max_tokens=5).choices[0].message.content


def test_the_readmes_client_example_runs(server: tuple[str, subprocess.Popen[str]]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "OpenAI(" in b]
    exec(compile(code.replace("http://127.0.0.1:8000", server[0]), "README.md", "exec"), {})


def test_ending_the_server_ends_its_engine() -> None:
    with bundled_server() as (_, process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = children.read_text().split() if children.is_file() else []
        process.terminate()
        process.wait(20)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)
