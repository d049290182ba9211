"""OpenAI's chat API: what openai-python and everything built on it rely on."""

from __future__ import annotations

import asyncio
import json
import uuid

from rorqual.conformance.probe import QUESTION, Absent, Failed, Json, Probe, Reply, message_of, require, usage_of

MAX_SILENCE_S = 15.0  # what proxies on the way bear with
SCHEMA: Json = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
CALL_TOKENS = 200  # as many as a call may take
TOOL: Json = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}


async def models(probe: Probe) -> str:
    reply = await probe.get(probe.paths("/models")[0])
    require(reply.status == 200, f"answered {reply.says}")
    data = reply.json().get("data")
    require(isinstance(data, list) and data, "`data` is no list of models")
    assert isinstance(data, list)
    require(
        all(isinstance(m.get("id"), str) and m.get("object") == "model" for m in data), "a model lacks id or object"
    )
    probe.model = probe.model or data[0]["id"]
    require(probe.model in [m["id"] for m in data], f"{probe.model} is not listed")
    return f"{len(data)} listed; asking {probe.model}"


async def one_model(probe: Probe) -> str:
    reply = await probe.get(f"{probe.paths('/models')[0]}/{probe.model}")
    if reply.status in (404, 405):
        raise Absent("no such route")
    require(reply.json().get("id") == probe.model, f"answered {reply.says}")
    return "by its id"


async def chat(probe: Probe) -> str:
    answer = await probe.chat()
    require(answer.get("object") == "chat.completion", f"object is {answer.get('object')!r}")
    require(isinstance(answer.get("id"), str) and isinstance(answer.get("created"), int), "id or created is missing")
    message = message_of(answer)
    require(message.get("role") == "assistant", f"role is {message.get('role')!r}")
    reason = answer["choices"][0].get("finish_reason")
    require(reason in ("stop", "length"), f"finish_reason is {reason!r}")
    return f"ended with {reason}"


