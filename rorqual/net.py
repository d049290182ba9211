"""The door to the network: every HTTP client of this package is in this file, and a test keeps it so.

`SafeFetcher` gets pages from addresses that people, models or other pages name. Such an address is hostile until shown
otherwise: `http://127.0.0.1/admin`, `http://2130706433/`, `http://metadata.internal/`, a name that means something else
when it is looked up the second time. The check therefore sits where nothing can pass it by: it *is* the function that
opens connections (httpcore's network backend). It looks the name up once, asks that every address of the answer be on
the public internet, IPv4 addresses inside IPv6 ones included, and connects to one of the very addresses it has looked
at. Names are still what TLS verifies. Each redirect is a new address and goes through the same door.

What comes back is hostile too. Size, time, number of redirects and content type are capped; compressed bodies are
unpacked here and never beyond the cap, so that a bomb costs what its cap costs. Brotli and zstd are not offered: the
standard library of Python 3.11 cannot unpack them within a bound. There are no cookies, no proxies or certificates taken
from the environment, no connections kept (one verified for a host must not serve another host of the same address).

httpx parses addresses and brings the certificates; requests are sent by httpcore, the half of httpx without cookies,
redirects and environment.

`UpstreamClient` is for servers that the operator named: an upstream, a server to be graded. It is httpx with the choices
made once: no proxy, certificate or password from the environment, no redirects (a key would travel along), a few seconds to
connect, and silence bounded by whoever calls, because an answer may take minutes to begin. What goes wrong on the way is an
`UpstreamError` with the address in it, never a bare httpx error. It retries nothing: whether a request may be sent twice is
known to whoever sent it.

`ServiceClient` asks services that the operator configured (SearXNG on this machine, a search API with a key) for JSON.
Their addresses are trusted, their answers are capped all the same, and redirects are refused: a key would travel along.

Left out: robots.txt (pages are fetched because a person or their model asked for that very page, one at a time), HTTP/2,
and an option for private addresses; whoever wants pages of an intranet in the index saves them as files.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpcore
import httpx

from rorqual.errors import BackendUnavailable, ConfigError, FetchError, UpstreamError

PAGES = ("text/html", "application/xhtml+xml", "text/plain", "text/markdown")
PORTS = (80, 443, 8080, 8443)
MAX_URL = 8192
USER_AGENT = "rorqual (+https://pypi.org/project/rorqual)"

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Name and port to addresses, as text."""

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?")
_NUMERIC = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)\.?")
_UNCLEAN = re.compile(r"[\s\\\x00-\x20\x7f-\x9f]")
_REDIRECTS = (301, 302, 303, 307, 308)
# Azure's metadata service on a public address, 6to4 relays, and what older Pythons do not know to be reserved.
_NOT_FOR_US = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.88.99.0/24", "192.0.0.0/24", "3fff::/20")))
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one fetch may cost. `total_s` spans look-ups, redirects and the body; `max_bytes` holds for the body as sent
    and as unpacked."""

    connect_s: float = 5.0
    read_s: float = 10.0
    total_s: float = 20.0
    max_bytes: int = 5_000_000
    redirects: int = 5


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page: `url` is where it was in the end, `type` its media type without parameters, `charset` as declared."""

    url: str
    type: str
    charset: str
    body: bytes


async def system_resolver(host: str, port: int) -> list[str]:
    """The operating system's answer, IPv6 and IPv4 in its order."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address inside it, is a unicast address of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # also what carries a zone ("fe80::1%eth0") where that is no address
        return False
    if any(ip in net for net in _NOT_FOR_US):
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    embedded = _embedded(ip)
    if ip.ipv4_mapped or ip in _NAT64:  # another spelling of an IPv4 address
        return all(is_public(str(inner)) for inner in embedded)
    return ip in _GLOBAL_UNICAST and ip.is_global and all(is_public(str(inner)) for inner in embedded)


def _embedded(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that routers or tunnels would take out of it: mapped, NAT64, 6to4, Teredo, ISATAP."""
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    inside = [*(ip.teredo or ()), *filter(None, (ip.ipv4_mapped, ip.sixtofour))]
    if ip in _NAT64 or (int(ip) >> 32) & 0xFFFFFFFF in _ISATAP:
        inside.append(low)
    return inside


