"""What the columns of a raw log are: Criteo's, Avazu's, or those of a user's column file.

A column is of one *kind*. What a field may hold, and whether it may be empty:

    label    0 or 1
    weight   a decimal number, not negative: of the row in loss and metrics
    count    a whole number of 1 to 16 digits, at most 2^31 - 1; dense; empty is 0
    number   a decimal number; dense, float32; empty is 0 (standardized: the mean)
    hex      1 to 8 hexadecimal digits, case and leading zeros aside; categorical; may be empty
    string   UTF-8 text, taken byte by byte; categorical; may be empty
    list     several strings or hashes in one cell, parted by a character; may be empty
    hour     Avazu's YYMMDDHH: hour of day and weekday (categorical), hour of day (dense), its date
    day      a whole number or an ISO date: rows of one value are a day, days go in its order
    order    a number or an ISO date and time (to 1 us, with or without an offset): rows are sorted
             by it
    skip     any UTF-8 text; group: likewise, and rows keep it

A negative count or number is 0 where its transform is the logarithm, the usual one. In logs of a
column file (*lax* ones) numbers may be spelled in more ways: labels 1.0 or true, +3, .5, 3.0; or
as the column file says (`spelling`).

Taobao's log has kinds of its own: id (a whole number of 1 to 9 digits), behaviour (pv, a click, or
buy, cart, fav) and time (seconds since 1970).
"""

from __future__ import annotations

import csv
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from slipstream.logs.features import Feature, FeatureLayout
from slipstream.logs.spelling import USUAL, Spelling

KAGGLE_DAYS = 7
CATEGORY_KINDS, DENSE_KINDS = ("hex", "string", "list"), ("count", "number", "id")
KEY_KINDS = ("hour", "day", "order", "time")
ALL_KINDS = {*CATEGORY_KINDS, *DENSE_KINDS, *KEY_KINDS, "label", "weight", "skip", "behaviour"}
OF_A_FILE = ("fixed", "integers", "group")  # not of a log's format
HOUR_CATEGORIES = ("hour of day", "weekday")
# Sets of rows that are told apart by their keys: class c's are moved by (c - 1) * CLASS_SPAN.
TRAINING, TEST, VALIDATION = 0, 1, 2
CLASS_SPAN = 6_140_000_000_000_000_000


@dataclass(frozen=True)
class Split:
    """Which rows are held out for test and validation.

    Attributes:
        rule: `last day`; `random`: each row with odds of `RANDOM_SHARE`, half of them for the
            test; `file`: those of the test file; `none`.
        seed: of `random`.
    """

    rule: str = "last day"
    seed: int = 0

    @property
    def is_drawn(self) -> bool:
        """Whether each row's key says which set it is of."""
        return self.rule in ("random", "file")


RANDOM_SHARE = 0.2  # Avazu's usual split: 8, 1 and 1 parts


def split_of(text: str) -> Split:
    """Parse `last-day`, `random:SEED` or `none`; `ValueError` for anything else."""
    word, _, seed = text.partition(":")
    if text in ("last-day", "none"):
        return Split(text.replace("-", " "))
    if word == "random" and seed.isdecimal() and len(seed) < 10:
        return Split(word, int(seed))
    raise ValueError(f"got {text!r}; expected last-day, random:SEED (as random:1), or none")


@dataclass(frozen=True)
class Schema:
    """What a log's rows are once they are parsed.

    Attributes:
        dense_names: of the dense features; a log without any has one that is always 0.
        table_names: of the T tables.
        dense_type: int32, or float32 where a column holds decimal numbers.
        has_keys: rows have keys, and are sorted by them.
        day_rule: `equal`: `num_days` equal contiguous days; `files`: each file is a day; `keys`:
            rows of one `day_of` their key are a day.
        num_days: see `day_rule`.
        day_length, day_start: a day is `(key - day_start) // day_length`.
        features: which id columns form which feature; empty: one column a table.
        transforms: of each dense feature; empty: the logarithm.
        has_weights: rows have weights.
        moduli: of each table, what its codes are taken modulo when tables are merged; 0: nothing.
        split: which rows are held out.
    """

    dense_names: tuple[str, ...]
    table_names: tuple[str, ...]
    dense_type: np.dtype
    has_keys: bool
    day_rule: str
    num_days: int = KAGGLE_DAYS
    day_length: int = 1
    day_start: int = 0
    features: tuple[Feature, ...] = ()
    transforms: tuple[str, ...] = ()
    has_weights: bool = False
    moduli: tuple[int, ...] = ()
    split: Split = Split()

    @cached_property
    def layout(self) -> FeatureLayout:
        """The id columns."""
        plain = (Feature(name, (at,), at) for at, name in enumerate(self.table_names))
        return FeatureLayout(self.features or tuple(plain))

    @property
    def num_columns(self) -> int:
        """C, the id columns of a row."""
        return self.layout.num_columns

    @property
    def is_standardized(self) -> np.ndarray:
        """(D,) bool: dense features that are standardized; an empty one is NaN in a part."""
        kinds = self.transforms or ("log",) * len(self.dense_names)
        return np.array(kinds) == "standardize"

    def day_of(self, keys: np.ndarray) -> np.ndarray:
        """The day of each key, of training rows where rows are drawn."""
        if self.split.is_drawn:
            keys = keys + CLASS_SPAN
        return (keys - self.day_start) // self.day_length

    @property
    def row_bytes(self) -> int:
        """Of the processed file, and of a part."""
        return 1 + 4 * (len(self.dense_names) + self.num_columns + self.has_weights)


