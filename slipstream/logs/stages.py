"""From a log's rows to its processed file, in stages that a later run can go on from.

    encode   each raw file becomes parts: rows with provisional ids, and vocabularies
    select   which rows are trained on, held out, or left out; where it matters, accesses by them
    merge    each table's ids become ranks among all its values, whose codes are kept
    sort     where rows have keys that are not in order: parts become buckets of keys
    write    parts, or buckets, go into the processed file one by one, and are deleted

All live in a work folder beside the processed file. What a stage has finished is in its place, by a
rename and synced; what it has not is made again. So a process may be killed at any moment, and the
next one gives the same bytes. The disk holds the rows once, plus one part (with sorting: twice).
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.logs.encoding import (
    CHUNK_ROWS,
    FLOAT32,
    INT8,
    INT32,
    INT64,
    PART_FILES,
    PART_ROWS,
    VALUE_BYTES,
    Part,
    array_names,
    check_num_embedding_rows,
)
from slipstream.logs.folders import REPORT_END
from slipstream.logs.formats import Schema
from slipstream.logs.merging import check_tables, codes_in, describe_vocabulary, merge_tables
from slipstream.logs.report import report_of
from slipstream.logs.selection import Choice, Selection, check_halves, kept_rows
from slipstream.logs.taobao import CLICK_FILES
from slipstream.logs.vocabulary import VOCABULARY, Known
from slipstream.logs.work_files import Plan, Written, check_plan, check_written
from slipstream.tools.mapped import advise
from slipstream.tools.npz import NpzWriter, Spec, pack_manifest
from slipstream.tools.output import stage_bar
from slipstream.tools.places import regular_file, remove_ours, resolved
from slipstream.tools.runtime import ordered, read_json, sync_file, write_json

MAX_BUCKETS = 64  # each has four files open
SORT_BYTES = 64  # of memory a row while a bucket is sorted
VERSION = 3  # of the work folder
UINT64 = np.dtype(np.uint64)
BUCKET_FILES = re.compile(rf"part_[0-9]+/({PART_FILES.pattern})?")
WORK_FILES = re.compile(
    r"((identity|plan|progress|table_[0-9]+)\.json(\.partial)?|codes_[0-9]+"
    rf"|part_[0-9]+_[0-9]+(\.partial)?/({PART_FILES.pattern})?"
    rf"|sorted(\.partial)?/({BUCKET_FILES.pattern})?|clicks/({CLICK_FILES.pattern})?)"
)


class Work:
    """The work folder of a processed file.

    Args:
        processed: the file to write.
        identity: what the result depends on; a folder of another identity is thrown away.
        schema: of the rows.
        choice: what is done with them.
        max_bytes: memory that vocabularies, merging and sorting may take.
        known: what a file that is extended hands on.
    """

    def __init__(
        self,
        processed: Path,
        identity: dict[str, Any],
        schema: Schema,
        choice: Choice,
        max_bytes: int,
        known: Known | None = None,
    ) -> None:
        self.processed, self.schema, self.max_bytes = processed, schema, max_bytes
        self.choice, self.known = choice, known
        self.folder = work_folder(processed)
        identity = json.loads(json.dumps({**identity, "stages": VERSION}))
        is_there = self._partial_file.is_file() and not self._partial_file.is_symlink()
        lost = self._exists("progress.json") and not is_there
        if not self._is_of(identity) or lost:
            self.remove()
            self.folder.mkdir(parents=True, exist_ok=True)  # it may hold what is not ours
            write_json(self.folder / "identity.json", identity)

    @property
    def _partial_file(self) -> Path:
        return self.processed.with_name(self.processed.name + ".partial")

    def _exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _is_of(self, identity: dict[str, Any]) -> bool:
        try:
            return self._read("identity.json", dict[str, Any]) == identity
        except (OSError, ValueError):
            return False

    def _read(self, name: str, kind: Any) -> dict[str, Any]:
        return read_json(self.folder / name, kind)

    def remove(self) -> None:
        """Delete the folder, and the unfinished file."""
        remove_work(self.processed)

    def num_bytes(self) -> int:
        """Disk that the stages so far take."""
        paths = [*self.folder.rglob("*"), self._partial_file]
        return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())

    def disk_bytes(self, num_rows: int, is_unsorted: bool) -> int:
        """Disk that all stages of a log of so many rows take at most, the result included."""
        key_bytes = 8 * self.schema.has_keys
        # Vocabularies, of parts and twice of all. Of Criteo's accesses every 20th is a new value.
        value_bytes = (VALUE_BYTES + 2 * 8) * len(self.schema.table_names) // 20
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

    # Merge, sort and plan.

    def plan(self, manifest: dict[str, Any]) -> None:
        """Select rows, merge tables and, where needed, sort; then note all that writing needs."""
        parts = self.parts()
        selection = Selection(parts, self.schema, self.choice)
        selection.count()
        known = None if self.known is None else self.known.vocabulary
        most = self.max_bytes
        tables = merge_tables(self.folder, parts, self.schema, self.choice.min_count, most, known)
        check_num_embedding_rows(sum(table["distinct"] for table in tables))
        check_tables(dict(zip(self.schema.table_names, tables, strict=True)))
        statistics = selection.statistics() if self.known is None else self._known_statistics()
        if not selection.is_sorted:
            self._sort(parts)
        if self.schema.split.rule != "none":
            check_halves(self._last_labels(int(np.diff(selection.days)[-1])))
        numbers = report_of(self.schema, parts, tables, selection, statistics)
        vocabulary = describe_vocabulary(self.folder, tables, manifest, known)
        write_json(
            self.folder / "plan.json",
            {
                "num_rows": numbers["num_rows"],
                "counts": [table["distinct"] for table in tables],
                "days": selection.days.tolist(),
                "means": [mean for mean, _ in statistics],
                "manifest": {**manifest, **numbers, VOCABULARY: vocabulary},
            },
        )

    def _known_statistics(self) -> list[tuple[float, float]]:
        """Mean and standard deviation of each standardized column in the file that is extended."""
        assert self.known is not None
        chosen = np.flatnonzero(self.schema.is_standardized)
        columns = self.known.transforms.columns
        return [(columns[column].mean, columns[column].std) for column in chosen]

    def _sort(self, parts: Sequence[Part]) -> None:
        """Distribute the rows, ids ranked, over buckets of keys, in the folder `sorted`."""
        if self._exists("sorted"):
            return
        num_rows = sum(part.num_rows for part in parts)
        wanted = -(-num_rows * SORT_BYTES // self.max_bytes)
        bounds = self._key_bounds(parts, min(wanted, MAX_BUCKETS))
        target = self.folder / "sorted.partial"
        remove_ours(target, BUCKET_FILES)
        sizes = np.zeros(len(bounds) + 1, np.int64)
        names = array_names(self.schema)
        with ExitStack() as stack:
            folders = [target / f"part_{bucket:05}" for bucket in range(len(sizes))]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            files = [
                [stack.enter_context(open(folder / name, "wb")) for name in names]
                for folder in folders
            ]
            for part in parts:
                columns = Columns(part, self.schema)
                for start in range(0, part.num_rows, CHUNK_ROWS):
                    chunk = columns.rows(slice(start, start + CHUNK_ROWS))
                    keys = chunk[names.index("keys")]
                    bucket = np.searchsorted(bounds, keys, side="right")
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

    def _segments(self) -> list[Path]:
        """What is written one after another: folders of parts, or of buckets of sorted rows."""
        folder = self.folder / "sorted" if self._exists("sorted") else self.folder
        # One whose deletion was cut short may lack anything.
        return sorted(path.parent for path in folder.glob("part_*/part.json"))

    def _last_labels(self, number: int) -> np.ndarray:
        """The labels of the last rows that are written, (number,)."""
        found: list[np.ndarray] = []
        missing = number
        for folder in reversed(self._segments()):
            if missing <= 0:
                break
            part = Part.open(folder)
            labels = part.array("y", INT8)[kept_rows(part)]
            if self._exists("sorted"):
                labels = labels[np.argsort(part.array("keys", INT64), kind="stable")]
            found.insert(0, labels[max(0, len(labels) - missing) :])
            missing -= len(labels)
        return np.concatenate(found)

    # Write.

    def write(self) -> dict[str, Any]:
        """Write the processed file, deleting parts on the way; returns its manifest."""
        plan = self._read("plan.json", Plan)
        num_dense, num_means = len(self.schema.dense_names), int(self.schema.is_standardized.sum())
        check_plan(plan, num_dense, num_means, self.folder / "plan.json")
        is_sorted = self._exists("sorted")
        if is_sorted:
            for folder in self.folder.glob("part_*"):
                remove_ours(folder, PART_FILES)
        segments = self._segments()
        specs, progress = self._specs(plan), {}
        if self._exists("progress.json"):
            progress = self._read("progress.json", Written)
            row_bytes = {
                name: spec.num_bytes // max(plan["num_rows"], 1)
                for name, spec in specs.items()
                if name in ("X_int", "X_cat", "y", "weights")
            }
            check_written(progress, plan, row_bytes, self.folder / "progress.json")
        writer = NpzWriter(self.processed, specs, progress.get("writer"))
        try:
            with stage_bar(total=plan["num_rows"], unit=" rows", desc="writing") as bar:
                bar.update(progress.get("num_rows", 0))
                num_written = progress.get("num_rows", 0)
                for folder in segments:
                    if folder.name > progress.get("segment", ""):
                        num_written += self._write_segment(writer, folder, plan["means"], bar)
                        now = {"segment": folder.name, "num_rows": num_written}
                        now["writer"] = writer.progress()
                        write_json(self.folder / "progress.json", now)
                    remove_ours(folder, PART_FILES)
            writer.append("counts", np.array(plan["counts"], np.int64))
            writer.append("days", np.array(plan["days"], np.int64))
            for codes in codes_in(self.folder, plan["counts"]):
                writer.append("codes", codes)
            writer.append("manifest", pack_manifest(plan["manifest"]))
            writer.finish()
        finally:
            writer.close()
        self.remove()
        return {**plan["manifest"], "days": plan["days"]}

    def _specs(self, plan: dict[str, Any]) -> dict[str, Spec]:
        num_rows, schema = plan["num_rows"], self.schema
        weights = {"weights": Spec((num_rows,), FLOAT32)} if schema.has_weights else {}
        return {
            "X_int": Spec((num_rows, len(schema.dense_names)), schema.dense_type),
            "X_cat": Spec((num_rows, schema.num_columns), INT32),
            "y": Spec((num_rows,), INT8),
            **weights,
            "counts": Spec((len(plan["counts"]),), INT64),
            "days": Spec((len(plan["days"]),), INT64),
            "codes": Spec((sum(plan["counts"]),), UINT64),
            "manifest": Spec(pack_manifest(plan["manifest"]).shape, np.dtype(np.uint8)),
        }

    def _write_segment(
        self, writer: NpzWriter, folder: Path, means: Sequence[float], bar: tqdm
    ) -> int:
        part = Part.open(folder)
        columns = Columns(part, self.schema)
        order = None
        if not columns.is_mapped:  # a bucket
            order = np.argsort(part.array("keys", INT64), kind="stable")
        standardized = np.flatnonzero(self.schema.is_standardized)
        of_name = {"y": "y", "dense": "X_int", "ids": "X_cat", "weights": "weights"}
        names = [of_name.get(name) for name in array_names(self.schema)]

        def chunk(start: int) -> tuple[slice, tuple[np.ndarray, ...]]:
            rows = slice(start, start + CHUNK_ROWS)
            arrays = columns.rows(rows if order is None else order[rows])
            dense = arrays[1]
            for column, mean in zip(standardized, means, strict=True):
                dense[np.isnan(dense[:, column]), column] = mean
            return rows, arrays

        num_written = 0
        for rows, arrays in ordered(chunk, range(0, part.num_rows, CHUNK_ROWS)):
            for name, array in zip(names, arrays, strict=True):
                if name is not None:
                    writer.append(name, array)
            columns.release(rows)
            num_written += len(arrays[0])
            bar.update(len(arrays[0]))
        return num_written


class Columns:
    """A part's rows that stay, ids ranked: through its maps, or as they are where it has none.

    Arrays are in the order of `array_names`.
    """

    def __init__(self, part: Part, schema: Schema) -> None:
        num_tables = len(schema.table_names)
        self.is_mapped = (part.folder / "vocabularies.npz").exists()
        self._layout, self._maps = schema.layout, []
        if self.is_mapped and part.num_rows:
            names = [part.folder / f"map_{table}" for table in range(num_tables)]
            sizes = part.info["values"]
            self._maps = [
                np.asarray(np.memmap(regular_file(name), np.int32, "r"))
                if size
                else np.empty(0, np.int32)
                for name, size in zip(names, sizes, strict=True)
            ]
        of_name = {
            "y": (INT8, None),
            "dense": (schema.dense_type, len(schema.dense_names)),
            "ids": (INT32, schema.num_columns),
            "keys": (INT64, None),
            "weights": (FLOAT32, None),
        }
        self._names = array_names(schema)
        self._arrays = [part.array(name, *of_name[name]) for name in self._names]
        self._kept = kept_rows(part)
        self._may_standardize = bool(schema.is_standardized.any())

    def release(self, rows: slice) -> None:
        """Give back the memory of rows that were read."""
        for array in self._arrays:
            advise(array[rows], mmap.MADV_DONTNEED)

    def rows(self, chosen: slice | np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of the chosen rows that stay."""
        arrays = [array[chosen] for array in self._arrays]
        if isinstance(self._kept, np.ndarray):
            arrays = [array[self._kept[chosen]] for array in arrays]
        if self._may_standardize:
            arrays[1] = np.array(arrays[1])  # to fill in means
        if self._maps:
            ids = arrays[2]
            ranked = np.empty_like(ids)
            for column, table in enumerate(self._layout.table_of_column):
                ranked[:, column] = self._ranked(table, ids[:, column])
            arrays[2] = ranked
        return tuple(arrays)

    def _ranked(self, table: int, ids: np.ndarray) -> np.ndarray:
        ranks = self._maps[table]
        if not self._layout.has_absent:
            return ranks[ids]
        ranked = np.full(len(ids), -1, np.int32)
        ranked[ids >= 0] = ranks[ids[ids >= 0]]
        return ranked


def work_folder(processed: Path) -> Path:
    """Where a processed file's stages live; it may be a link to a place with more room."""
    return resolved(processed.with_name(processed.name + ".work"))


def remove_work(processed: Path) -> None:
    """Delete what stages left beside a processed file, as far as it is theirs."""
    folder = work_folder(processed)
    # First: without its identity nobody trusts what a kill leaves of it.
    (folder / "identity.json").unlink(missing_ok=True)
    remove_ours(folder, WORK_FILES)
    for end in (".npz", REPORT_END):
        processed.with_name(processed.stem + end + ".partial").unlink(missing_ok=True)
