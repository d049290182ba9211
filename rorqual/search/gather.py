"""Filling the local index: folders of text and HTML, single pages, and this project's own documentation.

A run that is killed loses at most the batch it was in; the next one skips what is there unchanged (size and time of
modification) and goes on. Files that vanished are taken out when a folder has been gone through to its end.

The project's documentation is shipped as the Markdown it is written in (in a wheel under `rorqual/docs`) and indexed
when an index is first used, in a tenth of a second: an index built at packaging would tie the wheel to one version of
SQLite's format and of the analysis.

Left out: following links from a page. A crawler that respects the sites it visits is a program of its own; its output
is a folder, which can be added.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rorqual.errors import DataError
from rorqual.search.extract import HTML, Document, extract
from rorqual.search.index import LocalIndex

if TYPE_CHECKING:  # folders are indexed without the packages that the network needs
    from rorqual.net import SafeFetcher

OWN = "rorqual-docs"
MAX_FILE = 8_000_000
BATCH = 32
TEXT = (".md", ".markdown", ".txt", ".rst", ".adoc", ".org", ".tex", ".changes", ".debian", "")
PAGES = (".html", ".htm", ".xhtml")
SKIPPED_FOLDERS = frozenset({"node_modules", "__pycache__", "venv", "site-packages"})


@dataclass(slots=True)
class Report:
    """Documents by what became of them. `unreadable`: no text, not decodable, damaged or larger than MAX_FILE."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class File:
    """A file to index; `place` is what the index calls it."""

    path: Path
    place: str

    def stamp(self) -> str:
        about = self.path.stat()
        return f"{about.st_mtime_ns}:{about.st_size}"


def add_folder(
    index: LocalIndex, folder: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Everything readable below a folder, or one file. `progress` gets files done and in all. Raises DataError if it
    does not exist or holds nothing of a known kind."""
    folder = folder.resolve()
    if not folder.exists():
        raise DataError(f"{folder} does not exist", remedy="name a folder, a file or an http address")
    files = [File(path, path.as_uri()) for path in walk(folder)]
    if not files:
        raise DataError(
            f"{folder} holds nothing to index", remedy=f"known are {' '.join((*TEXT[:-1], *PAGES))}, plain or .gz"
        )
    return _add(index, index.begin(str(folder), "folder"), files, progress)


def add_own(index: LocalIndex, *, again: bool = False) -> Report:
    """This project's documentation, brought up to date; if somebody removed it, only when asked for `again`. Writes
    nothing where nothing has changed."""
    files = own_documents()
    if not files or (index.was_removed(OWN) and not again):
        return Report()
    if index.stamps_of(OWN) == {file.place: file.stamp() for file in files}:
        return Report(unchanged=len(files))
    return _add(index, index.begin(OWN, "own"), files, lambda done, total: None)


def own_documents() -> list[File]:
    """README and guides: in the package if it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "docs"
    root = shipped if shipped.is_dir() else package.parent
    docs = shipped if shipped.is_dir() else root / "docs"
    files = [File(path, f"docs/{path.name}") for path in sorted(docs.glob("*.md")) if path.name != "README.md"]
    readme = root / "README.md"
    return ([File(readme, "README.md")] if readme.is_file() and files else []) + files


async def add_page(index: LocalIndex, url: str, fetcher: SafeFetcher) -> Report:
    """One page of the web. Raises FetchError where it cannot be had, DataError where it holds no text."""
    page = await fetcher.fetch(url)
    stamp = hashlib.sha256(page.body).hexdigest()
    document = extract(page.body, page.type, page.charset, page.url)
    with index.batch():
        source = index.begin(url, "page")
        before = index.stamps(source)
        if before != {page.url: stamp}:
            for place in before:
                index.drop(source, place)
            index.put(source, page.url, stamp, document)
        index.finish(source)
    if before == {page.url: stamp}:
        return Report(unchanged=1)
    return Report(updated=1) if before else Report(added=1)


def walk(folder: Path) -> Iterator[Path]:
    """Files of known kinds by path; no links, nothing hidden."""
    if folder.is_file():
        if _kind(folder):
            yield folder
        return
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and _kind(path) and path.is_file() and not path.is_symlink():
                yield path


def _kind(path: Path) -> str:
    """The media type a file is read as; empty for others."""
    suffix = (path.with_suffix("") if path.suffix in (".gz", ".xz") else path).suffix.lower()
    return HTML[0] if suffix in PAGES else "text/plain" if suffix in TEXT or suffix[1:].isdigit() else ""


def _add(index: LocalIndex, source: int, files: list[File], progress: Callable[[int, int], None]) -> Report:
    report = Report()
    before = index.stamps(source)
    done = 0
    for first in range(0, len(files), BATCH):
        with index.batch():
            for file in files[first : first + BATCH]:
                _add_file(index, source, file, before.pop(file.place, None), report)
                done += 1
                progress(done, len(files))
    with index.batch():
        for place in before:
            index.drop(source, place)
        index.finish(source)
    report.removed = len(before)
    return report


def _add_file(index: LocalIndex, source: int, file: File, before: str | None, report: Report) -> None:
    stamp = ""
    document = None
    with suppress(OSError, EOFError, zlib.error, lzma.LZMAError, DataError):
        stamp = file.stamp()
        if stamp == before:
            report.unchanged += 1
            return
        document = read(file.path)
    if document is None:
        report.unreadable += 1
    elif before is None:
        report.added += 1
    else:
        report.updated += 1
    index.put(source, file.place, stamp, document)


def read(path: Path) -> Document:
    """Raises DataError for what is no text, OSError and its kin for what cannot be read or unpacked."""
    with _open(path) as stream:
        body = stream.read(MAX_FILE + 1)
    if len(body) > MAX_FILE:
        raise DataError(f"{path} is larger than {MAX_FILE:,} bytes")
    if b"\0" in body[:8192]:
        raise DataError(f"{path} is no text")
    kind = _kind(path)
    if kind not in HTML:
        try:
            body.decode("utf-8")
        except UnicodeDecodeError:
            body = body.decode("latin-1").encode()  # what old documentation is written in
    document = extract(body, kind, "" if kind in HTML else "utf-8", path.as_uri())
    name = path.stem if path.suffix in (".gz", ".xz") else path.name
    return Document(
        document.title if kind in HTML else f"{path.parent.name}/{name}: {document.title}", document.text, document.date
    )


def _open(path: Path) -> gzip.GzipFile | lzma.LZMAFile | BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    return lzma.LZMAFile(path) if path.suffix == ".xz" else path.open("rb")
