"""A block's typed columns as the arrays of its rows: labels, dense values, codes of categories."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs.formats import CATEGORY_KINDS, DENSE_KINDS, LogFormat

# Codes that no value has.
ABSENT = np.uint64(2**64 - 1)  # no element of a list
RARE = np.uint64(2**64 - 2)  # the row that a table's rare values share
MAX_CODE = 2**64 - 3
# Several values in a cell, as Hive, pandas and others write them.
SEVERAL_VALUES = r".\|.|^\[.*,.*\]$|[\x01\x02]"
NUMBER_TEXT = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
WHOLE_FLOAT_PARTS = r"^(-?[0-9]+)\.0+$"
WHOLE_FLOAT_TEXT = r"^-?[0-9]+\.0+$"


def import_polars() -> Any:
    """The polars module: it is imported here alone, for trainers do without it."""
    try:
        import polars
    except ImportError as error:
        raise ValueError("polars is needed to read raw logs: pip install polars") from error
    return polars


class BadBlock(Exception):
    """A block holds a line that is not in the log's format; `find_faults` says which, and why."""


class Texts(NamedTuple):
    """What the texts of a column are, as far as their codes do not tell.

    Attributes:
        are_numbers: all that are not empty.
        whole_floats: (n, 2) uint64, codes of `17.0` and of `17`, of each such text.
    """

    are_numbers: bool
    whole_floats: np.ndarray


class Rows(NamedTuple):
    """The rows of a parsed block.

    Attributes:
        labels: (rows,) int8, 0 or 1.
        dense: (rows, D) int32 or float32; missing ones are 0, or NaN where they are standardized.
        codes: (rows, C) uint64, 0 for an empty category, `ABSENT` for no element of a list. A
            hash's is its value + 1, at most 2^32; a text's its 64-bit BLAKE2b digest (among 10
            million texts two are the same with odds of 3 in a million). With a modulus m: the hash
            or digest modulo m, + 1.
        keys: (rows,) int64, what orders the rows; None where they stay as they are.
        weights: (rows,) float32; None: all 1.
        texts: of categorical columns, by number, whose whole floats may be integers.
        seen: what else there was to count, by what it was.
        groups: of the column that the format names so, a polars series of texts, empty ones null.
    """

    labels: np.ndarray
    dense: np.ndarray
    codes: np.ndarray
    keys: np.ndarray | None = None
    weights: np.ndarray | None = None
    texts: dict[int, Texts] = {}  # noqa: RUF012
    seen: dict[str, int] = {}  # noqa: RUF012
    groups: Any = None

    def where(self, chosen: np.ndarray) -> Rows:
        """The chosen rows (booleans or places)."""
        arrays = (None if array is None else array[chosen] for array in self[:5])
        return Rows(*arrays, texts=self.texts, seen=self.seen)  # type: ignore


def no_rows(log_format: LogFormat) -> Rows:
    """Arrays of no rows."""
    schema = log_format.schema
    return Rows(
        np.empty(0, np.int8),
        np.empty((0, len(schema.dense_names)), schema.dense_type),
        np.empty((0, schema.num_columns), np.uint64),
        np.empty(0, np.int64) if schema.has_keys else None,
        np.empty(0, np.float32) if schema.has_weights else None,
    )


def rows_of(frame: Any, log_format: LogFormat, max_ind_range: int) -> Rows:
    """The arrays of a typed frame; `BadBlock` for what its types do not tell."""
    pl = import_polars()
    if not frame.height:
        return no_rows(log_format)
    schema = log_format.schema
    numbers, seen = _dense_of(frame, log_format)
    coded, texts, cut = _codes_of(frame, log_format, max_ind_range)
    keys = None
    if log_format.key_kind is not None:
        keys = frame[str(log_format.columns(log_format.key_kind)[0])].to_numpy()
    if log_format.key_kind == "hour" and keys is not None:
        hours, weekdays, keys = calendar(keys)
        numbers = np.column_stack([numbers, hours])
        derived = np.column_stack([hours, weekdays]).astype(np.uint64)
        derived = derived % np.uint64(max_ind_range) if max_ind_range > 0 else derived
        coded = np.column_stack([coded, derived + np.uint64(1)])
    if not numbers.size:
        numbers = np.zeros((frame.height, 1))
    weights = None
    if schema.has_weights:
        (column,) = log_format.columns("weight")
        weights = frame[str(column)].cast(pl.Float32).to_numpy()
    labels = label_column(frame, log_format).cast(pl.Int8).to_numpy()
    dense = np.ascontiguousarray(numbers, schema.dense_type)
    groups = _groups_of(frame, log_format) if log_format.group else None
    return Rows(labels, dense, coded, keys, weights, texts, {**seen, **cut}, groups)


