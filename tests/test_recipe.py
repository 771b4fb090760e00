"""The rule that decides on mini-batch, rates and decay, and the benches that chose and judge it."""

import csv
import re

import numpy as np
import pytest
from helpers import MODEL_FLAGS, write_processed
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import dlrm_s_pytorch
from bench import quality, recipe_grid, tune
from slipstream.logs.processed import load_processed
from slipstream.training import progress
from slipstream.training.recipe import MINI_BATCHES, decide, describe
from slipstream.training.sets import baseline_data

# Without what the recipe decides.
NETWORK = MODEL_FLAGS[: MODEL_FLAGS.index("--mini-batch-size")]


def test_what_is_given_stays_and_the_rest_is_decided():
    given = {"mini_batch_size": 7, "learning_rate": 0.5, "dense_learning_rate": 0.25}
    recipe = decide(10_000, "rwsadagrad", "adagrad", **given, lr_decay_share=0.0)
    assert vars(recipe) == {
        **given,
        "optimizer": "rwsadagrad",
        "dense_optimizer": "adagrad",
        "lr_decay_share": 0.0,
    }
    usual, faster = decide(10_000, "rwsadagrad"), decide(10_000, "rwsadagrad", learning_rate=0.4)
    assert usual.dense_optimizer == "adam" and faster.learning_rate == 0.4
    assert usual.dense_learning_rate == faster.dense_learning_rate < usual.learning_rate
    mixed = decide(10_000, "sgd", "adam")
    assert mixed.dense_learning_rate == usual.dense_learning_rate
    # By the cube root and the root of the mini-batch up to a size, and no further.
    sizes = [decide(1, "rwsadagrad", mini_batch_size=4**power) for power in (2, 5, 6)]
    for name, less in (("learning_rate", 4), ("dense_learning_rate", 8)):
        rates = [getattr(recipe, name) for recipe in sizes]
        assert rates == pytest.approx([rates[1] / less, rates[1], rates[1]], rel=1e-2)
    # SGD's rate is in proportion to the mini-batch, and both optimizers' are one.
    small, large = (decide(1, "sgd", mini_batch_size=size) for size in (128, 1024))
    assert large.learning_rate == 8 * small.learning_rate == large.dense_learning_rate
    assert small.dense_optimizer == "sgd"
    # A larger one diverges: 4 at mini-batch 4096 ended in NaN.
    assert decide(39_000_000, "sgd").learning_rate == large.learning_rate


def test_mini_batches_grow_with_the_log():
    sizes = [decide(num, "rwsadagrad").mini_batch_size for num in range(1, 10_000_000, 999)]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == MINI_BATCHES
    assert all(size & (size - 1) == 0 for size in sizes)
    # Chosen by validation: smaller ones on small logs, and those of large ones as they were.
    by_inputs = {6_858: 32, 15_237: 64, 42_858: 128, 131_362: 256, 857_143: 1024, 1_714_286: 2048}
    assert {num: decide(num).mini_batch_size for num in by_inputs} == by_inputs
    for num_train in (1, 40):  # not even one full mini-batch, and it says so
        assert "note: few mini-batches to learn from (1)" in describe(
            decide(num_train, "sgd"), num_train, 1
        )


def test_a_run_says_and_logs_what_was_decided(tmp_path, capsys, monkeypatch):
    """And where it stands: a few times an epoch on the screen, oftener in the log."""
    monkeypatch.setattr(progress, "PRINT_FREQ", 2)
    processed = write_processed(tmp_path / "p.npz", 4000)
    words = ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path), *NETWORK]
    dlrm_s_pytorch.main([*words, "--device", "cpu", "--run-name", "a"])
    recipe = decide(3429, "rwsadagrad")
    said = capsys.readouterr().out
    assert f"training on 3,429 inputs, in mini-batches of {recipe.mini_batch_size}\n" in said
    assert "(adam), to 0 over the last 30% of inputs\n" in said
    num_steps = -(-3429 // recipe.mini_batch_size)
    assert 3 <= len(re.findall("^step .* inputs trained", said, re.M)) <= progress.MOST_LINES
    logged, *rest = (tmp_path / "a/log.jsonl").read_text().splitlines()
    assert sum('"kind": "training"' in line for line in rest) == num_steps // 2
    assert progress.report_freqs(7, 10**6) == (7, 7)  # what is asked for is given
    for name, value in vars(recipe).items():
        assert f'"{name}": {value}' in logged or f'"{name}": "{value}"' in logged


def test_a_model_that_learned_nothing_is_said_to_be_one(tmp_path, capsys):
    processed = write_processed(tmp_path / "p.npz", 4000)
    words = ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path), *NETWORK]
    dlrm_s_pytorch.main([*words, "--learning-rate", "1e-9", "--num-batches", "1"])
    said = capsys.readouterr().out
    assert "note: few mini-batches to learn from (1)" in said
    assert "the log loss is above that of always answering the share of clicks" in said


