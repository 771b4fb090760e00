"""Drop policies of a reader's own: what they see, what goes, and what is refused."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    MODEL_FLAGS,
    assert_same_weights,
    dlrm,
    saved_rows,
    segregate_small,
    write_processed,
)
from test_dropping import Hot, reach
from torch.nn.functional import binary_cross_entropy_with_logits

import fae_train
import slipstream_train
from slipstream.tools import cli
from slipstream.tools.ranks import RankLost
from slipstream.training import policies
from slipstream.training.batching import EpochPlan
from slipstream.training.chunks import Chunk, Moment, WindowRows, chunks_of
from slipstream.training.dropped import Lasting
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.flags import settings_of
from slipstream.training.policies import find_policy
from slipstream.training.policy_trial import try_policy
from slipstream.training.progress import Progress
from slipstream.training.saved import find_checkpoint
from slipstream.training.sets import load_segregated

OWN = '''
"""Policies, and what they were shown."""
import time

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

def many(chunk):
    return torch.full((len(chunk),), 2**53 + 1)

def by_number(chunk, sign=1.0, wait=0.0):
    time.sleep(wait)
    assert (chunk.epoch, chunk.ids.max() < chunk.num_inputs) in ((0, True), (1, True))
    return sign * chunk.ids.double() + chunk.step

class Average:
    """What was easy at the choices so far goes."""

    def __init__(self, keep=0.5):
        self.keep, self.mean, self.calls = keep, np.zeros(0), torch.zeros((), dtype=torch.int64)

    def __call__(self, chunk):
        if not len(self.mean):
            self.mean = np.zeros(chunk.num_inputs)
        ids = chunk.ids.numpy()
        self.mean[ids] = self.keep * self.mean[ids] + (1 - self.keep) * chunk.losses().numpy()
        self.calls += 1
        return self.mean[ids]

    def state_dict(self):
        return {"mean of all": self.mean, "calls": self.calls}

    def load_state_dict(self, state):
        self.mean, self.calls = state["mean of all"], state["calls"]

class Forgets(Average):
    def load_state_dict(self, state):
        self.calls = state["calls"]

class Says(Average):
    def state_dict(self):
        return {"calls": int(self.calls)}

class Half:
    def state_dict(self):
        return {}
    def __call__(self, chunk):
        return chunk.losses()

class Still:
    pass
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
    monkeypatch.setattr("slipstream.training.chunks.CHUNK", 700)
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
        ("nan", "own.py:nan returned NaN"),
        (
            "short",
            "own.py:short returned float32 of shape (255,); expected numbers of shape (",
        ),
        ("many", "own.py:many returned whole numbers from 9007199254740993 to"),
        ("fails", "line 34: AttributeError: 'Chunk' object has no attribute 'nothing'"),
        ("Forgets", "own.py:Forgets: load_state_dict() did not take up mean_u20_of_u20_all"),
        ("Says", "own.py:Says: state_dict() has 'calls' of int; expected a tensor or an array"),
        ("Half", "has one of state_dict and load_state_dict"),
        ("Still", "is no function, nor a class with __call__"),
        ("Average --drop-policy-args keeps=1", "TypeError: Average.__init__() got an unexpected"),
        ("losses --drop-policy-args keep=1", "TypeError: losses() got an unexpected keyword"),
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
    assert not (own.parent / "runs").exists()  # before anything was trained


def test_a_chunk_knows_its_rows():
    change = torch.tensor([0.5, math.inf, 0.25, math.inf])  # three hot rows, and any other
    touched = torch.tensor([True, False, True, False])
    rows = WindowRows(change, touched, np.array([9, 8, 7, 3, 1]))
    rng = np.random.default_rng(0)

    def chunk(slots, is_hot):
        ids, labels = torch.arange(2), torch.zeros(2)
        return Chunk(
            ids, 9, torch.tensor(slots), labels, None, is_hot, Moment(0, 0, rng), rows, None
        )

    hot = chunk([[0, 2], [1, -1]], True)
    assert hot.change.tolist() == [[0.5, 0.25], [math.inf, math.inf]]
    assert hot.touched.tolist() == [[True, True], [False, False]]
    assert hot.access_counts.tolist() == [[9, 7], [8, 0]]
    assert hot.present.tolist() == [[True, True], [True, False]]
    cold = chunk([[0, 4], [3, 2]], False)
    assert cold.change.tolist() == [[0.5, math.inf], [math.inf, 0.25]]
    assert cold.touched.tolist() == [[True, False], [False, True]]
    assert cold.present is None and cold.access_counts.tolist() == [[9, 1], [3, 7]]
    assert find_policy("stale", 0.5).scores(hot).tolist() == [0.25, math.inf]


def test_whole_numbers_and_booleans_are_scores(own):
    rows = WindowRows(torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    known = (torch.zeros(2, 1).long(), torch.tensor([1, 0]), None, True)
    chunk = Chunk(torch.arange(2), 2, *known, Moment(0, 0, np.random.default_rng(0)), rows, None)
    for score, expected in (
        (lambda chunk: torch.tensor([2**53, -3]), [2.0**53, -3.0]),
        (lambda chunk: chunk.labels > 0, [1.0, 0.0]),
        (lambda chunk: [True, 2.5], [1.0, 2.5]),
    ):
        scores = replace(find_policy(f"{own}:whole"), score=score).scores(chunk)
        assert scores.dtype == np.float64 and scores.tolist() == expected


def test_a_policy_with_state_goes_on_as_if_never_stopped(segregated, own):
    """It decides, through epochs: its mean of what an input cost at all choices so far."""
    flags = ["--recalibrate-every", 0.3, "--nepochs", 2, "--drop-policy-args", "keep=0.9"]
    folder, name = own.parent, "Average"
    whole = train(segregated, own, name, *flags, "--save-model", folder / "a")
    assert [record["epoch"] for record in whole["drops"]] == [0, 0, 1, 1]
    first = whole["drops"][0]["step"]
    end = next(record["step"] for record in whole["drops"] if record["epoch"]) - 15
    for steps in (first - 1, first + 3, end, 0):
        auto = ["--save-model", folder / "b", "--load-model", "auto", "--num-batches", steps]
        train(segregated, own, name, *flags, *auto)
    assert_same_weights(folder / "a", folder / "b")
    states = [find_checkpoint(folder / name).part("drops")[1] for name in "ab"]
    assert states[0]["state.calls"] == states[1]["state.calls"] == 8  # hot and cold, each time
    assert np.array_equal(*(state["state.mean_u20_of_u20_all"] for state in states))
    auto = ["--save-model", folder / "b", "--load-model", "auto"]
    with pytest.raises(ValueError, match="drop-policy-args is {.keep.: 0.9} there, None here"):
        train(segregated, own, name, *flags[:4], *auto)


def test_a_state_that_does_not_fit_is_refused(own):
    state, device = {"state.calls": np.array(3), "dropped.0": np.array([4, 2])}, torch.device("cpu")
    kinds = [["mean of all", "array"], ["calls", "tensor"]]
    state["state.mean_u20_of_u20_all"] = np.arange(9.0)
    progress = Progress(epoch=1, drops=[{"epoch": 0}])

    def restored(name, values, arrays):
        lasting = Lasting(find_policy(f"{own}:{name}"), True)
        lasting.restore(values, arrays, progress, 9, device)
        return lasting.state()

    values = {"state": kinds, "epochs": [0]}
    assert restored("Average", values, state)[0] == values
    without = {key: array for key, array in state.items() if key != "state.calls"}
    for name, more, arrays, said in (
        ("losses", {}, state, "own.py:losses has a state there alone"),
        ("Average", {"state": None}, state, "has a state here alone"),
        ("losses", {"state": None}, state, "arrays of none"),
        ("Average", {}, without, "names of the policy's state are not those"),
        ("Average", {"epochs": []}, state, "its arrays are of others"),
        ("Average", {"epochs": [1]}, {**without, "dropped.1": state["dropped.0"]}, "of others"),
        ("Average", {}, {**state, "dropped.0": np.array([9])}, "of another data set"),
        ("Average", {}, {**state, "dropped.0": np.array([3, 3])}, "one twice"),
    ):
        with pytest.raises(ValueError, match=said):
            restored(name, {**values, **more}, arrays)
    with pytest.raises(ValueError, match="has a state here alone"):
        restored("Average", None, {})


def test_another_text_goes_on_where_nothing_was_chosen(segregated, own, capsys):
    folder, steps = own.parent, ["--num-batches", 12]
    expected = train(segregated, own, "by_number", "--save-model", folder / "a")
    train(segregated, own, "Average", *steps, "--save-model", folder / "b")
    own.write_text(OWN + "# another text\n")
    auto = ["--save-model", folder / "b", "--load-model", "auto"]
    train(segregated, own, "by_number", *auto)
    said = "note: the drop rule: policy is own.py:Average there, own.py:by_number here; nothing has"
    assert said in capsys.readouterr().out and expected["dropped"] > 0
    assert_same_weights(folder / "a", folder / "b")


def test_which_inputs_were_dropped_is_written(segregated, own, capsys):
    """The first numbers left, by the policy; the same after an interruption, of all epochs."""
    flags = ["--nepochs", 2, "--drop-policy-args", "wait=0.03", "sign=1"]
    files = [own.parent / "a.csv", own.parent / "b.csv"]
    summary = train(segregated, own, "by_number", *flags, "--save-dropped", files[0])
    assert "s of choosing what to drop, " in capsys.readouterr().out
    first, second = (record["step"] for record in summary["drops"])
    so_far = []
    for steps in (first + 2, first + 2, second - 5, 0):  # the second time none is trained
        auto = ["--save-model", own.parent / "m", "--load-model", "auto", "--num-batches", steps]
        train(segregated, own, "by_number", *flags, *auto, "--save-dropped", files[1])
        so_far.append(files[1].read_text())
    text = files[0].read_text()
    assert so_far[0] == so_far[1] == so_far[2] and text.startswith(so_far[0])
    assert files[1].read_text() == text and not list(own.parent.glob("*.partial"))
    head, *lines = [line.split(",") for line in text.splitlines()]
    assert head == ["epoch", "input", "set", "row", "label"]
    data = load_segregated(segregated).data
    for epoch in (0, 1):
        mine = [line for line in lines if line[0] == str(epoch)]
        numbers = [int(line[1]) for line in mine]
        assert len(numbers) == summary["drops"][epoch]["dropped"] and numbers == sorted(numbers)
        assert numbers[0] < 9 and numbers[-1] < len(data.hot)
        for _, number, name, row, label in mine:
            assert name == "hot" and row == number and int(data.hot.labels[int(row)]) == int(label)
    highest = ["--drop-policy-args", "sign=-1", "--save-dropped", files[1]]
    train(segregated, own, "by_number", *highest)
    _, number, name, row, label = files[1].read_text().splitlines()[-1].split(",")
    assert name == "cold" and int(number) == len(data.hot) + int(row) > data.num_train - 9
    assert int(label) == int(data.cold.labels[int(row)])


def test_rows_and_sums_of_a_chunk(monkeypatch):
    """Whether resident or not; zeros where absent. So few at once that they fit."""
    monkeypatch.setattr("slipstream.training.chunks.ROWS_BYTES", 4 * 2 * 3 * 4)  # of 3 inputs
    weights, sums = torch.randn(9, 4), torch.rand(9)
    slots = np.random.default_rng(0).integers(-1, 9, (8, 2))
    cold = Hot(slots)
    window = WindowRows(torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    plan = EpochPlan(np.arange(0), np.arange(8), 2, "interleaved")
    moment = Moment(3, 7, np.random.default_rng(0))
    for optimizer in ("rwsadagrad", "sgd"):
        known = (weights.clone(), 5, 20, torch.device("cpu"), optimizer)
        table = EmbeddingTable(*known, sums=sums.clone() if optimizer != "sgd" else None)
        around = reach(Hot(slots[:0]), table, cold)
        chunks = list(chunks_of(around, plan, window, np.array([5, 2, 7, 0]), moment))
        assert [chunk.ids.tolist() for chunk in chunks] == [[5, 2, 7], [0]]
        for chunk in chunks:
            mine = torch.from_numpy(slots[chunk.ids.numpy()])
            expected = weights[mine.clamp(min=0)] * (mine >= 0)[:, :, None]
            assert torch.equal(chunk.rows(), expected)
            if optimizer == "sgd":
                with pytest.raises(ValueError, match="the rows have no Adagrad sums"):
                    chunk.row_sums()
                continue
            assert torch.equal(chunk.row_sums(), sums[mine.clamp(min=0)] * (mine >= 0))
            assert (chunk.epoch, chunk.step) == (3, 7)


def test_a_trial_leaves_no_trace(segregated, own):
    """Of it the policy remembers nothing, and the run's random numbers stay where they are."""
    own.write_text(
        "import numpy as np, random, torch\nseen = []\n\ndef look(chunk):\n"
        "    shapes = [tuple(value.shape) for value in (chunk.slots, chunk.change, chunk.touched,\n"
        "        chunk.access_counts, chunk.dense, chunk.rows(), chunk.row_sums())]\n"
        "    assert shapes == [(256, 5)] * 4 + [(256, 3), (256, 5, 8), (256, 5)], shapes\n"
        "    seen.append(chunk.labels.sum() + np.random.rand() + random.random())\n"
        "    return torch.rand(len(chunk))\n"
    )
    words = ["--segregated-data-dir", str(segregated), *MODEL_FLAGS, "--optimizer", "rwsadagrad"]
    args = slipstream_train.parse_args([*words, "--drop-policy", f"{own}:look"])
    prepared = load_segregated(segregated)
    policy = find_policy(args.drop_policy)

    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    try_policy(policy, prepared, settings_of(args, prepared.data.num_train), torch.device("cpu"))
    assert states() == before and policy.plugin.module.seen == []


