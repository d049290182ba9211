"""POST /tokenize and /detokenize, with vLLM's fields: what a prompt is to the model."""

from __future__ import annotations

from typing import Any

from rorqual.serve.completion_schemas import DetokenizeRequest, TokenizeRequest
from rorqual.serve.prepare import Platform, render
from rorqual.serve.schemas import ChatRequest
from rorqual.serve.served import ServedModel


async def tokenize(body: TokenizeRequest, platform: Platform) -> dict[str, Any]:
    """Raises RequestError where the messages cannot be rendered, NotFound for the model."""
    body.refuse_unsupported()
    served = _served(body.model, platform)
    if body.messages is not None:
        name = body.model or next(iter(platform.models))
        chat = ChatRequest(model=name, messages=body.messages, tools=body.tools, thinking=body.thinking)
        ids = (await render(chat, platform)).prompt
    else:
        ids = [served.tokenizer.bos_id] if body.add_special_tokens else []
        ids += served.tokenizer.encode(body.prompt or "")
    told = {"count": len(ids), "max_model_len": served.engine.info.max_model_len, "tokens": ids, "token_strs": None}
    if body.return_token_strs:
        told["token_strs"] = [served.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return told


def detokenize(body: DetokenizeRequest, platform: Platform) -> dict[str, Any]:
    body.refuse_unsupported()
    return {"prompt": _served(body.model, platform).tokenizer.decode(body.tokens, skip_special=False)}


def _served(name: str | None, platform: Platform) -> ServedModel:
    return platform.find(next(iter(platform.models)) if name is None else name)
