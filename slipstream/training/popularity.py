"""Rows by popularity: accesses, slots, and how many inputs a number of hot rows makes hot.

FAE (arXiv 2103.00686, section on the calibrator) keeps lists of hot rows per table; here all rows
of all tables are numbered by popularity, so that any hot set is a prefix of the slots.

Price: 28 bytes of memory a row while ranking; nothing that grows with the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from slipstream.tools.output import stage_bar
from slipstream.tools.runtime import ordered
from slipstream.tools.streams import stream

CHUNK = 1 << 15  # inputs handled at once
NUM_BUDGETS = 10
MAX_UINT16 = 2**16 - 1
ALL_BITS = 2**8 - 1


class InputRows(Protocol):
    """What ranking reads of a set of inputs."""

    day_offsets: np.ndarray  # (days + 1,) int64
    has_absent: bool  # whether an element may be absent, its row number -1

    def __len__(self) -> int: ...

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Row numbers (len(inputs), C) int64 of the given inputs."""

    def release(self, inputs: slice) -> None:
        """Give back the memory of mapped inputs that were read."""


@dataclass(frozen=True)
class Ranking:
    """All rows by popularity.

    Attributes:
        slot_of_row: (num_rows,) int32, table offset + id -> slot.
        access_counts: (num_rows,) int64 by slot, so never increasing.
    """

    slot_of_row: np.ndarray
    access_counts: np.ndarray

    @property
    def num_accesses(self) -> int:
        """Accesses counted in all."""
        return int(self.access_counts.sum())

    def share_of_accesses(self, num_hot: int) -> float:
        """Share of the accesses that go to slots below `num_hot`."""
        return float(self.access_counts[:num_hot].sum()) / max(self.num_accesses, 1)

    def hot_threshold(self, num_hot: int) -> float:
        """Lambda: the share of all accesses that the least popular hot row takes; 0: none hot."""
        return (
            float(self.access_counts[num_hot - 1]) / max(self.num_accesses, 1) if num_hot else 0.0
        )

    def num_hot(self, hot_threshold: float | None, most_rows: int) -> int:
        """Hot rows: those with a share Lambda of the accesses or more; None: `most_rows`."""
        if hot_threshold is not None:
            return rows_above(self, hot_threshold)
        return min(len(self.slot_of_row), most_rows)


def rank_inputs(train: InputRows, num_rows: int, sampling_rate: float, seed: int) -> Ranking:
    """All rows by their accesses in the training inputs, see `count_accesses`."""
    return rank_rows(count_accesses(train, num_rows, sampling_rate, seed))


def count_accesses(
    train: InputRows, num_rows: int, sampling_rate: float = 100.0, seed: int = 0
) -> np.ndarray:
    """Accesses (num_rows,) int64 of each row, numbered table after table.

    `sampling_rate` is the percentage of the inputs that are counted, the same of each chunk; at
    least one input is.
    """
    counts = np.zeros(num_rows, np.int64)
    rng = stream(seed, "accesses")
    share, num_counted = sampling_rate / 100, 0

    def rows_of(part: slice) -> tuple[slice, np.ndarray]:
        return part, train.slots_of(part).numpy()

    for part, rows in ordered(rows_of, chunks(len(train), "counting accesses")):
        if share < 1:
            wanted = max(1, round(part.stop * share)) - num_counted
            rows = rows[rng.choice(len(rows), min(wanted, len(rows)), replace=False)]
            num_counted += len(rows)
        rows = rows.ravel()
        np.add.at(counts, rows[rows >= 0] if train.has_absent else rows, 1)
        train.release(part)
    return counts


def rank_rows(counts: np.ndarray) -> Ranking:
    """Give slot 0 to the row with most accesses; equal counts keep their order (table, then id)."""
    if len(counts) > np.iinfo(np.int32).max:
        raise ValueError(f"got {len(counts)} embedding rows; expected at most 2147483647")
    # numpy sorts 16 bits by radix, five times as fast as 64; few rows have more accesses.
    frequent, rare = np.flatnonzero(counts > MAX_UINT16), np.flatnonzero(counts <= MAX_UINT16)
    frequent = frequent[np.argsort(-counts[frequent], kind="stable")]
    rare = rare[np.argsort((MAX_UINT16 - counts[rare]).astype(np.uint16), kind="stable")]
    by_popularity = np.concatenate([frequent, rare])
    slot_of_row = np.empty(len(counts), np.int32)
    slot_of_row[by_popularity] = np.arange(len(counts), dtype=np.int32)
    return Ranking(slot_of_row, counts[by_popularity])


