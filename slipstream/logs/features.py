"""Which id columns of a processed log form which feature, and which table a feature's rows are in.

A feature is one id column, as in Criteo, or several: a *multi-hot* one (a list in one cell, its
rows summed or averaged) or a *sequence* (the last L of a user's items, order kept). Features may
share a table. In a feature of several columns an element may be *absent*: -1 in files.

The manifest of a processed file says so under the key `features`, a list of

    {"name": "genres", "columns": [3, 4, 5], "table": 3, "pooling": "sum"}

with `pooling` one of `POOLINGS`. A file without that key has one column a feature and table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

POOLINGS = ("none", "sum", "mean", "sequence")


@dataclass(frozen=True)
class Feature:
    """A sparse feature.

    Attributes:
        name: unique.
        columns: of `X_cat`, neighbours in order.
        table: number of the embedding table of its ids.
        pooling: `none`: one column, every input has it; `sum`, `mean`: over the present elements,
            zeros where there is none; `sequence`: its rows reach the network one by one.
    """

    name: str
    columns: tuple[int, ...]
    table: int
    pooling: str = "none"


@dataclass(frozen=True)
class FeatureLayout:
    """All sparse features of a log; every column belongs to one."""

    features: tuple[Feature, ...]

    @cached_property
    def num_columns(self) -> int:
        """C, the id columns of an input."""
        return sum(len(feature.columns) for feature in self.features)

    @cached_property
    def table_of_column(self) -> np.ndarray:
        """(C,) int64: the table that each column's ids are of."""
        tables = np.empty(self.num_columns, np.int64)
        for feature in self.features:
            tables[list(feature.columns)] = feature.table
        return tables

    def columns_of(self, table: int) -> list[int]:
        """The columns whose ids are of a table, in order."""
        return np.flatnonzero(self.table_of_column == table).tolist()

    @cached_property
    def may_be_absent(self) -> np.ndarray:
        """(C,) bool: the columns that may hold -1."""
        absent = np.zeros(self.num_columns, bool)
        for feature in self.features:
            absent[list(feature.columns)] = feature.pooling != "none"
        return absent

    @property
    def least_ids(self) -> np.ndarray:
        """(C,) the least value of each column: -1 where it may be absent, else 0."""
        return np.where(self.may_be_absent, -1, 0)

    @property
    def has_absent(self) -> bool:
        """Whether any element may be absent."""
        return bool(self.may_be_absent.any())

    @property
    def is_plain(self) -> bool:
        """Whether column i is feature i, and nothing is pooled: rows are vectors as they are."""
        return all(
            feature.columns == (number,) and feature.pooling == "none"
            for number, feature in enumerate(self.features)
        )

    def describe(self) -> list[dict[str, Any]]:
        """As it stands in a manifest."""
        return [{**asdict(feature), "columns": list(feature.columns)} for feature in self.features]


def plain_layout(num_columns: int, names: Sequence[str] | None = None) -> FeatureLayout:
    """One feature a column, each with a table of its own."""
    names = names or [f"categorical {number + 1}" for number in range(num_columns)]
    return FeatureLayout(
        tuple(Feature(name, (number,), number) for number, name in enumerate(names))
    )


def layout_of(
    manifest: Mapping[str, Any], num_columns: int, num_tables: int, source: str
) -> FeatureLayout:
    """The layout that a manifest describes; `ValueError` where it does not fit the arrays."""
    described = manifest.get("features")
    if described is None:
        if num_columns != num_tables:
            raise ValueError(
                f"{source}: {num_tables} table sizes for {num_columns} categories; a manifest that "
                "says which columns form which feature is missing"
            )
        columns = manifest.get("table_columns", [])
        names: list[Any] = [column.get("name") for column in columns if isinstance(column, dict)]
        if len(set(names)) != num_columns or not all(isinstance(name, str) for name in names):
            return plain_layout(num_columns)  # an older file
        return plain_layout(num_columns, names)
    try:
        features = tuple(_feature_of(one) for one in described)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{source}: its manifest's features are not whole: {error!r}") from error
    columns = sorted(column for feature in features for column in feature.columns)
    names = [feature.name for feature in features]
    reasons = {
        f"columns {columns}; expected each of 0 to {num_columns - 1} once": columns
        != list(range(num_columns)),
        "a name twice": len(set(names)) < len(names),
        f"tables other than 0 to {num_tables - 1}": {feature.table for feature in features}
        != set(range(num_tables)),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"{source}: its manifest's features have {reason}")
    return FeatureLayout(features)


def num_columns_of(described: Any) -> int:
    """The columns that a manifest's features have in all; 0 where that cannot be told."""
    try:
        return sum(len(feature["columns"]) for feature in described)
    except (TypeError, KeyError):
        return 0  # `layout_of` says what is wrong


def _feature_of(described: Mapping[str, Any]) -> Feature:
    name, pooling = described["name"], described.get("pooling", "none")
    columns, table = described["columns"], described["table"]
    if not isinstance(name, str) or pooling not in POOLINGS:
        raise ValueError(f"name {name!r}, pooling {pooling!r}")
    if not columns or not all(type(number) is int for number in (*columns, table)):
        raise ValueError(f"{name}: columns {columns!r}, table {table!r}")
    if list(columns) != list(range(columns[0], columns[0] + len(columns))):
        raise ValueError(f"{name}: columns {columns!r} are no neighbours in order")
    if pooling == "none" and len(columns) != 1:
        raise ValueError(f"{name}: {len(columns)} columns, and no pooling")
    return Feature(name, tuple(columns), table, pooling)
