"""What each K of preprocessing's `--min-count` would give, before anything is preprocessed again.

Under K the rows of a table that have fewer than K accesses are one row with all their accesses:
fewer rows, and more inputs that are hot within the same memory. Popular rows stay a prefix of the
slots, so no K needs a ranking of its own: only the shared rows, one a table, find new places.

Price: no more memory than ranking took; 2 % of segregation's time where the hot memory holds all
rows, 5 to 8 % where it holds a twentieth or less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.training.popularity import ALL_BITS, Ranking

MIN_COUNTS = (1, 2, 4, 10, 20, 50)  # at most 8, as many as a byte has bits


def min_counts_after(manifest: Mapping[str, Any]) -> list[int]:
    """The K that a processed file was made with, by its manifest, and larger ones."""
    made_with = (manifest.get("options") or {}).get("min_count") or 1
    return [made_with, *(count for count in MIN_COUNTS if count > made_with)]


def rare_ids_of(manifest: Mapping[str, Any], num_tables: int) -> list[int | None]:
    """The id of each table's row that rare values share already; None: it has none."""
    columns = manifest.get("table_columns") or []
    ids = [column.get("rare_id") if isinstance(column, dict) else None for column in columns]
    return ids if len(ids) == num_tables else [None] * num_tables


@dataclass(frozen=True)
class MergedRows:
    """All rows under several K.

    Attributes:
        min_counts: the K; the first is that of the rows as they are.
        num_rows: rows left under each.
        hot_bits: (rows + 1,) uint8 by slot: bit i says whether the row, or the one it is merged
            into, is hot under `min_counts[i]`. The last is of absent elements, whose slot is -1.
    """

    min_counts: Sequence[int]
    num_rows: Sequence[int]
    hot_bits: np.ndarray

    def figures(self, by_bits: np.ndarray, row_bytes: int) -> list[tuple[int, int, int, float]]:
        """K, rows left, their bytes and the share of hot inputs, for each K.

        `by_bits` is the (256,) number of inputs with each value of bits.
        """
        bits_of_value = np.arange(len(by_bits))[:, None] >> np.arange(len(self.min_counts)) & 1
        shares = (by_bits @ bits_of_value / by_bits.sum()).tolist()
        return [
            (min_count, rows, rows * row_bytes, share)
            for min_count, rows, share in zip(self.min_counts, self.num_rows, shares, strict=True)
        ]


def merge_rare(
    ranking: Ranking,
    table_sizes: np.ndarray,
    rare_ids: Sequence[int | None],
    min_counts: Sequence[int],
    num_hot: int,
) -> MergedRows:
    """Merge each table's rows of fewer than K accesses, and find the `num_hot` most popular.

    Rows without any access are among them. Ties go by table, then id, a shared row last of its
    table. `min_counts[0]` is of the rows as they are. A file that has shared rows (`rare_ids`, one
    a table or None) keeps them under larger K: rows merge into them, whatever their own accesses.

    An approximation as far as preprocessing counts a value's rows: here its accesses count.
    """
    counts, ends = ranking.access_counts, np.cumsum(table_sizes).astype(np.int32)
    tables = np.split(ranking.slot_of_row, ends[:-1])
    row_of_slot = np.empty(len(counts), np.int32)
    row_of_slot[ranking.slot_of_row] = np.arange(len(counts), dtype=np.int32)
    kept = {t: int(tables[t][rare]) for t, rare in enumerate(rare_ids) if rare is not None}
    rows_of_count = _rows_of_counts(counts, row_of_slot, ends, max(min_counts[1:], default=0))
    hot_bits = np.full(len(counts) + 1, ALL_BITS, np.uint8)
    hot_bits[num_hot:-1] &= ALL_BITS - 1
    num_rows = [len(counts)]
    for bit, min_count in enumerate(min_counts[1:], start=1):
        mine, others = np.uint8(1 << bit), np.uint8(ALL_BITS - (1 << bit))
        frequent = _num_with(counts, min_count)
        num_rare = rows_of_count[:min_count].sum(axis=0)
        accesses = np.arange(min_count) @ rows_of_count[:min_count]
        holes = {t: slot for t, slot in kept.items() if slot < frequent}
        for table, slot in holes.items():
            num_rare[table] += 1
            accesses[table] += counts[slot]
        shared = {t: int(accesses[t]) for t in np.flatnonzero(num_rare).tolist()}
        places = _places_of(shared, counts, row_of_slot[:frequent], ends)
        hot, bound = _hot_among(places, sorted(holes.values()), num_hot)
        hot_bits[bound:frequent] &= others
        for table in shared.keys() - hot:
            slots = tables[table]
            hot_bits[slots[slots >= frequent]] &= others
        for table, slot in holes.items():
            hot_bits[slot] = hot_bits[slot] | mine if table in hot else hot_bits[slot] & others
        num_rows.append(frequent - len(holes) + len(shared))
    return MergedRows(min_counts, num_rows, hot_bits)


def _num_with(counts: np.ndarray, least: int) -> int:
    """How many slots have at least `least` accesses: `counts` by slot never increase."""
    return bisect_left(range(len(counts)), 1 - least, key=lambda slot: -counts[slot])


def _rows_of_counts(
    counts: np.ndarray, row_of_slot: np.ndarray, ends: np.ndarray, limit: int
) -> np.ndarray:
    """Rows (limit, T) of each table that have 0, 1, ... `limit` - 1 accesses."""
    rows = np.empty((limit, len(ends)), np.int64)
    for count in range(limit):
        # Rows of one count are in the order of their numbers, so table after table.
        equal = row_of_slot[_num_with(counts, count + 1) : _num_with(counts, count)]
        rows[count] = np.diff(np.searchsorted(equal, ends), prepend=0)
    return rows


def _places_of(
    shared: Mapping[int, int], counts: np.ndarray, row_of_slot: np.ndarray, ends: np.ndarray
) -> list[tuple[int, int]]:
    """(table, slot) of shared rows, most popular first: the slot that each stands just before.

    `shared` gives the accesses of each table's, `row_of_slot` the rows of the slots that are left.
    """
    places = []
    for table, accesses in sorted(shared.items(), key=lambda one: (-one[1], one[0])):
        first, last = _num_with(counts, accesses + 1), _num_with(counts, accesses)
        tied = np.searchsorted(row_of_slot[first:last], ends[table])
        places.append((table, min(first, len(row_of_slot)) + int(tied)))
    return places


def _hot_among(
    places: Sequence[tuple[int, int]], holes: Sequence[int], num_hot: int
) -> tuple[set[int], int]:
    """Which tables' shared rows are hot, and the slot below which all other rows are.

    `holes`, ascending, are slots whose rows have become part of shared ones.
    """
    ranks = [slot - bisect_left(holes, slot) + before for before, (_, slot) in enumerate(places)]
    hot = {table for (table, _), rank in zip(places, ranks, strict=True) if rank < num_hot}
    bound = num_hot - len(hot)
    for hole in holes:
        bound += hole < bound
    return hot, bound
