"""What an operator sees and sets: metrics, logs, deadlines, bounded queues, draining, an engine that comes back."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo, RequestStats
from rorqual.engine.process import EngineProcess
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.engine.settings import EngineSettings
from rorqual.engine.supervisor import SupervisedEngine
from rorqual.serve.app import Settings
from rorqual.serve.logs import JsonFormatter
from tests.net.harness import Gate, Harness, eventually, running
from tests.unit.engine import fakes

HI = [{"role": "user", "content": "hi"}]
Sample = Callable[..., float]


def sampler(server: Harness) -> Sample:
    """sample(name, **labels): the sum of the samples with these labels, now."""

    def sample(name: str, **labels: str) -> float:
        text = httpx.get(f"{server.url}/metrics").text
        return sum(
            s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        )

    return sample


# ---- metrics -----------------------------------------------------------------------------------------------------


def test_metrics_count_what_was_done(tokenizer: Tokenizer) -> None:
    with running(tokenizer) as server:
        sample = sampler(server)
        ids = server.script("a whole sea", stats=RequestStats(queue_s=0.25, prefill_s=0.5, decode_s=1.0))
        replies = [server.client().chat.completions.create(model="org/alias", messages=HI) for _ in range(3)]
        usage = [reply.usage for reply in replies]
        model = {"model_name": "tiny"}
        assert sample("vllm:prompt_tokens_total", **model) == sum(u.prompt_tokens for u in usage)
        assert sample("vllm:generation_tokens_total", **model) == sum(u.completion_tokens for u in usage)
        assert sample("vllm:request_success_total", finished_reason="stop", **model) == 3
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
            assert sample(f"vllm:{name}_seconds_count", **model) == 3
        assert sample("vllm:request_queue_time_seconds_sum") == 0.75
        assert sample("vllm:request_prefill_time_seconds_sum") == 1.5
        assert sample("vllm:request_decode_time_seconds_sum") == 3.0
        assert sample("vllm:inter_token_latency_seconds_count") == 3 * len(ids)
        assert sample("vllm:prefix_cache_queries_total") == sum(u.prompt_tokens for u in usage)
        assert sample("http_requests_total", handler="/chat/completions", status="200") == 3


def test_metrics_tell_the_ways_a_request_can_end(tokenizer: Tokenizer, gate: Gate) -> None:
    with running(tokenizer) as server:
        sample, client = sampler(server), server.client()
        server.script("one two three four")
        client.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
        client.chat.completions.create(model="tiny", messages=HI, stop="three")
        server.script("one two three four", fail_after=2)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="tiny", messages=HI)
        server.script("one two three four", gate=gate.after(2))
        stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
        next(iter(stream))
        assert sample("vllm:num_requests_running") == 1
        stream.close()
        assert eventually(lambda: not server.engine.live)
        ends = {
            r: sample("vllm:request_success_total", finished_reason=r) for r in ("length", "stop", "error", "abort")
        }
        assert ends == {"length": 1, "stop": 1, "error": 1, "abort": 1}
        assert sample("vllm:num_requests_running") == 0


def test_paths_that_nobody_serves_make_no_time_series(tokenizer: Tokenizer) -> None:
    with running(tokenizer) as server:
        for n in range(20):
            httpx.get(f"{server.url}/nothing/{n}")
        text = httpx.get(f"{server.url}/metrics").text
        assert "/nothing" not in text and sampler(server)("http_requests_total", handler="none", status="404") == 20


def test_metrics_come_as_the_scraper_likes_them(tokenizer: Tokenizer) -> None:
    with running(tokenizer) as one, running(tokenizer) as other:
        plain = httpx.get(f"{one.url}/v1/metrics")
        assert plain.headers["content-type"].startswith("text/plain") and "vllm:num_requests_waiting" in plain.text
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        assert httpx.get(f"{one.url}/metrics", headers=accept).text.rstrip().endswith("# EOF")
        one.script("x")
        one.client().chat.completions.create(model="tiny", messages=HI)
        counts = [sampler(server)("vllm:request_success_total") for server in (one, other)]
        assert counts == [1, 0], "two servers of one process do not share counts"


# ---- logs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[dict[str, object]]]]:
    """The log as JSON, as `--log-format json` writes it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("rorqual")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_one_log_line_tells_of_a_request_but_not_what_was_said(tokenizer: Tokenizer, log_lines) -> None:  # type: ignore[no-untyped-def]
    secret, answer = "krill and baleen", "été naïve"
    messages = [{"role": "user", "content": secret}]
    with running(tokenizer, Settings(api_keys=("k",))) as server:
        server.script(answer)
        reply = server.client(api_key="k", default_headers={"x-request-id": "mine"}).chat.completions.create(
            model="tiny", messages=messages
        )
    [line] = [line for line in log_lines() if line.get("request_id") == "mine"]
    told = {name: line[name] for name in ("method", "path", "status", "key", "model", "finish_reason", "level")}
    assert told == {
        "method": "POST", "path": "/v1/chat/completions", "status": 200, "key": "option_1", "model": "tiny",
        "finish_reason": "stop", "level": "info",
    }  # fmt: skip
    assert (line["prompt_tokens"], line["completion_tokens"]) == (
        reply.usage.prompt_tokens,
        reply.usage.completion_tokens,
    )
    everything = json.dumps(log_lines(), ensure_ascii=False)
    assert not any(words in everything for words in (secret, answer))


