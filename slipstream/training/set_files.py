"""What the files of a segregated folder must be; `slipstream.training.segregation` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from slipstream.logs.inputs import ClickInputs, check_days
from slipstream.logs.manifests import Described, Figures, Given
from slipstream.tools.npz import Spec, check_sums, fingerprint, open_npz, unpack_manifest
from slipstream.tools.schema import (
    Amount,
    Count,
    Positive,
    Sha256,
    check_fields,
    conform,
    whole_numbers,
)
from slipstream.training.popularity import Ranking

SEGREGATED_SETS = ("train_hot", "train_cold", "test", "val")
ROWS_FILE = "embedding_rows.npz"
TIMES_FILE = "times.json"
RANKING_FILE = "ranking.npz"  # of a folder that is not finished
SEGREGATE_AGAIN = "run input_segregation.py again"
MAX_ROWS = 2**31 - 1
SET_FIELDS = {"X_int": ("int32 float32", 2), "slots": ("int32", 2), "y": ("int8", 1)}
SET_FIELDS |= {"days": ("int64", 1), "weights": ("float32", 1)}
ROWS_FIELDS = {"slot_of_row": ("int32", 1), "access_counts": ("int64", 1), "counts": ("int64", 1)}
ROWS_FIELDS |= {"num_hot": ("int64", 0), "lambda": ("float64", 0)}
RANKING_FIELDS = {"slot_of_row": ("int32", 1), "access_counts": ("int64", 1)}
RANKING_FIELDS |= {"hot_days": ("int64", 1)}


class Options(Struct, forbid_unknown_fields=True):
    """What a folder was asked to be."""

    hot_emb_gpu_mem: Count | None
    hot_threshold: Annotated[float, Meta(gt=0, le=1)] | None
    ip_sampling_rate: Annotated[float, Meta(gt=0, le=100)]
    dim: Positive
    optimizer: str
    seed: Count | None


class Files(Struct, forbid_unknown_fields=True):
    """The sets' fingerprints."""

    train_hot: Sha256
    train_cold: Sha256
    test: Sha256
    val: Sha256


class RankingManifest(Struct):
    """Of the ranking, of which no set needs to be there yet."""

    version: Literal[2]
    source: Sha256
    options: Options
    figures: Figures
    source_notes: dict[str, Any] | None = None
    features: Given | UnsetType = UNSET
    transforms: Given | UnsetType = UNSET
    sub_sampling: Given | UnsetType = UNSET
    vocabulary: Described | UnsetType = UNSET


class RowsManifest(RankingManifest, kw_only=True):
    """Of the rows' file, which makes a folder whole."""

    files: Files


class Times(Struct, forbid_unknown_fields=True):
    """Of the file beside those that are the same in every run."""

    seconds: Amount
    processed_file: str | UnsetType = UNSET


