"""Category ids: distinct values per column, numbered while a log streams by and ranked at its end.

Rows go to *parts*, folders on disk, with provisional ids in order of first appearance and with the
part's vocabularies; a part ends with its file, after `PART_ROWS` rows, or when its vocabularies
fill the memory they may take. When all parts are written, `merge_table` turns a column's
provisional ids into ranks among the sorted values of the whole log, so ids depend on the log alone.

Price: 16 bytes of memory a distinct value of a part, twice that for a moment; on disk the rows, and
16 bytes a distinct value of each part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.formats import Schema
from slipstream.logs.parsing import MAX_INT32, Rows
from slipstream.tools.npz import open_npz, write_npz
from slipstream.tools.runtime import num_threads, sync_file, write_json

MAX_EMBEDDING_ROWS = MAX_INT32  # of all tables: slots are int32
PART_ROWS = 1 << 23
CHUNK_ROWS = 1 << 16
MERGE_BYTES = 64  # of memory a value while columns are merged
VALUE_BYTES = 16  # of a vocabulary in memory, and of a part's on disk
NARROW_BITS = 31
NARROW_MASK = (1 << NARROW_BITS) - 1


class Vocabulary:
    """A column's distinct codes with provisional ids, numbered as they are met, and their counts.

    Kept as sorted codes with their ids in a few runs of growing size, so a new block costs its own
    length and all merges together V log V: 12 bytes a value, and 4 for its count.
    """

    def __init__(self) -> None:
        self.size = 0
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._counts = np.zeros(1024, np.int32)

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (rows,) uint64 -> provisional ids (rows,) int32; new codes are added."""
        keys, rows = _sorted_with_places(codes)
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        lengths = np.diff(first, append=len(codes))
        ids = self._ids_of(keys[first])
        if self.size > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(self.size, np.int32)])
        self._counts[ids] += lengths
        encoded = np.empty(len(codes), np.int32)
        encoded[rows] = np.repeat(ids, lengths)
        return encoded

    def _ids_of(self, codes: np.ndarray) -> np.ndarray:
        """Ids of sorted distinct codes."""
        ids = np.empty(len(codes), np.int32)
        unknown, wanted = np.arange(len(codes)), codes
        for run_codes, run_ids in self._runs:
            at = np.minimum(np.searchsorted(run_codes, wanted), len(run_codes) - 1)
            known = run_codes[at] == wanted
            ids[unknown[known]] = run_ids[at[known]]
            unknown, wanted = unknown[~known], wanted[~known]
        if len(unknown):
            ids[unknown] = np.arange(self.size, self.size + len(unknown))
            self.size += len(unknown)
            self._runs.append((wanted, ids[unknown]))
        while len(self._runs) > 1 and 4 * len(self._runs[-1][0]) > len(self._runs[-2][0]):
            self._merge(2)
        return ids

    def _merge(self, num_runs: int) -> None:
        codes, ids = (np.concatenate(runs) for runs in zip(*self._runs[-num_runs:], strict=True))
        del self._runs[-num_runs:]
        order = np.argsort(codes, kind="stable")  # merges what is sorted already
        self._runs.append((codes[order], ids[order]))

    def arrays(self) -> dict[str, np.ndarray]:
        """`codes`, sorted, their provisional `ids`, and `counts` by id; the vocabulary is spent."""
        if not self._runs:
            empty = np.empty(0, np.int32)
            return {"codes": np.empty(0, np.uint64), "ids": empty, "counts": empty}
        self._merge(len(self._runs))
        codes, ids = self._runs.pop()
        return {"codes": codes, "ids": ids, "counts": self._counts[: self.size]}


