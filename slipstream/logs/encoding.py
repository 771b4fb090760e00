"""Category ids: distinct values per column, numbered while a log streams by and ranked at its end.

Rows go to *parts*, folders on disk, with provisional ids in order of first appearance and with the
part's vocabularies; a part ends with its file, after `PART_ROWS` rows, or when its vocabularies
fill the memory they may take. When all parts are written, `merging.merge_table` turns a column's
provisional ids into ranks among the sorted values of the whole log, so ids depend on the log alone.

Price: 16 bytes of memory a distinct value of a part, twice that for a moment; on disk the rows, and
16 bytes a distinct value of each part.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.formats import TRAINING, Schema, class_of
from slipstream.logs.parsing import MAX_INT32
from slipstream.logs.rawfile import Tally
from slipstream.logs.rows import ABSENT, Rows, Texts
from slipstream.logs.work_files import PartInfo
from slipstream.tools.npz import write_npz
from slipstream.tools.places import regular_file, remove_ours
from slipstream.tools.runtime import num_threads, read_json, sync_file, write_json

MAX_EMBEDDING_ROWS = MAX_INT32  # of all tables: slots are int32
PART_ROWS = 1 << 23
CHUNK_ROWS = 1 << 16
INT32, INT8, INT64, FLOAT32 = (np.dtype(name) for name in ("int32", "int8", "int64", "float32"))
# What a part's folder holds, also what later stages put there.
PART_FILES = re.compile(
    r"(y|dense|ids|keys|weights|kept|map_[0-9]+|(vocabularies|counts)\.npz|part\.json)(\.partial)?"
)
VALUE_BYTES = 16  # of a vocabulary in memory, and of a part's on disk
NARROW_BITS = 31
NARROW_MASK = (1 << NARROW_BITS) - 1


class Numbering:
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
        keys, rows = sorted_with_places(codes)
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


class WholeFloats:
    """The texts of a table that are whole floats, while all its texts are numbers."""

    def __init__(self) -> None:
        self.are_numbers: bool | None = None  # until there is a text
        self._pairs = [np.empty((0, 2), np.uint64)]
        self.size = 0

    def add(self, texts: Texts | None) -> None:
        """Note what a block's texts are."""
        if texts is None or self.are_numbers is False:
            return
        self.are_numbers = texts.are_numbers
        self._pairs.append(texts.whole_floats)
        self.size += len(texts.whole_floats)
        if not self.are_numbers:
            self._pairs, self.size = self._pairs[:1], 0
        elif len(self._pairs) > 64:
            self._pairs = [self.pairs()]
            self.size = len(self._pairs[0])

    def pairs(self) -> np.ndarray:
        """(n, 2) uint64, sorted: the codes of `17.0` and of `17`."""
        return np.unique(np.concatenate(self._pairs), axis=0)


