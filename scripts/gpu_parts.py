"""What `gpu_records.py` runs: for each part its command line, how long it should take, and the record that it replaces."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from rorqual.config import DEFAULT_MODEL


@dataclass(frozen=True)
class Part:
    """seconds: expected on an H200, start and compilers included. command: `rorqual …` (gets --json with the record) or
    `python …`, where {out} is the folder of the records and {json} the record's path. lane: "alone" is timed and shares its
    GPU with nobody, "beside" is not, "cpu" needs no GPU, "all" wants every one. after: a part that must be done before.
    least: seconds in which something gets done that need not be done again (0: all of them)."""

    name: str
    group: Literal["engine", "training", "tests"]
    seconds: int
    command: str
    record: str = ""
    lane: Literal["alone", "beside", "cpu", "all"] = "alone"
    after: str = ""
    least: int = 0


def _timed(group: Literal["engine", "training"], name: str, seconds: int, command: str) -> Part:
    return Part(name, group, seconds, f"rorqual bench {command} --device cuda", f"gpu-{name}.json")


def _large(context: int, dtype: str, seconds: int) -> Part:
    """v3-16b's random weights at batch 1, alone: transformers would need minutes."""
    kind = "" if dtype == "bfloat16" else f"-{dtype}"
    new = 64 if context > 4096 else 128
    return _timed(
        "engine", f"v3-16b-{context}{kind}", seconds,
        f"decode --model v3-16b --prompt {context} --new {new} --dtype {dtype} --no-peer --rounds 3 --overlap",
    )  # fmt: skip


def _test(
    file: str, seconds: int, options: str = "", name: str = "", lane: Literal["alone", "beside", "all"] = "beside"
) -> Part:
    return Part(
        name or file.removesuffix(".py").replace("_", "-"), "tests", seconds,
        f"python -m pytest -q -p no:cacheprovider tests/gpu/{file} {options}".strip(), "", lane,
    )  # fmt: skip


DECODE = "decode --model bench-gpu --prompt 512 --new 128 --rounds 3 --deterministic --overlap"

PREFILL = "prefill --model bench-gpu --batch 16 --prompt 2048 --rounds 3"

PARITY = "python runs/fp8-parity/compare.py"

RECORDS = [  # in the order of what is least known
    _timed("engine", "decode-1", 75, f"{DECODE} --batch 1"),
    _timed("engine", "decode-32", 75, f"{DECODE} --batch 32"),
    _timed("engine", "serve", 75, "serve --model bench-gpu --seconds 50 --prompt-graphs"),
    _timed(
        "training", "train-v3-16b", 55,
        "train --model v3-16b --num-layers 4 --batch 4 --seq-len 4096 --precision bf16 --precision fp8 --no-peer --rounds 4",
    ),
    _timed("training", "train-products", 40, "train --products v3-16b --batch 4 --seq-len 4096"),
    _timed("engine", "prefill", 60, f"{PREFILL} --prompt-graphs --deterministic"),
    _timed("engine", "layers", 40, "layer --model deepseek-v3 --no-peer"),
    _large(4096, "bfloat16", 30),
    _large(4096, "fp8", 30),
    _large(4096, "int4", 35),
    _large(1024, "bfloat16", 30),
    _large(32000, "bfloat16", 35),
    _large(1024, "fp8", 30),
    _large(32000, "fp8", 35),
    _timed("engine", "mtp", 35, "mtp --dtype auto"),
    _timed("training", "train-layers", 50, "train --layers deepseek-v3 --batch 2 --seq-len 4096"),
    _timed("engine", "profile-1", 20, "profile --kind decode --model bench-gpu --batch 1"),
    _timed("engine", "profile-32", 20, "profile --kind decode --model bench-gpu --batch 32"),
    _timed("engine", "profile-prefill", 20, "profile --kind prefill --model bench-gpu --batch 8 --prompt 2048"),
    _timed("engine", "attention", 12, "attention"),
    _timed("training", "train", 105, "train --model bench-gpu --batch 8 --seq-len 2048 --rounds 5"),
    _timed(
        "training", "train-fp8", 25,
        "train --model bench-gpu --batch 8 --seq-len 2048 --rounds 5 --precision bf16 --precision fp8 --no-peer",
    ),
    Part("parity-data", "training", 120, f"{PARITY} --python --out {{out}}/parity", lane="cpu"),
    Part(
        "parity", "training", 430, f"{PARITY} --out {{out}}/parity --json {{json}}", "fp8-parity.json", "beside",
        after="parity-data", least=170,
    ),
    Part(
        "soak", "engine", 260,
        "rorqual bench soak --model bench-gpu --device cuda --minutes 30 --rate 2 --step-ms 80 --cache-tokens 4096",
        "gpu-soak.json", "beside",
    ),
    Part(
        "soak-bundled", "engine", 90, f"rorqual bench soak --model {DEFAULT_MODEL} --device cuda --minutes 5",
        "gpu-soak-bundled.json", "beside",
    ),
]  # fmt: skip

FULL = "test_the_measured_cache_leaves_room_for_the_largest_steps"
"""Takes all of a GPU's memory but a little, so nothing may run beside it."""

TESTS = [
    _test("test_decoding.py", 45, f"-k {FULL}", name="test-memory", lane="alone"),
    _test("test_decoding.py", 200, f"-k 'not {FULL}'"),
    _test("test_mla.py", 80),
    _test("test_experts.py", 62),
    _test("test_fixed.py", 56),
    _test("test_bundled.py", 60),
    _test("test_cuda.py", 60),
    _test("test_training.py", 40),
    _test("test_fp8_training.py", 36),
    _test("test_replicas.py", 90, lane="all"),
]

PARTS: list[Part] = [*RECORDS, *TESTS]

SMALL = {
    "--device": "cpu", "--batch": "2", "--prompt": "24", "--new": "4", "--rounds": "1", "--seq-len": "16",
    "--num-layers": "1", "--layers": "test", "--products": "test", "--minutes": "0.03",
}  # fmt: skip
ADDED = {
    "serve": "--requests 3", "mtp": "--prompts 1 --new 4", "soak-bundled": "--threads 1",
    "attention": "--heads 16 --batch 2 --context 64", "layers": "--tokens 4 --batch 2 --context 64",
    "profile-1": "--steps 2", "profile-32": "--steps 2", "profile-prefill": "--steps 2",
    "parity-data": "--characters 4000000 --vocab 512",
    "parity": "--set model=nano --set steps=2 --set eval_every=1 --set eval_rows=2 --set optim.warmup_steps=1 "
              "--set data.seq_len=16",
}  # fmt: skip


def miniature(part: Part) -> list[str]:
    """The words of the same command line with everything small, for a CPU: the models' shapes are those of `test`, FP8
    weights are int8, int4 as it is. A GPU's tests skip themselves there, no kernels overlap and no prompt is captured."""
    words = [word for word in shlex.split(part.command) if word not in ("--overlap", "--prompt-graphs")]
    for i, word in enumerate(words[:-1]):
        if word in SMALL:
            words[i + 1] = SMALL[word]
        if word == "--model" and words[i + 1] != DEFAULT_MODEL:
            words[i + 1] = "test"
        if word == "--dtype" and words[i + 1] == "fp8":
            words[i + 1] = "int8"
    return [*words, *shlex.split(ADDED.get(part.name, ""))]
