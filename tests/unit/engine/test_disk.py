"""The second tier: pages survive the process, whatever the disk does to them costs a miss and nothing else."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.engine.api import Output
from rorqual.engine.core import EngineCore
from rorqual.engine.disk import DiskCache
from rorqual.engine.pages import Published
from rorqual.engine.settings import EngineSettings
from rorqual.errors import ConfigError
from tests.unit.engine.fakes import VOCAB, MemoryRunner, expected, make_core, request

CONTENT = 256


def entry(n: int) -> Published:
    return Published.of(b"parent", [n, n + 1])


def content(n: int) -> bytes:
    return random.Random(n).randbytes(CONTENT)


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[type[DiskCache]]:
    """Opens caches on one directory and closes them in the end."""
    opened: list[DiskCache] = []

    def opens(identity: bytes = b"model", capacity_bytes: int = 1 << 20, directory: Path = tmp_path) -> DiskCache:
        cache = DiskCache(directory, page_bytes=CONTENT, identity=identity, capacity_bytes=capacity_bytes)
        opened.append(cache)
        return cache

    yield opens  # type: ignore[misc]
    for cache in opened:
        cache.close()


def files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_what_was_put_is_there_for_the_next_process(open_cache: type[DiskCache], tmp_path: Path) -> None:
    cache = open_cache()
    for n in range(20):
        assert cache.wants(entry(n).key)
        cache.put(entry(n), content(n))
    cache.flush()
    again = open_cache()
    assert all(again.get(entry(n)) == content(n) for n in range(20))
    assert again.get(entry(50)) is None and (again.hits, again.misses) == (20, 1)
    assert not again.wants(entry(3).key)
    assert {p.stat().st_mode & 0o077 for p in tmp_path.glob("??")} == {0}, "prompts can be read back from pages"


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif how == "truncated":
        del data[random.randrange(len(data)) :]
    elif how == "longer":
        data += b"x"
    path.write_bytes(b"not a page" if how == "foreign" else bytes(data))


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "foreign"])
def test_a_spoiled_file_is_a_miss_and_is_deleted(
    open_cache: type[DiskCache], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache()
    for n in range(5):
        cache.put(entry(n), content(n))
    cache.flush()
    for path in files(tmp_path):
        spoil(path, how)
    with caplog.at_level(logging.WARNING):
        assert [cache.get(entry(n)) for n in range(5)] == [None] * 5
    assert files(tmp_path) == [] and cache.misses == 5
    assert len(caplog.records) == 1, "told once"
    cache.put(entry(0), content(0))
    cache.flush()
    assert cache.get(entry(0)) == content(0)


def test_a_page_of_another_model_is_never_returned(open_cache: type[DiskCache]) -> None:
    mine, other = open_cache(b"mine"), open_cache(b"other")
    mine.put(entry(1), content(1))
    mine.flush()
    assert other.get(entry(1)) is None


def test_the_least_recently_used_go_first_and_the_cap_holds(open_cache: type[DiskCache], tmp_path: Path) -> None:
    size = 400  # a little more than a file
    cache = open_cache(capacity_bytes=32 * size)
    for n in range(30):
        cache.put(entry(n), content(n))
        cache.flush()
        os.utime(files_by_key(tmp_path)[entry(n).key.hex()], (n, n))
    assert cache.get(entry(0)) == content(0)
    for n in range(100, 120):
        cache.put(entry(n), content(n))
        cache.flush()
        assert sum(p.stat().st_size for p in files(tmp_path)) <= 32 * size
    assert cache.get(entry(0)) is not None and cache.get(entry(1)) is None and cache.get(entry(119)) is not None


def files_by_key(directory: Path) -> dict[str, Path]:
    return {p.stem: p for p in files(directory)}


def test_a_start_trims_to_the_cap_and_clears_what_the_dead_left(open_cache: type[DiskCache], tmp_path: Path) -> None:
    cache = open_cache()
    for n in range(50):
        cache.put(entry(n), content(n))
    cache.flush()
    left = files(tmp_path)[0].with_suffix(".1-1.tmp")
    left.write_bytes(b"half")
    old = time.time() - 7200
    os.utime(left, (old, old))
    small = open_cache(capacity_bytes=4000)
    small.flush()
    small.put(entry(99), content(99))
    small.flush()
    assert sum(p.stat().st_size for p in files(tmp_path)) <= 4000 and not left.exists()


def test_a_cap_below_one_page_is_refused(open_cache: type[DiskCache]) -> None:
    with pytest.raises(ConfigError, match="not one page"):
        open_cache(capacity_bytes=CONTENT)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_only_read(
    open_cache: type[DiskCache],
    tmp_path: Path,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = open_cache()
    cache.put(entry(0), content(0))
    cache.flush()

    def write_bytes(path: Path, data: bytes) -> int:
        with path.open("wb") as f:
            f.write(data[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with caplog.at_level(logging.WARNING):
        for n in range(1, 9):
            cache.put(entry(n), content(n))
        cache.flush()
    assert not cache.writing and not cache.wants(entry(99).key)
    assert len(caplog.records) == 1 and os.strerror(code) in caplog.text
    assert cache.get(entry(0)) == content(0) and len(files(tmp_path)) == 1


def test_a_place_that_is_no_directory_is_a_warning(open_cache: type[DiskCache], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = open_cache(directory=tmp_path / "file")
    assert cache.get(entry(0)) is None
    if cache.wants(entry(0).key):
        cache.put(entry(0), content(0))
    cache.flush()
    assert not cache.writing


def test_a_full_queue_drops_and_never_waits(open_cache: type[DiskCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk does not write before all has been offered: whoever waited for it would wait for ever."""
    write, goes_on = Path.write_bytes, threading.Event()

    def held(path: Path, data: bytes) -> int:
        assert goes_on.wait(60)
        return write(path, data)

    monkeypatch.setattr("rorqual.engine.disk.QUEUE_BYTES", 4 * CONTENT)
    monkeypatch.setattr(Path, "write_bytes", held)
    cache = open_cache()
    for n in range(100):
        if cache.wants(entry(n).key):
            cache.put(entry(n), content(n))
    assert 95 <= cache.dropped <= 96, "four pages wait, and the thread has taken one or none"
    goes_on.set()
    cache.flush()
    assert cache.written == 100 - cache.dropped


