import json

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_FLAGS,
    NUM_DENSE,
    TABLE_SIZES,
    assert_same_weights,
    click_model,
    dlrm,
    saved_rows,
)
from sklearn.metrics import roc_auc_score
from torch import nn

import dlrm_s_pytorch
from dlrm_data_pytorch import baseline_data, load_processed
from slipstream.training.batching import epoch_order
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.optimizers import make_optimizer
from slipstream.training.rows import initial_rows
from slipstream.training.step import TrainStep


@pytest.mark.parametrize("itself", [False, True])
def test_dot_interaction_is_all_pairs(itself):
    model = dlrm([3, 5, 4], [6, 1], 2, "dot", itself)
    dense_vector, rows = torch.rand(7, 4), torch.rand(7, 2, 4)
    got = model.interact_features(dense_vector, rows)
    for b in range(7):
        vectors = [dense_vector[b], rows[b, 0], rows[b, 1]]
        expected = list(dense_vector[b])
        for i in range(3):
            for j in range(i + 1 if itself else i):
                expected.append(vectors[i] @ vectors[j])
        torch.testing.assert_close(got[b], torch.stack(expected))
    assert model(torch.rand(7, 3), rows).shape == (7,)


def test_cat_interaction_is_the_vectors_side_by_side():
    model = dlrm([3, 4], [6, 1], 2, "cat")
    dense_vector, rows = torch.rand(7, 4), torch.rand(7, 2, 4)
    expected = torch.cat([dense_vector, rows[:, 0], rows[:, 1]], dim=1)
    assert torch.equal(model.interact_features(dense_vector, rows), expected)


def test_initial_weights_have_dlrms_spread():
    layer = dlrm([300, 500, 4], [6, 1], 2).bot_l[0]
    assert layer.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert layer.bias.std().item() == pytest.approx((1 / 500) ** 0.5, rel=0.15)


def train(processed, tmp_path, name, *flags):
    return dlrm_s_pytorch.main(
        ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path / "runs")]
        + ["--run-name", name, "--save-model", str(tmp_path / name), *MODEL_FLAGS, *flags]
    )


def test_training_equals_plain_pytorch(processed, tmp_path):
    """nn.EmbeddingBag, autograd and torch.optim.SGD end at the same weights."""
    train(processed, tmp_path, "start", "--num-batches", "1", "--learning-rate", "1e-30")
    start = saved_rows(tmp_path / "start")
    train(processed, tmp_path, "ours", "--num-batches", "40")

    log = load_processed(processed)
    model = dlrm([NUM_DENSE, 16, 8], [16, 1], len(TABLE_SIZES))
    model.load_state_dict(
        {
            name[8:]: torch.from_numpy(value)
            for name, value in start.items()
            if name.startswith("network.")
        }
    )
    rows = torch.from_numpy(start["rows"]).split(TABLE_SIZES.tolist())
    bags = nn.ModuleList(
        nn.EmbeddingBag.from_pretrained(r.clone(), freeze=False, mode="sum") for r in rows
    )
    optimizer = torch.optim.SGD([*model.parameters(), *bags.parameters()], lr=0.2)
    train_inputs = log.splits()[0]
    order = epoch_order(train_inputs.day_offsets, "total", 123, 0)
    for step in range(40):
        chosen = order[32 * step : 32 * (step + 1)]
        dense = torch.log(torch.from_numpy(np.maximum(train_inputs.dense[chosen], 0)) + 1.0)
        ids = torch.from_numpy(train_inputs.categories[chosen]).long()
        looked_up = torch.stack([bag(ids[:, t : t + 1]) for t, bag in enumerate(bags)], dim=1)
        probability = torch.sigmoid(model(dense, looked_up))
        labels = torch.from_numpy(train_inputs.labels[chosen]).float()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy(probability, labels).backward()
        optimizer.step()

    ours = saved_rows(tmp_path / "ours")
    plain = torch.cat([bag.weight for bag in bags]).detach().numpy()
    assert abs(plain - start["rows"]).max() > 0.01  # it did move
    np.testing.assert_allclose(ours["rows"], plain, rtol=1e-3, atol=2e-5)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(ours[f"network.{name}"], value.numpy(), rtol=1e-3, atol=2e-5)


def test_training_learns_and_logs(processed, tmp_path):
    summary = train(processed, tmp_path, "a", "--nepochs", "3", "--test-freq", "50")
    assert summary["auc"] > 0.7
    records = [
        json.loads(line) for line in (tmp_path / "runs/a/log.jsonl").read_text().splitlines()
    ]
    kinds = [record["kind"] for record in records]
    assert kinds[0] == "start" and kinds[-1] == "summary" and kinds.count("evaluation") == 7
    start = records[0]
    for key in ("argv", "flags", "commit", "seed", "machine", "data", "table_sizes"):
        assert key in start
    evaluation = records[1]
    for key in ("step", "samples", "loss", "auc", "log_loss", "accuracy", "hot_share"):
        assert key in evaluation
    for key in ("training_s", "paused_s", "program_s", "dropped_share"):
        assert key in evaluation
    assert records[-1]["auc"] == records[-2]["auc"] and records[-1]["samples"] == 3 * 3429


