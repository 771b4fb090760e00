import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.training.cut import Cut, chosen_mask, find_cut
from slipstream.training.staleness import (
    critical_thresholds,
    num_stale_rows_needed,
    row_change,
)

NUM_HOT, NUM_FEATURES = 30, 6


def brute_force_stale(slots, before, after, touched, threshold, alpha):
    """The definition, input by input, row by row, value by value."""
    stale = []
    for rows in slots:
        count = 0
        for row in rows:
            if row < 0:
                continue
            change = max(
                abs(float(a) - float(b)) for a, b in zip(after[row], before[row], strict=True)
            )
            count += bool(touched[row]) and change < threshold
        present = sum(row >= 0 for row in rows)
        stale.append(present > 0 and count >= max(1, math.ceil(round(alpha * present, 9))))
    return np.array(stale)


def random_window(seed):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(NUM_HOT, 4)).astype(np.float32)
    after = before + rng.choice([0, 0.01, 0.02, 0.5], (NUM_HOT, 4)).astype(np.float32)
    slots = rng.integers(0, NUM_HOT, (200, NUM_FEATURES))
    return before, after, slots, rng.random(NUM_HOT) < 0.9


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.015, 0.3, 9.0])
@pytest.mark.parametrize("has_absent", [False, True])
def test_stale_inputs_equal_the_definition(alpha, threshold, has_absent):
    """With absent elements, k counts the present ones; an input of none is never stale."""
    before, after, slots, touched = random_window(1)
    if has_absent:
        slots[np.random.default_rng(2).random(slots.shape) < 0.4] = -1
        slots[7] = -1
    change = row_change(torch.from_numpy(before), torch.from_numpy(after))
    change[torch.from_numpy(~touched)] = math.inf
    of_inputs = torch.cat([change, torch.tensor([math.inf])])[slots]
    present = torch.from_numpy(slots >= 0) if has_absent else None
    critical = critical_thresholds(of_inputs, present, alpha).numpy()
    stale = chosen_mask(critical, Cut(threshold), np.random.default_rng(0))
    assert np.array_equal(stale, brute_force_stale(slots, before, after, touched, threshold, alpha))


@given(
    st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, math.inf]), min_size=1, max_size=60),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_threshold_drops_the_target_exactly_with_ties(values, drop_fraction):
    critical = np.array(values, np.float32)
    threshold = find_cut(critical, drop_fraction)
    stale = chosen_mask(critical, threshold, np.random.default_rng(0))
    finite = int(np.isfinite(critical).sum())
    assert stale.sum() == min(round(drop_fraction * len(critical)), finite)
    # No kept input is staler than a dropped one: T is the quantile, not any set of that size.
    if stale.any() and not stale.all():
        assert critical[stale].max() <= critical[~stale].min()


def test_ties_go_at_random():
    """Not the first ones: none of 40 stays, or goes, each time."""
    cut = find_cut(np.zeros(40), 0.5)
    masks = [chosen_mask(np.zeros(40), cut, np.random.default_rng(seed)) for seed in range(40)]
    assert {int(mask.sum()) for mask in masks} == {20}
    assert 0 < np.min(np.sum(masks, 0)) and np.max(np.sum(masks, 0)) < 40


@pytest.mark.parametrize("scores", [[-5.0, -1.0, -0.25], [-math.inf, 0.0], []])
def test_no_score_is_so_low_that_it_goes_where_none_is_to(scores):
    cut = find_cut(np.array(scores), 0.0)
    assert not chosen_mask(np.array(scores), cut, np.random.default_rng(0)).any()


def test_threshold_is_the_brute_force_quantile():
    critical = np.random.default_rng(0).random(1000).astype(np.float32)
    found = find_cut(critical, 0.3)
    candidates = [t for t in np.sort(critical) if np.sum(critical <= t) == 300]
    assert [np.float32(found.value)] == candidates and found.tie_share == 1


def test_alpha_in_decimals():
    assert num_stale_rows_needed(0.7, 10) == 7
    assert num_stale_rows_needed(1.0, 26) == 26
    assert num_stale_rows_needed(0.001, 26) == 1
