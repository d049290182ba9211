from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rorqual.data.shards import Meta, Reader, Writer
from rorqual.errors import DataError


def write(directory: Path, documents: list[tuple[list[int], list[int] | None]], vocab: int, per_shard: int) -> Reader:
    writer = Writer(directory, Meta(vocab, "hash", 1, 2))
    for ids, mask in documents:
        writer.add(ids, mask)
        if writer.pending_tokens >= per_shard:
            writer.close_shard()
    writer.finish()
    return Reader(directory)


def some_documents(rng: random.Random, vocab: int, count: int = 60) -> list[tuple[list[int], list[int] | None]]:
    documents: list[tuple[list[int], list[int] | None]] = []
    for _ in range(count):
        ids = [rng.randrange(vocab) for _ in range(rng.randint(1, 40))]
        documents.append((ids, rng.choice([None, [rng.randrange(2) for _ in ids]])))
    return documents


@pytest.mark.parametrize(("vocab", "item"), [(300, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (129280, 4)])
def test_what_is_written_is_read(tmp_path: Path, vocab: int, item: int) -> None:
    rng = random.Random()
    documents = some_documents(rng, vocab)
    reader = write(tmp_path, documents, vocab, 200)
    assert len(reader.shards) > 3
    assert reader.documents == len(documents)
    assert reader.tokens == sum(len(ids) for ids, _ in documents)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tokens")) == reader.tokens * item
    for i, (ids, mask) in enumerate(documents):
        tokens, learn = reader.document(i)
        assert tokens.tolist() == ids
        assert learn.tolist() == (mask or [1] * len(ids))
    assert reader.learned == sum(sum(mask) if mask else len(ids) for ids, mask in documents)
    reader.verify()


def test_gathering_in_any_order_over_shards(tmp_path: Path) -> None:
    rng = random.Random()
    documents = some_documents(rng, 300)
    reader = write(tmp_path, documents, 300, 150)
    picks = [rng.randrange(len(documents)) for _ in range(100)]
    cuts = [(rng.randrange(len(documents[i][0]))) for i in picks]
    starts = np.array([reader.starts[i] + c for i, c in zip(picks, cuts, strict=True)])
    lengths = np.array([len(documents[i][0]) - c for i, c in zip(picks, cuts, strict=True)])
    tokens, mask = reader.gather(starts, lengths)
    assert tokens.tolist() == [t for i, c in zip(picks, cuts, strict=True) for t in documents[i][0][c:]]
    masks = [m or [1] * len(ids) for ids, m in documents]
    assert mask.tolist() == [m for i, c in zip(picks, cuts, strict=True) for m in masks[i][c:]]


def test_text_alone_needs_no_mask_files(tmp_path: Path) -> None:
    write(tmp_path, [([1, 2], None), ([3], [1])], 300, 1)
    assert not list(tmp_path.glob("*.mask"))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["missing", "short", "long"])
@pytest.mark.parametrize("suffix", ["tokens", "offsets", "mask"])
def test_a_damaged_shard_is_named(tmp_path: Path, harm: str, suffix: str) -> None:
    write(tmp_path, [([5, 6, 7], [0, 1, 1])] * 9, 300, 12)
    victim = tmp_path / f"shard-00001.{suffix}"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] if harm == "short" else content + b"x")
    if harm == "missing":
        victim.unlink()
    with pytest.raises(DataError, match=rf"shard-00001.{suffix}.*rorqual data prepare"):
        Reader(tmp_path)


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    reader = write(tmp_path, [([5, 6, 7], None)] * 9, 300, 12)
    victim = tmp_path / "shard-00002.tokens"
    content = bytearray(victim.read_bytes())
    content[3] ^= 4
    victim.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00002.tokens is damaged"):
        reader.verify()


def test_without_an_index_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.json does not exist.*data prepare"):
        Reader(tmp_path)
    write(tmp_path / "train", [([5], None)], 300, 12)
    with pytest.raises(DataError, match=r"name .*train instead"):
        Reader(tmp_path)
    for broken in ("{", "[]", "{}", json.dumps({"format": 99})):
        (tmp_path / "train" / "index.json").write_text(broken)
        with pytest.raises(DataError, match=r"index.json"):
            Reader(tmp_path / "train")


def test_what_makes_no_document_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path, Meta(300, "hash", 1, 2))
    for ids, mask in (([], None), ([300], None), ([-1], None), ([1, 2], [1])):
        with pytest.raises(DataError):
            writer.add(ids, mask)