def _sorted_with_places(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted codes, and the place of each in `codes`."""
    if codes.max() < 1 << (64 - NARROW_BITS):
        # numpy sorts integers with SIMD: `code << 31 | row` takes a third of an argsort's time.
        keys = codes << NARROW_BITS | np.arange(len(codes), dtype=np.uint64)
        keys.sort()
        rows = (keys & NARROW_MASK).view(np.int64)
        keys >>= NARROW_BITS
        return keys, rows
    rows = np.argsort(codes)
    return codes[rows], rows


@dataclass(frozen=True)
class Part:
    """A run of encoded rows on disk: arrays `y`, `dense`, `ids` and, where rows are to be sorted,
    `keys`, as bytes in files of these names; `vocabularies.npz`; `part.json` with `info`.
    """

    folder: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Part:
        """Open a finished part."""
        return cls(folder, json.loads((folder / "part.json").read_bytes()))

    @property
    def num_rows(self) -> int:
        """Rows in this part."""
        return self.info["num_rows"]

    def array(self, name: str, dtype: np.dtype, width: int | None = None) -> np.ndarray:
        """One of the arrays, mapped: (num_rows,), or (num_rows, width)."""
        shape = (self.num_rows,) if width is None else (self.num_rows, width)
        if not self.num_rows:
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(self.folder / name, dtype, "r", shape=shape))


class PartWriter:
    """Appends rows to a part, in `<folder>.partial` until `finish` renames it.

    The vocabularies of its columns are encoded side by side in threads.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.schema = folder, schema
        self.num_rows = 0
        self._info: dict[str, Any] = {"num_positive": 0, "day_rows": {}, "is_sorted": True}
        self._zeros = np.zeros(len(schema.dense_names), np.int64)
        self._largest = np.zeros(len(schema.dense_names))
        self._vocabularies = [Vocabulary() for _ in schema.table_names]
        self._partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(num_threads()))
        names = ("y", "dense", "ids", "keys") if schema.has_keys else ("y", "dense", "ids")
        self._files = {
            name: self._stack.enter_context(open(self._partial / name, "wb")) for name in names
        }

    @property
    def vocabulary_bytes(self) -> int:
        """Memory that the vocabularies take."""
        return VALUE_BYTES * sum(vocabulary.size for vocabulary in self._vocabularies)

    def add(self, rows: Rows) -> None:
        """Append the rows of a block. Raises `ValueError` when the tables grow too large."""
        if not len(rows.labels):
            return
        num_tables = len(self._vocabularies)
        ids = np.empty((len(rows.labels), num_tables), np.int32)

        def encode(table: int) -> None:
            codes = np.ascontiguousarray(rows.codes[:, table])
            ids[:, table] = self._vocabularies[table].encode(codes)

        list(self._pool.map(encode, range(num_tables)))
        check_num_embedding_rows(sum(vocabulary.size for vocabulary in self._vocabularies))
        arrays = {"y": rows.labels, "dense": rows.dense, "ids": ids, "keys": rows.keys}
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(arrays[name]).data)
        self.num_rows += len(rows.labels)
        self._info["num_positive"] += int(rows.labels.sum())
        self._zeros += (rows.dense == 0).sum(axis=0)
        self._largest = np.maximum(self._largest, rows.dense.max(axis=0))
        if rows.keys is not None:
            self._note_keys(rows.keys)

    def _note_keys(self, keys: np.ndarray) -> None:
        info, days = self._info, self._info["day_rows"]
        is_sorted = bool((keys[1:] >= keys[:-1]).all()) and keys[0] >= info.get("last_key", keys[0])
        info["is_sorted"] = bool(info["is_sorted"] and is_sorted)
        info.setdefault("first_key", int(keys[0]))
        info["last_key"] = int(keys[-1])
        if self.schema.day_rule == "keys":
            found, counts = np.unique(self.schema.day_of(keys), return_counts=True)
            for day, count in zip(found.tolist(), counts.tolist(), strict=True):
                days[str(day)] = days.get(str(day), 0) + count

    def finish(self, **info: Any) -> Part:
        """Write the vocabularies, sync everything and put the part in its place."""
        arrays = self._pool.map(Vocabulary.arrays, self._vocabularies)
        members = {
            f"{name}_{table}": array
            for table, named in enumerate(arrays)
            for name, array in named.items()
        }
        for file in self._files.values():
            sync_file(file)
        write_npz(self._partial / "vocabularies.npz", members)
        info |= self._info
        info |= {"num_rows": self.num_rows, "zeros": self._zeros.tolist()}
        info["largest"] = self._largest.tolist()
        write_json(self._partial / "part.json", info)
        self.close()
        os.rename(self._partial, self.folder)
        return Part(self.folder, info)

    def close(self) -> None:
        """Close the files and end the threads."""
        self._stack.close()

    def discard(self) -> None:
        """Close, and delete what was not finished."""
        self.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def check_num_embedding_rows(num_rows: int) -> None:
    """Raise `ValueError` when the tables have more rows than slots can number."""
    if num_rows > MAX_EMBEDDING_ROWS:
        raise ValueError(
            f"the tables have {num_rows:,} rows together; expected at most"
            f" {MAX_EMBEDDING_ROWS:,}: bound them with --max-ind-range, or read fewer --num-days"
        )


