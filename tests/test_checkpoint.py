"""Runs that end early go on as if they had not; damaged or foreign checkpoints are refused."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import MODEL_FLAGS, REPOSITORY, assert_same_weights, segregate_small, write_processed

import dlrm_s_pytorch
import fae_train
import slipstream_train
from slipstream.tools import cli
from slipstream.tools.npz import fingerprint, open_npz
from slipstream.training import build
from slipstream.training import data_flags as flags_module
from slipstream.training.saved import (
    checkpoints_in,
    checksum_of,
    differences,
    find_checkpoint,
    open_checkpoint,
)

SCRIPTS = {"baseline": dlrm_s_pytorch, "fae": fae_train, "slipstream": slipstream_train}
WINDOW = ["--snapshot-window", "0.2"]
TWO_EPOCHS = ["--nepochs", "2"]
CASES = {
    "baseline": (dlrm_s_pytorch, []),
    "baseline, adagrad": (dlrm_s_pytorch, ["--optimizer", "rwsadagrad"]),
    "baseline, log's order": (dlrm_s_pytorch, ["--data-randomize", "none"]),
    "fae, phased": (fae_train, ["--schedule", "phased"]),
    "fae, overlap": (fae_train, ["--num-resident", "60", "--overlap", "true"]),
    "slipstream": (slipstream_train, ["--alpha", "0.5", *WINDOW]),
    "slipstream, kept": (slipstream_train, ["--stale-keep-rate", "0.3", "--alpha", "0.6", *WINDOW]),
    "slipstream, again": (
        slipstream_train,
        ["--recalibrate-every", "0.1", "--alpha", "0.4", *WINDOW],
    ),
    "slipstream, uniform": (
        slipstream_train,
        ["--drop-policy", "uniform", "--alpha", "0.4", "--stale-keep-rate", "0.3", *WINDOW],
    ),
    "slipstream, random": (
        slipstream_train,
        ["--drop-policy", "random", "--alpha", "0.4", "--lr-decay-share", "0.7", *WINDOW],
    ),
}


def train(script, folder, *flags):
    """Train on the small data in `folder`; the summary."""
    data = ["--segregated-data-dir", folder / "hot_cold"]
    if script is dlrm_s_pytorch:
        data = ["--processed-data-file", folder / "small_processed.npz"]
    flags = [*data, *MODEL_FLAGS, "--runs-dir", folder / "runs", *flags]
    return script.main([str(flag) for flag in flags])


def records_of(summary):
    with open(summary["log"]) as file:
        return [json.loads(line) for line in file]


def timeless(record):
    """What of a log record does not depend on when it was written."""
    return {key: value for key, value in record.items() if not key.endswith("_s")}


def curves(summary):
    return {
        kind: [timeless(record) for record in records_of(summary) if record["kind"] == kind]
        for kind in ("evaluation", "validation", "drop")
    }


def same_files(first, second):
    """The same arrays, byte for byte."""
    return (first / "state.npz").read_bytes() == (second / "state.npz").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small processed file and its segregated folder, for tests that only read it."""
    folder = tmp_path_factory.mktemp("data")
    segregate_small(write_processed(folder / "small_processed.npz"))
    return folder


@pytest.fixture
def folder(data, tmp_path):
    for name in ("small_processed.npz", "hot_cold"):
        (tmp_path / name).symlink_to(data / name)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_any_checkpoint_equals_not_having_stopped(tmp_path, case):
    """In either epoch, before, inside and after the snapshot's window, at the last step."""
    folder = tmp_path
    segregate_small(write_processed(folder / "small_processed.npz", 2000))
    script, flags = CASES[case]
    flags = [*flags, *TWO_EPOCHS, "--test-freq", "20", "--val-freq", "15", "--print-freq", "17"]
    if script is slipstream_train:
        flags += ["--drop-min-steps", "0"]  # so short an epoch drops nothing otherwise
    kept = ["--checkpoint-every", "9", "--keep", "100"]
    whole = train(script, folder, *flags, *kept, "--save-model", folder / "whole")
    if script is slipstream_train:
        assert whole["dropped"] > 0
    steps = checkpoints_in(folder / "whole")
    assert len(steps) > 8
    in_window = 0
    for step in steps:
        in_window += "rule.before" in open_checkpoint(step).arrays
        model = folder / f"from-{step.name}"
        shutil.copytree(step, model / step.name)
        again = train(script, folder, *flags, "--save-model", model, "--load-model", "auto")
        assert same_files(steps[-1], find_checkpoint(model).folder), step
        assert curves(again) == curves(whole), step
        for figure in ("step", "samples", "dropped", "auc", "loss", "val", "best_val", "drops"):
            mine, expected = again[figure], whole[figure]
            if figure == "best_val":
                mine, expected = timeless(mine), timeless(expected)
            assert mine == expected, (step, figure)
    if script is slipstream_train:
        assert in_window >= 2


