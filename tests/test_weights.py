"""Weights of inputs: in the loss, in every metric, and through every way to the step."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_FLAGS,
    TABLE_SIZES,
    assert_same_weights,
    click_model,
    dlrm,
    saved_rows,
    segregate_small,
    small_arrays,
    write_processed,
)
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

import dlrm_s_pytorch
import fae_train
import slipstream_train
from dlrm_data_pytorch import load_processed, load_segregated
from slipstream.logs.formats import equal_days
from slipstream.tools.metrics import click_metrics
from slipstream.training.batching import EpochPlan
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.embedding import EmbeddingTable, StagedBatch
from slipstream.training.loader import Loader
from slipstream.training.optimizers import make_optimizer
from slipstream.training.sets import DeviceInputs
from slipstream.training.step import TrainStep

NUM_ROWS = 1400
CPU = torch.device("cpu")


def weights_of():
    """Whole numbers from 0 to 3, so that an input can be there as often as it counts.

    Those of test and validation inputs add up to the same.
    """
    weights = np.random.default_rng(5).integers(0, 4, NUM_ROWS).astype(np.float32)
    weights[-100:] = weights[-200:-100]
    return weights


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """A folder with a weighted log and its segregation."""
    folder = tmp_path_factory.mktemp("weighted")
    segregate_small(write_processed(folder / "p.npz", NUM_ROWS, weights=weights_of()))
    return folder


def train(script, folder, runs, *flags):
    data = ["--segregated-data-dir", folder / "hot_cold"]
    if script is slipstream_train:
        flags = ["--drop-min-steps", 0, *flags]
    if script is dlrm_s_pytorch:
        data = ["--processed-data-file", folder / "p.npz"]
    flags = [*data, *MODEL_FLAGS, "--runs-dir", runs, *flags]
    return script.main([str(flag) for flag in flags])


pairs = st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3))


@given(st.lists(pairs, min_size=1, max_size=50))
def test_metrics_are_scikit_learns_and_those_of_repeated_inputs(rows):
    logits = np.array([logit for logit, _, _ in rows], np.float32)
    labels = np.array([label for _, label, _ in rows], np.int8)
    weights = np.array([weight for *_, weight in rows], np.float32)
    metrics = click_metrics(logits, labels, weights)
    times = weights.astype(int)
    repeated = click_metrics(logits.repeat(times), labels.repeat(times))
    assert metrics == pytest.approx(repeated, nan_ok=True)
    if times.sum() == 0:
        assert all(math.isnan(value) for value in metrics.values())
        return
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    given = {"sample_weight": weights}
    assert metrics["log_loss"] == pytest.approx(
        log_loss(labels, probability, labels=[0, 1], **given)
    )
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, probability > 0.5, **given))
    if len(set(labels[times > 0])) == 2:
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits, **given))


def stepped(optimizer, dense_optimizer, chosen, weights, label_weights=None):
    """A model and its rows after one full batch of some of 6 inputs."""
    rng = np.random.default_rng(1)
    dense = torch.from_numpy(rng.random((6, 3), np.float32))
    slots = torch.tensor([[0, 1], [1, 2], [0, 3], [4, 5], [6, 7], [8, 9]])
    labels = torch.tensor([0.0, 1, 1, 0, 1, 0])
    network = dlrm([3, 4, 2], [4, 1], 2, seed=1)
    rows = torch.from_numpy(rng.random((10, 2), np.float32))
    table = EmbeddingTable(rows.clone(), 10, 100, CPU, optimizer)
    step = TrainStep(
        click_model(network, 2),
        table,
        make_optimizer(network, dense_optimizer),
        len(chosen),
        label_weights=label_weights,
    )
    step(
        dense[chosen],
        StagedBatch(slots[chosen]),
        labels[chosen],
        None if weights is None else torch.tensor(weights),
        0.1,
    )
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    return {**parameters, **table.read(slice(None)), "loss": torch.tensor(step.peek_loss_sum())}


@pytest.mark.parametrize("optimizers", [("sgd", "sgd"), ("rwsadagrad", "adam")])
def test_an_input_of_weight_2_is_two_and_one_of_0_is_none(optimizers):
    twice = stepped(*optimizers, [0, 1, 2, 2], None)
    got = stepped(*optimizers, [0, 1, 2, 3], [1.0, 1.0, 2.0, 0.0])
    for name, value in twice.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    # Its rows stay bit for bit, and another one in its place changes nothing.
    before = stepped(*optimizers, [0, 1, 2, 3], [0.0, 0.0, 0.0, 0.0])
    assert torch.equal(got["rows"][[4, 5]], before["rows"][[4, 5]])
    other = stepped(*optimizers, [0, 1, 2, 4], [1.0, 1.0, 2.0, 0.0])
    for name, value in got.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_that_of_the_weighted_loss():
    """By autograd, over the batch's size, whatever the weights add up to."""
    weights = torch.tensor([0.5, 3.0, 0.25, 1.0])
    got = stepped("sgd", "sgd", [0, 1, 2, 3], weights.tolist(), [1.0, 2.0])
    start = stepped("sgd", "sgd", [0, 1, 2, 3], [0.0] * 4)
    rng = np.random.default_rng(1)
    dense = torch.from_numpy(rng.random((6, 3), np.float32))[:4]
    network = dlrm([3, 4, 2], [4, 1], 2, seed=1)
    rows = start["rows"].clone().requires_grad_()
    labels = torch.tensor([0.0, 1, 1, 0])
    logits = network(dense, rows[torch.tensor([[0, 1], [1, 2], [0, 3], [4, 5]])])
    losses = torch.log1p(torch.exp(torch.where(labels > 0, -logits, logits)))
    loss_sum = (losses * weights * torch.tensor([1.0, 2, 2, 1])).sum()
    (loss_sum / 4).backward()
    torch.testing.assert_close(got["rows"], (rows - 0.1 * rows.grad).detach())
    for name, value in network.named_parameters():
        torch.testing.assert_close(got[name], (value - 0.1 * value.grad).detach())
    torch.testing.assert_close(got["loss"], loss_sum.detach())


