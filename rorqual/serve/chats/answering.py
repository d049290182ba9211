"""Writing one answer: search if it is asked for, ask the model, write down what comes, end with one status.

The answer runs in a task of its own and not in any request: who asked may leave, and come back. What has come is in the
database within `SAVE_S`, whether or not the model is fast; a killed server loses no more than that.

Whoever wants it to stop says what is wished ("stop", "answer": stop thinking and answer; "cut": the server ends), and
the task that talks to the model is cancelled, whatever it waits for. To answer at once the model is asked again, with
its thought so far as a prefix that is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from rorqual.errors import PromptTooLong, RorqualError
from rorqual.search.api import Problem, Queries, Source, Sources
from rorqual.search.check import check_text
from rorqual.search.turn import SearchSettings, research
from rorqual.serve.callers import VISIT, Caller, Visit
from rorqual.serve.chats.live import Live
from rorqual.serve.chats.prompting import Prompt, begun, conversation, source_json, source_of, with_sources
from rorqual.serve.chats.shapes import ChatSettings, Message, Status, Turn
from rorqual.serve.chats.store import checks_json
from rorqual.serve.chats.voices import Asked, ModelCard, Voice, card
from rorqual.serve.chats.work import Work
from rorqual.serve.errors import to_api_error
from rorqual.serve.events import Finish, ReasoningDelta, TextDelta, Usage
from rorqual.serve.searching import Searcher

log = logging.getLogger(__name__)
SAVE_S = 0.4
USAGE_S = 1.0
QUERY_TOKENS = 200
ANSWER_TOKENS = 1024
Wish = Literal["stop", "answer", "cut", "gone"]
ENDINGS: Mapping[Wish, Status] = {"stop": "stopped", "cut": "cut", "gone": "stopped", "answer": "stopped"}


@dataclass(frozen=True, slots=True)
class Tools:
    """What every answer needs."""

    work: Work
    voice: Voice
    searcher: Searcher | None


class Answering:
    """One answer. `path` leads to its question; answers_now: its thought is over, whether or not it has text."""

    def __init__(
        self, live: Live, path: Sequence[Turn], caller: Caller, tools: Tools, *, answers_now: bool = False
    ) -> None:
        self.live = live
        self._message = live.message
        self._settings = ChatSettings(**(self._message.settings or {}))
        self._path, self._caller, self._tools = path, caller, tools
        self._answers_now = answers_now
        self._wish: Wish | None = None
        self._inner: asyncio.Task[Status] | None = None
        self._over = asyncio.Event()
        self._usage = _Meter(self._message.usage)

    def wish(self, wish: Wish) -> None:
        """Takes effect at once. What is wished later counts, but for an end that was already wished; an answer that has
        begun cannot begin."""
        if wish == "answer" and self.live.content.whole():
            return
        if self._wish in (None, "answer"):
            self._wish = wish
        # One that is ending is left to it: a second cancellation would interrupt the closing of its connection.
        if self._inner is not None and not self._inner.cancelling():
            self._inner.cancel()

    async def run(self) -> None:
        """To the end, which is written down. Raises nothing."""
        keeper = asyncio.create_task(self._keep())
        status: Status
        try:
            status = await self._speak_until_done()
            if self._message.search:
                await self._check()
        except Exception as error:
            status = "error"
            self._fail(error)
        finally:
            # Not cancelled: a thread goes on all the same, and would write an older text over the last one.
            self._over.set()
            await asyncio.gather(keeper, return_exceptions=True)
        self.live.stop_clock()
        self._account()
        # First written, then told: the next question reads this answer from the database.
        ended = replace(self.live.settle(), status=status)
        written = await self._written(ended, 0.0, 0.5, 2.0)
        self._message.status = status
        self.live.end()
        self._tell()
        while not written:  # a full disk, a database that is away: for as long as it takes
            written = await self._written(ended, 10.0)

    def _tell(self) -> None:
        """One log line, as of any request."""
        usage = self._message.usage or {}
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        fields = {"request_id": f"chat_{self._message.id}", "key": self._caller.id, "model": self._message.model}
        fields |= {"status": self._message.status, **{name: usage.get(name, 0) for name in names}}
        log.info("%(request_id)s %(model)s %(status)s %(completion_tokens)s tokens", fields, extra={"fields": fields})

    async def _speak_until_done(self) -> Status:
        while True:
            self._inner = asyncio.create_task(self._speak())
            if self._wish is not None:  # it was wished before there was anything to cancel
                self._inner.cancel()
            try:
                return await self._inner
            except asyncio.CancelledError:
                wish = self._wish
                if wish is None:  # nobody's wish: the loop itself is ending
                    return "cut"
            self.live.stop_clock()
            self._usage.close()
            if wish != "answer":
                return ENDINGS[wish]
            self._wish, self._answers_now = None, True
            await asyncio.to_thread(self._tools.work.granted, self._message)

    async def _speak(self) -> Status:
        model = await card(self._tools.voice, self._settings.model)
        used = {"model": model.id, "thinking": model.thinks(self._settings.thinking)}
        self._settings = self._settings.model_copy(update=used)
        self._message.settings, self._message.model = self._settings.model_dump(), model.id
        messages = conversation(self._path, self._settings.system)
        if self._settings.search and not (self._message.search or {}).get("done"):
            await self._search(messages, model)
        messages = with_sources(messages, self._sources(), self._message.created)
        messages += begun(self.live.settle(), answers_now=self._answers_now)
        s = self._settings
        asked = Asked(s.model, messages, s.thinking, s.temperature, s.top_p, s.max_tokens, s.seed)
        reason = "stop"
        self._open()
        told = time.monotonic()
        async with aclosing(self._tools.voice.answer(asked)) as events:
            async for event in events:
                match event:
                    case ReasoningDelta(text=text):
                        self.live.think(text)
                    case TextDelta(text=text):
                        self.live.say(text)
                    case Finish():
                        reason = event.reason
                    case Usage(reasoning_tokens=thought) if thought and self._usage.requests_thought == 0:
                        self._message.thinking_tokens = thought
                self._usage.count(event)
                if time.monotonic() - told >= USAGE_S:
                    told = time.monotonic()
                    self._account()
        self._usage.close()
        return "length" if reason == "length" else "done"

    def _open(self) -> None:
        """The next request's account."""
        visit = Visit(f"chat_{self._message.id}", self._caller)
        VISIT.set(visit)
        self._usage.open(visit)

    def _account(self) -> None:
        self._message.usage = self._usage.json(self._message.thinking_tokens or 0)
        self.live.tell("usage")

    def _fail(self, error: Exception) -> None:
        told = to_api_error(error).body()["error"]
        self._message.error = {"message": told["message"], "code": told["code"]}
        known = isinstance(error, RorqualError)
        log.log(logging.INFO if known else logging.ERROR, "answer %s failed: %s", self._message.id, error,
                exc_info=None if known else error)  # fmt: skip

    # ---- search -----------------------------------------------------------------------------------------------------

    async def _search(self, messages: Prompt, model: ModelCard) -> None:
        """Fills the message's `search`."""
        found: dict[str, Any] = {"queries": [], "sources": [], "problems": [], "failed": None, "done": False}
        self._message.search = found
        searcher = self._tools.searcher
        if searcher is None:
            found |= {"failed": "this server has no search", "done": True}
            self.live.tell("search")
            return
        self.live.tell("search", "queries")
        question = messages[-1] | {"content": self._path[-1].content or messages[-1]["content"]}
        # One that always thinks would think about queries longer than it takes to search for the question.
        settings = _sizes(model, write_queries=model.thinking != "always")
        events = research([*messages[:-1], question], self._ask, searcher.provider, searcher.fetcher, settings=settings)
        async for event in events:
            match event:
                case Queries(queries=queries):
                    found["queries"] = list(queries)
                    self.live.tell("search", "fetching" if queries else "done")
                case Problem(where=where, message=text):
                    found["problems"].append({"where": where, "message": text})
                    self.live.tell("search", "reading")
                case Sources(sources=sources):
                    fitting = await self._fitting(messages, list(sources), model)
                    found["sources"] = [source_json(source) for source in fitting]
        if found["queries"] and not found["sources"]:
            found["failed"] = found["problems"][0]["message"] if found["problems"] else "nothing was found"
        found["done"] = True
        self.live.tell("search", "done")

    async def _fitting(self, messages: Prompt, sources: list[Source], model: ModelCard) -> list[Source]:
        """The sources without the last passages, as many as do not fit beside the conversation and room for an answer."""
        room = model.context_length - min(ANSWER_TOKENS, model.context_length // 4)
        while sources and model.context_length:
            shown = with_sources(messages, sources, self._message.created)
            if await self._tools.voice.tokens(Asked(model.id, shown, self._settings.thinking)) <= room:
                break
            *sources, last = sources
            if last.passages[1:]:
                sources.append(replace(last, passages=last.passages[:-1]))
        return sources

    async def _ask(self, messages: Sequence[Mapping[str, str]]) -> AsyncIterator[str]:
        """The model for the queries: without thought, briefly; nothing where there is no room for them."""
        self._open()
        asked = Asked(self._settings.model, [dict(m) for m in messages], temperature=0.0, max_tokens=QUERY_TOKENS)
        with suppress(PromptTooLong):
            async with aclosing(self._tools.voice.answer(asked)) as events:
                async for event in events:
                    self._usage.count(event)
                    if isinstance(event, TextDelta):
                        yield event.text
        self._usage.close()

    def _sources(self) -> list[Source]:
        return [source_of(kept) for kept in (self._message.search or {}).get("sources", ())]

    async def _check(self) -> None:
        content, sources = self.live.settle().content, self._sources()
        verdicts = await asyncio.to_thread(check_text, content, sources)
        self._message.checks = checks_json(content, verdicts)
        self.live.tell("checks")

    # ---- writing down -----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Saves what is new, and learns what other processes wish."""
        while not await self._is_over(SAVE_S):
            self._message.usage = self._usage.json(self._message.thinking_tokens or 0)
            kept = self.live.snapshot()
            try:
                wish = await asyncio.to_thread(self._tools.work.save, kept)
            except (
                SQLAlchemyError
            ) as error:  # a full disk, a database that is away: the next time, or the end, tries again
                log.error("answer %s could not be saved: %s", self._message.id, error)
                continue
            if wish is None:
                self.wish("gone")
            elif wish in ("stop", "answer"):
                self.wish("stop" if wish == "stop" else "answer")

    async def _is_over(self, within_s: float) -> bool:
        try:
            async with asyncio.timeout(within_s):
                return await self._over.wait()
        except TimeoutError:
            return False

    async def _written(self, ended: Message, *pauses_s: float) -> bool:
        """Write it down, after each of the pauses until it succeeds."""
        for pause_s in pauses_s:
            await asyncio.sleep(pause_s)
            try:
                await asyncio.to_thread(self._tools.work.finish, ended)
                return True
            except SQLAlchemyError as error:
                log.error("the end of answer %s could not be saved: %s", self._message.id, error)
        return False


class _Meter:
    """What an answer used, over all its requests, those of an earlier run included."""

    def __init__(self, before: Mapping[str, Any] | None) -> None:
        self._sums = {name: int((before or {}).get(name) or 0) for name in _SUMS}
        self._speed: float | None = (before or {}).get("tokens_per_s")
        self._visit: Visit | None = None
        self._events = 0
        self._first = self._last = 0.0
        self.requests_thought = self._sums["reasoning_tokens"]

    def open(self, visit: Visit) -> None:
        self._visit, self._events = visit, 0
        self._sums["requests"] += 1

    def count(self, event: object) -> None:
        if not isinstance(event, ReasoningDelta | TextDelta):
            return
        now = time.monotonic()
        self._first = self._first if self._events else now
        self._last, self._events = now, self._events + 1

    def close(self) -> None:
        """The request is over: its numbers are final."""
        if self._visit is None:
            return
        now = self._now()
        for name, value in now.items():
            self._sums[name] += value
        self._speed = self._tokens_per_s(now["completion_tokens"]) or self._speed
        self._visit = None

    def _now(self) -> dict[str, int]:
        visit = self._visit
        assert visit is not None
        completion = visit.completion_tokens or self._events
        return {
            "prompt_tokens": visit.prompt_tokens, "cached_tokens": visit.cached_tokens, "completion_tokens": completion
        }  # fmt: skip

    def _tokens_per_s(self, tokens: int) -> float | None:
        took = self._last - self._first
        return round((tokens - 1) / took, 2) if tokens > 1 and took > 0 else None

    def json(self, reasoning_tokens: int) -> dict[str, Any]:
        told: dict[str, Any] = dict(self._sums)
        speed = self._speed
        if self._visit is not None:
            now = self._now()
            for name, value in now.items():
                told[name] += value
            speed = self._tokens_per_s(now["completion_tokens"]) or speed
        return told | {"reasoning_tokens": reasoning_tokens, "tokens_per_s": speed}


_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "requests")


def _sizes(model: ModelCard, *, write_queries: bool) -> SearchSettings:
    """Half of a short context is for what was found. A token is at least one character, for ever so strange texts."""
    usual = SearchSettings(write_queries=write_queries)
    room = model.context_length * 3 // 2 if model.context_length else usual.budget_chars
    return replace(usual, budget_chars=min(usual.budget_chars, room))
