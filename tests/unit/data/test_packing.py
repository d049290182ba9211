from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rorqual.data.packing import PackedSamples, PackedStream
from rorqual.data.shards import Meta, Reader, Writer
from rorqual.errors import DataError

Make = Callable[..., Reader]
VOCAB = 60000


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(lengths, first=id): documents whose tokens count on from `first`, so that each token names its
    place."""

    def build(lengths: list[int], first: int = 3, masked: bool = False, tokenizer: str = "hash") -> Reader:
        directory = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        writer = Writer(directory, Meta(VOCAB, tokenizer, 1, 2))
        for i, length in enumerate(lengths):
            ids = list(range(first, first + length))
            first += length
            writer.add(ids, [0, *(j % 2 for j in range(1, length))] if masked else None)
            if i % 7 == 6:
                writer.close_shard()
        writer.finish()
        return Reader(directory)

    return build


def lengths(rng: random.Random, count: int, longest: int) -> list[int]:
    return [rng.randint(1, longest) for _ in range(count)]


def stream_of(view: PackedStream, rows: int) -> list[int]:
    """The tokens of a one-source stream without the overlaps."""
    return [int(t) for t in view.rows(0, rows).tokens[:, : view.seq_len].ravel()]


@pytest.mark.parametrize("extra", [1, 2, 4])
def test_each_epoch_covers_every_document_once_and_whole(make: Make, extra: int) -> None:
    rng = random.Random()
    sizes = lengths(rng, 50, 30)
    reader, seed = make(sizes), rng.randrange(10**6)
    view = PackedStream([reader], 16, seed, extra=extra)
    stream = stream_of(view, 3 * reader.tokens // 16 + 1)
    starts = {int(reader.document(i)[0][0]): size for i, size in enumerate(sizes)}
    orders = []
    for epoch in range(3):
        part = stream[epoch * reader.tokens : (epoch + 1) * reader.tokens]
        assert sorted(part) == list(range(3, 3 + reader.tokens))
        order, at = [], 0
        while at < len(part):
            size = starts[part[at]]
            assert part[at : at + size] == list(range(part[at], part[at] + size)), "documents stay whole"
            order.append(part[at])
            at += size
        orders.append(order)
    assert orders[0] != orders[1] != orders[2], "every epoch has its own order"


@pytest.mark.parametrize("extra", [1, 3])
def test_rows_overlap_by_extra_so_that_every_token_is_a_target_once(make: Make, extra: int) -> None:
    rng = random.Random()
    view = PackedStream([make(lengths(rng, 40, 50))], 16, rng.randrange(99), extra=extra)
    rows = view.rows(0, 90).tokens
    assert rows.shape == (90, 16 + extra)
    assert (rows[:-1, 16:] == rows[1:, :extra]).all()
    targets = rows[:, 1:17].ravel().tolist()
    assert targets == [*stream_of(view, 91)[1 : 90 * 16 + 1]]


@pytest.mark.parametrize("kind", ["stream", "mixture", "samples"])
def test_rows_do_not_depend_on_how_they_are_asked_for(make: Make, kind: str) -> None:
    rng = random.Random()
    readers = [make(lengths(rng, 40, 50), masked=True), make(lengths(rng, 15, 80), first=20000)]
    seed = rng.randrange(10**6)

    def view() -> PackedStream | PackedSamples:
        if kind == "samples":
            return PackedSamples(readers, 32, seed, extra=2)
        weights = [0.7, 0.3] if kind == "mixture" else None
        return PackedStream(readers, 32, seed, weights, extra=2)

    kept = view()
    start, whole = 4090, view().rows(4090, 40)  # over the border of a block, hundreds of epochs in
    for _ in range(20):
        a = rng.randint(0, 39)
        b = rng.randint(a, 40)
        part = (view() if rng.random() < 0.3 else kept).rows(start + a, b - a)
        assert np.array_equal(part.tokens, whole.tokens[a:b])
        assert np.array_equal(part.documents, whole.documents[a:b])
        assert np.array_equal(part.mask, whole.mask[a:b])
    seed += 1
    assert (view().rows(start, 40).tokens != whole.tokens).any(), "another seed, another order"


def test_document_numbers_change_where_documents_do(make: Make) -> None:
    rng = random.Random()
    sizes = lengths(rng, 60, 25)
    reader = make(sizes)
    rows = PackedStream([reader], 40, 1, extra=2).rows(0, 60)
    begins = {int(t) for t in (reader.document(i)[0][0] for i in range(reader.documents))}
    assert (rows.documents[:, 0] == 1).all()
    steps = np.diff(rows.documents, axis=1)
    assert (steps == np.isin(rows.tokens[:, 1:], list(begins))).all()


def test_a_mixture_keeps_its_weights_and_each_source_its_stream(make: Make) -> None:
    rng = random.Random()
    readers = [make(lengths(rng, 40, 50)), make(lengths(rng, 9, 30), first=20000), make([7], first=50000)]
    weights = [0.6, 0.35, 0.05]
    view = PackedStream(readers, 16, 5, weights, extra=1)
    n = 5000
    rows = view.rows(0, n)
    source = np.digitize(rows.tokens[:, 0], [20000, 50000])
    for s, reader in enumerate(readers):
        share = (source == s).mean()
        assert abs(share - weights[s]) < 0.002
        for prefix in (100, 1000):
            assert abs((source[:prefix] == s).sum() - prefix * weights[s]) <= 2, "evenly spread"
        own = rows.tokens[source == s][:, :16].ravel()
        assert (np.sort(own[: reader.tokens]) == np.sort(reader.gather(reader.starts, reader.lengths)[0])).all()
        assert (rows.tokens[source == s][:-1, 16] == rows.tokens[source == s][1:, 0]).all()
        assert view.epochs_seen(n)[s] == pytest.approx((source == s).sum() * 16 / reader.tokens)


def test_without_weights_sources_finish_together(make: Make) -> None:
    readers = [make([20] * 100), make([20] * 300, first=20000)]
    view = PackedStream(readers, 16, 0)
    assert view.rows_per_epoch == 500
    assert view.epochs_seen(500) == pytest.approx([1.0, 1.0], abs=0.02)
    assert view.epochs_seen(0) == [0.0, 0.0]


def test_the_stored_mask_travels_with_its_tokens(make: Make) -> None:
    reader = make([9, 4, 30, 2, 17], masked=True)
    tokens, mask = reader.gather(reader.starts, reader.lengths)
    of = dict(zip(tokens.tolist(), mask.tolist(), strict=True))
    rows = PackedStream([reader], 8, 3).rows(0, 40)
    assert rows.mask.tolist() == [[of[t] for t in row] for row in rows.tokens.tolist()]
    samples = PackedSamples([reader], 32, 3).rows(0, 4)
    for row in zip(*(part.tolist() for part in samples), strict=True):
        for token, document, learn in zip(*row, strict=True):
            assert learn == (of[token] if document else 0)


@pytest.mark.parametrize("extra", [1, 3])
def test_samples_are_whole_and_each_is_there_once_an_epoch(make: Make, extra: int) -> None:
    rng = random.Random()
    readers = [make(lengths(rng, 80, 30)), make(lengths(rng, 20, 60), first=20000)]
    sizes = np.concatenate([reader.lengths for reader in readers]).tolist()
    view = PackedSamples(readers, 40, rng.randrange(99), extra=extra)
    assert view.truncated == sum(size > 41 for size in sizes)
    orders = []
    for epoch in range(3):
        rows = view.rows(epoch * view.rows_per_epoch, view.rows_per_epoch)
        found = []
        for tokens, documents, mask in zip(*rows, strict=True):
            used = int((documents > 0).sum())
            assert (documents[used:] == 0).all() and (tokens[used:] == 2).all() and not mask[used:].any()
            assert used <= 41, "what could be no next-token target is not packed"
            for number in range(1, int(documents.max()) + 1):
                at = np.flatnonzero(documents == number)
                own = tokens[at]
                assert (np.diff(own) == 1).all() and (np.diff(at) == 1).all()
                assert mask[at].tolist() == [0] + [1] * (at.size - 1), "its first token is nobody's target"
                found.append((int(own[0]), int(own.size)))
        firsts = np.concatenate([r.gather(r.starts, np.ones_like(r.starts))[0] for r in readers]).tolist()
        assert sorted(found) == sorted(zip(firsts, [min(size, 41) for size in sizes], strict=True))
        orders.append(found)
    assert orders[0] != orders[1]
    assert view.epochs_seen(view.rows_per_epoch * 2) == [2.0]


def test_packing_wastes_little(make: Make) -> None:
    rng = random.Random(1)
    view = PackedSamples([make(lengths(rng, 1500, 30))], 99, 0)
    rows = view.rows(0, view.rows_per_epoch)
    assert (rows.documents > 0).mean() > 0.97


def test_what_cannot_be_packed_is_refused(make: Make) -> None:
    reader, other = make([5]), make([5], tokenizer="other")
    for bad in ([], [make([])], [reader, other]):
        with pytest.raises(DataError):
            PackedStream(bad, 8, 0)
        with pytest.raises(DataError):
            PackedSamples(bad, 8, 0)
    for weights in ([0.0], [-1.0], [1.0, 1.0], [float("nan")]):
        with pytest.raises(DataError, match="weights"):
            PackedStream([reader], 8, 0, weights)
    with pytest.raises(DataError, match="seed"):
        PackedStream([reader], 8, -1)


def test_extreme_weights_still_give_every_source_its_rows(make: Make) -> None:
    readers = [make([50], first=3 + 100 * i) for i in range(9)]
    view = PackedStream(readers, 8, 0, [1e9, *[1e-9] * 8])
    assert all(seen > 0 for seen in view.epochs_seen(4096))


def test_a_batch_of_rows_is_quick(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = Writer(tmp_path, Meta(VOCAB, "hash", 1, 2))
    for i in range(20000):
        writer.add(rng.integers(0, VOCAB, int(rng.integers(10, 300))))
        if i % 5000 == 4999:
            writer.close_shard()
    writer.finish()
    for view in (
        PackedStream([Reader(tmp_path)], 1024, 0, extra=2),
        PackedSamples([Reader(tmp_path)], 1024, 0, extra=2),
    ):
        view.rows(0, 128)
        took = []
        for i in range(1, 12):
            begin = time.thread_time()
            view.rows(i * 128, 128)
            took.append(time.thread_time() - begin)
        print(type(view).__name__, f"{min(took) * 1000:.1f} ms")
        assert min(took) < 0.1  # of a core, which may be a busy one; 20 ms on an idle one
