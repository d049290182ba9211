"""Small web sites on free ports of this machine, in the test's own event loop; every request is kept."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

Answer = bytes | Callable[["Asked"], bytes]


def page(body: str | bytes, type: str = "text/html; charset=utf-8", status: int = 200, **headers: str) -> bytes:
    """A whole HTTP answer; underscores in header names stand for hyphens."""
    raw = body.encode() if isinstance(body, str) else body
    head = {"Content-Type": type, "Content-Length": str(len(raw)), "Connection": "close"}
    head |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items() if value)
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + raw


def redirect(to: str, status: int = 302) -> bytes:
    return page("", status=status, Location=to)


@dataclass(frozen=True)
class Asked:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Site:
    """Answers by path (without the query); unknown paths get a 404."""

    answers: dict[str, Answer]
    address: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.address, 0, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def url(self, path: str = "/", host: str | None = None) -> str:
        return f"http{'s' if self.tls else ''}://{host or self.address}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            asked = Asked(method, target, headers, body)
            self.asked.append(asked)
            answer = self.answers.get(target.partition("?")[0], page("nothing here", status=404))
            writer.write(answer(asked) if callable(answer) else answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client left, as some are meant to
        finally:
            writer.close()
