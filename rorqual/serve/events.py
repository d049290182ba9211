"""The one event stream that every dialect speaks from.

A request's events are `ReasoningDelta`, `TextDelta` and `ToolCallDelta`s of its choices, one `Finish` for each choice,
and at last one `Usage`. All text in them is final. What differs between chat completions, completions, Responses and
Anthropic messages is only how they spell these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rorqual.engine.api import TokenLogprob

Logprobs = tuple[TokenLogprob, ...]
Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the thought. text may be empty where only log-probabilities are news."""

    text: str
    logprobs: Logprobs = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str
    logprobs: Logprobs = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """News of call number `call`: id and name together once, before any of its arguments."""

    call: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """A choice has ended. stop: the stop string that ended it, if one did."""

    reason: Reason
    stop: str | None = None
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one request, all choices together. `completion_tokens` includes thought, markers and the end of
    sequence."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int

    def openai(self) -> dict[str, Any]:
        """OpenAI's keys and DeepSeek's: clients of both read one or the other."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "prompt_cache_hit_tokens": self.cached_tokens,
            "prompt_cache_miss_tokens": self.prompt_tokens - self.cached_tokens,
        }


Event = ReasoningDelta | TextDelta | ToolCallDelta | Finish | Usage
