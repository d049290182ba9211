"""The teacher's decoding attention (`runs/nano/teacher.py`), Triton against torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("nano_teacher", ROOT / "runs" / "nano" / "teacher.py")
assert spec is not None and spec.loader is not None
teacher = importlib.util.module_from_spec(spec)
sys.modules["nano_teacher"] = teacher
pytest.importorskip("triton")
spec.loader.exec_module(teacher)


@pytest.mark.parametrize("together", [True, False])
def test_attention_reads_the_keys_up_to_its_position(together: bool) -> None:
    """Rows in lockstep share one position, a view of a single number; rows of other runs have their own."""
    q, k, v = torch.randn(5, 9, 64), torch.randn(5, 3, 80, 64), torch.randn(5, 3, 80, 64)
    pos = torch.tensor([70]).expand(5) if together else torch.tensor([0, 1, 63, 64, 79])
    torch.testing.assert_close(teacher.attend_triton(q, k, v, pos), teacher.attend_torch(q, k, v, pos))
