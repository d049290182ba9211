"""The local index against what its folder holds: incremental, after kills, and from the command line."""

from __future__ import annotations

import asyncio
import gzip
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rorqual.cli.main import app
from rorqual.errors import DataError
from rorqual.search.extract import Document
from rorqual.search.gather import OWN, Report, add_folder, add_own, own_documents
from rorqual.search.index import Hit, LocalIndex, LocalProvider

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("lor", "mip", "nus", "tak")]


def some_words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def found(index: LocalIndex, word: str) -> set[str]:
    return {hit.place.rpartition("/")[2] for hit in index.search(word, 1000)}


def holding(folder: Path, word: str) -> set[str]:
    return {p.name for p in folder.rglob("*.md") if word in p.read_text().split()}


def same(one: LocalIndex, other: LocalIndex) -> bool:
    """Equal documents, passages, and answers to every word in rank and text."""
    entries = [[(e.place, e.documents, e.passages) for e in i.entries()] for i in (one, other)]
    return entries[0] == entries[1] and all(
        sorted(map(repr, one.search(word, 1000))) == sorted(map(repr, other.search(word, 1000))) for word in WORDS
    )


def sound(path: Path) -> bool:
    """SQLite's own checks, of the file and of the inverted lists."""
    db = sqlite3.connect(path)
    try:
        db.execute("INSERT INTO fts(fts) VALUES ('integrity-check')")
        return db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        db.close()


def test_random_changes_leave_what_a_fresh_index_would_hold(tmp_path: Path) -> None:
    """Files are written, changed, moved and deleted at random; after each run the index equals one made anew."""
    rng = random.Random(11)
    folder = tmp_path / "docs"
    folder.mkdir()
    index = LocalIndex(tmp_path / "index.sqlite")
    (folder / "keep.md").write_text("balor")
    for turn in range(8):
        for _ in range(6):
            path = folder / f"{rng.randrange(12)}.md"
            if path.exists() and rng.random() < 0.3:
                path.unlink()
            else:
                path.write_text(some_words(rng, rng.choice([0, 5, 400])))
        report = add_folder(index, folder)
        fresh = LocalIndex(tmp_path / f"fresh{turn}.sqlite")
        add_folder(fresh, folder)
        assert same(index, fresh)
        again = add_folder(index, folder)
        assert (again.added, again.updated, again.removed) == (0, 0, 0)
        assert again.unchanged == report.added + report.updated + report.unchanged + report.unreadable
        for word in rng.sample(WORDS, 10):
            assert found(index, word) == holding(folder, word)
    index.close()
    assert sound(tmp_path / "index.sqlite")


def test_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    files = {
        "a.md": b"# Baleen\nkrill", "b.html": b"<title>T</title><p>krill in a page of its own</p>", "README": b"krill",
        "c.txt.gz": gzip.compress(b"krill"), "latin.txt": "krill \xe9t\xe9".encode("latin-1"), "zero.txt": b"kr\0ill",
        "bad.md.gz": b"\x1f\x8bkrill", "empty.md": b"", "picture.png": b"krill", ".hidden.md": b"krill",
        ".git/x.md": b"krill", "node_modules/y.md": b"krill", "deep/er/z.rst": b"krill",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "link.md").symlink_to("/etc/hostname")
    index = LocalIndex(tmp_path / "index.sqlite")
    report = add_folder(index, tmp_path / "in")
    assert report == Report(added=6, unreadable=3)
    assert found(index, "krill") == {"a.md", "b.html", "c.txt.gz", "README", "latin.txt", "z.rst"}
    assert found(index, "ete") == {"latin.txt"}
    assert index.search("baleen")[0].heading == "Baleen"
    assert add_folder(index, tmp_path / "in" / "a.md").added == 1
    for bad in ("nowhere", "in/picture.png"):
        with pytest.raises(DataError):
            add_folder(index, tmp_path / bad)


