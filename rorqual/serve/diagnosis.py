"""Why a prompt was not found in the prefix cache: where it diverged from an earlier one, and what had changed.

A hit needs an earlier prompt with the same beginning, so a miss is explained by comparison: with the answer that the
request names (OpenAI's `prompt_cache_options.comparison_response_id`, Anthropic's `diagnostics.previous_message_id`), or
else with that one of its user's latest prompts which it shares most with. The record is of this process, short, and each
key's and user's own; prompts are kept as token ids, so that nothing is said of them but numbers and names of parts.

The diagnosis has OpenAI's fields, and beside them `message` for people and `diverged_at`.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine.api import PAGE_SIZE
from rorqual.serve.events import Usage

LATEST = 8  # of one user's prompts are looked at where none is named


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt. parts: (name, hash) of what it was made from, in the prompt's order: the tools are one part, every
    message is one; params: what else shapes a prompt, by OpenAI's name for its change."""

    id: str
    prompt: bytes  # token ids, 4 bytes each: comparing bytes is fast
    parts: tuple[tuple[str, int], ...]
    params: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        return len(self.prompt) // 4


def asked(
    call_id: str, prompt: Sequence[int], messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], **params: Any
) -> Asked:
    parts = [("tools", _hash(tools))] if tools else []
    parts += [(f"messages[{i}]", _hash(message)) for i, message in enumerate(messages)]
    params["tools"] = sorted(map(_hash, tools))
    params["system"] = _hash([m for m in messages[:1] if m["role"] == "system"])
    return Asked(call_id, array("i", prompt).tobytes(), tuple(parts), params)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt beside an earlier one; before None: the one that was named is not known."""

    now: Asked
    before: Asked | None
    elsewhere: bool = False  # the earlier one was another user's, or had another salt

    def diagnose(self, usage: Usage) -> dict[str, Any]:
        if self.before is None:
            message = "the answer to compare with is not known here (any more)"
            return {"type": "comparison_response_not_found", "message": message}
        shared = _shared(self.now.prompt, self.before.prompt) // 4
        reusable = max(0, min(shared, self.now.tokens - 1)) // PAGE_SIZE * PAGE_SIZE
        if reusable and usage.cached_tokens >= reusable and shared == self.before.tokens and not self.elsewhere:
            return {"type": "cache_hit"}
        found = {"comparison_response_id": self.before.id, "comparison_reusable_tokens": reusable}
        reason, why, where = self._reason(shared)
        if reason is None:
            message = f"the prompt goes on from {self.before.id}, but what was computed for that is not in the cache"
            if not reusable:
                message = f"{shared} tokens are shared with {self.before.id}, and pages of {PAGE_SIZE} are"
            return {"type": "unavailable", "message": message, **found}
        place = f"token {shared} in {where}" if where else f"token {shared}"
        return {
            "type": "cache_miss",
            "reason": reason,
            "cache_missed_tokens": self.now.tokens - shared,
            **found,
            "diverged_at": {"token": shared, "part": where},
            "message": f"diverged from {self.before.id} at {place}: {why}; whole pages of {PAGE_SIZE} are shared",
        }

    def anthropic(self, usage: Usage) -> dict[str, Any] | None:
        """Anthropic's `cache_miss_reason`; None for a hit."""
        found = self.diagnose(usage)
        if found["type"] == "cache_hit":
            return None
        if found["type"] != "cache_miss" or self.before is None:
            known = {"comparison_response_not_found": "previous_message_not_found"}
            return {"type": known.get(found["type"], "unavailable")}
        kinds = {"model_changed": "model_changed", "tools_changed": "tools_changed"}
        kinds |= {"input_changed": "messages_changed", "context_compacted": "messages_changed"}
        kind = kinds.get(found["reason"], "unavailable")
        if kind == "messages_changed" and self.now.params["system"] != self.before.params["system"]:
            kind = "system_changed"
        more = {} if kind == "unavailable" else {"cache_missed_input_tokens": found["cache_missed_tokens"]}
        return {"type": kind, **more, "message": found["message"]}

    def _reason(self, shared: int) -> tuple[str | None, str, str | None]:
        """OpenAI's word, ours, and the part. None where nothing differs."""
        assert self.before is not None
        now, before = self.now, self.before
        if now.params["model"] != before.params["model"]:
            return "model_changed", "another model", None
        if self.elsewhere:
            return "prompt_cache_key_changed", "another user_id or cache_salt", None
        if shared == before.tokens:
            return None, "", None
        if (parts := (now.params["tools"], before.params["tools"]))[0] != parts[1]:
            return "tools_changed", f"{len(parts[0])} tools, {len(parts[1])} before, not the same", "tools"
        for (name, content), other in zip(now.parts, before.parts, strict=False):
            if (name, content) != other:
                if name == "tools":
                    return "tools_changed", "the same tools in another order", name
                return "input_changed", "its content is another", name
        if now.params["thinking"] != before.params["thinking"]:
            return "reasoning_effort_changed", "thinking was switched", None
        if len(now.parts) < len(before.parts):
            return "context_compacted", f"{len(before.parts) - len(now.parts)} messages fewer", now.parts[-1][0]
        # The same parts differ in how they are shown: an answer that was continued is closed now, a thought has gone.
        return "input_changed", "an earlier turn is shown in another form", None


class PromptRecord:
    """The latest prompts. max_bytes: of all of them, the oldest go first."""

    def __init__(self, max_bytes: int = 1 << 24) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, tuple[str, str, Asked]] = OrderedDict()  # by id: caller, scope, prompt
        self._latest: dict[tuple[str, str], list[str]] = {}

    def compare(self, caller: str, scope: str, now: Asked, named: str | None) -> Comparison | None:
        """With the answer called `named`, if there is one of this caller's, or with the nearest of this scope's; None
        where there is nothing to compare with. scope: user_id and salt. The prompt is kept from here on."""
        comparison = self._find(caller, scope, now, named)
        self._keep(caller, scope, now)
        return comparison

    def _find(self, caller: str, scope: str, now: Asked, named: str | None) -> Comparison | None:
        if named is not None:
            owner, its_scope, before = self._kept.get(named, (None, "", None))
            return Comparison(now, before if owner == caller else None, elsewhere=its_scope != scope)
        known = [self._kept[name][2] for name in self._latest.get((caller, scope), ())]
        before = max(reversed(known), key=lambda one: _shared(now.prompt, one.prompt), default=None)
        return None if before is None else Comparison(now, before)

    def _keep(self, caller: str, scope: str, now: Asked) -> None:
        self._kept[now.id] = caller, scope, now
        self._bytes += len(now.prompt)
        latest = self._latest.setdefault((caller, scope), [])
        latest.append(now.id)
        del latest[:-LATEST]
        while self._bytes > self._max_bytes:
            name, (caller, scope, gone) = self._kept.popitem(last=False)
            self._bytes -= len(gone.prompt)
            names = self._latest.get((caller, scope), [])
            if name in names:
                names.remove(name)
            if not names:
                self._latest.pop((caller, scope), None)


def _shared(a: bytes, b: bytes) -> int:
    """Bytes of the common beginning, in whole tokens: by halves, each one comparison in C."""
    low, high = 0, min(len(a), len(b)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * 4 : middle * 4] == b[low * 4 : middle * 4]:
            low = middle
        else:
            high = middle - 1
    return low * 4


def _hash(content: Any) -> int:
    return hash(json.dumps(content, sort_keys=True))
