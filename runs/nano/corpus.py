"""The plain-text part of rorqual-nano's data: books, dictionaries and documentation out of Debian's packages.

    python runs/nano/corpus.py --out data/nano/text            # fetch, unpack, clean: some minutes, about 70 MB
    python runs/nano/corpus.py --out data/nano/text --pack data/nano/text.tar.xz

Packages are fetched with `apt-get download` (no root needed) and unpacked with `dpkg -x`. Prose is taken whole;
technical documentation and the archaic big dictionary are trimmed evenly to what is left of --max-mb. The same packages give the same output, byte for
byte. LICENSES.json says what each source is, where it is from and under which licence.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PIECE = 8000  # characters of a document at most


@dataclass(frozen=True)
class Source:
    """package: Debian's; kind: how its files are read; files: which; prose: kept whole."""

    package: str
    kind: str
    files: str
    licence: str
    prose: bool = True


SOURCES = [
    Source("wordnet-base", "wordnet", "usr/share/wordnet/data.*", "WordNet licence (permissive)"),
    Source("dict-gcide", "dictd", "usr/share/dictd/*.dict.dz", "GPL-2+", prose=False),
    Source("dict-jargon", "dictd", "usr/share/dictd/*.dict.dz", "public domain"),
    Source("dict-foldoc", "dictd", "usr/share/dictd/*.dict.dz", "GFDL-1.1+"),
    Source("dict-devil", "dictd", "usr/share/dictd/*.dict.dz", "public domain"),
    Source("anarchism", "html", "usr/share/doc/anarchism/**/*.html", "GPL-2+"),
    Source("debian-handbook", "html", "usr/share/doc/debian-handbook/html/en-US/*.html", "CC-BY-SA-3.0 / GPL-2+"),
    Source("debian-reference-en", "html", "usr/share/**/debian-reference/*.en.html", "GPL-2+"),
    Source("developers-reference", "html", "usr/share/**/*.html", "GPL-2+"),
    Source("debian-faq", "html", "usr/share/**/*.en.html", "own notice: copies and changes under the same notice"),
    Source("fortunes", "fortune", "usr/share/games/fortunes/*", "BSD (collection; short quotations)"),
    Source("rust-doc", "html", "usr/share/doc/rust-doc/html/book/*.html", "MIT / Apache-2.0"),
    Source("git-doc", "html", "usr/share/doc/git-doc/**/*.html", "GPL-2"),
    Source("bash-doc", "html", "usr/share/doc/bash/*.html", "GPL-3+ / GFDL-1.3"),
    Source("autoconf-doc", "html", "usr/share/doc/**/*.html", "GFDL-1.3+"),
    Source("maxima-doc", "html", "usr/share/doc/maxima*/**/maxima*_*.html", "GPL-2", prose=False),
    Source("sqlite3-doc", "html", "usr/share/doc/sqlite3/*.html", "public domain", prose=False),
    Source("python3.11-doc", "html", "usr/share/doc/python3.11/html/**/*.html", "PSF-2", prose=False),
    Source("postgresql-doc-15", "html", "usr/share/doc/postgresql-doc-15/html/*.html", "PostgreSQL", prose=False),
    Source("python-django-doc", "html", "usr/share/doc/**/*.html", "BSD-3-Clause", prose=False),
]


class Text(HTMLParser):
    """Paragraphs and headings of a page; navigation, code, tables and scripts are left out."""

    SKIP = frozenset(
        ["script", "style", "head", "nav", "table", "pre", "code", "header", "footer", "form", "button", "svg", "math"]
    )
    BLOCK = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dd", "dt", "blockquote"])
    CHROME = re.compile(r"nav|sidebar|footer|header|toc|index|related|breadcrumb", re.I)

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.words: list[str] = []
        self.skipped: list[str] = []  # open elements inside something left out
        self.code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("br", "img", "hr", "input", "meta", "link", "col", "wbr"):
            return
        chrome = tag in ("div", "ul", "section") and any(
            k in ("class", "id", "role") and v and self.CHROME.search(v) for k, v in attrs
        )
        if self.skipped or chrome or (tag in self.SKIP and tag != "code"):
            self.skipped.append(tag)
        elif tag in self.BLOCK:
            self.finish()

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            while self.skipped and tag in self.skipped and self.skipped.pop() != tag:
                pass
        elif tag in self.BLOCK:
            self.finish()

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.words.append(data)

    def finish(self) -> None:
        text = " ".join("".join(self.words).split()).replace("¶", "").strip()
        self.words = []
        if text:
            self.paragraphs.append(text)