def test_going_on_with_other_resident_rows_and_threads(folder):
    """On another device or with more room a run goes on to the same weights."""
    flags = ["--alpha", "0.5", *WINDOW, "--save-model", folder / "model"]
    train(slipstream_train, folder, *flags, "--num-batches", "60")
    shutil.copytree(folder / "model", folder / "other")
    train(slipstream_train, folder, *flags, "--load-model", "auto", "--num-resident", "50")
    flags[-1] = folder / "other"
    again = ["--load-model", "auto", "--num-resident", "0", "--overlap", "true"]
    summary = train(slipstream_train, folder, *flags, *again)
    assert summary["dropped"] > 0
    assert_same_weights(folder / "model", folder / "other")


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_weights_move_between_methods_and_budgets(folder, optimizer, capsys):
    """Not the place: the order of batches is another one. Adagrad's sums come along."""
    flags = ["--optimizer", optimizer, "--learning-rate", "0.05"]
    first = train(dlrm_s_pytorch, folder, *flags, "--save-model", folder / "a")
    (folder / "hot_cold").unlink()
    budget = ["--hot-emb-gpu-mem", "1500", "--optimizer", optimizer]
    segregate_small(folder / "small_processed.npz", *budget)
    moved = ["--load-model", folder / "a", "--save-model", folder / "b"]
    still = train(
        fae_train,
        folder,
        *flags,
        *moved,
        "--inference-only",
        "false",
        "--nepochs",
        "1",
        "--learning-rate",
        "1e-30",
        "--dense-learning-rate",
        "1e-30",
    )
    assert still["auc"] == first["auc"] and still["step"] > 0
    assert "but not its place: the method is baseline there, fae here" in capsys.readouterr().out
    a, b = find_checkpoint(folder / "a").arrays, find_checkpoint(folder / "b").arrays
    assert np.array_equal(a["rows"], b["rows"])
    if optimizer == "rwsadagrad":
        assert (b["row_sums"] >= a["row_sums"]).all() and a["row_sums"].any()
        name = "step.optimizer.step.top_l.0.weight"
        assert b[name] - a[name] == still["step"] and a[name] == first["step"] > 0


def test_more_epochs_go_on_after_the_last(folder):
    whole = train(fae_train, folder, "--save-model", folder / "whole", "--nepochs", "3")
    train(fae_train, folder, "--save-model", folder / "parts")
    flags = ["--save-model", folder / "parts", "--load-model", folder / "parts", "--nepochs", "3"]
    again = train(fae_train, folder, *flags)
    assert again["step"] == whole["step"] and again["auc"] == whole["auc"]
    assert_same_weights(folder / "whole", folder / "parts")


def test_evaluation_alone_changes_and_trains_nothing(folder):
    first = train(fae_train, folder, "--save-model", folder / "a", "--run-name", "a")
    before = {path: path.read_bytes() for path in (folder / "a").rglob("*.*") if path.is_file()}
    alone = train(fae_train, folder, "--load-model", folder / "a", "--inference-only", "true")
    for figure in ("auc", "log_loss", "accuracy", "val"):
        assert alone[figure] == first[figure]
    assert alone["samples"] == 0
    assert before == {path: path.read_bytes() for path in before}


def test_the_newest_stay_and_the_best_is_chosen_on_validation(folder):
    """At a rate so high that the model gets worse again."""
    flags = ["--save-model", folder / "m", "--checkpoint-every", "20", "--keep", "2"]
    flags += ["--val-freq", "10", "--learning-rate", "2", "--nepochs", "3", "--test-freq", "10"]
    summary = train(dlrm_s_pytorch, folder, *flags)
    assert [path.name for path in checkpoints_in(folder / "m")] == [
        "step-0000000320",
        "step-0000000324",
    ]
    records = records_of(summary)
    validations = [record for record in records if record["kind"] == "validation"]
    best = max(validations, key=lambda record: record["auc"])
    assert summary["best_val"]["step"] == best["step"] < summary["step"]
    flags = ["--load-model", folder / "m/best", "--inference-only", "true"]
    alone = train(dlrm_s_pytorch, folder, *flags)
    assert alone["val"]["auc"] == best["auc"]
    tests = [record for record in records if record["kind"] == "evaluation"]
    assert alone["auc"] == next(r["auc"] for r in tests if r["step"] == best["step"])
    # Patience ends a run that gets worse, and tests the best weights; the last ones stay, too.
    flags = ["--val-freq", "10", "--learning-rate", "2", "--nepochs", "3", "--patience", "3"]
    short = train(dlrm_s_pytorch, folder, *flags, "--save-model", folder / "o")
    assert short["step"] == short["weights_of_step"] + 30 < 324
    assert short["reached"].startswith(f"AUC was best at step {short['weights_of_step']}")
    flags = ["--inference-only", "true", "--load-model"]
    kept = train(dlrm_s_pytorch, folder, *flags, folder / "o/best")
    assert (kept["auc"], kept["val"]) == (short["auc"], short["val"])
    last = train(dlrm_s_pytorch, folder, *flags, folder / "o")
    assert last["auc"] != short["auc"] and last["val"]["auc"] < short["val"]["auc"]
    # The choice read no test label: it is the same without test evaluations.
    again = train(
        dlrm_s_pytorch,
        folder,
        "--save-model",
        folder / "n",
        "--val-freq",
        "10",
        "--learning-rate",
        "2",
        "--nepochs",
        "3",
    )
    assert same_files(folder / "m/best", folder / "n/best")
    assert [r["kind"] for r in records_of(again)].count("evaluation") == 1