def test_prompts_are_logged_on_request(tokenizer: Tokenizer, log_lines) -> None:  # type: ignore[no-untyped-def]
    with running(tokenizer, Settings(log_prompts=True)) as server:
        server.script("baleen")
        server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "krill"}])
    [line] = [line for line in log_lines() if "prompt" in line]
    assert "krill" in line["prompt"] and "baleen" in line["completion"]


def test_a_traceback_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "%s failed", ("it",), (ValueError, error, None))
    line = JsonFormatter().format(record)
    assert "\n" not in line and json.loads(line)["message"] == "it failed" and "two" in json.loads(line)["traceback"]


# ---- deadlines and bounds ----------------------------------------------------------------------------------------


def test_a_request_that_never_begins_is_told_to_come_again(tokenizer: Tokenizer, gate: Gate) -> None:
    with running(tokenizer, Settings(queue_timeout_s=1.0, heartbeat_s=0.05)) as server:
        server.script("late", gate=gate.wait)
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().chat.completions.create(model="tiny", messages=HI)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        lines = streamed(server)
        assert ": keep-alive" in lines and lines[-1] == "data: [DONE]"
        assert "did not begin" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert eventually(lambda: not server.engine.live) and len(server.engine.aborted) == 2


def test_a_stream_that_falls_silent_is_ended(tokenizer: Tokenizer) -> None:
    calls = iter(range(100))

    async def stuck() -> None:
        if next(calls) == 2:
            await asyncio.sleep(60)

    with running(tokenizer, Settings(idle_timeout_s=1.0)) as server:
        server.script("one two three four", gate=stuck)
        lines = streamed(server)
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]" and "content" in lines[1]
        assert eventually(lambda: not server.engine.live)


def streamed(server: Harness) -> list[str]:
    body = {"model": "tiny", "messages": HI, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
        return [line for line in response.iter_lines() if line]


def test_a_full_queue_and_a_full_server_say_so(tokenizer: Tokenizer, gate: Gate) -> None:
    engine = ScriptedEngine(info=EngineInfo("s", 512, tokenizer.vocab_size, (tokenizer.eos_id,), 1 << 20), max_live=2)
    with running(tokenizer, Settings(max_in_flight=3), engine=engine) as server:
        server.script("x", gate=gate.wait)
        ask = lambda: server.client().chat.completions.create(model="tiny", messages=HI)
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: len(engine.live) == 2)
        with pytest.raises(openai.RateLimitError) as full:
            ask()
        assert full.value.code == "engine_overloaded" and full.value.response.headers["retry-after"]
        body = httpx.Client()
        slow = threading.Thread(
            target=lambda: body.post(f"{server.url}/v1/chat/completions", content=trickle(gate)), daemon=True
        )
        slow.start()
        assert eventually(lambda: status_of(server) == 503)
        assert httpx.get(f"{server.url}/models").status_code == 200
        gate.open()
        for thread in [*threads, slow]:
            thread.join(10)
        assert ask().choices[0].message.content == "x"


