"""What the manifest of a processed file may say; whatever older ones lack may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType, field

from slipstream.logs.features import POOLINGS
from slipstream.logs.transforms import KINDS
from slipstream.tools.npz import unpack_manifest
from slipstream.tools.schema import AGAIN, Amount, Count, Finite, Positive, Sha256, Share, conform

Given = dict[str, Any] | list[Any] | str | int | float | bool  # anything but null


class FeatureEntry(Struct, forbid_unknown_fields=True):
    """A sparse feature, see `slipstream.logs.features`."""

    name: str
    columns: list[Count]
    table: Count
    pooling: Literal[POOLINGS] = "none"  # type: ignore[valid-type]


class TransformEntry(Struct, forbid_unknown_fields=True):
    """What becomes of a dense column, see `slipstream.logs.transforms`."""

    kind: Literal[KINDS]  # type: ignore[valid-type]
    mean: Finite | UnsetType = UNSET
    std: Amount | UnsetType = UNSET


class TableColumn(Struct):
    """A table: `distinct` ids, of which `rare_id` is that of all rare values."""

    name: str
    distinct: Positive | UnsetType = UNSET
    missing_share: Share | UnsetType = UNSET
    top_1_percent_share: Share | UnsetType = UNSET
    whole_floats: Count | UnsetType = UNSET
    rare_id: Count | UnsetType = UNSET
    rare_values: Count | UnsetType = UNSET
    rare_share: Share | UnsetType = UNSET


class DenseColumn(Struct):
    """A dense column."""

    name: str
    zero_share: Share | UnsetType = UNSET
    largest: Finite | UnsetType = UNSET


class Source(Struct):
    """A raw file; more of it is kept to know it again."""

    name: str
    rows: Count | UnsetType = UNSET
    bytes: Count | UnsetType = UNSET
    mtime_ns: int | UnsetType = UNSET
    sha256: str | UnsetType = UNSET


class Options(Struct):
    """Of preprocessing: what has been asked for."""

    min_count: Positive | None | UnsetType = UNSET


class SplitEntry(Struct):
    """Which rows are held out, where it is not the last day."""

    rule: str
    seed: Count | UnsetType = UNSET


class Described(Struct, forbid_unknown_fields=True):
    """What a manifest says of it, see `slipstream.logs.vocabulary`."""

    checksum: Sha256
    lineage: list[Sha256]
    numbers: list[bool | None]
    data_set: str
    max_ind_range: Annotated[int, Meta(ge=-1)]
    columns: dict[str, Any] | None


class ProcessedManifest(Struct):
    """Of a processed file."""

    version: Positive | UnsetType = UNSET
    data_set: str | UnsetType = UNSET
    options: Options | UnsetType = UNSET
    sources: list[Source] | UnsetType = UNSET
    source_notes: dict[str, Any] | UnsetType = UNSET
    # What these may be is for the modules of their names to say.
    features: Given | UnsetType = UNSET
    transforms: Given | UnsetType = UNSET
    sub_sampling: Given | UnsetType = UNSET
    vocabulary: Described | UnsetType = UNSET
    table_columns: list[TableColumn] | UnsetType = UNSET
    dense_columns: list[DenseColumn] | UnsetType = UNSET
    num_lines: Count | UnsetType = UNSET
    num_rows: Count | UnsetType = UNSET
    num_positive: Count | UnsetType = UNSET
    rows_dropped: dict[str, Count] | UnsetType = UNSET
    seen: dict[str, Count] | UnsetType = UNSET
    bad_lines: list[str] | UnsetType = UNSET
    split: SplitEntry | UnsetType = UNSET
    held_out_files: list[str] | UnsetType = UNSET


class Figures(Struct):
    """What segregation found out."""

    num_rows: Count
    num_hot: Count
    hot_share: Share = field(name="lambda")
    num_inputs: Count
    num_hot_inputs: Count
    hot_bytes: Count
    hot_access_share: Share
    hot_input_share: Share
    budgets: list[tuple[Count, Count, Share, Share]]
    min_counts: list[tuple[Positive, Count, Count, Share]] | UnsetType = UNSET


def manifest_of_log(arrays: Mapping[str, np.ndarray], source: str | Path) -> dict[str, Any]:
    """The manifest of a processed file; `ValueError` where a field is not what it must be."""
    manifest = unpack_manifest(arrays, source)
    conform(manifest, ProcessedManifest, f"{source}: manifest")
    return manifest


def check_fits(
    manifest: Mapping[str, Any],
    num_dense: int,
    counts: np.ndarray,
    days: np.ndarray,
    num_rows: int,
    source: str,
) -> None:
    """Raise `ValueError` where a manifest says other sizes than the arrays beside it have."""
    columns = manifest.get("table_columns")
    said: dict[str, tuple[Any, Any]] = {
        "num_rows": (manifest.get("num_rows"), num_rows),
        "dense_columns": (_length(manifest, "dense_columns"), num_dense),
        "table_columns": (_length(manifest, "table_columns"), len(counts)),
    }
    if "version" in manifest and manifest.get("split", {}).get("rule") != "none":
        said["split"] = ("held-out rows", "held-out rows" if days[-2:-1] < num_rows else "none")
    for number, column in enumerate(columns or []):
        size = int(counts[number]) if number < len(counts) else None
        said[f"table_columns[{number}].distinct"] = (column.get("distinct"), size)
        if size is not None and not column.get("rare_id", 0) < size:
            said[f"table_columns[{number}].rare_id"] = (column["rare_id"], size - 1)
    for name, (there, here) in said.items():
        if there is not None and there != here:
            raise ValueError(
                f"{source}: manifest: {name}: says {there}, and the arrays have {here}; {AGAIN}"
            )


def _length(manifest: Mapping[str, Any], name: str) -> int | None:
    return len(manifest[name]) if name in manifest else None
