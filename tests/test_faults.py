"""The bench that kills and spoils: it finds nothing wrong, and would."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import REPOSITORY

from bench import fault_ranks, faults, small_log


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The log that `bench.faults` makes, made once, by processes as it does."""
    folder = tmp_path_factory.mktemp("log")
    small_log.make_small_log(folder, faults.NUM_ROWS, faults.BUDGET)
    return folder


def run(log, code, *flags):
    """Run code and then `bench.faults` in one process: its exit status and lines."""
    code += "; import bench.faults, shutil\n"
    code += f"def copied(folder, *_): shutil.copytree({str(log)!r}, folder, dirs_exist_ok=True)\n"
    code += "bench.faults.make_small_log = copied; bench.faults.run()"
    command = [sys.executable, "-c", code, "--output-dir", "", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_nothing_is_wrong(log):
    status, lines = run(log, "pass", "--quick")
    assert status == 0 and not [line for line in lines if line.startswith("FAULT")], lines
    table = [line.split() for line in lines]
    assert [words[1] for words in table[1:4]] == ["1", "1", "1"], "kills"
    assert [words[1] for words in table[5:9]] == ["1", "1", "1", "1"], "damages"
    forged = [line for line in lines if line.startswith(("segregated", "processed", "to segreg"))]
    assert len(forged) == 3, "tests/test_forgeries.py forges checkpoints and parts"


def test_a_defect_is_found(log):
    """Checksums that are not compared, and a run that forgets Adagrad's sums."""
    broken = (
        "import slipstream.training.saved as c, slipstream.training.set_files as f;"
        "import slipstream.training.sets as s, slipstream.logs.processed as d;"
        "assert all(hasattr(module, 'check_sums') for module in (c, f, s, d));"
        "c.check_sums = f.check_sums = s.check_sums = d.check_sums = lambda path: None;"
        "c.Saved.load_rows = lambda s, *a, f=c.Saved.load_rows: (f(s, *a)[0], None)"
    )
    # Several, as one may come before the first checkpoint.
    counts = "--kills 9 --rank-kills 0 --damages 1 --forgeries 0 --scenes 0".split()
    status, lines = run(log, broken, *counts)
    assert status == 1
    assert [line for line in lines if line.startswith("FAULT") and "other weights" in line], lines


def test_a_scene_of_ranks(tmp_path):
    """A rank is started, waited for and judged; and one whose end is another is a fault."""
    (tmp_path / "hot_cold").mkdir()
    job = faults.Job(tmp_path, "Slipstream")
    rng = np.random.default_rng(0)
    assert fault_ranks.nobody_listens(job, rng) is None
    run = fault_ranks.RankRun.__new__(fault_ranks.RankRun)
    run.ranks, run.launcher = [7, 8], SimpleNamespace(pid=6)
    said = "fae_train.py: error: rank 1 (process 8) was killed by SIGKILL"
    assert not fault_ranks._wrong_end(job, run, 8, 1, said)
    for victim, status, line in (
        (7, 1, said),
        (8, 2, said),
        (8, 1, said + "\n" + said),
        (6, 1, ""),
    ):
        assert fault_ranks._wrong_end(job, run, victim, status, line), (victim, status)
