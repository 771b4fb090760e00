"""A set of click inputs over whole arrays, in memory or mapped from files larger than it.

A mini-batch is one `np.take` per array; dense values are transformed (`slipstream.logs.transforms`)
when it is cut. What does not fit into memory is a *stream*: read by blocks, checked as it is read,
and given back.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.logs.transforms import Transforms, log_of_all
from slipstream.tools.mapped import advise, is_mapped
from slipstream.tools.runtime import available_memory_bytes, ordered

BLOCK_INPUTS = 4096  # read from disk together: 640 kB of Criteo
CHECK_ROWS = 1 << 14  # rows checked at once when a file is opened
CHECK_WEIGHTS = 1 << 20  # and where only weights are: 4 MB


class ClickInputs:
    """A set of inputs over whole arrays.

    Args:
        dense: (n, num_dense), as they are stored.
        categories: (n, C) ids, or slots where `slot_offsets` is None; -1: absent.
        labels: (n,) 0 or 1.
        day_offsets: (days + 1,) first row of each day, then n.
        slot_offsets: (C,) added to the ids to number all tables' rows in one sequence.
        stream: for arrays larger than memory; None: they are checked and fit.
        has_absent: whether any element may be absent.
        transforms: of the dense values; None: the logarithm of all.
        weights: (n,) float32, at least 0: how much each input counts in loss and metrics; None: 1.
    """

    def __init__(
        self,
        dense: np.ndarray,
        categories: np.ndarray,
        labels: np.ndarray,
        day_offsets: np.ndarray,
        slot_offsets: np.ndarray | None = None,
        stream: Stream | None = None,
        has_absent: bool = False,
        transforms: Transforms | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.dense, self.categories, self.labels = dense, categories, labels
        self.day_offsets, self._slot_offsets, self._stream = day_offsets, slot_offsets, stream
        self.has_absent, self.weights = has_absent, weights
        self.transforms = transforms or log_of_all(dense.shape[1])
        self._num_read, self._is_announced = 0, False
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_dense(self) -> int:
        """Dense features of an input."""
        return self.dense.shape[1]

    @property
    def arrays(self) -> list[np.ndarray]:
        """All arrays, each of one entry an input."""
        return present(self.dense, self.categories, self.labels, self.weights)

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Slots (B, C) int64 of the given inputs."""
        # numpy, as in `batch`: a thread beside the training loop must not start a pool of its own.
        categories = _take(self.categories, inputs)
        if self._stream is not None:
            _check_ids(self._stream.source, categories, self._stream.limits, self._stream.least)
            self._forget(len(categories))
        if self._slot_offsets is None:
            return torch.from_numpy(categories.astype(np.int64))
        rows = np.add(categories, self._slot_offsets, dtype=np.int64)
        if self.has_absent:
            rows[categories < 0] = -1
        return torch.from_numpy(rows)

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Dense (B, num_dense) float32, slots (B, C) int64 and labels (B,) float32."""
        values = _take(self.dense, inputs)
        if self._stream is not None:
            _check_dense(self._stream.source, values)
            _check_labels(self._stream.source, _take(self.labels, inputs))
        dense = torch.from_numpy(self.transforms.apply(values))
        labels = _take(self.labels, inputs).astype(np.float32)
        return dense, self.slots_of(inputs), torch.from_numpy(labels)

    def weights_of(self, inputs: np.ndarray | slice) -> np.ndarray | None:
        """Weights (B,) float32 of the given inputs, in host memory; None: all 1."""
        if self.weights is None:
            return None
        weights = _take(self.weights, inputs)
        if self._stream is not None:
            _check_weights(self._stream.source, weights)
        return weights

    def _forget(self, num_inputs: int) -> None:
        """Give back all memory once as many inputs were read as may be in memory."""
        assert self._stream is not None
        self._num_read += num_inputs
        if self._num_read > self._stream.num_kept:
            self._num_read = 0
            self.release(slice(None))

    def will_need(self, inputs: np.ndarray) -> None:
        """Have the kernel read these inputs ahead, in runs of neighbours."""
        if not self._is_announced:
            # Pages that are asked for all the same are then read alone, not megabytes around them.
            for array in self.arrays:
                advise(array, mmap.MADV_RANDOM)
            self._is_announced = True
        blocks = np.unique(inputs // BLOCK_INPUTS)
        runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1) if len(blocks) else []
        for run in runs:
            part = slice(int(run[0]) * BLOCK_INPUTS, (int(run[-1]) + 1) * BLOCK_INPUTS)
            for array in self.arrays:
                advise(array[part], mmap.MADV_WILLNEED)

    def release(self, inputs: slice) -> None:
        """Give back the memory of mapped inputs that were read; they can be read again."""
        for array in self.arrays:
            advise(array[inputs], mmap.MADV_DONTNEED)

    @property
    def window(self) -> int:
        """Inputs to shuffle among each other where they are streamed; 0: they are in memory."""
        return 0 if self._stream is None else self._stream.num_kept

    def rows(self, start: int, stop: int) -> ClickInputs:
        """The inputs from `start` to `stop`, sharing memory; days are cut to match."""
        inside = self.day_offsets[(self.day_offsets > start) & (self.day_offsets < stop)]
        offsets = np.concatenate([[start], inside, [stop]]) - start
        return ClickInputs(
            self.dense[start:stop],
            self.categories[start:stop],
            self.labels[start:stop],
            offsets,
            self._slot_offsets,
            self._stream,
            self.has_absent,
            self.transforms,
            None if self.weights is None else self.weights[start:stop],
        )


@dataclass(frozen=True)
class Stream:
    """How inputs that do not fit into memory are read.

    Attributes:
        source: the file, for errors.
        limits, least: (C,) ids or slots of each column are below, and at least; checked as inputs
            are read.
        num_kept: inputs in memory at most, about.
    """

    source: str
    limits: np.ndarray
    least: np.ndarray
    num_kept: int


def stream_of(
    source: str,
    arrays: Sequence[np.ndarray],
    limits: np.ndarray,
    least: np.ndarray,
    max_memory: int | None,
) -> Stream | None:
    """Whether inputs are to be streamed: their arrays take more than `max_memory` bytes.

    None stands for half of the memory that is free. Arrays that are not mapped are in memory
    already.
    """
    num_bytes = sum(array.nbytes for array in arrays)
    if max_memory is None:
        max_memory = available_memory_bytes() // 2
    if num_bytes <= max_memory or not all(map(is_mapped, arrays)):
        return None
    num_inputs = len(arrays[0])
    return Stream(source, limits, least, max(1, num_inputs * max_memory // num_bytes // 4))


def _take(array: np.ndarray, inputs: np.ndarray | slice) -> np.ndarray:
    # `take` is faster, but first copies a whole array that is not aligned or not C-ordered, as in
    # files of older scripts.
    if isinstance(inputs, slice) or not (array.flags.aligned and array.flags.c_contiguous):
        return array[inputs]
    return array.take(inputs, axis=0)


def check_days(source: str, days: np.ndarray, num_rows: int) -> None:
    """Raise `ValueError` for day offsets that do not cover the rows."""
    if len(days) < 2 or days[0] != 0 or days[-1] != num_rows or np.any(np.diff(days) < 0):
        raise ValueError(f"{source}: its days do not cover its {num_rows} rows")


def present(*arrays: np.ndarray | None) -> list[np.ndarray]:
    """Those of the arrays that there are."""
    return [array for array in arrays if array is not None]


def check_lengths(source: str, **arrays: np.ndarray | None) -> None:
    """Raise `ValueError` for arrays of different lengths, of those that there are."""
    lengths = {name: len(array) for name, array in arrays.items() if array is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: arrays of different lengths {lengths}; rebuild the file")


def check_arrays(
    source: str,
    dense: np.ndarray,
    ids: np.ndarray,
    labels: np.ndarray,
    limits: np.ndarray,
    least: np.ndarray,
    weights: np.ndarray | None = None,
) -> None:
    """Raise `ValueError` for values that no input may hold; one pass over all."""
    arrays = present(dense, ids, labels, weights)

    def check(start: int) -> None:
        part = slice(start, start + CHECK_ROWS)
        _check_dense(source, dense[part])
        _check_ids(source, ids[part], limits, least)
        _check_labels(source, labels[part])
        if weights is not None:
            _check_weights(source, weights[part])
        for array in arrays:
            advise(array[part], mmap.MADV_DONTNEED)

    for _ in ordered(check, range(0, len(labels), CHECK_ROWS)):
        pass


def _check_dense(source: str, dense: np.ndarray) -> None:
    if dense.dtype.kind == "f" and not np.isfinite(dense).all():
        raise ValueError(f"{source}: a dense feature holds NaN or an infinite value")


def _check_ids(source: str, ids: np.ndarray, sizes: np.ndarray, least: np.ndarray) -> None:
    if not len(ids):
        return
    low, high = ids.min(axis=0), ids.max(axis=0)
    bad = np.flatnonzero((low < least) | (high >= sizes))
    if len(bad):
        column = int(bad[0])
        raise ValueError(
            f"{source}: category {column + 1} has ids from {low[column]} to {high[column]}; "
            f"expected {least[column]} to {int(sizes[column]) - 1}"
        )


def _check_labels(source: str, labels: np.ndarray) -> None:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{source}: labels other than 0 and 1")


def _check_weights(source: str, weights: np.ndarray) -> None:
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{source}: weights that are negative, NaN or infinite")


def sum_of_weights(weights: np.ndarray) -> float:
    """All weights added up; one pass, whose memory is given back."""
    total = 0.0
    for start in range(0, len(weights), CHECK_WEIGHTS):
        part = weights[start : start + CHECK_WEIGHTS]
        total += float(part.sum(dtype=np.float64))
        advise(part, mmap.MADV_DONTNEED)
    return total


def float_weights(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """The weights of an opened file, float32 whatever they are stored as; None: it has none."""
    weights = arrays.get("weights")
    if weights is None:
        return None
    with np.errstate(over="ignore"):  # infinite then, which is refused
        return weights.astype(np.float32, copy=False)
