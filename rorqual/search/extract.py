"""Pages and files to plain text: trafilatura for HTML, as it is for text.

trafilatura finds the article among menus and cookie notices and writes it as Markdown with its headings, which the passages
use. Where it finds none, all visible text is taken. It is given bytes that the safe fetcher brought and never fetches.
Left out: PDF and office files.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import BackendUnavailable, DataError

MAX_CHARS = 400_000
HTML = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, slots=True)
class Document:
    """What a page says. `date` is ISO, or empty; `title` may be empty."""

    title: str
    text: str
    date: str = ""


def extract(body: bytes, type: str, charset: str = "", url: str | None = None) -> Document:
    """The document in a body of media type `type`, at most MAX_CHARS long. CPU-bound: callers in an event loop use a thread.

    Raises DataError where it holds no text, BackendUnavailable without trafilatura.
    """
    document = _html(body, charset, url) if type in HTML else _plain(decode(body, charset))
    if not document.text.strip():
        raise DataError(f"{url or 'the page'} holds no text")
    return Document(document.title.strip(), document.text[:MAX_CHARS].strip(), document.date)


def decode(body: bytes, charset: str = "") -> str:
    """Text in the declared encoding if it is one, else UTF-8. Bytes that are none become U+FFFD."""
    try:
        text = body.decode(charset or "utf-8", "replace")
    except (LookupError, UnicodeError):  # unknown, or a codec that is no encoding of pages ("zlib", "idna")
        text = body.decode("utf-8", "replace")
    return text.removeprefix("\ufeff")


def _plain(text: str) -> Document:
    first = text.lstrip().partition("\n")[0].strip()
    return Document(first.lstrip("# ")[:200] if first.startswith("#") else first[:120], text)


def _html(body: bytes, charset: str, url: str | None) -> Document:
    try:
        import trafilatura
        from trafilatura.utils import decode_file
    except ImportError as error:
        raise BackendUnavailable("reading HTML needs trafilatura", remedy='pip install "rorqual[search]"') from error
    html = decode(body, charset) if charset else decode_file(body)  # which looks for <meta charset>, then guesses
    if "<html" not in html[:5000].lower():
        html = (
            f"<!DOCTYPE html><html>{html}</html>"  # the tag may be left out by the standard; trafilatura insists on it
        )
    try:
        text = trafilatura.extract(
            html, url=url, output_format="markdown", include_comments=False, include_links=False, include_images=False
        )
        facts = trafilatura.extract_metadata(html, default_url=url, extensive=False)
        text = text or trafilatura.html2txt(html) or ""
    except Exception as error:  # hostile pages find ways into parsers that no list of kinds foresees
        raise DataError(f"{url or 'the page'} cannot be parsed: {error}") from error
    return Document(str(facts.title or ""), text, str(facts.date or ""))
