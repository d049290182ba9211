"""Calibration text for the conversion: pieces of documents, and conversations in the source's own chat format.

    python runs/bundled/calibration.py data/bundled/text out/bundled/dialogues --out out/bundled/calibration.txt

Six characters in ten are text. Conversations are spelled with the source's special tokens, because that is what the
converted layers were trained on; `rorqual upcycle` reads them as such.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from rorqual.data.sources import list_sources, read_records

PIECE = 2000


def spell(messages: list[dict[str, str]]) -> str:
    """SmolLM2's chat format."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    draw = random.Random(o.seed)
    texts, chats = [], []
    for record in read_records(list_sources(o.inputs)):
        if record.messages is not None:
            chats.append(spell(list(record.messages)))
        elif len(record.text) > PIECE:
            start = draw.randrange(len(record.text) - PIECE)
            texts.append(record.text[start : start + PIECE])
        elif record.text:
            texts.append(record.text)
    pieces = []
    for pool, share in ((texts, 0.6), (chats, 0.4)):
        draw.shuffle(pool)
        left = o.characters * share
        while left > 0 and pool:
            pieces.append(pool.pop())
            left -= len(pieces[-1])
    draw.shuffle(pieces)
    o.out.write_text("\n\n".join(pieces), encoding="utf-8")
    print(f"{o.out}: {sum(map(len, pieces)):,} characters in {len(pieces):,} pieces")


if __name__ == "__main__":
    main()
