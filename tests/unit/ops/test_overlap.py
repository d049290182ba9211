"""Kernels that overlap: each begins with its wait, and nothing before it touches what a step writes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from rorqual.ops.triton import overlap

FOLDER = Path(overlap.__file__).parent
WEIGHTS = {"w_uk"}
"""What may be loaded before `begin`: nobody writes it."""


def overlapping_kernels() -> list[tuple[str, ast.FunctionDef]]:
    """Those whose launch takes `**options()`, by file."""
    found = []
    for file in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        kernels = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Subscript):
                continue
            spread = [k.value for k in call.keywords if k.arg is None]
            if any(isinstance(v, ast.Call) and ast.unparse(v.func) == "options" for v in spread):
                assert isinstance(call.func.value, ast.Name), ast.unparse(call.func)
                found.append((file.name, kernels[call.func.value.id]))
    return found


KERNELS = overlapping_kernels()


@pytest.mark.parametrize(("file", "kernel"), KERNELS, ids=[f"{file}:{kernel.name}" for file, kernel in KERNELS])
def test_every_program_waits_before_it_reads_or_writes(file: str, kernel: ast.FunctionDef) -> None:
    at = next(i for i, statement in enumerate(kernel.body) if ast.unparse(statement) == "begin()")
    for statement in kernel.body[:at]:
        assert isinstance(statement, ast.Assign | ast.Expr | ast.AnnAssign), "a branch or a return before the wait"
        for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name.startswith(("tl.", "triton.")) or name.endswith(".to"), f"{name} may read or write"
            assert not name.startswith(("tl.store", "tl.atomic"))
            if name == "tl.load":
                root = call.args[0]
                while isinstance(root, ast.BinOp):
                    root = root.left  # a pointer stands first
                assert isinstance(root, ast.Name) and root.id in WEIGHTS, f"{ast.unparse(root)} may have been written"


def test_the_kernels_of_a_step_are_among_them() -> None:
    names = {kernel.name for _, kernel in KERNELS}
    assert {"_rows_dot_kernel", "_split_kernel", "_values_kernel", "_down_kernel", "_add_norm_kernel"} <= names


def test_no_kernel_begins_that_is_launched_without_the_options() -> None:
    """Only harmless, but then the wait is a lie."""
    launched = {kernel.name for _, kernel in KERNELS}
    for file in FOLDER.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(s) == "begin()" for s in node.body):
                assert node.name in launched, (file.name, node.name)


def test_overlapping_ends_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert overlap.options() == {} and overlap.choices() == (False, True)
    with pytest.raises(KeyError), overlap.overlapping(True):
        assert overlap.options() == {"launch_pdl": True} and overlap.choices() == (True,)
        with overlap.overlapping(False):
            assert overlap.options() == {} and overlap.choices() == (False,)
        raise KeyError
    assert overlap.options() == {} and overlap.choices() == (False, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert overlap.choices() == (False,)
    with overlap.overlapping(True):
        assert overlap.options() == {}, "an older card cannot"


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

card = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(type("Card", (), {"get_current_target": lambda self: card})())
from rorqual.ops.triton.decode import _add_norm_kernel as kernel

signature = {p.name: "*bf16" if p.name in ("x", "y", "weight", "total", "out") else "i32" for p in kernel.params}
signature |= {"eps": "fp32", "BLOCK": "constexpr"}
source = ASTSource(kernel, signature, {([p.name for p in kernel.params].index("BLOCK"),): 512})
code = triton.compile(source, target=card).asm["ptx"]
print(code.index("griddepcontrol.launch_dependents") < code.index("griddepcontrol.wait") < code.index("ld.global"))
"""


def test_the_wait_is_in_the_code_for_hopper_before_the_first_read(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = FOLDER.parents[2]
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILES], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-3000:]
