"""Processed .npz files, of data_utils.py or older DLRM scripts, as inputs with ids per table.

The last day is held out: its first half is the test set, its second half the validation set. It may
be empty: then nothing is held out, and both are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.features import FeatureLayout, layout_of
from slipstream.logs.formats import equal_days
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
from slipstream.logs.manifests import check_fits, manifest_of_log
from slipstream.logs.sub_sampling import sub_sampling_of
from slipstream.logs.synthetic import planted_clicks
from slipstream.logs.transforms import transforms_of
from slipstream.tools.npz import check_sums, fingerprint, open_npz
from slipstream.tools.schema import check_fields, whole_numbers
from slipstream.tools.streams import stream

MAX_TABLE_ROWS = 2**31 - 1
# Of an older script some are in other types; what they hold is compared before it is converted.
FIELDS = {"X_int": ("iuf", 2), "X_cat": ("iuf", 2), "y": ("iuf", 1), "weights": ("iuf", 1)}
FIELDS |= {"counts": ("iuf", 1), "days": ("iuf", 1), "codes": ("uint64", 1)}


@dataclass(frozen=True)
class ClickLog:
    """A whole processed log.

    Attributes:
        inputs: all rows, ids numbered table after table.
        table_sizes: (T,) int64 rows per table.
        layout: which id columns form which feature.
        manifest: what made the file; `{}` for files of older scripts.
        identity: the file's fingerprint, or how the log was generated.
        path: of the file; None: generated.
    """

    inputs: ClickInputs
    table_sizes: np.ndarray
    layout: FeatureLayout
    manifest: dict[str, Any]
    identity: str
    path: Path | None = None

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
    weights: np.ndarray | None = None,
) -> ClickLog:
    """Check the arrays of a log against each other and wrap them.

    Arrays of more than `max_memory` bytes (None: half of what is free) are checked batch by batch.

    Raises `ValueError` for lengths that differ, ids outside their table, labels other than 0 and 1,
    weights that are not finite, negative or all 0 in a set, a manifest whose parts do not fit, and
    days that do not cover the rows. One pass over the ids (about 1 s for 45 M rows in memory).
    """
    check_lengths(source, dense=dense, ids=ids, labels=labels, weights=weights)
    days = np.asarray(days).astype(np.int64)
    check_days(source, days, len(labels))
    if days[-2] == 0:
        raise ValueError(
            f"{source}: no rows to train on; expected at least two days, the last one held out"
        )
    sizes, manifest = np.asarray(table_sizes, np.int64), manifest or {}
    layout = layout_of(manifest, ids.shape[1], len(sizes), source)
    limits, least = sizes[layout.table_of_column], layout.least_ids
    arrays = present(dense, ids, labels, weights)
    stream = stream_of(source, arrays, limits, least, max_memory)
    if stream is None:
        check_arrays(source, dense, ids, labels, limits, least, weights)
    first_rows = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    offsets = first_rows[layout.table_of_column]
    sub_sampling_of(manifest, source)
    transforms = transforms_of(manifest, dense.shape[1], source)
    inputs = ClickInputs(
        *(dense, ids, labels, days, offsets, stream, layout.has_absent, transforms, weights)
    )
    log = ClickLog(inputs, sizes, layout, manifest, identity or source)
    for name, part in zip(("training", "test", "validation"), log.splits(), strict=True):
        if len(part) and part.weights is not None and sum_of_weights(part.weights) == 0:
            raise ValueError(f"{source}: all weights of the {name} inputs are 0")
    return log


def load_processed(
    path: str | Path, max_memory: int | None = None, verify: bool = False
) -> ClickLog:
    """Open a processed .npz, ours (mapped) or an older script's (compressed, read into memory).

    What takes more than `max_memory` bytes (None: half of what is free) is streamed. Checksums are
    compared (one pass over the file) unless it is streamed, and then with `verify`.

    A member `weights` says how much each input counts; the manifest's `transforms` and
    `sub_sampling` are read, see the modules of these names.

    Older files may hold `X_cat` as float64 or no dense column, and have no `days`: 7 equal ones are
    assumed, as for Kaggle.
    """
    arrays = open_npz(path, ("X_int", "X_cat", "y", "counts"))
    dense, ids = arrays["X_int"], arrays["X_cat"]
    check_fields(path, arrays, FIELDS)
    days = whole_numbers(path, "days", arrays.get("days", equal_days(len(ids))), 0, len(ids))
    # All tables together: slots are int32.
    counts = whole_numbers(path, "counts", arrays["counts"], 1, MAX_TABLE_ROWS)
    manifest = manifest_of_log(arrays, path)
    check_fits(manifest, dense.shape[1], counts, days, len(ids), str(path))
    if ids.dtype != np.int32:
        ids = _int32(ids, f"{path}: X_cat")
    if dense.dtype not in (np.int32, np.float32):
        dense = _int32(dense, f"{path}: X_int")
    if not dense.shape[1]:  # a column that is always 0, as our files have it; it takes no memory
        dense = np.broadcast_to(np.zeros((), np.int32), (len(dense), 1))
    labels = arrays["y"]
    if labels.dtype != np.int8:
        labels = whole_numbers(path, "y", labels, 0, 1).astype(np.int8)
    log = make_click_log(
        dense,
        ids,
        labels,
        counts,
        days,
        str(path),
        manifest,
        max_memory,
        fingerprint(path),
        float_weights(arrays),
    )
    if verify or not log.inputs.window:
        check_sums(path)
    return replace(log, path=Path(path))


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


@dataclass(frozen=True)
class Lookups:
    """How random data look rows up, as DLRM's generator does.

    Attributes:
        num: rows of a table for an input, at most; their sum reaches the network.
        is_fixed: as many for each input; else from 1 to `num`. A row that is drawn twice for an
            input counts once.
        dist: `uniform` over the table, or `gaussian`.
        low, high: of gaussian ids, which are cut to them.
        mean, deviation: of gaussian ids; a mean of -1 is half-way between `low` and `high`.
    """

    num: int = 1
    is_fixed: bool = False
    dist: str = "uniform"
    low: float = 0.0
    high: float = 1.0
    mean: float = -1.0
    deviation: float = 1.0

    def draw(self, rng: np.random.Generator, size: int, num_rows: int) -> np.ndarray:
        """Ids (num_rows, num) int32 of a table of `size` rows; absent ones are -1."""
        shape = (num_rows, self.num)
        if self.dist == "gaussian":
            mean = (self.low + self.high) / 2 if self.mean == -1 else self.mean
            drawn = rng.normal(mean, self.deviation, shape)
            high = min(self.high, size - 1)
            ids = np.clip(drawn, max(min(self.low, high), 0), high).astype(np.int32)
        else:
            ids = rng.integers(0, size, shape, dtype=np.int32)
        if self.num == 1:
            return ids
        if not self.is_fixed:
            count = np.maximum(1, np.rint(rng.random(num_rows) * min(size, self.num)))
            ids[np.arange(self.num) >= count[:, None]] = -1
        ids.sort(axis=1)
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
        return ids


def generated_log(
    kind: str,
    table_sizes: list[int],
    num_rows: int,
    num_dense: int,
    seed: int,
    lookups: Lookups | None = None,
) -> ClickLog:
    """A log made in memory: `random` (nothing to learn) or `synthetic` (planted model).

    `lookups` are of random data; None: one row of each table, all alike.
    """
    sizes, manifest = np.array(table_sizes, np.int64), None
    if kind == "synthetic":
        clicks = planted_clicks(num_rows, table_sizes, seed, num_dense=num_dense)
        dense, ids = np.ascontiguousarray(clicks.X_int), np.ascontiguousarray(clicks.X_cat)
        labels = clicks.y
    else:
        rng = stream(seed, "random data")
        dense = rng.integers(0, 100, (num_rows, num_dense), dtype=np.int32)
        if lookups is None:
            ids = rng.integers(0, sizes, (num_rows, len(sizes)))
        else:
            ids = np.concatenate([lookups.draw(rng, size, num_rows) for size in sizes], axis=1)
            if lookups.num > 1:
                manifest = {"features": _multi_hot(len(sizes), lookups.num)}
        labels = rng.integers(0, 2, num_rows, dtype=np.int8)
    identity = f"{kind} data, {num_rows} rows of seed {seed}" + (f", {lookups}" if lookups else "")
    return make_click_log(
        *(dense, ids, labels, sizes, equal_days(num_rows), f"{kind} data"),
        manifest=manifest,
        identity=identity,
    )


def _multi_hot(num_tables: int, num: int) -> list[dict[str, Any]]:
    return [
        {"name": f"categorical {table + 1}", "table": table, "pooling": "sum"}
        | {"columns": list(range(table * num, (table + 1) * num))}
        for table in range(num_tables)
    ]


def planted_limit(manifest: dict[str, Any]) -> float | None:
    """Test AUC of the model that drew a synthetic log's labels; None for real logs."""
    notes = manifest.get("source_notes")
    value: Any = notes.get("planted_auc_test") if isinstance(notes, dict) else None
    return float(value) if type(value) in (int, float) and 0 <= value <= 1 else None
