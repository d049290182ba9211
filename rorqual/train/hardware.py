"""What the machine can do at most, for MFU: a table for known GPUs, a short measurement elsewhere."""

from __future__ import annotations

import time

import torch

from rorqual.ops.cores import physical_cores

# Dense bf16 tensor-core rates of the vendors' datasheets, FLOP/s.
PEAK_BF16 = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s, where the number is from) that MFU is measured against."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAK_BF16.items():
            if key in name:
                return peak, f"dense bf16 datasheet rate of {name}"
    return _measured(device), f"fp32 matrix product measured on this {device.type}"


TRIES, TRY_S = 12, 0.2


def _measured(device: torch.device) -> float:
    """Best of 1024^3 products, at least `TRIES` of them and for at least `TRY_S` seconds: a machine that others use too has
    slow moments, and they last for longer than one product."""
    a = torch.randn(1024, 1024, device=device)
    best, tries, begin = float("inf"), 0, time.perf_counter()
    while tries < TRIES or time.perf_counter() - begin < TRY_S:
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, tries = min(best, time.perf_counter() - start), tries + 1
    return 2 * 1024**3 / best


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on a GPU, the process's resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{physical_cores()} CPU cores, {torch.get_num_threads()} threads"
