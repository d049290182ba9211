"""From a checked body to a job: the model, the prompt, the sampling parameters and the grammar.

Every dialect that chats ends here: it makes a `ChatRequest` of its own body. Whatever is wrong with a request is told
here, before the engine hears of it.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from rorqual.data.special import END_THINK, TOOL_CALLS_BEGIN
from rorqual.data.tools import call_grammar, shape
from rorqual.engine.api import Grammar, Request, SamplingParams, check_request
from rorqual.errors import DataError, NotFound, RequestError
from rorqual.serve.callers import VISIT
from rorqual.serve.diagnosis import Comparison, PromptRecord, asked
from rorqual.serve.errors import engine_gone
from rorqual.serve.events import Event, Usage
from rorqual.serve.generation import Job, produce
from rorqual.serve.replay import ReplayRecord
from rorqual.serve.schemas import ChatRequest, Function, NamedTool, Sampled
from rorqual.serve.served import ServedModel
from rorqual.serve.settings import Settings

SMALLEST_TOP_P = 1e-9  # a top_p of 0 means the likeliest token alone
IGNORED = "x-rorqual-ignored"
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Platform:
    """What all routes share."""

    models: Mapping[str, ServedModel]
    settings: Settings
    replay: ReplayRecord = field(default_factory=ReplayRecord)
    prompts: PromptRecord = field(default_factory=PromptRecord)

    def find(self, name: str) -> ServedModel:
        """Raises NotFound. A variant in brackets behind a name, as some clients write it, is the client's own matter."""
        served = self.models.get(name) or self.models.get(name.partition("[")[0])
        if served is None:
            names = ", ".join(self.models) or "none"
            raise NotFound(f"The model '{name}' does not exist", remedy=f"served here: {names}", param="model")
        return served


def owner(user_id: str | None) -> str:
    """Whose thoughts may be replayed: the caller's and its user's, nobody else's."""
    visit = VISIT.get()
    return visit.caller.salt(user_id or "") if visit else user_id or ""


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a client on its way. thinks: whether a thought is to be expected at the start;
    comparison: the prompt beside an earlier one."""

    id: str
    body: Sampled
    job: Job
    thinks: bool = False
    comparison: Comparison | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def served(self) -> ServedModel:
        return self.job.served

    @property
    def headers(self) -> dict[str, str]:
        ignored = self.body.ignored()
        return {IGNORED: ", ".join(ignored)} if ignored else {}

    def diagnosed(self, usage: Usage) -> dict[str, Any]:
        """The field that tells why the cache was missed, where there is something to compare with."""
        return {"prompt_cache_diagnostics": self.comparison.diagnose(usage)} if self.comparison else {}

    def events(self, replay: ReplayRecord) -> AsyncGenerator[Event, None]:
        events = produce(self.job)
        if self.job.reads_calls and self.served.template.supports_thinking:
            return replay.watch(owner(self.body.user_id), events)
        return events

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model will read it."""

    served: ServedModel
    prompt: list[int]
    thinking: bool
    in_thinking: bool
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def named(read: Callable[[], Read]) -> Read:
    """What `read` makes of a body of another dialect. Raises pydantic's complaints as those of the request they are."""
    try:
        return read()
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


async def render(body: ChatRequest, platform: Platform) -> Rendered:
    """Raises RequestError for what the model's template cannot show."""
    served = platform.find(body.model)
    body.refuse_unsupported()
    thinking = _thinking(body, served)
    messages = platform.replay.restore(owner(body.user_id), [message.plain() for message in body.messages])
    tools = [tool.plain() for tool in body.tools or () if body.tool_choice != "none"]
    uses_tools = body.tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages)
    if uses_tools and not served.tokenizer.has_special(TOOL_CALLS_BEGIN):
        raise RequestError(f"The model '{body.model}' cannot call tools", remedy="leave tools out", param="tools")
    try:
        # In a thread: a long conversation takes longer to encode than other streams should wait.
        prompt = await asyncio.to_thread(served.template.encode, served.tokenizer, messages, thinking, tools=tools)
    except DataError as error:
        raise RequestError(str(error), param="messages") from error
    in_thinking = served.template.starts_in_thinking(thinking, messages)
    return Rendered(served, prompt, thinking, in_thinking, messages, tools)


async def prepare_chat(body: ChatRequest, platform: Platform, prefix: str = "chatcmpl-") -> Call:
    """Raises RequestError for whatever is wrong with the request. prefix: of the call's id."""
    rendered = await render(body, platform)
    served = rendered.served
    params = sampling(body, served, len(rendered.prompt), platform.settings)
    params = replace(params, grammar=_grammar(body, served, rendered.in_thinking))
    if body.tools and not rendered.tools:  # it may have seen calls before; now it is to make none
        forbidden = (served.tokenizer.special(TOOL_CALLS_BEGIN),)
        params = replace(params, bad_token_ids=(*params.bad_token_ids, forbidden))
    call_id = prefix + uuid.uuid4().hex
    requests = engine_requests(call_id, rendered.prompt, params, body, served)
    job = Job(served, requests, rendered.in_thinking, reads_calls=bool(rendered.tools), n=body.n or 1)
    return Call(call_id, body, job, rendered.in_thinking, _compare(call_id, body, rendered, platform))