def test_a_weighted_log_trains_as_one_of_repeated_rows(tmp_path):
    """In one batch, where a rate over more inputs is larger: weights, loss and all metrics."""
    dense, ids, y = small_arrays(NUM_ROWS)
    weights, days = weights_of(), equal_days(NUM_ROWS)
    times = weights.astype(int)
    ends = np.concatenate([[0], np.cumsum(times)])[days]
    repeated = {
        "X_int": dense.repeat(times, 0),
        "X_cat": ids.repeat(times, 0),
        "y": y.repeat(times),
    }
    logs = {"once": {"weights": weights}, "often": {**repeated, "days": ends}}
    summaries = {}
    for name, num_train in (("once", int(days[-2])), ("often", int(ends[-2]))):
        (tmp_path / name).mkdir()
        write_processed(tmp_path / name / "p.npz", NUM_ROWS, **logs[name])
        rate = 0.05 * num_train / ends[-2]
        flags = ["--mini-batch-size", num_train, "--nepochs", 3, "--learning-rate", rate]
        flags += ["--save-model", tmp_path / f"{name}-model"]
        summaries[name] = train(dlrm_s_pytorch, tmp_path / name, tmp_path / "runs", *flags)
    for name in ("loss", "auc", "log_loss", "accuracy", "normalized_entropy", "test_click_rate"):
        assert summaries["once"][name] == pytest.approx(summaries["often"][name], rel=1e-4), name
    for name, value in summaries["once"]["val"].items():
        assert value == pytest.approx(summaries["often"]["val"][name], rel=1e-4)
    first, second = saved_rows(tmp_path / "once-model"), saved_rows(tmp_path / "often-model")
    for name in (name for name in first if name.startswith(("rows", "network."))):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_weights_of_1_change_no_bit(tmp_path, capsys):
    for name, weights in (("plain", {}), ("ones", {"weights": np.ones(NUM_ROWS, np.float32)})):
        (tmp_path / name).mkdir()
        segregate_small(write_processed(tmp_path / name / "p.npz", NUM_ROWS, **weights))
        flags = ["--save-model", tmp_path / f"{name}-model", "--nepochs", 2]
        train(slipstream_train, tmp_path / name, tmp_path / "runs", *flags)
    assert_same_weights(tmp_path / "plain-model", tmp_path / "ones-model")
    assert "inputs weigh" not in capsys.readouterr().out


