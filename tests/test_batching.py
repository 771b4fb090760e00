import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.training.batching import EpochPlan, epoch_order, interleave

DAYS = np.array([0, 30, 30, 70, 100])


def test_each_order_holds_every_input_once_and_changes_by_epoch():
    for randomize in ("total", "day"):
        first, second = (epoch_order(DAYS, randomize, 1, epoch) for epoch in (0, 1))
        assert sorted(first) == sorted(second) == list(range(100))
        assert not np.array_equal(first, second)
        assert np.array_equal(first, epoch_order(DAYS, randomize, 1, 0))
        assert not np.array_equal(first, epoch_order(DAYS, randomize, 2, 0))


def test_day_shuffles_within_days_and_none_not_at_all():
    order = epoch_order(DAYS, "day", 0, 0)
    for start, stop in ((0, 30), (30, 70), (70, 100)):
        assert sorted(order[start:stop]) == list(range(start, stop))
    assert np.array_equal(epoch_order(DAYS, "none", 0, 5), np.arange(100))


@given(st.integers(0, 60), st.integers(0, 60))
def test_interleaving_is_even(num_hot, num_cold):
    is_hot = interleave(num_hot, num_cold, "interleaved")
    assert is_hot.sum() == num_hot and len(is_hot) == num_hot + num_cold
    if num_hot and num_cold:
        # After any number of batches both streams are equally far, to within one batch of either.
        hot = np.cumsum(is_hot)
        cold = np.arange(1, len(is_hot) + 1) - hot
        assert np.all(abs(hot / num_hot - cold / num_cold) <= 1 / num_hot + 1 / num_cold)


def test_phased_is_all_cold_then_all_hot():
    assert interleave(2, 3, "phased").tolist() == [False] * 3 + [True] * 2


@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 13),
    st.sampled_from(["interleaved", "phased"]),
)
def test_a_plan_trains_every_input_once(num_hot, num_cold, batch_size, schedule):
    plan = EpochPlan(np.arange(num_hot), np.arange(num_cold), batch_size, schedule)
    seen = {True: [], False: []}
    sizes = {True: [], False: []}
    while (batch := plan.next_batch()) is not None:
        seen[batch.hot] += batch.inputs.tolist()
        sizes[batch.hot].append(len(batch.inputs))
    assert seen == {True: list(range(num_hot)), False: list(range(num_cold))}
    for sized in sizes.values():  # only the last batch of each kind may be smaller
        assert all(size == batch_size for size in sized[:-1])


def test_replacing_hot_inputs_changes_only_what_is_left():
    plan = EpochPlan(np.arange(40), np.arange(40), 10, "interleaved")
    trained, cold = [], []
    for _ in range(3):
        batch = plan.next_batch()
        (trained if batch.hot else cold).extend(batch.inputs)
    left = plan.remaining(True)
    assert sorted([*trained, *left]) == list(range(40))
    kept = left[::2]
    plan.replace(True, kept, np.arange(len(kept), dtype=np.float32))
    weights = []
    while (batch := plan.next_batch()) is not None:
        (trained if batch.hot else cold).extend(batch.inputs)
        if batch.hot:
            weights += batch.weights.tolist()
    assert sorted(cold) == list(range(40))
    assert trained[-len(kept) :] == kept.tolist()
    assert weights == list(range(len(kept)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        interleave(1, 1, "sorted")
    with pytest.raises(ValueError, match="expected one of"):
        epoch_order(DAYS, "week", 0, 0)