def test_what_a_policy_says_before_its_first_call_is_tried(segregated, own):
    """A checkpoint before the first choice holds it."""
    own.write_text(
        "class Late:\n    def __call__(self, chunk):\n        self.mean = chunk.losses()\n"
        "        return self.mean\n    def state_dict(self):\n        return {'mean': self.mean}\n"
        "    def load_state_dict(self, state):\n        self.mean = state['mean']\n"
    )
    with pytest.raises(ValueError, match="line 6: AttributeError: 'Late' object has no"):
        train(segregated, own, "Late")


def test_an_output_replaces_nothing_else(segregated, own, tmp_path):
    """Neither another output, however it is spelled, nor the policy's own file."""
    same, link = tmp_path / "sub" / ".." / "x.csv", tmp_path / "link.csv"
    (tmp_path / "sub").mkdir()
    link.symlink_to("x.csv")
    for other in (same, link):
        with pytest.raises(ValueError, match="--save-predictions and --save-dropped name one file"):
            train(
                *(segregated, own, "popular", "--save-dropped", tmp_path / "x.csv"),
                *("--save-predictions", other),
            )
    before = own.read_text()
    with pytest.raises(ValueError, match="--save-dropped .*own.py is read here"):
        train(segregated, own, "popular", "--save-dropped", own)
    assert own.read_text() == before