def _hammer(directory: str, seed: int) -> None:
    """One of several processes on a directory far too small for what they write. Each page is written before the next is
    asked for: a busy machine may not let the writing thread run before all is asked, and nothing would be found."""
    rng = random.Random(seed)
    cache = DiskCache(Path(directory), page_bytes=CONTENT, identity=b"model", capacity_bytes=6000)
    for _ in range(400):
        n = rng.randrange(40)
        assert cache.get(entry(n)) in (None, content(n))
        if cache.wants(entry(n).key):
            cache.put(entry(n), content(n))
            cache.flush()
    cache.close()
    assert cache.writing and cache.hits > 0


def test_processes_share_a_directory(open_cache: type[DiskCache], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(str(tmp_path), n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    # A sixteenth that each may not have looked at yet, and as much again that it may have missed while it looked.
    assert sum(p.stat().st_size for p in files(tmp_path)) <= 6000 * (1 + 4 / 16)
    assert all(p.suffix == ".page" for p in files(tmp_path))


# ---- with the engine --------------------------------------------------------------------------------------------------


def ask(core: EngineCore, prompt: list[int], **params: object) -> Output:
    """The last output of a request, whose tokens are checked."""
    asked = request("r", prompt, max_tokens=6, **params)
    core.add(asked)
    outputs: list[Output] = []
    while core.busy:
        outputs += core.step()
    assert [t for o in outputs for t in o.token_ids] == expected(asked, core.info.max_model_len)
    if core.disk:
        core.disk.flush()
    return outputs[-1]


def restarted(directory: Path, **options: int) -> tuple[EngineCore, MemoryRunner]:
    return make_core(40, max_model_len=100, cache_dir=directory, **options)  # type: ignore[arg-type]


def random_prompt(n: int) -> list[int]:
    return [random.randrange(2, VOCAB) for _ in range(n)]


def test_a_prompt_is_read_back_after_a_restart(tmp_path: Path) -> None:
    prompt = random_prompt(50)
    cold, _ = restarted(tmp_path)
    assert ask(cold, prompt).cached_tokens == 0
    cold.close()
    warm, runner = restarted(tmp_path)
    last = ask(warm, prompt)
    assert last.cached_tokens == 48 and last.stats and last.stats.disk_tokens == 48
    assert runner.plans[0] == [("r", 48, 2)]
    again = ask(warm, prompt)
    assert again.cached_tokens == 48 and again.stats and again.stats.disk_tokens == 0, "now from memory"
    assert warm.stats.disk_hit_tokens == 48 and warm.stats.cache_hit_tokens == 96
    warm.close()


def test_what_memory_evicted_comes_from_disk_and_only_that(tmp_path: Path) -> None:
    core, _ = make_core(14, max_model_len=56, cache_dir=tmp_path)
    prompts = [random_prompt(45) for _ in range(3)]
    for prompt in prompts:
        ask(core, prompt)
    last = ask(core, prompts[0])
    assert last.cached_tokens == 44 and last.stats and last.stats.disk_tokens == 44
    core.close()


def test_one_step_reads_no_more_than_its_budget_and_others_go_on(tmp_path: Path) -> None:
    long = [request(f"long {n}", random_prompt(80), max_tokens=3) for n in range(2)]
    cold, _ = restarted(tmp_path)
    for asked in long:
        ask(cold, list(asked.prompt))
    cold.close()
    core, runner = restarted(tmp_path, max_batched_tokens=8)
    writes = [0]
    write = runner.write_page

    def counting(page: int, data: bytes) -> None:
        writes[0] += 1
        write(page, data)

    runner.write_page = counting  # type: ignore[method-assign]
    short = request("short", random_prompt(3), max_tokens=40)
    answers: dict[str, list[int]] = {r.id: [] for r in (short, *long)}
    core.add(short)
    answers["short"] += core.step()[0].token_ids
    for asked in long:
        core.add(asked)
    while core.busy:
        before = writes[0]
        news = core.step()
        assert writes[0] - before <= 2
        assert len(answers["short"]) == 40 or "short" in {o.request_id for o in news}
        for output in news:
            answers[output.request_id] += output.token_ids
    assert writes[0] == 2 * 19 and answers == {r.id: expected(r, 100) for r in (short, *long)}
    read = [part for plan in runner.plans for part in plan if part[0] != "short" and part[1] < 76]
    assert not read, "nothing that was read is computed"
    core.close()


def test_tenants_share_nothing_on_disk(tmp_path: Path) -> None:
    prompt = random_prompt(30)
    core, _ = restarted(tmp_path)
    ask(core, prompt, salt="a")
    core.close()
    core, _ = restarted(tmp_path)
    assert ask(core, prompt, salt="b").cached_tokens == ask(core, prompt).cached_tokens == 0
    assert ask(core, prompt, salt="a").cached_tokens == 28
    core.close()


def test_a_spoiled_page_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = random_prompt(30)
    core, _ = restarted(tmp_path)
    ask(core, prompt)
    core.close()
    for path in files(tmp_path):
        spoil(path, "flipped")
    core, _ = restarted(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert ask(core, prompt).cached_tokens == 0
    assert len(caplog.records) == 1
    core.close()


def test_a_full_disk_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    core, _ = restarted(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(3):
        ask(core, random_prompt(30))
    assert core.disk and not core.disk.writing
    core.close()


@pytest.mark.parametrize("method", ["write_page", "read_page"])
def test_a_runner_that_cannot_move_pages_goes_on_without_a_disk(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_prompt(80)
    core, _ = restarted(tmp_path)
    ask(core, prompt)
    core.close()
    core, runner = restarted(tmp_path, max_batched_tokens=8)

    calls, move = [0], getattr(runner, method)

    def fail(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("cannot move pages")
        return move(*arguments)

    setattr(runner, method, fail)
    with caplog.at_level(logging.CRITICAL):
        ask(core, prompt)
        ask(core, random_prompt(80))
    assert core.disk is None
    pool = core.scheduler.pool
    assert pool.available == pool.usable
    core.close()


def test_a_disk_cache_needs_the_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="cache_dir"):
        EngineSettings("m", cache_dir="/somewhere", prefix_cache=False)
    assert EngineSettings("m", cache_dir="/somewhere").cache_disk_bytes == 10 * 2**30
