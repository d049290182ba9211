"""The only door outward. `UpstreamClient` is for servers that the operator named: an upstream, a server to be graded.

It is httpx with the choices made once: no proxy, certificate or password from the environment, no redirects (a key
would travel along), a few seconds to connect, and silence bounded by whoever calls, because an answer may take
minutes to begin. What goes wrong on the way is an `UpstreamError` with the address in it, never a bare httpx error.

Left out: retries. Whether a request may be sent twice is known to whoever sent it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from rorqual.errors import ConfigError, UpstreamError


class UpstreamClient:
    """base_url: http(s), without the path's last slash; api_key: sent as a bearer token; silence_s: the longest wait for
    the next bytes; connections: at once. Raises ConfigError for what is no such URL."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        silence_s: float = 600.0,
        connect_s: float = 5.0,
        connections: int = 1024,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{base_url!r} is no URL: {error}", remedy="write http://host:port") from error
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise ConfigError(f"{base_url!r} is not the address of a server", remedy="write http://host:port")
        self.base_url = base_url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(silence_s, connect=connect_s),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=32),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            follow_redirects=False,
            trust_env=False,
        )

    async def __aenter__(self) -> UpstreamClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """A response whose body has not been read. Errors while it is being read are UpstreamErrors too."""
        timeout = httpx.USE_CLIENT_DEFAULT if silence_s is None else httpx.Timeout(silence_s)
        try:
            async with self._client.stream(
                method, self.base_url + path, json=json, content=content, headers=dict(headers or {}), timeout=timeout
            ) as response:
                yield response
        except httpx.TimeoutException as error:
            raise UpstreamError(f"{self.base_url} did not answer in time ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UpstreamError(f"{self.base_url} cannot be reached: {reason}", remedy="is it running?") from error

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
    ) -> httpx.Response:
        """A response with its body."""
        async with self.stream(
            method, path, json=json, content=content, headers=headers, silence_s=silence_s
        ) as response:
            await response.aread()
            return response
