"""Each flag reaches what it is for."""

import json

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS

import dlrm_s_pytorch
import slipstream_train
from slipstream.staleness import DropSettings
from slipstream.trainer import Trainer

DROP_FLAGS = {
    "--drop-policy random": ("policy", "random"),
    "--drop-percentage 12": ("drop_fraction", 0.12),
    "--alpha 0.5": ("alpha", 0.5),
    "--threshold 0.25": ("threshold", 0.25),
    "--sample-rate 0.125": ("sample_rate", 0.125),
    "--snapshot-start 0.5": ("start", 0.5),
    "--snapshot-window 0.125": ("window", 0.125),
    "--recalibrate-every 0.2": ("recalibrate_every", 0.2),
    "--stale-keep-rate 0.3": ("keep_rate", 0.3),
    "--stratify-drop true": ("stratify", True),
    "--count-untouched-as-stale true": ("count_untouched_as_stale", True),
}


@pytest.mark.parametrize("flag", ["", *DROP_FLAGS])
def test_drop_flags_reach_the_rule(flag, segregated, monkeypatch):
    seen = []
    monkeypatch.setattr(slipstream_train, "run_training", lambda *values: seen.append(values))
    slipstream_train.main(["--segregated-data-dir", str(segregated), *MODEL_FLAGS, *flag.split()])
    expected = vars(DropSettings()) | (dict([DROP_FLAGS[flag]]) if flag else {})
    assert vars(seen[0][-1]) == expected


class Spy:
    """Records what each training step is given, and what it changes."""

    def __init__(self, monkeypatch):
        self.rates, self.mlp_rates, self.inputs, self.seeds = [], [], [], None
        step = Trainer._train_step

        def spied(trainer, batch):
            self.inputs.append((batch.planned.hot, batch.planned.inputs.tolist()))
            update = trainer.table.update

            def update_spied(staged, gradient, learning_rate):
                self.rates.append(learning_rate)
                update(staged, gradient, learning_rate)

            with monkeypatch.context() as patch:
                patch.setattr(trainer.table, "update", update_spied)
                step(trainer, batch)
            self.mlp_rates.append(trainer.step.optimizer.param_groups[0]["lr"])
            self.optimizer = type(trainer.step.optimizer).__name__
            self.model = trainer.step.model

        monkeypatch.setattr(Trainer, "_train_step", spied)


def run(processed, tmp_path, monkeypatch, *flags):
    spy = Spy(monkeypatch)
    spy.summary = dlrm_s_pytorch.main(
        ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path), *MODEL_FLAGS, *flags]
    )
    return spy


def test_every_step_has_its_learning_rate(processed, tmp_path, monkeypatch):
    flags = "--num-batches 8 --learning-rate 1 --lr-num-warmup-steps 2 --lr-decay-start-step 4"
    spy = run(processed, tmp_path, monkeypatch, *flags.split(), "--lr-num-decay-steps", "4")
    expected = [0.5, 1, 1, 1, 1, 0.75**2, 0.5**2, 0.25**2]
    assert spy.rates == pytest.approx(expected) and spy.mlp_rates == pytest.approx(expected)


def test_every_epoch_has_its_order(processed, tmp_path, monkeypatch):
    spy = run(processed, tmp_path, monkeypatch, "--nepochs", "2")
    inputs = [index for _, batch in spy.inputs for index in batch]
    half = len(inputs) // 2
    assert sorted(inputs[:half]) == sorted(inputs[half:]) == list(range(half))
    assert inputs[:half] != inputs[half:]
    assert all(len(batch) == 32 for _, batch in spy.inputs[: half // 32])


@pytest.mark.parametrize("randomize", ["none", "day"])
def test_data_randomize(processed, tmp_path, monkeypatch, randomize):
    spy = run(processed, tmp_path, monkeypatch, "--data-randomize", randomize)
    inputs = [index for _, batch in spy.inputs for index in batch]
    assert (inputs == list(range(3429))) == (randomize == "none")
    assert sorted(inputs[:572]) == list(range(572))  # the first day's rows come first


def test_model_flags(processed, tmp_path, monkeypatch):
    plain = run(processed, tmp_path, monkeypatch, "--num-batches", "1").model
    itself = run(
        processed, tmp_path, monkeypatch, "--num-batches", "1", "--arch-interaction-itself", "true"
    ).model
    cat = run(
        processed, tmp_path, monkeypatch, "--num-batches", "1", "--arch-interaction-op", "cat"
    )
    widths = [model.top_l[0].in_features for model in (plain, itself, cat.model)]
    assert widths == [8 + 15, 8 + 21, 8 * 6]
    other = run(processed, tmp_path, monkeypatch, "--num-batches", "1", "--seed", "9").model
    assert not torch.equal(plain.bot_l[0].weight, other.bot_l[0].weight)


def test_row_wise_adagrad_comes_with_adagrad(processed, tmp_path, monkeypatch):
    spy = run(processed, tmp_path, monkeypatch, "--num-batches", "2", "--optimizer", "rwsadagrad")
    assert spy.optimizer == "Adagrad"


def test_reported_losses_are_means_since_the_last_report(processed, tmp_path, monkeypatch):
    """Without learning every loss is near the first one: nothing is added up twice."""
    spy = run(processed, tmp_path, monkeypatch, "--test-freq", "20", "--learning-rate", "1e-9")
    lines = (tmp_path / next(tmp_path.glob("baseline-*/log.jsonl"))).read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "evaluation"]
    assert len(losses) > 4 and np.ptp(losses) < 0.2 * losses[0]
    assert spy.summary["paused_s"] > 0 and spy.summary["training_s"] > 0
