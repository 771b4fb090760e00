"""Which inputs have the lowest scores: a cut for a share to drop, exact with ties.

Of `stale` the scores are critical thresholds and the cut is T, see `slipstream.training.staleness`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cut:
    """Inputs that score below `value` go, and of those exactly at it a share of `tie_share`."""

    value: float
    tie_share: float = 0.0


def find_cut(scores: np.ndarray, drop_fraction: float) -> Cut:
    """The cut that drops `drop_fraction` of inputs with these scores (n,), or of a sample.

    Inputs that score +inf are never dropped, so the achieved share may be lower.
    """
    target = round(drop_fraction * len(scores))
    if target == 0:
        return Cut(-math.inf)  # no score is below it
    value = np.partition(scores, target - 1)[target - 1]
    if value == math.inf:
        return Cut(math.inf)
    below = int(np.count_nonzero(scores < value))
    ties = int(np.count_nonzero(scores == value))
    return Cut(float(value), (target - below) / ties)


def chosen_mask(scores: np.ndarray, cut: Cut, rng: np.random.Generator) -> np.ndarray:
    """Which go (n,) bool: all below the cut, and its share of ties, at random."""
    chosen = scores < np.float64(cut.value)
    if cut.tie_share > 0:
        ties = np.flatnonzero(scores == np.float64(cut.value))
        going = rng.permutation(len(ties))[: round(cut.tie_share * len(ties))]
        chosen[ties[going]] = True
    return chosen
