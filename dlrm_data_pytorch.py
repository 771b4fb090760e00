"""Processed and segregated .npz files as memory-mapped sets of inputs that mini-batches are cut
from.

A *processed* file (data_utils.py) holds category ids per table; a *segregated* folder
(input_segregation.py) holds hot and cold training inputs with ids already turned into slots. Both
become `ClickInputs`; a mini-batch is one `np.take` per array. Dense values become ln(x + 1) when a
batch is cut.

The last day is held out: its first half is the test set, its second half the validation set.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.batching import BLOCK_INPUTS
from slipstream.embedding import EmbeddingTable
from slipstream.formats import equal_days
from slipstream.npz import advise, check_sums, fingerprint, is_mapped, open_npz, unpack_manifest
from slipstream.runtime import available_memory_bytes, free_device_bytes, ordered, read_json
from slipstream.synthetic import planted_clicks
from slipstream.trainer import TrainingData

CHECK_ROWS = 1 << 14  # rows checked at once when a file is opened
SEGREGATED_SETS = ("train_hot", "train_cold", "test", "val")
ROWS_FILE = "embedding_rows.npz"
TIMES_FILE = "times.json"


class ClickInputs:
    """A set of inputs over whole arrays.

    Args:
        dense: (n, num_dense) counts; negative ones count as 0.
        categories: (n, F) ids, or slots where `slot_offsets` is None.
        labels: (n,) 0 or 1.
        day_offsets: (days + 1,) first row of each day, then n.
        slot_offsets: (F,) added to the ids to number all tables' rows in one sequence.
        stream: for arrays larger than memory; None: they are checked and fit.
    """

    def __init__(
        self,
        dense: np.ndarray,
        categories: np.ndarray,
        labels: np.ndarray,
        day_offsets: np.ndarray,
        slot_offsets: np.ndarray | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.dense, self.categories, self.labels = dense, categories, labels
        self.day_offsets, self._slot_offsets, self._stream = day_offsets, slot_offsets, stream
        self._num_read, self._is_announced = 0, False
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Slots (B, F) int64 of the given inputs."""
        # numpy, as in `batch`: a thread beside the training loop must not start a pool of its own.
        categories = _take(self.categories, inputs)
        if self._stream is not None:
            _check_ids(self._stream.source, categories, self._stream.limits)
            self._forget(len(categories))
        if self._slot_offsets is None:
            return torch.from_numpy(categories.astype(np.int64))
        return torch.from_numpy(np.add(categories, self._slot_offsets, dtype=np.int64))

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Dense (B, num_dense) float32, slots (B, F) int64 and labels (B,) float32."""
        dense = _take(self.dense, inputs).astype(np.float32)
        if self._stream is not None:
            _check_dense(self._stream.source, dense)
            _check_labels(self._stream.source, _take(self.labels, inputs))
        np.log1p(np.maximum(dense, 0, out=dense), out=dense)
        labels = _take(self.labels, inputs).astype(np.float32)
        return torch.from_numpy(dense), self.slots_of(inputs), torch.from_numpy(labels)

    def _forget(self, num_inputs: int) -> None:
        """Give back all memory once as many inputs were read as may be in memory."""
        assert self._stream is not None
        self._num_read += num_inputs
        if self._num_read > self._stream.num_kept:
            self._num_read = 0
            self.release(slice(None))

    def will_need(self, inputs: np.ndarray) -> None:
        """Have the kernel read these inputs ahead, in runs of neighbours."""
        if not self._is_announced:
            # Pages that are asked for all the same are then read alone, not megabytes around them.
            for array in (self.dense, self.categories, self.labels):
                advise(array, mmap.MADV_RANDOM)
            self._is_announced = True
        blocks = np.unique(inputs // BLOCK_INPUTS)
        runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1) if len(blocks) else []
        for run in runs:
            part = slice(int(run[0]) * BLOCK_INPUTS, (int(run[-1]) + 1) * BLOCK_INPUTS)
            for array in (self.dense, self.categories, self.labels):
                advise(array[part], mmap.MADV_WILLNEED)

    def release(self, inputs: slice) -> None:
        """Give back the memory of mapped inputs that were read; they can be read again."""
        for array in (self.dense, self.categories, self.labels):
            advise(array[inputs], mmap.MADV_DONTNEED)

    @property
    def window(self) -> int:
        """Inputs to shuffle among each other where they are streamed; 0: they are in memory."""
        return 0 if self._stream is None else self._stream.num_kept

    def rows(self, start: int, stop: int) -> ClickInputs:
        """The inputs from `start` to `stop`, sharing memory; days are cut to match."""
        inside = self.day_offsets[(self.day_offsets > start) & (self.day_offsets < stop)]
        offsets = np.concatenate([[start], inside, [stop]]) - start
        return ClickInputs(
            self.dense[start:stop],
            self.categories[start:stop],
            self.labels[start:stop],
            offsets,
            self._slot_offsets,
            self._stream,
        )


@dataclass(frozen=True)
class Stream:
    """How inputs that do not fit into memory are read.

    Attributes:
        source: the file, for errors.
        limits: (F,) ids or slots of each feature are below; checked as inputs are read.
        num_kept: inputs in memory at most, about.
    """

    source: str
    limits: np.ndarray
    num_kept: int


def stream_of(
    source: str, arrays: Sequence[np.ndarray], limits: np.ndarray, max_memory: int | None
) -> Stream | None:
    """Whether inputs are to be streamed: their arrays take more than `max_memory` bytes.

    None stands for half of the memory that is free. Arrays that are not mapped are in memory
    already.
    """
    num_bytes = sum(array.nbytes for array in arrays)
    if max_memory is None:
        max_memory = available_memory_bytes() // 2
    if num_bytes <= max_memory or not all(map(is_mapped, arrays)):
        return None
    num_inputs = len(arrays[0])
    return Stream(source, limits, max(1, num_inputs * max_memory // num_bytes // 4))


class DeviceInputs:
    """`ClickInputs` copied to a device: batches are cut there, and no host memory is touched.

    Takes 4 bytes a dense and a sparse feature and 4 a label: 160 bytes an input of Criteo.
    """

    def __init__(self, inputs: ClickInputs, device: torch.device) -> None:
        self.labels, self.day_offsets, self.device = inputs.labels, inputs.day_offsets, device
        self._dense = torch.empty(inputs.dense.shape, device=device)
        self._slots = torch.empty(inputs.categories.shape, dtype=torch.int32, device=device)
        self._labels = torch.empty(len(inputs), device=device)
        for start in range(0, len(inputs), CHECK_ROWS):
            part = slice(start, start + CHECK_ROWS)
            dense, slots, labels = inputs.batch(part)
            self._dense[part] = dense.to(device)
            self._slots[part] = slots.to(device, torch.int32)
            self._labels[part] = labels.to(device)

    @staticmethod
    def bytes_needed(inputs: ClickInputs) -> int:
        """Device memory that the inputs would take."""
        num_features = inputs.dense.shape[1] + inputs.categories.shape[1]
        return 4 * len(inputs) * (num_features + 1)

    def __len__(self) -> int:
        return len(self.labels)

    def will_need(self, inputs: np.ndarray) -> None:
        """Nothing to do: they are on the device."""

    def _select(self, inputs: np.ndarray | slice, *arrays: Tensor) -> list[Tensor]:
        if isinstance(inputs, slice):
            return [array[inputs] for array in arrays]
        numbers = torch.from_numpy(inputs)
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()  # else a large batch's copy waits for the device
        chosen = numbers.to(self.device, non_blocking=True)
        return [array.index_select(0, chosen) for array in arrays]

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Slots (B, F) int64 of the given inputs, on the device."""
        return self._select(inputs, self._slots)[0].long()

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """As `ClickInputs.batch`, on the device."""
        dense, slots, labels = self._select(inputs, self._dense, self._slots, self._labels)
        return dense, slots.long(), labels


