"""`grade`: every check against one server, one after the other, each with a verdict and its evidence.

In order, because checks look at caches and silences, which a server that answers several at once shows differently;
and an error in one never ends the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rorqual.conformance import anthropic, deepseek, openai, responses
from rorqual.conformance.probe import Absent, Failed, Probe
from rorqual.errors import UpstreamError

Verdict = Literal["pass", "fail", "absent"]
Check = Callable[[Probe], Awaitable[str]]

CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("models", "list", openai.models),
    ("models", "one by its id", openai.one_model),
    ("chat", "answer", openai.chat),
    ("chat", "usage", openai.usage),
    ("chat", "system message and history", openai.system_and_history),
    ("chat", "content in parts", openai.content_parts),
    ("stream", "chunks", openai.streaming),
    ("stream", "says what the answer says", openai.stream_is_the_answer),
    ("stream", "usage chunk", openai.usage_chunk),
    ("stream", "never silent for long", openai.no_silence),
    ("stream", "ends with its client", openai.leaving),
    ("parameters", "max_tokens", openai.max_tokens),
    ("parameters", "stop", openai.stop),
    ("parameters", "seed", openai.seed),
    ("parameters", "logprobs", openai.logprobs),
    ("parameters", "n", openai.several),
    ("parameters", "top_k and min_p", openai.top_k),
    ("parameters", "penalties", openai.penalties),
    ("parameters", "logit_bias", openai.logit_bias),
    ("structured", "json_object", openai.json_object),
    ("structured", "json_schema", openai.json_schema),
    ("tools", "required", openai.tool_required),
    ("tools", "named", openai.tool_named),
    ("tools", "auto", openai.tool_auto),
    ("tools", "none", openai.tool_none),
    ("tools", "strict", openai.tool_strict),
    ("tools", "one at a time", openai.single_call),
    ("tools", "call and result in the history", openai.tool_result),
    ("tools", "streamed", openai.tool_stream),
    ("errors", "body is not JSON", openai.invalid_json),
    ("errors", "messages missing", openai.missing_messages),
    ("errors", "value out of range", openai.value_out_of_range),
    ("errors", "unknown parameter", openai.unknown_parameter),
    ("errors", "unknown model", openai.unknown_model),
    ("errors", "beyond the context", openai.too_long),
    ("errors", "no key", openai.no_key),
    ("errors", "x-request-id", openai.request_id),
    ("completions", "answer", responses.completions),
    ("completions", "echo", responses.echo),
    ("completions", "fill in the middle", deepseek.fill_in_the_middle),
    ("responses", "answer", responses.answer),
    ("responses", "stream", responses.stream),
    ("responses", "function call", responses.function_call),
    ("responses", "json_schema", responses.json_schema),
    ("deepseek", "thinking enabled", deepseek.thinking),
    ("deepseek", "thinking disabled", deepseek.thinking_off),
    ("deepseek", "thinking streamed", deepseek.thinking_stream),
    ("deepseek", "reasoning_effort", deepseek.effort_none),
    ("deepseek", "reasoning replayed", deepseek.replayed_reasoning),
    ("deepseek", "prompt_cache counts", deepseek.cache_counts),
    ("deepseek", "prefix cache hits", deepseek.cache_hits),
    ("deepseek", "user_id", deepseek.user_id),
    ("deepseek", "prefix completion", deepseek.prefix),
    ("deepseek", "base URLs", deepseek.base_paths),
    ("deepseek", "why the cache was missed", deepseek.cache_diagnostics),
    ("anthropic", "messages", anthropic.messages),
    ("anthropic", "system and history", anthropic.system_and_history),
    ("anthropic", "stream", anthropic.stream),
    ("anthropic", "stop_sequences", anthropic.stop_sequences),
    ("anthropic", "thinking", anthropic.thinking),
    ("anthropic", "tool use", anthropic.tool_use),
    ("anthropic", "tool use streamed", anthropic.tool_stream),
    ("anthropic", "call and result in the history", anthropic.tool_result),
    ("anthropic", "count_tokens", anthropic.count_tokens),
    ("anthropic", "list of models", anthropic.models),
    ("anthropic", "error", anthropic.bad_value),
    ("anthropic", "no key", anthropic.no_key),
    ("beside the API", "tokenize and detokenize", deepseek.tokenize),
    ("beside the API", "health", deepseek.health),
    ("beside the API", "metrics", deepseek.metrics),
)


@dataclass(frozen=True, slots=True)
class Line:
    group: str
    feature: str
    verdict: Verdict
    evidence: str


async def grade(
    base_url: str,
    *,
    api_key: str = "",
    model: str = "",
    timeout_s: float = 120.0,
    told: Callable[[Line], None] = lambda line: None,
) -> list[Line]:
    """`told` hears of each line as it is known. Raises UpstreamError where nothing answers at the address at all."""
    probe = Probe(base_url, api_key=api_key, model=model, timeout_s=timeout_s)
    lines = []
    try:
        await probe.get("/")
        for group, feature, check in CHECKS:
            lines.append(Line(group, feature, *await _judge(check, probe, timeout_s)))
            told(lines[-1])
    finally:
        await probe.close()
    return lines


async def _judge(check: Check, probe: Probe, timeout_s: float) -> tuple[Verdict, str]:
    try:
        async with asyncio.timeout(timeout_s):
            return "pass", await check(probe)
    except Absent as absent:
        return "absent", str(absent)
    except (Failed, UpstreamError) as failed:
        return "fail", str(failed)
    except TimeoutError:
        return "fail", f"no answer within {timeout_s:g} s"
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        # The answer is not of the shape that the check went by.
        return "fail", f"unexpected shape: {type(error).__name__} {error}"


def summary(lines: list[Line]) -> dict[Verdict, int]:
    verdicts: tuple[Verdict, ...] = ("pass", "fail", "absent")
    return {verdict: sum(line.verdict == verdict for line in lines) for verdict in verdicts}


def by_group(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    for group in dict.fromkeys(line.group for line in lines):
        yield group, [line for line in lines if line.group == group]
