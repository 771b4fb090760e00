"""Streams of random numbers from one seed, independent by what they are for and by their numbers.

A list of numbers as a seed does not do: numpy pads it with zeros, so `[seed, 3]` and `[seed, 3, 0]`
are one stream. A `SeedSequence`'s spawn key is mixed in beside the seed, and its length counts.
"""

from __future__ import annotations

import numpy as np

# A purpose's place here is part of its streams: new ones go to the end.
PURPOSES = (
    "network",  # its weights
    "lazy layers",  # weights drawn when a network is first run
    "rows",  # initial weights of embedding rows
    "training",  # what a network draws as it trains
    "order",  # of the inputs, by epoch
    "choice",  # of the drop rule: ties, samples, order; by epoch and choice
    "policy",  # what a drop policy draws, by epoch and choice
    "accesses",  # the inputs whose accesses are counted
    "thinning",  # negative rows that are left out, by file
    "split",  # rows that are held out, by file
    "negatives",  # of clicks without any
    "random data",
)


def seed_sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    """What starts a stream. `ValueError` for a purpose that is none of `PURPOSES`."""
    return np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *numbers))


def stream(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator at a stream's start."""
    return np.random.default_rng(seed_sequence(seed, purpose, *numbers))


def torch_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for PyTorch's generators."""
    return int(
        seed_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )
