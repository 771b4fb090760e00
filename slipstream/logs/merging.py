"""A table's values over all parts of a log: provisional ids become ranks, rare values share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs.encoding import Part, write_synced
from slipstream.tools.npz import open_npz
from slipstream.tools.schema import check_fields

MERGE_BYTES = 64  # of memory a value while columns are merged
RARE = -2  # until it is known how many other values a table has


class _Values(NamedTuple):
    """A part's values of a table: codes, sorted, their provisional ids; accesses by those ids.

    `is_chosen`: rows are, so a value may lack accesses; `may_repeat`: two values may be one code.
    """

    codes: np.ndarray
    ids: np.ndarray
    kept: np.ndarray
    training: np.ndarray
    is_chosen: bool
    may_repeat: bool


def merge_table(
    parts: Sequence[Part], table: int, max_bytes: int, modulus: int = 0, min_count: int = 1
) -> dict[str, Any]:
    """Rank a table's values over all parts: `map_<table>` in each part, by provisional id, int32.

    Values with fewer than `min_count` accesses in the training rows share the table's last id;
    those without any in the rows that stay have none. Works through ranges of codes that fit into
    `max_bytes`. Returns what the manifest says of the table: distinct ids, the accesses of all, of
    the empty value, of the most accessed 1 % of ids, and of whole floats that were taken as
    integers; of a shared id its number, values and accesses.
    """
    values, num_floats = _values_of(parts, table, modulus)
    maps = [np.full(len(one.ids), -1, np.int32) for one in values]
    num_ids = num_missing = num_accesses = 0
    rare_values = rare_accesses = 0
    num_kept = -(-sum(len(one.ids) for one in values) // 100)  # at least 1 % of the distinct values
    top = np.empty(0, np.int64)
    has_all = min_count == 1 and not any(one.is_chosen for one in values)
    for ranges in _ranges([one.codes for one in values], max_bytes // MERGE_BYTES):
        cut = [one.codes[among] for one, among in zip(values, ranges, strict=True)]
        is_merged = len(values) == 1 and not values[0].may_repeat
        merged = cut[0] if is_merged else np.unique(np.concatenate(cut))
        places = [np.searchsorted(merged, codes) for codes in cut]
        of_part = list(zip(values, ranges, places, strict=True))
        kept = _accesses(len(merged), of_part, "kept")
        if has_all:
            has_own, is_rare = np.ones(len(merged), bool), np.zeros(len(merged), bool)
            ranks = np.arange(num_ids, num_ids + len(merged))
        else:
            training = _accesses(len(merged), of_part, "training")
            has_own = (training >= min_count) if min_count > 1 else kept > 0
            is_rare = ~has_own & (kept > 0)
            ranks = np.where(has_own, num_ids + np.cumsum(has_own) - 1, np.where(is_rare, RARE, -1))
        for part, (one, among, place) in enumerate(of_part):
            maps[part][one.ids[among]] = ranks[place]
        if len(merged) and merged[0] == 0:
            num_missing = int(kept[0])
        num_ids += int(has_own.sum())
        num_accesses += int(kept.sum())
        rare_values += int(is_rare.sum())
        rare_accesses += int(kept[is_rare].sum())
        top = np.concatenate([top, kept[has_own]])
        top = top if len(top) <= num_kept else np.partition(top, len(top) - num_kept)[-num_kept:]
    about: dict[str, Any] = {}
    if rare_values:
        about["rare"] = {"id": num_ids, "values": rare_values, "accesses": rare_accesses}
        top = np.append(top, rare_accesses)
        num_ids += 1
    for one_part, new_ids in zip(parts, maps, strict=True):
        new_ids[new_ids == RARE] = num_ids - 1
        write_synced(one_part.folder / f"map_{table}", new_ids)
    top.sort()
    num_top = max(1, -(-num_ids // 100))
    about |= {"distinct": num_ids, "missing": num_missing, "whole_floats": num_floats}
    about["accesses"] = num_accesses
    return {**about, "top": int(top[max(len(top) - num_top, 0) :].sum())}


def check_tables(tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` for a table without a row: all its lists are empty."""
    for name, table in tables.items():
        if not table["distinct"]:
            raise ValueError(f"column {name!r} holds no value at all; leave it out of categorical")


def _accesses(size: int, of_part: Sequence[tuple[_Values, slice, np.ndarray]], by: str) -> Any:
    """Accesses (size,) int64 of merged values, by the rows that stay (`kept`), or `training`."""
    total = np.zeros(size, np.int64)
    for one, among, place in of_part:
        counts = getattr(one, by)[one.ids[among]]
        if one.may_repeat:
            np.add.at(total, place, counts)
        else:
            total[place] += counts
    return total


