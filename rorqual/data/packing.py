"""From documents to rows of equal length: two views that are pure functions of (data, seed, row number).

Nothing is iterated and nothing remembered: row 1,000,000 is computed as directly as row 0. That makes
resuming, changing the number of ranks, and asking "what did the model see at step 40,000" the same trivial
call. Random numbers come as raw 64-bit words from a keyed generator, whose stream numpy guarantees (its
`permutation` it does not).

A row has `seq_len + extra` tokens: inputs are the first seq_len, targets the same shifted by one, and `extra`
is one more for every token predicted further ahead (1 + MTP depth). `mask` says of each token whether it is
to be learned *as a target*. `documents` numbers the documents of a row 1, 2, ...; 0 is padding. The numbers
mean nothing across rows.

`PackedStream` is pre-training as DeepSeek does it: documents shuffled per epoch and concatenated end to end,
cut every seq_len tokens; neighbouring rows of a source overlap by `extra`, so every token but the very first
is a target exactly once. `PackedSamples` is fine-tuning: whole conversations, several to a row, none across a
border.

Left out: repacking per epoch in `PackedSamples`. Conversations do not see each other, so what shares a row
changes nothing; the rows are shuffled per epoch and there are equally many in each, which is what makes
access direct.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rorqual.data.shards import Bytes, Ints, Reader, spans
from rorqual.errors import DataError

BLOCK = 4096  # rows over which a mixture keeps its proportions exactly
WINDOW = 512  # rows that first-fit keeps open
EPOCH, MIX, FIT = range(3)  # what a random stream is for


class Rows(NamedTuple):
    """tokens int64, documents int32, mask uint8, each [rows, seq_len + extra]."""

    tokens: Ints
    documents: npt.NDArray[np.int32]
    mask: Bytes


class PackedStream:
    """Pre-training rows from one or several sources mixed by weight.

    weights: shares of the rows, kept to within 1/4096 and spread evenly; None means by size, so that all
    sources finish an epoch together. A source that is used up starts again in a new order, without a seam.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        seq_len: int,
        seed: int,
        weights: Sequence[float] | None = None,
        extra: int = 1,
        marks: Sequence[int] | None = None,
    ) -> None:
        """marks: what the mask says where a source's token is learned (1). Raises DataError for empty sources, mixed
        tokenizers or weights that are none."""
        _check(readers, seq_len, extra, seed)
        self.seq_len, self.extra, self.seed = seq_len, extra, seed
        self._readers = list(readers)
        self._marks = _marks(marks, len(readers))
        self._quotas = _quotas([r.tokens for r in readers] if weights is None else weights, len(readers))
        self.rows_per_epoch = max(1, sum(r.tokens for r in readers) // seq_len)
        self._epoch = lru_cache(maxsize=2 * len(readers))(self._make_epoch)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def rows(self, start: int, count: int) -> Rows:
        """Rows start .. start + count."""
        width = self.seq_len + self.extra
        rows = _empty(count, width)
        source, index = self._assign(start, count)
        for s in np.unique(source):
            where = np.flatnonzero(source == s)
            first = int(index[where[0]]) * self.seq_len
            tokens, document, mask = self._stretch(int(s), first, first + (where.size - 1) * self.seq_len + width)
            cut = (np.arange(where.size) * self.seq_len)[:, None] + np.arange(width)
            rows.tokens[where], rows.mask[where] = tokens[cut], mask[cut] * self._marks[s]
            numbers = document[cut]
            rows.documents[where] = numbers - numbers[:, :1] + 1
        return rows

    def epochs_seen(self, row: int) -> list[float]:
        """How often each source has been gone through by all rows before `row`."""
        block, rest = divmod(row, BLOCK)
        counts = block * self._quotas + np.bincount(self._block(block)[0][:rest], minlength=len(self._readers))
        return [float(n) * self.seq_len / r.tokens for n, r in zip(counts, self._readers, strict=True)]

    def _assign(self, start: int, count: int) -> tuple[Ints, Ints]:
        """Source of each row, and which row of that source it is."""
        parts = []
        for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1 if count else 0):
            begin, end = max(start - block * BLOCK, 0), min(start + count - block * BLOCK, BLOCK)
            source, rank = self._block(block)
            chosen = source[begin:end]
            parts.append((chosen, block * self._quotas[chosen] + rank[begin:end]))
        empty = np.zeros(0, np.int64)
        return np.concatenate([empty, *(p[0] for p in parts)]), np.concatenate([empty, *(p[1] for p in parts)])

    def _make_block(self, block: int) -> tuple[Ints, Ints]:
        """Sources of the rows of one block, evenly interleaved, and each row's rank within its source."""
        source = np.repeat(np.arange(self._quotas.size), self._quotas)
        rank = spans(np.zeros_like(self._quotas), self._quotas)
        shift = _words(self._quotas.size, self.seed, MIX, block) / 2.0**64
        order = np.argsort((rank + shift[source]) / self._quotas[source], kind="stable")
        return source[order], rank[order]

    def _make_epoch(self, source: int, epoch: int) -> tuple[Ints, Ints]:
        """Order of the documents of a source in one epoch, and where each then begins (one entry more: the
        end)."""
        reader = self._readers[source]
        order = _shuffled(reader.documents, self.seed, EPOCH, source, epoch)
        return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(reader.lengths[order])])

    def _stretch(self, source: int, begin: int, end: int) -> tuple[Ints, Ints, Bytes]:
        """Tokens, running document number and mask of positions begin .. end of a source's endless stream."""
        reader = self._readers[source]
        starts, lengths = [], []
        for epoch in range(begin // reader.tokens, (end - 1) // reader.tokens + 1):
            order, borders = self._epoch(source, epoch)
            a, b = max(begin - epoch * reader.tokens, 0), min(end - epoch * reader.tokens, reader.tokens)
            first, last = np.searchsorted(borders, a, side="right") - 1, np.searchsorted(borders, b)
            documents = order[first:last]
            skipped = np.maximum(a - borders[first:last], 0)
            starts.append(reader.starts[documents] + skipped)
            lengths.append(np.minimum(borders[first + 1 : last + 1], b) - borders[first:last] - skipped)
        all_lengths = np.concatenate(lengths)
        tokens, mask = reader.gather(np.concatenate(starts), all_lengths)
        return tokens, np.repeat(np.arange(all_lengths.size), all_lengths), mask


class PackedSamples:
    """Fine-tuning rows of whole documents.

    Documents go, in an order drawn from the seed, into the first row with room for them. A row holds at most
    seq_len + 1 tokens (further columns could be no next-token target and are padding). Longer documents are
    cut there and counted in `truncated`. The first token of a document is never a target: nothing before it
    belongs to it.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        seq_len: int,
        seed: int,
        extra: int = 1,
        marks: Sequence[int] | None = None,
    ) -> None:
        """marks: as in PackedStream. Raises DataError for empty sources or mixed tokenizers."""
        _check(readers, seq_len, extra, seed)
        self._marks = _marks(marks, len(readers))
        self.seq_len, self.extra, self.seed = seq_len, extra, seed
        self._readers = list(readers)
        lengths = np.concatenate([r.lengths for r in readers])
        self.truncated = int((lengths > seq_len + 1).sum())
        order = _shuffled(lengths.size, seed, FIT)
        fitted = np.minimum(lengths[order], seq_len + 1)
        row_of = _first_fit(fitted, seq_len + 1)
        by_row = np.argsort(row_of, kind="stable")
        self._documents, self._lengths = order[by_row], fitted[by_row]
        counts = np.bincount(row_of)
        self._ends = np.cumsum(counts)
        self._counts = counts.astype(np.int64)
        begins = np.cumsum(self._lengths) - self._lengths
        self._columns = begins - np.repeat(begins[self._ends - counts], counts)
        self.rows_per_epoch = int(counts.size)
        self._bases: Ints = np.cumsum([0, *(r.documents for r in readers)], dtype=np.int64)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def rows(self, start: int, count: int) -> Rows:
        """Rows start .. start + count."""
        width = self.seq_len + self.extra
        rows = _empty(count, width, self._readers[0].meta.pad_id)
        packed = self._packed_rows(start, count)
        counts = self._counts[packed]
        entries = spans(self._ends[packed] - counts, counts)  # documents in these rows, row after row
        row = np.repeat(np.arange(count), counts)
        begins, lengths = row * width + self._columns[entries], self._lengths[entries]
        rows.documents.reshape(-1)[spans(begins, lengths)] = np.repeat(spans(np.ones_like(counts), counts), lengths)
        reader_of = np.searchsorted(self._bases, self._documents[entries], side="right") - 1
        for r in np.unique(reader_of):
            reader, chosen = self._readers[r], reader_of == r
            document = self._documents[entries[chosen]] - self._bases[r]
            tokens, mask = reader.gather(reader.starts[document], lengths[chosen])
            target = spans(begins[chosen], lengths[chosen])
            rows.tokens.reshape(-1)[target], rows.mask.reshape(-1)[target] = tokens, mask * self._marks[r]
        rows.mask.reshape(-1)[begins] = 0
        return rows

    def epochs_seen(self, row: int) -> list[float]:
        """How often everything has been gone through by all rows before `row`: one number, all sources go
        together."""
        return [row / self.rows_per_epoch]

    def _packed_rows(self, start: int, count: int) -> Ints:
        """Which packed row stands at each row number."""
        epoch, slot = np.divmod(np.arange(start, start + count, dtype=np.int64), self.rows_per_epoch)
        packed = np.empty(count, np.int64)
        for e in np.unique(epoch):
            packed[epoch == e] = self._order(int(e))[slot[epoch == e]]
        return packed

    def _make_order(self, epoch: int) -> Ints:
        return _shuffled(self.rows_per_epoch, self.seed, EPOCH, epoch)


def _first_fit(lengths: Ints, capacity: int) -> Ints:
    """Row of each document: the first open row with room, else a new one. Of WINDOW open rows the fullest
    makes way for a new one, which bounds the work per document."""
    room = np.zeros(WINDOW, np.int64)
    number = np.zeros(WINDOW, np.int64)
    rows = np.empty(lengths.size, np.int64)
    opened = 0
    for i, length in enumerate(lengths.tolist()):
        at = int((room >= length).argmax())
        if room[at] < length:
            at = int(room.argmin())
            room[at], number[at] = capacity, opened
            opened += 1
        rows[i] = number[at]
        room[at] -= length
    return rows


def _marks(marks: Sequence[int] | None, sources: int) -> Bytes:
    return np.asarray([1] * sources if marks is None else marks, dtype=np.uint8)


def _quotas(weights: Sequence[float], sources: int) -> Ints:
    """Rows of each source in a block, by largest remainder, at least one."""
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != (sources,) or not np.isfinite(shares).all() or (shares <= 0).any():
        raise DataError(f"weights must be {sources} positive numbers, not {list(weights)}", remedy="one per source")
    exact = shares / shares.sum() * BLOCK
    quotas: Ints = np.maximum(np.floor(exact), 1).astype(np.int64)
    while quotas.sum() != BLOCK:
        step = 1 if quotas.sum() < BLOCK else -1
        gain = np.where((quotas > 1) | (step > 0), (exact - quotas) * step, -np.inf)
        quotas[np.argmax(gain)] += step
    return quotas


def _check(readers: Sequence[Reader], seq_len: int, extra: int, seed: int) -> None:
    if seed < 0:
        raise DataError(f"the seed must not be negative, but is {seed}")
    if seq_len < 1 or extra < 1:
        raise DataError(f"seq_len and extra must be at least 1, not {seq_len} and {extra}")
    if not 1 <= len(readers) <= BLOCK:
        raise DataError(f"between 1 and {BLOCK} sources can be packed, not {len(readers)}")
    for reader in readers:
        if reader.documents == 0:
            raise DataError(f"{reader.directory} holds no documents", remedy="leave it out or prepare more text")
        if reader.meta != readers[0].meta:
            raise DataError(
                f"{reader.directory} and {readers[0].directory} were made with different tokenizers",
                remedy="run `rorqual data prepare` for both with one tokenizer",
            )


def _empty(count: int, width: int, pad_id: int = 0) -> Rows:
    shape = (count, width)
    return Rows(np.full(shape, pad_id, np.int64), np.zeros(shape, np.int32), np.zeros(shape, np.uint8))


def _words(n: int, *key: int) -> npt.NDArray[np.uint64]:
    """n random 64-bit words; the same key gives the same words on every machine and numpy."""
    words: npt.NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return words


def _shuffled(n: int, *key: int) -> Ints:
    order: Ints = np.argsort(_words(n, *key), kind="stable").astype(np.int64)
    return order
