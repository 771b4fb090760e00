"""Rows by popularity: accesses, slots, and how many inputs a number of hot rows makes hot.

FAE (arXiv 2103.00686, section on the calibrator) keeps lists of hot rows per table; here all rows
of all tables are numbered by popularity, so that any hot set is a prefix of the slots.

Price: 28 bytes of memory a row while ranking, 4 bytes an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

CHUNK = 1 << 17  # inputs handled at once
NUM_BUDGETS = 10


class InputRows(Protocol):
    """What ranking reads of a set of inputs."""

    def __len__(self) -> int: ...

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Row numbers (len(inputs), F) int64 of the given inputs."""


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


def count_accesses(train: InputRows, num_rows: int, sampled: np.ndarray | None) -> np.ndarray:
    """Accesses (num_rows,) int64 of each row, numbered table after table, in (sampled) inputs."""
    counts = np.zeros(num_rows, np.int64)
    for part in chunks(len(train), "counting accesses"):
        rows = train.slots_of(part).numpy()
        if sampled is not None:
            rows = rows[sampled[part]]
        np.add.at(counts, rows.ravel(), 1)
    return counts


def rank_rows(counts: np.ndarray) -> Ranking:
    """Give slot 0 to the row with most accesses; equal counts keep their order (table, then id)."""
    if len(counts) > np.iinfo(np.int32).max:
        raise ValueError(f"got {len(counts)} embedding rows; expected at most 2147483647")
    by_popularity = np.argsort(-counts, kind="stable")
    slot_of_row = np.empty(len(counts), np.int32)
    slot_of_row[by_popularity] = np.arange(len(counts), dtype=np.int32)
    return Ranking(slot_of_row, counts[by_popularity])


def rows_above(ranking: Ranking, hot_threshold: float) -> int:
    """Rows with at least a share `hot_threshold` of all accesses."""
    # The same division as in `Ranking.hot_threshold`: a Lambda that was printed gives its rows
    # back.
    shares = ranking.access_counts / max(ranking.num_accesses, 1)
    return int(np.count_nonzero(shares >= hot_threshold))


def largest_slots(train: InputRows, slot_of_row: np.ndarray) -> np.ndarray:
    """The largest slot of each input, int32 (n,): the input is hot iff it is below `num_hot`."""
    largest = np.empty(len(train), np.int32)
    for part in chunks(len(train), "ranking inputs"):
        largest[part] = slot_of_row[train.slots_of(part).numpy()].max(axis=1)
    return largest


def budget_table(
    ranking: Ranking, largest: np.ndarray, row_bytes: int
) -> list[tuple[int, int, float, float]]:
    """Ten budgets, all rows down by halves: (bytes, hot rows, share of accesses, of inputs)."""
    num_rows = len(ranking.slot_of_row)
    ordered = np.sort(largest)
    table = []
    for halvings in range(NUM_BUDGETS):
        num_hot = num_rows >> halvings
        hot_inputs = int(np.searchsorted(ordered, num_hot)) / max(len(ordered), 1)
        table.append((num_hot * row_bytes, num_hot, ranking.share_of_accesses(num_hot), hot_inputs))
    return table


def chunks(num_inputs: int, purpose: str) -> Iterator[slice]:
    """Slices of at most `CHUNK` inputs, with a progress bar on a terminal."""
    starts = range(0, num_inputs, CHUNK)
    for start in tqdm(starts, desc=purpose, unit_scale=CHUNK, unit=" inputs", disable=None):
        yield slice(start, min(start + CHUNK, num_inputs))
