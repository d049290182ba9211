"""Attention over pages for many heads: its Python in a machine of the test's own, and its compilation for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rorqual.ops.attention import PAGES_BOUND, attend_pages
from tests.unit.ops.gluon_machine import Machine
from tests.unit.ops.test_mla_kernel import STALE, agree, case

pytest.importorskip("triton.experimental.gluon")
from rorqual.ops.triton import mla_wide

ROOT = Path(__file__).resolve().parents[3]
SHARED_MEMORY = 232_448
"""Bytes of it that a program may have on Hopper."""


@pytest.mark.parametrize("late", [False, True], ids=["at once", "when waited for"])
@pytest.mark.parametrize(
    ("H", "page", "split", "lengths"),
    [(8, 16, 64, [70, 0, 1, 15, 16, 17, 31, 33, 64, 65, 300]), (16, 32, 1 << 20, [0, 5, 47, 16]), (8, 16, 48, [200])],
)
def test_its_steps_equal_the_reference(
    H: int, page: int, split: int, lengths: list[int], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    C, R, heads = 32, 16, 8
    q, pages, table, lens = case(H, C, R, lengths, torch.float16, page=page)
    pages = pages.masked_fill(pages == STALE, float("nan"))  # a product with zero would not hide it
    machine, width = Machine(late), table.shape[1]
    for name, value in machine.names("async_copy").items():
        monkeypatch.setattr(mla_wide, name, value)
    for helper in ("_copy", "_scores", "_arrived"):
        monkeypatch.setattr(mla_wide, helper, getattr(mla_wide, helper).fn)
    splits, scale = -(-width * page // split), (C + R) ** -0.5
    direct = splits == 1
    part = torch.full((len(lengths), H, splits, C), float("nan"))
    lse = torch.full((len(lengths), H, splits), float("-inf"))
    machine.launch(
        mla_wide.kernel.fn, (len(lengths) * H // heads, min(splits, 2)), q, pages, table, lens, part,
        None if direct else lse, scale / torch.log(torch.tensor(2.0)).item(), width, width, splits,
        H=H, C=C, R=R, PAGE=page, SPLIT=split, KEYS=16, BLOCK_H=heads, DIRECT=direct,
    )  # fmt: skip
    share = torch.ones_like(lse) if direct else torch.exp2(lse - lse.amax(2, keepdim=True)).nan_to_num()
    got = (part.nan_to_num() * (share / share.sum(2, keepdim=True).clamp(min=1e-9))[..., None]).sum(2)
    want = attend_pages(q.float(), pages.float(), table, lens, C, scale, "reference")
    assert (got - want).norm() <= PAGES_BOUND[torch.float16] * want.norm()
    agree(got.half(), want, torch.float16)
    assert not got[lens == 0].any()


COMPILES = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from rorqual.ops.triton.mla_wide import HEADS, KEYS, WARPS, kernel

found = []
for direct in (False, True):
    constants = {"H": 128, "C": 512, "R": 64, "PAGE": 64, "SPLIT": 8192, "KEYS": KEYS, "BLOCK_H": HEADS, "DIRECT": direct}
    types = {"q": "*bf16", "pages": "*bf16", "table": "*i64", "lengths": "*i32", "out": "*bf16" if direct else "*fp32",
             "lse": "*fp32", "scale_log2": "fp32", "table_stride": "i32", "width": "i32", "splits": "i32"}
    if direct:
        constants["lse"] = None
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = GluonASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    found.append({"shared": built.metadata.shared, "code": built.asm["ptx"]})
print(json.dumps(found))
"""


def test_it_compiles_for_hopper_and_fits_it() -> None:
    """Without a GPU: the compiler and ptxas come with Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for built in json.loads(done.stdout.splitlines()[-1]):
        assert built["shared"] <= SHARED_MEMORY
        for shape in ("m64n256k16", "m64n32k16"):
            assert f"wgmma.mma_async.sync.aligned.{shape}.f32.bf16.bf16" in built["code"], "not on the tensor cores"
        assert "cp.async.cg.shared.global [ %r" in built["code"], "not copied 16 bytes at a time"