async def usage(probe: Probe) -> str:
    found = usage_of(await probe.chat())
    numbers = [found.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    require(all(isinstance(n, int) and n > 0 for n in numbers), f"counts are {numbers}")
    require(numbers[0] + numbers[1] == numbers[2], f"{numbers[0]} + {numbers[1]} is not {numbers[2]}")  # type: ignore[operator]
    return f"{numbers[0]} + {numbers[1]} = {numbers[2]}"


async def system_and_history(probe: Probe) -> str:
    history = [
        {"role": "system", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "one"},
        *QUESTION,
    ]
    longer, shorter = [usage_of(await probe.chat(messages=m))["prompt_tokens"] for m in (history, QUESTION)]
    require(longer > shorter, f"a prompt of four turns counts {longer} tokens, one of them alone {shorter}")
    return f"{shorter} → {longer} prompt tokens"


async def content_parts(probe: Probe) -> str:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    message_of(await probe.chat("content", messages=parts))
    return "text parts are read"


async def streaming(probe: Probe) -> str:
    stream = await probe.chat_stream()
    require(stream.content_type.startswith("text/event-stream"), f"content-type is {stream.content_type!r}")
    require(stream.events and stream.events[-1][1] == "[DONE]", "the stream does not end with [DONE]")
    chunks = [chunk for chunk in stream.chunks() if chunk.get("choices")]
    require(chunks, "no chunk has a choice")
    require({c.get("object") for c in chunks} == {"chat.completion.chunk"}, "a chunk is no chat.completion.chunk")
    require(len({c.get("id") for c in chunks}) == 1, "the id changes within a stream")
    require(chunks[0]["choices"][0]["delta"].get("role") == "assistant", "the first delta does not name the role")
    reasons = [c["choices"][0].get("finish_reason") for c in chunks]
    require(reasons[-1] in ("stop", "length") and not any(reasons[:-1]), f"finish_reasons are {reasons}")
    return f"{len(chunks)} chunks, one finish_reason, [DONE]"


async def stream_is_the_answer(probe: Probe) -> str:
    whole = message_of(await probe.chat(temperature=0)).get("content") or ""
    deltas = [c["choices"][0]["delta"] for c in (await probe.chat_stream(temperature=0)).chunks() if c.get("choices")]
    pieces = "".join(delta.get("content") or "" for delta in deltas)
    require(pieces == whole, f"at temperature 0 the stream says {pieces[:40]!r} and the answer {whole[:40]!r}")
    return f"{len(whole)} characters, the same at temperature 0"


async def usage_chunk(probe: Probe) -> str:
    stream = await probe.chat_stream("stream_options", "include_usage", stream_options={"include_usage": True})
    chunks = stream.chunks()
    last = chunks[-1] if chunks else {}
    require(last.get("choices") == [] and isinstance(last.get("usage"), dict), "the last chunk is not usage alone")
    found = usage_of(last)
    require(found["prompt_tokens"] + found["completion_tokens"] == found["total_tokens"], f"usage is {found}")
    require(not any(c.get("usage") for c in chunks[:-1]), "chunks before the last carry usage")
    quiet = (await probe.chat_stream()).chunks()
    require(all(c.get("choices") for c in quiet), "a usage chunk comes unasked")
    return f"{found['total_tokens']} tokens in the last chunk, none unasked"


async def no_silence(probe: Probe) -> str:
    stream = await probe.chat_stream(max_tokens=64)
    require(stream.longest_silence_s <= MAX_SILENCE_S, f"silent for {stream.longest_silence_s:.1f} s")
    return f"longest silence {stream.longest_silence_s:.2f} s"


async def max_tokens(probe: Probe) -> str:
    for name in ("max_tokens", "max_completion_tokens"):
        limit: Json = {"max_tokens": None, name: 3}
        answer = await probe.chat(name, **limit)
        counted, reason = usage_of(answer)["completion_tokens"], answer["choices"][0]["finish_reason"]
        require(counted <= 3, f"{name}=3 gave {counted} tokens")
        require(counted < 3 or reason in ("length", "stop"), f"{name}=3 ended with {reason!r}")
    return "max_tokens and max_completion_tokens bound the answer"


async def stop(probe: Probe) -> str:
    text = message_of(await probe.chat(temperature=0)).get("content") or ""
    word = next((w for w in text.split()[1:] if len(w) > 1), None) or text[len(text) // 2 :][:2].strip()
    if not word:
        raise Absent("the model says too little to be stopped")
    answer = await probe.chat("stop", temperature=0, stop=[word])
    cut, reason = message_of(answer).get("content") or "", answer["choices"][0]["finish_reason"]
    require(word not in cut, f"the answer holds the stop string {word!r}")
    require(reason == "stop" or not text.startswith(cut), f"finish_reason is {reason!r}")
    return f"cut before {word!r}"


async def seed(probe: Probe) -> str:
    texts = {message_of(await probe.chat("seed", temperature=1, seed=7)).get("content") for _ in range(3)}
    require(len(texts) == 1, f"three answers with one seed: {sorted(map(str, texts))[:2]}")
    return "three times the same answer"


async def logprobs(probe: Probe) -> str:
    answer = await probe.chat("logprobs", "top_logprobs", logprobs=True, top_logprobs=3)
    entries = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    require(entries, "logprobs were asked for and are not there")
    require(all(e["logprob"] <= 0 for e in entries), "a log-probability is positive")
    require(all(len(e["top_logprobs"]) == 3 for e in entries), "not 3 top_logprobs a token")
    content = message_of(answer).get("content") or ""
    if all(isinstance(e.get("bytes"), list) for e in entries):
        said = b"".join(bytes(e["bytes"]) for e in entries).decode("utf-8", "replace")
        require(content.strip() in said, f"the tokens spell {said[:40]!r} and the answer {content[:40]!r}")
    return f"{len(entries)} tokens with 3 alternatives each"


async def several(probe: Probe) -> str:
    choices = (await probe.chat("'n'", "`n`", "n ", n=2, temperature=1))["choices"]
    require(len(choices) == 2, f"n=2 gave {len(choices)}")
    require(sorted(c["index"] for c in choices) == [0, 1], "indices are not 0 and 1")
    return "two choices"


async def penalties(probe: Probe) -> str:
    await probe.chat("frequency_penalty", "presence_penalty", frequency_penalty=1.0, presence_penalty=1.0)
    return "accepted"


async def logit_bias(probe: Probe) -> str:
    plain = message_of(await probe.chat(temperature=0, max_tokens=8)).get("content")
    tokens = await probe.post("/tokenize", {"model": probe.model, "prompt": plain})
    if tokens.status != 200 or not plain:
        raise Absent("no way to learn a token's id (/tokenize)")
    ids = [str(t) for t in tokens.json().get("tokens", [])]
    banned = await probe.chat("logit_bias", temperature=0, max_tokens=8, logit_bias=dict.fromkeys(ids, -100))
    require(message_of(banned).get("content") != plain, "forbidding every token of the answer changes nothing")
    return f"{len(set(ids))} tokens forbidden, another answer"


async def json_object(probe: Probe) -> str:
    ask = [{"role": "user", "content": "Answer with a small JSON object with the key colour."}]
    answer = await probe.chat(
        "response_format", "json_object", messages=ask, max_tokens=CALL_TOKENS, response_format={"type": "json_object"}
    )
    text = message_of(answer).get("content") or ""
    if answer["choices"][0]["finish_reason"] == "length":
        require(text.lstrip()[:1] in ("{", ""), f"began with {text[:30]!r}")
        return "an object, cut by max_tokens"
    require(isinstance(parsed(text), dict), f"said {text[:60]!r}")
    return f"{text[:60]}"


async def json_schema(probe: Probe) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "paint", "strict": True, "schema": SCHEMA}}
    answer = await probe.chat("response_format", "json_schema", max_tokens=CALL_TOKENS, response_format=form)
    text = message_of(answer).get("content") or ""
    require(fits(parsed(text)), f"said {text[:60]!r}, which does not fit the schema")
    return f"{text[:60]}"


