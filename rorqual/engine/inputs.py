"""From pieces of sequences to what a forward takes: tokens, and the batch that says where they stand.

Two forms of the same work. *Rows*: every token is a row of its own, with its own length and its sequence's pages; the
latents of all are written before any attends, so that a token sees those before it in the same forward. A row's result
needs nothing of the rows beside it. *Chunk*: the tokens of a sequence are one row [T] that attends under a mask; cheaper
for many tokens. Padding of a chunk stands at position 0 and writes to the scrap page, so it changes nothing but the shape.

Built on the host and moved at once: the shapes are small, launches are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rorqual.model.batch import Batch, LatentPages


class Span(NamedTuple):
    """Consecutive tokens of a sequence, the first at position `start`, and the pages that hold the sequence."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]

    def part(self, begin: int, end: int) -> Span:
        return Span(self.tokens[begin:end], self.start + begin, self.pages)


def pages_of(span: Span, page_size: int) -> int:
    """Up to its end."""
    return -(-(span.start + len(span.tokens)) // page_size)


def page_table(spans: Sequence[Span], page_size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[B, P]: the pages that hold each sequence up to the end of its span, padded with the scrap page."""
    needed = [pages_of(s, page_size) for s in spans]
    table = np.zeros((len(spans), max(needed)), np.int64)
    for row, span, n in zip(table, spans, needed, strict=True):
        row[:n] = span.pages[:n]
    return table


def as_rows(spans: Sequence[Span], latents: Tensor, page_size: int) -> tuple[Tensor, Batch]:
    """tokens [N, 1] and their batch: one row for each token of the spans, in order."""
    counts = [len(s.tokens) for s in spans]
    owners = np.repeat(np.arange(len(spans)), counts)
    positions = np.concatenate([np.arange(s.start, s.start + n) for s, n in zip(spans, counts, strict=True)])
    tokens = np.concatenate([np.asarray(s.tokens, np.int64) for s in spans])
    table = page_table(spans, page_size)
    slots = table[owners, positions // page_size] * page_size + positions % page_size
    numbers = torch.from_numpy(np.stack([tokens, positions, slots, owners])).to(latents.device)
    tokens_N, positions_N, slots_N, owners_N = numbers
    table_NP = torch.from_numpy(table).to(latents.device)[owners_N]
    cache = LatentPages(latents, table_NP, slots_N[:, None], positions_N + 1)
    return tokens_N[:, None], Batch(positions_N[:, None], cache=cache)


def bucket(length: int) -> int:
    """A length of few significant bits, at most an eighth above (8 at least): eight an octave."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class Shape(NamedTuple):
    """Of a chunk: rows, tokens of each and pages of each, padding included; fresh: all rows begin their sequences."""

    rows: int
    length: int
    width: int
    fresh: bool

    @classmethod
    def of(cls, spans: Sequence[Span], page_size: int, rounded: Callable[[int], int] | None = None) -> Shape:
        """The smallest that holds the spans, lengths and pages `rounded` up."""
        length, width = (max(len(s.tokens) for s in spans), max(pages_of(s, page_size) for s in spans))
        fresh = all(s.start == 0 for s in spans)
        if rounded is not None:
            # What is fresh attends to its tokens, not to its pages; there must be as many.
            length = rounded(length)
            width = max(-(-length // page_size), 1 if fresh else rounded(width))
        return cls(len(spans), length, width, fresh)

    @property
    def numbers(self) -> int:
        return self.rows * (3 * self.length + self.width + 1)


def chunk_numbers(spans: Sequence[Span], shape: Shape, page_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """All that a chunk is made of, to be moved at once: tokens, positions and slots [B, T] each, page table [B, P], each
    row's last place [B]."""
    B, T, P, _ = shape
    out = np.zeros(shape.numbers, np.int64)
    tokens, positions, slots = out[: 3 * B * T].reshape(3, B, T)
    table, last = out[3 * B * T : -B].reshape(B, P), out[-B:]
    offsets = np.arange(T)
    slots[:] = offsets % page_size  # of the scrap page
    for i, (said, start, pages) in enumerate(spans):
        n, needed = len(said), pages_of(spans[i], page_size)
        mine = offsets[:n] + start
        table[i, :needed] = pages[:needed]
        tokens[i, :n], positions[i, :n], last[i] = said, mine, n - 1
        slots[i, :n] = table[i, mine // page_size] * page_size + mine % page_size
    return out


def chunk_batch(numbers: Tensor, shape: Shape, latents: Tensor) -> tuple[Tensor, Batch, Tensor]:
    """tokens [B, T], their batch, and each row's last place [B], as views of `chunk_numbers`."""
    B, T, P, fresh = shape
    tokens, positions, slots = numbers[: 3 * B * T].view(3, B, T)
    table, last = numbers[3 * B * T : -B].view(B, P), numbers[-B:]
    return tokens, Batch(positions, cache=LatentPages(latents, table, slots, fresh=fresh)), last


def as_chunk(
    spans: Sequence[Span], latents: Tensor, page_size: int, buckets: bool = False
) -> tuple[Tensor, Batch, Tensor]:
    """tokens [B, T], padded at the end, their batch, and each row's last place [B]. buckets: T and the pages are `bucket`s,
    for a device that makes a new attention plan for every length (cuDNN: tens of milliseconds)."""
    shape = Shape.of(spans, page_size, bucket if buckets else None)
    return chunk_batch(torch.from_numpy(chunk_numbers(spans, shape, page_size)).to(latents.device), shape, latents)


def pieces(spans: Sequence[Span], limit: int) -> Iterator[list[Span]]:
    """The spans in order, cut so that no piece has more than `limit` tokens."""
    piece: list[Span] = []
    room = limit
    for span in spans:
        begin = 0
        while begin < len(span.tokens):
            part = span.part(begin, begin + room)
            piece.append(part)
            begin += len(part.tokens)
            room -= len(part.tokens)
            if room == 0:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece
