"""The drop rule: when it chooses, how many go, who comes back; and policies, built-in and not."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from slipstream.training.batching import EpochPlan, epoch_order
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.reach import Reach
from slipstream.training.team import Alone

NUM_HOT, NUM_FEATURES = 30, 6


class Hot:
    """Hot inputs in memory."""

    def __init__(self, slots, labels=None):
        self.slots = slots
        self.labels = np.zeros(len(slots), np.int8) if labels is None else labels

    def slots_of(self, inputs):
        return torch.from_numpy(self.slots[inputs])

    def weights_of(self, inputs):
        return None


def reach(hot, table, cold=None, counts=None):
    """What a rule sees of a training run; the loss of an input is its first slot."""
    cold = Hot(np.empty((0, NUM_FEATURES), np.int64)) if cold is None else cold
    return Reach(
        hot,
        cold,
        table.leading_rows,
        lambda inputs, chosen: inputs.slots_of(chosen)[:, 0].float(),
        table.read,
        table.dim,
        lambda name: nullcontext(),
        Alone(None, None, None),
        lambda: 0,
        counts,
    )


def run_epoch(
    drop,
    seed=0,
    num_inputs=600,
    batch_size=20,
    epochs=1,
    num_cold=0,
    slots=None,
    restored_at=None,
    labels=None,
):
    """Train hot batches under a rule; each step touches all rows, or with `slots` those of its
    inputs, and moves row r by r / 1000. Before a batch the rule may be made anew from its state.
    """
    rng = np.random.default_rng(seed)
    touches_all = slots is None
    if touches_all:
        slots = np.sort(rng.integers(0, NUM_HOT, (num_inputs, NUM_FEATURES)), axis=1)
    labels = (rng.random(num_inputs) < 0.25).astype(np.int8) if labels is None else labels
    hot = Hot(slots, labels)
    weight = torch.zeros(NUM_HOT, 2)
    table = EmbeddingTable(weight, NUM_HOT, 1000, torch.device("cpu"))  # uses `weight` in place
    records = []
    rule = DropRule(drop, NUM_HOT, seed, records.append)
    results = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(num_inputs)
        plan = EpochPlan(order, np.arange(num_cold), batch_size, "interleaved")
        rule.begin_epoch(epoch)
        trained, weights = [], []
        while True:
            if len(trained) == (restored_at or -1) * batch_size:
                (values, arrays), rule = rule.state(), DropRule(drop, NUM_HOT, seed, records.append)
                rule.restore(epoch, json.loads(json.dumps(values)), arrays, 2, weight.device)
            rule.before_batch(plan, reach(hot, table))
            batch = plan.next_batch()
            if batch is None:
                break
            if not batch.hot:
                continue
            used = range(NUM_HOT) if touches_all else np.unique(slots[batch.inputs])
            rows = torch.tensor(used).unsqueeze(1)
            rule.touch(rows)
            weight[rows[:, 0]] += rows / 1000
            trained += batch.inputs.tolist()
            weights += (
                [1.0] * len(batch.inputs) if batch.weights is None else batch.weights.tolist()
            )
        rule.end_epoch(plan)
        results.append((trained, np.array(weights)))
    return hot, results, records


def test_the_rule_drops_the_least_changed_rows_inputs():
    hot, [(trained, _)], [record] = run_epoch(DropSettings(drop_fraction=0.4))
    dropped = sorted(set(range(600)) - set(trained))
    assert record["hot_remaining"] == 400  # snapshot at 160 (25 %), compared at 200
    assert record["dropped"] == len(dropped) == round(0.4 * 400)
    # A row's change grows with its number, and alpha = 1 looks at the largest row of an input.
    left = [i for i in range(600) if i in set(dropped) or i in set(trained[200:])]
    largest = hot.slots[:, -1]
    kept = sorted(set(left) - set(dropped))
    assert largest[dropped].max() <= largest[kept].min()


@pytest.mark.parametrize("policy", ["stale", "random"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_epoch_starts_anew(policy, epochs):
    _, results, records = run_epoch(DropSettings(policy=policy), epochs=epochs)
    assert [record["epoch"] for record in records] == list(range(epochs))
    for trained, _ in results:
        assert len(trained) == len(set(trained)) == 600 - records[0]["dropped"]


def test_random_drops_as_many_as_stale_but_others():
    stale, random = (run_epoch(DropSettings(policy=policy)) for policy in ("stale", "random"))
    assert stale[2][0]["dropped"] == random[2][0]["dropped"] > 0
    assert set(stale[1][0][0]) != set(random[1][0][0])


def test_none_drops_nothing_and_keeps_the_order():
    _, [(trained, _)], records = run_epoch(DropSettings(policy="none"))
    assert not records and trained == np.random.default_rng(0).permutation(600).tolist()


def test_nothing_stale_keeps_the_order():
    _, [(trained, _)], [record] = run_epoch(DropSettings(threshold=0.0))
    assert record["dropped"] == 0
    assert trained == np.random.default_rng(0).permutation(600).tolist()


def test_kept_stale_inputs_make_up_for_the_dropped():
    _, [(trained, weights)], [record] = run_epoch(DropSettings(drop_fraction=0.5, keep_rate=0.25))
    stale = record["dropped"] + record["kept_reweighted"]
    assert stale == 200 and record["kept_reweighted"] == 50
    assert len(trained) == 600 - record["dropped"]
    # The sum of loss weights, and so the expected gradient, is that of all inputs.
    assert weights.sum() == pytest.approx(600)


def test_at_most_a_share_of_all_inputs_is_dropped():
    """400 of 600 hot inputs are left, and 300 cold ones count, too."""
    for of_all, expected in ((0.1, 90), (0.25, 200), (1.0, 200)):
        settings = DropSettings(drop_fraction=0.5, of_all=of_all)
        _, _, [record] = run_epoch(settings, num_cold=300)
        assert record["hot_remaining"] == 400
        assert record["dropped"] == record["target"] == expected
    settings = DropSettings(drop_fraction=0.5, of_all=0.1, stratify=True)
    _, _, [record] = run_epoch(settings, num_cold=300)
    assert record["target"] == pytest.approx(90, abs=1)


def test_stratified_drops_keep_the_share_of_positives():
    hot, [(trained, _)], [record] = run_epoch(DropSettings(drop_fraction=0.5, stratify=True))
    left = np.random.default_rng(0).permutation(600)[200:]
    kept = np.array(trained[200:])
    for label in (0, 1):
        before, after = (hot.labels[left] == label).sum(), (hot.labels[kept] == label).sum()
        assert before - after == round(0.5 * before)
    assert len(record["threshold"]) == 2


def test_recalibration_brings_inputs_back():
    """Odd rows stand still in the first window and move in the second: their inputs return."""
    slots = np.array([[row] for row in range(NUM_HOT)] * 20)
    hot, weight = Hot(slots), torch.zeros(NUM_HOT, 2)
    table = EmbeddingTable(weight, NUM_HOT, 1000, torch.device("cpu"))
    drop = DropSettings(threshold=1e-3, start=0.1, window=0.1, recalibrate_every=0.1)
    records = []
    rule = DropRule(drop, NUM_HOT, 0, records.append)
    plan = EpochPlan(
        np.random.default_rng(0).permutation(600), np.empty(0, np.int64), 60, "interleaved"
    )
    trained = []
    while True:
        rule.before_batch(plan, reach(hot, table))
        batch = plan.next_batch()
        if batch is None:
            break
        rule.touch(torch.arange(NUM_HOT).unsqueeze(1))
        moving = slice(0, None, 2) if not records else slice(1, None, 2)
        weight[moving] += 0.01
        trained += batch.inputs.tolist()
        if len(records) == 1:
            assert all(slots[i][0] % 2 == 0 for i in batch.inputs)  # odd rows' inputs are dropped
    assert len(records) >= 2 and len(trained) == len(set(trained))
    later = [int(slots[i][0]) % 2 for i in trained[-60:]]
    assert set(later) == {1}  # they came back, and the even ones, stale now, went


def test_recalibration_drops_as_many_as_the_first_choice():
    """Rows that move alike in every window: the same inputs stay dropped, none comes back."""
    _, [(trained, _)], records = run_epoch(DropSettings(drop_fraction=0.4, recalibrate_every=0.1))
    assert len(records) > 2
    assert {record["dropped"] for record in records} == {160}
    assert [record["dropped_before"] for record in records[:2]] == [0, 160]
    assert len(trained) == 600 - 160
    # From a choice to the next: a tenth of the hot inputs, and the window, a twentieth.
    apart = -np.diff([record["hot_remaining"] for record in records])
    assert (apart >= 90).all() and (apart < 90 + 2 * 20).all(), apart


@pytest.mark.parametrize("restored_at", [None, 5, 8, 11])
def test_recalibration_keeps_the_number_where_rows_are_used_by_dropped_inputs_alone(restored_at):
    """No batch touches them in the next window: their last known change counts."""
    slots = np.repeat(np.arange(NUM_HOT), 20)[:, None]  # each input has one row
    settings_ = DropSettings(start=0.05, window=0.15, recalibrate_every=0.05)
    _, [(trained, _)], records = run_epoch(settings_, slots=slots, restored_at=restored_at)
    target = round(0.3 * records[0]["hot_remaining"])
    assert len(records) > 2 and len(trained) == 600 - target
    for record in records:
        assert record["achieved"] == record["dropped"] == record["target"] == target
    # Gone on with in the first window, between two, in the second: as if never interrupted.
    whole = run_epoch(settings_, slots=slots)
    assert (whole[1][0][0], whole[2]) == (trained, records)


def test_weights_belong_to_their_inputs():
    """Inputs trained with another weight than 1 are stale ones, and all but they are kept."""
    hot, [(trained, weights)], [record] = run_epoch(DropSettings(drop_fraction=0.5, keep_rate=0.25))
    reweighted = [i for i, weight in zip(trained, weights, strict=True) if weight != 1]
    dropped = sorted(set(range(600)) - set(trained))
    assert len(reweighted) == 50 and set(weights) == {1.0, 4.0}
    others = sorted(set(trained[200:]) - set(reweighted))
    largest = hot.slots[:, -1]
    assert largest[[*reweighted, *dropped]].max() <= largest[others].min()


def test_kept_inputs_are_chosen_per_label():
    hot, [(trained, weights)], _ = run_epoch(
        DropSettings(drop_fraction=0.5, keep_rate=0.01, stratify=True)
    )
    for label in (0, 1):
        mine = hot.labels[trained] == label
        assert weights[mine].sum() == pytest.approx((hot.labels == label).sum())


def test_a_keep_rate_excludes_recalibration():
    with pytest.raises(ValueError, match="expected one of them"):
        run_epoch(DropSettings(keep_rate=0.5, recalibrate_every=0.2))


@pytest.mark.parametrize("drop", [DropSettings(), DropSettings(start=0.94)])
def test_a_window_that_is_never_reached_is_said(drop):
    _, [(trained, _)], [record] = run_epoch(drop, batch_size=600 if drop.start < 0.5 else 20)
    assert record["dropped"] == 0 and "smaller --mini-batch-size" in record["reason"]
    assert len(trained) == 600


def test_that_no_input_is_hot_is_said():
    records = []
    rule = DropRule(DropSettings(), 0, 0, records.append)
    plan = EpochPlan(np.empty(0, np.int64), np.arange(40), 20, "interleaved")
    rule.end_epoch(plan)
    assert records[0]["dropped"] == 0 and "no input is hot" in records[0]["reason"]


def test_the_snapshot_waits_for_the_hot_phase():
    """All cold, then all hot: the window must not span the cold batches."""
    table = EmbeddingTable(torch.zeros(NUM_HOT, 2), NUM_HOT, 1000, torch.device("cpu"))
    rule = DropRule(DropSettings(start=0.0), NUM_HOT, 0, lambda record: None)
    plan = EpochPlan(np.arange(100), np.arange(40), 20, "phased")
    hot = Hot(np.zeros((100, NUM_FEATURES), np.int64))
    for _ in range(2):
        rule.before_batch(plan, reach(hot, table))
        assert not rule.window.is_open and not plan.next_batch().hot
    rule.before_batch(plan, reach(hot, table))
    assert rule.window.is_open


def test_untouched_rows_are_not_stale_unless_asked():
    slots = np.array([[0, 1]] * 50 + [[0, 2]] * 50)
    for original, expected in ((False, 0), (True, 50)):
        weight = torch.zeros(3, 2)
        table = EmbeddingTable(weight, 3, 10, torch.device("cpu"))
        records = []
        settings_ = replace(DropSettings(threshold=0.5), count_untouched_as_stale=original)
        rule = DropRule(settings_, 3, 0, records.append)
        # The stream is ordered: the window sees only rows 0 and 1, and row 1 changes.
        plan = EpochPlan(np.arange(100), np.empty(0, np.int64), 5, "interleaved")
        while True:
            rule.before_batch(plan, reach(Hot(slots), table))
            batch = plan.next_batch()
            if batch is None:
                break
            rule.touch(torch.from_numpy(slots[batch.inputs]))
            weight[1] += 1
        assert records[0]["dropped"] == expected


@pytest.mark.parametrize("sample_rate", [0.05, 0.3, 1.0])
def test_a_sample_comes_near_the_target(sample_rate):
    _, _, [record] = run_epoch(
        DropSettings(drop_fraction=0.3, sample_rate=sample_rate), num_inputs=6000, batch_size=200
    )
    exact = round(0.3 * record["hot_remaining"])
    tolerance = 0 if sample_rate == 1 else 4 * math.sqrt(0.3 * 0.7 / (sample_rate * 4000)) * 4000
    assert abs(record["dropped"] - exact) <= tolerance


def test_order_and_choices_draw_from_streams_of_their_own(monkeypatch):
    """Whatever the epoch and the choice; numpy takes [7, 2] and [7, 2, 0] for one seed."""
    made, plain = [], np.random.default_rng

    def noted(*arguments):
        made.append(generator := plain(*arguments))
        return generator

    monkeypatch.setattr(np.random, "default_rng", noted)
    epochs = 3
    for epoch in range(epochs):
        epoch_order(np.array([0, 9]), "none", 7, epoch)
    settings_ = DropSettings(policy="random", recalibrate_every=0.2)
    _, _, records = run_epoch(settings_, seed=7, epochs=epochs)
    seeds = [rng.bit_generator.seed_seq for rng in made]
    ours = [seed for seed in seeds if seed.spawn_key or isinstance(seed.entropy, list)]
    assert len(ours) == epochs + 2 * len(records) > 9
    assert len({tuple(seed.generate_state(4)) for seed in ours}) == len(ours)


def test_the_choice_is_seeded():
    first, again, other = (
        run_epoch(DropSettings(policy="random"), seed=seed)[1][0][0] for seed in (1, 1, 2)
    )
    assert first == again != other


def one_choice(policy, num_hot=200, num_cold=120, **settings_):
    """A choice after 50 hot inputs: the numbers of the hot and cold inputs that were dropped."""
    rng = np.random.default_rng(0)
    slots = np.sort(rng.integers(0, NUM_HOT, (num_hot, NUM_FEATURES)), axis=1)
    labels = (rng.random(num_hot) < 0.3).astype(np.int8)
    cold_slots = rng.integers(0, NUM_HOT + 20, (num_cold, NUM_FEATURES))
    cold = Hot(cold_slots, (rng.random(num_cold) < 0.6).astype(np.int8))
    weight = (1 + torch.arange(NUM_HOT) % 7).unsqueeze(1).repeat(1, 2).float()
    table = EmbeddingTable(weight, NUM_HOT, 1000, torch.device("cpu"))
    records, trained = [], {True: [], False: []}
    settings_ = DropSettings(
        policy, **{"drop_fraction": 0.3, "start": 0.2, "window": 0.05, **settings_}
    )
    rule = DropRule(settings_, NUM_HOT, 0, records.append)
    plan = EpochPlan(rng.permutation(num_hot), rng.permutation(num_cold), 10, "interleaved")
    hot = Hot(slots, labels)
    while True:
        rule.before_batch(plan, reach(hot, table, cold, np.arange(NUM_HOT + 20)[::-1]))
        batch = plan.next_batch()
        if batch is None:
            break
        rule.touch(torch.arange(NUM_HOT).unsqueeze(1))
        weight += torch.arange(NUM_HOT).unsqueeze(1) / 1000
        trained[batch.hot] += batch.inputs.tolist()
    [record] = records
    gone = [
        sorted(set(range(n)) - set(trained[k])) for k, n in ((True, num_hot), (False, num_cold))
    ]
    assert record["dropped"] == len(gone[0]) + len(gone[1])
    before = set(trained[True][: num_hot - record["hot_remaining"]])
    left = sorted(set(range(num_hot)) - before)
    return hot, cold, gone, left, record


def assert_lowest(scores, gone, left):
    """What went scores no higher than what stayed."""
    stayed = sorted(set(left) - set(gone))
    assert gone and stayed and scores[gone].max() <= scores[stayed].min()


@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize("policy", ["random", "uniform", "cold"])
def test_controls_drop_as_many_as_stale_would(policy, stratify):
    """From where their names say, whatever the scores; with `stratify` as many of each label."""
    hot, cold, (gone_hot, gone_cold), left, record = one_choice(policy, stratify=stratify)
    expected = one_choice("stale", stratify=stratify)[2][0]
    assert record["dropped"] == len(expected)
    assert bool(gone_hot) == (policy != "cold") and bool(gone_cold) == (policy != "random")
    if policy == "random":
        assert gone_hot != expected
    if stratify:
        clicks = hot.labels[gone_hot].sum() + cold.labels[gone_cold].sum()
        assert clicks == hot.labels[expected].sum()


@pytest.mark.parametrize("policy", ["stale", "random", "uniform", "cold"])
def test_negatives_only(policy):
    """D is a share of all hot inputs left; what goes are non-clicks, the lowest scores first."""
    hot, cold, (gone_hot, gone_cold), left, record = one_choice(
        policy, num_cold=400, negatives_only=True
    )
    assert record["dropped"] == round(0.3 * record["hot_remaining"])
    assert hot.labels[gone_hot].sum() == cold.labels[gone_cold].sum() == 0
    if policy == "stale":
        negatives = [i for i in left if not hot.labels[i]]
        assert_lowest(hot.slots.max(1), gone_hot, negatives)


def test_negative_scores_and_nothing_to_drop(tmp_path):
    """Of all, and of the only click, whose stratum's share is none; T of stale stays 0."""
    (tmp_path / "own.py").write_text("def worst(chunk):\n    return -1 - chunk.losses()\n")
    name = f"{tmp_path / 'own.py'}:worst"
    for settings_ in ({"drop_fraction": 0.0}, {"of_all": 0.0}):
        _, [(trained, _)], [record] = run_epoch(DropSettings(name, **settings_))
        assert len(trained) == 600 and record["target"] == record["achieved"] == 0
    labels = np.zeros(600, np.int8)
    labels[last := np.random.default_rng(0).permutation(600)[-1]] = 1  # in the epoch's order
    _, [(trained, _)], [record] = run_epoch(DropSettings(name, stratify=True), labels=labels)
    assert len(trained) == 600 - record["target"] < 600 and last in trained
    assert run_epoch(DropSettings(drop_fraction=0.0))[2][0]["threshold"] == 0


