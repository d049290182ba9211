"""One torch thread a process: the tests' models are tiny, and on a shared machine a second thread only waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the tests of a GPU do without
    pass
else:
    # How long an example takes, or drawing it, says how busy the machine is, and nothing of what is tested.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
    settings.load_profile("untimed")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the subprocesses that tests start
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, line by line


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often the test of killed training kills (make soak: 50)")
    parser.addoption("--database", help="an empty database for the tests of conversations, instead of SQLite")
    parser.addoption("--chat-kills", type=int, default=2, help="how often a chat server is killed (make soak: 100)")
    parser.addoption("--examples", type=int, default=8, help="requests a route that fuzzing makes (make soak: 2000)")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands keep their data in a folder of the tests', not in the home of whoever runs them."""
    os.environ["RORQUAL_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))
