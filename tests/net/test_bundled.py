"""The bundled model behind the real `rorqual serve`: a process of its own, its engine's child, OpenAI's own client.

`test_it_knows_its_name_and_adds_when_it_thinks` says what the model can do, tests/web/test_bundled.py and the README's
commands ask the same of it; whatever else is asserted here holds for any model that ends its thoughts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from rorqual.config import DEFAULT_MODEL, ModelConfig, resolve_model
from rorqual.conformance.server import grade
from rorqual.data.special import FIM_HOLE
from rorqual.data.tokenizer import Tokenizer
from tests.net.harness import eventually

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"chat: (http://127\.0\.0\.1:\d+)   API: (http://127\.0\.0\.1:\d+/v1)   \(Ctrl-C stops\)")
SERVE = (sys.executable, "-m", "rorqual", "serve", "--port", "0")
GREEDY: dict[str, Any] = {"model": DEFAULT_MODEL, "temperature": 0}
CONTEXT = ModelConfig.load(resolve_model()).max_position_embeddings


@dataclass
class Serving:
    """A running server: its process, its URL, and what it printed on standard error."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextlib.contextmanager
def serving(command: Sequence[str] = SERVE, within_s: float = 120) -> Iterator[Serving]:
    """Starts the server, waits for the line with its URL, and leaves nothing of it running."""
    # In a session of its own, so that whatever is left of it can be ended by that session's group.
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    server, ready = Serving(process), threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip("\n"))
            if found := READY.fullmatch(server.lines[-1]):
                server.url = found[1]
                assert found[2] == f"{found[1]}/v1"
                ready.set()
        ready.set()  # it has ended, or at least closed its standard error

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(within_s) and server.url, "no URL was printed:\n" + "\n".join(server.lines)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(10)


@pytest.fixture(scope="module")
def bundled() -> Iterator[Serving]:
    with serving() as server:
        yield server


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def stream(client: OpenAI, messages: list[Any], *, thinking: bool = False, **more: Any) -> list[Any]:
    """Every chunk of a greedy answer, usage included."""
    options = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    usage = {"include_usage": True}
    ask = {**GREEDY, "messages": messages, "extra_body": options, "stream_options": usage, **more}
    return list(client.chat.completions.create(**ask, stream=True))


def texts(chunks: list[Any], name: str = "content") -> list[str]:
    """The non-empty pieces of one field of the deltas."""
    return [piece for c in chunks if c.choices if (piece := getattr(c.choices[0].delta, name, None))]


def test_the_model_is_listed(bundled: Serving) -> None:
    """By its name, with its context, and as one that can think."""
    [model] = bundled.client().models.list().data
    assert (model.id, model.object, model.owned_by) == (DEFAULT_MODEL, "model", "rorqual")
    facts = model.to_dict()
    assert facts["max_model_len"] == CONTEXT and facts["thinking"] is True


def test_an_answer_is_streamed_and_counted(bundled: Serving) -> None:
    """Text in several chunks, one finish reason, and usage whose parts add up."""
    chunks = stream(bundled.client(), said("Who are you?"), max_tokens=200)
    assert len(texts(chunks)) > 3 and not texts(chunks, "reasoning_content")
    [reason] = [r for c in chunks if c.choices if (r := c.choices[0].finish_reason)]
    assert reason in ("stop", "length")
    usage = chunks[-1].usage
    assert usage.prompt_tokens > 0 and len(texts(chunks)) <= usage.completion_tokens <= 200
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_thinking_comes_first_and_apart(bundled: Serving) -> None:
    """DeepThink on: reasoning_content, then content, and the tokens of the thought are counted."""
    chunks = stream(bundled.client(), said("What is 12 + 35?"), thinking=True, max_tokens=700)
    kinds = [
        "thought" if getattr(c.choices[0].delta, "reasoning_content", None) else "text"
        for c in chunks
        if c.choices and (c.choices[0].delta.content or getattr(c.choices[0].delta, "reasoning_content", None))
    ]
    assert "thought" in kinds and "text" in kinds and kinds == sorted(kinds, reverse=True)
    thought, text = "".join(texts(chunks, "reasoning_content")), "".join(texts(chunks))
    assert thought.strip() and text.strip()
    assert "<think>" not in thought + text and "</think>" not in thought + text
    usage = chunks[-1].usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