KEPT = ["--alpha", "0.5", "--snapshot-window", "0.3", "--stale-keep-rate", "0.4", "--nepochs", 2]


def test_any_number_of_resident_rows_and_a_run_that_goes_on(weighted, tmp_path, capsys):
    """With loss weights of kept inputs on top."""
    expected = train(slipstream_train, weighted, tmp_path, *KEPT, "--save-model", tmp_path / "all")
    said = capsys.readouterr().out
    mean = weights_of()[:1200].mean()
    assert f"note: the training inputs weigh {mean:.4g} on average" in said
    log = [json.loads(line) for line in open(expected["log"])]
    assert log[0]["mean_weight"] == pytest.approx(float(mean))
    assert log[-2]["kind"] == "evaluation"
    [drop, _] = expected["drops"]
    assert drop["kept_reweighted"] > 0 and 0 < expected["hot_share"] < 1
    for num_resident in (0, 60):
        where = ["--num-resident", num_resident, "--overlap", "true"]
        where += ["--save-model", tmp_path / str(num_resident)]
        got = train(slipstream_train, weighted, tmp_path, *KEPT, *where)
        assert_same_weights(tmp_path / str(num_resident), tmp_path / "all")
        assert {name: got[name] for name in ("loss", "auc", "val")} == {
            name: expected[name] for name in ("loss", "auc", "val")
        }
    for steps in (30, 0):  # in the first epoch, after the choice
        flags = [*KEPT, "--save-model", tmp_path / "twice", "--load-model", "auto"]
        got = train(slipstream_train, weighted, tmp_path, *flags, "--num-batches", steps)
    assert_same_weights(tmp_path / "twice", tmp_path / "all")
    assert got["log_loss"] == expected["log_loss"]


@pytest.mark.parametrize("script", [dlrm_s_pytorch, fae_train])
def test_streamed_equals_in_memory(weighted, tmp_path, script):
    summaries = []
    for name, memory in (("plenty", "1G"), ("streamed", "20K")):
        flags = ["--data-randomize", "none", "--max-memory", memory]
        flags += ["--save-model", tmp_path / name]
        summaries.append(train(script, weighted, tmp_path, *flags))
    assert_same_weights(tmp_path / "plenty", tmp_path / "streamed")
    assert summaries[0]["auc"] == summaries[1]["auc"]
    assert load_processed(weighted / "p.npz", 20_000).inputs.window


