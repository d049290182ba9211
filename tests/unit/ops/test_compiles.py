"""Every kernel compiles for Hopper and fits it: what Triton's interpreter, on which the other tests run them, cannot tell.

No GPU is needed: the compiler and ptxas come with Triton. `compile_kernels.py` has a case for each kernel.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "rorqual" / "ops" / "triton"
SCRIPT = Path(__file__).with_name("compile_kernels.py")
SHARED_MEMORY = 232_448
"""Bytes of it that a program may have on Hopper."""
PROCESSES = 2

TREES = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.py"))}


def jitted() -> dict[str, ast.FunctionDef]:
    """By "file:name"."""
    return {
        f"{file}:{node.name}": node
        for file, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).split("(")[0].endswith(".jit") for decorator in node.decorator_list)
    }


def launched() -> set[str]:
    """`name[grid](...)`, or `file.name[grid](...)`."""
    known, names = jitted(), set()
    for file, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                *where, name = ast.unparse(call.func.value).rsplit(".", 1)
                names.add(f"{where[0]}.py:{name}" if where else f"{file}:{name}")
    return names & known.keys()


def test_every_jitted_function_is_launched_or_called_by_another() -> None:
    """No launch hides from `launched` behind another name."""
    called = {name.id for node in jitted().values() for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert not {name for name in jitted().keys() - launched() if name.split(":")[1] not in called}


def test_a_helper_returns_once_or_as_a_constant_decides() -> None:
    """Triton 3.6 compiles nothing else and 3.8 does, so the other test sees it with the older one alone."""
    for name in jitted().keys() - launched():
        helper = jitted()[name]
        annotated = [*helper.args.args, *(node for node in ast.walk(helper) if isinstance(node, ast.AnnAssign))]
        constants = {
            node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            for node in annotated
            if node.annotation is not None and ast.unparse(node.annotation).endswith(".constexpr")
        }
        for branch in ast.walk(helper):
            if isinstance(branch, ast.If | ast.For | ast.While) and any(
                isinstance(node, ast.Return) for node in ast.walk(branch)
            ):
                assert isinstance(branch, ast.If), f"{name} returns from a loop"
                names = {node.id for node in ast.walk(branch.test) if isinstance(node, ast.Name)}
                assert names <= constants, f"{name} returns where {ast.unparse(branch.test)}"


def test_every_kernel_compiles_for_hopper_and_fits_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(i), str(PROCESSES)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"{i}.txt").open("w"),
            text=True,
        )
        for i in range(PROCESSES)
    ]
    printed = [process.communicate()[0] for process in running]
    compiled, faults = [], {}
    for i, (process, out) in enumerate(zip(running, printed, strict=True)):
        told = (tmp_path / f"{i}.txt").read_text()
        by_launch = told.split("compiling ")[1:]
        assert process.returncode == 0, f"exit {process.returncode} after {by_launch[-1:]}:\n{told[-1000:]}"
        for one, said in zip(json.loads(out.splitlines()[-1]), by_launch, strict=True):
            compiled.append(one)
            what = f"{one['kernel']} of {one['constants']}"
            if "error" in one:
                why = "\n".join([one["error"], *(line for line in said.splitlines() if ": error: " in line)])
                faults.setdefault(one["kernel"], f"{what} does not compile:\n{why}")
            elif one["shared"] > SHARED_MEMORY:
                faults.setdefault(one["kernel"], f"{what} needs {one['shared']} bytes of shared memory")
            elif one["spilled"]:
                print(f"{what} spills {one['spilled']} bytes of registers")  # no fault: pytest -rP shows it
    assert not faults, "\n\n".join(faults.values())
    assert not any(one["constants"].get("ROUND") for one in compiled), "that was the interpreter's variant"
    tried = {one["kernel"] for one in compiled}
    assert tried == launched(), "a kernel without a case in compile_kernels.py, or a case without a kernel"
