"""Requests that nobody means: broken JSON, wrong types, odd headers and paths, bytes that are no HTTP at all.

`send_all` sends them to a server, raw, and says what came back that must not: a 5xx, a traceback, an error of another shape,
silence. Used by a test for some hundreds and by `make soak` for ten thousand.
"""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from rorqual.config import DEFAULT_MODEL

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/anthropic/v1/messages/count_tokens",
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
VALID: list[dict[str, Any]] = [
    {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "tools": [TOOL]},
    {"model": DEFAULT_MODEL, "prompt": "hi", "max_tokens": 3, "logit_bias": {"5": 1.0}, "stop": ["x"]},
    {
        "model": DEFAULT_MODEL,
        "input": [{"role": "user", "content": "hi"}],
        "max_output_tokens": 3,
        "text": {"format": {"type": "text"}},
    },
]
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[]],
    {"": {}},
    [None] * 300,
)
Part = Callable[[random.Random], bytes]


def broken_json(rng: random.Random) -> bytes:
    body = bytearray(json.dumps(rng.choice(VALID)).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(body))
        match rng.randrange(3):
            case 0:
                body[at] = rng.randrange(256)
            case 1:
                del body[at:]
                body += b" "
            case 2:
                body[at:at] = rng.choice((b"{", b"]", b'"', b"\\u12", b"\xff", b"\x00", b",", b"NaN"))
    return bytes(body)


def wrong_values(rng: random.Random) -> bytes:
    """A valid body with something odd in one of its places, or a field of another kind."""
    body = json.loads(json.dumps(rng.choice(VALID)))
    place, key = body, rng.choice(list(body))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    place[key] = rng.choice(ODD)
    if rng.random() < 0.3:
        names = (
            "response_format",
            "stream_options",
            "tool_choice",
            "thinking",
            "seed",
            "n",
            "logprobs",
            "system",
            "reasoning",
            "b",
        )
        body[rng.choice(names)] = rng.choice(ODD)
    return json.dumps(body).encode()


def deep(rng: random.Random) -> bytes:
    depth = rng.choice((100, 1000, 20_000))
    inner = rng.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    return rng.choice((inner, b'{"model":"%s","messages":' % DEFAULT_MODEL.encode() + inner + b"}"))


def no_json(rng: random.Random) -> bytes:
    return rng.choice(
        (b"", b"null", b"1", b'"x"', b"[]", b"a=1&b=2", b"\xef\xbb\xbf{}", rng.randbytes(200), b'{"a":1}{"b":2}')
    )


BODIES: tuple[Part, ...] = (broken_json, broken_json, wrong_values, wrong_values, wrong_values, deep, no_json)
TYPES = (b"application/json",) * 12 + (
    b"text/plain",
    b"multipart/form-data; boundary=x",
    b"application/json; charset=utf-16",
    b"",
    b"\xff",
)


def posted(rng: random.Random) -> bytes:
    body, path = rng.choice(BODIES)(rng), rng.choice(PATHS).encode()
    lines = [b"POST " + path + b" HTTP/1.1", b"host: x", b"connection: close", b"content-type: " + rng.choice(TYPES)]
    if rng.random() < 0.1:
        lines.append(
            rng.choice(
                (b"x-request-id: a b\tc", b"x-request-id: " + b"y" * 500, b"authorization: Bearer \xff", b"cookie: ;;")
            )
        )
    match rng.randrange(12):
        case 0:
            cut = rng.randrange(len(body) + 1)
            chunks = [part for part in (body[:cut], body[cut:]) if part]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in chunks) + b"0\r\n\r\n"
            lines.append(b"transfer-encoding: chunked")
        case 1:
            lines.append(
                b"content-length: %d" % (len(body) + rng.choice((-1, 1, 100))) if body else b"content-length: 5"
            )
        case _:
            lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def odd_target(rng: random.Random) -> bytes:
    method = rng.choice(b"GET PUT DELETE PATCH OPTIONS TRACE PROPFIND POST".split())
    paths = b"/v1/models/%00 /v1/models/..%2f..%2fetc //v1//models /v1/chat/completions?x=%ff /%e0%80%af /x/../../y *"
    path = rng.choice([*paths.split(), b"/" + b"a" * 3000, b"/v1/models/" + b"%F0%9F%90%8B" * 20])
    return method + b" " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def no_http(rng: random.Random) -> bytes:
    post, get = b"POST /tokenize HTTP/1.1\r\nhost: x\r\n", b"GET / HTTP/1.1\r\n"
    chunked = b"transfer-encoding: chunked\r\n\r\nzz\r\n\r\n"
    odd = (rng.randbytes(300), b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"POST /v1/messages HTTP/9.9\r\n\r\n")
    headers = (b"bad header\r\n\r\n", b"x: " + b"y" * 70_000 + b"\r\n\r\n", b"host: x\r\n" + chunked)
    lengths = (b"content-length: x\r\n\r\n", b"content-length: -5\r\n\r\n")
    return rng.choice((*odd, *(get + line for line in headers), *(post + line for line in lengths)))


KINDS: tuple[Part, ...] = (posted,) * 8 + (odd_target, no_http)


def send_all(url: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Statuses (or "closed"), and faults."""
    rng, address = random.Random(seed), urlsplit(url)
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    for number in range(count):
        request = rng.choice(KINDS)(rng)
        answer, silent = exchange((address.hostname or "", address.port or 0), request)
        status = answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.") else "closed"
        statuses[status] += 1
        if fault := wrong(status, answer, silent):
            faults.append(f"{number}: {fault}: {request[:300]!r} -> {answer[-300:]!r}")
    return statuses, faults


def exchange(address: tuple[str, int], request: bytes) -> tuple[bytes, bool]:
    """What came back until the server closed, and whether it never did. Where it waits for more, it is told that there is
    no more."""
    answer, told = b"", False
    with socket.create_connection(address, timeout=0.2) as client:
        try:
            client.sendall(request)
            while True:
                try:
                    piece = client.recv(1 << 16)
                except TimeoutError:
                    if told:
                        return answer, True
                    told = True
                    client.settimeout(20)
                    client.shutdown(socket.SHUT_WR)
                    continue
                if not piece:
                    break
                answer += piece
        except OSError:  # it closed while we were sending
            pass
    return answer, False


def wrong(status: str, answer: bytes, silent: bool) -> str:
    """What must not be, or nothing."""
    body = answer.partition(b"\r\n\r\n")[2]
    if silent:
        return "no end"
    if status.startswith("5"):
        return "server error"
    if b"Traceback" in answer or b'File \\"' in answer or b".py" in body:
        return "a traceback"
    if status.startswith("4") and b"application/json" in answer:
        error = json.loads(body)["error"]
        if not error["message"] or set(error) not in ({"message", "type", "param", "code"}, {"message", "type"}):
            return "an error of another shape"
    return ""
