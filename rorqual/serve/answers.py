"""Collecting an event stream into whole answers, for callers that do not stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.types import Receive

from rorqual.serve.events import Event, Finish, ReasoningDelta, TextDelta, ToolCallDelta, Usage
from rorqual.serve.settings import Settings
from rorqual.serve.stream import Attended


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """One choice. Lists of pieces are joined once: adding up would copy a long answer for every token."""

    pieces: list[TextDelta] = field(default_factory=list)
    thoughts: list[ReasoningDelta] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish: Finish = field(default_factory=lambda: Finish("stop"))

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def reasoning(self) -> str:
        return "".join(piece.text for piece in self.thoughts)

    def add(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.pieces.append(event)
            case ReasoningDelta():
                self.thoughts.append(event)
            case ToolCallDelta(call=call, arguments=arguments, id=call_id, name=name):
                if call_id is not None and name is not None:
                    self.calls.append(ToolCall(call_id, name))
                self.calls[call].arguments.append(arguments)
            case Finish():
                self.finish = event


async def collect(
    events: AsyncGenerator[Event, None], choices: int, receive: Receive, settings: Settings
) -> tuple[list[Answer], Usage]:
    """All choices and the usage. Raises what `Attended` raises."""
    answers = [Answer() for _ in range(choices)]
    usage = Usage(0, 0, 0, 0)
    async with Attended(events, receive, settings) as attended:
        async for event in attended:
            if isinstance(event, Usage):
                usage = event
            elif event is not None:
                answers[event.choice].add(event)
    return answers, usage
