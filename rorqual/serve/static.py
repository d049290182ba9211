"""The chat page: the files that Vite built, read once when the server starts.

They are few and small, so they live in memory: a request is a dictionary look-up, nothing from the URL ever
reaches the file system, and the same dictionary tells which paths need no API key. Files under /assets/ have
a hash in their name and are cached for ever; everything else is asked for again each time and answered by its
ETag. Vite puts the gzipped form of large ones beside them. The Content-Security-Policy lets the page load from this
server and from nowhere else: what a model writes can neither run nor fetch anything. The two frames for what it
writes as a document have policies of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

# By hand, because what the operating system's table says about .js decides whether a browser runs it.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# The frames in which the page shows what a model wrote as a document (web/frames): their scripts may run, and have no
# origin, no network, no storage and nobody to talk to but the page that holds them.
FRAMES = {
    "preview.html": (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; media-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "diagram.html": (
        "sandbox allow-scripts; default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data:; font-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
}
NOT_BUILT = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>rorqual</title>
<h1>rorqual is running</h1>
<p>The API is at <code>/v1</code>. The chat page has not been built yet: <code>make serve</code> builds it, or
<code>npm ci</code> and <code>npm run build</code> in <code>web/</code>; then start the server again.</p>
</html>
"""


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    headers: Mapping[str, str]
    gzipped: bytes | None = None


def load_page(directory: Path) -> dict[str, PageFile]:
    """URL path -> file. Without a built page, `/` says how to build it."""
    files = {}
    for path in sorted(directory.rglob("*")) if (directory / "index.html").is_file() else ():
        if path.is_file() and path.suffix != ".gz":
            name, small = path.relative_to(directory).as_posix(), path.with_name(path.name + ".gz")
            policy, immutable = FRAMES.get(name, POLICY), name.startswith("assets/")
            file = _file(path.read_bytes(), path.suffix, immutable=immutable, policy=policy)
            files[f"/{name}"] = replace(file, gzipped=small.read_bytes()) if small.is_file() else file
    files["/"] = files.get("/index.html") or _file(NOT_BUILT, ".html", immutable=False)
    return files


def answer_file(file: PageFile, request: Request) -> Response:
    """For GET and HEAD (the server below drops the body of a HEAD)."""
    body, headers = file.body, dict(file.headers)
    if file.gzipped is not None:
        headers["vary"] = "accept-encoding"
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, etag = file.gzipped, headers["etag"].removesuffix('"') + '-gzip"'
            headers |= {"content-encoding": "gzip", "etag": etag}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)


def _file(body: bytes, suffix: str, *, immutable: bool, policy: str = POLICY) -> PageFile:
    headers = {
        "content-type": TYPES.get(suffix, "application/octet-stream"),
        "cache-control": "public, max-age=31536000, immutable" if immutable else "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return PageFile(body, headers)