def test_the_grid_goes_on_and_tabulates(tmp_path, capsys):
    processed, path = write_processed(tmp_path / "p.npz", 1500), tmp_path / "grid.csv"
    words = ["--logs", f"small={processed}", f"less={processed}@900", "--csv", str(path)]
    words += ["--mini-batch-sizes", "64", "--dense-learning-rates", "0.002", "--num-seeds", "2"]
    recipe_grid.main([*words, "--learning-rates", "0.05", *NETWORK])
    first = path.read_text()
    recipe_grid.main([*words, "--learning-rates", "0.05", "0.2", *NETWORK])
    assert path.read_text().startswith(first)
    lines = list(csv.DictReader(path.open()))
    assert len(lines) == 8 + 4 and {line["num_train"] for line in lines} == {"1286", "900"}
    # The best cell by its mean over seeds, computed anew.
    aucs = {
        rate: np.mean(
            [
                float(line["val_auc"])
                for line in lines
                if (line["log"], float(line["learning_rate"])) == ("small", rate)
                and float(line["dense_learning_rate"]) == 0.002
            ]
        )
        for rate in (0.05, 0.2)
    }
    best = max(aucs, key=aucs.get)
    said = capsys.readouterr().out.splitlines()
    row = next(line for line in said[::-1] if line.startswith("| small | 1,286 | 64 |"))
    assert f"| {best:g} | 0.002 | 0.3 | {aucs[best]:.4f} ±" in row
    assert len({line["val_auc"] for line in lines}) > 4
    # What the recipe decides is among them.
    recipe = decide(1286, "rwsadagrad")
    rates = f"{recipe.learning_rate:g}", f"{recipe.dense_learning_rate:g}"
    kept = [
        float(line["val_auc"])
        for line in lines
        if (line["log"], line["learning_rate"], line["dense_learning_rate"]) == ("small", *rates)
    ]
    assert len(kept) == 2
    mine = f"| small | {recipe.mini_batch_size}, {recipe.learning_rate:g} and "
    assert any(line.startswith(mine) and f"| {np.mean(kept):.4f} ±" in line for line in said)
    path.write_text("log,auc\nx,1\n")
    with pytest.raises(ValueError, match="has other columns"):
        recipe_grid.main([*words, *NETWORK])


def test_quality_beside_a_regression_of_its_own(tmp_path, monkeypatch, capsys):
    processed = write_processed(tmp_path / "p.npz", 4000)
    monkeypatch.setattr(quality, "boosted", lambda *values: None)
    lines = quality.main(
        ["--processed-data-file", str(processed), "--costs", "0.3", "--num-seeds", "2"]
        + ["--num-samples", "30", *NETWORK]
    )
    # One-hot by hand, in dense numpy.
    data = baseline_data(load_processed(str(processed))).data
    blocks = []
    for inputs in (data.cold, data.test, data.val):
        dense, slots, labels = (value.numpy() for value in inputs.batch(slice(None)))
        hot = np.zeros((len(labels), 1348))
        hot[np.arange(len(labels))[:, None], slots] = 1
        blocks.append((np.concatenate([dense, hot], axis=1), labels))
    model = LogisticRegression(C=0.3, max_iter=3000).fit(*blocks[0])
    scores = [model.decision_function(block[0]) for block in blocks[1:]]
    [test, whole] = [line for line in lines if line["model"].startswith("logistic")]
    assert test["auc"] == pytest.approx(roc_auc_score(blocks[1][1], scores[0]), abs=2e-3)
    labels = np.concatenate([block[1] for block in blocks[1:]])
    assert whole["auc"] == pytest.approx(roc_auc_score(labels, np.concatenate(scores)), abs=2e-3)
    assert whole["low"] < whole["auc"] < whole["high"] and whole["inputs"] == len(labels)
    ours = lines[2]
    assert ours["seeds"] == 2 and ours["differs_low"] == ours["differs_high"] == 0
    assert whole["differs_low"] <= ours["auc"] - whole["auc"] <= whole["differs_high"]
    assert "the whole held-out day, 571 inputs" in capsys.readouterr().out


def test_tuning_goes_on_and_falls_back_to_the_defaults(tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    processed = write_processed(tmp_path / "p.npz", 1500)
    words = ["--processed-data-file", str(processed), "--num-seeds", "2", "--max-inputs", "900"]
    words += ["--arch-sparse-feature-size", "8", "--max-runs"]
    tune.main([*words, "2"])
    assert capsys.readouterr().out.count("\nrun ") + 1 == 2
    tune.main([*words, "3"])
    said = capsys.readouterr().out
    assert said.startswith("2 runs are in ") and "run 3:" in said and "\nuse" in said
    # A better one is told from noise, and its mini-batch grows with the log.
    monkeypatch.setattr(
        tune, "validated", lambda data, values, args, seed: values["learning_rate"] + seed / 1e6
    )
    words[1] = str(write_processed(tmp_path / "q.npz", 1600))
    found = tune.main([*words, "5"])
    assert found[:3] == ["--optimizer", "rwsadagrad", "--mini-batch-size"] and float(found[5]) > 0.1


def test_tuning_without_its_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install optuna"):
        tune.main(["--processed-data-file", "p.npz"])
