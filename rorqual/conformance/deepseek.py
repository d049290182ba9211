"""DeepSeek's additions, and what vLLM's operators expect beside the API."""

from __future__ import annotations

from rorqual.conformance.probe import QUESTION, Absent, Json, Probe, Reply, message_of, require, usage_of


async def thinking(probe: Probe) -> str:
    names = ("thinking", "reasoning")
    message = message_of(await probe.chat(*names, thinking={"type": "enabled"}, max_tokens=48))
    thought = message.get("reasoning_content") or message.get("reasoning")
    require(isinstance(thought, str) and thought, "no reasoning_content with thinking enabled")
    field = "reasoning_content" if message.get("reasoning_content") else "reasoning"
    return f"{len(str(thought))} characters in {field}"


async def thinking_off(probe: Probe) -> str:
    message = message_of(await probe.chat("thinking", "reasoning", thinking={"type": "disabled"}))
    require(not message.get("reasoning_content") and not message.get("reasoning"), "thinks though thinking is disabled")
    return "answers at once"


async def thinking_stream(probe: Probe) -> str:
    stream = await probe.chat_stream("thinking", "reasoning", thinking={"type": "enabled"}, max_tokens=48)
    deltas = [c["choices"][0]["delta"] for c in stream.chunks() if c.get("choices")]
    kinds = [
        "t" if d.get("reasoning_content") or d.get("reasoning") else "a" if d.get("content") else "" for d in deltas
    ]
    order = "".join(kinds)
    require("t" in order, "no delta carries reasoning_content")
    require("a" not in order[: order.rindex("t")], "the answer begins before the thought has ended")
    return f"{order.count('t')} deltas of thought, then {order.count('a')} of the answer"


async def replayed_reasoning(probe: Probe) -> str:
    past = {"role": "assistant", "content": "one", "reasoning_content": "The user wants numbers."}
    await probe.chat("reasoning_content", messages=[*QUESTION, past, *QUESTION])
    return "accepted in the history"


async def cache_counts(probe: Probe) -> str:
    found = usage_of(await probe.chat())
    hit, miss = found.get("prompt_cache_hit_tokens"), found.get("prompt_cache_miss_tokens")
    if hit is None and miss is None:
        raise Absent("no prompt_cache_hit_tokens in usage")
    require(
        hit is not None and miss is not None and hit + miss == found["prompt_tokens"],
        f"{hit} + {miss} is not the prompt",
    )
    return f"{hit} hit, {miss} missed"


async def cache_hits(probe: Probe) -> str:
    long = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 24}]
    await probe.chat(messages=long, max_tokens=1)
    found = usage_of(await probe.chat(messages=long, max_tokens=1))
    cached = (found.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None:
        raise Absent("no cached_tokens in usage")
    require(cached > 0, f"the same prompt of {found['prompt_tokens']} tokens twice, and none was cached")
    return f"{cached} of {found['prompt_tokens']} tokens the second time"


async def user_id(probe: Probe) -> str:
    await probe.chat("user_id", user_id="conformance")
    return "accepted"


async def prefix(probe: Probe) -> str:
    start = {"role": "assistant", "content": "one, two,"}
    body = {"model": probe.model, "max_tokens": 8}
    going_on = {**body, "messages": [*QUESTION, {**start, "prefix": True}]}
    answer = await probe.ask("/chat/completions", going_on, "prefix")
    closed = await probe.post(probe.paths("/chat/completions")[0], {**body, "messages": [*QUESTION, start]})
    if closed.status != 200:
        return "continued; without `prefix` the same is refused"
    open_tokens, closed_tokens = usage_of(answer)["prompt_tokens"], usage_of(closed.json())["prompt_tokens"]
    require(open_tokens < closed_tokens, "`prefix` is ignored: the prompt is the same without it")
    return f"{open_tokens} prompt tokens, and {closed_tokens} where the turn is over"


async def fill_in_the_middle(probe: Probe) -> str:
    body: Json = {"model": probe.model, "prompt": "def add(a, b):\n", "max_tokens": 8}
    with_suffix = await probe.ask("/completions", {**body, "suffix": "\n    return total\n"}, "suffix")
    without = await probe.ask("/completions", body)
    more = usage_of(with_suffix)["prompt_tokens"] - usage_of(without)["prompt_tokens"]
    require(more > 0, "`suffix` is ignored: the prompt is the same without it")
    require(isinstance(with_suffix["choices"][0].get("text"), str), "the choice has no text")
    return f"{more} more prompt tokens with a suffix"


async def effort_none(probe: Probe) -> str:
    message = message_of(await probe.chat("reasoning_effort", reasoning_effort="none"))
    require(not message.get("reasoning_content") and not message.get("reasoning"), "thinks with reasoning_effort none")
    return "none: answers at once"


async def base_paths(probe: Probe) -> str:
    body = {"model": probe.model, "messages": QUESTION, "max_tokens": 1}
    found = [
        path for path in ("", "/v1", "/beta") if (await probe.post(f"{path}/chat/completions", body)).status == 200
    ]
    if len(found) < 3:
        raise Absent(f"under {', '.join(found) or 'none of them'} alone: clients hard-code /, /v1 and /beta")
    return "/, /v1 and /beta"


async def cache_diagnostics(probe: Probe) -> str:
    text = "one two three four five six seven eight nine ten " * 24
    first = await probe.chat(messages=[{"role": "user", "content": text}], max_tokens=1)
    options = {"comparison_response_id": first["id"]}
    other = [{"role": "user", "content": text + "eleven"}, *QUESTION]
    asked = await probe.chat("prompt_cache_options", messages=other, max_tokens=1, prompt_cache_options=options)
    found = asked.get("prompt_cache_diagnostics")
    if found is None:
        raise Absent("no prompt_cache_diagnostics")
    require(found.get("type") == "cache_miss", f"another prompt is a {found.get('type')!r}")
    require(isinstance(found.get("cache_missed_tokens"), int) and found.get("reason"), f"said {found}")
    return f"{found['reason']}, {found['cache_missed_tokens']} tokens missed"


async def tokenize(probe: Probe) -> str:
    text = "Größe 你好 🐋"
    reply = await probe.post("/tokenize", {"model": probe.model, "prompt": text, "add_special_tokens": False})
    _there(reply)
    found = reply.json()
    tokens = found.get("tokens")
    require(isinstance(tokens, list) and found.get("count") == len(tokens or []), f"count is {found.get('count')!r}")
    back = await probe.post("/detokenize", {"model": probe.model, "tokens": tokens})
    _there(back)
    said = back.json().get("prompt")
    require(said == text, f"came back as {said!r}")
    return f"{found['count']} tokens, and back"


async def health(probe: Probe) -> str:
    reply = await probe.get("/health", with_key=False)
    _there(reply)
    return "200 without a key"


async def metrics(probe: Probe) -> str:
    reply = await probe.get("/metrics")
    _there(reply)
    names = {line.split("{")[0].split(" ")[0] for line in reply.body.decode("utf-8", "replace").splitlines()}
    wanted = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prompt_tokens_total"}
    if not wanted & names:
        raise Absent("none of vLLM's names")
    require(wanted <= names, f"lacks {', '.join(sorted(wanted - names))}")
    return f"{sum(name.startswith('vllm:') for name in names)} names of vLLM's"


def _there(reply: Reply) -> None:
    if reply.status in (404, 405):
        raise Absent("no such route")
    require(reply.status == 200, f"answered {reply.says}")
