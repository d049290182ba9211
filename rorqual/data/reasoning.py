"""Thinking apart from the answer, by token, as it streams.

`<think>` and `</think>` are single tokens, so the border is an id and never a spelling: a model that writes
about `</think>` in letters, or a user who makes it repeat them, cannot move text from one side to the other.
"""

from __future__ import annotations

from rorqual.data.special import END_THINK, THINK
from rorqual.data.tokenizer import Tokenizer


class ReasoningSplitter:
    """Turns token ids into (reasoning, content) text, each final and without half characters.

    in_thinking: whether the prompt ended inside a thought (`ChatTemplate.starts_in_thinking`).
    `reasoning_tokens` counts the tokens of the thought without its two markers. The markers themselves appear
    in neither text.
    """

    def __init__(self, tokenizer: Tokenizer, in_thinking: bool) -> None:
        self._begin = tokenizer.special(THINK) if tokenizer.has_special(THINK) else None
        self._end = tokenizer.special(END_THINK) if tokenizer.has_special(END_THINK) else None
        self._stream = tokenizer.stream()
        self.in_thinking = in_thinking
        self.reasoning_tokens = 0

    def push(self, token_id: int) -> tuple[str, str]:
        """The text that this token completes. A marker also releases what was held back before it."""
        if token_id in (self._begin, self._end):
            released = self.flush()
            self.in_thinking = token_id == self._begin
            return released
        self.reasoning_tokens += self.in_thinking
        return self._side(self._stream.push(token_id))

    def leave(self) -> tuple[str, str]:
        """The thought ends here without its marker, as before a tool call. Releases what was held back."""
        released = self.flush()
        self.in_thinking = False
        return released

    def flush(self) -> tuple[str, str]:
        """What is still held back: half a character, as U+FFFD."""
        return self._side(self._stream.flush())

    def _side(self, text: str) -> tuple[str, str]:
        return (text, "") if self.in_thinking else ("", text)
