"""Pages of the prefix cache on disk: a second tier that survives restarts, as DeepSeek's context caching does it.

Multi-head latent attention makes this affordable: 64 tokens of a small model are a few hundred kilobytes, read in a
fraction of the time that computing them takes. It is best effort throughout: whatever goes wrong is a miss.

A page is one file, named by its key in one of 256 directories. The key is a chained hash (`engine.pages`) whose root
stands for everything the content depends on: model, weights, dtype, the kernels' contract, the tenant's salt. Still
nothing is believed: the header repeats parent and tokens, and a digest covers it all. A file that does not say exactly
what is expected is deleted and counts as a miss.

Files are written by a thread of their own, under another name first, and renamed when complete, so that a reader, in
this process or another, sees a whole file or none. The step that offers a page never waits: a full queue drops it.
Several processes may share a directory: nobody holds state that another could make wrong. Use is recorded in the
files' modification times; whoever finds the directory above its cap deletes the least recently used. Since each
looks again only after it has written a sixteenth of the cap itself, so much per process may lie above it for a while.

When a file cannot be written (disk full, no permission), writing ends with one warning and reading goes on.
Left out: fsync (a torn file fails its digest), compression (latents are noise to it).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from rorqual.engine.pages import Published
from rorqual.errors import ConfigError

log = logging.getLogger(__name__)

MAGIC = b"rorqpage"
VERSION = 1
QUEUE_BYTES = 64 * 2**20
"""Pages waiting to be written, at most."""
STALE_S = 3600.0
"""An unfinished file of this age was left by a process that is gone."""

_HEADER = struct.Struct("<8sI16s16s16sIQ")  # magic, version, identity, key, parent, bytes of tokens, bytes of content
_DIGEST = 16


class DiskCache:
    """page_bytes: size of every page's content; identity: the pool's; capacity_bytes: of all files together.

    `get`, `wants` and `put` are for one thread and never raise for what the disk does. Raises ConfigError where not one
    page fits.
    """

    def __init__(self, directory: Path, *, page_bytes: int, identity: bytes, capacity_bytes: int) -> None:
        self.directory, self.page_bytes, self.capacity_bytes = directory, page_bytes, capacity_bytes
        if page_bytes >= capacity_bytes:
            raise ConfigError(
                f"a disk cache of {capacity_bytes:,} bytes holds not one page of {page_bytes:,}",
                remedy="raise the disk cache's size, or leave it out",
            )
        self.identity = blake2b(identity, digest_size=16).digest()
        self.writing = True
        self.hits = self.misses = self.dropped = self.written = 0
        self._warned = False
        self._bytes = self._unseen = 0  # as of the last look at the directory, and written since then
        self._numbers = itertools.count()
        self._queue: queue.Queue[tuple[Published, bytes] | None] = queue.Queue(max(4, QUEUE_BYTES // page_bytes))
        self._thread = threading.Thread(target=self._write_all, name="disk-cache", daemon=True)
        self._thread.start()

    def get(self, entry: Published) -> bytes | None:
        """The page's content, or None."""
        path = self._path(entry.key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.misses += 1
            return None
        except OSError as error:
            self.misses += 1
            self._warn("%s cannot be read: %s", path, error)
            return None
        head = self._head(entry)
        body = len(head) + self.page_bytes
        if len(data) != body + _DIGEST or not data.startswith(head) or _digest(data[:body]) != data[body:]:
            self.misses += 1
            self._warn("%s is damaged or not a page of this cache: it is deleted", path)
            _unlink(path)
            return None
        self.hits += 1
        with contextlib.suppress(OSError):  # deleted by another process meanwhile, or a directory that is only read
            os.utime(path)
        return data[len(head) : body]

    def wants(self, key: bytes) -> bool:
        """Whether `put` would do anything with this page; cheaper than reading the page out."""
        if not self.writing or self._queue.full():
            self.dropped += self.writing
            return False
        return not os.path.exists(self._path(key))  # noqa: PTH110  # Path.exists raises for some errors

    def put(self, entry: Published, content: bytes) -> None:
        """Queue a page to be written."""
        assert len(content) == self.page_bytes
        try:
            self._queue.put_nowait((entry, content))
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until everything queued is written."""
        self._queue.join()

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.directory / name[:2] / f"{name}.page"

    def _head(self, entry: Published) -> bytes:
        sizes = len(entry.tokens), self.page_bytes
        return _HEADER.pack(MAGIC, VERSION, self.identity, entry.key, entry.parent, *sizes) + entry.tokens

    def _warn(self, message: str, *values: object) -> None:
        """Once: a damaged directory has thousands of files."""
        if not self._warned:
            self._warned = True
            log.warning("disk cache: %s (further ones are not reported)", message % values)

    # ---- in the thread --------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        with contextlib.suppress(OSError):  # a directory that cannot be listed: `_write` will say so
            self._shrink()
        while (item := self._queue.get()) is not None:
            try:
                if self.writing:
                    self._write(*item)
            except OSError as error:
                self.writing = False
                log.warning("disk cache: %s cannot be written, it is only read from now on: %s", self.directory, error)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, entry: Published, content: bytes) -> None:
        path = self._path(entry.key)
        data = self._head(entry) + content
        data += _digest(data)
        if len(data) > self.capacity_bytes or path.exists():
            return
        # Prompts can be read back from these files, so they are the owner's alone.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}-{next(self._numbers)}.tmp")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError:
            _unlink(unfinished)
            raise
        self.written += 1
        self._unseen += len(data)
        if self._bytes + self._unseen > self.capacity_bytes or self._unseen > self.capacity_bytes // 16:
            self._shrink()

    def _shrink(self) -> None:
        """Look at the directory; if it is above its cap, delete the least recently used down to 15/16 of it, so that
        the next page does not have to look again."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total > self.capacity_bytes:
            for _, size, path in files:
                if total <= self.capacity_bytes * 15 // 16:
                    break
                _unlink(path)
                total -= size
        self._bytes, self._unseen = total, 0

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(modification time in ns, bytes, path) of every page. Deletes what dead processes have left unfinished."""
        for path in self.directory.glob("??/*"):
            try:
                stat = path.stat()
            except OSError:
                continue  # deleted by another process meanwhile
            if path.suffix == ".page":
                yield stat.st_mtime_ns, stat.st_size, path
            elif path.suffix == ".tmp" and time.time() - stat.st_mtime > STALE_S:
                _unlink(path)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s cannot be deleted: %s", path, error)