@pytest.mark.parametrize("name", ["auc", "acc"])
def test_thresholds_stop_early_on_validation(folder, name):
    flags = ["--val-freq", "10", f"--mlperf-{name}-threshold", "0.7", "--save-model", folder / "m"]
    summary = train(dlrm_s_pytorch, folder, *flags, "--nepochs", "5")
    last = [record for record in records_of(summary) if record["kind"] == "validation"][-1]
    key = {"auc": "auc", "acc": "accuracy"}[name]
    assert last[key] >= 0.7 and last["step"] == summary["step"] < 540
    assert summary["reached"].startswith(key)
    # It does not begin again where it has reached its end.
    again = train(dlrm_s_pytorch, folder, *flags, "--nepochs", "5", "--load-model", "auto")
    assert again["step"] == summary["step"]


def refused(message, script, folder, *flags):
    with pytest.raises((ValueError, OSError, MemoryError)) as error:
        train(script, folder, *flags)
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_what_does_not_belong_is_refused_with_the_difference(folder, tmp_path_factory):
    train(fae_train, folder, "--save-model", folder / "m", "--num-batches", "20")
    load, auto = (
        ["--load-model", folder / "m"],
        ["--save-model", folder / "m", "--load-model", "auto"],
    )
    refused("holds checkpoints: --load-model auto goes on", fae_train, folder, *auto[:2])
    said = "--arch-mlp-top[0] is 16 there, 17 here"
    refused(said, fae_train, folder, *load, "--arch-mlp-top", "17-1")
    said = "--arch-interaction-op is dot there, cat here"
    refused(said, dlrm_s_pytorch, folder, *load, "--arch-interaction-op", "cat")
    refused("--seed is 123 there, 7 here", fae_train, folder, *auto, "--seed", "7")
    refused("--mini-batch-size is 32 there", fae_train, folder, *auto, "--mini-batch-size", "64")
    refused("the method is fae there, slipstream here", slipstream_train, folder, *auto)
    other = tmp_path_factory.mktemp("other")
    sizes = np.array([40, 1, 300, 8, 1000])
    segregate_small(write_processed(other / "small_processed.npz", table_sizes=sizes))
    refused("data: table sizes[3] is 7 there, 8 here", fae_train, other, *load)
    segregate_small(write_processed(other / "small_processed.npz", seed=5))
    refused("made for other data: the log is", fae_train, other, *load)
    refused("no checkpoint in", fae_train, folder, "--load-model", folder / "runs")


def test_two_runs_never_write_one_folder(folder):
    command = [sys.executable, REPOSITORY / "fae_train.py", *MODEL_FLAGS, "--nepochs", "100000"]
    command += ["--segregated-data-dir", folder / "hot_cold", "--runs-dir", folder / "runs"]
    command += ["--save-model", folder / "m", "--checkpoint-every", "5"]
    with started(command, stdout=subprocess.DEVNULL):
        wait_for(lambda: checkpoints_in(folder / "m"))
        refused("another run writes to", fae_train, folder, "--save-model", folder / "m")
    train(
        fae_train,
        folder,
        "--save-model",
        folder / "m",
        "--load-model",
        "auto",
        "--num-batches",
        "1",
    )


@contextmanager
def started(command, **options):
    """A process that ends with the body, also where the body fails."""
    with subprocess.Popen([*map(str, command)], **options) as run:
        try:
            yield run
        finally:
            run.kill()


