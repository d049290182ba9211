"""The same documents as JSONL, Parquet, in an object store and as a data set give the same shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rorqual.data import places
from rorqual.data.prepare import prepare
from rorqual.data.shards import Reader
from rorqual.data.sources import list_sources, read_records
from rorqual.errors import DataError

from .conftest import Maker

CHAT = [{"role": "user", "content": "what feeds a whale?"}, {"role": "assistant", "content": "krill"}]


@pytest.fixture
def texts(make_texts: Maker) -> list[str]:
    return make_texts(11, 90)


@pytest.fixture
def jsonl(texts: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return path


@pytest.fixture
def store() -> Iterator[str]:
    """A store that fsspec keeps in memory."""
    yield "memory://corpus"
    fsspec.filesystem("memory").rm("/corpus", recursive=True)


def shards(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "train").iterdir())}


def parquet(texts: list[str]) -> pa.Table:
    return pa.table({"id": list(range(len(texts))), "text": texts})


def test_every_place_gives_the_same_shards(
    texts: list[str], jsonl: Path, tmp_path: Path, small_dir: Path, store: str
) -> None:
    import datasets

    prepare([jsonl], tmp_path / "jsonl", small_dir)
    expected = shards(tmp_path / "jsonl")
    pq.write_table(parquet(texts), tmp_path / "a.parquet", row_group_size=7)
    fs = fsspec.filesystem("memory")
    for i, part in enumerate((texts[:30], texts[30:])):
        with fs.open(f"/corpus/part-{i}.parquet", "wb") as file:
            pq.write_table(parquet(part), file)
    with fs.open("/corpus/notes.csv", "wb") as file:
        file.write(b"of no known kind")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    inputs = {
        "parquet": tmp_path / "a.parquet",
        "store": f"{store}/*.parquet",
        "folder in the store": store,
        "data set": f"datasets:{tmp_path / 'saved'}",
    }
    for name, given in inputs.items():
        prepare([given], tmp_path / name, small_dir)
        assert shards(tmp_path / name) == expected, name


def test_reading_goes_on_from_a_record(texts: list[str], tmp_path: Path) -> None:
    pq.write_table(parquet(texts), tmp_path / "a.parquet", row_group_size=7)
    sources = list_sources([tmp_path / "a.parquet"])
    everything = list(read_records(sources))
    assert [r.text for r in everything] == texts
    for n in (0, 1, 6, 7, 8, 89, 90):
        assert list(read_records(sources, 0, n)) == everything[n:]


def test_conversations_come_from_parquet_too(tmp_path: Path, small_dir: Path) -> None:
    pq.write_table(pa.table({"messages": [CHAT, CHAT], "text": [None, None]}), tmp_path / "chat.parquet")
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': CHAT})}\n" * 2)
    for name in ("parquet", "jsonl"):
        report = prepare([tmp_path / f"chat.{name}"], tmp_path / name, small_dir)
        assert report.conversations == 2
    assert shards(tmp_path / "parquet") == shards(tmp_path / "jsonl")


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"id": [1], "words": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: neither a text nor a messages column among id, words"):
        list(read_records(list_sources([tmp_path / "a.parquet"])))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b.parquet: no valid Parquet"):
        list(read_records(list_sources([tmp_path / "b.parquet"])))
    with pytest.raises(DataError, match="cannot be opened"):
        list_sources(["nosuch://bucket/x.jsonl"])
    with pytest.raises(DataError, match=r"hold no files"):
        list_sources(["memory://empty/*.jsonl"])
    with pytest.raises(DataError, match=r"pip install .rorqual\[data\]"):
        places.need("no_such_package_at_all")


def test_an_interrupted_run_over_a_store_goes_on(
    texts: list[str], tmp_path: Path, small_dir: Path, store: str, jsonl: Path
) -> None:
    fs = fsspec.filesystem("memory")
    with fs.open("/corpus/a.jsonl", "wb") as file:
        file.write(jsonl.read_bytes())

    class Stop(Exception):
        pass

    def stop(report: object, place: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        prepare([store], tmp_path / "b", small_dir, shard_tokens=400, progress=stop)
    prepare([store], tmp_path / "b", small_dir, shard_tokens=400)
    prepare([jsonl], tmp_path / "whole", small_dir, shard_tokens=400)
    assert shards(tmp_path / "b") == shards(tmp_path / "whole")
    assert Reader(tmp_path / "b" / "train").documents == len(texts)
