"""A stand-in for the source from its first half, to rehearse on the GPU before all of it is there.

    python runs/bundled/rehearsal.py OUT part-a part-b

Metadata, embedding and the first layers are real; layers that are missing repeat those that are there. Every shape, and so
every kernel and every time, is the real one; what it says is not.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

from teacher import GGML_F32, GGML_Q4_1, GGML_Q8_0, GGUFReader

BYTES = {GGML_F32: (1, 4), GGML_Q4_1: (32, 20), GGML_Q8_0: (32, 34)}
"""Values of a block and its bytes."""


def main() -> None:
    out, parts = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
    out.write_bytes(b"".join(p.read_bytes() for p in parts))
    file = GGUFReader(out)
    have = len(file.buf) - file.data_at
    sizes = {n: math.prod(s) // BYTES[k][0] * BYTES[k][1] for n, (s, k, _) in file.infos.items()}
    whole = max(at + sizes[n] for n, (_, _, at) in file.infos.items())
    data = bytearray(file.buf[file.data_at :]) + bytearray(whole - have)
    present = {n: at for n, (_, _, at) in file.infos.items() if at + sizes[n] <= have}
    layers = sorted({int(n.split(".")[1]) for n in present if n.startswith("blk.")})
    full = [i for i in layers if sum(n.startswith(f"blk.{i}.") for n in present) == 9]
    missing = [n for n in file.infos if n not in present]
    for name in missing:
        _, layer, rest = (name.split(".", 2) + ["", ""])[:3]
        alike = (
            f"blk.{full[int(layer) % len(full)]}.{rest}"
            if rest and name.startswith("blk.")
            else "blk.0.attn_norm.weight"
        )
        at, size = file.infos[name][2], sizes[name]
        data[at : at + size] = data[present[alike] : present[alike] + size]
    out.write_bytes(bytes(file.buf[: file.data_at]) + data)
    print(f"{out}: {len(full)} layers of the source, {len(missing)} tensors repeated from them")


if __name__ == "__main__":
    main()