def test_the_same_seed_gives_the_same_bits_and_another_does_not(processed, tmp_path):
    first, again, other = (
        train(processed, tmp_path, name, "--num-batches", "30", "--seed", seed)
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert first["auc"] == again["auc"] != other["auc"]


def test_a_saved_model_evaluates_the_same(processed, tmp_path):
    first = train(processed, tmp_path, "a")
    flags = ["--load-model", str(tmp_path / "a"), "--num-batches", "1", "--learning-rate", "1e-30"]
    assert train(processed, tmp_path, "b", *flags)["auc"] == first["auc"]


def test_warm_up_and_decay_reach_the_trainer(processed, tmp_path):
    flags = (
        "--num-batches 20 --lr-num-warmup-steps 5 --lr-decay-start-step 8 --lr-num-decay-steps 6"
    )
    train(processed, tmp_path, "a", *flags.split())
    train(processed, tmp_path, "b", "--num-batches", "20")
    assert not np.array_equal(
        saved_rows(tmp_path / "a")["rows"], saved_rows(tmp_path / "b")["rows"]
    )


@pytest.mark.parametrize("kind", ["random", "synthetic"])
def test_generated_data(kind, tmp_path):
    summary = dlrm_s_pytorch.main(
        f"--data-generation {kind} --data-size 3000 --arch-embedding-size 40-7-300 --nepochs 2 "
        f"--runs-dir {tmp_path}".split()
        + [*MODEL_FLAGS]
    )
    assert summary["samples"] == 2 * (3000 - 428)  # 7 days, the last of 428 held out
    assert 0.3 < summary["auc"] < 1


def test_diverging_training_stops(processed, tmp_path):
    with pytest.raises(ValueError, match="lower --learning-rate"):
        train(processed, tmp_path, "a", "--learning-rate", "1e30")


def moved_by(processed, inputs, weights=None, rows_by="sgd", network_by="sgd"):
    """How one training step on `inputs` changes the MLPs' weights, and the rows."""
    data = baseline_data(load_processed(processed)).data
    model = dlrm([NUM_DENSE, 16, 8], [16, 1], len(TABLE_SIZES), seed=1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = initial_rows(TABLE_SIZES.tolist(), 8, None, 1)
    table = EmbeddingTable(rows, len(rows), 160, torch.device("cpu"), rows_by)
    start["rows"] = rows.clone()
    step = TrainStep(
        click_model(model, len(TABLE_SIZES)), table, make_optimizer(model, network_by), 32
    )
    dense, slots, labels = data.cold.batch(np.array(inputs))
    weights = None if weights is None else torch.tensor(weights)
    step(dense, table.enter(table.stage(slots)), labels, weights, 0.1)
    ends = {**model.state_dict(), **table.read(slice(None))}
    moved = {name: ends[name] - value for name, value in start.items()}
    assert max(value.abs().max() for value in moved.values()) > 1e-5
    return moved


def test_inputs_of_a_smaller_last_batch_count_like_all_others(processed):
    """One input in a batch of its own steps 1/32 as far as a batch of 32 copies of it."""
    one, copies = moved_by(processed, [5]), moved_by(processed, [5] * 32)
    for name, value in one.items():
        torch.testing.assert_close(32 * value, copies[name], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("network_by", ["adam", "adagrad", "sgd"])
def test_a_smaller_batch_of_an_adaptive_optimizer_moves_by_its_share(processed, network_by):
    """Its rate is scaled: 1/32 of the way, where the loss's size alone would leave it whole."""
    one = moved_by(processed, [5], None, "rwsadagrad", network_by)
    copies = moved_by(processed, [5] * 32, None, "rwsadagrad", network_by)
    for name, value in one.items():
        torch.testing.assert_close(32 * value, copies[name], rtol=2e-2, atol=2e-5)


def test_a_weight_counts_an_input_that_often(processed):
    weighted = moved_by(processed, [5, 9], [3.0, 1.0])
    repeated = moved_by(processed, [5, 5, 5, 9])
    for name, value in weighted.items():
        torch.testing.assert_close(value, repeated[name], rtol=1e-4, atol=1e-7)


def test_the_reported_auc_is_that_of_the_test_split(processed, tmp_path):
    summary = train(processed, tmp_path, "a")
    saved, log = saved_rows(tmp_path / "a"), load_processed(processed)
    model = dlrm([NUM_DENSE, 16, 8], [16, 1], len(TABLE_SIZES))
    mlps = {name[8:]: value for name, value in saved.items() if name.startswith("network.")}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in mlps.items()})
    _, test, val = log.splits()
    for inputs, reported in ((test, summary["auc"]), (val, summary["val"]["auc"])):
        dense, slots, labels = inputs.batch(slice(0, len(inputs)))
        with torch.no_grad():
            logits = model(dense, torch.from_numpy(saved["rows"])[slots])
        assert reported == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert summary["auc"] != summary["val"]["auc"]
