"""The bench that kills and spoils: it finds nothing wrong, and would."""

import subprocess
import sys

from helpers import REPOSITORY


def run(code, *flags):
    """Run code and then `bench.faults` in one process: its exit status and lines."""
    code += "; import bench.faults; bench.faults.run()"
    command = [sys.executable, "-c", code, "--output-dir", "", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_nothing_is_wrong():
    status, lines = run("pass", "--quick")
    assert status == 0 and not [line for line in lines if line.startswith("FAULT")], lines
    table = [line.split() for line in lines]
    assert [words[1] for words in table[1:4]] == ["1", "1", "1"], "kills"
    assert [words[1] for words in table[5:9]] == ["1", "1", "1", "1"], "damages"
    forged = [line for line in lines if line.startswith(("segregated", "processed", "to segreg"))]
    assert len(forged) == 3, "tests/test_forgeries.py forges checkpoints and parts"


def test_a_defect_is_found():
    """Checksums that are not compared, and a run that forgets Adagrad's sums."""
    broken = (
        "import slipstream.training.checkpoint as c, slipstream.tools.npz as n;"
        "import slipstream.training.sets as s, slipstream.logs.processed as d;"
        "c.check_sums = d.check_sums = s.check_sums = lambda path: None;"
        "c.Saved.load_rows = lambda s, *a, f=c.Saved.load_rows: (f(s, *a)[0], None)"
    )
    status, lines = run(
        broken, "--kills", "1", "--damages", "1", "--forgeries", "0", "--scenes", "0"
    )
    assert status == 1
    assert [line for line in lines if line.startswith("FAULT") and "other weights" in line], lines
