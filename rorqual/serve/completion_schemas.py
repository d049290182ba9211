"""Bodies of completions, and of tokenising: what is read without a conversation's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rorqual.errors import RequestError
from rorqual.serve.schemas import Listed, Message, Sampled, Thinking, Tool

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=128)]


class CompletionRequest(Sampled):
    """prompt: one or several, as text or as token ids. suffix: what comes after the hole that is to be filled."""

    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {"best_of": (None, 1), "prompt_logprobs": (None,)}

    prompt: Any
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @field_validator("prompt", mode="before", json_schema_input_type=Prompts)
    @classmethod
    def _known_form(cls, value: object) -> object:
        """Always a list of texts and lists of ids."""
        many = value if isinstance(value, list) and value and not _is_ids(value) else [value]
        if len(many) > 128 or not all(isinstance(one, str) or (_is_ids(one) and one) for one in many):
            raise PydanticCustomError("prompt", "it is a text, token ids, or up to 128 of either")
        return many

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "log-probabilities of the prompt are not computed", remedy="leave echo out", param="echo"
            )
        if self.suffix is not None and not all(isinstance(one, str) for one in self.prompt):
            raise RequestError("suffix needs a prompt of text", param="suffix")
        if len(self.prompt) * (self.n or 1) > 128:
            raise RequestError("more than 128 completions at once", remedy="send several requests", param="n")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


class TokenizeRequest(Listed):
    """prompt, or messages with what shapes their prompt. model None: the first that is served."""

    accepted: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    tools: list[Tool] | None = None
    thinking: Thinking | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("tokenize", "give either prompt or messages")
        return self


class DetokenizeRequest(Listed):
    accepted: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    model: str | None = None
    tokens: list[int]
