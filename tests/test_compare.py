import math

import pytest
from helpers import MODEL_FLAGS, segregate_small, write_processed

from bench import compare


def summaries(*values):
    return [dict.fromkeys(compare.FIGURES, 1.0) | {"auc": value} for value in values]


def test_differences_are_paired_and_ties_lie_within_their_spread():
    first = summaries(0.70, 0.72, 0.74)
    better = summaries(0.71, 0.73, 0.75)  # by 0.01 with every seed: no tie, whatever the seeds
    noisy = summaries(0.69, 0.73, 0.745)
    rows = compare.tabulate({"a": first, "b": better, "c": noisy})
    assert [row["tie"] for row in rows] == [True, False, True]
    assert rows[1]["auc_difference"] == pytest.approx(0.01)
    assert rows[1]["auc"] == pytest.approx(0.73) and rows[1]["auc_sd"] == pytest.approx(0.02)
    assert math.isnan(compare.tabulate({"a": summaries(0.7)})[0]["auc_sd"])


def test_runs_are_reused_only_for_the_same_data_and_flags(tmp_path, capsys):
    def run(processed, *flags):
        folder = segregate_small(processed)
        common = ["--processed-data-file", str(processed), "--segregated-data-dir", str(folder)]
        common += [
            "--runs-dir",
            str(tmp_path / "runs"),
            "--num-seeds",
            "1",
            "--methods",
            "baseline",
        ]
        return compare.main([*common, *MODEL_FLAGS, "--num-batches", "20", *flags])

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = write_processed(tmp_path / "a/p.npz", 700)
    table = run(first)
    written = (tmp_path / "runs/baseline-seed1/log.jsonl").stat().st_mtime_ns
    assert run(first)[0]["auc"] == table[0]["auc"]
    assert (tmp_path / "runs/baseline-seed1/log.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        run(write_processed(tmp_path / "b/p.npz", 700, seed=1))
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        run(first, "--learning-rate", "0.01")
