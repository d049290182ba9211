"""What `rorqual bench ready` measures: how soon the CPU engine can serve, and how much memory it holds, in a process of its
own, both beyond what `import torch` costs.

Resident memory counts every page the process has, shared libraries included; what torch's import holds is taken off. The
cache is as large as the text needs (1,024 tokens). Freed memory that the C library keeps counts: people see it in `top`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

_CHILD = """
import json, sys, time
import torch
def held():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))
torch.zeros(4) @ torch.zeros(4)
base, begin = held(), time.perf_counter()
from rorqual.engine.api import Request, SamplingParams
from rorqual.engine.load import load_core
from rorqual.engine.native_runner import NativeRunner
from rorqual.engine.settings import EngineSettings
core = load_core(EngineSettings(sys.argv[1], sys.argv[2], "cpu", kernels="native", max_num_seqs=1, cache_tokens=1024))
runner = core.runner
assert isinstance(runner, NativeRunner)
told = {"seconds": time.perf_counter() - begin, "weights": runner.model.packed_bytes, "cache": runner.latents.nbytes}
told["loaded"] = held() - base
prompt = tuple(2 + i % (core.info.vocab_size - 2) for i in range(512))
core.add(Request("one", prompt, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)))
while core.busy:
    core.step()
told["used"] = held() - base
print(json.dumps(told))
"""


def measure(model: Path, dtype: str, rounds: int) -> dict[str, Any]:
    """A row: medians of `rounds` processes, in seconds and MB (10^6), and memory by packed weights and cache."""
    command = [sys.executable, "-c", _CHILD, str(model), dtype]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(rounds)
    ]

    def middle(name: str) -> float:
        return statistics.median(run[name] for run in runs)

    needed = middle("weights") + middle("cache")
    return {
        "dtype": dtype, "ready s": middle("seconds"), "weights MB": middle("weights") / 1e6,
        "cache MB": middle("cache") / 1e6, "loaded MB": middle("loaded") / 1e6, "after 612 tokens MB": middle("used") / 1e6,
        "loaded / needed": middle("loaded") / needed, "used / needed": middle("used") / needed,
    }  # fmt: skip
