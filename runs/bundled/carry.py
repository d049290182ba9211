"""Shipped weights through a narrow door: packed into small pieces on the GPU machine, and whole again here.

    python runs/bundled/carry.py pack out/bundled/shipped BACK
    python runs/bundled/carry.py join BACK --gguf smollm2.gguf --out models/NAME
    python runs/bundled/carry.py join BACK --like models/OLD --out models/NAME

The embedding is left behind: healing does not touch it, so its integers follow from the source, or are those of the model that was
healed once more. Pieces are compressed: four-bit codes hardly, their scales well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

from rorqual.ops.packed import PackedIntegers

PIECE = 15_500_000
PIECES = "weights-*-of-*.xz"
SHARD = 14_000_000
EMBEDDING = "model.embed_tokens."
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
"""What answers are sampled with where nothing else is said; the teacher's are written at 0.8 without a penalty, and loop."""
COPY = re.compile(r"\.embed_tokens\.|\.shared_head\.head\.")
"""The embedding, and the copies of it and of the head that an MTP module's released layout carries along."""


APART = re.compile(r"\.(o_proj|kv_a_proj_with_mqa|kv_b_proj)\.|norm|\.mlp\.gate\.|^model\.layers\.30\.")
"""A fifth of it all, in a file of its own: attention but its queries, norms, gates, the MTP module. Healing of these alone would
replace one file, and a repository keeps every file that it ever had."""


def read(folder: Path) -> dict[str, Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def groups(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In order of names, each at most `limit` bytes (or one tensor)."""
    out: list[dict[str, Tensor]] = []
    size = limit
    for name in sorted(tensors):
        if size + tensors[name].nbytes > limit:
            out.append({})
            size = 0
        out[-1][name] = tensors[name]
        size += tensors[name].nbytes
    return out


def write_piece(path: Path, tensors: dict[str, Tensor]) -> int:
    planes = {}
    for name, t in tensors.items():  # high bytes of the scales are nearly all the same: apart they take no room
        raw = t.contiguous().view(torch.uint8).reshape(-1)
        planes[name] = raw.view(-1, t.element_size()).T.contiguous() if name.endswith("_scale") else t.contiguous()
    path.write_bytes(lzma.compress(save(planes), preset=1))
    return path.stat().st_size


def read_piece(path: Path) -> dict[str, Tensor]:
    out = {}
    for name, t in load(lzma.decompress(path.read_bytes())).items():
        out[name] = t.T.contiguous().view(torch.bfloat16).squeeze(-1) if name.endswith("_scale") else t
    return out


def pack(shipped: Path, target: Path) -> None:
    """Scales come back flat; `join` gives them their shape again from the codes."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob(PIECES):
        old.unlink()
    chosen = {k: v for k, v in read(shipped).items() if not (k.startswith(EMBEDDING) or COPY.search(k))}
    pieces = groups(chosen, PIECE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # compressing leaves the interpreter free
        paths = [target / f"weights-{i + 1}-of-{len(pieces)}.xz" for i in range(len(pieces))]
        sizes = list(pool.map(write_piece, paths, pieces))
    with lzma.open(target / "side.json.xz", "wt") as file:
        json.dump({f.name: f.read_text() for f in shipped.glob("*.json") if not f.name.endswith("index.json")}, file)
    print(
        f"{target}: {len(sizes)} pieces, {sum(sizes) / 2**20:.1f} MiB of {sum(t.nbytes for t in chosen.values()) / 2**20:.1f}"
    )


def pieces_of(back: Path) -> list[Path]:
    """All of them, or an exit that says which are missing."""
    there = {f.name: f for f in back.glob(PIECES)}
    counts = {int(name.removesuffix(".xz").rpartition("-")[2]) for name in there}
    if len(counts) != 1:
        raise SystemExit(f"{back}: {'pieces of several packings' if counts else 'no pieces'} ({PIECES})")
    (count,) = counts
    wanted = [f"weights-{i + 1}-of-{count}.xz" for i in range(count)]
    if missing := [name for name in wanted if name not in there]:
        raise SystemExit(f"{back}: {', '.join(missing)} missing; take all files of one call")
    return [there[name] for name in wanted]


def packed_embedding(gguf: Path, shape_dtype: torch.dtype) -> dict[str, Tensor]:
    from teacher import GGUFReader

    embedding = GGUFReader(gguf).tensor("token_embd.weight")
    tensors = {f"{EMBEDDING}{k}": v for k, v in PackedIntegers(4).pack(embedding).items()}
    return tensors | {EMBEDDING + "weight_shape": torch.tensor(embedding.shape, dtype=shape_dtype)}


def join(back: Path, gguf: Path | None, like: Path | None, out: Path) -> None:
    tensors = {k: v for f in pieces_of(back) for k, v in read_piece(f).items()}
    if gguf is not None:
        tensors |= packed_embedding(gguf, tensors_shape_dtype(tensors))
    elif like is not None:
        embedding = {k: v for k, v in read(like).items() if k.startswith(EMBEDDING)}
        if EMBEDDING + "weight_packed" not in embedding:
            raise SystemExit(f"{like}: its embedding is not packed in four bits; --gguf takes the source's")
        tensors |= embedding
    for name in [n for n in tensors if n.endswith("_scale")]:
        tensors[name] = tensors[name].reshape(tensors[name.replace("_scale", "_packed")].shape[0], -1)
    out.mkdir(parents=True, exist_ok=True)
    side = json.loads(lzma.decompress((back / "side.json.xz").read_bytes()))
    for name, text in side.items():
        # One line: the tokenizer is a third smaller so, and counts among the bundled bytes.
        small = (
            json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
            if name == "tokenizer.json"
            else text
        )
        (out / name).write_text(small.rstrip() + "\n")
    file = out / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SAMPLING, indent=2) + "\n")
    apart = {k for k in tensors if APART.search(k)}
    shards = groups({k: v for k, v in tensors.items() if k not in apart}, SHARD)
    shards += groups({k: tensors[k] for k in apart}, 19_000_000)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)
    where = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
    total = sum(t.nbytes for t in tensors.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=0) + "\n"
    )
    (out / "convert.json").unlink(missing_ok=True)
    sums = [f"{hashlib.sha256((out / n).read_bytes()).hexdigest()}  {n}" for n in names]
    (out / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print(f"{out}: {len(names)} shards, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")


def tensors_shape_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next(t.dtype for n, t in tensors.items() if n.endswith("weight_shape"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", required=True)
    one = ways.add_parser("pack")
    one.add_argument("shipped", type=Path)
    one.add_argument("target", type=Path)
    other = ways.add_parser("join")
    other.add_argument("back", type=Path)
    which = other.add_mutually_exclusive_group(required=True)
    which.add_argument("--gguf", type=Path, help="the source, whose embedding is rounded")
    which.add_argument("--like", type=Path, help="a packed model that has the embedding already")
    other.add_argument("--out", type=Path, required=True)
    o = parser.parse_args()
    if o.way == "pack":
        pack(o.shipped, o.target)
    else:
        join(o.back, o.gguf, o.like, o.out)


if __name__ == "__main__":
    main()