def test_a_batch_is_whole_or_not_there(tmp_path: Path) -> None:
    index = LocalIndex(tmp_path / "i.sqlite")
    source = index.begin("x", "folder")
    index.put(source, "a", "1", Document("A", "krill"))
    with pytest.raises(ZeroDivisionError), index.batch():
        index.put(source, "a", "2", Document("A", "plankton"))
        index.put(source, "b", "2", Document("B", "plankton"))
        1 / 0  # noqa: B018
    assert index.stamps(source) == {"a": "1"}
    assert index.search("krill") == [Hit("A", "a", "", "", "krill")] and not index.search("plankton")


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """kill -9 at a random moment, again and again; what is there is sound, work is kept, and the end is what it would
    have been."""
    rng = random.Random(7)
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(1500):
        (folder / f"{i}.md").write_text(some_words(rng, 300))
    code = (
        "import sys; from pathlib import Path; from rorqual.search.gather import add_folder; "
        "from rorqual.search.index import LocalIndex; add_folder(LocalIndex(sys.argv[1]), Path(sys.argv[2]))"
    )
    path = tmp_path / "killed.sqlite"
    kept, kills = 0, 0
    while kills < 4:
        child = subprocess.Popen([sys.executable, "-c", code, str(path), str(folder)])
        index = None
        while child.poll() is None:  # wait until it has done more than the one before it
            time.sleep(0.01)
            if path.exists() and path.stat().st_size:
                index = index or LocalIndex(path)
                entries = index.entries()
                if entries and entries[0].documents > kept:
                    break
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
        assert index is not None
        entry = index.entries()[0]
        assert entry.documents >= kept
        kept = entry.documents
        index.close()
        assert sound(path)
    index = LocalIndex(path)
    report = add_folder(index, folder)
    assert report.unchanged == kept and report.added == 1500 - kept
    fresh = LocalIndex(tmp_path / "fresh.sqlite")
    add_folder(fresh, folder)
    assert same(index, fresh)


def test_a_reader_beside_a_writer_sees_whole_batches(tmp_path: Path) -> None:
    writer, reader = LocalIndex(tmp_path / "i.sqlite"), LocalIndex(tmp_path / "i.sqlite")
    source = writer.begin("x", "folder")
    with writer.batch():
        writer.put(source, "a", "1", Document("A", "krill"))
        assert not reader.search("krill")
    assert reader.search("krill")


def test_files_that_are_no_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, however long it may be " * 50)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("PRAGMA user_version = 77")
    other.close()
    for name in ("text", "other.sqlite"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(DataError):
            LocalIndex(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


# ---- this project's documentation ---------------------------------------------------------------------------------


def test_the_documentation_is_there_until_it_is_removed(tmp_path: Path) -> None:
    index = LocalIndex(tmp_path / "i.sqlite")
    assert add_own(index).added == len(own_documents()) >= 5
    assert add_own(index) == Report(unchanged=len(own_documents()))
    assert "docs/engine.md" in {hit.place for hit in index.search("preempted pages latent cache", 3)}
    assert index.remove(OWN) and not index.entries() and not index.search("latent")
    assert add_own(index) == Report() and not index.search("latent")
    assert add_own(index, again=True).added and index.search("latent")


def test_results_are_documents_with_their_matching_passages(tmp_path: Path) -> None:
    index = LocalIndex(tmp_path / "i.sqlite")
    source = index.begin("x", "folder")
    index.put(source, "a", "1", Document("A", "krill one\n\n# Other\n\nnothing\n\n# More\n\nkrill two", "2026-01-01"))
    index.put(source, "b", "1", Document("B", "krill"))
    results = asyncio.run(LocalProvider(index).search("krill", 5))
    assert {r.url for r in results} == {"a", "b"} and len(asyncio.run(LocalProvider(index).search("krill", 1))) == 1
    a = next(r for r in results if r.url == "a")
    assert (
        "krill one" in a.content and "krill two" in a.content and "nothing" not in a.content and a.date == "2026-01-01"
    )


# ---- the command line ---------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "whales.md").write_text("# Baleen\nThe zorgle eats krill.")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["index", *words], env={"RORQUAL_DATA_DIR": str(tmp_path / "data")})
        assert result.exit_code == 0 or "nothing found" in result.output, result.output
        return result.output

    assert "1 added" in run("add", str(tmp_path / "docs")) and "1 unchanged" in run("add", str(tmp_path / "docs"))
    assert "1 documents, 1 passages" in run("list") and OWN in run("list")
    assert "zorgle eats krill" in run("search", "zorgles") and '"place": "file:' in run("search", "zorgle", "--json")
    assert "removed" in run("remove", str(tmp_path / "docs"), OWN) and run("list") == ""
    assert "nothing found" in run("search", "zorgle")
    with pytest.raises(DataError):
        CliRunner().invoke(
            app, ["index", "add", str(tmp_path / "no")], env={"RORQUAL_DATA_DIR": str(tmp_path)}, catch_exceptions=False
        )