def sorted_with_places(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    """A run of encoded rows on disk: arrays `y`, `dense`, `ids` and, where rows have them, `keys`
    and `weights`, as bytes in files of these names; `vocabularies.npz`; `part.json` with `info`.
    """

    folder: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Part:
        """Open a finished part."""
        info = read_json(folder / "part.json", PartInfo)
        if not folder.name.startswith(f"part_{info['file']:05}_" if "file" in info else "part_"):
            raise ValueError(
                f"{folder}/part.json: file: {info['file']}; delete {folder.parent} and run again"
            )
        return cls(folder, info)

    @property
    def num_rows(self) -> int:
        """Rows in this part."""
        return self.info["num_rows"]

    def array(self, name: str, dtype: np.dtype, width: int | None = None) -> np.ndarray:
        """One of the arrays, mapped: (num_rows,), or (num_rows, width). `ValueError`: it is not."""
        shape = (self.num_rows,) if width is None else (self.num_rows, width)
        num_bytes = math.prod(shape) * dtype.itemsize
        path = regular_file(self.folder / name)
        if (found := path.stat().st_size) != num_bytes:
            raise ValueError(
                f"{self.folder}/part.json: num_rows: {self.num_rows}, which take {num_bytes:,} "
                f"bytes of {name}; it has {found:,}; delete {self.folder.parent} and run again"
            )
        if not self.num_rows:
            return np.empty(shape, dtype)
        return np.asarray(np.memmap(path, dtype, "r", shape=shape))


class PartWriter:
    """Appends rows to a part, in `<folder>.partial` until `finish` renames it.

    The vocabularies of its columns are encoded side by side in threads.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.schema = folder, schema
        self.num_rows = 0
        self._info: dict[str, Any] = {"num_positive": 0, "day_rows": {}, "is_sorted": True}
        self._info["num_held_out"] = 0  # of rows drawn
        self._zeros = np.zeros(len(schema.dense_names), np.int64)
        self._may_be_nan = bool(schema.is_standardized.any())
        self._largest = np.zeros(len(schema.dense_names))
        self._vocabularies = [Numbering() for _ in schema.table_names]
        self._columns = [schema.layout.columns_of(t) for t in range(len(self._vocabularies))]
        self._whole_floats = [WholeFloats() for _ in schema.table_names]
        self._partial = folder.with_name(folder.name + ".partial")
        remove_ours(self._partial, PART_FILES)
        self._partial.mkdir(parents=True)
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(num_threads()))
        self._files = {
            name: self._stack.enter_context(open(self._partial / name, "wb"))
            for name in array_names(schema)
        }

    @property
    def vocabulary_bytes(self) -> int:
        """Memory that the vocabularies take."""
        num_values = sum(vocabulary.size for vocabulary in self._vocabularies)
        return VALUE_BYTES * (num_values + sum(floats.size for floats in self._whole_floats))

    def add(self, rows: Rows) -> None:
        """Append the rows of a block. Raises `ValueError` when the tables grow too large."""
        if not len(rows.labels):
            return
        num_tables = len(self._vocabularies)
        ids = np.empty(rows.codes.shape, np.int32)

        def encode(table: int) -> None:
            columns, vocabulary = self._columns[table], self._vocabularies[table]
            for column in columns if not self.schema.layout.has_absent else ():
                ids[:, column] = vocabulary.encode(np.ascontiguousarray(rows.codes[:, column]))
            if self.schema.layout.has_absent:
                codes = rows.codes[:, columns]
                is_there, encoded = codes != ABSENT, np.full(codes.shape, -1, np.int32)
                if is_there.any():
                    encoded[is_there] = vocabulary.encode(codes[is_there])
                ids[:, columns] = encoded
            for column in columns:
                self._whole_floats[table].add(rows.texts.get(column))

        list(self._pool.map(encode, range(num_tables)))
        check_num_embedding_rows(sum(vocabulary.size for vocabulary in self._vocabularies))
        arrays: dict[str, Any] = {"y": rows.labels, "dense": rows.dense, "ids": ids}
        arrays |= {"keys": rows.keys, "weights": rows.weights}
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(arrays[name]).data)
        self.num_rows += len(rows.labels)
        self._info["num_positive"] += int(rows.labels.sum())
        is_zero = rows.dense == 0
        if self._may_be_nan:  # an empty value, which counts as 0, though the mean will stand for it
            is_zero |= np.isnan(rows.dense)
        self._zeros += is_zero.sum(axis=0)
        self._largest = np.fmax(self._largest, np.fmax.reduce(rows.dense, axis=0))
        if rows.keys is not None:
            self._note_keys(rows.keys)

    def _note_keys(self, keys: np.ndarray) -> None:
        info, days = self._info, self._info["day_rows"]
        is_sorted = bool((keys[1:] >= keys[:-1]).all()) and keys[0] >= info.get("last_key", keys[0])
        info["is_sorted"] = bool(info["is_sorted"] and is_sorted)
        info.setdefault("first_key", int(keys[0]))
        info["last_key"] = int(keys[-1])
        if self.schema.split.is_drawn:
            is_training = class_of(keys) == TRAINING
            info["num_held_out"] += int((~is_training).sum())
            keys = keys[is_training]
        if self.schema.day_rule == "keys":
            found, counts = np.unique(self.schema.day_of(keys), return_counts=True)
            for day, count in zip(found.tolist(), counts.tolist(), strict=True):
                days[str(day)] = days.get(str(day), 0) + count

    def finish(self, **info: Any) -> Part:
        """Write the vocabularies, sync everything and put the part in its place."""
        arrays = self._pool.map(Numbering.arrays, self._vocabularies)
        members = {
            f"{name}_{table}": array
            for table, named in enumerate(arrays)
            for name, array in named.items()
        }
        self._info["values"] = [len(members[f"codes_{t}"]) for t in range(len(self._columns))]
        self._info["are_numbers"] = [floats.are_numbers for floats in self._whole_floats]
        for table, floats in enumerate(self._whole_floats):
            members[f"floats_{table}"] = floats.pairs()
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
        remove_ours(self._partial, PART_FILES)


def encode_file(
    folder: Path,
    schema: Schema,
    max_bytes: int,
    file: int,
    rows: Iterator[Rows],
    tally: Tally,
    describe: Callable[[], dict[str, Any]],
) -> None:
    """Write a raw file's rows as parts; what `tally` and `describe` say at its end is kept.

    `folder`: of the work; `max_bytes`: memory that vocabularies may take.
    """
    for old in folder.glob(f"part_{file:05}_[0-9]*"):
        if not remove_ours(old, PART_FILES):
            raise FileExistsError(f"{old} holds what is not ours; move that elsewhere")
    numbers = count()

    def new_part() -> PartWriter:
        return PartWriter(folder / f"part_{file:05}_{next(numbers):05}", schema)

    writer = new_part()
    try:
        for block in rows:
            writer.add(block)
            is_large = 2 * writer.vocabulary_bytes > max_bytes
            if is_large or writer.num_rows >= PART_ROWS:
                writer.finish(file=file, is_last=False)
                writer = new_part()
        writer.finish(
            file=file,
            is_last=True,
            num_lines=tally.num_lines,
            dropped=tally.dropped,
            examples=tally.examples,
            seen=tally.seen,
            source=describe(),
        )
    finally:
        writer.discard()


def array_names(schema: Schema) -> list[str]:
    """The files that a part's rows are in."""
    names = {"keys": schema.has_keys, "weights": schema.has_weights}
    return ["y", "dense", "ids", *(name for name, there in names.items() if there)]


def check_num_embedding_rows(num_rows: int) -> None:
    """Raise `ValueError` when the tables have more rows than slots can number."""
    if num_rows > MAX_EMBEDDING_ROWS:
        raise ValueError(
            f"the tables have {num_rows:,} rows together; expected at most"
            f" {MAX_EMBEDDING_ROWS:,}: bound them with --max-ind-range, or read fewer --num-days"
        )


def write_synced(path: Path, array: np.ndarray) -> None:
    """Write an array's bytes, and bring them to the disk."""
    with open(path, "wb") as file:
        file.write(np.ascontiguousarray(array).data)
        sync_file(file)
