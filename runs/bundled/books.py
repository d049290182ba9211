"""Jane Austen's novels as plain text: the domain that no training data comes from (Debian's r-cran-janeaustenr).

    python runs/bundled/books.py --out data/bundled/books.txt

R's lazy-load files are zlib streams of serialised objects; strings lie in them as length and bytes.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

STRING = b"\x00\x04\x00\x09"
"""Flags of an ASCII string in R's serialisation."""


def strings(raw: bytes) -> list[str]:
    out, at = [], 0
    while (at := raw.find(STRING, at)) >= 0:
        (size,) = struct.unpack_from(">i", raw, at + 4)
        if 0 <= size < 400 and at + 8 + size <= len(raw):
            out.append(raw[at + 8 : at + 8 + size].decode("latin-1"))
            at += 8 + size
        else:
            at += 1
    return out


def novels(rdb: bytes) -> list[str]:
    """Every object of an .rdb file that is as long as a novel: four bytes of length and a zlib stream each."""
    out, at = [], 0
    while at + 4 < len(rdb):
        stream = zlib.decompressobj()
        try:
            raw = stream.decompress(rdb[at + 4 :])
        except zlib.error:
            at += 1
            continue
        text = "\n".join(strings(raw))
        if len(text) > 200_000:
            out.append(text)
        at = len(rdb) - len(stream.unused_data) if stream.eof else len(rdb)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=60_000, help="characters of each novel, from its middle")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-q", "r-cran-janeaustenr"], cwd=folder, check=True, capture_output=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        found = [t for f in sorted(Path(folder).rglob("*.rdb")) for t in novels(f.read_bytes())]
    pieces = [t[len(t) // 3 : len(t) // 3 + o.each] for t in found]
    o.out.write_text("\n\n".join(pieces), encoding="utf-8")
    print(f"{o.out}: {len(pieces)} novels, {sum(map(len, pieces)):,} characters")


if __name__ == "__main__":
    main()