def trickle(gate: Gate) -> Iterator[bytes]:
    yield b"{"
    gate.opened.wait(60)
    yield b"}"


def status_of(server: Harness) -> int:
    return httpx.post(f"{server.url}/v1/chat/completions", json={}).status_code


# ---- endings -----------------------------------------------------------------------------------------------------


def test_draining_finishes_what_is_under_way_and_takes_nothing_new(tokenizer: Tokenizer, gate: Gate) -> None:
    with running(tokenizer, grace_s=10) as server:
        server.script("all of the sea", gate=gate.wait)
        answers: list[str | None] = []
        ask = lambda: server.client().chat.completions.create(model="tiny", messages=HI)
        thread = threading.Thread(target=lambda: answers.append(ask().choices[0].message.content))
        thread.start()
        assert eventually(lambda: server.engine.live)
        server.server.should_exit = True
        assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": HI})
        assert (
            refused.status_code == 503 and refused.headers["retry-after"] and refused.headers["connection"] == "close"
        )
        gate.open()
        thread.join(10)
        assert answers == ["all of the sea"] and len(server.engine.seen) == 1


def test_the_server_outlives_its_engines_process(tokenizer: Tokenizer) -> None:
    """kill -9 in the middle of streams: those end with an error and [DONE], what waited is answered, and it goes on."""
    made: list[EngineProcess] = []

    def make() -> EngineProcess:
        made.append(EngineProcess(EngineSettings("none"), build=fakes.build_single, grace_s=2.0))
        return made[-1]

    engine = SupervisedEngine(make, pause_s=0.01, look_s=0.01)
    with running(tokenizer, engine=engine) as server:  # type: ignore[arg-type]
        lines: list[str] = []

        def run() -> None:
            body = {"model": "tiny", "messages": HI, "stream": True, "max_tokens": 15_000, "ignore_eos": True}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=20) as response:
                lines.extend(line for line in response.iter_lines() if line)

        running_ = threading.Thread(target=run)
        running_.start()
        assert eventually(lambda: engine.stats.new_tokens)
        queued: list[object] = []
        ask = lambda: server.client().chat.completions.create(model="tiny", messages=HI, max_tokens=5)
        waiting = [threading.Thread(target=lambda: queued.append(ask())) for _ in range(4)]
        for thread in waiting:
            thread.start()
        assert eventually(lambda: engine.stats.waiting == 4)
        os.kill(made[0].pid or 0, signal.SIGKILL)
        for thread in [running_, *waiting]:
            thread.join(20)
        assert lines[-1] == "data: [DONE]" and "-9" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert len(queued) == 4 and all(reply.usage.completion_tokens for reply in queued)  # type: ignore[attr-defined]
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert sampler(server)("rorqual:engine_restarts_total") == 1
        assert sampler(server)("vllm:request_success_total", finished_reason="error") == 1


def test_while_an_engine_is_made_the_server_lives_and_is_not_ready(tokenizer: Tokenizer, gate: Gate) -> None:
    class Slow(ScriptedEngine):
        async def start(self) -> None:
            if engines.index(self):
                await gate.wait()
            await super().start()

    info = EngineInfo("s", 512, tokenizer.vocab_size, (tokenizer.eos_id,), 1 << 20)
    engines = [Slow([Script(tokens=tokenizer.encode("back again"))], info) for _ in range(2)]
    for engine in engines:
        engine.die()
    made = iter(engines)
    supervised = SupervisedEngine(lambda: next(made), pause_s=0.01, look_s=0.01)
    with running(tokenizer, engine=supervised) as server:  # type: ignore[arg-type]
        engines[0].die()
        assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
        replies: list[str | None] = []
        ask = lambda: server.client().chat.completions.create(model="tiny", messages=HI)
        thread = threading.Thread(target=lambda: replies.append(ask().choices[0].message.content))
        thread.start()
        time.sleep(0.1)
        gate.open()
        thread.join(10)
        assert replies == ["back again"] and httpx.get(f"{server.url}/ready").status_code == 200