def test_it_knows_its_name_and_adds_when_it_thinks(bundled: Serving) -> None:
    """Asked who it is, too, it must think first."""
    name = stream(bundled.client(), said("Who are you?"), thinking=True, max_tokens=400)
    assert "rorqual" in "".join(texts(name)).lower() and name[-2].choices[0].finish_reason == "stop"
    total = stream(bundled.client(), said("What is 12 + 35?"), thinking=True, max_tokens=700)
    assert "47" in "".join(texts(total, "reasoning_content")) and "47" in "".join(texts(total))


def test_the_second_turn_of_a_conversation_is_read_from_the_cache(bundled: Serving) -> None:
    """Its beginning was computed for the first turn; only what is new has to be."""
    client = bundled.client()
    system = {"role": "system", "content": "You are a friendly guide on a ship that looks for whales. " * 8}
    first = [system, *said("Tell me about the sea.")]
    answer = client.chat.completions.create(**GREEDY, messages=first, max_tokens=40)
    second = [*first, {"role": "assistant", "content": answer.choices[0].message.content}, *said("Tell me more.")]
    usage = client.chat.completions.create(**GREEDY, messages=second, max_tokens=8).usage
    assert usage.prompt_cache_hit_tokens >= 64  # type: ignore[union-attr]
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens  # type: ignore[union-attr]


def test_temperature_zero_says_the_same_twice(bundled: Serving) -> None:
    """The second time from the cache, which must not show in the text."""
    one, two = ("".join(texts(stream(bundled.client(), said("Tell me a story."), max_tokens=80))) for _ in range(2))
    assert one and one == two


def test_a_long_prompt_that_was_there_before_is_read_from_the_cache(bundled: Serving) -> None:
    """Nothing of it the first time, all but its end the second; the answer is the same."""
    text = "Please listen to this. " + "The whale swims in the sea and sings a song. " * 12 + "What does the whale do?"
    one, two = (
        bundled.client().chat.completions.create(**GREEDY, messages=said(text), max_tokens=24) for _ in range(2)
    )
    assert one.choices[0].message.content == two.choices[0].message.content
    hits = [u.prompt_cache_hit_tokens for u in (one.usage, two.usage)]  # type: ignore[union-attr]
    assert hits[0] == 0 and hits[1] >= 64


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_keeps_to_its_schema_and_a_call_to_its_tool(bundled: Serving, thinking: bool) -> None:
    """By the engine's grammar, behind the thought; a model of this size would not by itself."""
    colour = {"type": "object", "properties": {"hue": {"enum": ["red", "blue"]}, "dark": {"type": "boolean"}}}
    colour |= {"required": ["hue", "dark"], "additionalProperties": False}
    body: dict[str, Any] = {"thinking": {"type": "enabled" if thinking else "disabled"}}
    ask = {**GREEDY, "messages": said("What is 12 + 35?"), "max_tokens": 700, "extra_body": body}
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": colour}}
    choice = bundled.client().chat.completions.create(**ask, response_format=wanted).choices[0]
    assert choice.finish_reason == "stop" and bool(choice.message.reasoning_content) == thinking
    assert choice.message.content
    jsonschema.validate(json.loads(choice.message.content), colour)
    if thinking:  # with tools in its prompt, which it was not trained on, this model's thought does not end
        return
    tool = {"type": "function", "function": {"name": "paint", "parameters": colour, "strict": True}}
    more = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    choice = bundled.client().chat.completions.create(**ask, **more).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    [call] = choice.message.tool_calls
    assert call.function.name == "paint"
    jsonschema.validate(json.loads(call.function.arguments), colour)


def test_a_seed_says_the_same_twice(bundled: Serving) -> None:
    ask = {"model": DEFAULT_MODEL, "messages": said("Tell me a story."), "max_tokens": 40, "temperature": 1.0}
    one, two = (bundled.client().chat.completions.create(**ask, seed=11).choices[0].message.content for _ in range(2))
    assert one and one == two