def wait_for(condition):
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("method", "number"),
    [("baseline", signal.SIGINT), ("fae", signal.SIGTERM), ("slipstream", signal.SIGINT)],
)
def test_signals_end_in_good_order(folder, method, number):
    """The step is finished, a checkpoint written and the way on named; then it goes on."""
    script = SCRIPTS[method]
    flags = ["--nepochs", "60", "--save-model", folder / "m", "--print-freq", "1"]
    data = ["--segregated-data-dir", folder / "hot_cold"]
    if method == "baseline":
        data = ["--processed-data-file", folder / "small_processed.npz"]
    command = [sys.executable, script.__file__, *data, *MODEL_FLAGS, *flags]
    command += ["--runs-dir", folder / "runs", "--run-name", "first", "--num-threads", "1"]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 5:"):
                break
        run.send_signal(number)
        out, err = run.communicate(timeout=600)
    assert run.returncode == 128 + number
    assert "Traceback" not in err and "stopping after this mini-batch" in err
    assert f"stopped by {number.name} at step" in out and "--load-model auto goes on" in out
    [path] = checkpoints_in(folder / "m")
    step = open_checkpoint(path).values["trainer"]["progress"]["step"]
    last = json.loads((folder / "runs/first/log.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "stopped" and last["step"] == step
    few = [*flags, "--num-batches", str(step + 40), "--print-freq", "0"]
    summary = train(script, folder, *few, "--load-model", "auto", "--run-name", "first")
    assert summary["log"] == str(folder / "runs/first-2/log.jsonl")
    few[few.index("--save-model") + 1] = folder / "whole"
    train(script, folder, *few)
    assert_same_weights(folder / "m", folder / "whole")


def test_a_second_signal_ends_at_once():
    """Also while the first one's checkpoint is being written. Two at once, as `timeout` tells a
    process and its group, are one.
    """
    code = (
        "import os, signal, time; from slipstream.tools.runtime import AT_ONCE_S, StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert stop.signal == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(AT_ONCE_S + 0.01)\n"
        "    print('on', flush=True); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('and on', flush=True)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (130, "on\n")


@pytest.mark.parametrize("spoil", ["flip", "cut", "no description", "no state", "junk"])
def test_a_damaged_checkpoint_is_left_out(folder, spoil, capsys):
    """The one before it serves, and the run ends as if nothing had happened."""
    flags = ["--checkpoint-every", "20", "--keep", "9", "--save-model", folder / "m"]
    train(fae_train, folder, *flags)
    expected = find_checkpoint(folder / "m").folder
    shutil.copytree(expected, folder / "expected")
    state = expected / "state.npz"
    content = bytearray(state.read_bytes())
    if spoil == "flip":
        content[len(content) // 2] ^= 4
        state.write_bytes(content)
    elif spoil == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif spoil == "no state":
        state.unlink()
    elif spoil == "no description":
        (expected / "checkpoint.json").unlink()
    else:
        (expected / "checkpoint.json").write_text("[" * 100_000)
    capsys.readouterr()
    train(fae_train, folder, *flags, "--load-model", "auto")
    said = capsys.readouterr().out
    assert ("it is left out" in said) == (spoil != "no description")
    assert same_files(expected, folder / "expected")
    for path in checkpoints_in(folder / "m"):
        (path / "checkpoint.json").write_text("{}")
    refused("no checkpoint that is whole", fae_train, folder, *flags, "--load-model", "auto")


def test_a_value_that_is_not_finite_keeps_the_last_good_checkpoint(folder):
    flags = ["--save-model", folder / "m", "--checkpoint-every", "1", "--val-freq", "5"]
    train(dlrm_s_pytorch, folder, *flags, "--num-batches", "30")
    flags += ["--load-model", "auto", "--learning-rate", "1e38", "--print-freq", "1"]
    with pytest.raises(ValueError) as error:
        train(dlrm_s_pytorch, folder, *flags)
    said = str(error.value)
    for part in (
        "at step 3",
        "learning rate 1e+38",
        "before: loss",
        "validation AUC 0.",
        "at step 30",
    ):
        assert part in said, said
    assert "the last checkpoint is" in said and "lower --learning-rate" in said
    saved = find_checkpoint(folder / "m")
    assert np.isfinite(saved.arrays["rows"]).all()


def test_a_model_that_learns_nothing_is_said(folder, capsys, monkeypatch):
    monkeypatch.setattr("slipstream.training.evaluation.MIN_LEARNED", 3000)
    monkeypatch.setattr("slipstream.training.evaluation.STUCK_AUC", 0.05)  # few inputs: a noisy AUC
    flags = ["--data-generation", "random", "--data-size", "40000", "--arch-embedding-size", "9-9"]
    flags += ["--runs-dir", str(folder / "runs"), "--mini-batch-size", "1024"]
    dlrm_s_pytorch.main([*flags, *MODEL_FLAGS[:-6], "--learning-rate", "1e-9", "--device", "cpu"])
    assert "nothing is learned. Likely causes: a learning rate" in capsys.readouterr().out
    train(fae_train, folder)
    assert "nothing is learned" not in capsys.readouterr().out


def test_held_out_inputs_of_one_class_are_said(folder, capsys):
    """Here one input is held out, for the validation set."""
    flags = ["--data-generation", "random", "--data-size", "7", "--arch-embedding-size", "9-9"]
    flags += ["--runs-dir", str(folder / "runs"), "--device", "cpu"]
    summary = dlrm_s_pytorch.main([*flags, *MODEL_FLAGS[:-6]])
    said = capsys.readouterr().out
    assert np.isnan(summary["auc"]) and "no test AUC" in said and "no validation AUC" in said


def test_going_on_at_another_rate_is_said(folder, capsys):
    flags = ["--save-model", folder / "m", "--load-model", "auto"]
    train(fae_train, folder, *flags, "--num-batches", "20")
    train(fae_train, folder, *flags, "--num-batches", "20")
    assert "otherwise than before" not in capsys.readouterr().out
    train(fae_train, folder, *flags, "--num-batches", "40", "--lr-decay-share", "0.5")
    said = next(li for li in capsys.readouterr().out.splitlines() if "otherwise than before" in li)
    assert "--num-batches is 20 there, 40 here" in said and "--lr-decay-share is 0.0 there" in said


def test_too_little_memory_is_said_before_it_is_taken(folder, monkeypatch):
    monkeypatch.setattr(build, "initial_rows", pytest.fail)
    monkeypatch.setattr(build, "available_memory_bytes", lambda: 100_000)
    said = "for activations; 0 MB are free: choose another --mini-batch-size"
    refused(said, fae_train, folder)
    flags = ["--data-generation", "random", "--arch-embedding-size", "9000000", *MODEL_FLAGS]
    monkeypatch.setattr(build, "available_memory_bytes", lambda: 10**8)
    with pytest.raises(MemoryError, match="288 MB of them for embedding rows; 100 MB are free"):
        dlrm_s_pytorch.main(flags)


def test_a_run_that_goes_on_from_an_older_one_does_not_mix_with_the_newer(folder):
    flags = ["--checkpoint-every", "20", "--keep", "9"]
    train(fae_train, folder, *flags, "--save-model", folder / "m")
    expected = find_checkpoint(folder / "m").folder
    old = ["--load-model", folder / "m/step-0000000060"]
    refused("is later than the step", fae_train, folder, *flags, *old, "--save-model", folder / "m")
    other = ["--load-model", folder / "m", "--save-model", folder / "m", "--schedule", "phased"]
    refused("of another run: --schedule is interleaved", fae_train, folder, *flags, *other)
    train(fae_train, folder, *flags, *old, "--save-model", folder / "n")
    assert same_files(expected, find_checkpoint(folder / "n").folder)
    # Damaged newer ones are out of the way of those that are written then.
    for step in (80, 100):
        (folder / f"n/step-{step:010}/state.npz").write_bytes(b"")
    flags = ["--checkpoint-every", "7", "--keep", "2", "--save-model", folder / "m"]
    for path in checkpoints_in(folder / "m")[3:]:
        (path / "state.npz").write_bytes(b"")
    again = train(fae_train, folder, *flags, "--load-model", "auto")
    assert [path.name for path in checkpoints_in(folder / "m")] == [
        "step-0000000105",
        "step-0000000108",
    ]
    assert again["step"] == 108 and (folder / "m/step-0000000080.damaged").is_dir()


def test_another_threshold_goes_on(folder):
    flags = ["--val-freq", "10", "--save-model", folder / "m", "--nepochs", "5"]
    first = train(dlrm_s_pytorch, folder, *flags, "--mlperf-auc-threshold", "0.6")
    flags += ["--load-model", "auto"]
    second = train(dlrm_s_pytorch, folder, *flags, "--mlperf-auc-threshold", "0.7")
    assert second["step"] > first["step"]
    third = train(dlrm_s_pytorch, folder, *flags, "--num-batches", "300")
    assert third["step"] == 300


def test_streamed_inputs_go_on_in_memory_and_back(folder):
    """The order is that of the run's beginning, whatever fits into memory now."""
    flags, few = ["--num-batches", "90"], ["--max-memory", "20K"]
    for name, first, second in (("a", few, few), ("b", few, []), ("c", [], few)):
        model = ["--save-model", folder / name]
        train(fae_train, folder, *model, "--num-batches", "40", *first)
        train(fae_train, folder, *model, *flags, *second, "--load-model", "auto")
    train(fae_train, folder, *flags, *few, "--save-model", folder / "whole")
    train(fae_train, folder, *flags, "--save-model", folder / "in_memory")
    assert_same_weights(folder / "whole", folder / "a")
    assert_same_weights(folder / "whole", folder / "b")
    assert_same_weights(folder / "in_memory", folder / "c")
    rows = [find_checkpoint(folder / name).arrays["rows"] for name in ("a", "c")]
    assert not np.array_equal(*rows)


def test_a_signal_in_an_evaluation(folder, monkeypatch, capsys):
    """It is given up, and made again by the run that goes on."""
    from slipstream.training import evaluation

    flags = ["--save-model", folder / "m", "--test-freq", "30"]
    whole = train(fae_train, folder, "--test-freq", "30")
    plain, calls = evaluation.evaluate, []

    def signalled(*values):
        calls.append(values)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*values)

    monkeypatch.setattr(evaluation, "evaluate", signalled)
    with pytest.raises(SystemExit) as stopped:
        train(fae_train, folder, *flags)
    assert stopped.value.code == 130 and find_checkpoint(folder / "m").step == 60
    again = train(fae_train, folder, *flags, "--load-model", "auto")
    assert curves(again) == curves(whole)
    calls.clear()
    calls.append(1)
    with pytest.raises(SystemExit) as stopped:
        train(fae_train, folder, "--load-model", folder / "m", "--inference-only", "true")
    assert stopped.value.code == 130


@pytest.mark.parametrize("method", ["baseline", "slipstream"])
def test_a_run_that_trains_nothing_keeps_the_place(folder, method):
    """Copied to another folder at the same step, then gone on with: as if never stopped."""
    script = SCRIPTS[method]
    flags = [*TWO_EPOCHS, "--val-freq", "1000"]
    flags += ["--alpha", "0.5", *WINDOW] if method == "slipstream" else []
    train(script, folder, *flags, "--save-model", folder / "whole")
    train(script, folder, *flags, "--save-model", folder / "a", "--num-batches", "35")
    copy = ["--load-model", folder / "a", "--save-model", folder / "b"]
    for fewer in (["--num-batches", "35"], ["--nepochs", "1", "--num-batches", "35"]):
        train(script, folder, *flags, *copy, *fewer)
        copy = ["--load-model", "auto", "--save-model", folder / "b"]
    assert "plan" in find_checkpoint(folder / "b").values
    train(script, folder, *flags, *copy)
    assert_same_weights(folder / "whole", folder / "b")
    shutil.copytree(folder / "a/best", folder / "c/best")
    train(script, folder, *flags, "--load-model", "auto", "--save-model", folder / "c")
    assert_same_weights(folder / "whole", folder / "c")


def test_files_of_others_stay(folder, capsys):
    (folder / "m/best").mkdir(parents=True)
    (folder / "m/best/notes.txt").write_text("mine")
    flags = ["--save-model", folder / "m", "--load-model", "auto", "--val-freq", "9"]
    refused("it holds notes.txt; choose another folder", fae_train, folder, *flags)
    flags = ["--save-model", folder / "n", "--val-freq", "9", "--runs-dir", folder / "n"]
    train(fae_train, folder, *flags, "--run-name", "best", "--num-batches", "20")
    said = "step 9: the best model is not saved: "  # training goes on
    assert f"{said}{folder}/n/best is not ours to replace: it holds log" in capsys.readouterr().out
    assert (folder / "m/best/notes.txt").exists() and (folder / "n/best/log.jsonl").exists()


def test_what_a_killed_deletion_left_is_neither_trusted_nor_kept(folder):
    flags = ["--save-model", folder / "m", "--val-freq", "7", "--num-batches", "14"]
    orphan = folder / "m/step-0000000007"
    orphan.mkdir(parents=True)
    (orphan / "state.npz").write_bytes(bytes(1000))
    train(fae_train, folder, *flags, "--load-model", "auto")
    assert not orphan.exists()
    open_checkpoint(folder / "m/best")
    # Only the best one is there: it is gone on from, and another run's refused.
    for path in checkpoints_in(folder / "m"):
        shutil.rmtree(path)
    refused("--seed is 123 there", fae_train, folder, *flags, "--load-model", "auto", "--seed", "1")


def test_damaged_twice(folder):
    flags = ["--save-model", folder / "m", "--checkpoint-every", "10", "--num-batches", "20"]
    train(fae_train, folder, *flags)
    for _ in range(2):
        (folder / "m/step-0000000020/state.npz").write_bytes(b"")
        train(fae_train, folder, *flags, "--load-model", "auto")
    open_checkpoint(folder / "m/step-0000000020")


def test_the_same_command_begins_and_goes_on(folder):
    flags = ["--run-name", "x", "--save-model", folder / "m", "--load-model", "auto"]
    (folder / "runs/x").mkdir(parents=True)
    (folder / "runs/x/log.jsonl").write_text("")  # of a run killed before its first checkpoint
    for number in (2, 3):
        summary = train(fae_train, folder, *flags, "--num-batches", str(10 * number))
        assert summary["log"].endswith(f"runs/x-{number}/log.jsonl")


def test_the_best_is_of_this_folder(folder, monkeypatch):
    """Though it was better before, in another folder."""
    values = iter(range(99, 0, -1))

    def falling(*_):
        names = ("auc", "log_loss", "normalized_entropy", "accuracy")
        return dict.fromkeys(names, next(values) / 100)

    monkeypatch.setattr("slipstream.training.evaluation.evaluate", falling)
    flags = ["--val-freq", "25", "--save-model"]
    train(fae_train, folder, *flags, folder / "a", "--num-batches", "60")
    copy = [*flags, folder / "b", "--load-model", folder / "a"]
    summary = train(fae_train, folder, *copy, "--num-batches", "80")
    assert open_checkpoint(folder / "b/best").step == summary["best_val"]["step"] == 75


def test_a_best_that_is_newer_than_the_checkpoint_is_the_best(folder, monkeypatch):
    """After a crash between the two; it is not taken for that of an older validation."""
    value = [0.5]

    def rising(*_):
        value[0] += 0.01
        names = ("auc", "log_loss", "normalized_entropy", "accuracy")
        return dict.fromkeys(names, value[0])

    monkeypatch.setattr("slipstream.training.evaluation.evaluate", rising)
    flags = ["--val-freq", "20", "--checkpoint-every", "50", "--save-model", folder / "m"]
    first = train(fae_train, folder, *flags, "--num-batches", "60")
    assert first["best_val"]["step"] == 60
    shutil.rmtree(folder / "m/step-0000000060")
    value[0] = 0.1
    auto = ["--load-model", "auto", "--num-batches", "80", "--patience", "9"]
    again = train(fae_train, folder, *flags, *auto)
    assert again["best_val"] == first["best_val"] and again["weights_of_step"] == 60
    assert open_checkpoint(folder / "m/best").step == 60


def test_mlps_that_are_not_finite_are_not_saved(folder, monkeypatch):
    plain = fae_train.run_training.__globals__["build_model"]

    def spoiled(*values):
        model, table = plain(*values)
        model.network.top_l[-1].weight.data[0, 0] = np.inf
        return model, table

    flags = ["--save-model", folder / "m", "--num-batches", "5", "--learning-rate", "1e-30"]
    train(fae_train, folder, *flags, "--checkpoint-every", "5")
    monkeypatch.setitem(fae_train.run_training.__globals__, "build_model", spoiled)
    flags[3] = "6"
    with pytest.raises(ValueError, match="not finite|training loss is"):
        train(fae_train, folder, *flags, "--load-model", "auto")
    assert [path.name for path in checkpoints_in(folder / "m")] == ["step-0000000005"]


def test_differences_are_named():
    here = {"a": [1, 2], "b": {"c": (1, 2), "d": 5}, "e": 1}
    assert differences(here, {"a": [1, 2], "b": {"c": [1, 2], "d": 5}, "e": 1}) == []
    saved = {"a": [1, 3], "b": {"c": [1, 2], "d": 6}, "f": 1}
    assert differences(here, saved) == [
        "a[1] is 3 there, 2 here",
        "b: d is 6 there, 5 here",
        "e is None there, 1 here",
        "f is 1 there, None here",
    ]


@pytest.mark.parametrize("text", ["", "x", "-1", "5x", "0m", "nan", "1.5", "infh"])
def test_bad_intervals(text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        cli.every(text)


def test_intervals():
    assert [cli.every(text) for text in ("0", "100", "90s", "1.5m", "2h")] == [
        (0, 0.0),
        (100, 0.0),
        (0, 90.0),
        (0, 90.0),
        (0, 7200.0),
    ]


def test_checkpoints_by_time(folder):
    """They come when they come, and change nothing."""
    train(fae_train, folder, "--save-model", folder / "a")
    flags = ["--save-model", folder / "b", "--checkpoint-every", "0.01s", "--keep", "50"]
    train(fae_train, folder, *flags)
    assert len(checkpoints_in(folder / "b")) > 3
    assert_same_weights(folder / "a", folder / "b")


PEAKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import sklearn.metrics
import dlrm_s_pytorch
from slipstream.tools.runtime import peak_rss_bytes
from slipstream.training.checkpoint import Checkpoints

def peak():
    print("PEAK", peak_rss_bytes(), flush=True)

def save(*values, plain=Checkpoints.save):
    peak()
    path = plain(*values)
    peak()
    return path

Checkpoints.save = save
for more in (["--save-model"], ["--inference-only", "true", "--load-model"]):
    child = os.fork()
    if child == 0:
        dlrm_s_pytorch.main([*sys.argv[3:], *more, sys.argv[2]])
        peak()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_saving_and_loading_need_no_second_copy_of_the_rows(tmp_path):
    """Against the peak of training, by less than half of the table: 256 MB.

    31 MB for saving and -10 for loading, whatever else runs: both are forks of one process.
    """
    flags = "--data-generation random --data-size 20000 --arch-embedding-size 2000000-2000000"
    flags += " --arch-mlp-bot 13-64-16 --arch-mlp-top 64-1 --num-threads 1 --device cpu"
    command = [sys.executable, "-c", PEAKS, str(REPOSITORY), str(tmp_path / "m"), *flags.split()]
    command += ["--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    peaks = [int(line[5:]) for line in done.stdout.splitlines() if line[:5] == "PEAK "]
    trained, saved, _, loaded = peaks
    table = 4_000_000 * 16 * 4
    assert os.path.getsize(find_checkpoint(tmp_path / "m").folder / "state.npz") > table
    shutil.rmtree(tmp_path / "m")
    assert trained > table and saved < trained + table / 2 and loaded < trained + table / 2, peaks


def small_file_system(tmp_path, size):
    """A tmpfs of `size` for the current process alone; skipped where that needs more rights."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a small file system")
    where = tmp_path / "small"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where]).returncode:
        pytest.skip("cannot mount")
    return where


def test_a_full_disk_and_a_read_only_one(folder, capsys):
    """Training goes on without a checkpoint; the last good one stays; the last step insists."""
    small = small_file_system(folder, "400k")
    try:
        flags = ["--checkpoint-every", "10", "--keep", "1", "--save-model", small / "m"]
        train(fae_train, folder, *flags, "--num-batches", "20")
        kept = find_checkpoint(small / "m").folder
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 20_000))
        capsys.readouterr()
        flags += ["--load-model", "auto"]
        refused("GB are free; make room", fae_train, folder, *flags, "--num-batches", "50")
        [log] = [
            path
            for path in (folder / "runs").glob("*/log.jsonl")
            if "make room" in path.read_text()
        ]
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["kind"] == "summary" and "make room" in last["save_failure"], "they are kept"
        said = capsys.readouterr().out
        assert "no checkpoint: a checkpoint needs about" in said and "training goes on" in said
        assert [path.name for path in (small / "m").iterdir()] == [kept.name]
        open_checkpoint(kept)
        (small / "filler").unlink()
        train(fae_train, folder, *flags, "--num-batches", "50")
        gc.collect()
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        refused("Read-only file system", fae_train, folder, *flags)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_data_that_vanish_while_a_run_maps_them(folder, capsys, monkeypatch):
    """The run ends as ever; the next one says what is missing."""
    (folder / "hot_cold").unlink()
    segregate_small(folder / "small_processed.npz")
    train(fae_train, folder, "--save-model", folder / "a")
    plain = flags_module.load_segregated

    def vanishing(*values):
        prepared = plain(*values)
        shutil.rmtree(folder / "hot_cold")
        return prepared

    monkeypatch.setattr(flags_module, "load_segregated", vanishing)
    flags = ["--save-model", folder / "b"]
    train(fae_train, folder, *flags)
    assert_same_weights(folder / "a", folder / "b")
    refused("hot_cold is not a folder", fae_train, folder, *flags, "--load-model", "auto")
    find_checkpoint(folder / "b")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("trainer", "progress", "step"), -1),
        (("trainer", "progress", "epoch"), "x"),
        (("trainer", "progress", "best"), {}),
        (("trainer", "progress", "validations"), [5]),
        (("trainer", "progress", "unknown"), 1),
        (("trainer", "progress"), None),
        (("trainer", "order_check"), [1, 2]),
        (("trainer", "clocks"), []),
        (("trainer", "progress", "drops"), "x"),
        (("plan", "position"), 10**12),
        (("plan", "position"), 3.5),
        (("plan", "next"), [3.5, 0]),
        (("plan", "num_replaced"), None),
        (("plan", "num_trained"), [None, 1]),
        (("step", "loss_sum"), 1e308),
        (("plan", "next"), [0, -1]),
        (("plan", "mixed"), [10**12, 10**12]),
        (("plan", "num_inputs"), [1, 2]),
        (("rule", "targets"), ["x"]),
        (("rule", "snapshot_at"), None),
        (("step", "loss_sum"), "x"),
        (("step",), []),
    ],
)
def test_a_forged_checkpoint_is_refused(folder, place, value):
    """Its checksums are right, its contents are not: one line, whatever they are."""
    flags = ["--alpha", "0.5", *WINDOW, "--save-model", folder / "m", "--num-batches", "45"]
    train(slipstream_train, folder, *flags)
    path = find_checkpoint(folder / "m").folder / "checkpoint.json"
    described = json.loads(path.read_text())
    described.pop("checksum")
    inside = described["values"]
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    described["checksum"] = checksum_of(described)
    path.write_text(json.dumps(described))
    flags[-1] = "60"
    message = str(path.parent)
    if place[-1] == "order_check":  # as those have that were written before streams were spawned
        message = "another version of Slipstream"
    refused(message, slipstream_train, folder, *flags, "--load-model", "auto")


@pytest.mark.parametrize("name", ["rows", "step.network.top_l.0.bias", "rule.before", "trap"])
def test_forged_arrays_are_refused(folder, name):
    """Of other shapes, or pickled."""
    flags = ["--alpha", "0.5", *WINDOW, "--save-model", folder / "m", "--num-batches", "35"]
    train(slipstream_train, folder, *flags)
    path = find_checkpoint(folder / "m").folder
    arrays = {key: np.array(array) for key, array in open_npz(path / "state.npz").items()}
    assert name == "trap" or name in arrays
    arrays[name] = np.array([print], object) if name == "trap" else np.zeros((3, 3), np.float32)
    np.savez(path / "state.npz", **arrays)
    described = json.loads((path / "checkpoint.json").read_text())
    described.pop("checksum")
    described["state"] = fingerprint(path / "state.npz")
    described["checksum"] = checksum_of(described)
    (path / "checkpoint.json").write_text(json.dumps(described))
    message = "no checkpoint that is whole" if name == "trap" else str(path)
    flags[-1] = "60"
    refused(message, slipstream_train, folder, *flags, "--load-model", "auto")
