"""What a trainer trains on: the four sets of inputs, in slots, and the numbering of the rows.

They come from a *segregated* folder (`slipstream.training.segregation` writes it) or, for the
baseline, from a processed file as it is.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.logs.features import FeatureLayout, layout_of, num_columns_of
from slipstream.logs.inputs import (
    CHECK_ROWS,
    ClickInputs,
    check_arrays,
    check_days,
    check_lengths,
    float_weights,
    present,
    stream_of,
    sum_of_weights,
)
from slipstream.logs.manifests import manifest_of_log
from slipstream.logs.processed import ClickLog
from slipstream.logs.sub_sampling import SUB_SAMPLING, SubSampling, sub_sampling_of
from slipstream.logs.transforms import TRANSFORMS, Transforms, transforms_of
from slipstream.logs.vocabulary import VOCABULARY
from slipstream.tools.device import free_device_bytes
from slipstream.tools.npz import check_sums, fingerprint, open_npz
from slipstream.tools.ranks import Ranks
from slipstream.tools.runtime import available_memory_bytes, read_json
from slipstream.tools.schema import check_fields
from slipstream.training.set_files import (
    ROWS_FILE,
    SEGREGATE_AGAIN,
    SEGREGATED_SETS,
    SET_FIELDS,
    TIMES_FILE,
    Times,
    check_sets,
    open_rows,
)

PROCESSED_FILE = "processed_file"  # in `TIMES_FILE`: where it is, from the folder on
# Of a processed file's manifest, where it has them.
HANDED_ON = (TRANSFORMS, SUB_SAMPLING, VOCABULARY)
TOGETHER_INPUTS = 1 << 15  # cut in one go on a device, if no mini-batch is larger: 9 MB of Criteo


class Inputs(Protocol):
    """A set of inputs that mini-batches are cut from."""

    labels: np.ndarray  # (n,) int8
    weights: np.ndarray | None  # (n,) float32; None: all 1
    day_offsets: np.ndarray  # (days + 1,) int64
    device: torch.device  # where `batch` puts its tensors

    def __len__(self) -> int: ...

    @property
    def num_dense(self) -> int:
        """Dense features of an input."""

    @property
    def window(self) -> int:
        """Inputs to shuffle among each other where they are streamed; 0: they are in memory."""

    def slots_of(self, inputs: np.ndarray | slice) -> Tensor:
        """Slots (B, C) int64 of the given inputs."""

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Dense (B, num_dense) float32, slots (B, C) int64 and labels (B,) float32."""

    def weights_of(self, inputs: np.ndarray | slice) -> np.ndarray | None:
        """Weights (B,) float32 of the given inputs, in host memory; None: all 1."""

    def will_need(self, inputs: np.ndarray) -> None:
        """These inputs will be asked for soon: have them read from disk, without waiting."""


@dataclass(frozen=True)
class TrainingData:
    """The four sets of a run. Baseline: every training input is in `cold`.

    Attributes:
        test, val: held out; both are empty where nothing is.
        access_counts: (num_rows,) int64 by slot, over the training inputs; None: not counted.
        held_out_shift: added to logits on `test` and `val`, see `slipstream.logs.sub_sampling`.
    """

    hot: Inputs
    cold: Inputs
    test: Inputs
    val: Inputs
    access_counts: np.ndarray | None = None
    held_out_shift: float = 0.0

    @property
    def num_held_out(self) -> int:
        """Test and validation inputs."""
        return len(self.test) + len(self.val)

    @property
    def num_train(self) -> int:
        """Training inputs, hot and cold."""
        return len(self.hot) + len(self.cold)


