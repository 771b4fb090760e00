"""What the columns of a raw log are: Criteo's, Avazu's, or those of a user's column file.

A column is of one *kind*. What a field may hold, and whether it may be empty:

    label    0 or 1
    count    a whole number of 1 to 16 digits, at most 2^31 - 1; dense; empty and negative are 0
    number   a decimal number; dense, float32; empty and negative are 0
    hex      1 to 8 hexadecimal digits, case and leading zeros aside; categorical; may be empty
    string   UTF-8 text, taken byte by byte; categorical; may be empty
    hour     Avazu's YYMMDDHH: hour of day and weekday (categorical), hour of day (dense), its date
    day      a whole number or an ISO date: rows of one value are a day, days go in its order
    order    a whole number or an ISO date and time (to 0.1 ms): rows are sorted by it
    skip     any UTF-8 text

Taobao's log has kinds of its own: id (a whole number of 1 to 9 digits), behaviour (pv, a click, or
buy, cart, fav) and time (seconds since 1970).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

KAGGLE_DAYS = 7
CATEGORY_KINDS, DENSE_KINDS = ("hex", "string"), ("count", "number", "id")
KEY_KINDS = ("hour", "day", "order", "time")
HOUR_CATEGORIES = ("hour of day", "weekday")
SEPARATORS = {"csv": ",", "tsv": "\t"}
CUSTOM_KEYS = "label, dense, categorical, day, order, separator, header, quote, columns, days"


@dataclass(frozen=True)
class Schema:
    """What a log's rows are once they are parsed.

    Attributes:
        dense_names: of the dense features; a log without any has one that is always 0.
        table_names: of the categorical features.
        dense_type: int32, or float32 where a column holds decimal numbers.
        has_keys: rows have keys, and are sorted by them.
        day_rule: `equal`: `num_days` equal contiguous days; `files`: each file is a day; `keys`:
            rows of one `day_of` their key are a day.
        num_days: see `day_rule`.
        day_length, day_start: a day is `(key - day_start) // day_length`.
    """

    dense_names: tuple[str, ...]
    table_names: tuple[str, ...]
    dense_type: np.dtype
    has_keys: bool
    day_rule: str
    num_days: int = KAGGLE_DAYS
    day_length: int = 1
    day_start: int = 0

    def day_of(self, keys: np.ndarray) -> np.ndarray:
        """The day of each key."""
        return (keys - self.day_start) // self.day_length

    @property
    def row_bytes(self) -> int:
        """Of the processed file, and of a part."""
        return 1 + 4 * len(self.dense_names) + 4 * len(self.table_names)


def equal_days(num_rows: int, num_days: int = KAGGLE_DAYS) -> np.ndarray:
    """Row offsets (num_days + 1,) int64 of equal contiguous days, the first ones a row longer."""
    lengths = np.full(num_days, num_rows // num_days, np.int64)
    lengths[: num_rows % num_days] += 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


@dataclass(frozen=True)
class LogFormat:
    """How to read a log.

    Attributes:
        kinds, names: of each column of a line, in order; for a log with a header, of the columns
            that are read, in any order (`with_header` gives the line's).
        separator: one character; None for Parquet.
        header: the first line names the columns.
        quote: fields may be quoted with `"`, as in RFC 4180, but for newlines.
        num_days: equal contiguous days that the whole log is cut into, where no column tells them.
        day_per_file: each file is a day.
        order: the names in the order of the features, whatever a file's order is; empty: `names`.
        fixed: texts that all rows of a file have in the last columns, which are not in the file.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    separator: str | None = "\t"
    header: bool = False
    quote: bool = False
    num_days: int = KAGGLE_DAYS
    day_per_file: bool = False
    order: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def columns(self, *kinds: str) -> list[int]:
        """Places of the columns of these kinds, in the order of the features."""
        places = [column for column, kind in enumerate(self.kinds) if kind in kinds]
        if self.order:
            places.sort(key=lambda column: self.order.index(self.names[column]))
        return places

    @property
    def key_kind(self) -> str | None:
        """Kind of the column that orders the rows; None: none does."""
        return next((kind for kind in self.kinds if kind in KEY_KINDS), None)

    @property
    def schema(self) -> Schema:
        """What the rows become."""
        names = [self.names[column] for column in self.columns(*DENSE_KINDS)]
        tables = [self.names[column] for column in self.columns(*CATEGORY_KINDS)]
        if self.key_kind == "hour":
            names, tables = [*names, "hour"], [*tables, *HOUR_CATEGORIES]
        rule = "files" if self.day_per_file else "keys"
        return Schema(
            tuple(names or ["none"]),
            tuple(tables),
            np.dtype(np.float32 if "number" in self.kinds else np.int32),
            self.key_kind is not None,
            rule if self.day_per_file or self.key_kind in ("hour", "day") else "equal",
            self.num_days,
        )

    def with_folders(self, values: Mapping[str, str]) -> LogFormat:
        """The format of a file in folders `name=value`: what they name is not in the file."""
        used = [name for name in values if name in self.names]
        if not used:
            return self
        kind_of = dict(zip(self.names, self.kinds, strict=True))
        names = [*(name for name in self.names if name not in used), *used]
        return replace(
            self,
            kinds=tuple(kind_of[name] for name in names),
            names=tuple(names),
            order=self.order or self.names,
            fixed=tuple(values[name] for name in used),
        )

    @property
    def in_file(self) -> LogFormat:
        """The format of what is in the file."""
        num = len(self.names) - len(self.fixed)
        if not self.fixed:
            return self
        return replace(self, kinds=self.kinds[:num], names=self.names[:num], fixed=())

    def check_folders(self, names: Sequence[str]) -> None:
        """Raise `ValueError` where a file has a column that its folder's name holds, too."""
        both = set(names) & set(self.names[len(self.names) - len(self.fixed) :])
        if both:
            raise ValueError(
                f" has a column {min(both)!r}, and so has the name of its folder; expected it in "
                "one of them"
            )

    def with_header(self, line: bytes) -> LogFormat:
        """The format of the lines below a header. `ValueError`: it lacks a column, or has two."""
        text = line.decode("utf-8", "backslashreplace").removesuffix("\n").removesuffix("\r")
        if "\r" in text:
            raise ValueError(", line 1: a carriage return inside the line")
        names = text.split(self.separator)
        if self.quote and '"' in text:
            try:
                (names,) = csv.reader([text], delimiter=self.separator or ",", strict=True)
            except (csv.Error, ValueError) as error:
                raise ValueError(f", line 1: the header's quotes: {error}") from None
        names = [name.strip() for name in names]
        self.check_folders(names)
        fixed = self.names[len(self.names) - len(self.fixed) :]
        names += fixed
        kind_of = dict(zip(self.names, self.kinds, strict=True))
        for name, kind in kind_of.items():
            if kind != "skip" and names.count(name) != 1:
                raise ValueError(
                    f", line 1: the header has {names.count(name) or 'no'} columns {name!r}; "
                    f"expected one. It is {text[:200]!r}"
                )
        kinds = tuple(kind_of.get(name, "skip") for name in names)
        return replace(self, kinds=kinds, names=tuple(names), order=self.order or self.names)


def _criteo(**options: Any) -> LogFormat:
    kinds = ("label", *("count",) * 13, *("hex",) * 26)
    names = ["label", *(f"integer {i + 1}" for i in range(13))]
    return LogFormat(kinds, (*names, *(f"category {i + 1}" for i in range(26))), **options)


def _avazu() -> LogFormat:
    categories = "banner_pos site_id site_domain site_category app_id app_domain app_category"
    categories += " device_id device_ip device_model device_type device_conn_type"
    strings = ["C1", *categories.split(), *(f"C{number}" for number in range(14, 22))]
    names = ("id", "click", "hour", *strings)
    kinds = ("skip", "label", "hour", *("string",) * len(strings))
    return LogFormat(kinds, names, separator=",", header=True)


FORMATS = {
    "kaggle": _criteo(),
    "terabyte": _criteo(day_per_file=True),
    "avazu": _avazu(),
}


def read_column_file(path: str | Path) -> LogFormat:
    """The format that a JSON or YAML column file describes; README.md has an example.

    Raises `ValueError` with what is wrong in it, and `FileNotFoundError`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; --columns takes a JSON or YAML file")
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    try:
        described = _load_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path}: expected an object with keys {CUSTOM_KEYS}")
    try:
        return _format_of(described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("pip install pyyaml, or write the column file as JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _format_of(described: dict[str, Any]) -> LogFormat:
    unknown = set(described) - set(CUSTOM_KEYS.split(", "))
    if unknown:
        raise ValueError(f"unknown key {min(map(str, unknown))!r}; expected {CUSTOM_KEYS}")
    if "day" in described and "order" in described:
        raise ValueError("got both day and order; expected one of them, or none")
    columns = [(described.get("label"), "label")]
    columns += [_name_and_kind(c, ("count", "number")) for c in _list_of(described, "dense")]
    columns += [_name_and_kind(c, ("string", "hex")) for c in _list_of(described, "categorical")]
    columns += [(described[key], key) for key in ("day", "order") if key in described]
    kind_of: dict[str, str] = {}
    for name, kind in columns:
        if not isinstance(name, str) or not name:
            raise ValueError(f"got {name!r} for a column of kind {kind}; expected its name")
        if name in kind_of:
            raise ValueError(f"column {name!r} is named twice, as {kind_of[name]} and as {kind}")
        kind_of[name] = kind
    if not {"hex", "string"} & set(kind_of.values()):
        raise ValueError("categorical is empty; expected at least one column")
    return _with_layout(described, kind_of)


def _with_layout(described: dict[str, Any], kind_of: dict[str, str]) -> LogFormat:
    separator = described.get("separator", ",")
    separator = SEPARATORS.get(str(separator), separator)
    is_byte = isinstance(separator, str) and len(separator) == 1 and separator.isascii()
    if separator != "parquet" and (not is_byte or separator in '"\r\n' or separator.isalnum()):
        raise ValueError(f"separator is {separator!r}; expected one character, or parquet")
    header, quote = described.get("header", True), described.get("quote", separator == ",")
    if not isinstance(header, bool) or not isinstance(quote, bool):
        raise ValueError("header and quote are true or false")
    num_days = described.get("days", KAGGLE_DAYS)
    if not isinstance(num_days, int) or num_days < 2:
        raise ValueError(f"days is {num_days!r}; expected a whole number, at least 2")
    names = list(kind_of)
    if separator != "parquet" and not header:
        names = [str(name) for name in _list_of(described, "columns")]
        missing = [name for name in kind_of if names.count(name) != 1]
        if missing:
            raise ValueError(
                f"columns does not name {missing[0]!r} once; without a header, list all columns in "
                "order"
            )
    return LogFormat(
        tuple(kind_of.get(name, "skip") for name in names),
        tuple(names),
        None if separator == "parquet" else separator,
        header and separator != "parquet",
        quote and separator != "parquet",
        num_days,
        order=tuple(kind_of),
    )


def _list_of(described: dict[str, Any], key: str) -> list[Any]:
    values = described.get(key, [])
    if not isinstance(values, list):
        raise ValueError(f"{key} is {values!r}; expected a list of columns")
    return values


def _name_and_kind(column: Any, kinds: Sequence[str]) -> tuple[Any, str]:
    """A column is its name, or an object with name and type; the first kind is the usual one."""
    if not isinstance(column, dict):
        return column, kinds[0]
    kind = column.get("type", kinds[0])
    if kind not in kinds or set(column) - {"name", "type"}:
        raise ValueError(f"got column {column}; expected name, and type {' or '.join(kinds)}")
    return column.get("name"), kind
