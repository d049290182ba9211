"""POST /responses: OpenAI's Responses API, stateless, as DeepSeek offers it.

One `ResponseEvents` turns the event stream into Responses' events and keeps the response object up to date; whoever does
not stream reads the object at the end, so that both forms say the same. A stream ends with response.completed, .incomplete
or .failed, and has no `[DONE]`. Thoughts are reasoning items with their text.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rorqual.serve.chat import sse
from rorqual.serve.errors import ApiError
from rorqual.serve.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from rorqual.serve.logprobs import chat_logprobs
from rorqual.serve.prepare import IGNORED, Call, Platform, named, prepare_chat
from rorqual.serve.responses_schemas import ResponsesRequest
from rorqual.serve.stream import Attended, EventStream

Item = dict[str, Any]


async def responses(body: ResponsesRequest, http: HttpRequest, platform: Platform) -> Response:
    call = await prepare_chat(named(body.chat), platform, "resp_")
    headers = {IGNORED: ", ".join(body.ignored())} if body.ignored() else {}
    events, dialect = call.events(platform.replay), ResponseEvents(call, body)
    if body.stream:
        return EventStream(events, dialect, platform.settings, headers)
    async with Attended(events, http.receive, platform.settings) as attended:
        async for event in attended:
            if event is not None:
                dialect.take(event)
    return JSONResponse(dialect.response, headers=headers)


class ResponseEvents:
    """The streaming dialect. response: the object so far; take: the news that an event makes of it."""

    def __init__(self, call: Call, body: ResponsesRequest) -> None:
        self._call = call
        self._number = 0
        self._started = False
        self._open: tuple[str, int] | None = None  # the item that is being written: its type, and which call
        self._finish = Finish("stop")
        self.response = _response(call, body)

    def encode(self, event: Event) -> bytes:
        return b"".join(self._spell(news) for news in self.take(event))

    def encode_error(self, error: ApiError) -> bytes:
        news = [] if self._started else self._start()
        kind = "rate_limit_exceeded" if error.status == 429 else "server_error"
        message = error.body()["error"]["message"]
        self.response |= {"status": "failed", "error": {"code": kind, "message": message}}
        return b"".join(self._spell(n) for n in [*news, {"type": "response.failed", "response": self.response}])

    def take(self, event: Event) -> list[Item]:
        news = [] if self._started else self._start()
        match event:
            case ReasoningDelta(text=text):
                news += self._text("reasoning", "response.reasoning_text.delta", text, {}) if text else []
            case TextDelta(text=text):
                news += self._text("message", "response.output_text.delta", text, {"logprobs": self._logprobs(event)})
            case ToolCallDelta():
                news += self._call_news(event)
            case Finish():
                self._finish = event
                news += self._close()
            case Usage():
                news.append(self._end(event))
        return news

    def _start(self) -> list[Item]:
        self._started = True
        return [{"type": f"response.{kind}", "response": dict(self.response)} for kind in ("created", "in_progress")]

    def _end(self, usage: Usage) -> Item:
        incomplete = self._finish.reason == "length"
        status = "incomplete" if incomplete else "completed"
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "usage": _usage(usage),
            **self._call.diagnosed(usage),
        }
        return {"type": f"response.{status}", "response": self.response}

    @property
    def _item(self) -> Item:
        item: Item = self.response["output"][-1]
        return item

    def _where(self, part: bool = True) -> Item:
        where = {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}
        return where | ({"content_index": 0} if part else {})

    def _enter(self, block: tuple[str, int], item: Item, part: Item | None) -> list[Item]:
        """Opens an item unless it is open already."""
        if self._open == block:
            return []
        news = self._close()
        self._open = block
        number = len(self.response["output"])
        item = {"id": f"{item['type'][:3]}_{self._call.id}_{number}", "status": "in_progress", **item}
        self.response["output"].append(item)
        news.append({"type": "response.output_item.added", "output_index": number, "item": _copy(item)})
        if part is not None:
            item["content"].append(part)
            news.append({"type": "response.content_part.added", **self._where(), "part": dict(part)})
        return news

    def _text(self, kind: str, event: str, text: str, more: Item) -> list[Item]:
        item: Item = {"type": kind, "content": []}
        part: Item = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            item["role"] = "assistant"
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item["summary"] = []
        news = self._enter((kind, 0), item, part)
        written = self._item["content"][0]
        written["text"] += text
        if more.get("logprobs"):
            written["logprobs"] += more["logprobs"]
        return [*news, {"type": event, **self._where(), "delta": text, **more}]

    def _call_news(self, event: ToolCallDelta) -> list[Item]:
        item = {"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""}
        news = self._enter(("function_call", event.call), item, None)
        self._item["arguments"] += event.arguments
        if event.arguments:
            kind = "response.function_call_arguments.delta"
            news.append({"type": kind, **self._where(part=False), "delta": event.arguments})
        return news

    def _close(self) -> list[Item]:
        """The open item is complete, or as complete as it gets."""
        if self._open is None:
            return []
        kind, self._open = self._open[0], None
        item = self._item
        item["status"] = "incomplete" if self._finish.reason == "length" else "completed"
        news: list[Item] = []
        if kind == "function_call":
            done = "response.function_call_arguments.done"
            told = {"name": item["name"], "arguments": item["arguments"]}
            news.append({"type": done, **self._where(part=False), **told})
        else:
            part = item["content"][0]
            name = "output_text" if kind == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if kind == "message" else {}
            news.append({"type": f"response.{name}.done", **self._where(), "text": part["text"], **more})
            news.append({"type": "response.content_part.done", **self._where(), "part": part})
        number = len(self.response["output"]) - 1
        return [*news, {"type": "response.output_item.done", "output_index": number, "item": item}]

    def _logprobs(self, event: TextDelta) -> list[Any]:
        entries: list[Any] = chat_logprobs(self._call.served.tokenizer, event.logprobs, ())["content"]
        return entries

    def _spell(self, news: Item) -> bytes:
        numbered = {"type": news["type"], "sequence_number": self._number, **news}
        self._number += 1
        return sse(numbered, news["type"])


def _copy(item: Item) -> Item:
    """As it is now: the item goes on to change."""
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}


def _response(call: Call, body: ResponsesRequest) -> Item:
    params = call.job.requests[0].params
    return {
        "id": call.id,
        "object": "response",
        "created_at": call.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": call.served.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": params.temperature,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"parameters": None, "strict": False, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _usage(usage: Usage) -> Item:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
