import math

import pytest
from helpers import MODEL_FLAGS, segregate_small, write_processed

from bench import compare


def runs_of(*values):
    return [dict.fromkeys(compare.METRICS, 1.0) | {"auc": value} for value in values]


def test_differences_are_paired_and_ties_lie_within_their_spread():
    first = runs_of(0.70, 0.72, 0.74)
    better = runs_of(0.71, 0.73, 0.75)  # by 0.01 with every seed: no tie, whatever the seeds
    noisy = runs_of(0.69, 0.73, 0.745)
    rows = compare.tabulate({("a", ""): first, ("b", "x"): better, ("b", "y"): noisy})
    rows = [row for row in rows if row["metric"] == "auc"]
    assert [(row["method"], row["setting"]) for row in rows] == [("a", ""), ("b", "x"), ("b", "y")]
    assert [row["tie"] for row in rows] == [True, False, True]
    assert rows[1]["difference"] == pytest.approx(0.01)
    assert rows[1]["mean"] == pytest.approx(0.73) and rows[1]["sd"] == pytest.approx(0.02)
    lines = compare.markdown(compare.tabulate({("a", ""): first, ("b", "y"): noisy})).splitlines()
    assert lines[2] == "| a | 0.7200 ± 0.0200 |  | 1.0000 | 1 | 1.0 |"
    assert lines[3].startswith("| b y | 0.7217 ± 0.0284 | +0.0017 ± 0.0") and "(tie)" in lines[3]
    [alone] = [row for row in compare.tabulate({("a", ""): runs_of(0.7)}) if row["metric"] == "auc"]
    assert math.isnan(alone["sd"]) and not alone["tie"]


def records(*aucs, samples=100, seconds=1.0, **more):
    """A log of one evaluation every `samples` inputs and `seconds` of training."""
    times = {"snapshot_s": 0.0, "threshold_s": 0.0}
    curve = [
        {"kind": "evaluation", "auc": auc, "samples": samples * n, "training_s": seconds * n}
        | {"normalized_entropy": 0.9, **times}
        for n, auc in enumerate(aucs, start=1)
    ]
    summary = {**curve[-1], "kind": "summary", "log_loss": 0.5, "dropped_share": 0.1, **more}
    return [*curve, summary]


def test_metrics_are_read_off_the_curves():
    first = records(0.6, 0.7, 0.74, 0.75)
    found = compare.metrics_of(records(0.65, 0.7495, 0.752, samples=110, seconds=0.5), first)
    assert found["samples"] == 330 and found["samples_to_target"] == 220
    assert found["training_s"] == 1.5 and found["training_s_to_target"] == 1.0
    assert found["auc_first_at_samples"] == pytest.approx(0.74 + 0.3 * 0.01)
    assert found["auc_first_at_time"] == pytest.approx(0.65)
    slow = compare.metrics_of(records(0.6, 0.7, snapshot_s=0.25, classification_s=0.5), first)
    assert slow["overhead_s"] == 0.75 and slow["training_s"] == 2.75
    assert math.isnan(slow["samples_to_target"]) and math.isnan(slow["training_s_to_target"])
    assert compare.metrics_of(first, first)["auc_first_at_time"] == 0.75


def test_smoke(capfd):
    rows = compare.main(["--smoke", "--num-seeds", "1", "--methods", "fae", "slipstream-random"])
    values = {(row["method"], row["metric"]): row["mean"] for row in rows}
    assert values["slipstream-random", "samples"] < values["fae", "samples"]
    assert values["fae", "auc"] == values["fae", "auc_first_at_samples"] > 0.55
    assert "planted model's limit" in capfd.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--smoke", "--settings", "x"], ["--smoke", "--alpha", "2"]])