def test_every_input_keeps_its_weight(tmp_path):
    """In a segregated folder, in batches of both kinds of sets, and for one's own program."""
    numbers = np.arange(NUM_ROWS, dtype=np.float32)
    dense = np.repeat(numbers[:, None], 3, axis=1).astype(np.int32)
    processed = write_processed(tmp_path / "p.npz", NUM_ROWS, X_int=dense, weights=numbers)
    data = load_segregated(segregate_small(processed), processed).data
    for inputs in (data.hot, data.cold, data.test, data.val):
        assert len(inputs) and np.array_equal(inputs.weights, inputs.dense[:, 0])
        part, chosen = inputs.rows(7, 20), np.array([3, 0, 9])
        moved = DeviceInputs(part, CPU)
        for of in (part, moved):
            dense, _, _ = of.batch(chosen)
            np.testing.assert_allclose(
                of.weights_of(chosen), np.expm1(dense[:, 0].numpy()), rtol=1e-5
            )
    whole = load_processed(processed)
    assert np.array_equal(whole.inputs.weights_of(slice(5, 9)), [5, 6, 7, 8])
    plan = EpochPlan(np.arange(6), np.arange(0), 4, "interleaved")
    plan.replace(True, np.array([5, 2, 1]), np.array([1.0, 2.5, 4.0], np.float32))
    table = EmbeddingTable(torch.rand(int(TABLE_SIZES.sum()), 2), 0, 100, CPU)
    loader = Loader(data.hot, data.cold, table, False, False)
    loader.start(plan)
    batch = loader.next()
    expected = data.hot.weights[[5, 2, 1]] * np.array([1, 2.5, 4], np.float32)
    assert np.array_equal(batch.weights.numpy(), expected)
    assert batch.weight_sum == expected.sum()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda weights: weights.__setitem__(700, -1),
            "weights that are negative, NaN or infinite",
        ),
        (lambda weights: weights.__setitem__(700, np.nan), "weights that are negative, NaN or inf"),
        (lambda weights: weights.__setitem__(700, np.inf), "weights that are negative, NaN or inf"),
        (lambda weights: weights.__setitem__(slice(0, 1200), 0), "all weights of the training"),
        (lambda weights: weights.__setitem__(slice(1200, 1300), 0), "all weights of the test"),
        (
            lambda weights: weights.__setitem__(slice(1300, 1400), 0),
            "all weights of the validation",
        ),
    ],
)
def test_bad_weights_are_refused(tmp_path, spoil, message):
    """Those of single inputs also where they are streamed, as they are read."""
    weights = weights_of()
    spoil(weights)
    path = write_processed(tmp_path / "p.npz", NUM_ROWS, weights=weights)
    with pytest.raises(ValueError, match=message):
        load_processed(path)
    with pytest.raises(ValueError, match=message):
        inputs = load_processed(path, 10_000).inputs
        inputs.weights_of(slice(0, 700))
        inputs.weights_of(np.array([1, 700]))


def test_weights_of_other_shapes_and_types(tmp_path):
    path = tmp_path / "p.npz"
    for weights, message in (
        (np.ones(NUM_ROWS - 1, np.float32), "different lengths"),
        (np.ones((NUM_ROWS, 1), np.float32), "weights has 2 dimensions"),
        (np.full(NUM_ROWS, 1e300), "weights that are negative, NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            load_processed(write_processed(path, NUM_ROWS, weights=weights))
    inputs = load_processed(
        write_processed(path, NUM_ROWS, weights=weights_of().astype(int))
    ).inputs
    assert inputs.weights.dtype == np.float32 and np.array_equal(inputs.weights, weights_of())
    assert load_processed(write_processed(path, NUM_ROWS)).inputs.weights_of(slice(0, 3)) is None


def test_an_input_of_weight_0_touches_no_row():
    """Rows that it alone uses are not shown to be stale."""
    rule = DropRule(DropSettings(start=0.0), 8, 0, lambda record: None)
    rule.window.begin(0, torch.zeros(8, 1))
    rule.touch(torch.tensor([[0, 1], [2, 3]]), torch.tensor([1.0, 0.0]))
    assert rule.window.touched[:8].tolist() == [True, True, *[False] * 6]


def test_policies_see_weights_and_plain_losses(weighted, tmp_path):
    """The loss is that of an input as such; who wants it weighted multiplies."""
    policy = tmp_path / "policy.py"
    policy.write_text(
        "import torch\n\ndef light(chunk):\n"
        "    assert chunk.weights.shape == chunk.losses().shape and (chunk.losses() > 0).all()\n"
        "    assert set(chunk.weights.tolist()) == {0.0, 1.0, 2.0, 3.0}\n"
        "    return chunk.weights\n"
    )
    flags = ["--drop-policy", f"{policy}:light", "--drop-percentage", 20, "--snapshot-window", 0.2]
    summary = train(slipstream_train, weighted, tmp_path, *flags)
    assert summary["dropped"] > 0