@dataclass(frozen=True)
class PreparedData:
    """What a trainer trains on: the four sets in slots, and the numbering of the rows.

    Attributes:
        data: hot and cold training inputs, test and validation.
        table_sizes: rows per table.
        layout: of the id columns.
        slot_of_row: (num_rows,) int32, table offset + id -> slot; None: that number is the slot.
        num_hot: slots below it are hot.
        manifest: of the segregated folder, or of the processed file.
        log_identity: of the processed log.
        sets_identity: of the sets; their batches are numbered in them.
        files: where they came from, `processed` and `segregated`; {}: they were generated.
        has_absent: whether an element of any input may be absent; of test inputs also where the
            layout has none.
    """

    data: TrainingData
    table_sizes: np.ndarray
    layout: FeatureLayout
    slot_of_row: np.ndarray | None
    num_hot: int
    manifest: dict[str, Any]
    log_identity: str
    sets_identity: Any
    files: dict[str, str] = field(default_factory=dict)
    has_absent: bool = False

    @property
    def transforms(self) -> Transforms:
        """What dense values became, which a model of them needs."""
        return transforms_of(self.manifest, self.data.test.num_dense, "the data")

    @property
    def sub_sampling(self) -> SubSampling | None:
        """Which rows were left out; None: none."""
        return sub_sampling_of(self.manifest, "the data")

    @cached_property
    def mean_weight(self) -> float:
        """Of the training inputs; one pass over the weights, if there are any."""
        sets = (self.data.hot, self.data.cold)
        total = sum(
            len(part) if part.weights is None else sum_of_weights(part.weights) for part in sets
        )
        return total / max(self.data.num_train, 1)


def baseline_data(log: ClickLog) -> PreparedData:
    """A processed log for the baseline: every training input in the cold stream, no row hot."""
    train, test, val = log.splits()
    shift = _held_out_shift(log.manifest, log.identity)
    data = TrainingData(train.rows(0, 0), train, test, val, held_out_shift=shift)
    sizes, identity = log.table_sizes, log.identity
    files = {} if log.path is None else {"processed": str(log.path.absolute())}
    found = (sizes, log.layout, None, 0, log.manifest, identity, "whole log", files)
    return PreparedData(data, *found, log.layout.has_absent)


