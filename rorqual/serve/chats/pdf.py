"""The text of a PDF, as a program: bytes on standard input, JSON on standard output.

A process of its own, because a PDF may be made to take all memory or never to end, and a thread cannot be stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys

MEMORY_BYTES = 1 << 30
MAX_PAGES = 2000


def read(body: bytes, max_chars: int) -> dict[str, object]:
    """{"text", "chars", "truncated"}, or {"error"}."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(body))
    if reader.is_encrypted and not reader.decrypt(""):
        return {"error": "is locked with a password"}
    texts: list[str] = []
    chars = 0
    pages = len(reader.pages)
    for number in range(min(pages, MAX_PAGES)):
        text = reader.pages[number].extract_text().strip()
        texts.append(text)
        chars += len(text) + 2
        if chars > max_chars:
            break
    whole = "\n\n".join(filter(None, texts))
    return {"text": whole[:max_chars], "chars": len(whole), "truncated": len(whole) > max_chars or len(texts) < pages}


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; a lower limit stays
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)  # what is odd in a PDF is nobody's news
    try:
        told = read(sys.stdin.buffer.read(), int(sys.argv[1]))
    except MemoryError:
        told = {"error": "takes too much memory to read"}
    except Exception as error:  # a damaged file finds ways into a parser that no list of kinds foresees
        told = {"error": f"is damaged: {error}"}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
