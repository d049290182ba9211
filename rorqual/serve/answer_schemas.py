"""What the routes answer, for the published OpenAPI document: nothing is built from these, and a test holds every kind of
answer against them. No field is left out, so that an answer with another one does not fit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Reason = Literal["stop", "length", "tool_calls"]
Json = dict[str, Any]


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Told):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Told):
    """OpenAI's."""

    error: ErrorDetail


class AnthropicErrorDetail(Told):
    type: str
    message: str


class AnthropicError(Told):
    """Under /messages, and everywhere under /anthropic."""

    type: Literal["error"]
    error: AnthropicErrorDetail


class Model(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    thinking: bool
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int


class Models(Told):
    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str
    last_id: str


class PromptDetails(Told):
    cached_tokens: int


class CompletionDetails(Told):
    reasoning_tokens: int


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class Divergence(Told):
    token: int
    part: str | None


class Diagnosis(Told):
    type: Literal["cache_hit", "cache_miss", "comparison_response_not_found", "unavailable"]
    message: str | None = None
    reason: str | None = None
    cache_missed_tokens: int | None = None
    comparison_response_id: str | None = None
    comparison_reusable_tokens: int | None = None
    diverged_at: Divergence | None = None


class Alternative(Told):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(Alternative):
    top_logprobs: list[Alternative]


class Logprobs(Told):
    content: list[Logprob]
    reasoning_content: list[Logprob] | None


class CalledFunction(Told):
    name: str
    arguments: str


class ToolCall(Told):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(Told):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(Told):
    index: int
    message: AnsweredMessage
    logprobs: Logprobs | None
    finish_reason: Reason


class Envelope(Told):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Envelope):
    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage
    prompt_cache_diagnostics: Diagnosis | None = None


class FunctionPiece(Told):
    name: str | None = None
    arguments: str


class ToolCallPiece(Told):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionPiece


class Delta(Told):
    role: Literal["assistant"] | None = None
    content: str | None
    reasoning_content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChunkChoice(Told):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Reason | None


class ChatChunk(Envelope):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_cache_diagnostics: Diagnosis | None = None


class TextLogprobs(Told):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Told):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason | None


class TextCompletion(Envelope):
    """Also each chunk of a stream, where usage comes last."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class AnthropicUsage(Told):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class Block(Told):
    """text, thinking or tool_use."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: Json | None = None


class Message(Told):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage
    diagnostics: Json | None = None


class MessageEvent(BaseModel):
    """Anthropic's events, by their type."""

    type: Literal[
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop", "error",
    ]  # fmt: skip


class Counted(Told):
    input_tokens: int


class Response(Told):
    """OpenAI's Response; items of output are reasoning, message and function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: Json | None
    incomplete_details: Json | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Json]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: Json
    store: Literal[False]
    temperature: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: Json | None
    prompt_cache_diagnostics: Diagnosis | None = None


class ResponseEvent(BaseModel):
    """OpenAI's events, by their type; the last is response.completed, .incomplete or .failed."""

    type: str = Field(pattern=r"^response\.")
    sequence_number: int


class Tokenized(Told):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Told):
    prompt: str


class Status(Told):
    status: Literal["ok"]