def _held_out_shift(manifest: dict[str, Any], source: str) -> float:
    sub_sampling = sub_sampling_of(manifest, source)
    return 0.0 if sub_sampling is None else sub_sampling.held_out_shift


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
    rows, manifest = open_rows(folder / ROWS_FILE)
    if processed_file is not None:
        _check_source(folder, manifest, processed_file)
    slot_of_row, num_hot = rows["slot_of_row"], int(rows["num_hot"])
    if max_memory is None:
        max_memory = available_memory_bytes() // 2
    _check_budget(folder, manifest["options"], num_hot, row_bytes)
    num_rows, num_tables = len(slot_of_row), len(rows["counts"])
    described = manifest.get("features")
    num_columns = num_tables if described is None else num_columns_of(described)
    layout = layout_of(manifest, num_columns, num_tables, str(folder / ROWS_FILE))
    sets = []
    for name in SEGREGATED_SETS:
        path, limit = folder / f"{name}.npz", num_hot if name == "train_hot" else num_rows
        sets.append(_open_set(path, manifest, layout, limit, max_memory // 2))
    check_sets(folder, sets, manifest["figures"])
    hot, cold, test, val = sets
    shift = _held_out_shift(manifest, str(folder / ROWS_FILE))
    with contextlib.suppress(FileNotFoundError):
        manifest |= read_json(folder / TIMES_FILE, Times)
    return PreparedData(
        TrainingData(hot, cold, test, val, rows["access_counts"], shift),
        rows["counts"],
        layout,
        slot_of_row,
        num_hot,
        manifest,
        str(manifest.get("source")),
        manifest["files"],
        _files_of(folder, manifest, processed_file),
        layout.has_absent,
    )


def _files_of(
    folder: Path, manifest: dict[str, Any], processed_file: str | Path | None
) -> dict[str, str]:
    """Where the data came from: the folder, and its processed file where it says which."""
    if processed_file is None and isinstance(manifest.get(PROCESSED_FILE), str):
        processed_file = folder.absolute() / manifest[PROCESSED_FILE]
    files = {"segregated": str(folder.absolute())}
    return files | (
        {} if processed_file is None else {"processed": os.path.abspath(processed_file)}
    )


def _check_source(folder: Path, manifest: dict[str, Any], processed_file: str | Path) -> None:
    if manifest.get("source") != fingerprint(processed_file):
        raise ValueError(
            f"{folder} was not made from {processed_file}; run input_segregation.py on that file"
        )
    described = manifest_of_log(open_npz(processed_file, others=False), processed_file)
    for name in ("features", *HANDED_ON):
        # A folder says which features there are also where its file does not.
        is_said = name != "features" or described.get(name) is not None
        if is_said and described.get(name) != manifest.get(name):
            raise ValueError(
                f"{folder} was made when {processed_file} had other {name.replace('_', '-')}; run "
                "input_segregation.py again"
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


def _open_set(
    path: Path, manifest: dict[str, Any], layout: FeatureLayout, limit: int, max_memory: int
) -> ClickInputs:
    """One of a segregated folder's sets; its slots are below `limit`."""
    arrays = open_npz(path, ("X_int", "slots", "y", "days"))
    if manifest["files"][path.stem] != fingerprint(path):
        raise ValueError(f"{path} does not belong to {path.parent / ROWS_FILE}; segregate again")
    dense, slots, labels = arrays["X_int"], arrays["slots"], arrays["y"]
    check_fields(path, arrays, SET_FIELDS, SEGREGATE_AGAIN)
    check_days(str(path), arrays["days"], len(labels))
    weights = float_weights(arrays)
    check_lengths(str(path), dense=dense, slots=slots, labels=labels, weights=weights)
    if slots.shape[1] != layout.num_columns:
        raise ValueError(f"{path}: {slots.shape[1]} slots an input; expected {layout.num_columns}")
    limits, least = np.full(layout.num_columns, limit), layout.least_ids
    columns = present(dense, slots, labels, weights)
    stream = stream_of(str(path), columns, limits, least, max_memory)
    if stream is None:
        check_sums(path)
        check_arrays(str(path), dense, slots, labels, limits, least, weights)
    transforms = transforms_of(manifest, dense.shape[1], str(path))
    days, has_absent = arrays["days"], layout.has_absent
    return ClickInputs(dense, slots, labels, days, None, stream, has_absent, transforms, weights)


def num_cut_together(batch_size: int) -> int:
    """How many inputs on a device are cut in one go: whole mini-batches."""
    return max(TOGETHER_INPUTS // batch_size, 1) * batch_size


class DeviceInputs:
    """`ClickInputs` copied to a device: batches are cut there, and no host memory is touched.

    Takes 4 bytes a dense and a sparse feature and 4 a label: 160 bytes an input of Criteo. Weights
    stay in host memory: the loss weight of a mini-batch is added up there, without waiting.
    """

    def __init__(self, inputs: ClickInputs, device: torch.device) -> None:
        self.labels, self.day_offsets, self.device = inputs.labels, inputs.day_offsets, device
        self.num_dense, self.window = inputs.num_dense, inputs.window
        self.weights, self.weights_of = inputs.weights, inputs.weights_of
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
    def bytes_needed(inputs: ClickInputs, num_cut: int = 0) -> int:
        """Device memory that the inputs would take, and `num_cut` at a time cut out of them.

        Those are cut before the last ones are given up, with slots of 8 bytes, once also of 4.
        """
        num_dense, num_columns = inputs.dense.shape[1], inputs.categories.shape[1]
        cut = 2 * (4 * num_dense + 8 * num_columns + 4) + 4 * num_columns
        num_cut = min(num_cut, len(inputs))
        return 4 * len(inputs) * (num_dense + num_columns + 1) + cut * num_cut

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
        """Slots (B, C) int64 of the given inputs, on the device."""
        return self._select(inputs, self._slots)[0].long()

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """As `ClickInputs.batch`, on the device."""
        dense, slots, labels = self._select(inputs, self._dense, self._slots, self._labels)
        return dense, slots.long(), labels


class Places(Protocol):
    """What a table says of where its rows are."""

    num_rows: int
    num_resident: int
    device: torch.device


def move_resident_inputs(
    prepared: PreparedData, table: Places, always: bool, batch_size: int, ranks: Ranks | None = None
) -> TrainingData:
    """Copy the training inputs whose rows are all on the device there too.

    Those are the hot inputs, and all of them where every row is resident. Unless `always`, a set
    that takes more than half of the device's free memory stays where it is. Says what it takes.
    """
    moved: dict[str, Any] = {}
    resident = {
        "hot": table.num_resident >= prepared.num_hot,
        "cold": table.num_resident == table.num_rows,
    }
    for name in (name for name, fits in resident.items() if fits):
        inputs = getattr(prepared.data, name)
        needed = DeviceInputs.bytes_needed(inputs, num_cut_together(batch_size))
        is_large = not always and 2 * needed > free_device_bytes(table.device)
        if ranks is not None:  # all do as one must
            is_large = ranks.is_any(is_large)
        if not is_large:
            moved[name] = DeviceInputs(inputs, table.device)
            if needed:
                print(f"and {needed / 1e6:,.0f} MB of device memory for the {name} inputs there")
    return replace(prepared.data, **moved)