def rows_above(ranking: Ranking, hot_threshold: float) -> int:
    """Rows with at least a share `hot_threshold` of all accesses."""
    # The same division as in `Ranking.hot_threshold`: a Lambda that was printed gives its rows
    # back.
    shares = ranking.access_counts / max(ranking.num_accesses, 1)
    return int(np.count_nonzero(shares >= hot_threshold))


def count_hot_inputs(
    train: InputRows,
    slot_of_row: np.ndarray,
    bounds: Sequence[int],
    hot_bits: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many inputs each number of hot rows makes hot: those whose slots are all below it.

    Returns int64 counts in the order of `bounds`, those of the first bound by day, and the (256,)
    inputs with each value of bits: those that all their slots have in `hot_bits`, (rows + 1,) uint8
    (None: all bits), an absent element (slot -1) the last one's, which is all bits.
    """
    ascending = np.sort(bounds)
    below = np.zeros(len(bounds) + 1, np.int64)
    by_day = np.zeros(len(train.day_offsets) - 1, np.int64)
    by_bits = np.zeros(ALL_BITS + 1, np.int64)
    if hot_bits is None:
        hot_bits = np.full(len(slot_of_row) + 1, ALL_BITS, np.uint8)
    least_bits = np.bitwise_and.reduce(hot_bits)
    first_lacking = int((hot_bits != ALL_BITS).argmax())
    if least_bits == ALL_BITS:
        first_lacking = len(hot_bits)

    def largest(part: slice) -> tuple[slice, np.ndarray, np.ndarray]:
        slots = slots_of_rows(slot_of_row, train, part)
        most = slots.max(axis=1)
        lacking = np.flatnonzero(most >= first_lacking)
        bits = hot_bits.take(most.take(lacking))
        # The largest slot alone decides on most inputs: others have all bits, or no more to lose.
        unsure = np.flatnonzero(bits != least_bits)
        found = hot_bits.take(slots.take(lacking.take(unsure), axis=0))
        bits[unsure] = np.bitwise_and.reduce(found.T.copy(), axis=0)  # twice as fast as axis 1
        return part, most, np.bincount(bits, minlength=len(by_bits))

    for part, slots, bits in ordered(largest, chunks(len(train), "ranking inputs")):
        found = np.searchsorted(ascending, slots, side="right")
        below += np.bincount(found, minlength=len(below))
        by_bits += bits
        train.release(part)
        hot = part.start + np.flatnonzero(slots < bounds[0])
        days = np.searchsorted(train.day_offsets, hot, side="right") - 1
        by_day += np.bincount(days, minlength=len(by_day))
    by_bits[ALL_BITS] += len(train) - by_bits.sum()
    return np.cumsum(below)[np.searchsorted(ascending, bounds)], by_day, by_bits


def slots_of_rows(slot_of_row: np.ndarray, inputs: InputRows, part: slice) -> np.ndarray:
    """Slots (len(part), C) int32 of some inputs, whose rows are numbered table after table."""
    rows = inputs.slots_of(part).numpy()
    slots = slot_of_row[rows]
    if inputs.has_absent:
        slots[rows < 0] = -1
    return slots


def budgets_of(ranking: Ranking) -> list[int]:
    """Ten numbers of hot rows to compare: all of them, and down by halves."""
    return [len(ranking.slot_of_row) >> halvings for halvings in range(NUM_BUDGETS)]


def chunks(num_inputs: int, purpose: str) -> Iterator[slice]:
    """Slices of at most `CHUNK` inputs, with a progress bar on a terminal."""
    starts = range(0, num_inputs, CHUNK)
    for start in stage_bar(starts, purpose, unit_scale=CHUNK, unit=" inputs"):
        yield slice(start, min(start + CHUNK, num_inputs))