def test_bad_flags_are_refused_at_once(flags, capsys, monkeypatch):
    monkeypatch.setattr(compare, "train", pytest.fail)
    monkeypatch.setattr(compare, "make_small_log", lambda *values: ("", ""))
    with pytest.raises(SystemExit) as stopped:
        compare.main(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_runs_are_reused_only_for_the_same_data_and_flags(tmp_path, monkeypatch):
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
    assert run(first)[0]["mean"] == table[0]["mean"] > 0.4
    assert (tmp_path / "runs/baseline-seed1/log.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        run(write_processed(tmp_path / "b/p.npz", 700, seed=1))
    with pytest.raises(ValueError, match="choose another --runs-dir"):
        run(first, "--learning-rate", "0.01")
    run(first, "--settings", "fast=--learning-rate 0.5 --alpha 0.5")
    with pytest.raises(ValueError, match=r"\(setting fast differ\)"):
        run(first, "--settings", "fast=--learning-rate 0.6")
    monkeypatch.setattr(compare, "git_commit", lambda: "another")
    with pytest.raises(ValueError, match=r"\(commit differ\)"):
        run(first)
    # Nothing is held by a comparison that did not come to a result.
    for log in (tmp_path / "runs").glob("*/log.jsonl"):
        log.write_text("{}\n")
    run(write_processed(tmp_path / "b/p.npz", 700, seed=1))


def test_a_settings_flags_go_to_each_method_that_has_them(tmp_path, monkeypatch, capsys):
    """What a method has no flag for is left out, and said; bad flags are refused before anything
    runs.
    """
    commands = {}

    def train(run, args, flags):
        commands[run[:2]] = compare.command_of(run[:2], args, flags)[1]
        return [{"kind": "start"}, *records(0.6, 0.7)]

    monkeypatch.setattr(compare, "train", train)
    processed = write_processed(tmp_path / "p.npz", 700)
    data = ["--processed-data-file", str(processed)]
    data += ["--segregated-data-dir", str(segregate_small(processed))]
    data += ["--runs-dir", str(tmp_path / "runs"), "--num-seeds", "1", *MODEL_FLAGS]
    (tmp_path / "mine.py").write_text("def score(chunk):\n    return chunk.losses()\n")
    own = f"slipstream-{tmp_path}/mine.py:score"
    methods = ["--methods", "baseline", "fae", "slipstream-stale", own]
    settings = ["--settings", "a=--drop_percentage=60 --alpha 0.5", "b=--seed 3 --alpha 0.7"]
    compare.main([*data, *methods, *settings])
    assert list(commands) == [
        *(("baseline", ""), ("baseline", "b"), ("fae", ""), ("fae", "b")),
        *(("slipstream-stale", "a"), ("slipstream-stale", "b"), (own, "a"), (own, "b")),
    ]
    assert "--alpha" not in commands["fae", "b"] and "--seed" in commands["fae", "b"]
    assert "--alpha" in commands[own, "b"]
    assert commands[own, "a"][-5] == f"{tmp_path}/mine.py:score"
    assert compare.run_name((own, "a", 1)) == "slipstream-mine.score-a-seed1"
    said = capsys.readouterr().out
    assert "fae has no --drop-percentage, --alpha of setting a\n" in said
    assert "baseline has no --alpha of setting b\n" in said and "slipstream-stale has" not in said
    monkeypatch.setattr(compare, "train", pytest.fail)
    with pytest.raises(ValueError, match="none of the methods has a flag of it"):
        compare.main([*data, "--methods", "fae", "--settings", "a=--alpha 0.5"])
    for bad in ("a=--alpha 2", "a=--alfa 0.5"):
        with pytest.raises(SystemExit):
            compare.main([*data, "--methods", "slipstream-stale", "--settings", bad])
    # Another text of the file is another comparison.
    run = tmp_path / "runs/slipstream-mine.score-seed1"
    run.mkdir()
    (run / "log.jsonl").write_text('{"kind": "summary"}\n')
    (tmp_path / "mine.py").write_text("def score(chunk):\n    return -chunk.losses()\n")
    with pytest.raises(ValueError, match="own files differ"):
        compare.main([*data, *methods, *settings])
