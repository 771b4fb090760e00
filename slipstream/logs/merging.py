"""A table's values over all parts of a log: provisional ids become ranks, rare values share one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs.encoding import Part, write_synced
from slipstream.logs.formats import Schema
from slipstream.logs.rows import RARE, folded
from slipstream.logs.vocabulary import TableCodes, Vocabulary, checksum_of
from slipstream.logs.work_files import Table, check_map
from slipstream.tools.npz import open_npz
from slipstream.tools.output import stage_bar
from slipstream.tools.runtime import num_threads, read_json, sync_file, write_json
from slipstream.tools.schema import check_fields

MERGE_BYTES = 64  # of memory a value while columns are merged
PIECE = 1 << 20  # codes read at once
IS_RARE = -2  # in place of an id, until it is known how many other values a table has


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


def merge_tables(
    folder: Path,
    parts: Sequence[Part],
    schema: Schema,
    min_count: int,
    max_bytes: int,
    known: Vocabulary | None,
) -> list[dict[str, Any]]:
    """Merge all tables, several at once, in a work folder; what `merge_table` says of each.

    Tables that an earlier process merged are found there. `known`: of a file that is extended.
    """
    # Linux allows a process some 65,000 maps; each part of each table at hand takes three.
    num_workers = max(1, min(num_threads(), 10_000 // max(len(parts), 1)))

    def merged(table: int) -> dict[str, Any]:
        path = folder / f"table_{table:05}.json"
        if path.exists():
            found = read_json(path, Table)
            maps = [np.fromfile(part.folder / f"map_{table}", np.int32) for part in parts]
            check_map(found, maps, path, extends=known is not None)
            return found
        modulus = schema.moduli[table] if schema.moduli else 0
        how = Merge(max_bytes // num_workers, modulus, min_count, folder)
        if known is not None:
            numbers = known.described["numbers"][table]
            how = how._replace(known=known.tables[table], numbers=numbers)
        found = merge_table(parts, table, how)
        write_json(path, found)
        return found

    with ThreadPoolExecutor(num_workers) as pool:
        tables = range(len(schema.table_names))
        found = pool.map(merged, tables)
        return list(stage_bar(found, "merging", len(tables), unit=" tables"))


def codes_in(folder: Path, counts: Sequence[int]) -> Iterator[np.ndarray]:
    """The codes of all merged tables, in id order, in pieces."""
    for table, size in enumerate(counts):
        for start in range(0, size, PIECE):
            number = min(PIECE, size - start)
            yield np.fromfile(folder / f"codes_{table}", np.uint64, number, offset=8 * start)


def describe_vocabulary(
    folder: Path,
    tables: Sequence[dict[str, Any]],
    manifest: dict[str, Any],
    known: Vocabulary | None,
) -> dict[str, Any]:
    """What a manifest says of the vocabulary, see `slipstream.logs.vocabulary`."""
    counts = [table["distinct"] for table in tables]
    return {
        "checksum": checksum_of(codes_in(folder, counts), np.array(counts)),
        "lineage": [] if known is None else known.lineage,
        "numbers": [table["numbers"] for table in tables],
        "data_set": manifest["data_set"],
        "max_ind_range": manifest["options"]["max_ind_range"],
        "columns": manifest["options"]["columns"],
    }


class Merge(NamedTuple):
    """How a table's values become ids.

    Attributes:
        max_bytes: of memory.
        modulus: codes are taken modulo it; 0: as they are.
        min_count: values with fewer accesses in the training rows share an id.
        folder: where `codes_<table>` is written, the codes in id order.
        known: the values of a file that is extended, which keep their ids; None: it is not.
        numbers: whether that file took whole floats of the table as integers; None: no matter.
    """

    max_bytes: int
    modulus: int
    min_count: int
    folder: Path
    known: TableCodes | None = None
    numbers: bool | None = None


def merge_table(parts: Sequence[Part], table: int, how: Merge) -> dict[str, Any]:
    """Rank a table's values over all parts: `map_<table>` in each part, by provisional id, int32.

    Known values keep their ids, and others follow in the order of their codes. Values with fewer
    than `min_count` accesses in the training rows share the table's last id, or that which others
    shared before; those without any in the rows that stay have none. Works through ranges of codes.
    Returns what the manifest says of the table: distinct ids, the accesses of all, of the empty
    value, of the most accessed 1 % of ids, and of whole floats that were taken as integers; of a
    shared id its number, values and accesses.
    """
    values, num_floats, are_numbers = _values_of(parts, table, how.modulus, how.numbers)
    known, min_count = how.known, how.min_count
    maps = [np.full(len(one.ids), -1, np.int32) for one in values]
    num_missing = num_accesses = rare_values = rare_accesses = 0
    num_known = 0 if known is None else len(known)
    rare_id, num_ids = None if known is None else known.rare_id, num_known
    # At least 1 % of the distinct values.
    num_kept = -(-(num_known + sum(len(one.ids) for one in values)) // 100)
    top = np.empty(0, np.int64)
    has_all = min_count == 1 and not any(one.is_chosen for one in values)
    with open(how.folder / f"codes_{table}", "wb") as file:
        file.write(b"" if known is None else np.ascontiguousarray(known.codes).data)
        for ranges in _ranges([one.codes for one in values], how.max_bytes // MERGE_BYTES):
            merged, of_part = _merged(values, ranges)
            kept = _accesses(len(merged), of_part, "kept")
            ids = np.full(len(merged), -1, np.int32) if known is None else known.find(merged)
            has_own, is_rare = ids < 0, np.zeros(len(merged), bool)
            if not has_all:
                training = _accesses(len(merged), of_part, "training")
                is_new = has_own & (kept > 0)
                has_own = is_new & (training >= min_count) if min_count > 1 else is_new
                is_rare = is_new & ~has_own
            ids[has_own] = np.arange(num_ids, num_ids + int(has_own.sum()))
            is_counted = ids >= 0
            ids[is_rare] = IS_RARE
            for part, (one, among, place) in enumerate(of_part):
                maps[part][one.ids[among]] = ids[place]
            if len(merged) and merged[0] == 0:
                num_missing = int(kept[0])
            file.write(np.ascontiguousarray(merged[has_own]).data)
            num_ids += int(has_own.sum())
            num_accesses += int(kept.sum())
            rare_values += int(is_rare.sum())
            rare_accesses += int(kept[is_rare].sum())
            top = _largest(np.concatenate([top, kept[is_counted]]), num_kept)
        if rare_values and rare_id is None:
            rare_id, num_ids = num_ids, num_ids + 1
            file.write(np.array([RARE]).data)
        sync_file(file)
    for one_part, new_ids in zip(parts, maps, strict=True):
        new_ids[new_ids == IS_RARE] = rare_id if rare_id is not None else -1
        write_synced(one_part.folder / f"map_{table}", new_ids)
    about: dict[str, Any] = {"distinct": num_ids, "missing": num_missing, "numbers": are_numbers}
    about |= {"whole_floats": num_floats, "accesses": num_accesses}
    if rare_id is not None:
        about["rare"] = {"id": rare_id, "values": rare_values, "accesses": rare_accesses}
        top = np.append(top, rare_accesses)
    return {**about, "top": int(_largest(top, max(1, -(-num_ids // 100))).sum())}


def _merged(
    values: Sequence[_Values], ranges: Sequence[slice]
) -> tuple[np.ndarray, list[tuple[_Values, slice, np.ndarray]]]:
    """The distinct codes of a range, sorted; of each part its codes' places among them."""
    cut = [one.codes[among] for one, among in zip(values, ranges, strict=True)]
    is_merged = len(values) == 1 and not values[0].may_repeat
    merged = cut[0] if is_merged else np.unique(np.concatenate(cut))
    places = [np.searchsorted(merged, codes) for codes in cut]
    return merged, list(zip(values, ranges, places, strict=True))


