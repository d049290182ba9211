"""The routes of the API, closures over one platform. Mounted under each of `app.PREFIXES`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from rorqual.serve import anthropic, tokens
from rorqual.serve.anthropic_schemas import CountRequest, MessagesRequest
from rorqual.serve.chat import chat_completions
from rorqual.serve.completions import completions
from rorqual.serve.prepare import Platform
from rorqual.serve.responses import responses
from rorqual.serve.responses_schemas import ResponsesRequest
from rorqual.serve.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest


def api(platform: Platform) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [served.listing(name) for name, served in platform.models.items()]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return platform.find(name).listing(name)

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await chat_completions(body, request, platform)

    @router.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await completions(body, request, platform)

    @router.post("/responses")
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await responses(body, request, platform)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await tokens.tokenize(body, platform)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return tokens.detokenize(body, platform)

    @router.post("/messages")
    async def messages(body: MessagesRequest, request: Request) -> Response:
        return await anthropic.messages(body, request, platform)

    @router.post("/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        return await anthropic.count_tokens(body, platform)

    return router
