"""The grader of servers: ours passes what it has, and a server that is wrong fails exactly where it is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from rorqual.cli.main import app as cli
from rorqual.conformance.openai import checked_call
from rorqual.conformance.probe import Failed
from rorqual.conformance.server import CHECKS, Line, grade, summary
from rorqual.data.special import END_THINK
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.api import EngineInfo
from rorqual.engine.scripted import Script, ScriptedEngine
from rorqual.errors import UpstreamError
from rorqual.serve.app import Settings
from tests.net.harness import running

# A scripted engine obeys no grammar, no logit_bias, no order to call a tool: these are graded against a real one.
NEEDS_A_MODEL = {
    "json_object", "json_schema", "required", "named", "streamed", "logit_bias", "strict", "one at a time", "function call",
    "tool use", "tool use streamed",
}  # fmt: skip
ALWAYS = {
    ("models", "list"), ("models", "one by its id"), ("chat", "answer"), ("chat", "usage"),
    ("chat", "system message and history"), ("chat", "content in parts"), ("stream", "chunks"),
    ("stream", "says what the answer says"), ("stream", "usage chunk"), ("stream", "never silent for long"),
    ("parameters", "max_tokens"), ("parameters", "stop"), ("parameters", "seed"), ("parameters", "logprobs"),
    ("errors", "body is not JSON"), ("errors", "messages missing"), ("errors", "value out of range"),
    ("errors", "unknown model"), ("errors", "beyond the context"), ("errors", "no key"), ("errors", "x-request-id"),
    ("deepseek", "thinking enabled"), ("deepseek", "thinking disabled"), ("deepseek", "thinking streamed"),
    ("deepseek", "reasoning replayed"), ("deepseek", "prompt_cache counts"), ("deepseek", "prefix cache hits"),
    ("stream", "ends with its client"), ("parameters", "top_k and min_p"), ("errors", "unknown parameter"),
    ("deepseek", "reasoning_effort"), ("deepseek", "base URLs"), ("deepseek", "why the cache was missed"),
    ("anthropic", "messages"), ("anthropic", "system and history"), ("anthropic", "stream"), ("anthropic", "stop_sequences"),
    ("anthropic", "thinking"), ("anthropic", "count_tokens"), ("anthropic", "list of models"), ("anthropic", "error"),
    ("anthropic", "no key"), ("deepseek", "user_id"), ("beside the API", "health"), ("beside the API", "metrics"),
}  # fmt: skip


def verdicts(lines: list[Line]) -> dict[tuple[str, str], tuple[str, str]]:
    return {(line.group, line.feature): (line.verdict, line.evidence) for line in lines}


def test_our_server_passes_what_it_has(tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode("the whale takes in a whole sea")
    thought = [*tokenizer.encode("a whale"), tokenizer.special(END_THINK)]
    thinks = tokenizer.special("<think>")
    scripts = [Script(tokens=[*thought, *answer], when=lambda prompt: prompt[-1] == thinks), Script(tokens=answer)]
    info = EngineInfo("scripted", 2048, tokenizer.vocab_size, (tokenizer.eos_id,), 1 << 20)
    with running(tokenizer, Settings(api_keys=("k",)), engine=ScriptedEngine(scripts, info)) as server:
        heard: list[Line] = []
        lines = asyncio.run(grade(f"{server.url}/v1", api_key="k", told=heard.append))
    assert heard == lines and len(lines) == len(CHECKS)
    found = verdicts(lines)
    assert {name: found[name] for name in ALWAYS if found[name][0] != "pass"} == {}
    assert [n for n, (verdict, _) in found.items() if verdict == "fail" and n[1] not in NEEDS_A_MODEL] == []


def test_nothing_at_the_address_is_an_error() -> None:
    with pytest.raises(UpstreamError, match="cannot be reached"):
        asyncio.run(grade("http://127.0.0.1:9/v1"))


# ---- a server that is wrong ----------------------------------------------------------------------------------------

Body = dict[str, object]


class Plausible:
    """A small server that gets the graded things right, for tests to spoil one at a time."""

    def completion(self, body: Body) -> Body:
        words = ["one", "two", "three", "four", "five"]
        if (stop := body.get("stop")) and stop[0] in words:  # type: ignore[index]
            words = words[: words.index(stop[0])]  # type: ignore[index]
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 99
        reason = "stop" if len(words) < int(limit) else "length"  # type: ignore[call-overload]
        words = words[: int(limit)]  # type: ignore[call-overload]
        message: Body = {"role": "assistant", "content": " ".join(words)}
        if (body.get("thinking") or {}).get("type") == "enabled":  # type: ignore[union-attr, attr-defined]
            message["reasoning_content"] = "numbers"
        prompt = len(json.dumps(body["messages"]))
        usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
        usage |= {"prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": prompt}
        choices = [
            {"index": n, "message": message, "finish_reason": reason}
            for n in range(int(body.get("n") or 1))  # type: ignore[call-overload]
        ]
        return {"id": "1", "object": "chat.completion", "created": 1, "choices": choices, "usage": usage}

    def chunks(self, body: Body) -> list[object]:
        answer = self.completion(body)
        content = answer["choices"][0]["message"]["content"]  # type: ignore[index]
        deltas = [{"role": "assistant", "content": ""}, {"content": content[:5]}, {"content": content[5:]}, {}]
        found: list[object] = [
            {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": d, "finish_reason": None}]}
            for d in deltas
        ]
        found[-1]["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
        if (body.get("stream_options") or {}).get("include_usage"):  # type: ignore[union-attr, attr-defined]
            found.append({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": answer["usage"]})
        return [*found, "[DONE]"]

    def error(self, message: str) -> object:
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

    def unknown(self, model: object) -> bool:
        return model != "m"


@contextlib.contextmanager
def serve(fake: Plausible) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "m", "object": "model"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.path != "/v1/chat/completions":
                self.answer(404, {"detail": "Not Found"})
                return
            try:
                body = json.loads(raw)
                unknown = fake.unknown(body["model"])
                if not body["messages"] or (body.get("temperature") or 0) > 2:
                    raise ValueError("temperature")
            except (ValueError, KeyError) as error:
                self.answer(400, fake.error(f"bad request: {error}"))
                return
            if unknown:
                self.answer(404, fake.error("The model does not exist"))
            elif body.get("stream"):
                self.stream(body)
            else:
                self.answer(200, fake.completion(body))

        def stream(self, body: Body) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for chunk in fake.chunks(body):
                data = chunk if isinstance(chunk, str) else json.dumps(chunk)
                self.wfile.write(f"data: {data}\n\n".encode())

        def answer(self, status: int, body: object) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def failures(fake: Plausible) -> set[str]:
    with serve(fake) as url:
        return {f"{line.group}/{line.feature}" for line in asyncio.run(grade(url)) if line.verdict == "fail"}


class NoDone(Plausible):
    def chunks(self, body: Body) -> list[object]:
        return super().chunks(body)[:-1]


class ChangingIds(Plausible):
    def chunks(self, body: Body) -> list[object]:
        return [{**c, "id": str(n)} if isinstance(c, dict) else c for n, c in enumerate(super().chunks(body))]


class LosesText(Plausible):
    def chunks(self, body: Body) -> list[object]:
        found = super().chunks(body)
        return [found[0], *found[2:]]


class UsageAlways(Plausible):
    def chunks(self, body: Body) -> list[object]:
        return super().chunks({**body, "stream_options": {"include_usage": True}})


class WrongSum(Plausible):
    def completion(self, body: Body) -> Body:
        answer = super().completion(body)
        answer["usage"]["total_tokens"] += 1  # type: ignore[index]
        return answer


class IgnoresStop(Plausible):
    def completion(self, body: Body) -> Body:
        return super().completion({**body, "stop": None})


class IgnoresN(Plausible):
    def completion(self, body: Body) -> Body:
        return super().completion({**body, "n": 1})


class ErrorIsText(Plausible):
    def error(self, message: str) -> object:
        return {"error": message}


class NumericCode(Plausible):
    def error(self, message: str) -> object:
        return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


class AnyModel(Plausible):
    def unknown(self, model: object) -> bool:
        return False


class NeverThinks(Plausible):
    def completion(self, body: Body) -> Body:
        return super().completion({**body, "thinking": None})


class Unsteady(Plausible):
    def __init__(self) -> None:
        self.asked = 0

    def completion(self, body: Body) -> Body:
        answer = super().completion(body)
        self.asked += 1
        if body.get("seed"):
            answer["choices"][0]["message"]["content"] += f" {self.asked}"  # type: ignore[index]
        return answer


BAD_REQUESTS = {
    "errors/body is not JSON",
    "errors/messages missing",
    "errors/value out of range",
    "errors/unknown model",
}


@pytest.fixture(scope="module")
def plausible() -> set[str]:
    """What even the plausible server gets wrong: it takes tools and formats and ignores them."""
    return failures(Plausible())


def test_a_plausible_server_fails_where_it_ignores_what_it_was_asked_for(plausible: set[str]) -> None:
    assert {"structured/json_object", "structured/json_schema", "tools/required", "tools/named"} <= plausible
    assert {"parameters/logprobs", "deepseek/prefix completion", "deepseek/thinking streamed"} <= plausible
    assert not plausible & {"chat/answer", "chat/usage", "stream/chunks", "stream/usage chunk", "parameters/n"}
    assert not plausible & BAD_REQUESTS


@pytest.mark.parametrize(
    ("fake", "wrong"),
    [
        (NoDone, {"stream/chunks"}),
        (ChangingIds, {"stream/chunks"}),
        (LosesText, {"stream/says what the answer says"}),
        (UsageAlways, {"stream/usage chunk"}),
        (WrongSum, {"chat/usage", "stream/usage chunk"}),
        (IgnoresStop, {"parameters/stop"}),
        (IgnoresN, {"parameters/n"}),
        (ErrorIsText, BAD_REQUESTS),
        (NumericCode, BAD_REQUESTS),
        (AnyModel, {"errors/unknown model"}),
        (NeverThinks, {"deepseek/thinking enabled"}),
        (Unsteady, {"parameters/seed"}),
    ],
)
def test_each_fault_fails_its_own_lines(fake: Callable[[], Plausible], wrong: set[str], plausible: set[str]) -> None:
    assert failures(fake()) - plausible == wrong


@pytest.mark.parametrize(("calls", "tokens", "passes"), [(2, 200, True), (1, 200, False), (2, 60, False)])
def test_only_a_model_that_calls_until_it_is_cut_may_be_cut(calls: int, tokens: int, passes: bool) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red", "count": 1}'}}
    choice = {"message": {"role": "assistant", "tool_calls": [call] * calls}, "finish_reason": "length"}
    answer = {"choices": [choice], "usage": {"completion_tokens": tokens}}
    if passes:
        assert checked_call(answer).startswith("paint(")
        return
    with pytest.raises(Failed, match="finish_reason is 'length'"):
        checked_call(answer)


def test_the_command_line(tokenizer: Tokenizer) -> None:
    with serve(IgnoresN()) as url:
        plain = CliRunner().invoke(cli, ["conformance", "server", "--base-url", url], env={"COLUMNS": "200"})
        assert plain.exit_code == 0 and "n=2 gave 1" in plain.stdout and "absent" in plain.stdout
        strict = CliRunner().invoke(cli, ["conformance", "server", "--base-url", url, "--json", "--strict"])
    assert strict.exit_code == 1
    result = json.loads(strict.stdout)
    lines = [Line(**line) for line in result["features"]]
    assert result["summary"] == summary(lines) and sum(result["summary"].values()) == len(CHECKS)
    assert verdicts(lines)["parameters", "n"] == ("fail", "n=2 gave 1")
