"""From pieces of sequences to what a forward takes: tokens, and the batch that says where they stand.

Two forms of the same work. *Rows*: every token is a row of its own, with its own length and its sequence's pages; the
latents of all are written before any attends, so that a token sees those before it in the same forward. A row's result
needs nothing of the rows beside it. *Chunk*: the tokens of a sequence are one row [T] that attends under a mask; cheaper
for many tokens. Padding of a chunk stands at position 0 and writes to the scrap page, so it changes nothing but the shape.

Built on the host and moved at once: the shapes are small, launches are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def page_table(spans: Sequence[Span], page_size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[B, P]: the pages that hold each sequence up to the end of its span, padded with the scrap page."""
    needed = [-(-(s.start + len(s.tokens)) // page_size) for s in spans]
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


def as_chunk(
    spans: Sequence[Span], latents: Tensor, page_size: int, buckets: bool = False
) -> tuple[Tensor, Batch, Tensor]:
    """tokens [B, T], padded at the end, their batch, and each row's last place [B]. buckets: T is a `bucket`, for a device
    that makes a new attention plan for every length (cuDNN: tens of milliseconds)."""
    T, device = max(len(s.tokens) for s in spans), latents.device
    T = bucket(T) if buckets else T
    starts = torch.tensor([s.start for s in spans])[:, None]
    counts = torch.tensor([len(s.tokens) for s in spans])[:, None]
    offsets = torch.arange(T)[None]
    real_BT = offsets < counts
    positions_BT = torch.where(real_BT, starts + offsets, 0)
    table_BP = torch.from_numpy(page_table(spans, page_size))
    pages_BT = table_BP.gather(1, positions_BT // page_size)
    slots_BT = torch.where(real_BT, pages_BT * page_size + positions_BT % page_size, offsets % page_size)
    tokens_BT = torch.tensor([[*s.tokens, *[0] * (T - len(s.tokens))] for s in spans])
    fresh = all(s.start == 0 for s in spans)
    cache = LatentPages(latents, table_BP.to(device), slots_BT.to(device), fresh=fresh)
    return tokens_BT.to(device), Batch(positions_BT.to(device), cache=cache), (counts[:, 0] - 1).to(device)


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