def _compare(call_id: str, body: ChatRequest, rendered: Rendered, platform: Platform) -> Comparison | None:
    shape = {"model": rendered.served.name, "thinking": rendered.thinking}
    now = asked(call_id, rendered.prompt, rendered.messages, rendered.tools, **shape)
    named_id = body.prompt_cache_options.comparison_response_id if body.prompt_cache_options else None
    visit = VISIT.get()
    return platform.prompts.compare(visit.caller.id if visit else "", body.cache_scope, now, named_id)


def engine_requests(
    call_id: str, prompt: Sequence[int], params: SamplingParams, body: Sampled, served: ServedModel
) -> tuple[Request, ...]:
    """One for each choice; with a seed, number i draws as seed + i does. Raises RequestError for what the engine would
    refuse, HTTPException 503 where it is gone."""
    if not served.engine.alive:
        raise engine_gone()
    count = body.n or 1
    requests = []
    for i in range(count):
        seed = None if params.seed is None else params.seed + i
        name = call_id if count == 1 else f"{call_id}-{i}"
        requests.append(Request(name, tuple(prompt), replace(params, seed=seed), salt=body.cache_scope))
    check_request(requests[0], served.engine.info)
    return tuple(requests)


def sampling(body: Sampled, served: ServedModel, prompt_tokens: int, settings: Settings) -> SamplingParams:
    defaults, info = served.defaults, served.engine.info
    max_tokens, room = body.wanted_tokens, max(1, info.max_model_len - prompt_tokens)
    if max_tokens is None:
        max_tokens = min(room, max(defaults.max_tokens or settings.default_max_tokens, body.min_tokens or 0))
    elif served.alias:
        max_tokens = min(room, max_tokens)
    top_k = defaults.top_k if body.top_k is None else body.top_k
    params = SamplingParams(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=max(SMALLEST_TOP_P, defaults.top_p if body.top_p is None else body.top_p),
        top_k=min(max(0, top_k), info.vocab_size),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.wanted_logprobs,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=tuple((body.logit_bias or {}).items()),  # type: ignore[arg-type]  # its keys are turned into ids
        bad_words=tuple(body.bad_words or ()),
    )
    return params.spelled(served.tokenizer.encode)


def _thinking(body: ChatRequest, served: ServedModel) -> bool:
    """Whether to think. Raises RequestError where the request says what this model's template cannot do."""
    param, wish = body.thinking_wish()
    if wish is None:
        return served.defaults.thinking and served.template.supports_thinking
    if wish and not served.template.supports_thinking:
        raise RequestError(f"The model '{body.model}' has no thinking mode", remedy="leave thinking out", param=param)
    if not wish and served.template.starts_in_thinking(False):
        raise RequestError(f"The model '{body.model}' always thinks", remedy="leave thinking out", param=param)
    return wish


def _grammar(body: ChatRequest, served: ServedModel, in_thinking: bool) -> Grammar | None:
    """What the answer must match: a response_format, calls that are required, and calls that exist and hold JSON
    wherever the model makes some. It begins behind the thought."""
    answer = _answer_schema(body)
    tools = [tool.function for tool in body.tools or () if body.tool_choice != "none"]
    after = (served.tokenizer.special(END_THINK),) if in_thinking else ()
    if not tools:
        return None if answer is None else Grammar("json_schema", json.dumps(answer, ensure_ascii=False), after)
    choice = body.tool_choice
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        parallel = bool(body.parallel_tool_calls)  # who names one function wants one call
        tools = [tool for tool in tools if tool.name == choice.function.name]
    schemas = {tool.name: _arguments(tool) for tool in tools}
    required = choice == "required" or isinstance(choice, NamedTool)
    free = not required and answer is None
    text = call_grammar(
        served.tokenizer,
        served.template.tool_form,
        schemas,
        parallel=parallel,
        opened=free,
        answer=None if required else answer,
    )
    if free:
        return Grammar("lark", text, (served.tokenizer.special(TOOL_CALLS_BEGIN),), optional=True)
    return Grammar("lark", text, after)


def _arguments(tool: Function) -> dict[str, Any]:
    """What a call's arguments must match: all that the schema says where it is strict, else its shape."""
    given = tool.parameters or {}
    return {"type": "object"} | (given if tool.strict else shape(given) | {"type": "object"})


def _answer_schema(body: ChatRequest) -> dict[str, Any] | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    given = wanted.json_schema.schema_ if wanted.type == "json_schema" and wanted.json_schema else None
    return {"type": "object"} if given is None else given