def class_of(keys: np.ndarray) -> np.ndarray:
    """The set of rows, `TRAINING`, `TEST` or `VALIDATION`, that keys were given by `keys_in`."""
    half = CLASS_SPAN // 2
    return (keys >= -half).astype(np.int8) + (keys >= half)


def keys_in(classes: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
    """Keys that sort rows by their set, then as `keys`; `ValueError` for keys too large."""
    moved = (classes.astype(np.int64) - 1) * CLASS_SPAN
    if keys is None:
        return moved
    if len(keys) and np.abs(keys).max() >= CLASS_SPAN // 2:
        raise ValueError("the column of order or day holds numbers of over 3.07e18; expected less")
    return moved + keys


def equal_days(num_rows: int, num_days: int = KAGGLE_DAYS) -> np.ndarray:
    """Row offsets (num_days + 1,) int64 of equal contiguous days, the first ones a row longer."""
    lengths = np.full(num_days, num_rows // num_days, np.int64)
    lengths[: num_rows % num_days] += 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


@dataclass(frozen=True)
class Details:
    """What a column file says of a column besides its kind.

    Attributes:
        transform: of a dense one; one of `transforms.KINDS`.
        values: of a list, at most so many are kept, the last ones; 1: the field is one value,
            whatever is in it; 0: nothing is said.
        separator: between a list's values in a text; a Parquet list needs none.
        pool: `sum`, `mean` or `sequence`, of a list.
        table: the categorical column whose table it shares; None: it has its own.
        element: kind of a list's values, `string` or `hex`.
        spelling: of dates, numbers and labels.
    """

    transform: str = "log"
    values: int = 0
    separator: str = "|"
    pool: str = "none"
    table: str | None = None
    element: str = "string"
    spelling: Spelling = USUAL

    def kind_of_values(self, kind: str) -> str:
        """The kind of the values that a column of a kind holds: of a list, its elements'."""
        return self.element if kind == "list" else kind


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
        lax: see the module's text.
        nulls: what stands for an empty dense field.
        details: of the columns of a column file that have some, by name.
        split: which rows are held out.
        order: the names in the order of the features, whatever a file's order is; empty: `names`.
        fixed: texts that all rows of a file have in the last columns, which are not in the file.
        integers: columns in which 17.0 is 17, as it was in the log of a model.
        group: the column whose values rows keep as texts; empty: none.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    separator: str | None = "\t"
    header: bool = False
    quote: bool = False
    num_days: int = KAGGLE_DAYS
    day_per_file: bool = False
    order: tuple[str, ...] = ()
    lax: bool = False
    nulls: tuple[str, ...] = ()
    details: tuple[tuple[str, Details], ...] = ()
    split: Split = Split()
    fixed: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    group: str = ""

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

    def detail(self, column: int) -> Details:
        """What is said of a column."""
        return self._details.get(self.names[column], Details())

    def unspelled(self, names: Container[str]) -> LogFormat:
        """The format in which these columns have the usual spelling."""
        details = (
            (name, replace(one, spelling=USUAL) if name in names else one)
            for name, one in self.details
        )
        return replace(self, details=tuple(pair for pair in details if pair[1] != Details()))

    @cached_property
    def _details(self) -> dict[str, Details]:
        return dict(self.details)

    @cached_property
    def schema(self) -> Schema:
        """What the rows become."""
        dense, categories = self.columns(*DENSE_KINDS), self.columns(*CATEGORY_KINDS)
        names = [self.names[column] for column in dense]
        transforms = tuple(self.detail(column).transform for column in dense)
        tables = [self.names[c] for c in categories if self.detail(c).table is None]
        features = self._features(categories, tables)
        if self.key_kind == "hour":
            names, tables = [*names, "hour"], [*tables, *HOUR_CATEGORIES]
        rule = "files" if self.day_per_file else "keys"
        is_float = "number" in self.kinds or "standardize" in transforms
        return Schema(
            tuple(names or ["none"]),
            tuple(tables),
            np.dtype(np.float32 if is_float else np.int32),
            self.key_kind is not None,
            rule if self.day_per_file or self.key_kind in ("hour", "day") else "equal",
            self.num_days,
            features=features,
            transforms=() if set(transforms) <= {"log"} else transforms,
            has_weights="weight" in self.kinds,
            split=self.split,
        )

    def _features(self, categories: Sequence[int], tables: list[str]) -> tuple[Feature, ...]:
        """The features of the categorical columns; empty where each is a column with a table."""
        features: list[Feature] = []
        end = 0
        for column in categories:
            name, detail = self.names[column], self.detail(column)
            start, end = end, end + (detail.values if self.kinds[column] == "list" else 1)
            table = tables.index(detail.table or name)
            features.append(Feature(name, tuple(range(start, end)), table, detail.pool))
        is_plain = all(detail.pool == "none" and not detail.table for _, detail in self.details)
        return () if is_plain else tuple(features)

    def text_moduli(self, modulus: int) -> tuple[int, ...]:
        """The modulus for tables of texts, 0 for those of hashes, which are taken when parsed.

        Of texts a whole log must first tell whether 17.0 is 17.
        """
        is_text = {
            self.detail(column).table or self.names[column]
            for column in self.columns(*CATEGORY_KINDS)
            if self.detail(column).kind_of_values(self.kinds[column]) == "string"
        }
        return tuple(modulus if name in is_text else 0 for name in self.schema.table_names)

    def of_tables(self, tables: Container[str]) -> tuple[str, ...]:
        """The columns whose values are in one of these tables."""
        categories = self.columns(*CATEGORY_KINDS)
        names = [(self.names[c], self.detail(c).table or self.names[c]) for c in categories]
        return tuple(name for name, table in names if table in tables)

    def with_folders(self, values: Mapping[str, str]) -> LogFormat:
        """The format of a file in folders `name=value`: what they name is not in the file."""
        kind_of = dict(zip(self.names, self.kinds, strict=True))
        in_file, fixed = self.names[: self.num_in_file], self.names[self.num_in_file :]
        used = [name for name in values if name in in_file and kind_of[name] != "skip"]
        if not set(values) & set(in_file):
            return self
        names = [*(name for name in in_file if name not in values), *fixed, *used]
        return replace(
            self,
            kinds=tuple(kind_of[name] for name in names),
            names=tuple(names),
            order=self.order or self.names,
            fixed=(*self.fixed, *(values[name] for name in used)),
        )

    @property
    def num_in_file(self) -> int:
        """Columns of a line of the file; the others are fixed."""
        return len(self.names) - len(self.fixed)

    @property
    def in_file(self) -> LogFormat:
        """The format of what is in the file."""
        num = self.num_in_file
        if not self.fixed:
            return self
        return replace(self, kinds=self.kinds[:num], names=self.names[:num], fixed=())

    def check_folders(self, names: Sequence[str]) -> None:
        """Raise `ValueError` where a file has a column that its folder's name holds, too."""
        both = set(names) & set(self.names[self.num_in_file :])
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
        hint = separator_hint(text) if len(names) == 1 else ""
        self.check_folders(names)
        names += self.names[self.num_in_file :]
        kind_of = dict(zip(self.names, self.kinds, strict=True))
        for name, kind in kind_of.items():
            if kind != "skip" and names.count(name) != 1:
                raise ValueError(
                    f", line 1: the header has {names.count(name) or 'no'} columns {name!r}; "
                    f"expected one. It is {text[:200]!r}{hint}"
                )
        kinds = tuple(kind_of.get(name, "skip") for name in names)
        return replace(self, kinds=kinds, names=tuple(names), order=self.order or self.names)


def separator_hint(text: str) -> str:
    """What to add to an error where a line has one field: another separator that it may have."""
    found = next((other for other in ";\t,|" if other in text), "")
    say = '"separator" in the column file, or --separator of predict.py'
    return f"; is its separator {found!r}? Say so: {say}" if found else ""


def describe_format(log_format: LogFormat) -> dict[str, Any]:
    """What a manifest says of a column file's log; of spellings, which older ones have no word of,
    those that are not usual.
    """
    described = asdict(log_format)
    for _, detail in described["details"]:
        if detail["spelling"] == asdict(USUAL):
            del detail["spelling"]
    return {key: value for key, value in described.items() if key not in OF_A_FILE}


def format_of(described: Mapping[str, Any]) -> LogFormat:
    """The format that `describe_format` described; `ValueError` where it is not whole."""
    wanted = {field.name for field in fields(LogFormat)} - set(OF_A_FILE)
    if set(described) != wanted:
        raise ValueError(f"its columns have keys {sorted(described)}; expected {sorted(wanted)}")
    try:
        values = {name: _as_tuple(value) for name, value in described.items()}
        values["split"] = Split(**described["split"])
        values["details"] = tuple((name, _detail_of(one)) for name, one in described["details"])
        found = LogFormat(**values)
        is_whole = len(found.kinds) == len(found.names) and set(found.kinds) <= ALL_KINDS
        found.schema  # noqa: B018 - what does not fit shows
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"its columns are not whole: {error!r}") from error
    if not is_whole:
        raise ValueError("its columns are not whole: kinds and names do not fit")
    return found


def _detail_of(described: Mapping[str, Any]) -> Details:
    spelling = {key: _as_tuple(value) for key, value in described.get("spelling", {}).items()}
    return Details(**{**described, "spelling": Spelling(**spelling)})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


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
