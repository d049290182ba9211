"""What a directory holds, without reading a tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rorqual.errors import CheckpointError
from rorqual.plan.headers import INDEX, read_header, read_weights


def shard(path: Path, *names: str) -> None:
    save_file({name: np.zeros((3, 5), np.float32) for name in names}, path, metadata={"format": "pt"})


def test_headers_say_names_dtypes_and_bytes(tmp_path: Path) -> None:
    """As the safetensors package wrote them; metadata is no tensor."""
    save_file(
        {"a.weight": np.zeros((2, 4), np.float16), "b": np.zeros(7, np.int64)}, tmp_path / "m.safetensors", {"x": "y"}
    )
    assert sorted(read_header(tmp_path / "m.safetensors")) == [("a.weight", "F16", 16), ("b", "I64", 56)]
    weights = read_weights(tmp_path)
    assert weights.names == {"a.weight", "b"} and weights.nbytes == 72
    assert weights.has(".weight") and not weights.has(".weight_scale_inv")


def test_the_embedding_tells_the_precision_else_the_majority(tmp_path: Path) -> None:
    save_file(
        {"x": np.zeros(1, np.float32), "y": np.zeros(1, np.float32), "z": np.zeros(1, np.float16)},
        tmp_path / "a.safetensors",
    )
    assert read_weights(tmp_path).stored_dtype() == "F32"
    save_file({"model.embed_tokens.weight": np.zeros(1, np.float16)}, tmp_path / "b.safetensors")
    assert read_weights(tmp_path).stored_dtype() == "F16"


def test_an_index_alone_says_names_and_the_total(tmp_path: Path) -> None:
    """A directory whose weights lie elsewhere can be planned for."""
    index = {"metadata": {"total_size": 123}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    weights = read_weights(tmp_path)
    assert (weights.names, weights.nbytes, weights.stored_dtype()) == ({"a", "b"}, 123, None)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    assert read_weights(tmp_path).nbytes is None


def test_only_the_shards_of_the_index_count(tmp_path: Path) -> None:
    shard(tmp_path / "1.safetensors", "a")
    shard(tmp_path / "stray.safetensors", "other")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert read_weights(tmp_path).names == {"a"}


def test_nothing_is_nothing(tmp_path: Path) -> None:
    weights = read_weights(tmp_path)
    assert (weights.names, weights.nbytes, weights.stored_dtype()) == (frozenset(), None, None)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "1.safetensors", "a")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"2\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0\0\0\0\0\0{}",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{x",
        b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}',
        b"PK\x03\x04 a pickle, not this format at all",
    ],
    ids=["empty", "cut", "huge", "no object", "no JSON", "no offsets", "pickle"],
)
def test_a_damaged_shard_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is truncated or damaged"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}'])
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read_weights(tmp_path)
