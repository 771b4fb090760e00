"""Drop policies of a reader's own: what they see, what goes, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS, assert_same_weights, dlrm, saved_rows
from torch.nn.functional import binary_cross_entropy_with_logits

import fae_train
import slipstream_train
from slipstream.tools import cli
from slipstream.training import policies
from slipstream.training.policies import Chunk, WindowRows, find_policy
from slipstream.training.saved import find_checkpoint
from slipstream.training.sets import load_segregated

OWN = '''
"""Policies, and what they were shown."""
import numpy as np
import torch

pool = "all"
seen = []

def losses(chunk):
    found = chunk.losses()
    seen.append((chunk.is_hot, chunk.slots.clone(), chunk.labels.clone(), found.clone()))
    return found

def popular(chunk):
    return -chunk.access_counts.double().mean(1)
popular.pool = "hot"

def spares(chunk):
    return np.where(chunk.labels.numpy() > 0, np.inf, chunk.rng.random(len(chunk)))
spares.pool = "cold"

def nan(chunk):
    return torch.full((len(chunk),), torch.nan)

def short(chunk):
    return torch.zeros(len(chunk) - 1)

def whole(chunk):
    return torch.zeros(len(chunk), dtype=torch.long)

def fails(chunk):
    return chunk.nothing

def elsewhere(chunk):
    return chunk.losses()
elsewhere.pool = "warm"

number = 5

def first(chunk):
    return torch.where(chunk.labels > 0, -torch.inf, chunk.access_counts.double().mean(1))

def sparse(chunk):
    return chunk.losses().to_sparse()

class Costs:
    def __call__(self, chunk):
        return chunk.rng.random(len(chunk))

costs = Costs()
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def train(segregated, own, function, *flags):
    """A run's summary; its one epoch chooses after a fifth of the hot inputs."""
    folder = own.parent
    words = ["--segregated-data-dir", segregated, "--runs-dir", folder / "runs", *MODEL_FLAGS]
    words += ["--drop-policy", f"{own}:{function}", "--drop-percentage", 30]
    words += ["--snapshot-start", 0.1, "--snapshot-window", 0.1, *flags]
    return slipstream_train.main([str(word) for word in words])


def test_a_policy_of_ones_own_by_losses(segregated, own, monkeypatch):
    """It sees every input left, in chunks; the losses are the model's at that moment; the lowest
    go.
    """
    monkeypatch.setattr("slipstream.training.dropping.CHUNK", 700)
    found = {}
    plain = policies.find_policy

    def noted(*values):
        policy = plain(*values)
        found["module"] = policy.plugin.found.__globals__
        return policy

    monkeypatch.setattr("slipstream.training.run.find_policy", noted)
    saved = ["--save-model", own.parent / "m", "--checkpoint-every", 1, "--keep", 9999]
    summary = train(segregated, own, "losses", *saved)
    [record] = summary["drops"]
    seen = found["module"]["seen"]
    assert max(len(losses) for *_, losses in seen) <= 700 < len(seen) * 700
    assert sum(len(losses) for *_, losses in seen) == record["candidates"]
    assert [is_hot for is_hot, *_ in seen] == sorted((is_hot for is_hot, *_ in seen), reverse=True)
    assert summary["dropped"] == record["dropped"] == round(0.3 * record["hot_remaining"])
    assert record["pool"] == "all" and record["policy"] == "own.py:losses"
    assert record["alpha"] is None and record["threshold"] is None
    # The losses again, by hand, from the checkpoint of that step.
    prepared = load_segregated(segregated)
    at = next(
        path
        for path in sorted((own.parent / "m").glob("step-*"))
        if json.loads((path / "checkpoint.json").read_text())["values"]["rule"]["choices"]
    )
    weights = saved_rows(sorted((own.parent / "m").glob("step-*"))[int(at.name[5:]) - 2])
    rows = torch.empty(len(weights["rows"]), 8)
    rows[torch.from_numpy(np.array(prepared.slot_of_row)).long()] = torch.from_numpy(
        weights["rows"]
    )
    network = dlrm([3, 16, 8], [16, 1], 5)
    network.load_state_dict(
        {
            name.removeprefix("network."): torch.from_numpy(value)
            for name, value in weights.items()
            if name.startswith("network.")
        }
    )
    is_hot, slots, labels, losses = seen[0]
    inputs = prepared.data.hot
    places = {tuple(row): i for i, row in enumerate(inputs.categories.tolist())}
    chosen = np.array([places[tuple(row)] for row in slots[:50].tolist()])
    dense = inputs.batch(chosen)[0]
    with torch.no_grad():
        logits = network(dense, rows[slots[:50]])
    # Inputs of equal rows may differ in their dense features: most do not share all five rows.
    expected = binary_cross_entropy_with_logits(logits, labels[:50].float(), reduction="none")
    same = torch.isclose(losses[:50], expected, rtol=1e-4, atol=1e-5)
    assert is_hot and same.float().mean() > 0.3


@pytest.mark.parametrize("flags", [[], ["--stale-keep-rate", 0.25], ["--stratify-drop", "true"]])
def test_a_policy_of_ones_own_by_popularity(segregated, own, flags):
    summary = train(segregated, own, "popular", *flags)
    [record] = summary["drops"]
    assert record["achieved"] == pytest.approx(0.3 * record["hot_remaining"], abs=1)
    assert record["dropped"] == record["achieved"] - record["kept_reweighted"] == summary["dropped"]
    assert (record["kept_reweighted"] > 0) == ("--stale-keep-rate" in flags)


