"""Compiling `kernels.cpp` and `training.cpp` for the machine at hand, once, and calling it.

The library is built with the system's C++ compiler at installation (`python -m rorqual.ops.native`, part of `make
setup`) or when it is first needed, for the very instruction set of this processor, and kept in the user's cache under a
name made of source, compiler and processor, so that a changed one is never used by mistake. Without a compiler
`library()` raises BackendUnavailable, and the engine computes with torch instead.

C++ was chosen by measurement (docs/log.md): torch.compile over the whole decoding step of the torch model, one graph and
static shapes, reaches 0.3 of its tokens a second and takes 55 s to compile where this takes eight; numba's products read
fp32 weights at half its rate and int8 weights at a nineteenth, since it has no byte products.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rorqual.errors import BackendUnavailable

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
SOURCES = (HERE / "kernels.cpp", HERE / "training.cpp")
PANEL = 16
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")

c_int, c_long, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", pointer), ("scales", pointer), ("data_stride", c_long), ("scale_stride", c_long),
        ("kind", c_int), ("out", c_int), ("in_", c_int), ("count", c_int),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    NORMS = ("input_norm", "post_norm", "q_a_norm", "kv_a_norm", "bias")
    MATRICES = ("q_a", "q_b", "kv_a", "uk", "uv", "o", "router", "gate_up", "down", "shared_gate_up", "shared_down")
    _fields_ = [
        *((name, pointer) for name in NORMS), *((name, Matrix) for name in MATRICES), ("eps", ctypes.c_float)
    ]  # fmt: skip


class Model(ctypes.Structure):
    SIZES = ("n_layers", "D", "H", "C", "N", "R", "U", "E", "K", "n_group", "topk_group", "normalise")
    _fields_ = [
        ("layers", pointer), ("norm", pointer), ("cos", pointer), ("sin", pointer), ("embedding", pointer),
        *((name, c_int) for name in SIZES),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float), ("routed_scale", ctypes.c_float),
        ("embedding_kind", c_int),
    ]  # fmt: skip


class Wish(ctypes.Structure):
    _fields_ = [
        ("mask", pointer), ("top_p", ctypes.c_double), ("min_p", ctypes.c_double), ("u", ctypes.c_double),
        ("temperature", ctypes.c_float), ("top_k", c_int),
    ]  # fmt: skip


class Tokens(ctypes.Structure):
    _fields_ = [
        ("id", pointer), ("position", pointer), ("row", pointer), ("slot", pointer), ("pages", pointer),
        ("n", c_int), ("width", c_int),
    ]  # fmt: skip


class Heads(ctypes.Structure):
    _fields_ = [("x", pointer), ("batch", c_long), ("head", c_long), ("token", c_long)]


class Attention(ctypes.Structure):
    HEADS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    _fields_ = [
        *((name, Heads) for name in HEADS), ("lse", pointer), ("visible", pointer),
        *((name, c_int) for name in ("B", "H", "T", "X", "U")), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Update(ctypes.Structure):
    NUMBERS = ("factor", "rate", "keep", "take1", "beta2", "take2", "eps", "correction")
    _fields_ = [
        *((name, pointer) for name in ("weight", "grad", "m", "v", "copy")), ("narrow", c_int),
        *((name, ctypes.c_float) for name in NUMBERS),
    ]  # fmt: skip


def compiler() -> list[str] | None:
    """$CXX, or the first C++ compiler that is installed."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if name and shutil.which(name.split()[0]):
            return name.split()
    return None


def library_file() -> Path:
    """Where the library for this source, compiler and processor belongs. Raises BackendUnavailable without a compiler."""
    command = compiler()
    if command is None:
        raise BackendUnavailable(
            "no C++ compiler is installed, so the CPU kernels cannot be built",
            remedy="install g++ or clang++ (or set CXX), then start again",
        )
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [file.read_text(encoding="utf-8") for file in (HERE / "common.h", *SOURCES)]
    told = "\0".join((*texts, *FLAGS, *command, version, _processor()))
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "rorqual" / f"kernels-{hashlib.blake2b(told.encode(), digest_size=12).hexdigest()}.so"


