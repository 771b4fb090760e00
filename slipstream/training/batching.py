"""The order of an epoch: which inputs form each mini-batch, hot and cold batches evenly mixed.

A batch is all hot or all cold. `interleaved` spreads the rarer kind evenly, so that host work for a
cold batch hides behind the device's on hot ones; `phased` runs all cold, then all hot, as FAE's
published code does. A baseline epoch is one with cold inputs only.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.logs.inputs import BLOCK_INPUTS
from slipstream.tools.streams import stream

SCHEDULES = ("interleaved", "phased")
RANDOMIZE = ("total", "day", "none")
VERSION = 2  # of the orders, and of the choices on the way: what a seed means
CHECKED_INPUTS = 4096  # of an order, to recognise it
KIND_NAMES = {True: "hot", False: "cold"}


def epoch_order(
    day_offsets: np.ndarray, randomize: str, seed: int, epoch: int, window: int = 0
) -> np.ndarray:
    """The inputs of one epoch in training order (n,); another order every epoch.

    Takes 4 bytes an input, 8 above 2^31 inputs.

    `total` shuffles all inputs, `day` the inputs within each day (days stay in order), `none` keeps
    the log's order. `day_offsets` (days + 1,) holds each day's first row, then n. With a `window`,
    for inputs that do not fit into memory, blocks of consecutive inputs are shuffled, and then the
    inputs of as many blocks as make up `window` inputs: training reads one such window at a time.
    """
    num_inputs = int(day_offsets[-1])
    order = np.arange(num_inputs, dtype=np.int32 if num_inputs <= 1 << 31 else np.int64)
    rng = stream(seed, "order", epoch)
    ranges = {
        "total": [(0, len(order))],
        "day": list(zip(day_offsets[:-1].tolist(), day_offsets[1:].tolist(), strict=True)),
        "none": [],
    }
    if randomize not in ranges:
        raise ValueError(f"got {randomize!r}; expected one of {RANDOMIZE}")
    for start, stop in ranges[randomize]:
        if 0 < window < stop - start:
            _shuffle_blocks(order[start:stop], window, rng)
        else:
            rng.shuffle(order[start:stop])
    return order


def order_check(orders: Sequence[np.ndarray]) -> list[int]:
    """What a run that goes on within an epoch must find again: the version, and a sum an order."""
    return [VERSION, *(zlib.crc32(order[:CHECKED_INPUTS].astype("<i8").data) for order in orders)]


def _shuffle_blocks(order: np.ndarray, window: int, rng: np.random.Generator) -> None:
    """Shuffle consecutive numbers in place, by blocks and then within windows of whole blocks."""
    first, block = int(order[0]), max(1, min(BLOCK_INPUTS, window // 16))
    blocks = rng.permutation(-(-len(order) // block))
    per_window, filled = window // block, 0
    for start in range(0, len(blocks), per_window):
        places = blocks[start : start + per_window, None] * block + np.arange(block)
        places = places[places < len(order)]  # the last block may be shorter
        rng.shuffle(places)
        order[filled : filled + len(places)] = first + places
        filled += len(places)


def interleave(num_hot: int, num_cold: int, schedule: str) -> np.ndarray:
    """Which of `num_hot + num_cold` batches are hot, as booleans in training order."""
    is_hot = np.repeat([False, True], [num_cold, num_hot])
    if schedule == "phased":
        return is_hot
    if schedule != "interleaved":
        raise ValueError(f"got {schedule!r}; expected one of {SCHEDULES}")
    # Batch i of n stands at (i + 1/2) / n of the epoch.
    position = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in (num_cold, num_hot)])
    return is_hot[np.argsort(position, kind="stable")]


@dataclass(frozen=True)
class PlannedBatch:
    """One mini-batch: its inputs (B,) within the hot or the cold set, and their loss weights."""

    hot: bool
    inputs: np.ndarray
    weights: np.ndarray | None  # (B,) float32, None: all 1
    key: tuple[int, int] = (0, 0)  # how often its kind was replaced, and its start there


class EpochPlan:
    """The batches of one epoch, in order; the rest of a kind can be replaced on the way.

    Args:
        hot_order, cold_order: inputs in training order, from `epoch_order`.
        batch_size: inputs a batch; the last of each kind may be smaller.
        schedule: `interleaved` or `phased`.

    Attributes:
        num_hot_inputs: of the epoch.
        num_trained: inputs given out so far, by hot.
        num_batches_at_first: mini-batches of the epoch, where nothing is replaced.
    """

    def __init__(
        self, hot_order: np.ndarray, cold_order: np.ndarray, batch_size: int, schedule: str
    ) -> None:
        self.batch_size, self.schedule = batch_size, schedule
        self.num_hot_inputs, self._num_cold_inputs = len(hot_order), len(cold_order)
        self.num_trained = {True: 0, False: 0}  # by hot
        self._inputs = {True: hot_order, False: cold_order}  # still to train, by hot
        self._next = {True: 0, False: 0}
        self._num_replaced = {True: 0, False: 0}
        self._weights: dict[bool, np.ndarray | None] = {True: None, False: None}
        self._mix()
        self.num_batches_at_first = sum(self._mixed)

    def _num_batches(self, hot: bool) -> int:
        return -(-(len(self._inputs[hot]) - self._next[hot]) // self.batch_size)

    def _mix(self) -> None:
        self._mixed = (self._num_batches(True), self._num_batches(False))
        self._kinds = interleave(*self._mixed, self.schedule)
        self._position = 0

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Where the epoch stands, for `restore`: plain JSON, and the inputs that were replaced."""
        values = {
            "num_inputs": [self.num_hot_inputs, self._num_cold_inputs],
            "next": [self._next[True], self._next[False]],
            "mixed": list(self._mixed),
            "position": self._position,
            "num_trained": [self.num_trained[True], self.num_trained[False]],
            "num_replaced": [self._num_replaced[True], self._num_replaced[False]],
        }
        arrays = {}
        for hot, name in KIND_NAMES.items():
            if self._num_replaced[hot]:
                arrays[f"{name}_inputs"] = self._inputs[hot]
                if (weights := self._weights[hot]) is not None:
                    arrays[f"{name}_weights"] = weights
        return values, arrays

    def restore(self, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken; made with the same arguments. `ValueError`: it was not."""
        sizes = {True: self.num_hot_inputs, False: self._num_cold_inputs}
        if values["num_inputs"] != list(sizes.values()):
            raise ValueError(f"plan.num_inputs: {values['num_inputs']} hot and cold inputs")
        num_replaced = dict(zip(sizes, map(_count, values["num_replaced"]), strict=True))
        next_ = dict(zip(sizes, map(_count, values["next"]), strict=True))
        for hot, name in KIND_NAMES.items():
            if num_replaced[hot]:
                self._inputs[hot] = _checked_inputs(arrays[f"{name}_inputs"], sizes[hot])
                weights = arrays.get(f"{name}_weights")
                if weights is not None and weights.shape != self._inputs[hot].shape:
                    raise ValueError(f"plan.{name}_weights: {len(weights)} of them")
                if weights is not None and not ((weights >= 1) & (weights < np.inf)).all():
                    raise ValueError(f"plan.{name}_weights: NaN, infinite or below 1")
                self._weights[hot] = None if weights is None else np.array(weights, np.float32)
            elif f"{name}_inputs" in arrays or f"{name}_weights" in arrays:
                raise ValueError(f"plan.num_replaced: {name} inputs are, and it says they are not")
            size = len(self._inputs[hot])
            if not 0 <= next_[hot] <= size or (next_[hot] % self.batch_size and next_[hot] < size):
                raise ValueError(f"plan.next: {next_[hot]} of {size} {name} inputs")
        mixed = (_count(values["mixed"][0]), _count(values["mixed"][1]))
        if not 0 <= sum(mixed) <= sum(sizes.values()):
            raise ValueError("plan.mixed: more batches than inputs")
        kinds = interleave(*mixed, self.schedule)
        if _count(values["position"]) > len(kinds):
            raise ValueError("plan.position: beyond the epoch's end")
        self._kinds, self._mixed, self._position = kinds, mixed, values["position"]
        self._next, self._num_replaced = next_, num_replaced
        self.num_trained = dict(zip(sizes, map(_count, values["num_trained"]), strict=True))
        self._check_restored()

    def _check_restored(self) -> None:
        """Raise `ValueError` where what is left to train is not what the kinds to come say."""
        for hot, name in KIND_NAMES.items():
            num_coming = int((self._kinds[self._position :] == hot).sum())
            if num_coming != self._num_batches(hot):
                raise ValueError(
                    f"plan.position: {num_coming} {name} batches are to come, and inputs for "
                    f"{self._num_batches(hot)}"
                )
            taken, trained = self._next[hot], self.num_trained[hot]
            if trained < taken or (trained > taken and not self._num_replaced[hot]):
                raise ValueError(f"plan.num_trained: {trained} {name} inputs, and {taken} taken")

    @property
    def num_inputs(self) -> int:
        """Inputs of the epoch, where nothing is replaced."""
        return self.num_hot_inputs + self._num_cold_inputs

    @property
    def num_left(self) -> int:
        """Inputs still to train."""
        return sum(len(self._inputs[hot]) - self._next[hot] for hot in KIND_NAMES)

    @property
    def is_finished(self) -> bool:
        """Whether no batch is left."""
        return self._position == len(self._kinds)

    @property
    def next_is_hot(self) -> bool:
        """Whether a batch is left and the next one is hot."""
        return not self.is_finished and bool(self._kinds[self._position])

    def next_batch(self) -> PlannedBatch | None:
        """The next mini-batch; None at the end of the epoch."""
        if self.is_finished:
            return None
        batch = self.peek(bool(self._kinds[self._position]))
        assert batch is not None
        self._position += 1
        self._next[batch.hot] += len(batch.inputs)
        self.num_trained[batch.hot] += len(batch.inputs)
        return batch

    def peek(self, hot: bool, number: int = 0) -> PlannedBatch | None:
        """The next batch of a kind, or the `number`-th after it, which stays to be trained; None
        where none is left.

        It may be replaced before it comes; its `key` tells.
        """
        start = self._next[hot] + number * self.batch_size
        part = slice(start, start + self.batch_size)
        inputs = self._inputs[hot][part]
        if not len(inputs):
            return None
        weights = self._weights[hot]
        weights = None if weights is None else weights[part]
        return PlannedBatch(hot, inputs, weights, (self._num_replaced[hot], start))

    def num_replaced(self, hot: bool) -> int:
        """How often the rest of a kind was replaced."""
        return self._num_replaced[hot]

    def coming(self, hot: bool, start: int, count: int) -> np.ndarray:
        """Of a kind's inputs, since it was last replaced, those from `start` on; at most `count`.

        `start` counts from where the kind began, then or with the epoch.
        """
        return self._inputs[hot][start : start + count]

    def num_taken(self, hot: bool) -> int:
        """Inputs of a kind that were given out since it was last replaced."""
        return self._next[hot]

    def remaining(self, hot: bool) -> np.ndarray:
        """The inputs of a kind still to train, in training order."""
        return self._inputs[hot][self._next[hot] :]

    def replace(self, hot: bool, inputs: np.ndarray, weights: np.ndarray | None) -> None:
        """Train `inputs` with loss `weights` for the rest of the epoch's inputs of a kind."""
        self._inputs[hot], self._weights[hot] = inputs, weights
        self._next[hot] = 0
        self._num_replaced[hot] += 1
        self._mix()


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"it has {value!r} for a count")
    return value


def _checked_inputs(inputs: np.ndarray, num_inputs: int) -> np.ndarray:
    is_inside = not len(inputs) or 0 <= inputs.min() <= inputs.max() < num_inputs
    if inputs.ndim != 1 or inputs.dtype.kind != "i" or not is_inside:
        raise ValueError("its inputs are none of this data set's")
    is_there = np.zeros(num_inputs, bool)
    is_there[inputs] = True
    if int(is_there.sum()) < len(inputs):
        raise ValueError("its inputs hold one twice")
    return np.array(inputs)
