"""Pages: never in two hands, never lost, shared only where the whole prefix is the same."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.engine.pages import PagePool

SIZE = 4


def fill(pool: PagePool, tokens: list[int]) -> tuple[list[int], int]:
    """What a request does: take what is there, allocate the rest, publish its full pages. Pages and hits."""
    pages, keys = pool.match(tokens)
    hits = len(pages)
    fresh = pool.take(pool.pages_for(len(tokens)) - hits)
    assert fresh is not None
    pages += fresh
    for i in range(hits, len(tokens) // SIZE):
        parent = keys[-1] if keys else pool.root()
        keys.append(pool.publish(pages[i], parent, tokens[i * SIZE : (i + 1) * SIZE]))
    return pages, hits


def test_a_second_request_takes_the_pages_of_the_first() -> None:
    pool = PagePool(20, SIZE)
    tokens = random.choices(range(1000), k=14)
    first, hits = fill(pool, tokens)
    assert hits == 0
    second, hits = fill(pool, tokens)
    assert hits == 3 and second[:3] == first[:3] and not set(second[3:]) & set(first)
    assert [pool.references(p) for p in first] == [2, 2, 2, 1]


def test_the_last_token_is_always_computed() -> None:
    pool = PagePool(20, SIZE)
    tokens = random.choices(range(1000), k=8)
    fill(pool, tokens)
    assert len(pool.match(tokens)[0]) == 1
    assert len(pool.match([*tokens, 5])[0]) == 2
    assert pool.match(tokens[:SIZE]) == ([], [])


def test_a_page_is_a_hit_only_after_the_same_prefix() -> None:
    pool = PagePool(20, SIZE)
    a, b, c = ([random.randrange(1000) for _ in range(SIZE)] for _ in range(3))
    fill(pool, a + b + c)
    assert pool.match(b + c + a) == ([], [])
    assert len(pool.match(a + c + b)[0]) == 1


def test_identity_separates_and_prefix_cache_can_be_off() -> None:
    tokens = random.choices(range(1000), k=9)
    assert PagePool(9, SIZE, identity=b"x").root() != PagePool(9, SIZE, identity=b"y").root()
    pool = PagePool(20, SIZE, prefix_cache=False)
    fill(pool, tokens)
    assert fill(pool, tokens)[1] == 0 and pool.published == 0


def test_tails_are_evicted_before_heads_and_the_old_before_the_new() -> None:
    pool = PagePool(1 + 6, SIZE)
    old, new = ([random.randrange(1000) for _ in range(3 * SIZE)] for _ in range(2))
    for tokens in (old, new):
        pool.release(fill(pool, tokens)[0])
    assert pool.available == 6 and pool.published == 6
    assert pool.take(2) is not None
    assert len(pool.match([*old, 0])[0]) == 1 and len(pool.match([*new, 0])[0]) == 3


def test_take_gives_all_or_nothing() -> None:
    pool = PagePool(5, SIZE)
    assert pool.take(5) is None and pool.available == 4
    pages = pool.take(4)
    assert pages is not None and sorted(pages) == [1, 2, 3, 4]
    assert pool.take(1) is None and pool.take(0) == []


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_page_is_lost_shared_wrongly_or_returned_after_eviction(data: st.DataObject) -> None:
    """Requests come and go over a tiny pool; `content` is what really lies in each page."""
    pool = PagePool(1 + data.draw(st.integers(2, 9)), SIZE)
    content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end
    live: list[tuple[list[int], list[int]]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        coin: bool = data.draw(st.booleans())
        if live and coin:
            pool.release(live.pop(data.draw(st.integers(0, len(live) - 1)))[0])
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5 * SIZE))
            pages, keys = pool.match(tokens)
            for i, page in enumerate(pages):
                assert content[page] == tuple(tokens[: (i + 1) * SIZE]), "a hit that holds something else"
            fresh = pool.take(pool.pages_for(len(tokens)) - len(pages))
            if fresh is None:
                pool.release(pages)
                continue
            held = {p for owned, _ in live for p in owned} | set(pages)
            assert not held & set(fresh) and 0 not in fresh and len(set(fresh)) == len(fresh)
            pages += fresh
            for i in range(len(keys), len(pages)):
                content[pages[i]] = tuple(tokens[: (i + 1) * SIZE])
                if (i + 1) * SIZE <= len(tokens):
                    parent = keys[-1] if keys else pool.root()
                    keys.append(pool.publish(pages[i], parent, tokens[i * SIZE : (i + 1) * SIZE]))
            live.append((pages, tokens))
        for page in range(1, pool.num_pages):
            assert pool.references(page) == sum(page in owned for owned, _ in live)
        assert pool.available == pool.usable - len({p for owned, _ in live for p in owned})
    for pages, _ in live:
        pool.release(pages)
    assert pool.available == pool.usable
    assert all(pool.references(p) == 0 for p in range(pool.num_pages))
    assert len(pool.take(pool.usable) or ()) == pool.usable and pool.published == 0