def merge_table(parts: Sequence[Part], table: int, max_bytes: int) -> dict[str, Any]:
    """Rank a column's values over all parts: `map_<table>` in each part, by provisional id, int32.

    Works through ranges of codes that fit into `max_bytes`. Returns the column's distinct values,
    the accesses of the empty value, and those of its most accessed 1 % of values.
    """
    names = [f"{name}_{table}" for name in ("codes", "ids", "counts")]
    opened = [open_npz(part.folder / "vocabularies.npz", names, others=False) for part in parts]
    codes, ids, counts = ([arrays[name] for arrays in opened] for name in names)
    maps = [np.empty(len(values), np.int32) for values in codes]
    num_values = num_missing = 0
    num_kept = -(-sum(map(len, codes)) // 100)  # at least 1 % of the distinct values
    top = np.empty(0, np.int64)
    for ranges in _ranges(codes, max_bytes // MERGE_BYTES):
        cut = [values[among] for values, among in zip(codes, ranges, strict=True)]
        merged = cut[0] if len(cut) == 1 else np.unique(np.concatenate(cut))
        accesses = np.zeros(len(merged), np.int64)
        for part, among in enumerate(ranges):
            ranks, known = np.searchsorted(merged, cut[part]), ids[part][among]
            maps[part][known] = num_values + ranks
            accesses[ranks] += counts[part][known]
        if len(merged) and merged[0] == 0:
            num_missing = int(accesses[0])
        num_values += len(merged)
        top = np.concatenate([top, accesses])
        top = top if len(top) <= num_kept else np.partition(top, len(top) - num_kept)[-num_kept:]
    for of_part, new_ids in zip(parts, maps, strict=True):
        _write_synced(of_part.folder / f"map_{table}", new_ids)
    top.sort()
    num_top = max(1, -(-num_values // 100))
    return {
        "distinct": num_values,
        "missing": num_missing,
        "top": int(top[len(top) - num_top :].sum()),
    }


def _ranges(codes: Sequence[np.ndarray], max_values: int) -> Iterator[list[slice]]:
    """Cut sorted arrays at common codes, into slices of about `max_values` values together."""
    total = sum(map(len, codes))
    num_ranges = max(1, -(-total // max(max_values, 1)))
    sample = np.sort(np.concatenate([array[:: max(1, total // 4096)] for array in codes]))
    bounds = np.unique(sample[np.arange(1, num_ranges) * len(sample) // num_ranges])
    cuts = [[0, *np.searchsorted(array, bounds), len(array)] for array in codes]
    for i in range(len(bounds) + 1):
        yield [slice(cut[i], cut[i + 1]) for cut in cuts]


def _write_synced(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        file.write(array.data)
        sync_file(file)
