"""Conversations to token ids, as DeepSeek's three chat models expect them.

| | V3 | R1 | V3.1 |
|---|---|---|---|
| system | all system messages, joined by two newlines, right after beginning-of-sentence | same | same |
| user turn | `<｜User｜>` text | same | same |
| answer | `<｜Assistant｜>` text, end-of-sentence | same | `<｜Assistant｜></think>` text, end-of-sentence |
| to generate | `<｜Assistant｜>` | `<｜Assistant｜><think>` newline | `<｜Assistant｜>` + `<think>` or `</think>` |
| stored thinking | - | dropped: text up to the last `</think>` | dropped: up to the first `</think>` |
| tools | see `data.tools` | same as V3 | see `data.tools` |
| tool results | `<｜tool▁outputs▁begin｜>` results, a line break between, `<｜tool▁outputs▁end｜>` | same | bare results |
| after results | the answer goes on at once, with no `<｜Assistant｜>` | same | same |

A conversation is rendered to *segments*, each either a special token or plain text, and text is encoded as
text: markers typed into a message stay what they are, letters. The Jinja form of each template, for engines
that render strings, says the same but cannot promise that.

Training renders what inference will see. Past answers stand as they would in a history, without their
thinking; the last one starts with the generation prefix and is learned from there: thinking, `</think>`,
text, end-of-sentence. The prefix itself is given at inference, so nothing learns to produce it. An answer of
a training set that carries its thinking inline (`<think>..</think>text`) is taken apart first, or the markers
would be learned as letters.

Two things the published templates do not have. An answer to be continued (`prefix`, the last message) stands without
its end; with `reasoning_content` and no text it is the thought that goes on, unless `thinking_done` says that it is
over. And within a tool loop, which is everything behind the last user message, a thought that comes with its message
stays in the prompt if thinking is on: the published templates call tools without thinking only, and a model that
thought before its call would lose the thread.

Left out: the Jinja form of tools, which raises rather than render wrongly. One choice of our own: every answer to a user
gets its markers, also a second one in a row, where the published V3.1 template writes none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rorqual.data import tools as tool_text
from rorqual.data.segments import Segment, joined
from rorqual.data.special import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    THINK,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    USER,
)
from rorqual.errors import DataError

if TYPE_CHECKING:
    from rorqual.data.tokenizer import Tokenizer

Name = Literal["v3", "r1", "v3.1"]
NAMES: tuple[Name, ...] = ("v3", "r1", "v3.1")
SUPPORTED = f"supported are the templates of DeepSeek-V3, R1 and V3.1 ({', '.join(NAMES)})"


class ChatTemplate:
    """One of the three templates. Immutable."""

    def __init__(self, name: str) -> None:
        """Raises DataError for a name other than v3, r1, v3.1."""
        if name not in NAMES:
            raise DataError(f"there is no chat template {name!r}", remedy=SUPPORTED)
        self.name: Name = name

    @classmethod
    def load(cls, directory: str | Path) -> ChatTemplate:
        """Recognises the template of a model directory: chat_template.jinja if there is one, else the
        chat_template of tokenizer_config.json, else V3. Raises DataError for a template of another family."""
        directory = Path(directory)
        source = _template_source(directory)
        return cls("v3" if source is None else _recognise(source, directory))

    @property
    def supports_thinking(self) -> bool:
        return self.name != "v3"

    @property
    def tool_form(self) -> tool_text.Form:
        return "bare" if self.name == "v3.1" else "fenced"

    def starts_in_thinking(self, thinking: bool, messages: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether what is generated after the prefix, or after these messages, begins inside a thought."""
        last: Mapping[str, Any] = messages[-1] if messages else {}
        if last.get("prefix"):
            open_ = not last["content"] and not last.get("thinking_done")
            return open_ and (bool(last.get("reasoning_content")) or self.name == "r1")
        if last.get("role") == "tool":
            return False
        return self.name == "r1" or (self.name == "v3.1" and thinking)

    @property
    def jinja(self) -> str:
        """The same template for engines that take Jinja; for V3.1 with the variable `thinking`."""
        answer, prefix = _JINJA_PARTS[self.name]
        return _JINJA.replace("ANSWER", answer).replace("PREFIX", prefix)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Prompt ids. R1 thinks whether asked or not; tools as OpenAI's API has them. Raises DataError for what cannot
        be rendered."""
        return encode_segments(tokenizer, self.segments(messages, thinking, add_generation_prompt, tools))[0]

    def encode_for_training(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[int]]:
        """Ids and mask of a whole conversation; mask 1 where the token is to be learned as a target.

        Raises DataError for what cannot be rendered, or if the assistant does not have the last word.
        """
        return encode_segments(tokenizer, self.training_segments(messages))

    def segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[Segment]:
        """What `encode` encodes."""
        if thinking and not self.supports_thinking:
            raise DataError("the V3 template has no thinking mode", remedy="use a model with the r1 or v3.1 template")
        checked = _checked(messages)
        last = checked[-1]
        segments = self._history(checked, thinking, tools)
        if add_generation_prompt and last["role"] != "tool" and not last.get("prefix"):
            segments += self._prefix(thinking)
        return joined(segments)

    def training_segments(self, messages: Sequence[Mapping[str, Any]]) -> list[Segment]:
        """What `encode_for_training` encodes."""
        checked = _checked(messages)
        last = checked[-1]
        if any(m["role"] == "tool" or m.get("tool_calls") or m.get("prefix") for m in checked):
            raise DataError("conversations with tools or a prefix cannot be learned from yet", remedy="leave them out")
        if last["role"] != "assistant":
            raise DataError(
                f"a conversation to learn from must end with the assistant, not with {last['role']!r}",
                remedy="drop what follows the last answer",
            )
        reasoning, content = self._thought_and_answer(last)
        segments = self._history(checked[:-1]) + self._prefix(bool(reasoning))
        if self.starts_in_thinking(bool(reasoning)):
            segments += [Segment(reasoning, learn=True), Segment(END_THINK, special=True, learn=True)]
        return [*segments, Segment(content, learn=True), Segment(EOS, special=True, learn=True)]

    def _history(
        self, messages: Sequence[Mapping[str, Any]], thinking: bool = False, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Segment]:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        segments = [Segment(BOS, special=True), Segment(system), *tool_text.tool_list(self.tool_form, tools)]
        loop = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        previous = ""
        turns = [(i, m) for i, m in enumerate(messages) if m["role"] != "system"]
        for i, message in turns:
            role = message["role"]
            if previous == "tool" and role != "tool":
                segments += self._results_end()
            if role == "user":
                segments += [Segment(USER, special=True), Segment(message["content"])]
            elif role == "tool":
                segments += self._result(message["content"], first=previous != "tool")
            else:
                keep = i > loop and (thinking or self.name == "r1")
                segments += self._answer(message, resumed=previous == "tool", keep=keep)
            previous = role
        return segments + (self._results_end() if previous == "tool" else [])

    def _result(self, content: str, first: bool) -> list[Segment]:
        before = []
        if self.tool_form == "fenced":
            before = [Segment(TOOL_OUTPUTS_BEGIN, special=True)] if first else [Segment("\n")]
        return [
            *before, Segment(TOOL_OUTPUT_BEGIN, special=True), Segment(content), Segment(TOOL_OUTPUT_END, special=True)
        ]  # fmt: skip

    def _results_end(self) -> list[Segment]:
        return [Segment(TOOL_OUTPUTS_END, special=True)] if self.tool_form == "fenced" else []

    def _answer(self, message: Mapping[str, Any], resumed: bool, keep: bool) -> list[Segment]:
        """One answer of the history. resumed: it goes on after tool results; keep: its thought stays."""
        continued = bool(message.get("prefix"))
        calls = message.get("tool_calls") or ()
        reasoning, text = message.get("reasoning_content") or "", message["content"]
        if not continued:
            text = self._inline(text)[1]
        segments = [] if resumed else [Segment(ASSISTANT, special=True)]
        if continued or (keep and reasoning and calls):
            open_ = not text and not calls and not message.get("thinking_done")
            segments += self._thought(reasoning, open_=open_, resumed=resumed)
        elif self.name == "v3.1" and not resumed:
            segments.append(Segment(END_THINK, special=True))
        segments.append(Segment(text, learn=not continued))
        if calls:
            segments += tool_text.tool_calls(self.tool_form, calls)
        return segments if continued else [*segments, Segment(EOS, special=True, learn=True)]

    def _thought(self, reasoning: str, open_: bool, resumed: bool) -> list[Segment]:
        """A thought that stands before an answer or calls, or is to go on (`open_`)."""
        if self.name == "v3" or (not reasoning and resumed):
            return []
        if not reasoning and self.name == "v3.1":
            return [Segment(END_THINK, special=True)]
        begin = [Segment(THINK, special=True), Segment(("\n" if self.name == "r1" else "") + reasoning)]
        return begin if open_ else [*begin, Segment(END_THINK, special=True)]

    def _prefix(self, thinking: bool) -> list[Segment]:
        prefix = [Segment(ASSISTANT, special=True)]
        if self.name == "r1":
            prefix += [Segment(THINK, special=True), Segment("\n")]
        elif self.name == "v3.1":
            prefix.append(Segment(THINK if thinking else END_THINK, special=True))
        return prefix

    def _thought_and_answer(self, message: Mapping[str, Any]) -> tuple[str, str]:
        """What the last answer of a training conversation thinks and says."""
        given = message.get("reasoning_content")
        if self.name == "v3":
            return "", message["content"]
        return (given, message["content"]) if given else self._inline(message["content"])

    def _inline(self, content: str) -> tuple[str, str]:
        """Thinking and text of an answer that holds both, split where the published templates split."""
        if self.name == "v3" or END_THINK not in content:
            return "", content
        if self.name == "r1":
            reasoning, _, answer = content.rpartition(END_THINK)
            return reasoning.removeprefix(THINK).removeprefix("\n"), answer
        reasoning, _, answer = content.partition(END_THINK)
        return reasoning.removeprefix(THINK), answer


def encode_segments(tokenizer: Tokenizer, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Ids and mask of one rendered conversation."""
    return encode_segments_batch(tokenizer, [segments])[0]