def check_url(url: str) -> httpx.URL:
    """The address, parsed once for good. Raises FetchError (reason "address") for what nobody should fetch, whatever it
    leads to: other schemes, user names, whitespace and backslashes (parsers differ over them), numbers that are no plain
    IPv4 address (2130706433, 0x7f.1, 0177.0.0.1)."""
    if len(url) > MAX_URL or _UNCLEAN.search(url):
        raise _refused("the address is too long or holds whitespace, control characters or a backslash")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _refused(f"{url[:200]!r} is no address: {error}") from None
    if parsed.scheme not in ("http", "https"):
        raise _refused(f"only http and https are fetched, not {parsed.scheme or url[:40]!r}")
    if parsed.userinfo:
        raise _refused("addresses with a user name are not fetched")
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        raise _refused(f"there is no port {parsed.port}")
    host = parsed.raw_host.decode("ascii")
    if ":" in host:
        plain = "%" not in host and _is_ip(host)
    elif _NUMERIC.fullmatch(host):
        plain = _is_ip(host)
    else:
        plain = len(host) <= 254 and _HOST.fullmatch(host) is not None
    if not plain:
        raise _refused(f"{host[:100]!r} is no host name and no plain IP address")
    return parsed


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(why: str) -> FetchError:
    return FetchError(why, reason="address", remedy="name a public http or https address", param="url")


class SafeFetcher:
    """See the module. Holds no connection: one object serves all tasks and event loops.

    `resolver`, `certificates` and `allowed_for_tests` are for tests: the last one lets a local server through by
    (address, port), and nothing in this package ever sets it.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        resolver: Resolver = system_resolver,
        certificates: ssl.SSLContext | None = None,
        allowed_for_tests: Callable[[str, int], bool] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._network = _CheckedNetwork(resolver, allowed_for_tests)
        self._certificates = certificates

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._certificates or httpx.create_ssl_context(trust_env=False)

    async def fetch(self, url: str, types: Iterable[str] = PAGES) -> Fetched:
        """The page behind an address, redirects followed.

        Raises FetchError whose `reason` says why there is none: "address" (refused before a connection), "redirects",
        "type", "size", "encoding", "time", "status" (an answer that is no page) or "network".
        """
        try:
            async with asyncio.timeout(self.limits.total_s):
                return await self._follow(check_url(url), frozenset(types))
        except (TimeoutError, httpcore.TimeoutException):
            raise FetchError(f"{_short(url)} took too long", reason="time") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
            raise FetchError(f"{_short(url)} cannot be reached: {error}", reason="network") from error

    async def _follow(self, url: httpx.URL, types: frozenset[str]) -> Fetched:
        for _ in range(self.limits.redirects + 1):
            answer = await self._get(url, types)
            if isinstance(answer, Fetched):
                return answer
            url = answer
        raise FetchError(f"more than {self.limits.redirects} redirects", reason="redirects")

    async def _get(self, url: httpx.URL, types: frozenset[str]) -> Fetched | httpx.URL:
        """One request on a connection of its own: the page, or where it is said to be."""
        headers: dict[bytes | str, bytes | str] = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": USER_AGENT,
            "Accept": ", ".join(sorted(types)),
            "Accept-Encoding": "gzip, deflate",
        }
        limits = self.limits
        timeout = {"connect": limits.connect_s, "read": limits.read_s, "write": limits.read_s, "pool": limits.connect_s}
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=self._tls if url.scheme == "https" else None,
                network_backend=self._network,
                max_connections=1,
                max_keepalive_connections=0,
            ) as pool,
            pool.stream("GET", target, headers=headers, extensions={"timeout": timeout}) as response,
        ):
            told = httpx.Headers(response.headers)
            if response.status in _REDIRECTS and "location" in told:
                return self._next(url, told["location"])
            if response.status != 200:
                raise FetchError(f"{_short(url)} answered {response.status}", reason="status")
            return await self._read(url, told, response, types)

    def _next(self, url: httpx.URL, location: str) -> httpx.URL:
        if _UNCLEAN.search(location):
            raise _refused("the redirect's address holds whitespace, control characters or a backslash")
        try:
            return check_url(str(url.join(location)))
        except (httpx.InvalidURL, ValueError) as error:
            raise _refused(f"the redirect leads to no address: {error}") from None

    async def _read(
        self, url: httpx.URL, told: httpx.Headers, response: httpcore.Response, types: frozenset[str]
    ) -> Fetched:
        media, _, parameters = told.get("content-type", "").partition(";")
        media = media.strip().lower()
        if media not in types:
            raise FetchError(f"{_short(url)} is {media or 'of no declared type'}, not a page of text", reason="type")
        charset = re.search(r'charset\s*=\s*"?([\w.:-]{1,40})', parameters, re.IGNORECASE)
        body = _Body(told.get("content-encoding", ""), self.limits.max_bytes)
        if int(_digits(told.get("content-length", ""))) > self.limits.max_bytes:
            raise body.too_large()
        async for chunk in response.aiter_stream():
            body.feed(chunk)
        return Fetched(str(url), media, charset[1].lower() if charset else "", body.finish())


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """The one place where a connection to a named host comes from: look up, check all, connect to what was checked."""

    def __init__(self, resolver: Resolver, allowed: Callable[[str, int], bool] | None) -> None:
        self._resolver = resolver
        self._allowed = allowed or (lambda address, port: False)
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in await self._addresses(host, port):
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError(f"{host} has no address")

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise _refused("sockets of this machine are not fetched")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = [host] if _is_ip(host) else await self._resolver(host, port)
        except OSError as error:
            raise FetchError(f"{host} cannot be looked up: {error}", reason="network") from error
        for address in addresses:
            if self._allowed(address, port):
                continue
            # What it resolves to is not said: names and addresses of the inside are nobody's business.
            if not is_public(address):
                raise _refused(f"{host} is not on the public internet")
            if port not in PORTS:
                raise _refused(f"port {port} is not fetched")
        return addresses


class _Body:
    """A body as it arrives, unpacked within its limit."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._encoding = encoding.strip().lower()
        self._limit = limit
        self._wire = 0
        self._body = bytearray()
        if self._encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"the encoding {encoding[:40]!r} was not asked for", reason="encoding")
        self._packed = self._encoding not in ("", "identity")
        self._unpack = zlib.decompressobj(31 if "gzip" in self._encoding else 15) if self._packed else None

    def too_large(self) -> FetchError:
        return FetchError(f"the page is larger than {self._limit:,} bytes", reason="size")

    def feed(self, chunk: bytes) -> None:
        """Raises FetchError ("size", "encoding")."""
        self._wire += len(chunk)
        if self._unpack is None:
            self._body += chunk
        while self._unpack is not None and chunk:
            try:
                self._body += self._unpack.decompress(chunk, self._limit - len(self._body) + 1)
            except zlib.error as error:
                if self._encoding != "deflate" or self._body or self._wire > len(chunk):
                    raise FetchError(f"the page cannot be unpacked: {error}", reason="encoding") from None
                self._encoding, self._unpack = "raw deflate", zlib.decompressobj(-15)  # what some servers mean by it
                continue
            if len(self._body) > self._limit:
                break
            chunk = self._unpack.unconsumed_tail
            if self._unpack.eof:
                chunk = self._unpack.unused_data
                if not chunk.startswith(b"\x1f\x8b"):  # gzip may have several members; anything else is padding
                    break
                self._unpack = zlib.decompressobj(31)
        if max(self._wire, len(self._body)) > self._limit:
            raise self.too_large()

    def finish(self) -> bytes:
        if self._unpack is not None and self._wire and not self._unpack.eof:
            raise FetchError("the page ended before it was whole", reason="encoding")
        return bytes(self._body)