def _values_of(parts: Sequence[Part], table: int, modulus: int) -> tuple[list[_Values], int]:
    """Each part's values; the accesses of whole floats that count as integers.

    Those of texts that all are numbers do: programs write 17.0 for 17 in a column that lacks a
    value. Only at the end of a log it is known that all are, so codes are changed here.
    """
    names = [f"{name}_{table}" for name in ("codes", "ids", "counts", "floats")]
    opened = [open_npz(part.folder / "vocabularies.npz", names, others=False) for part in parts]
    for part, arrays in zip(parts, opened, strict=True):
        _check_vocabulary(part, table, arrays)
    are_numbers = {part.info["are_numbers"][table] for part in parts} - {None} == {True}
    values, num_floats = [], 0
    for part, arrays in zip(parts, opened, strict=True):
        codes, ids, counts, floats = (arrays[name] for name in names)
        kept = training = counts
        is_chosen = (part.folder / "counts.npz").exists()
        if is_chosen:
            of_rows = [f"{name}_{table}" for name in ("kept", "training")]
            counted = open_npz(part.folder / "counts.npz", of_rows, others=False)
            for name in of_rows:
                check_fields(part.folder, counted, {name: ("int64", 1)})
                if len(counted[name]) != len(ids) or counted[name].min(initial=0) < 0:
                    raise ValueError(f"{part.folder}/counts.npz: {name}: not the values' accesses")
            kept, training = (counted[name] for name in of_rows)
        changed = codes
        if are_numbers and len(floats):
            at = np.minimum(np.searchsorted(floats[:, 0], codes), len(floats) - 1)
            is_float = floats[at, 0] == codes
            changed = np.where(is_float, floats[at, 1], codes)
            num_floats += int(kept[ids[is_float]].sum())
        if modulus:
            changed = changed % np.uint64(modulus) + np.uint64(1)
        if changed is not codes:
            order = np.argsort(changed, kind="stable")
            codes, ids = changed[order], ids[order]
        may_repeat = codes is not arrays[names[0]]
        values.append(_Values(codes, ids, kept, training, is_chosen, may_repeat))
    return values, num_floats


def _check_vocabulary(part: Part, table: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError` for arrays of a part's table that no encoding writes."""
    path = part.folder / "vocabularies.npz"
    types = {"codes": ("uint64", 1), "ids": ("int32", 1), "counts": ("int32", 1)}
    types |= {"floats": ("uint64", 2)}
    check_fields(path, arrays, {f"{name}_{table}": kind for name, kind in types.items()})
    codes, ids, counts, floats = (arrays[f"{name}_{table}"] for name in types)
    for name in ("values", "are_numbers"):
        if len(part.info[name]) <= table:
            raise ValueError(
                f"{part.folder}/part.json: {name}: of {len(part.info[name])} tables; delete "
                f"{part.folder.parent} and run again"
            )
    size, is_number = part.info["values"][table], part.info["are_numbers"][table]
    is_id = np.zeros(size, bool)
    if len(ids) == size and 0 <= ids.min(initial=0) <= ids.max(initial=-1) < size:
        is_id[ids] = True
    fits = {
        "codes": len(codes) == size and bool((codes[1:] > codes[:-1]).all()),
        "ids": bool(is_id.all()),
        "counts": len(counts) == size and counts.min(initial=1) > 0,
        "floats": floats.shape[1:] == (2,) and (is_number is True or not len(floats)),
    }
    for name, is_so in fits.items():
        if not is_so:
            raise ValueError(
                f"{path}: {name}_{table}: not what is written, or not what part.json says; delete "
                f"{part.folder.parent} and run again"
            )


def _ranges(codes: Sequence[np.ndarray], max_values: int) -> Iterator[list[slice]]:
    """Cut sorted arrays at common codes, into slices of about `max_values` values together."""
    total = sum(map(len, codes))
    num_ranges = max(1, -(-total // max(max_values, 1)))
    sample = np.sort(np.concatenate([array[:: max(1, total // 4096)] for array in codes]))
    bounds = np.unique(sample[np.arange(1, num_ranges) * len(sample) // num_ranges])
    cuts = [[0, *np.searchsorted(array, bounds), len(array)] for array in codes]
    for i in range(len(bounds) + 1):
        yield [slice(cut[i], cut[i + 1]) for cut in cuts]