def _groups_of(frame: Any, log_format: LogFormat) -> Any:
    """The values of the column `group`, as texts."""
    column = log_format.names.index(log_format.group)
    values = frame[str(column)]
    if log_format.kinds[column] == "hex":
        return values.map_elements(lambda code: f"{code:08x}", return_dtype=import_polars().String)
    return values.cast(import_polars().String)


def label_column(frame: Any, log_format: LogFormat) -> Any:
    """The labels of a typed frame."""
    return frame[str(log_format.columns("label", "behaviour")[0])]


def _dense_of(frame: Any, log_format: LogFormat) -> tuple[np.ndarray, dict[str, int]]:
    """Dense values (rows, D); how many of each column were negative where they become 0.

    (Not of Criteo's, which is known for them.)
    """
    pl = import_polars()
    columns = log_format.columns(*DENSE_KINDS)
    if not columns:
        return np.empty((frame.height, 0)), {}
    number = pl.Int32 if log_format.schema.dense_type == np.int32 else pl.Float32
    if not log_format.lax:
        dense = pl.col([str(column) for column in columns])
        return frame.select(dense.fill_null(0).clip(0).cast(number)).to_numpy(order="c"), {}
    values, negative = [], {}
    for column in columns:
        value, transform = pl.col(str(column)), log_format.detail(column).transform
        if transform == "log":
            negative[negative_of(log_format.names[column])] = (value < 0).sum()
            value = value.clip(0)
        empty = float("nan") if transform == "standardize" else 0
        values.append(value.cast(number).fill_null(empty))
    counts = frame.select(**negative).row(0, named=True) if negative else {}
    seen = {what: number for what, number in counts.items() if number}
    return frame.select(values).to_numpy(order="c"), seen


def negative_of(name: str) -> str:
    """What a dense column's negative values are counted by."""
    return f"negative values of {name}, taken as 0"


def _codes_of(
    frame: Any, log_format: LogFormat, max_ind_range: int
) -> tuple[np.ndarray, dict[int, Texts], dict[str, int]]:
    """Codes (rows, C) uint64, what texts there are of which column, and lists that were cut."""
    pl = import_polars()
    single: list[Any] = []
    places: list[int] = []
    lists: list[tuple[int, np.ndarray]] = []
    texts: dict[int, Texts] = {}
    cut: dict[str, int] = {}
    place = 0
    for column in log_format.columns(*CATEGORY_KINDS):
        kind, detail = log_format.kinds[column], log_format.detail(column)
        is_text = detail.kind_of_values(kind) == "string"
        modulus = 0 if is_text and log_format.lax else max(max_ind_range, 0)
        if kind == "list":
            elements, lengths, num_cut = _kept_elements(frame[str(column)], detail.values)
            name = log_format.names[column]
            cut[f"lists of {name} of over {detail.values} values, cut"] = num_cut
            cut[f"empty lists of {name}"] = int((lengths == 0).sum())
            if is_text:
                elements = _as_integers(elements, column, log_format)
                elements, found = digests(elements, log_format.lax, False)
            else:
                elements = elements.str.to_integer(base=16, dtype=pl.UInt32).cast(pl.UInt64)
            array = _as_codes(elements, 0 if is_text else 1, modulus)
            lists.append((place, _padded(array, lengths, detail.values)))
        else:
            if is_text:
                several = log_format.lax and not detail.values
                values = _as_integers(frame[str(column)], column, log_format)
                digested, found = digests(values, log_format.lax, several)
                frame = frame.with_columns(digested)
            code = pl.col(str(column)).cast(pl.UInt64)
            coded = code % modulus + 1 if modulus else code + (kind == "hex")
            single.append(coded.fill_null(0))  # an empty one is no hash
            places.append(place)
        if is_text and log_format.lax:
            texts[place] = found
        place += detail.values if kind == "list" else 1
    codes = np.empty((frame.height, 0), np.uint64)
    if single:
        codes = frame.select(single).to_numpy()
    if lists:
        plain, codes = codes, np.empty((frame.height, place), np.uint64)
        codes[:, places] = plain
        for first, array in lists:
            codes[:, first : first + array.shape[1]] = array
    return codes, texts, cut


