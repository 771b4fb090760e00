"""From a log's rows to its processed file, in stages that a later run can go on from.

    encode   each raw file becomes parts: rows with provisional ids, and vocabularies
    merge    each table's ids become ranks among all its values
    sort     where rows have keys that are not in order: parts become buckets of keys
    write    parts, or buckets, go into the processed file one by one, and are deleted

All live in a work folder beside the processed file. What a stage has finished is in its place, by a
rename and synced; what it has not is made again. So a process may be killed at any moment, and the
next one gives the same bytes. The disk holds the rows once, plus one part (with sorting: twice).
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.logs.encoding import (
    CHUNK_ROWS,
    PART_ROWS,
    VALUE_BYTES,
    Part,
    PartWriter,
    check_num_embedding_rows,
    merge_table,
)
from slipstream.logs.formats import Schema, equal_days
from slipstream.logs.parsing import Rows
from slipstream.logs.rawfile import Tally
from slipstream.tools.mapped import advise
from slipstream.tools.npz import NpzWriter, Spec, pack_manifest
from slipstream.tools.runtime import num_threads, ordered, sync_file, write_json

MAX_BUCKETS = 64  # each has four files open
MIN_HELD_OUT = 2  # rows of the last day: a half each for test and validation
SORT_BYTES = 64  # of memory a row while a bucket is sorted
INT32, INT8, INT64 = (np.dtype(name) for name in ("int32", "int8", "int64"))


class Work:
    """The work folder of a processed file.

    Args:
        processed: the file to write.
        identity: what the result depends on; a folder of another identity is thrown away.
        schema: of the rows.
        max_bytes: memory that vocabularies, merging and sorting may take.
    """

    def __init__(
        self, processed: Path, identity: dict[str, Any], schema: Schema, max_bytes: int
    ) -> None:
        self.processed, self.schema, self.max_bytes = processed, schema, max_bytes
        self.folder = work_folder(processed)
        identity = json.loads(json.dumps(identity))
        lost = self._exists("progress.json") and not self._partial_file.exists()
        if not self._exists("identity.json") or self._read("identity.json") != identity or lost:
            self.remove()
            self.folder.mkdir(parents=True)
            write_json(self.folder / "identity.json", identity)

    @property
    def _partial_file(self) -> Path:
        return self.processed.with_name(self.processed.name + ".partial")

    def _exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_bytes())
        except ValueError:
            return None

    def remove(self) -> None:
        """Delete the folder; without its identity nobody trusts what a kill leaves of it."""
        (self.folder / "identity.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._partial_file.unlink(missing_ok=True)

    def num_bytes(self) -> int:
        """Disk that the stages so far take."""
        paths = [*self.folder.rglob("*"), self._partial_file]
        return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())

    def disk_bytes(self, num_rows: int, is_unsorted: bool) -> int:
        """Disk that all stages of a log of so many rows take at most, the result included."""
        key_bytes = 8 * self.schema.has_keys
        # Vocabularies: Criteo's parts have a distinct value for every 20th access.
        value_bytes = VALUE_BYTES * len(self.schema.table_names) // 20
        per_row = self.schema.row_bytes + key_bytes + value_bytes
        extra_rows = num_rows if is_unsorted else min(num_rows, PART_ROWS)
        return (num_rows + extra_rows) * per_row

    # Encode.

    def parts(self) -> list[Part]:
        """The finished parts, in the log's order."""
        # A part that was being deleted when its process was killed may lack anything.
        folders = (path.parent for path in sorted(self.folder.glob("part_*/part.json")))
        return [Part.open(folder) for folder in folders if folder.suffix != ".partial"]

    def files_done(self) -> dict[int, dict[str, Any]]:
        """The raw files that are encoded to their ends, by number: the last part's info."""
        if self.is_encoded:
            return {}
        return {part.info["file"]: part.info for part in self.parts() if part.info["is_last"]}

    @property
    def is_encoded(self) -> bool:
        """Whether all parts were finished, and raw files are no longer needed."""
        return self._exists("plan.json")

    def encode_file(
        self,
        file: int,
        rows: Iterator[Rows],
        tally: Tally,
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        """Write a raw file's rows as parts; what `tally` and `describe` say at its end is kept."""
        for folder in self.folder.glob(f"part_{file:05}_*"):
            shutil.rmtree(folder)
        numbers = count()

        def new_part() -> PartWriter:
            return PartWriter(self.folder / f"part_{file:05}_{next(numbers):05}", self.schema)

        writer = new_part()
        try:
            for block in rows:
                writer.add(block)
                is_large = 2 * writer.vocabulary_bytes > self.max_bytes
                if is_large or writer.num_rows >= PART_ROWS:
                    writer.finish(file=file, is_last=False)
                    writer = new_part()
            writer.finish(
                file=file,
                is_last=True,
                num_lines=tally.num_lines,
                dropped=tally.dropped,
                examples=tally.examples,
                source=describe(),
            )
        finally:
            writer.discard()

    # Merge, sort and plan.

    def plan(self, manifest: dict[str, Any]) -> None:
        """Merge the tables and sort, where needed; then note all that writing needs."""
        parts = self.parts()
        tables = self._merged_tables(parts)
        check_num_embedding_rows(sum(table["distinct"] for table in tables))
        days = self._days(parts)
        if not self._is_sorted(parts):
            self._sort(parts)
        numbers = self._report(parts, tables)
        write_json(
            self.folder / "plan.json",
            {
                "num_rows": numbers["num_rows"],
                "counts": [table["distinct"] for table in tables],
                "days": days.tolist(),
                "manifest": {**manifest, **numbers},
            },
        )

    def _merged_tables(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        # Linux allows a process some 65,000 maps; each part of each table at hand takes three.
        num_workers = max(1, min(num_threads(), 10_000 // max(len(parts), 1)))

        def merged(table: int) -> dict[str, Any]:
            name = f"table_{table:05}.json"
            if not self._exists(name):
                found = merge_table(parts, table, self.max_bytes // num_workers)
                write_json(self.folder / name, found)
            return self._read(name)

        with ThreadPoolExecutor(num_workers) as pool:
            return list(pool.map(merged, range(len(self.schema.table_names))))

    def _days(self, parts: Sequence[Part]) -> np.ndarray:
        num_rows = sum(part.num_rows for part in parts)
        if num_rows == 0:
            raise ValueError("no rows are left of the log; see --data-sub-sample-rate, --bad-lines")
        if self.schema.day_rule == "equal":
            if num_rows < self.schema.num_days:
                raise ValueError(
                    f"got {num_rows} rows; expected at least {self.schema.num_days} rows, one a day"
                )
            return equal_days(num_rows, self.schema.num_days)
        rows_of: dict[int, int] = {}
        for part in parts:
            is_file = self.schema.day_rule == "files"
            of_part = {part.info["file"]: part.num_rows} if is_file else part.info["day_rows"]
            for day, num in of_part.items():
                rows_of[int(day)] = rows_of.get(int(day), 0) + num
        if len(rows_of) < 2:
            raise ValueError("all rows are of one day; expected at least two, the last is held out")
        if rows_of[max(rows_of)] < MIN_HELD_OUT:
            raise ValueError(
                f"the last of {len(rows_of):,} days has {rows_of[max(rows_of)]} row: no test and "
                "validation set; where each row has a time of its own, name it by order, not day"
            )
        return np.cumsum([0, *(rows_of[day] for day in sorted(rows_of))])

    def _is_sorted(self, parts: Sequence[Part]) -> bool:
        keyed = [part.info for part in parts if "first_key" in part.info]
        in_turn = zip(keyed, keyed[1:], strict=False)
        return all(info["is_sorted"] for info in keyed) and all(
            before["last_key"] <= after["first_key"] for before, after in in_turn
        )

    def _report(self, parts: Sequence[Part], tables: list[dict[str, Any]]) -> dict[str, Any]:
        """What the manifest says of the log's rows and columns."""
        num_rows = sum(part.num_rows for part in parts)
        dropped: dict[str, int] = {}
        infos = [part.info for part in parts]
        rows_of_file: dict[int, int] = {}
        for part in parts:
            file = part.info["file"]
            rows_of_file[file] = rows_of_file.get(file, 0) + part.num_rows
        read = {info["file"]: info["source"] for info in infos if "source" in info}
        check_twins([source for file, source in read.items() if rows_of_file[file]])
        for info in infos:
            for reason, num in info.get("dropped", {}).items():
                dropped[reason] = dropped.get(reason, 0) + num
        zeros = np.sum([info["zeros"] for info in infos], axis=0) / num_rows
        largest = np.max([info["largest"] for info in infos], axis=0)
        dense = zip(self.schema.dense_names, zeros.tolist(), largest.tolist(), strict=True)
        return {
            "num_lines": sum(info.get("num_lines", 0) for info in infos),
            "num_rows": num_rows,
            "num_positive": sum(info["num_positive"] for info in infos),
            "rows_dropped": dropped,
            "bad_lines": [line for info in infos for line in info.get("examples", [])][:5],
            "sources": [{**source, "rows": rows_of_file[file]} for file, source in read.items()],
            "dense_columns": [
                {"name": name, "zero_share": share, "largest": most} for name, share, most in dense
            ],
            "table_columns": [
                {
                    "name": name,
                    "distinct": table["distinct"],
                    "missing_share": table["missing"] / num_rows,
                    "top_1_percent_share": table["top"] / num_rows,
                }
                for name, table in zip(self.schema.table_names, tables, strict=True)
            ],
        }

    def _sort(self, parts: Sequence[Part]) -> None:
        """Distribute the rows, ids ranked, over buckets of keys, in the folder `sorted`."""
        if self._exists("sorted"):
            return
        num_rows = sum(part.num_rows for part in parts)
        wanted = -(-num_rows * SORT_BYTES // self.max_bytes)
        bounds = self._key_bounds(parts, min(wanted, MAX_BUCKETS))
        target = self.folder / "sorted.partial"
        shutil.rmtree(target, ignore_errors=True)
        sizes = np.zeros(len(bounds) + 1, np.int64)
        names = ("y", "dense", "ids", "keys")
        with ExitStack() as stack:
            folders = [target / f"part_{bucket:05}" for bucket in range(len(sizes))]
            for folder in folders:
                folder.mkdir(parents=True)
            files = [
                [stack.enter_context(open(folder / name, "wb")) for name in names]
                for folder in folders
            ]
            for part in parts:
                columns = Columns(part, self.schema)
                for start in range(0, part.num_rows, CHUNK_ROWS):
                    chunk = columns.rows(slice(start, start + CHUNK_ROWS))
                    bucket = np.searchsorted(bounds, chunk[-1], side="right")
                    order = np.argsort(bucket, kind="stable")
                    sizes += (held := np.bincount(bucket, minlength=len(sizes)))
                    ends = np.cumsum(held)
                    for array, into in zip(chunk, zip(*files, strict=True), strict=True):
                        for file, rows in zip(into, np.split(array[order], ends[:-1]), strict=True):
                            file.write(np.ascontiguousarray(rows).data)
                    columns.release(slice(start, start + CHUNK_ROWS))
            for file in (file for of_bucket in files for file in of_bucket):
                sync_file(file)
        for folder, size in zip(folders, sizes.tolist(), strict=True):
            write_json(folder / "part.json", {"num_rows": size})
        target.rename(self.folder / "sorted")

    def _key_bounds(self, parts: Sequence[Part], num_buckets: int) -> np.ndarray:
        """Keys that cut the log into buckets of about the same size."""
        step = max(1, sum(part.num_rows for part in parts) // (1 << 20))
        sample = np.sort(np.concatenate([part.array("keys", INT64)[::step] for part in parts]))
        return np.unique(sample[np.arange(1, num_buckets) * len(sample) // num_buckets])

    # Write.

    def write(self) -> dict[str, Any]:
        """Write the processed file, deleting parts on the way; returns its manifest."""
        plan = self._read("plan.json")
        is_sorted = self._exists("sorted")
        if is_sorted:
            for folder in self.folder.glob("part_*"):
                shutil.rmtree(folder)
        segments = sorted((self.folder / "sorted" if is_sorted else self.folder).glob("part_*"))
        progress = self._read("progress.json") if self._exists("progress.json") else {}
        writer = NpzWriter(self.processed, self._specs(plan), progress.get("writer"))
        try:
            with tqdm(total=plan["num_rows"], unit=" rows", desc="writing", disable=None) as bar:
                bar.update(progress.get("num_rows", 0))
                num_written = progress.get("num_rows", 0)
                for folder in segments:
                    if folder.name > progress.get("segment", ""):
                        num_written += self._write_segment(writer, folder, bar)
                        now = {"segment": folder.name, "num_rows": num_written}
                        now["writer"] = writer.progress()
                        write_json(self.folder / "progress.json", now)
                    shutil.rmtree(folder)
            writer.append("counts", np.array(plan["counts"], np.int64))
            writer.append("days", np.array(plan["days"], np.int64))
            writer.append("manifest", pack_manifest(plan["manifest"]))
            writer.finish()
        finally:
            writer.close()
        self.remove()
        return {**plan["manifest"], "days": plan["days"]}

    def _specs(self, plan: dict[str, Any]) -> dict[str, Spec]:
        num_rows, schema = plan["num_rows"], self.schema
        return {
            "X_int": Spec((num_rows, len(schema.dense_names)), schema.dense_type),
            "X_cat": Spec((num_rows, len(schema.table_names)), INT32),
            "y": Spec((num_rows,), INT8),
            "counts": Spec((len(plan["counts"]),), INT64),
            "days": Spec((len(plan["days"]),), INT64),
            "manifest": Spec(pack_manifest(plan["manifest"]).shape, np.dtype(np.uint8)),
        }

    def _write_segment(self, writer: NpzWriter, folder: Path, bar: tqdm) -> int:
        part = Part.open(folder)
        columns = Columns(part, self.schema)
        order = None
        if not columns.is_mapped:  # a bucket
            order = np.argsort(part.array("keys", INT64), kind="stable")

        def chunk(start: int) -> tuple[slice, tuple[np.ndarray, ...]]:
            rows = slice(start, start + CHUNK_ROWS)
            return rows, columns.rows(rows if order is None else order[rows])

        starts = range(0, part.num_rows, CHUNK_ROWS)
        for rows, (labels, dense, ids, *_) in ordered(chunk, starts):
            for name, array in (("y", labels), ("X_int", dense), ("X_cat", ids)):
                writer.append(name, array)
            columns.release(rows)
            bar.update(len(labels))
        return part.num_rows


class Columns:
    """A part's rows with ids ranked: through its maps, or as they are where it has none."""

    def __init__(self, part: Part, schema: Schema) -> None:
        num_tables = len(schema.table_names)
        self.is_mapped = (part.folder / "vocabularies.npz").exists()
        self._maps = []
        if self.is_mapped and part.num_rows:
            names = [part.folder / f"map_{table}" for table in range(num_tables)]
            self._maps = [np.asarray(np.memmap(name, np.int32, "r")) for name in names]
        self._arrays = [
            part.array("y", INT8),
            part.array("dense", schema.dense_type, len(schema.dense_names)),
            part.array("ids", INT32, num_tables),
        ]
        if schema.has_keys:
            self._arrays.append(part.array("keys", INT64))

    def release(self, rows: slice) -> None:
        """Give back the memory of rows that were read."""
        for array in self._arrays:
            advise(array[rows], mmap.MADV_DONTNEED)

    def rows(self, chosen: slice | np.ndarray) -> tuple[np.ndarray, ...]:
        """Labels, dense values, ids and, where rows have them, keys of the chosen rows."""
        labels, dense, ids, *keys = (array[chosen] for array in self._arrays)
        if self._maps:
            ranked = np.empty_like(ids)
            for table, ranks in enumerate(self._maps):
                ranked[:, table] = ranks[ids[:, table]]
            ids = ranked
        return labels, dense, ids, *keys


def check_twins(sources: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError` where two files hold the same: held-out rows would be trained on, too."""
    known: dict[str, str] = {}
    for source in sources:
        content = source.get("content_sha256", source["sha256"])
        if content in known:
            raise ValueError(
                f"{known[content]} and {source['name']} hold the same rows; take one of them away"
            )
        known[content] = source["name"]


def work_folder(processed: Path) -> Path:
    """Where a processed file's stages live."""
    return processed.with_name(processed.name + ".work")