class ServiceClient:
    """JSON from services whose addresses the operator configured; see the module."""

    def __init__(self, *, timeout_s: float = 15.0, max_bytes: int = 20_000_000) -> None:
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return httpx.create_ssl_context(trust_env=False)

    async def json(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str | int] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The parsed answer. Raises BackendUnavailable where none comes, with the start of what came instead."""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=self._timeout_s) as client,
                client.stream(method, url, params=params, json=body, headers=headers) as response,
            ):
                raw = bytearray()
                async for chunk in response.aiter_bytes(1 << 16):
                    raw += chunk
                    if len(raw) > self._max_bytes:
                        raise BackendUnavailable(f"{_short(url)} sent more than {self._max_bytes:,} bytes")
                if response.status_code != 200:
                    said = " ".join(raw[:2000].decode("utf-8", "replace").split())[:200]
                    raise BackendUnavailable(f"{_short(url)} answered {response.status_code}: {said}")
                return httpx.Response(200, content=bytes(raw)).json()
        except (TimeoutError, httpx.TimeoutException):
            raise BackendUnavailable(f"{_short(url)} took longer than {self._timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BackendUnavailable(f"{_short(url)} cannot be reached: {error}") from error
        except ValueError:
            raise BackendUnavailable(f"{_short(url)} did not answer with JSON") from None


def _short(url: object) -> str:
    """An address for messages: without its query, which may hold what somebody typed."""
    return str(url).partition("?")[0][:200]


def _digits(text: str) -> str:
    return text if text.isascii() and text.isdigit() and len(text) < 20 else "0"


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
