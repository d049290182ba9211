"""DeepSeek's additions, Anthropic's messages, and what vLLM's operators expect beside the API."""

from __future__ import annotations

from rorqual.conformance.probe import QUESTION, Absent, Json, Probe, Reply, message_of, require, usage_of

STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use")


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


async def anthropic_messages(probe: Probe) -> str:
    answer = await probe.ask("/messages", _anthropic(probe))
    require(answer.get("type") == "message" and answer.get("role") == "assistant", f"type is {answer.get('type')!r}")
    kinds = [block.get("type") for block in answer.get("content") or []]
    require(set(kinds) <= {"text", "thinking", "tool_use"}, f"content is {kinds}")
    require(answer.get("stop_reason") in STOP_REASONS, f"stop_reason is {answer.get('stop_reason')!r}")
    counts = [usage_of(answer).get(name) for name in ("input_tokens", "output_tokens")]
    require(all(isinstance(n, int) for n in counts), f"usage is {counts}")
    return f"{', '.join(map(str, kinds))}; {answer['stop_reason']}"


async def anthropic_stream(probe: Probe) -> str:
    stream = await probe.stream("/messages", _anthropic(probe))
    names = [name for name, _ in stream.events if name != "ping"]
    require(
        names and names[0] == "message_start" and names[-1] == "message_stop", f"events are {names[:1]} … {names[-1:]}"
    )
    require("message_delta" in names, "no message_delta")
    starts, stops = names.count("content_block_start"), names.count("content_block_stop")
    require(starts == stops, f"{starts} blocks begin and {stops} end")
    require(all(chunk.get("type") == name for chunk, (name, _) in zip(stream.chunks(), stream.events, strict=True)),
            "an event's type differs from its name")  # fmt: skip
    return f"{len(names)} events, {starts} blocks"


async def anthropic_count(probe: Probe) -> str:
    body = {k: v for k, v in _anthropic(probe).items() if k != "max_tokens"}
    counted = (await probe.ask("/messages/count_tokens", body)).get("input_tokens")
    require(isinstance(counted, int) and counted > 0, f"input_tokens is {counted!r}")
    used = usage_of(await probe.ask("/messages", _anthropic(probe)))
    total = used["input_tokens"] + (used.get("cache_read_input_tokens") or 0)
    require(counted == total, f"counted {counted}, used {total}")
    return f"{counted} tokens, as used"


async def anthropic_error(probe: Probe) -> str:
    body = {**_anthropic(probe), "max_tokens": "many"}
    for path in probe.paths("/messages"):
        reply = await probe.post(path, body)
        if reply.status not in (404, 405):
            break
    else:
        raise Absent("no such route")
    require(reply.status in (400, 422), f"status {reply.status}")
    found = reply.json()
    error = found.get("error")
    require(found.get("type") == "error" and isinstance(error, dict) and error.get("type"), f"said {reply.says}")
    return reply.says


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


def _anthropic(probe: Probe) -> Json:
    return {"model": probe.model, "max_tokens": 24, "messages": QUESTION}


def _there(reply: Reply) -> None:
    if reply.status in (404, 405):
        raise Absent("no such route")
    require(reply.status == 200, f"answered {reply.says}")