async def tool_required(probe: Probe) -> str:
    answer = await probe.chat("tools", "tool_choice", tools=[TOOL], tool_choice="required", max_tokens=CALL_TOKENS)
    return checked_call(answer)


async def tool_named(probe: Probe) -> str:
    choice = {"type": "function", "function": {"name": "paint"}}
    answer = await probe.chat("tools", "tool_choice", tools=[TOOL], tool_choice=choice, max_tokens=CALL_TOKENS)
    return checked_call(answer)


async def tool_none(probe: Probe) -> str:
    message = message_of(await probe.chat("tools", "tool_choice", tools=[TOOL], tool_choice="none"))
    require(not message.get("tool_calls"), "called a tool though tool_choice is none")
    return "no call"


async def tool_result(probe: Probe) -> str:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"colour":"red","count":1}'},
    }
    history: list[Json] = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "painted"},
    ]
    answer = await probe.chat("tools", "tool", "role", messages=history, tools=[TOOL])
    longer, shorter = usage_of(answer)["prompt_tokens"], usage_of(await probe.chat())["prompt_tokens"]
    require(longer > shorter, "the call and its result are not in the prompt")
    return f"{longer - shorter} prompt tokens of tools, call and result"


async def tool_stream(probe: Probe) -> str:
    stream = await probe.chat_stream(
        "tools", "tool_choice", tools=[TOOL], tool_choice="required", max_tokens=CALL_TOKENS
    )
    deltas = [c["choices"][0]["delta"] for c in stream.chunks() if c.get("choices")]
    pieces = [call for delta in deltas for call in delta.get("tool_calls") or []]
    require(pieces, "no tool_calls in the stream")
    require(all(isinstance(piece.get("index"), int) for piece in pieces), "a piece of a call has no index")
    first = [piece for piece in pieces if piece["index"] == pieces[0]["index"]]
    require(first[0].get("id") and first[0]["function"].get("name") == "paint", "the first piece lacks id or name")
    arguments = "".join(piece.get("function", {}).get("arguments") or "" for piece in first)
    require(fits(parsed(arguments)), f"the pieces make {arguments[:60]!r}")
    return f"{len(first)} pieces make {arguments[:40]}"


async def single_call(probe: Probe) -> str:
    more: Json = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": CALL_TOKENS}
    answer = await probe.chat("tools", "tool_choice", "parallel_tool_calls", **more)
    calls = message_of(answer).get("tool_calls") or []
    require(len(calls) == 1, f"{len(calls)} calls with parallel_tool_calls false")
    return checked_call(answer)


async def tool_strict(probe: Probe) -> str:
    tool = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    return checked_call(
        await probe.chat("strict", "tools", tools=[tool], tool_choice="required", max_tokens=CALL_TOKENS)
    )


async def tool_auto(probe: Probe) -> str:
    answer = await probe.chat("tools", "tool_choice", tools=[TOOL], tool_choice="auto", max_tokens=CALL_TOKENS)
    if message_of(answer).get("tool_calls"):
        return (
            checked_call(answer) if answer["choices"][0]["finish_reason"] != "length" else "called, cut by max_tokens"
        )
    return "accepted; the model did not call"


async def top_k(probe: Probe) -> str:
    greedy = message_of(await probe.chat(temperature=0)).get("content")
    for more in ({"top_k": 1}, {"min_p": 1.0}):
        name = next(iter(more))
        found = message_of(await probe.chat(name, temperature=1.5, **more)).get("content")
        require(found == greedy, f"{more} leaves more than the likeliest token")
    return "top_k=1 and min_p=1 leave the likeliest token"


async def unknown_parameter(probe: Probe) -> str:
    body = {"model": probe.model, "messages": QUESTION, "max_tokens": 1, "no_such_parameter": 1}
    reply = await probe.post(probe.paths("/chat/completions")[0], body)
    if reply.status == 200:
        raise Absent("what is unknown is ignored without a word")
    require("no_such_parameter" in reply.body.decode("utf-8", "replace"), f"does not name it: {reply.says}")
    return _check_error(reply, (400, 422))