def open_rows(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of the rows' file and its manifest, read whole and compared with each other.

    `ValueError`: they are not what segregation writes. Price: a pass over 12 bytes a row.
    """
    arrays = open_npz(path, ("slot_of_row", "access_counts", "num_hot", "counts"))
    check_sums(path)
    check_fields(path, arrays, ROWS_FIELDS, SEGREGATE_AGAIN)
    manifest = unpack_manifest(arrays, path)
    conform(manifest, RowsManifest, f"{path}: manifest", SEGREGATE_AGAIN)
    figures, num_rows = manifest["figures"], len(arrays["slot_of_row"])
    counts = whole_numbers(path, "counts", arrays["counts"], 1, MAX_ROWS)
    _same(path, "counts", "rows in all", int(counts.sum()), num_rows)
    check_ranked(path, arrays, figures)
    whole_numbers(path, "num_hot", arrays["num_hot"], 0, num_rows)
    _same(path, "num_hot", "hot rows", int(arrays["num_hot"]), figures["num_hot"])
    if "lambda" in arrays:
        _same(path, "lambda", "as the least share", float(arrays["lambda"]), figures["lambda"])
    return arrays, manifest


def check_ranked(path: Path, arrays: Mapping[str, np.ndarray], figures: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless slots number all rows once, in the order of their accesses."""
    slots, accesses = arrays["slot_of_row"], arrays["access_counts"]
    num_rows = len(slots)
    _same(path, "slot_of_row", "rows", num_rows, figures["num_rows"])
    _same(path, "access_counts", "rows", len(accesses), num_rows)
    whole_numbers(path, "slot_of_row", slots, 0, max(num_rows - 1, 0))
    is_slot = np.zeros(num_rows, bool)
    is_slot[slots] = True
    if not is_slot.all():
        raise ValueError(
            f"{path}: slot_of_row lacks slot {int(is_slot.argmin())}; expected each slot once; "
            f"{SEGREGATE_AGAIN}"
        )
    if num_rows and (accesses[-1] < 0 or (accesses[1:] > accesses[:-1]).any()):
        raise ValueError(
            f"{path}: access_counts are negative, or not in falling order; {SEGREGATE_AGAIN}"
        )
    if not figures["num_hot"] <= num_rows:
        raise ValueError(f"{path}: manifest: figures.num_hot is over {num_rows}; {SEGREGATE_AGAIN}")


def check_sets(folder: Path, sets: Sequence[ClickInputs], figures: Mapping[str, Any]) -> None:
    """Raise `ValueError` for sets that are not of one log, or not as many as it was cut into."""
    num_hot, num_train = figures["num_hot_inputs"], figures["num_inputs"]
    sizes = dict(zip(SEGREGATED_SETS, (num_hot, num_train - num_hot), strict=False))
    first = sets[0]
    for name, inputs in zip(SEGREGATED_SETS, sets, strict=True):
        path = folder / f"{name}.npz"
        _same(path, "y", "inputs", len(inputs), sizes.get(name, len(inputs)))
        _same(path, "X_int", "dense features", inputs.num_dense, first.num_dense)
        _same(path, "X_int", "as their type", inputs.dense.dtype.name, first.dense.dtype.name)
        of_days = first if name in sizes else inputs
        num_days = len(inputs.day_offsets) - 1
        _same(path, "days", "days", num_days, len(of_days.day_offsets) - 1)
        num_weights, others = (int(one.weights is not None) for one in (inputs, first))
        _same(path, "weights", "arrays", num_weights, others)


def _same(path: Path, name: str, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(
            f"{path}: {name} has {found} {what}; expected {expected}; {SEGREGATE_AGAIN}"
        )


def current_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a whole folder made from this file with these options; None otherwise."""
    manifest = manifest_of(folder / ROWS_FILE, identity, RowsManifest)
    try:
        same = manifest is not None and all(
            fingerprint(folder / f"{name}.npz") == manifest["files"][name]
            for name in SEGREGATED_SETS
        )
    except (OSError, ValueError, KeyError):
        return None
    return manifest if same else None


def is_ranking(
    path: Path, identity: dict[str, Any], num_inputs: int, most_rows: int, row_bytes: int
) -> bool:
    """Whether a whole ranking is there, made from this file with these options.

    `most_rows`, of so many bytes each, are hot unless there is a Lambda; `num_inputs`: to train on.
    """
    manifest = manifest_of(path, identity, RankingManifest)
    if manifest is None:
        return False
    figures, threshold = manifest["figures"], identity["options"]["hot_threshold"]
    try:
        ranking = open_npz(path, list(RANKING_FIELDS))
        check_sums(path)
        check_fields(path, ranking, RANKING_FIELDS)
        check_ranked(path, ranking, figures)
        check_days(str(path), ranking["hot_days"], figures["num_hot_inputs"])
        ranked = Ranking(ranking["slot_of_row"], ranking["access_counts"])
        num_hot = ranked.num_hot(threshold, most_rows)
        expected = {"num_hot": num_hot, "lambda": ranked.hot_threshold(num_hot)}
        expected |= {"num_inputs": num_inputs, "hot_bytes": num_hot * row_bytes}
        for name, value in expected.items():
            _same(path, f"figures.{name}", "as its value", figures[name], value)
    except ValueError:
        return False
    return True


def is_set(path: Path, specs: Mapping[str, Spec], offsets: np.ndarray) -> bool:
    """Whether a set is there whole, of these arrays and days."""
    try:
        arrays = open_npz(path, list(specs))
        check_sums(path)
    except (OSError, ValueError):
        return False
    found = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    return found == specs and np.array_equal(arrays["days"], offsets)


def manifest_of(path: Path, identity: dict[str, Any], kind: Any) -> dict[str, Any] | None:
    """The manifest of a file that was made from this file with these options; None otherwise."""
    try:
        manifest = unpack_manifest(open_npz(path), path)
        conform(manifest, kind, path)
    except (OSError, ValueError):
        return None
    found = {key: manifest.get(key) for key in identity}
    # As texts: True is not 1.
    same = json.dumps(found, sort_keys=True) == json.dumps(identity, sort_keys=True)
    return manifest if same else None