def _as_integers(texts: Any, column: int, log_format: LogFormat) -> Any:
    """Texts with 17 for 17.0, where the log of a model took them for the same."""
    if log_format.names[column] not in log_format.integers:
        return texts
    return texts.str.replace(WHOLE_FLOAT_PARTS, "${1}")


def _kept_elements(lists: Any, most: int) -> tuple[Any, np.ndarray, int]:
    """The lists' last `most` elements in one series, how many each has, how many lists were cut.

    Empty elements are left out.
    """
    pl = import_polars()
    lists = lists.list.eval(pl.element().filter(pl.element() != ""))
    num_cut = int((lists.list.len() > most).sum())
    lists = lists.list.tail(most)
    lengths = lists.list.len().fill_null(0)
    return lists.filter(lengths > 0).explode(), lengths.to_numpy(), num_cut


def _as_codes(elements: Any, offset: int, modulus: int) -> np.ndarray:
    codes = elements.to_numpy().astype(np.uint64)
    return codes % np.uint64(modulus) + np.uint64(1) if modulus else codes + np.uint64(offset)


def folded(codes: np.ndarray, modulus: int) -> np.ndarray:
    """Codes of texts taken modulo `modulus`; an empty one is no hash, and stays 0."""
    return np.where(codes == 0, codes, codes % np.uint64(modulus) + np.uint64(1))


def _padded(codes: np.ndarray, lengths: np.ndarray, most: int) -> np.ndarray:
    """Lists one after another as (rows, most), `ABSENT` after each one's end."""
    padded = np.full((len(lengths), most), ABSENT)
    padded[np.arange(most) < lengths[:, None]] = codes
    return padded


def digests(values: Any, lax: bool, refuses_several: bool) -> tuple[Any, Texts]:
    """A series of texts as their digests, computed once a distinct text; what the texts are.

    `BadBlock` for a text that looks like several values, where it is not said that it is one.
    """
    pl = import_polars()
    distinct = values.drop_nulls().unique()
    if refuses_several and distinct.str.contains(SEVERAL_VALUES).any():
        raise BadBlock
    found = pl.Series([digest(text.encode()) for text in distinct], dtype=pl.UInt64)
    coded = values.replace_strict(distinct, found, return_dtype=pl.UInt64).alias(values.name)
    none = np.empty((0, 2), np.uint64)
    if not lax or not distinct.str.contains(NUMBER_TEXT).all():
        return coded, Texts(False, none)
    is_whole = distinct.str.contains(WHOLE_FLOAT_TEXT)
    whole = distinct.filter(is_whole)
    if not len(whole):
        return coded, Texts(True, none)
    integers = whole.str.replace(r"\.0+$", "")
    codes = [digest(text.encode()) for text in integers]
    pairs = np.column_stack([found.filter(is_whole).to_numpy(), np.array(codes, np.uint64)])
    return coded, Texts(True, pairs)


def digest(text: bytes) -> int:
    """64 bits of a text's BLAKE2b digest; never 0, which stands for an empty one."""
    code = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return min(code, MAX_CODE) or 1


def calendar(times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hour of day, weekday (Monday is 0) and YYMMDD of times as YYMMDDHH; `BadBlock` for others."""
    hours, dates = times % 100, times // 100
    months = ((dates // 10000 + 30) * 12 + dates // 100 % 100 - 1).astype("M8[M]")
    days = months.astype("M8[D]") + (dates % 100 - 1)
    is_month = (dates // 100 % 100 >= 1) & (dates // 100 % 100 <= 12)
    if (hours > 23).any() or not is_month.all() or (days.astype("M8[M]") != months).any():
        raise BadBlock
    return hours, (days.astype(np.int64) + 3) % 7, dates
