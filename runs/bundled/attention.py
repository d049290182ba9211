"""Which of PyTorch's attentions trains this model fastest here, and a way to run a command with it.

    python runs/bundled/attention.py choose            # prints its name, after comparing gradients with the plain one
    python runs/bundled/attention.py with cudnn distill runs/bundled/heal.toml

Keys are twice as wide as values, which flash attention does not take; PyTorch then prefers what need not be the fastest.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def gradients(shape: tuple[int, int, int], dtype: torch.dtype, backend: SDPBackend) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, w, device="cuda").to(dtype).requires_grad_() for w in (128, 128, 64))
    with sdpa_kernel([backend]):
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=128**-0.5).square().sum().backward()
    return [t.grad for t in (q, k, v) if t.grad is not None]


def seconds(backend: SDPBackend) -> float:
    small, plain = (
        gradients((2, 3, 256), t, b) for t, b in ((torch.bfloat16, backend), (torch.float32, SDPBackend.MATH))
    )
    for ours, wanted in zip(small, plain, strict=True):
        if not (ours.float() - wanted).norm() < 0.03 * wanted.norm():
            raise RuntimeError("gradients differ from the plain attention's")
    gradients((32, 9, 1024), torch.bfloat16, backend)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(8):
        gradients((32, 9, 1024), torch.bfloat16, backend)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 8


def choose() -> str:
    best, chosen = float("inf"), "default"
    for name, backend in NAMES.items():
        try:
            took = seconds(backend)
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
            continue
        print(f"{name}: {1e3 * took:.2f} ms forward and backward, random inputs included", file=sys.stderr)
        if took < best:
            best, chosen = took, name
    return chosen


def main() -> None:
    if sys.argv[1] == "choose":
        print(choose())
        return
    name = sys.argv[2]
    from rorqual.cli.main import main as run

    sys.argv[1:] = sys.argv[3:]
    order = [SDPBackend.FLASH_ATTENTION, *([NAMES[name]] if name in NAMES else []), *NAMES.values(), SDPBackend.MATH]
    with sdpa_kernel(list(dict.fromkeys(order)), set_priority=True):
        run()


if __name__ == "__main__":
    main()
