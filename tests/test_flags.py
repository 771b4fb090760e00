"""Each flag reaches what it is for."""

import json

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS

import dlrm_s_pytorch
import slipstream_train
from dlrm_s_pytorch import DLRM_Net
from slipstream.training.drop_flags import MIN_STEPS
from slipstream.training.dropping import DropSettings
from slipstream.training.recipe import decide
from slipstream.training.trainer import Trainer

ADAM_AT_32 = decide(1, "rwsadagrad", mini_batch_size=32).dense_learning_rate
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
    "--drop-min-steps 7": ("min_steps", 7),
    "--drop-of-all 12.5": ("of_all", 0.125),
    "--drop-policy x.py:f --drop-policy-args a=1 b=c": ("options", {"a": 1, "b": "c"}),
}


@pytest.mark.parametrize("flag", ["", *DROP_FLAGS])
def test_drop_flags_reach_the_rule(flag, segregated, monkeypatch):
    seen = []
    monkeypatch.setattr(slipstream_train, "run_training", lambda *values: seen.append(values))
    words = [*MODEL_FLAGS, *flag.split(), "--save-dropped", "a.csv"]
    slipstream_train.main(["--segregated-data-dir", str(segregated), *words])
    *_, drop, file = seen[0]
    expected = (
        vars(DropSettings()) | {"min_steps": MIN_STEPS} | (dict([DROP_FLAGS[flag]]) if flag else {})
    )
    if drop.options:
        expected["policy"] = "x.py:f"
    assert vars(drop) == expected and file == "a.csv"


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
            self.model = trainer.step.model.network

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
    expected = [0.5, 0.5, 0.5, 1, 0.75**2, 0.5**2, 0.25**2, 0.25**2]
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


@pytest.mark.parametrize(
    ("flags", "optimizer", "ratio"),
    [
        ("--optimizer sgd", "SGD", 1),
        ("--optimizer rwsadagrad", "Adam", ADAM_AT_32 / 0.2),
        ("--optimizer rwsadagrad --dense-optimizer adagrad", "Adagrad", 1),
        ("--optimizer sgd --dense-optimizer adam --dense-learning-rate 0.05", "Adam", 0.25),
        ("--optimizer rwsadagrad --dense-optimizer sgd --dense-learning-rate 0.4", "SGD", 2),
    ],
)
def test_the_networks_optimizer_and_rate(processed, tmp_path, monkeypatch, flags, optimizer, ratio):
    """Its rate follows the rows' through the whole schedule; a short last batch scales both."""
    flags = [*flags.split(), "--lr-num-warmup-steps", "50", "--lr-decay-share", "0.3"]
    spy = run(processed, tmp_path, monkeypatch, *flags)
    assert spy.optimizer == optimizer
    # 3,429 inputs by 32: the last batch is of 5.
    assert len(spy.rates) == 108 and len(spy.inputs[-1][1]) == 5
    assert spy.mlp_rates == pytest.approx([ratio * rate for rate in spy.rates])
    assert spy.rates[0] == pytest.approx(0.2 / 50) and max(spy.rates) == pytest.approx(0.2)
    scale = 1 if optimizer == "SGD" and "rwsadagrad" not in flags else 5 / 32
    assert spy.rates[-1] == pytest.approx(0.2 * 5 / 3429 / 0.3 * scale, rel=1e-3)


def test_reported_losses_are_means_since_the_last_report(processed, tmp_path, monkeypatch):
    """Without learning every loss is near the first one: nothing is added up twice."""
    spy = run(processed, tmp_path, monkeypatch, "--test-freq", "20", "--learning-rate", "1e-9")
    lines = (tmp_path / next(tmp_path.glob("baseline-*/log.jsonl"))).read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "evaluation"]
    assert len(losses) > 4 and np.ptp(losses) < 0.2 * losses[0]
    assert spy.summary["paused_s"] > 0 and spy.summary["training_s"] > 0


def test_precision_reaches_training_and_evaluation(processed, tmp_path, monkeypatch):
    plain, seen = DLRM_Net.forward, []

    def forward(model, dense, rows):
        logits = plain(model, dense, rows)
        seen.append((torch.is_grad_enabled(), logits.dtype))
        return logits

    monkeypatch.setattr(DLRM_Net, "forward", forward)
    weights = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        spy = run(processed, tmp_path, monkeypatch, "--num-batches", "3", "--precision", precision)
        # First of all the network is tried, always in fp32: twice with gradients, twice without.
        assert seen[:4] == [(True, torch.float32)] * 2 + [(False, torch.float32)] * 2
        assert set(seen[4:]) == {(True, dtype), (False, dtype)}
        weights[precision] = spy.model.bot_l[0].weight
        assert weights[precision].dtype == torch.float32
    assert not torch.equal(*weights.values())
    torch.testing.assert_close(*weights.values(), rtol=0.05, atol=1e-2)


def test_a_threshold_takes_all_that_is_stale(capsys):
    with pytest.raises(SystemExit):
        words = "--segregated-data-dir x --threshold 0.1 --drop-of-all 25".split()
        slipstream_train.parse_args(words)
    assert "give --drop-of-all 100 with it" in capsys.readouterr().err


def test_settings_are_logged(processed, tmp_path, monkeypatch):
    run(processed, tmp_path, monkeypatch, "--num-batches", "1", "--num-threads", "1")
    [path] = tmp_path.glob("baseline-*/log.jsonl")
    start, *_, summary = map(json.loads, path.read_text().splitlines())
    settings = start["settings"]
    assert settings["threads"] == 1 and settings["precision"] == "fp32"
    assert settings["matrix_products"] in ("onednn", "default") and settings["thread_wait"]
    assert summary["involuntary_switches_per_s"] >= 0
    assert summary["peak_rss_bytes"] > 1e7 and summary["peak_device_bytes"] is None


def test_tf32_is_refused_on_a_cpu(processed, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tf32 is CUDA's"):
        run(processed, tmp_path, monkeypatch, "--precision", "tf32")


def test_compile_reaches_the_model(processed, tmp_path, monkeypatch):
    """What is compiled here stays plain Python: only that the flag leads there."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    run(processed, tmp_path, monkeypatch, "--num-batches", "1", "--compile", "true")
    assert len(compiled) == 1


def test_reported_losses_are_means_of_weighted_inputs_too(segregated, tmp_path):
    """Without learning the loss stays where it was, though kept inputs count five times."""
    summary = slipstream_train.main(
        ["--segregated-data-dir", str(segregated), "--runs-dir", str(tmp_path), *MODEL_FLAGS]
        + "--learning-rate 1e-9 --test-freq 10 --drop-percentage 80 --stale-keep-rate 0.2".split()
        + ["--count-untouched-as-stale", "true", "--run-name", "kept"]
    )
    assert summary["dropped"] > 0
    lines = (tmp_path / "kept/log.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "evaluation"]
    assert len(losses) > 4 and np.ptp(losses) < 0.3 * losses[0]
