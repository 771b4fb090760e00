"""Logs of which nothing is held out, and held-out rows of logs whose training rows were thinned."""

import json
import math

import numpy as np
import pytest
from helpers import segregate_small, small_arrays, train, write_processed
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

import dlrm_s_pytorch
import fae_train
import slipstream_train
from bench.compare import test_freq as frequency
from dlrm_data_pytorch import load_processed, load_segregated
from slipstream.logs.formats import equal_days
from slipstream.logs.sub_sampling import SubSampling
from slipstream.training import evaluation
from slipstream.training.saved import open_checkpoint

NUM_ROWS = 1400
SCRIPTS = {"baseline": dlrm_s_pytorch, "fae": fae_train, "slipstream": slipstream_train}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a log of which nothing is held out, and its segregation."""
    folder = tmp_path_factory.mktemp("whole")
    days = np.append(equal_days(NUM_ROWS), NUM_ROWS)
    manifest = {"split": {"rule": "none"}}
    segregate_small(write_processed(folder / "p.npz", NUM_ROWS, days=days, manifest=manifest))
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_training_without_held_out_rows_ends_well(whole, tmp_path, capsys, name):
    model = tmp_path / "model"
    flags = ["--save-model", model, "--print-freq", 10, "--checkpoint-every", 20]
    flags += ["--drop-min-steps", 0] if name == "slipstream" else []
    summary = train(SCRIPTS[name], whole, *flags)
    said = capsys.readouterr().out
    assert f"{name}: nothing was held out, so nothing is judged; loss 0." in said
    assert "nan" not in said and "AUC" not in said
    assert summary["samples"] + summary["dropped"] == NUM_ROWS
    assert summary["auc"] is summary["val"] is summary["best_val"] is None
    assert 0 < summary["loss"] < 1 and summary["weights_of_step"] == summary["step"]
    records = [json.loads(line) for line in open(summary["log"])]
    assert records[0]["num_held_out"] == 0 and records[-1]["kind"] == "summary"
    assert not {"evaluation", "validation"} & {record["kind"] for record in records}
    assert not (model / "best").exists() and len(list(model.glob("step-*"))) == 2
    # Going on: from the end with another epoch.
    longer = train(SCRIPTS[name], whole, *flags, "--load-model", "auto", "--nepochs", 2)
    assert longer["step"] > summary["step"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--val-freq", 5],
        ["--test-freq", 5],
        ["--val-freq", 5, "--mlperf-auc-threshold", 0.7],
        ["--val-freq", 5, "--patience", 2, "--save-model", "model"],
        ["--inference-only", "true", "--load-model", "model"],
    ],
)
def test_what_needs_held_out_rows_is_refused(whole, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    if "--inference-only" in flags:
        train(dlrm_s_pytorch, whole, "--save-model", "model")
    with pytest.raises(ValueError, match=f"{flags[0]}.*: nothing is held out of these data"):
        train(dlrm_s_pytorch, whole, *flags)
    assert "--inference-only" in flags or not list(tmp_path.iterdir())


def test_sets_without_held_out_rows(whole):
    for data in (
        load_segregated(whole / "hot_cold", whole / "p.npz").data,
        load_processed(whole / "p.npz"),
    ):
        test, val = (data.test, data.val) if hasattr(data, "test") else data.splits()[1:]
        assert len(test) == len(val) == 0 and test.day_offsets.tolist() == [0, 0]
    with pytest.raises(ValueError, match="p.npz holds nothing out: there is no AUC to compare"):
        frequency(str(whole / "p.npz"), [], 5)


def test_one_held_out_row_is_the_validation_set(tmp_path, capsys):
    """The run says what it cannot judge."""
    days = np.array([0, NUM_ROWS - 1, NUM_ROWS])
    write_processed(tmp_path / "p.npz", NUM_ROWS, days=days)
    summary = train(dlrm_s_pytorch, tmp_path)
    assert math.isnan(summary["auc"]) and summary["val"]["accuracy"] in (0, 1)
    assert "no test AUC: the inputs held out for it are none" in capsys.readouterr().out


def test_the_correction_is_the_formula_and_right_on_thinned_rows():
    rate = 0.75
    p = np.linspace(0.01, 0.99, 50)
    logits = np.log(p / (1 - p)) + SubSampling(rate, "whole").logit_shift
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), p / (p + (1 - p) / (1 - rate)))
    rng = np.random.default_rng(0)
    clicks = rng.random(200_000) < 0.1
    kept = clicks | (rng.random(len(clicks)) >= rate)
    thinned = clicks[kept].mean()
    shifted = math.log(thinned / (1 - thinned)) + SubSampling(rate, "whole").logit_shift
    assert 1 / (1 + math.exp(-shifted)) == pytest.approx(clicks.mean(), rel=0.01)
    assert SubSampling(rate, "thinned").held_out_shift == 0.0
    assert SubSampling(0.0, "whole").held_out_shift == 0.0


def thinned_log(folder, held_out, rate=0.6):
    """A log whose training rows without a click were thinned, in place of which others stand."""
    rng = np.random.default_rng(3)
    dense, ids, y = small_arrays(2 * NUM_ROWS)
    days = equal_days(2 * NUM_ROWS)
    keep = (y > 0) | (rng.random(len(y)) >= rate) | (np.arange(len(y)) >= days[-2])
    ends = np.concatenate([[0], np.cumsum(keep)])
    folder.mkdir()
    manifest = {"sub_sampling": {"rate": rate, "held_out": held_out}}
    members = {"X_int": dense[keep], "X_cat": ids[keep], "y": y[keep], "days": ends[days]}
    segregate_small(write_processed(folder / "p.npz", 2 * NUM_ROWS, manifest=manifest, **members))
    return folder


def test_evaluation_is_corrected_where_held_out_rows_are_whole(tmp_path, capsys, monkeypatch):
    found, metrics = [], evaluation.click_metrics

    def noted(logits, labels, weights=None):
        found.append((logits, labels))
        return metrics(logits, labels, weights)

    monkeypatch.setattr(evaluation, "click_metrics", noted)
    folder, model = thinned_log(tmp_path / "whole", "whole"), tmp_path / "model"
    corrected = train(fae_train, folder, "--save-model", model)
    line = "0.6 of the training rows without a click were left out: held-out outputs are"
    assert f"{line} corrected, logit -0.9163\n" in capsys.readouterr().out
    alone = ["--inference-only", "true", "--load-model", model]
    plain = train(fae_train, folder, *alone, "--correct-sub-sampling", "false")
    assert f"{line} not corrected" in capsys.readouterr().out
    logits, labels = found[-1]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    right = p / (p + (1 - p) / (1 - 0.6))
    assert corrected["log_loss"] == pytest.approx(log_loss(labels, right), rel=1e-6)
    assert corrected["accuracy"] == accuracy_score(labels, right > 0.5)
    assert plain["log_loss"] == pytest.approx(log_loss(labels, p), rel=1e-6)
    assert corrected["auc"] == plain["auc"] == roc_auc_score(labels, logits)
    assert corrected["log_loss"] < plain["log_loss"] - 0.02
    assert corrected["normalized_entropy"] < plain["normalized_entropy"]
    again = train(dlrm_s_pytorch, folder, *alone)
    assert again["log_loss"] == pytest.approx(corrected["log_loss"], rel=1e-6)
    assert json.loads(open(corrected["log"]).readline())["held_out_shift"] == pytest.approx(
        math.log(0.4)
    )
    [kept] = model.glob("step-*")
    assert open_checkpoint(kept).identity["data"]["sub_sampling"] == {
        "rate": 0.6,
        "held_out": "whole",
    }


def test_thinned_held_out_rows_are_judged_as_they_are(tmp_path, capsys):
    folder = thinned_log(tmp_path / "thinned", "thinned")
    first = train(fae_train, folder)
    second = train(fae_train, folder, "--correct-sub-sampling", "false")
    assert first["log_loss"] == second["log_loss"]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "described",
    ["half", {"rate": 0.5}, {"rate": 1, "held_out": "whole"}, {"rate": -0.1, "held_out": "whole"}]
    + [{"rate": "0.5", "held_out": "whole"}, {"rate": 0.5, "held_out": "some"}],
)
def test_sub_sampling_that_is_none_is_refused(tmp_path, described):
    path = write_processed(tmp_path / "p.npz", 70, manifest={"sub_sampling": described})
    with pytest.raises(ValueError, match="p.npz: its manifest's sub_sampling is .*expected a rate"):
        load_processed(path)