def test_more_negatives_than_there_are():
    """The number of all, not of the ones that can go: fewer are dropped then."""
    hot, _, (gone, _), left, _ = one_choice("random", negatives_only=True, drop_fraction=0.9)
    assert gone == [i for i in left if not hot.labels[i]]


def test_uniform_takes_its_share_of_either_kind():
    _, _, (gone_hot, gone_cold), left, record = one_choice("uniform", 4000, 4000)
    share = [len(gone_hot) / len(left), len(gone_cold) / (4000 * 0.75)]
    assert share == pytest.approx([0.15, 0.15], abs=0.02)


def test_cold_inputs_are_reweighted_too():
    _, _, gone, _, record = one_choice("cold", keep_rate=0.25)
    assert gone[0] == [] and record["kept_reweighted"] == round(0.25 * 45)
    assert record["dropped"] + record["kept_reweighted"] == 45


def test_a_tiny_sample_still_drops():
    """Not none for want of a sample in which one would go; and that it was one is said."""
    settings_ = DropSettings(drop_fraction=0.1, sample_rate=1e-6)
    for seed in range(5):
        _, _, [record] = run_epoch(settings_, seed=seed)
        assert record["target"] == 40 and 0 < record["dropped"] < 400
        why = "T was found from a sample of 6 (--sample-rate)"
        assert record["why"] == (None if record["achieved"] == 40 else why)


def test_a_sample_without_a_threshold_is_none():
    """It holds too few inputs whose rows are known, by chance: not all that could go do."""
    slots = np.repeat(np.arange(NUM_HOT), 20)[:, None]  # each input has one row
    settings_ = DropSettings(sample_rate=1e-6, drop_fraction=0.4, start=0.05, window=0.04)
    for seed in range(8):
        _, _, [record] = run_epoch(settings_, seed=seed, slots=slots)
        assert record["threshold"] < math.inf or record["achieved"] < record["target"]


def test_fewer_cold_inputs_than_asked_for_is_said():
    _, _, gone, _, record = one_choice("cold", num_cold=40)
    assert record["target"] == 45 and record["achieved"] == record["dropped"] == len(gone[1]) < 40
    assert record["why"] == f"only {record['candidates']} of them are left"


def test_a_share_below_one_input_is_said():
    _, _, [record] = run_epoch(DropSettings(drop_fraction=1e-4))
    assert record["dropped"] == 0 and "less than one input" in record["why"]
    _, _, [record] = run_epoch(DropSettings(drop_fraction=0.0))
    assert record["dropped"] == 0 and record["why"] is None
