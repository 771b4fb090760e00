"""What the JSON files of a work folder must be; `slipstream.logs.stages` says what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from slipstream.logs.manifests import ProcessedManifest, Source
from slipstream.tools.schema import Count, Finite, Positive

Crc = Annotated[int, Meta(ge=0, lt=2**32)]


class PartInfo(Struct):
    """Of a part; of a bucket of sorted rows, its number of rows alone."""

    num_rows: Count
    file: Count | UnsetType = UNSET
    is_last: bool | UnsetType = UNSET
    num_lines: Count | UnsetType = UNSET
    dropped: dict[str, Count] | UnsetType = UNSET
    examples: list[str] | UnsetType = UNSET
    seen: dict[str, Count] | UnsetType = UNSET
    source: Source | UnsetType = UNSET
    num_positive: Count | UnsetType = UNSET
    num_held_out: Count | UnsetType = UNSET
    day_rows: dict[str, Count] | UnsetType = UNSET
    is_sorted: bool | UnsetType = UNSET
    first_key: int | UnsetType = UNSET
    last_key: int | UnsetType = UNSET
    zeros: list[Count] | UnsetType = UNSET
    largest: list[Finite] | UnsetType = UNSET
    values: list[Count] | UnsetType = UNSET
    are_numbers: list[bool | None] | UnsetType = UNSET


class Rare(Struct, forbid_unknown_fields=True):
    """The id that rare values share."""

    id: Count
    values: Count
    accesses: Count


class Table(Struct, forbid_unknown_fields=True):
    """Of a merged table."""

    distinct: Count
    missing: Count
    whole_floats: Count
    accesses: Count
    top: Count
    numbers: bool | None
    rare: Rare | UnsetType = UNSET


class Plan(Struct, forbid_unknown_fields=True):
    """All that writing needs."""

    num_rows: Count
    counts: list[Positive]
    days: list[Count]
    means: list[Finite]
    manifest: ProcessedManifest


class Written(Struct, forbid_unknown_fields=True):
    """How far writing has come."""

    segment: str
    num_rows: Count
    writer: dict[str, tuple[Count, Crc]]


class Clicks(Struct):
    """Of a log's clicks that are kept."""

    source: dict[str, Any]
    dropped: dict[str, Count]
    examples: list[str]
    num_lines: Count


def check_plan(plan: Mapping[str, Any], num_dense: int, num_means: int, path: Path) -> None:
    """Raise `ValueError` for a plan whose parts do not fit each other."""
    days, manifest = plan["days"], plan["manifest"]
    columns, dense = manifest.get("table_columns", []), manifest.get("dense_columns", [])
    fits = {
        "days: do not cover its rows": days == sorted(days) and days[0] == 0 and len(days) > 1,
        "num_rows: not the days'": days[-1:] == [plan["num_rows"]] == [manifest.get("num_rows")],
        "counts: not the manifest's": plan["counts"] == [one.get("distinct") for one in columns],
        "manifest.dense_columns: not the log's": len(dense) == num_dense,
        "means: not one of each standardized column": len(plan["means"]) == num_means,
    }
    _refuse(fits, path)


def check_written(
    written: Mapping[str, Any], plan: Mapping[str, Any], row_bytes: Mapping[str, int], path: Path
) -> None:
    """Raise `ValueError` where what is written does not add up; `row_bytes`: by array of rows."""
    num_rows, writer = written["num_rows"], written["writer"]
    fits = {"num_rows: more than there are": num_rows <= plan["num_rows"]}
    for name, num_bytes in row_bytes.items():
        is_right = name in writer and writer[name][0] == num_rows * num_bytes
        fits[f"writer.{name}: not {num_rows} rows"] = is_right
    _refuse(fits, path)


def check_map(
    table: Mapping[str, Any], maps: Sequence[np.ndarray], path: Path, extends: bool
) -> None:
    """Raise `ValueError` where a table has other ids than the maps into it.

    `extends`: ids of an earlier file may have no value of this log.
    """
    found = max((int(one.max(initial=-1)) + 1 for one in maps), default=0)
    fits = {
        f"distinct: {table['distinct']}, and the maps go to {found}": (
            found <= table["distinct"] if extends else found == table["distinct"]
        ),
        "accesses: fewer than of some": max(table["missing"], table["top"]) <= table["accesses"],
        "rare.id: beyond the ids": table.get("rare", {}).get("id", -1) < table["distinct"],
    }
    _refuse(fits, path)


def _refuse(fits: Mapping[str, bool], path: Path) -> None:
    for what, is_so in fits.items():
        if not is_so:
            raise ValueError(f"{path}: {what}; delete {path.parent} and run again")
