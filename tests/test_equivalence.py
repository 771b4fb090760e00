"""What must not change the result, does not change one bit of any weight."""

import json
import time

import numpy as np
import pytest
from helpers import (
    MODEL_FLAGS,
    assert_same_weights,
    run_script,
    saved_rows,
    segregate_small,
)

import dlrm_s_pytorch
import fae_train
import slipstream_train
from dlrm_data_pytorch import load_segregated
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.trainer import Trainer

STEPS = ["--num-batches", "200", "--nepochs", "5"]


def train(script, tmp_path, name, *flags):
    flags = [str(flag) for flag in (*MODEL_FLAGS, *STEPS, *flags)]
    where = ["--runs-dir", str(tmp_path / "runs"), "--run-name", name]
    return script.main([*flags, *where, "--save-model", str(tmp_path / name)])


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_any_number_of_resident_rows(segregated, tmp_path, optimizer):
    """200 steps of hot and cold batches that share rows: 0, num_hot and num_rows resident."""
    segregated = segregate_small(
        segregated.parent / "small_processed.npz",
        "--hot-threshold",
        "0.0005",
        "--optimizer",
        optimizer,
    )
    prepared = load_segregated(segregated)
    num_rows = len(prepared.slot_of_row)
    assert 0 < prepared.num_hot < num_rows and len(prepared.data.hot) and len(prepared.data.cold)
    flags = ["--segregated-data-dir", segregated, "--optimizer", optimizer]
    for num_resident in (0, prepared.num_hot, num_rows):
        for overlap in ("true", "false"):
            name = f"{num_resident}-{overlap}"
            where = ["--num-resident", num_resident, "--overlap", overlap]
            summary = train(fae_train, tmp_path, name, *flags, *where)
            assert summary["step"] == 200 and 0 < summary["hot_share"] < 1
    for other in tmp_path.glob("*-*"):
        assert_same_weights(tmp_path / f"{num_rows}-false", other)


@pytest.mark.parametrize("overlap", ["true", "false"])
@pytest.mark.parametrize("policy", ["stale", "uniform", "cold"])
def test_slipstream_with_any_number_of_resident_rows(segregated, tmp_path, overlap, policy):
    """Also the snapshots, which then lie in two memories, and so the dropped set.

    With overlap: hot batches that were cut before the choice, and are dropped by it, are not
    trained; nor cold ones, which were staged ahead.
    """
    flags = ["--segregated-data-dir", segregated, "--alpha", "0.5", "--snapshot-window", "0.3"]
    flags += ["--drop-policy", policy]
    expected = train(slipstream_train, tmp_path, "all", *flags, "--overlap", "false")
    assert expected["dropped"] > 0
    for num_resident in (0, 60, 120):
        where = ["--num-resident", num_resident, "--overlap", overlap]
        summary = train(slipstream_train, tmp_path, str(num_resident), *flags, *where)
        assert summary["dropped"] == expected["dropped"]
        assert_same_weights(tmp_path / str(num_resident), tmp_path / "all")


@pytest.mark.parametrize("drop", [[], ["--drop-percentage", "60"], ["--num-batches", "70"]])
def test_the_learning_rate_falls_to_0_at_the_end(segregated, tmp_path, drop, monkeypatch):
    """Over its share of the run's inputs, however many of them are dropped or never come."""
    rates, train_step = [], Trainer._train_step

    def note(self, batch):
        train_step(self, batch)
        rates.append(self._rate)

    monkeypatch.setattr(Trainer, "_train_step", note)
    flags = ["--segregated-data-dir", str(segregated), "--runs-dir", str(tmp_path), *MODEL_FLAGS]
    flags += ["--alpha", "0.4", "--lr-decay-share", "0.4", "--learning-rate", "0.2", "--nepochs", 2]
    summary = slipstream_train.main(
        [str(flag) for flag in ["--drop-policy", "random", *flags, *drop]]
    )
    total = min(2 * summary["num_train"], 32 * 70 if "--num-batches" in drop else 10**9)
    left = 32 * np.arange(len(rates), 0, -1)
    assert rates[-1] <= 0.2 * 32 / (0.4 * total) and rates[0] == 0.2
    assert (np.diff(rates) <= 0).all()
    last = slice(-20, None)  # the second epoch's choice is made before
    assert rates[last] == pytest.approx(0.2 * left[last] / (0.4 * total), abs=0.01)


@pytest.mark.parametrize("evaluate", ["0", "7"])
def test_baseline_that_stages_every_batch_ahead(processed, tmp_path, evaluate):
    """Every batch shares rows with the one before; evaluations on the way change nothing."""
    flags = ["--processed-data-file", processed]
    train(dlrm_s_pytorch, tmp_path, "all", *flags)
    where = ["--num-resident", "0", "--overlap", "true", "--test-freq", evaluate]
    train(dlrm_s_pytorch, tmp_path, "ahead", *flags, *where)
    assert_same_weights(tmp_path / "ahead", tmp_path / "all")


