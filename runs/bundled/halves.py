"""A folder of texts as two, by a checksum of each line, so that each travels alone: halves.py TEXT A B."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path


def main() -> None:
    source, first, second = map(Path, sys.argv[1:4])
    for folder in (first, second):
        folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.jsonl")):
        parts: tuple[list[str], list[str]] = ([], [])
        for line in file.read_text(encoding="utf-8").splitlines():
            text = json.dumps({"text": json.loads(line)["text"]}, ensure_ascii=False)
            parts[zlib.crc32(text.encode()) % 100 >= 55].append(text)
        for folder, lines in zip((first, second), parts, strict=True):
            (folder / file.name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
