"""The routes of the API, closures over one platform. Mounted under each of `app.PREFIXES`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from rorqual.serve import answer_schemas as told
from rorqual.serve import anthropic, tokens
from rorqual.serve.anthropic_schemas import CountRequest, MessagesRequest
from rorqual.serve.chat import chat_completions
from rorqual.serve.completion_schemas import CompletionRequest, DetokenizeRequest, TokenizeRequest
from rorqual.serve.completions import completions
from rorqual.serve.openapi import answers
from rorqual.serve.prepare import Platform
from rorqual.serve.responses import responses
from rorqual.serve.responses_schemas import ResponsesRequest
from rorqual.serve.schemas import ChatRequest

DONE = "the last is `[DONE]`"
ENDED = "an event of its own is the last"


def api(platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/models", responses=answers(told.Models))
    async def list_models() -> dict[str, Any]:
        """All at once: `has_more` and what follows is for Anthropic's clients, which page."""
        listed = [served.listing(name) for name, served in platform.models.items()]
        return {
            "object": "list",
            "data": listed,
            "has_more": False,
            "first_id": listed[0]["id"],
            "last_id": listed[-1]["id"],
        }

    @router.get("/models/{name:path}", responses=answers(told.Model))
    async def get_model(name: str) -> dict[str, Any]:
        return platform.find(name).listing(name)

    @router.post("/chat/completions", responses=answers(told.ChatCompletion, told.ChatChunk, DONE))
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await chat_completions(body, request, platform)

    @router.post("/completions", responses=answers(told.TextCompletion, told.TextCompletion, DONE))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await completions(body, request, platform)

    @router.post("/responses", responses=answers(told.Response, told.ResponseEvent, ENDED))
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await responses(body, request, platform)

    @router.post("/tokenize", responses=answers(told.Tokenized))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await tokens.tokenize(body, platform)

    @router.post("/detokenize", responses=answers(told.Detokenized))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return tokens.detokenize(body, platform)

    @router.post("/messages", responses=answers(told.Message, told.MessageEvent, ENDED))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        return await anthropic.messages(body, request, platform)

    @router.post("/messages/count_tokens", responses=answers(told.Counted))
    async def count_tokens(body: CountRequest) -> Response:
        return await anthropic.count_tokens(body, platform)

    return router