def build() -> Path:
    """The compiled library. Two processes that build at once each write their own file and rename it."""
    file, command = library_file(), compiler()
    if file.is_file():
        return file
    assert command is not None
    log.info("compiling the CPU kernels with %s", command[0])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=file.parent)
    except OSError:  # a read-only home: built anew by each process
        handle, temporary = tempfile.mkstemp(suffix=".so")
        file = Path(temporary)
    os.close(handle)
    sources = [str(file) for file in SOURCES]
    done = subprocess.run([*command, *FLAGS, *sources, "-o", temporary], capture_output=True, text=True, check=False)
    if done.returncode:
        Path(temporary).unlink()
        raise BackendUnavailable(
            f"{command[0]} could not compile the CPU kernels: {done.stderr.strip()[-500:]}",
            remedy="set CXX to another compiler (g++ 9 or clang++ 10 and newer are known to work)",
        )
    Path(temporary).replace(file)
    return file


@cache
def library() -> ctypes.CDLL:
    """The loaded library, with argument types. Raises BackendUnavailable."""
    try:
        lib = ctypes.CDLL(str(build()))
    except OSError as error:
        raise BackendUnavailable(f"the CPU kernels cannot be loaded: {error}") from error
    lib.rq_open.restype = pointer
    lib.rq_open.argtypes = [c_int]
    lib.rq_close.argtypes = [pointer]
    lib.rq_linear.argtypes = [pointer, ctypes.POINTER(Matrix), c_int, pointer, c_long, c_int, pointer, c_long]
    lib.rq_forward.argtypes = [
        pointer, ctypes.POINTER(Model), ctypes.POINTER(Tokens), pointer, c_int, pointer, c_long, pointer, pointer,
    ]  # fmt: skip
    lib.rq_mtp.argtypes = [
        pointer, ctypes.POINTER(Model), ctypes.POINTER(Layer), ctypes.POINTER(Matrix), *[pointer] * 3,
        ctypes.POINTER(Tokens), pointer, c_int, *[pointer] * 3,
    ]  # fmt: skip
    lib.rq_read.argtypes = [pointer, pointer, c_long]
    lib.rq_read.restype = ctypes.c_float
    lib.rq_pool_open.restype = pointer
    lib.rq_pool_open.argtypes = [c_int]
    lib.rq_pool_close.argtypes = [pointer]
    lib.rq_attend.argtypes = [pointer, ctypes.POINTER(Attention), c_int]
    lib.rq_swiglu.argtypes = [pointer] * 3 + [c_long, c_int, c_long, pointer]
    lib.rq_swiglu_backward.argtypes = [*[pointer] * 3, c_long, c_int, c_long, *[pointer] * 4, c_long, pointer]
    lib.rq_gather.argtypes = [*[pointer] * 4, c_int, c_int, c_long, pointer]
    lib.rq_norm.argtypes = [*[pointer] * 3, ctypes.c_float, c_int, c_long, *[pointer] * 2]
    lib.rq_norm_backward.argtypes = [*[pointer] * 5, c_int, c_long, *[pointer] * 2]
    lib.rq_loss.argtypes = [pointer, pointer, c_long, c_int, c_int, pointer, pointer, pointer]
    lib.rq_adamw.argtypes = [pointer, ctypes.POINTER(Update), c_long]
    lib.rq_draw.argtypes = [pointer, pointer, c_long, c_int, c_int, pointer, pointer]
    structures = (Matrix, Layer, Model, Tokens, Wish)
    told = (ctypes.c_int32 * len(structures))()
    lib.rq_sizes(told)
    assert list(told) == [ctypes.sizeof(s) for s in structures], "structures differ"
    lib.rq_training_sizes(told)
    assert told[:2] == [ctypes.sizeof(Attention), ctypes.sizeof(Update)], "structures differ"
    return lib


def _processor() -> str:
    """What -march=native depends on: the flags where Linux tells them, else the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.machine() + platform.processor()
