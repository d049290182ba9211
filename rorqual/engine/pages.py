"""Which page of the latent cache holds what: free list, shared prefixes, eviction. Bookkeeping only, no tensors.

The cache is one pool of pages of 64 tokens. A request owns references to pages; a page whose 64 tokens are all
computed may be *published* under a key, and later requests that begin with the same tokens take a reference to it
instead of computing it again. MLA makes this worth while: a page is small and its content depends on nothing but
the tokens up to its end.

A key is a hash chained from a root (the pool's identity: model, weights, cache dtype; and the request's salt) over the
tokens of each page, so one lookup stands for the whole prefix. A hash is not believed: the page's tokens and its
parent's key are compared on every hit. Released pages stay published until they are needed, least recently used
first, and of one request its last pages first, because a prefix is of use without its tail and a tail is of none
without its prefix.

Page 0 is scrap: padding writes there, nobody owns it. The same keys name pages on disk (`engine.disk`), a second tier
that this file knows nothing of: what comes from there is published like a page that was computed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rorqual.engine.api import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Published:
    """What a published page holds: its key, the key of the page before, and its tokens as bytes."""

    key: bytes
    parent: bytes
    tokens: bytes

    @classmethod
    def of(cls, parent: bytes, tokens: Sequence[int]) -> Published:
        """The entry of a page with these tokens after the page (or root) `parent`."""
        content = array("q", tokens).tobytes()
        return cls(_hash(parent + content), parent, content)


class PagePool:
    """References to pages 1 .. num_pages - 1, and the prefix cache over them.

    identity: whatever the content of a page depends on besides its tokens; prefix_cache False never shares.
    """

    def __init__(
        self, num_pages: int, page_size: int = PAGE_SIZE, *, identity: bytes = b"", prefix_cache: bool = True
    ) -> None:
        assert num_pages >= 2 and page_size >= 1, "page 0 is scrap: a pool needs one page more"
        self.num_pages, self.page_size = num_pages, page_size
        self.prefix_cache = prefix_cache
        self.identity = _hash(identity)
        self._given = identity
        self._free = deque(range(1, num_pages))
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unreferenced, next to be evicted first
        self._published: dict[int, Published] = {}
        self._by_key: dict[bytes, int] = {}

    def resized(self, num_pages: int) -> PagePool:
        """An empty pool of the same identity."""
        return PagePool(num_pages, self.page_size, identity=self._given, prefix_cache=self.prefix_cache)

    @property
    def usable(self) -> int:
        """Pages that one request alone could own."""
        return self.num_pages - 1

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Published pages nobody refers to."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Pages `take` can hand out now."""
        return self.free + self.idle

    @property
    def published(self) -> int:
        return len(self._published)

    def entry(self, page: int) -> Published | None:
        """What the page is published as, if it is."""
        return self._published.get(page)

    def references(self, page: int) -> int:
        return self._references.get(page, 0)

    def root(self, salt: str = "") -> bytes:
        """The parent of first pages. Requests of different salts share nothing."""
        return _hash(self.identity + salt.encode())

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens fill or begin."""
        return -(-tokens // self.page_size)

    def match(self, tokens: Sequence[int], salt: str = "") -> tuple[list[int], list[bytes]]:
        """The published pages that hold the beginning of `tokens`, referenced for the caller, and their keys.

        The page of the last token is never among them: someone wants that token's logits, so it is computed.
        """
        pages: list[int] = []
        keys: list[bytes] = []
        parent = self.root(salt)
        for start in range(0, len(tokens) - self.page_size, self.page_size) if self.prefix_cache else ():
            entry = Published.of(parent, tokens[start : start + self.page_size])
            page = self._by_key.get(entry.key)
            if page is None or self._published[page] != entry:
                break
            pages.append(page)
            keys.append(entry.key)
            parent = entry.key
        for page in pages:
            self._references[page] = self._references.get(page, 0) + 1
            self._idle.pop(page, None)
        return pages, keys

    def take(self, count: int) -> list[int] | None:
        """`count` pages of undefined content with one reference each, or None (and nothing taken) if there are
        not so many. Evicts published pages only when no free one is left."""
        if count > self.available:
            return None
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        self._references.update((page, 1) for page in pages)
        return pages

    def publish(self, page: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Offer a full, computed page to later requests. Returns its key, the parent of the next page's.

        If another page already holds the same, that one stays and this one remains private.
        """
        assert len(tokens) == self.page_size and self.references(page) > 0
        entry = Published.of(parent, tokens)
        if self.prefix_cache and entry.key not in self._by_key and page not in self._published:
            self._published[page] = entry
            self._by_key[entry.key] = page
        return entry.key

    def release(self, pages: Iterable[int]) -> None:
        """Give back one reference to each page of one request, in the request's order."""
        for page in reversed(list(pages)):
            self._references[page] -= 1
            if self._references[page] == 0:
                del self._references[page]
                if page in self._published:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_key[self._published.pop(page).key]
        return page


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()
