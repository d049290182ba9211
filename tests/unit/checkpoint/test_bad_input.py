"""A damaged, hostile or merely odd directory is refused by name, with a remedy, and before anything it claims is allocated;
what is well-formed is read, however strangely it was written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.checkpoint import load_model, shards
from rorqual.checkpoint.convert import convert
from rorqual.checkpoint.names import released_tensors
from rorqual.checkpoint.shards import INDEX, Shard, find_shards, read_header
from rorqual.checkpoint.source import Source
from rorqual.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.conftest import (
    config_of,
    put_tensors,
    read_raw,
    same_bytes,
    set_config,
    tensors_of,
    write_demo,
    write_raw,
)  # fmt: skip

Made = Callable[..., Path]
FILE = "model.safetensors"
NORM = "model.norm.weight"
PROJ = "model.layers.0.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.11.up_proj"


def refused(directory: Path, *words: str, kinds: Any = CheckpointError) -> str:
    """Loading raises one of our errors, whose message has these words and a remedy."""
    with pytest.raises(kinds) as caught:
        load_model(directory)
    assert caught.value.remedy, caught.value
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return str(caught.value)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header; offsets are relative to the data, so that its length does not matter."""
    header, data = read_raw(directory / FILE)
    change(header)
    write_raw(directory / FILE, header, data)


def put(directory: Path, **tensors: Tensor | None) -> None:
    stored = {**tensors_of(directory), **tensors}
    put_tensors(directory, {k: v for k, v in stored.items() if v is not None})


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 500, 5000, 60_000, -1])
def test_truncated_anywhere(copied: Made, keep: int) -> None:
    directory = copied("bf16")
    content = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(content[:keep])
    refused(directory, FILE, "truncated")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, -1])
def test_header_length_that_cannot_be(copied: Made, length: int) -> None:
    directory = copied("bf16")
    content = (directory / FILE).read_bytes()
    length = len(content) - 7 if length == -1 else length
    (directory / FILE).write_bytes(struct.pack("<Q", length) + content[8:])
    refused(directory, FILE, "truncated or damaged")


@pytest.mark.parametrize(
    "text",
    [b"", b"not json", b"[]", b"3", b"null", b'"x"', b"{", b'{"a":', b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 200_000,
     b'{"x":NaN}', b'{"x":' + b"9" * 5000 + b"}"],
    ids=lambda b: f"{bytes(b[:8])!r}x{len(b)}",
)  # fmt: skip
def test_header_that_is_no_table_of_tensors(copied: Made, text: bytes) -> None:
    directory = copied("bf16")
    write_raw(directory / FILE, text, b"\0" * 64)
    refused(directory, FILE)