def html_documents(path: Path) -> Iterator[str]:
    parser = Text()
    parser.feed(read(path))
    parser.finish()
    yield "\n\n".join(parser.paragraphs)


def dictd_documents(path: Path) -> Iterator[str]:
    """Entries of a dictd database: unindented head words, indented text; etymology marks and references go."""
    text = re.sub(r"\\|\{|\}|<[^>]*>", "", read(path))
    entries = re.split(r"\n(?=\S)", text)
    group: list[str] = []
    for entry in entries:
        body = re.sub(r"\[(?:1913|PJC|WordNet|Webster)[^\]]*\]", "", entry)
        body = " ".join(body.split())
        if 60 < len(body) < 2500 and not body.startswith(("00-", "This file", "From ")):
            group.append(body)
        if sum(map(len, group)) > 3000:
            yield "\n\n".join(group)
            group = []
    yield "\n\n".join(group)


def wordnet_documents(path: Path) -> Iterator[str]:
    """Glosses as sentences: "A whale is ...". Related entries stand together, as in the file."""
    lines: list[str] = []
    for line in read(path).splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        fields, gloss = line.split("|", 1)
        parts = fields.split()
        word = parts[4].replace("_", " ")
        meaning, *examples = gloss.strip().split('; "')
        quotes = " ".join(f'"{e.strip(chr(34)).capitalize()}."' for e in examples[:2] if e.strip('"'))
        kind = {"n": "{w} means {m}.", "v": "To {w} is to {m}.", "a": "{w} means {m}.", "s": "{w} means {m}."}
        lines.append(
            kind.get(parts[2], "{w} means {m}.").format(w=word, m=meaning.strip().rstrip(".")) + (" " + quotes).rstrip()
        )
        if len(lines) == 25:
            yield "\n".join(line[:1].upper() + line[1:] for line in lines)
            lines = []


def fortune_documents(path: Path) -> Iterator[str]:
    if path.suffix in (".dat", ".u8") or path.name.startswith("off"):
        return
    for saying in re.split(r"\n%\n", read(path)):
        yield "\n".join(" ".join(line.split()) for line in saying.strip().splitlines())


READERS = {
    "html": html_documents,
    "dictd": dictd_documents,
    "wordnet": wordnet_documents,
    "fortune": fortune_documents,
}


