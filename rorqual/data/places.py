"""Files wherever they lie: local paths, and any address that fsspec understands (s3://, gs://, hf://, https://, ...).

Only what is asked for is imported: a machine without fsspec, pyarrow or datasets reads local text as before, and is told
what to install where that does not do.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from rorqual.errors import DataError

DATASET = "datasets:"
"""Prefix of a Hugging Face data set: datasets:NAME-OR-DIRECTORY[@SPLIT]."""


def need(package: str) -> Any:
    """The package. Raises DataError saying how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise DataError(
            f"these inputs need the package {package.partition('.')[0]}", remedy='pip install "rorqual[data]"'
        ) from error


def is_address(path: str) -> bool:
    """Whether fsspec has to open it."""
    return "://" in path


def _filesystem(address: str) -> tuple[Any, str]:
    fsspec = need("fsspec")
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is missing
        raise DataError(f"{address} cannot be opened: {error}", remedy="install what it names") from error
    return found


def expand(address: str) -> list[tuple[str, str]]:
    """(address, name below what was given) of every file: a pattern's matches, a folder's content, or the file itself."""
    fs, path = _filesystem(address)
    try:
        if any(c in path for c in "*?["):
            files = sorted(fs.glob(path))
        elif fs.isdir(path):
            files = sorted(fs.find(path))
        else:
            files = [path] if fs.exists(path) else []
    except Exception as error:  # every store has errors of its own
        raise DataError(f"{address} cannot be listed: {error}", remedy="check the address and your access") from error
    root = path.rstrip("/") if len(files) != 1 or files[0] != path else path.rpartition("/")[0]
    return [(fs.unstrip_protocol(f), f.removeprefix(root).lstrip("/")) for f in files]


def open_binary(path: str) -> IO[bytes]:
    """The file for reading. Raises OSError."""
    if not is_address(path):
        return open(path, "rb")
    fs, inner = _filesystem(path)
    stream: IO[bytes] = fs.open(inner, "rb")
    return stream


def signature(path: str) -> tuple[int, str]:
    """(bytes, what changes when the content does): tells whether an input is still the one it was. Data sets have neither
    here: they are known by name."""
    if path.startswith(DATASET):
        return 0, ""
    if not is_address(path):
        found = Path(path).stat()
        return found.st_size, str(found.st_mtime_ns)
    fs, inner = _filesystem(path)
    info = fs.info(inner)
    changes = next((info[k] for k in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(k)), "")
    return int(info.get("size") or 0), str(changes)


def parquet_rows(stream: IO[bytes], first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, {"text": ...} or {"messages": ...}) of each row from `first` on; other columns are not read. Raises DataError
    where neither column is there or the file is none."""
    parquet = need("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(stream)
    except Exception as error:
        raise DataError(f"no valid Parquet: {error}") from error
    columns = [c for c in ("text", "messages") if c in file.schema_arrow.names]
    if not columns:
        raise DataError(f"neither a text nor a messages column among {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        if number + batch.num_rows > first:
            for i, row in enumerate(batch.to_pylist()):
                if number + i >= first:
                    yield number + i, {k: v for k, v in row.items() if v is not None}
        number += batch.num_rows


def dataset_rows(spec: str, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same of a Hugging Face data set, streamed: one saved by `save_to_disk`, a folder of data files, or a name on the
    Hub."""
    datasets = need("datasets")
    name, _, split = spec.removeprefix(DATASET).partition("@")
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
            data = data[split or "train"] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(data.skip(first), first):
            yield number, {k: row[k] for k in ("text", "messages") if row.get(k) is not None}
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{spec} cannot be read: {error}", remedy="check its name and split") from error