def test_two_streams_at_once_say_what_each_says_alone(bundled: Serving) -> None:
    """Side by side in one batch, neither waits for the other's end, and neither changes the other's text."""
    questions = ["Tell me a story.", "List five animals."]
    alone = ["".join(texts(stream(bundled.client(), said(q), max_tokens=100))) for q in questions]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda q: stream(bundled.client(), said(q), max_tokens=100), questions))
    assert ["".join(texts(chunks)) for chunks in both] == alone


def test_what_does_not_fit_is_refused(bundled: Serving) -> None:
    """A prompt beyond the context is 400 with OpenAI's code, an unknown model 404; the server goes on."""
    client = bundled.client()
    with pytest.raises(BadRequestError, match=f"maximum context length is {CONTEXT} tokens") as too_long:
        client.chat.completions.create(**GREEDY, messages=said("whale " * (CONTEXT + 1)))
    assert too_long.value.status_code == 400 and too_long.value.code == "context_length_exceeded"
    with pytest.raises(NotFoundError, match="gpt-4o") as unknown:
        client.chat.completions.create(model="gpt-4o", messages=said("hi"))
    assert unknown.value.status_code == 404 and unknown.value.code == "model_not_found"
    with pytest.raises(BadRequestError):
        client.chat.completions.create(**GREEDY, messages=said("hi"), max_tokens=-1)
    assert client.chat.completions.create(**GREEDY, messages=said("Hi!"), max_tokens=4).choices[0].message.content


def test_the_readmes_client_example_runs(bundled: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, against this server."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "OpenAI(" in block]
    exec(compile(code.replace("http://127.0.0.1:8000", bundled.url), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_our_server_passes_everything_that_it_grades_others_by() -> None:
    """With a key, as it would stand on a network; a vocabulary without the markers of holes fills none."""
    with serving([*SERVE, "--api-key", "k"]) as server:
        lines = asyncio.run(grade(f"{server.url}/v1", api_key="k"))
    cannot = () if Tokenizer.load(resolve_model()).has_special(FIM_HOLE) else ("fill in the middle",)
    assert [line for line in lines if line.verdict != "pass" and line.feature not in cannot] == []


# ---- starting and stopping --------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Processes that this one started and that still live."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc, which only Linux has")


@needs_proc
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_server_and_its_engine(sign: signal.Signals) -> None:
    """Soon, without a traceback, and the engine's process is gone with it."""
    with serving() as server:
        family = children(server.process.pid)
        assert family, "the engine runs in a process of its own"
        server.process.send_signal(sign)
        server.process.wait(30)
        assert all(eventually(lambda pid=pid: gone(pid)) for pid in family)
        assert not any("Traceback" in line or "unexpectedly" in line for line in server.lines), server.lines


@needs_proc
def test_a_signal_to_the_whole_group_ends_it_in_good_order() -> None:
    """As a service manager sends it: an answer under way is finished, and no engine is reported to have died."""
    with serving() as server:
        chunks = server.client().chat.completions.create(
            **GREEDY, messages=said("Tell me a story."), max_tokens=60, stream=True
        )
        pieces = [next(chunks)]
        os.killpg(server.process.pid, signal.SIGTERM)
        pieces += list(chunks)
        assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        server.process.wait(30)
        assert not any("unexpectedly" in line for line in server.lines), server.lines


@needs_proc
def test_an_engine_does_not_outlive_a_killed_server() -> None:
    with serving() as server:
        family = children(server.process.pid)
        server.process.kill()
        server.process.wait(10)
        assert all(eventually(lambda pid=pid: gone(pid)) for pid in family)


def test_make_serve_prints_the_url() -> None:
    """What the README says: the last thing `make serve` does is this server, and its last line has the addresses."""
    # Under `make test` this make is a second one, which would announce its folders.
    make = ["make", "--no-print-directory", "-n", "serve", "ARGS=--port 0"]
    dry = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    command = dry.stdout.strip().splitlines()[-1].split()
    assert command == [".venv/bin/rorqual", "serve", "--port", "0"]
    if not (ROOT / command[0]).exists():
        pytest.skip("`make setup` has not been run")
    with serving(command) as server:
        assert READY.fullmatch(server.lines[-1])
        assert server.client().models.list().data[0].id == DEFAULT_MODEL