def read(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        raw = gzip.decompress(raw)
    for encoding in ("utf-8", "latin-1"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return ""


PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": " - ", "…": "...", "\u00a0": " ", "\u00ad": ""}
)


def pieces(document: str) -> Iterator[str]:
    """Cleaned stretches of at most PIECE characters, cut at paragraphs; those that are not text are dropped."""
    document = html.unescape(document).translate(PLAIN)
    paragraphs, size = [], 0
    for paragraph in [*(p.strip() for p in document.split("\n\n")), ""]:
        if not paragraph or size + len(paragraph) > PIECE:
            text = "\n\n".join(paragraphs)
            if paragraphs and (not paragraph or size > PIECE // 2) and is_prose(text):
                yield text
                paragraphs, size = [], 0
            elif size > PIECE:
                paragraphs, size = [], 0
        if paragraph:
            paragraphs.append(paragraph[:PIECE])
            size += len(paragraph)


def is_prose(text: str) -> bool:
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    words = text.split()
    sentences = len(re.findall(r"[a-z][.!?](?:\s|$)", text))
    return len(text) >= 80 and letters / len(text) > 0.86 and sentences * 60 >= len(words)


def fetch(source: Source, folder: Path) -> tuple[Path, str] | None:
    """(unpacked tree, version), or None with a warning where the package cannot be had."""
    done = subprocess.run(["apt-get", "download", "-q", source.package], cwd=folder, capture_output=True, text=True)
    archives = sorted(folder.glob(f"{source.package}_*.deb"))
    if not archives:
        print(f"skipped {source.package}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    tree = folder / source.package
    subprocess.run(["dpkg", "-x", str(archives[0]), str(tree)], check=True)
    return tree, archives[0].name.split("_")[1].replace("%3a", ":")


def documents(source: Source, tree: Path) -> list[str]:
    """Cleaned pieces in file order; lines that stand in many places (menus, footers) and duplicates go."""
    files = sorted(p for p in tree.glob(source.files) if p.is_file())
    found = [piece for path in files for whole in READERS[source.kind](path) for piece in pieces(whole)]
    common = Counter(line for piece in found for line in set(piece.split("\n")) if line)
    seen: set[bytes] = set()
    out = []
    for piece in found:
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in piece.split("\n") if common[line] < 8)).strip()
        key = hashlib.blake2b(re.sub(r"\W+", "", text.lower()).encode(), digest_size=12).digest()
        if len(text) >= 80 and key not in seen:
            seen.add(key)
            out.append(text)
    return out


def trim(found: dict[str, list[str]], limit: int, seed: int) -> None:
    """Cut the technical sources evenly (random pieces of each) so that everything together stays under the limit."""
    technical = {s.package for s in SOURCES if not s.prose} & set(found)
    left = limit - sum(sum(map(len, t)) for p, t in found.items() if p not in technical)
    for n, package in enumerate(sorted(technical, key=lambda p: sum(map(len, found[p])))):
        share = max(0, left // (len(technical) - n))
        order = list(range(len(found[package])))
        random.Random(f"{seed} {package}").shuffle(order)
        kept, size = set(), 0
        for i in order:
            if size + len(found[package][i]) <= share:
                kept.add(i)
                size += len(found[package][i])
        found[package] = [t for i, t in enumerate(found[package]) if i in kept]
        left -= size


def build(out: Path, limit: int, seed: int, only: Iterable[str]) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        sys.exit("corpus.py needs Debian's apt-get and dpkg to fetch its packages")
    out.mkdir(parents=True, exist_ok=True)
    found, versions = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            if only and source.package not in only:
                continue
            if fetched := fetch(source, Path(folder)):
                tree, versions[source.package] = fetched
                found[source.package] = documents(source, tree)
                size = sum(map(len, found[source.package]))
                print(
                    f"{source.package}: {len(found[source.package]):,} documents, {size / 1e6:.1f} MB", file=sys.stderr
                )
                shutil.rmtree(tree)
    trim(found, limit, seed)
    licences = {}
    for source in SOURCES:
        if texts := found.get(source.package):
            lines = [json.dumps({"text": t, "source": source.package}, ensure_ascii=False) for t in texts]
            (out / f"{source.package}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            licences[source.package] = {
                "version": versions[source.package],
                "licence": source.licence,
                "documents": len(texts),
                "characters": sum(map(len, texts)),
            }
    (out / "LICENSES.json").write_text(json.dumps(licences, indent=1) + "\n")
    print(
        f"{out}: {sum(v['characters'] for v in licences.values()) / 1e6:.1f} MB in {len(licences)} sources",
        file=sys.stderr,
    )


def pack(out: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(out.iterdir()):
            tar.add(path, arcname=f"{out.name}/{path.name}")
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/nano/text"))
    parser.add_argument("--max-mb", type=int, default=70, help="characters in all, in millions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="PACKAGE", help="just these packages")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE.tar.xz", help="pack --out into this file, and do nothing else"
    )
    options = parser.parse_args()
    if options.pack:
        pack(options.out, options.pack)
    else:
        build(options.out, options.max_mb * 1_000_000, options.seed, options.only)


if __name__ == "__main__":
    main()