def encode_segments_batch(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Segment]]
) -> list[tuple[list[int], list[int]]]:
    """`encode_segments` of many conversations with all their texts in one parallel call."""
    texts = [s.text for segments in conversations for s in segments if not s.special and s.text]
    encoded = iter(tokenizer.encode_batch(texts))
    results = []
    for segments in conversations:
        ids: list[int] = []
        mask: list[int] = []
        for segment in segments:
            if segment.special:
                new = [_special_id(tokenizer, segment.text)]
            else:
                new = next(encoded) if segment.text else []
            ids += new
            mask += [int(segment.learn)] * len(new)
        results.append((ids, mask))
    return results


def _special_id(tokenizer: Tokenizer, text: str) -> int:
    # Beginning and end are whatever the tokenizer calls so; the markers go by their spelling.
    if text == BOS:
        return tokenizer.bos_id
    return tokenizer.eos_id if text == EOS else tokenizer.special(text)


def _checked(messages: Any) -> Sequence[Mapping[str, Any]]:
    """Raises DataError, naming the message, for whatever the templates cannot render."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise DataError("a conversation needs at least one message", remedy='give [{"role": "user", "content": "hi"}]')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"message {i} is no object with role and content but {type(message).__name__}")
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise DataError(f"message {i} has the role {role!r}", remedy="use system, user, assistant or tool")
        if message.get("prefix") and (role != "assistant" or i != len(messages) - 1):
            raise DataError(
                f"message {i} is no prefix", remedy="only the last message can be, if the assistant wrote it"
            )
        if message.get("tool_calls"):
            _check_calls(message["tool_calls"], i)
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise DataError(f"the content of message {i} is not text but {found}", remedy="give a string")
        if not isinstance(message.get("reasoning_content") or "", str):
            raise DataError(f"the reasoning_content of message {i} is not text", remedy="give a string or leave it out")
    return messages


def _check_calls(calls: Any, i: int) -> None:
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"a tool call of message {i} names no function", remedy='give {"function": {"name": …}}')


def _template_source(directory: Path) -> str | None:
    """The Jinja text of a model directory, or None. Raises DataError if its config is missing or broken."""
    from rorqual.data.tokenizer import read_json

    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    source = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    return source if isinstance(source, str) and source else None


def _recognise(source: str, directory: Path) -> Name:
    """R1 opens the thought itself, V3.1 asks a variable, V3 knows nothing of thinking (at most drops it)."""
    ours = next((name for name in NAMES if ChatTemplate(name).jinja == source), None)
    if ours is not None:
        return ours
    known = all(mark in source for mark in (USER, ASSISTANT, EOS)) and "DSML" not in source
    if not known:
        raise DataError(f"the chat template of {directory} belongs to another family of models", remedy=SUPPORTED)
    code = re.sub(r"'[^']*'|\"[^\"]*\"", "", source)  # variables, not words in strings
    if re.search(r"\bthinking\b", code):
        return "v3.1"
    opens_thought = re.search(re.escape(ASSISTANT) + r"""['" +~]*<think>""", source)
    return "r1" if opens_thought else "v3"


_JINJA = """\
{%- if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' or message['tool_calls'] -%}
{{- raise_exception('tools are not supported by this template') -}}
{%- elif message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] -%}
{%- set ns.first = false -%}
{%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}
ANSWER
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
PREFIX
{%- endif -%}
"""
_SAY = "{{- '<｜Assistant｜>%s' + content + '<｜end▁of▁sentence｜>' -}}"
_DROP = "{%%- if '</think>' in content %%}{%% set content = content.split('</think>'%s %%}{%% endif -%%}\n"
_JINJA_PARTS = {
    "v3": (_SAY % "", "{{- '<｜Assistant｜>' -}}"),
    "r1": (_DROP % ")[-1]" + _SAY % "", "{{- '<｜Assistant｜><think>\\n' -}}"),
    "v3.1": (
        _DROP % ", 1)[1]" + _SAY % "</think>",
        "{{- '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') -}}",
    ),
}
