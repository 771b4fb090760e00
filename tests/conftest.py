import os
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))
# One thread: tests compare whole runs, and several of them may share the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("SLIPSTREAM_TRACEBACK", None)


@pytest.fixture
def processed(tmp_path):
    """A small processed file with skewed ids and labels that can be learned."""
    from helpers import write_processed

    return write_processed(tmp_path / "small_processed.npz")


@pytest.fixture
def segregated(processed):
    """The small file's folder with about half of the inputs hot."""
    from helpers import segregate_small

    return segregate_small(processed)


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=1, help="times as many spoiled files in test_raw_logs.py"
    )


def pytest_configure(config):
    os.environ["SLIPSTREAM_FUZZ"] = str(config.getoption("--fuzz"))


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker waits for another at the end."""
    long = ("test_readme", "test_figures", "test_throughput", "test_faults", "test_wrappers")
    items.sort(key=lambda item: not item.path.stem.startswith(long))