def test_evaluation_waits_for_rows_on_their_way_home(processed, tmp_path, monkeypatch):
    """Write-backs that take longer than a step: what is evaluated is what was trained."""
    flags = ["--processed-data-file", processed, "--num-batches", "30", "--test-freq", "1"]
    expected = train(dlrm_s_pytorch, tmp_path, "all", *flags)
    plain = EmbeddingTable.write_back

    def slow(*values):
        time.sleep(0.02)
        plain(*values)

    monkeypatch.setattr(EmbeddingTable, "write_back", slow)
    where = ["--num-resident", "0", "--overlap", "true"]
    train(dlrm_s_pytorch, tmp_path, "ahead", *flags, *where)
    for kind in ("auc", "log_loss"):
        curves = [
            [record[kind] for record in evaluations(tmp_path, name)] for name in ("all", "ahead")
        ]
        assert curves[0] == curves[1] and len(curves[0]) == 31
    assert expected["step"] == 30


def evaluations(tmp_path, name):
    lines = (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "evaluation"]


def test_fae_with_everything_cold_is_the_baseline(processed, tmp_path):
    folder = segregate_small(processed, "--hot-threshold", "1")
    assert len(load_segregated(folder).data.hot) == 0
    train(dlrm_s_pytorch, tmp_path, "baseline", "--processed-data-file", processed)
    train(fae_train, tmp_path, "fae", "--segregated-data-dir", folder)
    assert_same_weights(tmp_path / "baseline", tmp_path / "fae")


def test_fae_with_everything_hot_is_the_baseline(processed, tmp_path):
    folder = segregate_small(processed)
    folder = segregate_small(processed, "--hot-emb-gpu-mem", "1000000")
    assert len(load_segregated(folder).data.cold) == 0
    train(dlrm_s_pytorch, tmp_path, "baseline", "--processed-data-file", processed)
    train(fae_train, tmp_path, "fae", "--segregated-data-dir", folder)
    assert_same_weights(tmp_path / "baseline", tmp_path / "fae")


@pytest.mark.parametrize("schedule", ["interleaved", "phased"])
@pytest.mark.parametrize(
    "flags", [["--threshold", "0"], ["--drop-policy", "none"], ["--drop-percentage", "0"]]
)
def test_slipstream_with_nothing_stale_is_fae(segregated, tmp_path, schedule, flags):
    common = ["--segregated-data-dir", segregated, "--schedule", schedule]
    train(fae_train, tmp_path, "fae", *common)
    summary = train(slipstream_train, tmp_path, "slipstream", *common, *flags)
    assert summary["dropped"] == 0
    assert_same_weights(tmp_path / "fae", tmp_path / "slipstream")


def test_schedules_differ(segregated, tmp_path):
    """The comparison above can fail: another order gives other weights."""
    for schedule in ("interleaved", "phased"):
        train(
            fae_train,
            tmp_path,
            schedule,
            "--segregated-data-dir",
            segregated,
            "--schedule",
            schedule,
        )
    first, second = (saved_rows(tmp_path / name)["rows"] for name in ("interleaved", "phased"))
    assert not np.array_equal(first, second)


def test_the_target_is_dropped_in_every_epoch(segregated, tmp_path):
    summary = slipstream_train.main(
        ["--segregated-data-dir", str(segregated), "--runs-dir", str(tmp_path), *MODEL_FLAGS]
        + ["--nepochs", "3", "--count-untouched-as-stale", "true", "--drop-percentage", "30"]
    )
    assert len(summary["drops"]) == 3
    for drop in summary["drops"]:
        assert drop["dropped"] == round(0.3 * drop["hot_remaining"])
    assert summary["samples"] + summary["dropped"] == 3 * summary["num_train"]


def test_a_baselines_model_loads_into_fae(processed, segregated, tmp_path):
    """Rows are saved by table and id: another numbering of the slots evaluates the same."""
    baseline = train(dlrm_s_pytorch, tmp_path, "baseline", "--processed-data-file", processed)
    loaded = fae_train.main(
        [
            "--segregated-data-dir",
            str(segregated),
            "--runs-dir",
            str(tmp_path / "runs"),
            *MODEL_FLAGS,
        ]
        + [
            "--load-model",
            str(tmp_path / "baseline"),
            "--num-batches",
            "1",
            "--learning-rate",
            "1e-30",
        ]
    )
    assert loaded["auc"] == pytest.approx(baseline["auc"], abs=1e-9)
    assert loaded["log_loss"] == pytest.approx(baseline["log_loss"], abs=1e-6)


def test_the_same_seed_and_threads_give_the_same_log_and_weights(segregated, tmp_path):
    """With two threads, in two processes."""
    logs = []
    for name in ("a", "b"):
        flags = [*MODEL_FLAGS, "--num-threads", "2", "--test-freq", "50", "--nepochs", "2"]
        flags += ["--runs-dir", tmp_path / "runs", "--run-name", name, "--alpha", "0.5"]
        flags += ["--segregated-data-dir", segregated, "--save-model", tmp_path / name]
        assert run_script("slipstream_train.py", *flags, OMP_NUM_THREADS="2")[0] == 0
        lines = (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()
        logs.append([timeless(json.loads(line)) for line in lines[1:]])
    assert logs[0] == logs[1] and len(logs[0]) > 5
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def timeless(value):
    """A log record without times, paths and memory."""
    if isinstance(value, dict):
        other = ("_s", "bytes", "seconds", "path")
        return {key: timeless(item) for key, item in value.items() if not key.endswith(other)}
    return [timeless(item) for item in value] if isinstance(value, list) else value