def _take(array: np.ndarray, inputs: np.ndarray | slice) -> np.ndarray:
    # `take` is faster, but first copies a whole array that is not aligned or not C-ordered, as in
    # files of older scripts.
    if isinstance(inputs, slice) or not (array.flags.aligned and array.flags.c_contiguous):
        return array[inputs]
    return array.take(inputs, axis=0)


@dataclass(frozen=True)
class ClickLog:
    """A whole processed log.

    Attributes:
        inputs: all rows, ids numbered table after table.
        table_sizes: (F,) int64 rows per table.
        manifest: what made the file; `{}` for files of older scripts.
        identity: the file's fingerprint, or how the log was generated.
    """

    inputs: ClickInputs
    table_sizes: np.ndarray
    manifest: dict[str, Any]
    identity: str

    def splits(self) -> tuple[ClickInputs, ClickInputs, ClickInputs]:
        """Training, test and validation: all days but the last, and the last one's halves."""
        num_rows = len(self.inputs)
        held_out = int(self.inputs.day_offsets[-2])
        half = held_out + (num_rows - held_out) // 2
        return (
            self.inputs.rows(0, held_out),
            self.inputs.rows(held_out, half),
            self.inputs.rows(half, num_rows),
        )


def make_click_log(
    dense: np.ndarray,
    ids: np.ndarray,
    labels: np.ndarray,
    table_sizes: np.ndarray,
    days: np.ndarray,
    source: str,
    manifest: dict[str, Any] | None = None,
    max_memory: int | None = None,
    identity: str = "",
) -> ClickLog:
    """Check the arrays of a log against each other and wrap them.

    Arrays of more than `max_memory` bytes (None: half of what is free) are checked batch by batch.

    Raises `ValueError` for lengths that differ, ids outside their table, labels other than 0 and 1,
    and days that do not cover the rows. One pass over the ids (about 1 s for 45 M rows in memory).
    """
    _check_lengths(source, dense=dense, ids=ids, labels=labels)
    if len(table_sizes) != ids.shape[1]:
        raise ValueError(f"{source}: {len(table_sizes)} table sizes for {ids.shape[1]} categories")
    days = np.asarray(days).astype(np.int64)
    _check_days(source, days, len(labels))
    if days[-2] == 0:
        raise ValueError(
            f"{source}: no rows to train on; expected at least two days, the last one held out"
        )
    sizes = np.asarray(table_sizes, np.int64)
    stream = stream_of(source, (dense, ids, labels), sizes, max_memory)
    if stream is None:
        _check_arrays(source, dense, ids, labels, sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    inputs = ClickInputs(dense, ids, labels, days, offsets, stream)
    return ClickLog(inputs, np.asarray(table_sizes, np.int64), manifest or {}, identity or source)


def _check_days(source: str, days: np.ndarray, num_rows: int) -> None:
    if len(days) < 2 or days[0] != 0 or days[-1] != num_rows or np.any(np.diff(days) < 0):
        raise ValueError(f"{source}: its days do not cover its {num_rows} rows")


def _check_lengths(source: str, **arrays: np.ndarray) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: arrays of different lengths {lengths}; rebuild the file")


def _check_arrays(
    source: str, dense: np.ndarray, ids: np.ndarray, labels: np.ndarray, limits: np.ndarray
) -> None:
    def check(start: int) -> None:
        part = slice(start, start + CHECK_ROWS)
        _check_dense(source, dense[part])
        _check_ids(source, ids[part], limits)
        _check_labels(source, labels[part])
        for array in (dense, ids, labels):
            advise(array[part], mmap.MADV_DONTNEED)

    for _ in ordered(check, range(0, len(labels), CHECK_ROWS)):
        pass


def _check_dense(source: str, dense: np.ndarray) -> None:
    if dense.dtype.kind == "f" and not np.isfinite(dense).all():
        raise ValueError(f"{source}: a dense feature holds NaN or an infinite value")


def _check_ids(source: str, ids: np.ndarray, sizes: np.ndarray) -> None:
    if not len(ids):
        return
    low, high = ids.min(axis=0), ids.max(axis=0)
    bad = np.flatnonzero((low < 0) | (high >= sizes))
    if len(bad):
        column = int(bad[0])
        raise ValueError(
            f"{source}: category {column + 1} has ids from {low[column]} to {high[column]}; "
            f"expected 0 to {int(sizes[column]) - 1}"
        )


def _check_labels(source: str, labels: np.ndarray) -> None:
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{source}: labels other than 0 and 1")


def load_processed(
    path: str | Path, max_memory: int | None = None, verify: bool = False
) -> ClickLog:
    """Open a processed .npz, ours (mapped) or an older script's (compressed, read into memory).

    What takes more than `max_memory` bytes (None: half of what is free) is streamed. Checksums are
    compared (one pass over the file) unless it is streamed, and then with `verify`.

    Older files may hold `X_cat` as float64 and have no `days`: 7 equal ones are assumed, as for
    Kaggle.
    """
    arrays = open_npz(path, ("X_int", "X_cat", "y", "counts"))
    dense, ids = arrays["X_int"], arrays["X_cat"]
    _check_kinds(arrays, str(path))
    days = arrays.get("days", equal_days(len(ids)))
    if ids.dtype != np.int32:
        ids = _int32(ids, f"{path}: X_cat")
    if dense.dtype not in (np.int32, np.float32):
        dense = _int32(dense, f"{path}: X_int")
    labels, manifest = arrays["y"], unpack_manifest(arrays)
    log = make_click_log(
        dense,
        ids,
        labels,
        arrays["counts"],
        days,
        str(path),
        manifest,
        max_memory,
        fingerprint(path),
    )
    if verify or not log.inputs.window:
        check_sums(path)
    return log


def _check_kinds(arrays: dict[str, np.ndarray], source: str) -> None:
    dimensions = {"X_int": 2, "X_cat": 2, "slots": 2, "num_hot": 0}
    dimensions |= dict.fromkeys(("y", "counts", "days", "slot_of_row", "access_counts"), 1)
    for name, wanted in dimensions.items():
        array = arrays.get(name)
        if array is not None and (array.ndim != wanted or array.dtype.kind not in "iuf"):
            raise ValueError(
                f"{source}: {name} has {array.ndim} dimensions of {array.dtype}; expected {wanted} "
                "of numbers"
            )


def _int32(values: np.ndarray, source: str) -> np.ndarray:
    """Whole numbers that an older script stored in another type, as int32."""
    converted = np.empty(values.shape, np.int32)
    for start in range(0, len(values), CHECK_ROWS):
        part = values[start : start + CHECK_ROWS]
        if not (np.isfinite(part).all() and ((part >= -(2.0**31)) & (part < 2.0**31)).all()):
            raise ValueError(f"{source} holds NaN or values beyond 32 bits")
        converted[start : start + CHECK_ROWS] = part
        if not (converted[start : start + CHECK_ROWS] == part).all():
            raise ValueError(f"{source} holds fractions; expected whole numbers")
    return converted


def generated_log(
    kind: str, table_sizes: list[int], num_rows: int, num_dense: int, seed: int
) -> ClickLog:
    """A log made in memory: `random` (uniform, nothing to learn) or `synthetic` (planted model)."""
    sizes = np.array(table_sizes, np.int64)
    if kind == "synthetic":
        clicks = planted_clicks(num_rows, table_sizes, seed, num_dense=num_dense)
        dense, ids = np.ascontiguousarray(clicks.X_int), np.ascontiguousarray(clicks.X_cat)
        labels = clicks.y
    else:
        rng = np.random.default_rng(seed)
        dense = rng.integers(0, 100, (num_rows, num_dense), dtype=np.int32)
        ids = rng.integers(0, sizes, (num_rows, len(sizes)))
        labels = rng.integers(0, 2, num_rows, dtype=np.int8)
    identity = f"{kind} data, {num_rows} rows of seed {seed}"
    return make_click_log(
        dense, ids, labels, sizes, equal_days(num_rows), f"{kind} data", identity=identity
    )


@dataclass(frozen=True)
class PreparedData:
    """What a trainer trains on: the four sets in slots, and the numbering of the rows.

    Attributes:
        data: hot and cold training inputs, test and validation.
        table_sizes: rows per table.
        slot_of_row: (num_rows,) int32, table offset + id -> slot; None: that number is the slot.
        num_hot: slots below it are hot.
        manifest: of the segregated folder, or of the processed file.
        log_identity: of the processed log.
        sets_identity: of the sets; their batches are numbered in them.
    """

    data: TrainingData
    table_sizes: np.ndarray
    slot_of_row: np.ndarray | None
    num_hot: int
    manifest: dict[str, Any]
    log_identity: str
    sets_identity: Any


def load_segregated(
    folder: str | Path,
    processed_file: str | Path | None = None,
    row_bytes: int | None = None,
    max_memory: int | None = None,
) -> PreparedData:
    """Open a segregated folder, refusing files that do not belong together.

    Checksums are compared (one pass over the files), but not of a set that is streamed. With
    `processed_file` the folder must have been made from that very file; with `row_bytes`, the
    memory of a row in training, its hot rows must fit the budget it was made for. Raises
    `ValueError` with what differs. Of `max_memory` bytes (None: half of what is free) each set may
    take a half; a larger one is streamed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; run input_segregation.py first")
    rows = open_npz(folder / ROWS_FILE, ("slot_of_row", "access_counts", "num_hot", "counts"))
    check_sums(folder / ROWS_FILE)
    _check_kinds(rows, str(folder / ROWS_FILE))
    manifest = unpack_manifest(rows)
    if processed_file is not None and manifest.get("source") != fingerprint(processed_file):
        raise ValueError(
            f"{folder} was not made from {processed_file}; run input_segregation.py on that file"
        )
    slot_of_row, num_hot = rows["slot_of_row"], int(rows["num_hot"])
    if max_memory is None:
        max_memory = available_memory_bytes() // 2
    _check_budget(folder, manifest.get("options", {}), num_hot, row_bytes)
    num_rows, num_tables = len(slot_of_row), len(rows["counts"])
    is_slot = np.zeros(num_rows, bool)
    if 0 <= slot_of_row.min(initial=0) <= slot_of_row.max(initial=0) < num_rows:
        is_slot[slot_of_row] = True
    is_whole = int(rows["counts"].sum()) == num_rows and is_slot.all()
    if not is_whole or not 0 <= num_hot <= num_rows:
        raise ValueError(f"{folder / ROWS_FILE} is inconsistent; run input_segregation.py again")
    sets = []
    for name in SEGREGATED_SETS:
        path = folder / f"{name}.npz"
        limits = np.full(num_tables, num_hot if name == "train_hot" else num_rows)
        sets.append(_open_set(path, manifest.get("files", {}).get(name), limits, max_memory // 2))
    with contextlib.suppress(OSError, ValueError):
        manifest |= read_json(folder / TIMES_FILE)
    return PreparedData(
        TrainingData(*sets),
        rows["counts"],
        slot_of_row,
        num_hot,
        manifest,
        str(manifest.get("source")),
        manifest["files"],
    )


def _check_budget(
    folder: Path, options: dict[str, Any], num_hot: int, row_bytes: int | None
) -> None:
    budget = options.get("hot_emb_gpu_mem")
    if budget is not None and row_bytes is not None and num_hot * row_bytes > budget:
        raise ValueError(
            f"{folder} fills its budget of {budget} bytes with rows of dim {options['dim']} and "
            f"{options['optimizer']}; rows of {row_bytes} bytes would take {num_hot * row_bytes}: "
            "run input_segregation.py with the trainer's dim and optimizer (EMB_DIM, OPTIMIZER)"
        )


def _open_set(path: Path, identity: Any, limits: np.ndarray, max_memory: int) -> ClickInputs:
    """One of a segregated folder's sets; its slots are below `limits`."""
    arrays = open_npz(path, ("X_int", "slots", "y", "days"))
    if identity != fingerprint(path):
        raise ValueError(f"{path} does not belong to {path.parent / ROWS_FILE}; segregate again")
    dense, slots, labels = arrays["X_int"], arrays["slots"], arrays["y"]
    _check_kinds(arrays, str(path))
    _check_days(str(path), arrays["days"], len(labels))
    _check_lengths(str(path), dense=dense, slots=slots, labels=labels)
    if slots.shape[1] != len(limits):
        raise ValueError(f"{path}: {slots.shape[1]} slots an input; expected {len(limits)}")
    stream = stream_of(str(path), (dense, slots, labels), limits, max_memory)
    if stream is None:
        check_sums(path)
        _check_arrays(str(path), dense, slots, labels, limits)
    return ClickInputs(dense, slots, labels, arrays["days"], None, stream)


def move_resident_inputs(
    prepared: PreparedData, table: EmbeddingTable, always: bool
) -> TrainingData:
    """Copy the training inputs whose rows are all on the device there too.

    Those are the hot inputs, and all of them where every row is resident. Unless `always`, a set
    that takes more than half of the device's free memory stays where it is.
    """
    moved = {}
    resident = {
        "hot": table.num_resident >= prepared.num_hot,
        "cold": table.num_resident == table.num_rows,
    }
    for name in (name for name, fits in resident.items() if fits):
        inputs = getattr(prepared.data, name)
        needed = DeviceInputs.bytes_needed(inputs)
        if always or 2 * needed <= free_device_bytes(table.device):
            moved[name] = DeviceInputs(inputs, table.device)
    return replace(prepared.data, **moved)


def baseline_data(log: ClickLog) -> PreparedData:
    """A processed log for the baseline: every training input in the cold stream, no row hot."""
    train, test, val = log.splits()
    data = TrainingData(hot=train.rows(0, 0), cold=train, test=test, val=val)
    return PreparedData(data, log.table_sizes, None, 0, log.manifest, log.identity, "whole log")


def planted_limit(manifest: dict[str, Any]) -> float | None:
    """Test AUC of the model that drew a synthetic log's labels; None for real logs."""
    notes = manifest.get("source_notes")
    value = notes.get("planted_auc_test") if isinstance(notes, dict) else None
    return float(value) if isinstance(value, (int, float)) else None