def test_what_scores_infinity_stays(segregated, own, capsys):
    """Clicks are spared, though D asks for more than the other cold inputs."""
    summary = train(segregated, own, "spares", "--drop-percentage", 100)
    [record] = summary["drops"]
    assert record["achieved"] < record["target"] and record["dropped"] == record["achieved"]
    said = f"{record['achieved']:,} chosen, target {record['target']:,}: {record['why']}"
    assert said in capsys.readouterr().out
    prepared = load_segregated(segregated)
    assert record["dropped"] <= int((prepared.data.cold.labels == 0).sum())


def test_infinitely_low_goes_first_and_an_object_has_its_files_pool(segregated, own):
    clicks = load_segregated(segregated).data
    summary = train(segregated, own, "first", "--drop-percentage", 5)
    [record] = summary["drops"]
    assert record["pool"] == "all" and record["dropped"] == record["target"] > 0
    num_clicks = sum(int((inputs.labels > 0).sum()) for inputs in (clicks.hot, clicks.cold))
    assert record["target"] < num_clicks / 2  # so clicks alone go, and the loss shows it
    assert train(segregated, own, "costs")["drops"][0]["pool"] == "all"


def test_resume_and_recalibration_with_a_policy_of_ones_own(segregated, own):
    folder, again = own.parent, ["--recalibrate-every", 0.2]
    whole = train(segregated, own, "losses", *again, "--save-model", folder / "a")
    assert len(whole["drops"]) >= 2
    for steps in (12, 30, 0):
        auto = ["--save-model", folder / "b", "--load-model", "auto", "--num-batches", steps]
        train(segregated, own, "losses", *again, *auto)
    assert_same_weights(folder / "a", folder / "b")
    own.write_text(OWN + "# another text\n")
    auto = ["--save-model", folder / "b", "--load-model", "auto"]
    with pytest.raises(ValueError, match="of another run: the drop rule: policy's file is"):
        train(segregated, own, "losses", *again, *auto)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nan", "own.py returned NaN"),
        ("short", "; expected floating-point numbers of shape ("),
        ("whole", "returned int64 of shape ("),
        ("fails", "line 32: AttributeError: 'Chunk' object has no attribute 'nothing'"),
        ("elsewhere", "its pool is 'warm'; expected one of ('hot', 'all', 'cold')"),
        ("number", "is no function"),
        ("sparse", "can't convert Sparse layout tensor to numpy"),
        ("absent", "has no absent"),
        ("losses --threshold 0.1", "takes --drop-percentage"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(segregated, own, capsys, function, said):
    function, *flags = function.split()
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: train(segregated, own, function, *flags))
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and said in errors[0], errors


def test_a_chunk_knows_its_rows():
    change = torch.tensor([0.5, math.inf, 0.25, math.inf])  # three hot rows, and any other
    touched = torch.tensor([True, False, True, False])
    rows = WindowRows(change, touched, np.array([9, 8, 7, 3, 1]))
    rng = np.random.default_rng(0)
    hot = Chunk(torch.tensor([[0, 2], [1, -1]]), torch.zeros(2), True, rng, rows, None)
    assert hot.change.tolist() == [[0.5, 0.25], [math.inf, math.inf]]
    assert hot.touched.tolist() == [[True, True], [False, False]]
    assert hot.access_counts.tolist() == [[9, 7], [8, 0]]
    assert hot.present.tolist() == [[True, True], [True, False]]
    cold = Chunk(torch.tensor([[0, 4], [3, 2]]), torch.zeros(2), False, rng, rows, None)
    assert cold.change.tolist() == [[0.5, math.inf], [math.inf, 0.25]]
    assert cold.touched.tolist() == [[True, False], [False, True]]
    assert cold.present is None and cold.access_counts.tolist() == [[9, 1], [3, 7]]
    assert find_policy("stale", 0.5).scores(hot).tolist() == [0.25, math.inf]


def test_a_short_epoch_drops_nothing(segregated, own, capsys):
    """And is FAE's then, bit for bit."""
    words = ["--segregated-data-dir", str(segregated), "--runs-dir", str(own.parent), *MODEL_FLAGS]
    saved = [str(own.parent / name) for name in "ab"]
    fae_train.main([*words, "--save-model", saved[0]])
    num_steps = find_checkpoint(saved[0]).step
    short = ["--drop-min-steps", num_steps + 1, "--save-model", saved[1]]
    assert train(segregated, own, "popular", *short)["dropped"] == 0
    said = f"an epoch of {num_steps} mini-batches is short, each of them counts: below"
    assert said in capsys.readouterr().out
    assert_same_weights(*saved)
    assert train(segregated, own, "popular", "--drop-min-steps", num_steps)["dropped"] > 0


def test_a_run_that_ends_before_its_choice_says_so(segregated, own, capsys):
    summary = train(segregated, own, "popular", "--num-batches", 3)
    said = "epoch 1: nothing dropped; the run ended before --snapshot-start and --snapshot-window"
    assert said in capsys.readouterr().out and summary["drops"] == []
    lines = open(summary["log"]).read().splitlines()
    assert any('"reason": "the run ended before' in line for line in lines)


@pytest.mark.parametrize("name", ["cold", "spares"])
def test_cold_inputs_are_trained_by_then(segregated, own, name):
    """All cold, then all hot: a choice among the cold ones would drop none."""
    flags = ["--schedule", "phased", *(["--drop-policy", name] if name == "cold" else [])]
    with pytest.raises(ValueError, match="phased has trained by then; give --schedule interleaved"):
        train(segregated, own, name, *flags)