ENTRIES: dict[str, Any] = {
    "not an object": 3, "a list": [], "null": None, "empty": {},
    "no dtype": {"shape": [1], "data_offsets": [0, 2]},
    "no shape": {"dtype": "BF16", "data_offsets": [0, 2]},
    "no offsets": {"dtype": "BF16", "shape": [1]},
    "one offset": {"dtype": "BF16", "shape": [1], "data_offsets": [2]},
    "three offsets": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2, 4]},
    "offsets as text": {"dtype": "BF16", "shape": [1], "data_offsets": "02"},
    "negative offset": {"dtype": "BF16", "shape": [1], "data_offsets": [-2, 0]},
    "float offset": {"dtype": "BF16", "shape": [1], "data_offsets": [0.0, 2.0]},
    "bool offset": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]},
    "far offset": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]},
    "far tensor": {"dtype": "BF16", "shape": [1], "data_offsets": [2**60, 2**60 + 2]},
    "backwards": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 0]},
    "negative dimension": {"dtype": "BF16", "shape": [-1, -1], "data_offsets": [0, 2]},
    "float dimension": {"dtype": "BF16", "shape": [1.0], "data_offsets": [0, 2]},
    "bool dimension": {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]},
    "shape is a number": {"dtype": "BF16", "shape": 1, "data_offsets": [0, 2]},
    "shape overflows 64 bits to 2": {"dtype": "U8", "shape": [2**33, 2**31, 2], "data_offsets": [0, 0]},
    "shape overflows to its size": {"dtype": "U8", "shape": [2**32 + 1, 2**32], "data_offsets": [0, 2**32]},
    "shape beyond printing": {"dtype": "U8", "shape": [10**18] * 300, "data_offsets": [0, 1]},
    "dtype unknown": {"dtype": "F4", "shape": [1], "data_offsets": [0, 2]},
    "dtype in lower case": {"dtype": "bf16", "shape": [1], "data_offsets": [0, 2]},
    "dtype a number": {"dtype": 7, "shape": [1], "data_offsets": [0, 2]},
    "dtype a list": {"dtype": ["BF16"], "shape": [1], "data_offsets": [0, 2]},
    "dtype an object": {"dtype": {}, "shape": [1], "data_offsets": [0, 2]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
def test_malformed_entry(copied: Made, kind: str) -> None:
    directory = copied("bf16")
    edit(directory, lambda header: header.update({NORM: ENTRIES[kind]}))
    refused(directory, FILE, NORM)


@pytest.mark.parametrize("metadata", [[], "x", {"format": 3}, None])
def test_metadata_is_nobodys_business(copied: Made, metadata: Any) -> None:
    """Whatever stands in __metadata__ says nothing about the tensors: read, or refused as one of ours."""
    directory = copied("bf16")
    edit(directory, lambda header: header.update({"__metadata__": metadata}))
    with suppress(CheckpointError):
        load_model(directory)


def test_the_entries_are_checked_without_assertions(tmp_path: Path) -> None:
    """`python -O` strips assert statements; a check of other people's data must not be one."""
    module: dict[str, Any] = {"__name__": "rorqual.checkpoint.shards"}
    exec(compile(Path(shards.__file__).read_text(), shards.__file__, "exec", optimize=1), module)
    write_raw(tmp_path / FILE, {"x": ENTRIES["float dimension"]}, b"ab")
    with pytest.raises(CheckpointError, match="x is malformed"):
        module["read_header"](tmp_path / FILE)


def test_overlapping_tensors(copied: Made) -> None:
    directory = copied("bf16")

    def overlap(header: dict[str, Any]) -> None:
        header["model.layers.0.input_layernorm.weight"]["data_offsets"] = header[NORM]["data_offsets"]

    edit(directory, overlap)
    refused(directory, FILE, NORM, "model.layers.0.input_layernorm.weight")


def test_zero_sized_tensors_with_absurd_shapes(copied: Made) -> None:
    """Zero bytes are claimed rightly, but no such tensor can be made."""
    directory = copied("bf16")
    edit(directory, lambda h: h.update({NORM: {"dtype": "BF16", "shape": [0, 10**30], "data_offsets": [0, 0]}}))
    refused(directory, NORM)
    for act in (lambda: Shard(directory / FILE).tensor(NORM), lambda: convert(directory, directory / "out", "fp32")):
        with suppress(CheckpointError):
            act()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_by_another_name(copied: Made, protocol: int, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    directory = copied("bf16")
    (directory / FILE).write_bytes(pickle.dumps({"weight": Bomb()}, protocol=protocol))
    refused(directory, FILE, "pickle")
    torch.save({"weight": torch.ones(3)}, directory / FILE)
    refused(directory, FILE, "pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 65536 + 640])
def test_a_header_whose_length_looks_like_a_pickle(length: int, tmp_path: Path) -> None:
    """640 is the bytes 80 02 00 ..., as a pickle of protocol 2 begins."""
    value = torch.arange(4, dtype=torch.float32)
    text = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    write_raw(tmp_path / FILE, text + b" " * (length - len(text)), value.numpy().tobytes())
    assert torch.equal(load_file(tmp_path / FILE)["x"], value)
    assert torch.equal(Shard(tmp_path / FILE).tensor("x"), value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
def test_only_pickles(copied: Made, file: str) -> None:
    directory = copied("bf16")
    for old in [directory / FILE, directory / INDEX]:
        old.unlink()
    refused(directory, "no *.safetensors")
    torch.save({}, directory / file)
    refused(directory, file, "pickle")


def test_nothing_is_allocated_for_a_claim(copied: Made) -> None:
    """In a process that may have no more than 64 MB beyond what it starts with."""
    directory = copied("bf16")
    broken = []
    for i, (kind, entry) in enumerate(ENTRIES.items()):
        if not kind.startswith(("dtype", "shape beyond")):
            shutil.copytree(directory, broken_dir := directory.parent / f"broken-{i}")
            edit(broken_dir, lambda header, entry=entry: header.update({NORM: entry}))
            broken.append(str(broken_dir))
    (long := directory.parent / "long").mkdir()
    shutil.copyfile(directory / "config.json", long / "config.json")
    (long / FILE).write_bytes(struct.pack("<Q", 2**45) + b"{" * 100)
    code = """
import resource, sys
from pathlib import Path
from rorqual.checkpoint import load_model
from rorqual.errors import CheckpointError
load_model(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for directory in sys.argv[2:]:
    try:
        load_model(directory)
    except CheckpointError:
        continue
    raise SystemExit(directory)
print("refused", len(sys.argv) - 2)
"""
    command = [sys.executable, "-c", code, str(directory), *broken, str(long)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == f"refused {len(broken) + 1}", done.stderr


# ---- the index and the directory ---------------------------------------------------------------------------------------


def set_index(directory: Path, **files: Any) -> None:
    names = {**dict.fromkeys(read_header(directory / FILE), FILE), **files}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))


def test_index_names_a_tensor_that_the_shard_lacks(copied: Made) -> None:
    directory = copied("bf16")
    set_index(directory, **{"model.layers.1.more.weight": FILE})
    refused(directory, FILE, "model.layers.1.more.weight")


def test_index_names_a_missing_file(copied: Made) -> None:
    directory = copied("bf16")
    set_index(directory, **{NORM: "model-00002-of-00002.safetensors"})
    refused(directory, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("way", ["../{}", "/etc/{}", "a/../{}", "./{}", "..", ".", "", "{}\0", "x" * 300, "{}/", 3, []])
def test_index_points_elsewhere(copied: Made, way: Any) -> None:
    directory = copied("bf16")
    shutil.copyfile(directory / FILE, directory.parent / FILE)
    set_index(directory, **{NORM: way.format(FILE) if isinstance(way, str) else way})
    refused(directory)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": null}', "\ud800", "[" * 200_000]
)
def test_damaged_index(copied: Made, text: str) -> None:
    directory = copied("bf16")
    (directory / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(directory, INDEX)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "\ud800", "[" * 200_000, '{"a":' * 200_000])
def test_damaged_config(copied: Made, text: str) -> None:
    directory = copied("bf16")
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(directory)


def test_no_config_and_no_directory(copied: Made) -> None:
    directory = copied("bf16")
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model(directory)
    refused(directory / "absent", "absent")
    refused(directory / FILE, FILE)


def test_a_tensor_in_two_shards_without_index(copied: Made) -> None:
    directory = copied("bf16")
    (directory / INDEX).unlink()
    save_file({NORM: torch.ones(64, dtype=torch.bfloat16)}, directory / "more.safetensors")
    refused(directory, NORM, FILE, "more.safetensors")


def test_the_index_decides_between_two_shards(copied: Made) -> None:
    directory = copied("bf16")
    save_file({NORM: torch.full((64,), 3.0, dtype=torch.bfloat16)}, directory / "more.safetensors")
    set_index(directory, **{NORM: "more.safetensors"})
    assert (load_model(directory).norm.weight == 3).all()


def test_links_are_followed_as_the_hub_cache_needs(copied: Made, tmp_path: Path) -> None:
    directory = copied("bf16")
    (tmp_path / "blobs").mkdir()
    for file in list(directory.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    assert load_model(directory).cfg.hidden_size == 64


# ---- tensors -----------------------------------------------------------------------------------------------------------


def test_missing_unknown_and_wrongly_shaped(copied: Made) -> None:
    directory = copied("bf16")
    good = tensors_of(directory)
    put(directory, **{PROJ: None})
    refused(directory, PROJ)
    put_tensors(directory, {**good, "model.layers.0.self_attn.extra.weight": torch.ones(3)})
    refused(directory, "model.layers.0.self_attn.extra.weight")
    put_tensors(directory, {**good, "model.layers.0.self_attn.o_proj.bias": torch.ones(3)})
    refused(directory, "model.layers.0.self_attn.o_proj.bias")
    put_tensors(directory, {**good, f"{EXPERT.replace('11', '12')}.weight": torch.ones(3)})
    refused(directory, "experts.12")
    put_tensors(directory, {**good, f"{EXPERT}.weight": good[f"{EXPERT}.weight"].T})
    refused(directory, EXPERT, "[64, 32]", "[32, 64]")
    for value in (good[PROJ].flatten(), torch.tensor(1.0), good[PROJ][None]):
        put_tensors(directory, {**good, PROJ: value})
        refused(directory, PROJ)


RANKS = [(), (5,), (2, 3, 4), (0, 7)]


@pytest.mark.parametrize("shape", RANKS)
@pytest.mark.parametrize(("storage", "suffix"), [
    ("bf16", "weight"), ("fp8", "weight"), ("fp8", "weight_scale_inv"), ("int4", "weight_packed"), ("int4", "weight_scale"),
])  # fmt: skip
def test_matrices_of_other_ranks(
    copied: Made, storage: str, suffix: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Also where the rank matters to the storage's own arithmetic, and in the converter."""
    directory = copied(storage)
    name = PROJ.replace("weight", suffix)
    put(directory, **{name: torch.zeros(shape).to(tensors_of(directory)[name].dtype)})
    refused(directory, PROJ.removesuffix(".weight"))
    for to in ("bf16", "fp8", "int8"):
        with suppress(CheckpointError):
            convert(directory, tmp_path / to, to)


def test_nothing_incomplete_is_converted(copied: Made, tmp_path: Path) -> None:
    """A conversion of a damaged source should not end in a directory that nothing can load."""
    directory = copied("bf16")
    put(directory, **{PROJ: None})
    with pytest.raises(CheckpointError, match=PROJ):
        convert(directory, tmp_path / "never", "fp8")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2])
def test_numbers_that_are_not_weights(copied: Made, dtype: torch.dtype) -> None:
    """Integers or E5M2 without scales are somebody's quantisation: taking codes for values would be silent nonsense."""
    directory = copied("bf16")
    put(directory, **{PROJ: tensors_of(directory)[PROJ].to(dtype)})
    refused(directory, PROJ)


def test_floating_dtypes_may_be_mixed(copied: Made) -> None:
    directory = copied("bf16")
    stored = tensors_of(directory)
    kinds = [torch.float16, torch.float32, torch.float64, torch.bfloat16]
    put_tensors(directory, {n: t.to(kinds[i % 4]) for i, (n, t) in enumerate(sorted(stored.items()))})
    for name, value in released_tensors(load_model(directory, dtype=torch.float32)):
        assert torch.allclose(value, stored[name].float(), atol=1e-6), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("storage", ["fp8", "int4"])
def test_scales_that_are_not_finite(copied: Made, storage: str, value: float, tmp_path: Path) -> None:
    """In a plain matrix and in a stack of experts, loaded or converted."""
    directory = copied(storage)
    good = tensors_of(directory)
    for base in (EXPERT, PROJ.removesuffix(".weight")):
        name = f"{base}.weight_scale_inv" if storage == "fp8" else f"{base}.weight_scale"
        bad = good[name].clone()
        bad.view(-1)[-1] = value
        put_tensors(directory, {**good, name: bad})
        refused(directory, FILE, name)
        with pytest.raises(CheckpointError, match=name):
            load_model(directory, dequantize=True)
        with pytest.raises(CheckpointError, match=name):
            convert(directory, tmp_path / "out", "bf16")


def test_weights_that_are_not_finite_are_not_quantised(copied: Made, tmp_path: Path) -> None:
    directory = copied("bf16")
    bad = tensors_of(directory)[PROJ]
    bad[3, 3] = float("nan")
    put(directory, **{PROJ: bad})
    for to in ("fp8", "int4", "int8"):
        with pytest.raises(CheckpointError, match=PROJ):
            convert(directory, tmp_path / to, to)
        assert not (tmp_path / to).exists()


def test_fp8_without_its_scale_or_with_another_grid(copied: Made) -> None:
    directory = copied("fp8", 0)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    good = tensors_of(directory)
    assert good[name].shape == (2, 2)
    put_tensors(directory, {k: v for k, v in good.items() if k != name})
    refused(directory, FILE, name)
    for wrong in (good[name][:1], good[name].T[:, :1], torch.ones(3, 2), torch.ones(2), torch.ones(1)):
        put_tensors(directory, {**good, name: wrong})
        refused(directory, FILE, name)


def test_orphaned_scales(copied: Made) -> None:
    """A scale whose weight is gone or is plain says that the values cannot be right."""
    directory = copied("fp8")
    put(directory, **{PROJ: tensors_of(directory)[PROJ].to(torch.bfloat16)})
    refused(directory, PROJ)
    put(directory, **{PROJ: None})
    refused(directory, PROJ)


def test_packed_without_its_scale_or_with_another_grid(copied: Made) -> None:
    directory = copied("int4")
    good = tensors_of(directory)
    name = f"{EXPERT}.weight_scale"
    put_tensors(directory, {k: v for k, v in good.items() if k != name})
    refused(directory, EXPERT)
    for wrong in (good[name][:, :1], good[name].T, good[name].repeat(1, 2), good[name].flatten()):
        put_tensors(directory, {**good, name: wrong})
        refused(directory, EXPERT)
    put_tensors(directory, {**good, f"{EXPERT}.weight_packed": good[f"{EXPERT}.weight_packed"][:, :-1]})
    refused(directory, EXPERT)


def test_a_packed_width_that_groups_do_not_divide(copied: Made) -> None:
    """40 values in groups of 32 have one and a quarter scales; one is not enough to compute with."""
    directory = copied("int4", -1, hidden_size=64, v_head_dim=20)
    base = PROJ.removesuffix(".weight")
    put(directory, **{PROJ: None, f"{base}.weight_packed": torch.zeros(64, 5, dtype=torch.int32),
                      f"{base}.weight_scale": torch.ones(64, 1, dtype=torch.bfloat16),
                      f"{base}.weight_shape": torch.tensor([64, 40])})  # fmt: skip
    refused(directory, base)
    with pytest.raises(CheckpointError, match=base):
        load_model(directory, dequantize=True)


# ---- configurations that lie or ask for what is not read -----------------------------------------------------------------

FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_an_fp8_block_over_plain_weights(copied: Made, made: Made, tmp_path: Path) -> None:
    directory = copied("bf16")
    set_config(directory, quantization_config=FP8_BLOCK)
    model = load_model(directory)
    for name, value in released_tensors(load_model(made("bf16", -1))):
        assert torch.equal(value, dict(released_tensors(model))[name])
    convert(directory, tmp_path / "out", "bf16")
    assert "quantization_config" not in config_of(tmp_path / "out")


def test_fp8_weights_without_a_block(copied: Made, made: Made) -> None:
    from rorqual.checkpoint import save_model

    directory = copied("fp8")
    set_config(directory, "quantization_config")
    model = load_model(directory)
    save_model(model, directory.parent / "again")
    same_bytes(tensors_of(made("fp8", -1)), tensors_of(directory.parent / "again"))
    assert config_of(directory.parent / "again")["quantization_config"] == FP8_BLOCK


def test_packed_weights_without_a_block(copied: Made) -> None:
    directory = copied("int4")
    set_config(directory, "quantization_config")
    refused(directory, "weight_packed", "quantization_config")


@pytest.mark.parametrize("size", [[64, 64], [128, 64], [1, 128], [128], 128, "128", None])
def test_other_fp8_blocks(copied: Made, size: Any) -> None:
    directory = copied("fp8")
    set_config(directory, quantization_config={**FP8_BLOCK, "weight_block_size": size})
    refused(directory, "128")


WEIGHTS: dict[str, Any] = {
    "asymmetric": {"symmetric": False}, "floats": {"type": "float"}, "per channel": {"strategy": "channel"},
    "three bits": {"num_bits": 3}, "no bits": {"num_bits": None}, "bits as text": {"num_bits": "4"},
    "no group size": {"group_size": None}, "group of zero": {"group_size": 0}, "negative group": {"group_size": -1},
    "group as text": {"group_size": "32"}, "group as float": {"group_size": 32.0}, "group as list": {"group_size": [32]},
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_other_packed_weights(copied: Made, kind: str) -> None:
    directory = copied("int4")
    quantization = config_of(directory)["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"].update(WEIGHTS[kind])
    set_config(directory, quantization_config=quantization)
    refused(directory, kinds=(CheckpointError, ConfigError))


@pytest.mark.parametrize("key", ["group_size", "num_bits", "symmetric", "strategy", "type"])
def test_packed_weights_of_which_the_config_does_not_say_all(copied: Made, key: str) -> None:
    directory = copied("int4")
    quantization = config_of(directory)["quantization_config"]
    del quantization["config_groups"]["group_0"]["weights"][key]
    set_config(directory, quantization_config=quantization)
    refused(directory, kinds=(CheckpointError, ConfigError))


@pytest.mark.parametrize(
    "change",
    [{"format": "int-quantized"}, {"format": "marlin-24"}, {"format": None}, {"config_groups": {}},
     {"config_groups": []}, {"config_groups": 3}, {"config_groups": {"g": None}}, {"config_groups": {"g": 3}},
     {"config_groups": {"g": {"weights": []}}}, {"config_groups": {"g": {"weights": "int4"}}}, {"quant_method": "gptq"},
     {"quant_method": ["compressed-tensors"]}],
    ids=str,
)  # fmt: skip
def test_other_compressed_tensors(copied: Made, change: dict[str, Any]) -> None:
    directory = copied("int4")
    set_config(directory, quantization_config={**config_of(directory)["quantization_config"], **change})
    refused(directory, kinds=(CheckpointError, ConfigError))


@pytest.mark.parametrize("suffix", ["weight_zero_point", "weight_g_idx"])
def test_zero_points_and_reordering(copied: Made, suffix: str) -> None:
    directory = copied("int4")
    put(directory, **{f"{EXPERT}.{suffix}": torch.zeros(32, dtype=torch.int32)})
    refused(directory, f"{EXPERT}.{suffix}")


@pytest.mark.parametrize("block", ["fp8", 3, [], [1], True])
def test_a_block_that_is_no_object(copied: Made, block: Any) -> None:
    directory = copied("fp8")
    set_config(directory, quantization_config=block)
    with suppress(CheckpointError, ConfigError):
        load_model(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fp8_scales_of_another_dtype(copied: Made, dtype: torch.dtype, tmp_path: Path) -> None:
    """They load; they convert too, also to FP8 again."""
    directory = copied("fp8")
    stored = {n: t.to(dtype) if n.endswith("scale_inv") else t for n, t in tensors_of(directory).items()}
    put_tensors(directory, stored)
    load_model(directory)
    convert(directory, tmp_path / "plain", "fp32")
    convert(directory, tmp_path / "again", "fp8")
    again = tensors_of(tmp_path / "again")
    same_bytes({n: t.float() if n.endswith("scale_inv") else t for n, t in stored.items()}, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_scales_of_another_dtype(copied: Made, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = copied("int4")
    stored = {n: t.to(dtype) if n.endswith("weight_scale") else t for n, t in tensors_of(directory).items()}
    put_tensors(directory, stored)
    load_model(directory)
    convert(directory, tmp_path / "plain", "fp32")
    convert(directory, tmp_path / "again", "int4")
    assert len(tensors_of(tmp_path / "again")) == len(stored)


@pytest.mark.parametrize("changes", [{"max_seq_len": "x"}, {"rope_factor": None, "max_seq_len": 9999}, {"dim": None},
                                     {"n_heads": "2"}, {"original_seq_len": []}], ids=str)  # fmt: skip
def test_demo_configs_that_are_wrong(made: Made, changes: dict[str, Any], tmp_path: Path) -> None:
    write_demo(made("bf16", -1), tmp_path / "demo", 1)
    set_config(tmp_path / "demo", **changes)
    with pytest.raises((CheckpointError, ConfigError)):
        load_model(tmp_path / "demo")


@pytest.mark.parametrize("damage", ["slice", "replica", "short"])
def test_demo_ranks_that_do_not_fit(made: Made, damage: str, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    write_demo(made("bf16", -1, vocab_size=96), directory, 2)
    file = directory / "model1-mp2.safetensors"
    tensors = load_file(file)
    if damage == "slice":
        del tensors["layers.0.attn.wo.weight"]
    elif damage == "replica":
        tensors["layers.0.attn.wo.weight"] = tensors["layers.0.attn.wo.weight"][:-1]
    else:
        tensors["layers.0.attn.wo.weight"] = torch.ones(3, dtype=torch.bfloat16)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    refused(directory, "o_proj")


# ---- whatever comes ------------------------------------------------------------------------------------------------------


class Victim:
    """directory; content: the good bytes of its shard; start: where their data begins."""

    def __init__(self, directory: Path, content: bytes) -> None:
        self.directory, self.content = directory, content
        self.start = 8 + struct.unpack("<Q", content[:8])[0]


@pytest.fixture(scope="module")
def victims(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    """Storage -> a directory whose only shard the fuzzer rewrites."""
    out = {}
    for storage in ("bf16", "fp8", "int4"):
        directory = tmp_path_factory.mktemp("fuzz") / storage
        shutil.copytree(made(storage, -1, n_routed_experts=4, num_nextn_predict_layers=0), directory)
        put_tensors(directory, tensors_of(directory))  # without padding, so that every byte of the header counts
        content = (directory / FILE).read_bytes()
        out[storage] = Victim(directory, content)
    return out


def survives(directory: Path) -> None:
    for act in (Source.open, load_model, lambda d: load_model(d, dequantize=True), find_shards):
        try:
            act(directory)
        except (CheckpointError, ConfigError) as error:
            assert error.remedy or isinstance(error, ConfigError)


FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@FUZZ
@given(
    storage=st.sampled_from(["bf16", "fp8", "int4"]),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    insert=st.booleans(),
    fix_length=st.booleans(),
)
def test_flipped_and_inserted_bytes(victims, storage, flips, insert, fix_length) -> None:  # type: ignore[no-untyped-def]
    victim = victims[storage]
    directory, content, start = victim.directory, victim.content, victim.start
    damaged = bytearray(content)
    for place, byte in flips:
        at = int(place * (start - 1))
        damaged[at : at + (not insert)] = bytes([byte])
    if insert and fix_length:
        damaged[:8] = struct.pack("<Q", start - 8 + len(flips))
    (directory / FILE).unlink()
    (directory / FILE).write_bytes(damaged)
    survives(directory)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["BF16", "F8_E4M3", "", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=2),
    max_leaves=5,
)


@FUZZ
@given(storage=st.sampled_from(["bf16", "fp8", "int4"]), data=st.data())
def test_entries_with_other_values(victims, storage, data) -> None:  # type: ignore[no-untyped-def]
    """The header stays JSON, and one value in it becomes any other."""
    victim = victims[storage]
    directory, content, start = victim.directory, victim.content, victim.start
    header = json.loads(content[8:start])
    name = data.draw(st.sampled_from(sorted(header)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    value = data.draw(JSON)
    if key is None or name == "__metadata__":
        header[name] = value
    else:
        header[name][key] = value
    (directory / FILE).unlink()
    write_raw(directory / FILE, header, content[start:])
    survives(directory)


@FUZZ
@given(storage=st.sampled_from(["bf16", "fp8", "int4"]), data=st.data())
def test_configs_with_other_values(victims, storage, data) -> None:  # type: ignore[no-untyped-def]
    victim = victims[storage]
    directory, content = victim.directory, victim.content
    config = json.loads((directory / "config.json").read_text())
    try:
        (directory / FILE).unlink()
        (directory / FILE).write_bytes(content)
        changed = dict(config)
        for _ in range(data.draw(st.integers(1, 2))):
            key = data.draw(st.sampled_from(sorted(changed)))
            changed[key] = data.draw(JSON | st.integers(0, 300))
        (directory / "config.json").write_text(json.dumps(changed))
        survives(directory)
    finally:
        (directory / "config.json").write_text(json.dumps(config))