async def leaving(probe: Probe) -> str:
    """A client that leaves must not leave its request behind."""

    async def running() -> float | None:
        lines = (await probe.get("/metrics")).body.decode("utf-8", "replace").splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running")]
        return sum(values) if values else None

    if await running() is None:
        raise Absent("no vllm:num_requests_running in /metrics to see it by")
    body = {"model": probe.model, "messages": QUESTION, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    if not await probe.leave(probe.paths("/chat/completions")[0], body):
        raise Absent("takes no ignore_eos, which would keep the request running")
    for _ in range(20):
        if not await running():
            return "the request has ended with its client"
        await asyncio.sleep(0.1)
    raise Failed("two seconds after its client left, the request is still running")


async def invalid_json(probe: Probe) -> str:
    return _check_error(await probe.post(probe.paths("/chat/completions")[0], b"{"), (400, 422))


async def missing_messages(probe: Probe) -> str:
    return _check_error(await probe.post(probe.paths("/chat/completions")[0], {"model": probe.model}), (400, 422))


async def value_out_of_range(probe: Probe) -> str:
    body = {"model": probe.model, "messages": QUESTION, "temperature": 99, "max_tokens": 1}
    return _check_error(await probe.post(probe.paths("/chat/completions")[0], body), (400, 422))


async def unknown_model(probe: Probe) -> str:
    body = {"model": f"no-such-model-{uuid.uuid4().hex[:8]}", "messages": QUESTION, "max_tokens": 1}
    reply = await probe.post(probe.paths("/chat/completions")[0], body)
    require(reply.status != 200, "an unknown model is answered by another one")
    return _check_error(reply, (404, 400))


async def too_long(probe: Probe) -> str:
    body = {"model": probe.model, "messages": QUESTION, "max_tokens": 10**8}
    reply = await probe.post(probe.paths("/chat/completions")[0], body)
    if reply.status == 200:
        raise Absent("a limit beyond the context is cut to what fits")
    return _check_error(reply, (400, 422))


async def no_key(probe: Probe) -> str:
    if not probe.has_key:
        raise Absent("asked without a key")
    reply = await probe.get(probe.paths("/models")[0], with_key=False)
    require(reply.status == 401, f"without a key: {reply.status}")
    return _check_error(reply, (401,))


async def request_id(probe: Probe) -> str:
    mine = f"conformance-{uuid.uuid4().hex[:8]}"
    reply = await probe.get(probe.paths("/models")[0], headers={"x-request-id": mine})
    found = reply.headers.get("x-request-id")
    if not found:
        raise Absent("no x-request-id")
    return "the client's own" if found == mine else f"the server's: {found}"


def _check_error(reply: Reply, statuses: tuple[int, ...]) -> str:
    require(reply.status in statuses, f"status {reply.status} where {' or '.join(map(str, statuses))} is due")
    error = reply.json().get("error")
    require(isinstance(error, dict), f"`error` is {error!r} and no object")
    assert isinstance(error, dict)
    missing = {"message", "type", "param", "code"} - error.keys()
    require(not missing, f"the error lacks {', '.join(sorted(missing))}")
    require(isinstance(error["message"], str) and error["message"], "the error has no message")
    require(error["code"] is None or isinstance(error["code"], str), f"code is {error['code']!r} and no string")
    return reply.says


def checked_call(answer: Json) -> str:
    calls = message_of(answer).get("tool_calls")
    require(calls, f"no tool_calls; said {str(message_of(answer).get('content'))[:40]!r}")
    assert isinstance(calls, list)
    call = calls[0]
    require(call.get("type") == "function" and call.get("id"), "the call lacks type or id")
    require(call["function"].get("name") == "paint", f"called {call['function'].get('name')!r}")
    require(isinstance(call["function"].get("arguments"), str), "arguments are no string")
    require(fits(parsed(call["function"]["arguments"])), f"arguments are {call['function']['arguments'][:60]!r}")
    reason = answer["choices"][0]["finish_reason"]
    # A weak model may call again and again until it is cut, for which no server is to blame.
    cut = reason == "length" and len(calls) > 1 and usage_of(answer)["completion_tokens"] >= CALL_TOKENS
    require(reason in ("tool_calls", "stop") or cut, f"finish_reason is {reason!r}")
    return f"paint({call['function']['arguments'][:40]})"


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Failed(f"not JSON: {text[:60]!r}") from error


def fits(value: object) -> bool:
    """Whether it fits SCHEMA."""
    if not isinstance(value, dict) or value.keys() != {"colour", "count"}:
        return False
    return value["colour"] in ("red", "green") and type(value["count"]) is int and value["count"] in (1, 2, 3)