def _largest(counts: np.ndarray, number: int) -> np.ndarray:
    """The `number` largest of some counts, in any order."""
    if len(counts) <= number:
        return counts
    return np.partition(counts, len(counts) - number)[len(counts) - number :]


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


def _values_of(
    parts: Sequence[Part], table: int, modulus: int, numbers: bool | None = None
) -> tuple[list[_Values], int, bool | None]:
    """Each part's values; the accesses of whole floats that count as integers; whether they do.

    Those of texts that all are numbers do: programs write 17.0 for 17 in a column that lacks a
    value. Only at the end of a log it is known that all are, so codes are changed here, unless an
    earlier log has decided, `numbers`. None: there are no texts.
    """
    names = [f"{name}_{table}" for name in ("codes", "ids", "counts", "floats")]
    opened = [open_npz(part.folder / "vocabularies.npz", names, others=False) for part in parts]
    for part, arrays in zip(parts, opened, strict=True):
        _check_vocabulary(part, table, arrays)
    found = {part.info["are_numbers"][table] for part in parts} - {None}
    are_numbers = numbers if numbers is not None or not found else found == {True}
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
            changed = folded(changed, modulus)
        if changed is not codes:
            order = np.argsort(changed, kind="stable")
            codes, ids = changed[order], ids[order]
        may_repeat = codes is not arrays[names[0]]
        values.append(_Values(codes, ids, kept, training, is_chosen, may_repeat))
    return values, num_floats, are_numbers


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
