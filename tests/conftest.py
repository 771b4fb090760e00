import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))
# One thread: tests compare whole runs, and several of them may share the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("SLIPSTREAM_TRACEBACK", None)
# A shell lets its background jobs ignore Ctrl-C, which tests send, to their processes, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# On a busy machine an example may take any time.
hypothesis.settings.register_profile(
    "any time",
    hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any time")


def keep_files_in_memory():
    """Let tests write to memory where it has room: deleting from a disk takes milliseconds a file.

    TMPDIR or --basetemp names another place. Files stay there, these are deleted at the end, or by
    the next run where this one is killed.
    """
    from slipstream.tools.runtime import available_memory_bytes

    memory = Path("/dev/shm")
    if "TMPDIR" in os.environ or not memory.is_dir():
        return
    if min(shutil.disk_usage(memory).free, available_memory_bytes()) < 8e9:
        return
    for old in memory.glob("slipstream-tests-*"):
        if not Path("/proc", old.name.rpartition("-")[2]).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = memory / f"slipstream-tests-{os.getpid()}"
    folder.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)  # also of xdist's workers
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


keep_files_in_memory()


@pytest.fixture
def disk_path():
    """A folder on a disk, for a test of which pages of a file are in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="slipstream-tests-") as folder:
        yield Path(folder)


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


@pytest.fixture
def runs_here(monkeypatch):
    """What the benchmarks start as processes of their own runs in this one.

    That they start is tested by `test_readme`, which runs their commands, and by `test_faults`.
    """
    from types import SimpleNamespace

    from helpers import run_here

    from bench import run_records, small_log

    for module in (run_records, small_log):
        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_here))


def pytest_addoption(parser):
    parser.addoption(
        "--fuzz", type=int, default=1, help="times as many spoiled files in test_raw_logs.py"
    )


def pytest_configure(config):
    os.environ["SLIPSTREAM_FUZZ"] = str(config.getoption("--fuzz"))


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker waits for another at the end, or makes anew what
    tests that it takes over share: the launches of test_ranks.
    """
    long = (
        "test_ranks",
        "test_readme",
        "test_figures",
        "test_throughput",
        "test_faults",
        "test_wrappers",
        "test_time_to_auc",
    )
    items.sort(key=lambda item: not item.path.stem.startswith(long))
