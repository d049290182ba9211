"""The chat's HTTP routes, at the root only: they are the page's, not an API that other servers have.

Chats belong to the key that the request came with. An answer's events are told as long as somebody listens; the answer
itself does not depend on it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Query, Request, Response, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from rorqual.errors import RequestError
from rorqual.serve.callers import VISIT, Caller
from rorqual.serve.chats import export
from rorqual.serve.chats.files import Files
from rorqual.serve.chats.imported import ImportedChat
from rorqual.serve.chats.live import Frame
from rorqual.serve.chats.service import Chats
from rorqual.serve.chats.shapes import (
    ChatPatch,
    Continuation,
    NewAnswer,
    NewChat,
    NewQuestion,
    Stop,
)
from rorqual.serve.chats.store import LIST_LIMIT
from rorqual.serve.database import twice
from rorqual.serve.errors import ApiError, Refused
from rorqual.serve.run import is_loopback

Limit = Annotated[int, Query(ge=1, le=LIST_LIMIT)]
Words = Annotated[str, Query(max_length=500)]


UPLOADS = ("/chats/files", "/chats/import")
COSTS = ("/messages", "/answers", "/continue", "/files")


def is_free(path: str) -> bool:
    """Whether a POST costs nothing: an answer must be stopped even by a key that may do one thing at once."""
    return (path == "/chats" or path.startswith("/chats/")) and not path.endswith(COSTS)


def same_site(request: Request) -> None:
    """Without keys, who can reach the server can read it: the people of this machine, and so every web page they visit,
    unless its address gives it away. A page of another site shows it in `Origin`; one that made its own name mean this
    machine (DNS rebinding) has that name in `Host`. Raises HTTPException 403."""
    if caller().id:  # a page that knows a key was given it
        return
    origin = request.headers.get("origin")
    hosts = [
        urlsplit(f"//{request.headers.get('host', '')}").hostname,
        urlsplit(origin).hostname if origin else "localhost",
    ]
    if not all(host and is_loopback(host) for host in hosts):
        raise HTTPException(403, "Conversations are told to pages of this machine alone, unless there are API keys.")


def caller() -> Caller:
    visit = VISIT.get()
    assert visit is not None, "the border gives every request a visit"
    return visit.caller


def owner() -> str:
    return caller().owner


def routes(chats: Chats, files: Files) -> APIRouter:
    router = APIRouter(prefix="/chats", dependencies=[Depends(same_site)])
    for part in (_transfers, _conversations, _files, _messages):
        part(router, chats, files)
    return router


def _conversations(router: APIRouter, chats: Chats, files: Files) -> None:
    store = chats.store

    @router.get("/setup")
    async def setup() -> dict[str, Any]:
        return await chats.setup()

    @router.get("")
    async def list_chats(query: Words = "", before: str = "", limit: Limit = 50) -> dict[str, Any]:
        return await asyncio.to_thread(store.recent, owner(), query, before, limit)

    @router.post("")
    async def create(body: NewChat) -> dict[str, Any]:
        return await asyncio.to_thread(twice, store.create, owner(), body)

    @router.get("/{chat}")
    async def get(chat: str) -> Response:
        body = await asyncio.to_thread(export.whole, await chats.chat(owner(), chat))
        return Response(body, media_type="application/json")

    @router.patch("/{chat}")
    async def patch(chat: str, body: ChatPatch) -> dict[str, Any]:
        return await asyncio.to_thread(store.patch, owner(), chat, body)

    @router.delete("/{chat}", status_code=204)
    async def delete(chat: str) -> None:
        await chats.delete(owner(), chat)


def _transfers(router: APIRouter, chats: Chats, files: Files) -> None:
    store = chats.store

    @router.post("/import")
    async def import_chat(body: ImportedChat) -> Response:
        found = await asyncio.to_thread(export.load, store, owner(), body)
        return Response(await asyncio.to_thread(export.whole, found), media_type="application/json")

    @router.get("/{chat}/export", responses={200: {"description": "", "content": {"text/markdown": {}}}})
    async def export_chat(chat: str, format: str = "markdown") -> Response:
        if format not in ("markdown", "json"):
            raise RequestError(f"there is no format {format!r}", remedy="markdown or json", param="format")
        found = await chats.chat(owner(), chat)
        if format == "markdown":
            body, suffix, kind = export.as_markdown(found).encode(), "md", "text/markdown; charset=utf-8"
        else:
            texts = await asyncio.to_thread(store.file_texts, owner(), chat)
            body = await asyncio.to_thread(export.whole, export.as_json(found, texts))
            suffix, kind = "json", "application/json"
        name = export.file_name(found["title"], suffix)
        headers = {"content-disposition": f'attachment; filename="{name}"', "x-content-type-options": "nosniff"}
        return Response(body, headers=headers, media_type=kind)


def _files(router: APIRouter, chats: Chats, files: Files) -> None:
    @router.post("/files")
    async def upload(file: UploadFile) -> dict[str, Any]:
        body = await file.read(chats.file_bytes + 1)
        if len(body) > chats.file_bytes:
            limit = f"{chats.file_bytes / 1e6:.1f} MB"
            raise Refused(ApiError(413, f"{file.filename or 'the file'} is larger than {limit}.", "file"))
        return (await files.add(owner(), file.filename or "", file.content_type or "", body)).json()

    @router.delete("/files/{file}", status_code=204)
    async def remove(file: str) -> None:
        await asyncio.to_thread(files.remove, owner(), file)


def _messages(router: APIRouter, chats: Chats, files: Files) -> None:
    @router.post("/{chat}/messages")
    async def ask(chat: str, body: NewQuestion) -> dict[str, Any]:
        question, answer = await chats.ask(owner(), caller(), chat, body)
        return {"question": question.json(), "answer": answer.json()}

    @router.post("/{chat}/answers")
    async def answer(chat: str, body: NewAnswer) -> dict[str, Any]:
        return (await chats.answer(owner(), caller(), chat, body)).json()

    @router.post("/{chat}/messages/{message}/continue")
    async def go_on(chat: str, message: str, body: Continuation | None = None) -> dict[str, Any]:
        return (await chats.go_on(owner(), caller(), chat, message, body or Continuation())).json()

    @router.post("/{chat}/messages/{message}/stop")
    async def stop(chat: str, message: str, body: Stop | None = None) -> dict[str, Any]:
        thinking = body is not None and body.thinking
        return (await chats.stop_answer(owner(), chat, message, thinking=thinking)).json()

    @router.get("/{chat}/messages/{message}")
    async def message(chat: str, message: str) -> dict[str, Any]:
        return (await chats.message(owner(), chat, message)).json()

    @router.get(
        "/{chat}/messages/{message}/events", responses={200: {"description": "", "content": {"text/event-stream": {}}}}
    )
    async def events(chat: str, message: str, request: Request, after: str = "") -> Response:
        frames = await chats.events(owner(), chat, message)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(_sse(frames), media_type="text/event-stream", headers=headers)


async def _sse(frames: AsyncGenerator[Frame | None, None]) -> AsyncGenerator[bytes, None]:
    async for frame in frames:
        if frame is None:
            yield b": ping\n\n"
        else:
            position, data = frame
            yield f"id: {position}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
