"""What a client is told does not depend on how the engine's tokens were cut into outputs: at every position, and at any
several. Markers that somebody typed are letters, in every cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import special
from rorqual.data.template import ChatTemplate, Name
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tools import tool_calls
from rorqual.engine.api import FinishReason, Output, Request, SamplingParams, TokenLogprob
from rorqual.engine.scripted import ScriptedEngine
from rorqual.serve.answers import Answer
from rorqual.serve.events import Usage
from rorqual.serve.generation import Job, produce
from rorqual.serve.served import ServedModel

PIECES = st.text("ab c🐋é", max_size=6) | st.sampled_from(
    [*special.SPECIAL_TOKENS, "STOP", "STO", "```json\n", "\n```"]
)
TEXT = st.lists(PIECES, max_size=4).map("".join)
CALL = st.tuples(st.sampled_from(["paint", "f"]), st.dictionaries(TEXT, TEXT | st.integers(), max_size=2))


class Cut(ScriptedEngine):
    """Says `ids` in outputs that end at the `cuts`."""

    def __init__(self, ids: list[int], cuts: list[int]) -> None:
        super().__init__()
        self.ids, self.cuts = ids, sorted({*cuts, len(ids)} - {0})

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:  # type: ignore[override]
        begin = 0
        for end in self.cuts:
            ids = tuple(self.ids[begin:end])
            reason = FinishReason.STOP if end == len(self.ids) else None
            yield Output(request.id, ids, tuple(TokenLogprob(i, -0.5) for i in ids), 0, reason)
            begin = end


def told(
    tokenizer: Tokenizer, name: Name, ids: list[int], cuts: list[int], thinks: bool, calls: bool
) -> tuple[Any, ...]:
    """Everything that the events say, joined."""
    served = ServedModel(Cut(ids, cuts), tokenizer, ChatTemplate(name), name="m", created=0)
    request = Request("r", (1,), SamplingParams(stop=("STOP",), logprobs=0))
    answer, usage = Answer(), None

    async def read() -> None:
        nonlocal usage
        async for event in produce(Job(served, (request,), in_thinking=thinks, reads_calls=calls)):
            if isinstance(event, Usage):
                usage = event
            else:
                answer.add(event)

    asyncio.run(read())
    made = [(call.name, "".join(call.arguments)) for call in answer.calls]
    listed = [[p.token_id for piece in kind for p in piece.logprobs] for kind in (answer.thoughts, answer.pieces)]  # type: ignore[attr-defined]
    return answer.reasoning, answer.text, made, answer.finish, listed, usage


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
@settings(max_examples=25, deadline=None)
@given(thought=TEXT | st.none(), text=TEXT, calls=st.lists(CALL, max_size=2), data=st.data())
def test_any_cut_says_the_same(
    tokenizer: Tokenizer,
    name: Name,
    thought: str | None,
    text: str,
    calls: list[tuple[str, dict[str, Any]]],
    data: st.DataObject,
) -> None:
    ids = [] if thought is None else [*tokenizer.encode(thought), tokenizer.special(special.END_THINK)]
    ids += tokenizer.encode(text)
    made = [{"function": {"name": n, "arguments": json.dumps(a, ensure_ascii=False)}} for n, a in calls]
    for segment in tool_calls(ChatTemplate(name).tool_form, made) if made else []:
        ids += [tokenizer.special(segment.text)] if segment.special else tokenizer.encode(segment.text)
    ids.append(tokenizer.eos_id)

    def read(cuts: list[int]) -> tuple[Any, ...]:
        return told(tokenizer, name, ids, cuts, thought is not None, True)

    whole = read([])
    assert whole[0] == (thought or "")
    if "STOP" not in text:
        assert whole[1:3] == (text, [(n, json.dumps(a, ensure_ascii=False)) for n, a in calls])
        assert whole[3].reason == ("tool_calls" if calls else "stop")
    for position in range(1, len(ids)):
        assert read([position]) == whole
    assert read(list(range(len(ids)))) == whole
    assert read(data.draw(st.lists(st.integers(1, len(ids)), max_size=6))) == whole
