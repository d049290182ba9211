"""The second tier of pages: what memory lacks and the disk has is read before a step is planned, and what a step has
published is offered to the disk after it.

Pages that were read are published, so that the scheduler finds them like any others. What one step reads is bounded by the
token budget; a prompt that has more to read stays at the head of the queue. The disk is optional: whatever fails on the
way to it or from it is logged and ends its use, and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from rorqual.engine.disk import DiskCache
from rorqual.engine.pages import Published
from rorqual.engine.scheduler import Job, Scheduler

log = logging.getLogger(__name__)


class Pages(Protocol):
    """The part of a runner that moves pages (`engine.core.Runner`)."""

    def wipe(self, pages: Sequence[int]) -> None: ...

    def read_page(self, page: int) -> bytes: ...

    def write_page(self, page: int, data: bytes) -> None: ...


class DiskTier:
    """disk: None where there is none, and from its first failure on; restored: told of each page that was read, and of the
    job it was read for."""

    def __init__(
        self, disk: DiskCache | None, pages: Pages, scheduler: Scheduler, restored: Callable[[Job], None]
    ) -> None:
        self.disk, self._pages, self._scheduler, self._restored = disk, pages, scheduler, restored

    def load(self) -> None:
        """Publish what the disk has of the next prompts beyond what is in memory, at most a step's budget of pages."""
        if self.disk is None:
            return
        pool = self._scheduler.pool
        budget = max(1, self._scheduler.max_batched_tokens // pool.page_size)
        claimed = len(self._scheduler.running)
        for job in self._scheduler.next_up:
            if job.loading is False:
                continue
            pages, keys = pool.match(job.tokens, job.request.salt)
            try:
                need = pool.pages_for(len(job.tokens)) - len(pages)
                claimed += need
                if claimed > pool.available:  # it is not admitted now, and what is loaded would be lost again
                    return
                before = len(pages)
                job.loading = self._read(self.disk, job, pages, keys, budget)
                budget -= len(pages) - before
                if job.loading:
                    return
            except Exception:
                log.exception("a page from disk could not be used")
                self._leave(self.disk)
                return
            finally:
                pool.release(pages)

    def store(self, pages: Sequence[int]) -> None:
        """Offer newly published pages to the disk. Nothing has taken them since: only `schedule` takes pages."""
        for page in pages:
            entry = self._scheduler.pool.entry(page)
            if self.disk and entry:
                try:
                    if self.disk.wants(entry.key):
                        self.disk.put(entry, self._pages.read_page(page))
                except Exception:
                    log.exception("a page could not be read for the disk")
                    self._leave(self.disk)

    def close(self) -> None:
        """Pages on their way to the disk still get there."""
        if self.disk:
            self.disk.close()

    def _read(self, disk: DiskCache, job: Job, pages: list[int], keys: list[bytes], budget: int) -> bool:
        """Continue `pages` from disk. Returns whether there may be more than the budget allowed."""
        pool, size = self._scheduler.pool, self._scheduler.pool.page_size
        parent = keys[-1] if keys else pool.root(job.request.salt)
        for start in range(len(pages) * size, len(job.tokens) - size, size):
            if budget == 0:
                return True
            tokens = job.tokens[start : start + size]
            entry = Published.of(parent, tokens)
            data = disk.get(entry)
            taken = pool.take(1) if data is not None else None
            if data is None or taken is None:
                return False
            pages += taken
            try:
                self._pages.write_page(taken[0], data)
            except Exception:
                self._pages.wipe(taken)
                raise
            parent = pool.publish(taken[0], parent, tokens)
            budget -= 1
            self._restored(job)
        return False

    def _leave(self, disk: DiskCache) -> None:
        log.error("the engine goes on without its cache on disk")
        disk.close()
        self.disk = None
        for job in self._scheduler.waiting:
            job.loading = False