def test_a_lost_rank_is_not_the_policys_fault(own):
    plugin = find_policy(f"{own}:popular").plugin
    with pytest.raises(RankLost), plugin.running():
        raise RankLost("control: closed")
    with pytest.raises(ValueError, match="when it was called: KeyError"), plugin.running():
        raise KeyError("other")
    assert cli.option("width=" + "[" * 100_000) == ("width", "[" * 100_000)  # a text


def test_rows_that_cold_batches_update_are_touched(tmp_path):
    """The cold inputs' popular row, which no hot input has."""
    ids = np.stack([np.arange(4000) % 2, np.where(np.arange(4000) % 2, np.arange(4000), 0)], axis=1)
    sizes = np.array([2, 4000])
    more = {"X_cat": ids.astype(np.int32), "counts": sizes}
    folder = segregate_small(
        write_processed(tmp_path / "p.npz", 4000, sizes, **more),
        "--hot-emb-gpu-mem",
        str(3 * 8 * 4),
    )
    (tmp_path / "own.py").write_text(
        "pool = 'cold'\ndef touched(chunk):\n"
        "    assert chunk.step == 0 or chunk.touched.tolist() == [[True, False]] * len(chunk)\n"
        "    return chunk.losses()\n"
    )
    assert train(folder, tmp_path / "own.py", "touched")["dropped"] > 0


def test_flags_that_a_policy_does_not_read_are_said(capsys):
    words = ["--segregated-data-dir", "x", "--alpha", "0.5", "--sample-rate", "0.1"]
    slipstream_train.parse_args([*words, "--drop-policy", "x.py:f"])
    said = "note: --drop-policy x.py:f does not read --alpha, --sample-rate"
    assert said in capsys.readouterr().out
    for more in ([], ["--drop-policy", "random"]):  # a control takes the flags of what it controls
        slipstream_train.parse_args([*words, *more])
        assert "does not read" not in capsys.readouterr().out
    for more, said in (
        (["--drop-policy-args", "a=1"], "goes with a policy of your own"),
        (["--drop-policy", "x.py:f", "--drop-policy-args", "a=1", "a=2"], "names an option twice"),
        (["--inference-only", "--load-model", "m", "--save-dropped", "f"], "drops nothing"),
    ):
        with pytest.raises(SystemExit):
            slipstream_train.parse_args([*words, *more])
        assert said in capsys.readouterr().err


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
