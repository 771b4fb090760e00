"""Category ids: distinct values per column numbered while a log streams by, ranked at its end.

Rows go to spool files with provisional ids, in order of first appearance; when the log has ended
and all values are known, ids become ranks among the sorted values, so they depend on the log
alone. Price: 8 to 24 bytes of memory per distinct value, and the spools' disk space.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from slipstream.criteo import MAX_INT32, NUM_DENSE, NUM_TABLES, Rows
from slipstream.npz import ArrayStream

MAX_EMBEDDING_ROWS = MAX_INT32  # of all tables: slots are int32
ROW_BYTES = 1 + 4 * NUM_DENSE + 4 * NUM_TABLES  # of a spool, and of the processed file
ID_BITS = 31
ID_MASK = (1 << ID_BITS) - 1


class Vocabulary:
    """A column's distinct codes with provisional ids, numbered as they are met.

    Kept as sorted uint64 entries `code << 31 | id` in a few runs of growing size (a code is at most
    2^32), so a new block costs its own length and all merges together V log V: 8 bytes a value.
    """

    def __init__(self) -> None:
        self.size = 0
        self._runs: list[np.ndarray] = []

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (rows,) uint64 -> provisional ids (rows,) int32; new codes are added."""
        # numpy sorts integers with SIMD: `code << 31 | row` takes a third of an argsort's time.
        keys = codes << ID_BITS | np.arange(len(codes), dtype=np.uint64)
        keys.sort()
        rows = (keys & ID_MASK).view(np.int64)
        keys >>= ID_BITS
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        ids = self._ids_of(keys[first])
        encoded = np.empty(len(codes), np.int32)
        encoded[rows] = np.repeat(ids, np.diff(first, append=len(codes)))
        return encoded

    def _ids_of(self, codes: np.ndarray) -> np.ndarray:
        """Ids of sorted distinct codes."""
        ids = np.empty(len(codes), np.int32)
        unknown = np.arange(len(codes))
        wanted = codes << ID_BITS
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            entries = run[at]
            known = entries >> ID_BITS == wanted >> ID_BITS
            ids[unknown[known]] = entries[known] & ID_MASK
            unknown, wanted = unknown[~known], wanted[~known]
        if len(unknown):
            ids[unknown] = np.arange(self.size, self.size + len(unknown))
            self.size += len(unknown)
            self._runs.append(wanted | ids[unknown].astype(np.uint64))
        while len(self._runs) > 1 and 4 * len(self._runs[-1]) > len(self._runs[-2]):
            self._merge(2)
        return ids

    def _merge(self, num_runs: int) -> None:
        merged = np.concatenate(self._runs[-num_runs:])
        del self._runs[-num_runs:]
        merged.sort()
        self._runs.append(merged)

    def ranks(self) -> np.ndarray:
        """Rank of each provisional id among the sorted codes (int32); the vocabulary is spent."""
        self._merge(len(self._runs))
        ids = (self._runs.pop() & ID_MASK).astype(np.int32)
        ranks = np.empty(self.size, np.int32)
        ranks[ids] = np.arange(self.size, dtype=np.int32)
        return ranks


class Encoder:
    """Encodes blocks into three spool files (labels, dense values, provisional ids) in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.num_rows = self.num_positive = 0
        self.paths = {name: folder / name for name in ("y", "X_int", "X_cat")}
        self._vocabularies = [Vocabulary() for _ in range(NUM_TABLES)]
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(num_threads()))
        self._files = {
            name: self._stack.enter_context(open(path, "wb")) for name, path in self.paths.items()
        }

    def close(self) -> None:
        """Close the files and end the threads."""
        self._stack.close()

    def add(self, rows: Rows) -> None:
        """Append the rows of a block. Raises `ValueError` when the tables grow too large."""
        if not len(rows.labels):
            return
        ids = np.empty((len(rows.labels), NUM_TABLES), np.int32)

        def encode(table: int) -> None:
            ids[:, table] = self._vocabularies[table].encode(rows.codes[:, table])

        list(self._pool.map(encode, range(NUM_TABLES)))
        self._check_num_embedding_rows()
        for name, array in (("y", rows.labels), ("X_int", rows.dense), ("X_cat", ids)):
            self._files[name].write(array.data)
        self.num_rows += len(rows.labels)
        self.num_positive += int(rows.labels.sum())

    def _check_num_embedding_rows(self) -> None:
        num_embedding_rows = sum(vocabulary.size for vocabulary in self._vocabularies)
        if num_embedding_rows > MAX_EMBEDDING_ROWS:
            raise ValueError(
                f"the tables have {num_embedding_rows:,} rows together; expected at most"
                f" {MAX_EMBEDDING_ROWS:,}: bound them with --max-ind-range, or read fewer"
                " --num-days"
            )

    def finish(self) -> tuple[dict[str, np.ndarray | ArrayStream], np.ndarray]:
        """The three arrays as streams from the spools, ids as ranks, and the rows per table."""
        for file in self._files.values():
            file.flush()
        counts = np.array([vocabulary.size for vocabulary in self._vocabularies], np.int64)
        ranks = list(self._pool.map(Vocabulary.ranks, self._vocabularies))

        def ranked() -> Iterator[np.ndarray]:
            for chunk in read_spool(self.paths["X_cat"], np.dtype(np.int32), NUM_TABLES):
                columns = enumerate(ranks)
                yield np.stack([rank[chunk[:, table]] for table, rank in columns], axis=1)

        int32, int8 = np.dtype(np.int32), np.dtype(np.int8)
        dense = read_spool(self.paths["X_int"], int32, NUM_DENSE)
        labels = (chunk[:, 0] for chunk in read_spool(self.paths["y"], int8, 1))
        return {
            "X_int": ArrayStream((self.num_rows, NUM_DENSE), int32, dense),
            "X_cat": ArrayStream((self.num_rows, NUM_TABLES), int32, ranked()),
            "y": ArrayStream((self.num_rows,), int8, labels),
        }, counts


def read_spool(path: Path, dtype: np.dtype, width: int) -> Iterator[np.ndarray]:
    """Yield a spool file's rows in chunks (2^16, width)."""
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, width << 16)):
            yield chunk.reshape(-1, width)


def num_threads() -> int:
    """Cores this process may use; a thread has one column in hand, and more than 16 only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 16)
