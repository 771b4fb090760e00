"""bench/preprocessing.py on a small log: what it measures is there and adds up."""

import json
import subprocess
import sys

import pytest
from helpers import REPOSITORY

from bench import preprocessing
from slipstream.tools.npz import open_npz


def test_a_small_run(tmp_path):
    """In a process of its own: the peaks of those it starts begin at its size, not this one's."""
    flags = ["--rows", "4000", "--repeats", "1", "--work-dir", tmp_path / "work"]
    words = [sys.executable, "-m", "bench.preprocessing", *flags, "--output-dir", tmp_path]
    done = subprocess.run(
        [str(word) for word in words], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("preprocessing_*.json")
    result = json.loads(path.read_bytes())
    assert result["rows"] == {"quarter": 1000, "all": 4000, "quarter, gz": 1000}
    for name, line in result["medians"].items():
        folder = tmp_path / "work" / name.replace(", ", "_")
        assert line["distinct"] == open_npz(folder / "train_processed.npz")["counts"].sum()
        assert 0 < line["segregation_command_rows_per_s"] < line["segregation_rows_per_s"]
        assert 20e6 < line["preprocessing_peak_bytes"] < 1e9
    assert "Criteo Terabyte: 4,373,472,329 rows would take" in done.stdout


def test_the_extrapolation_is_the_larger_logs_speed():
    line = {"preprocessing_rows_per_s": 1000.0, "segregation_rows_per_s": 4000.0}
    medians = {"all": {**line, "distinct": 0}, "quarter": {**line, "distinct": 10}}
    for of_log in medians.values():
        of_log["preprocessing_peak_bytes"] = 10**8
    kaggle, _ = preprocessing.extrapolation(medians)
    assert kaggle["preprocessing_hours"] == pytest.approx(45_840_617 / 1000 / 3600)
    assert kaggle["segregation_hours"] == pytest.approx(45_840_617 / 4000 / 3600)
    with pytest.raises(SystemExit):
        preprocessing.parse_args(["--rows", "5"])
