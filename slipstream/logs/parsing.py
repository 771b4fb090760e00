"""Raw log lines to numbers, checked to the last byte.

polars parses a block's columns; numpy and regular expressions check what polars would let pass
(spaces, `+5`, a 17th digit). A block that fails is read again in plain Python, which names its bad
lines, their columns and the reasons.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs.formats import CATEGORY_KINDS, DENSE_KINDS, KEY_KINDS, LogFormat

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
UNIT_SEPARATOR = b"\x1f"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ISO_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
DAY_OR_TIME = (
    rf"-?[0-9]{{1,18}}|{ISO_DATE}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]*)?)?Z?)?"
)
PATTERNS = {
    "label": "[01]",
    "count": "-?[0-9]{1,16}",
    "number": r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?",
    "hex": "[0-9a-fA-F]{1,8}",
    "hour": "[0-9]{8}",
    "day": DAY_OR_TIME,
    "id": "[0-9]{1,9}",
    "behaviour": "pv|buy|cart|fav",
    "time": "-?[0-9]{1,11}",
    "order": DAY_OR_TIME,
}
MEANINGS = {
    "count": "a whole number of 1 to 16 digits",
    "number": "a decimal number",
    "hex": "a hexadecimal value of 1 to 8 digits",
    "id": "a whole number of 1 to 9 digits",
    "behaviour": "pv, buy, cart or fav",
    "time": "a time in seconds since 1970",
    "hour": "a time as YYMMDDHH",
    "day": "a whole number or an ISO date",
    "order": "a whole number or an ISO date and time",
}
REQUIRED_KINDS = ("label", "behaviour", "id", *KEY_KINDS)  # never empty
# A log of these kinds alone holds no other byte than these, and its separator.
PLAIN_KINDS, PLAIN_BYTES = ("label", "count", "hex"), b"0123456789abcdefABCDEF-\n"


class BadBlock(Exception):
    """A block holds a line that is not in the log's format; `find_faults` says which, and why."""


class Rows(NamedTuple):
    """The rows of a parsed block.

    Attributes:
        labels: (rows,) int8, 0 or 1.
        dense: (rows, D) int32 or float32; missing and negative ones are 0.
        codes: (rows, F) uint64, 0 for an empty category. A hash's is its value + 1, at most 2^32; a
            text's its 64-bit BLAKE2b digest (among 10 million texts two are the same with odds of 3
            in a million). With a modulus m: the hash or digest modulo m, + 1.
        keys: (rows,) int64, what orders the rows; None where they stay as they are.
    """

    labels: np.ndarray
    dense: np.ndarray
    codes: np.ndarray
    keys: np.ndarray | None = None

    def where(self, chosen: np.ndarray) -> Rows:
        """The chosen rows (booleans or places)."""
        return Rows(*(None if array is None else array[chosen] for array in self))  # type: ignore


def no_rows(log_format: LogFormat) -> Rows:
    """Arrays of no rows."""
    schema = log_format.schema
    return Rows(
        np.empty(0, np.int8),
        np.empty((0, len(schema.dense_names)), schema.dense_type),
        np.empty((0, len(schema.table_names)), np.uint64),
        np.empty(0, np.int64) if schema.has_keys else None,
    )


def parse_block(block: bytes, log_format: LogFormat, max_ind_range: int = -1) -> Rows:
    """Parse a block of whole lines, none of them blank.

    Raises `BadBlock` for a block with any fault, and `ValueError` where polars is not installed.
    """
    if not block:
        return no_rows(log_format)
    block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
    return rows_of(read_frame(block, log_format), log_format, max_ind_range)


def import_polars() -> Any:
    """The polars module: it is imported here alone, for trainers do without it."""
    try:
        import polars
    except ImportError as error:
        raise ValueError("polars is needed to read raw logs: pip install polars") from error
    return polars


def read_frame(block: bytes, log_format: LogFormat) -> Any:
    """A block as a frame of typed columns `0`, `1`, ...: see `typed`."""
    pl = import_polars()
    separator, kinds = log_format.separator or "", log_format.in_file.kinds
    if b"\r" in block:
        raise BadBlock
    if log_format.quote and (b'"' in block or UNIT_SEPARATOR in block):
        block, separator = _without_quotes(block, log_format), UNIT_SEPARATOR.decode()
    is_plain = not set(log_format.kinds) - {*PLAIN_KINDS} and not log_format.fixed
    num_empty = check_layout(block, separator.encode(), log_format, is_plain)
    numbers = ("label", "count") if is_plain else ()
    types = {
        str(column): pl.Int64 if kind in numbers else pl.String for column, kind in enumerate(kinds)
    }
    used = [column for column, kind in enumerate(kinds) if kind != "skip"]
    if block.startswith(BYTE_ORDER_MARK):
        block = BYTE_ORDER_MARK + block  # polars takes one away, wherever in the log a block starts
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator=separator,
            quote_char=None,
            schema=types,
            columns=used,
        )
    except pl.exceptions.PolarsError as error:
        raise BadBlock(str(error)) from error
    if frame.height != block.count(b"\n") or frame.null_count().row(0) != tuple(num_empty[used]):
        raise BadBlock  # polars read less than all
    return typed(with_fixed(frame, log_format), log_format, is_plain)


def with_fixed(frame: Any, log_format: LogFormat) -> Any:
    """A frame of strings with the columns, too, that are not in the file."""
    pl = import_polars()
    first = len(log_format.kinds) - len(log_format.fixed)
    return frame.with_columns(
        pl.lit(text or None, pl.String).alias(str(column))
        for column, text in enumerate(log_format.fixed, first)
    )


def _without_quotes(block: bytes, log_format: LogFormat) -> bytes:
    """The block with quotes resolved and fields separated by a control character."""
    try:
        lines = [split_line(line, log_format) for line in block.split(b"\n")[:-1]]
    except ValueError as error:
        raise BadBlock from error
    return b"".join(UNIT_SEPARATOR.join(line) + b"\n" for line in lines)


def split_line(line: bytes, log_format: LogFormat) -> list[bytes]:
    """A line's fields; `ValueError` says what is wrong with its quotes."""
    separator = log_format.separator or ""
    if not log_format.quote or (b'"' not in line and UNIT_SEPARATOR not in line):
        return line.split(separator.encode())
    if UNIT_SEPARATOR in line:
        raise ValueError("it holds the control character 0x1f")
    try:
        text = line.decode()
        (fields,) = csv.reader([text], delimiter=separator, strict=True)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{error}; quoted fields may not hold newlines") from error
    return [value.encode() for value in fields]


def check_layout(
    block: bytes, separator: bytes, log_format: LogFormat, is_plain: bool
) -> np.ndarray:
    """Raise `BadBlock` unless a block is lines with all fields, and plain ones of allowed lengths.

    Returns the number of empty fields in each column.
    """
    if is_plain and block.translate(None, PLAIN_BYTES + separator):
        raise BadBlock
    num_fields = len(log_format.in_file.kinds)
    text = np.frombuffer(block, np.uint8)
    if is_plain and separator == b"\t":
        is_end = text <= ord("\n")
    else:
        is_end = (text == separator[0]) | (text == ord("\n"))
    ends = np.flatnonzero(is_end).astype(np.int32)
    num_lines = block.count(b"\n")
    last = ends[num_fields - 1 :: num_fields]
    if len(ends) != num_fields * num_lines or (text[last] != ord("\n")).any():
        raise BadBlock  # else each line has its newline last, and separators before
    lengths = np.empty_like(ends)
    lengths[0] = ends[0]
    np.subtract(ends[1:], ends[:-1] + 1, out=lengths[1:])
    by_line = lengths.reshape(num_lines, num_fields)
    if is_plain:
        _check_lengths(text, ends.reshape(by_line.shape), by_line, log_format)
    return num_lines - np.count_nonzero(by_line, axis=0)


def _check_lengths(
    text: np.ndarray, ends: np.ndarray, lengths: np.ndarray, log_format: LogFormat
) -> None:
    longest, (label,) = lengths.max(axis=0), log_format.columns("label")
    if (lengths[:, label] != 1).any() or (longest[log_format.columns("hex")] > 8).any():
        raise BadBlock
    for column in log_format.columns("count"):
        if longest[column] > 16:
            starts = ends[:, column] - lengths[:, column]
            if (lengths[:, column] - (text[starts] == ord("-")) > 16).any():
                raise BadBlock


def typed(frame: Any, log_format: LogFormat, is_plain: bool = False) -> Any:
    """A frame of strings, empty ones null, as one of typed columns; `BadBlock` for any fault.

    Labels, counts and keys become Int64, numbers Float64, hashes UInt32. In a plain frame, whose
    bytes are checked, labels and counts are Int64 already.
    """
    pl = import_polars()
    columns: list[Any] = []
    for column, kind in enumerate(log_format.kinds):
        if kind == "skip":
            continue
        values = pl.col(str(column))
        if kind in PATTERNS and not is_plain:
            matches = frame.select(values.str.contains(f"^(?:{PATTERNS[kind]})$").all()).item()
            if not matches:
                raise BadBlock
        if kind in ("day", "order"):
            dates = frame.select(values.filter(values.str.contains("^....-")).str.slice(0, 10))
            if not all(map(is_date, dates.to_series().unique())):
                raise BadBlock
        columns.append(_as_type(values, kind, is_plain))
    converted = frame.select(columns)
    if converted.null_count().row(0) != frame.null_count().row(0):
        raise BadBlock
    required = [str(c) for c in log_format.columns(*REQUIRED_KINDS)]
    is_whole = not any(converted.select(required).null_count().row(0))
    counts, numbers = ([str(c) for c in log_format.columns(kind)] for kind in ("count", "number"))
    largest = converted.select(pl.max_horizontal(pl.col(counts).max())).item() if counts else 0
    finite = converted.select(pl.col(numbers).abs().max()).row(0) if numbers else ()
    if not is_whole or (largest or 0) > MAX_INT32 or any(abs(v or 0) > MAX_FLOAT32 for v in finite):
        raise BadBlock
    if is_plain and not _labels(converted, log_format).is_between(0, 1).all():
        raise BadBlock
    return converted


def _as_type(values: Any, kind: str, is_plain: bool) -> Any:
    pl = import_polars()
    if kind == "hex":
        return values.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    if kind == "string" or is_plain:
        return values
    if kind == "behaviour":
        return (values == "pv").cast(pl.Int64)
    if kind == "number":
        return values.cast(pl.Float64, strict=False)
    if kind in ("day", "order"):
        length = 10 if kind == "day" else 24
        digits = values.str.slice(0, length).str.replace_all("[^0-9]", "")
        digits = digits if kind == "day" else digits.str.pad_end(18, "0")
        values = pl.when(values.str.contains(f"^{ISO_DATE}")).then(digits).otherwise(values)
    return values.cast(pl.Int64, strict=False)


def rows_of(frame: Any, log_format: LogFormat, max_ind_range: int) -> Rows:
    """The arrays of a typed frame; `BadBlock` for an hour that no calendar has."""
    pl = import_polars()
    if not frame.height:
        return no_rows(log_format)
    codes = []
    for column in log_format.columns(*CATEGORY_KINDS):
        kind = log_format.kinds[column]
        if kind == "string":
            frame = frame.with_columns(digests(frame[str(column)]))
        code = pl.col(str(column)).cast(pl.UInt64)
        if max_ind_range > 0:  # an empty one counts as hash 0
            codes.append(code.fill_null(0) % max_ind_range + 1)
        else:
            codes.append((code + (kind == "hex")).fill_null(0))
    number = pl.Float32 if "number" in log_format.kinds else pl.Int32
    numbers = np.empty((frame.height, 0))
    if dense := [str(column) for column in log_format.columns(*DENSE_KINDS)]:
        typed = frame.select(pl.col(dense).fill_null(0).clip(0).cast(number))
        numbers = typed.to_numpy(order="c")
    coded = frame.select(codes).to_numpy() if codes else np.empty((frame.height, 0), np.uint64)
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
    labels = _labels(frame, log_format).cast(pl.Int8).to_numpy()
    return Rows(labels, np.ascontiguousarray(numbers, log_format.schema.dense_type), coded, keys)


def _labels(frame: Any, log_format: LogFormat) -> Any:
    return frame[str(log_format.columns("label", "behaviour")[0])]


def digests(values: Any) -> Any:
    """A series of texts as their digests: one is computed per distinct text."""
    pl = import_polars()
    texts = values.drop_nulls().unique()
    found = pl.Series([digest(text.encode()) for text in texts], dtype=pl.UInt64)
    return values.replace_strict(texts, found, return_dtype=pl.UInt64).alias(values.name)


def digest(text: bytes) -> int:
    """64 bits of a text's BLAKE2b digest; never 0, which stands for an empty one."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def is_date(text: str) -> bool:
    """Whether a calendar has an ISO date."""
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


def is_in_calendar(kind: str, value: bytes) -> bool:
    """Whether a field that matches its pattern names no date, or one that there is."""
    if kind in ("day", "order") and value[4:5] == b"-":
        return is_date(value[:10].decode())
    if kind == "hour":
        try:
            calendar(np.array([int(value)]))
        except BadBlock:
            return False
    return True


def calendar(times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hour of day, weekday (Monday is 0) and YYMMDD of times as YYMMDDHH; `BadBlock` for others."""
    hours, dates = times % 100, times // 100
    months = ((dates // 10000 + 30) * 12 + dates // 100 % 100 - 1).astype("M8[M]")
    days = months.astype("M8[D]") + (dates % 100 - 1)
    is_month = (dates // 100 % 100 >= 1) & (dates // 100 % 100 <= 12)
    if (hours > 23).any() or not is_month.all() or (days.astype("M8[M]") != months).any():
        raise BadBlock
    return hours, (days.astype(np.int64) + 3) % 7, dates


def find_faults(lines: Iterable[Any], log_format: LogFormat) -> Iterator[tuple[int, str]]:
    """Find bad lines (bytes, or lists of fields) in plain Python: their indices, what is wrong."""
    for index, line in enumerate(lines):
        if line in (b"", b"\r"):
            continue
        reason = fault_of_line(line, log_format)
        if reason:
            yield index, reason


def fault_of_line(line: Any, log_format: LogFormat) -> str | None:
    """Say what is wrong with a line, or None."""
    fields = line
    if isinstance(line, bytes):
        line = line.removesuffix(b"\r")
        if b"\r" in line:
            return ": a carriage return inside the line"
        try:
            fields = split_line(line, log_format)
        except ValueError as error:
            return f": {error}"
        expected = len(log_format.kinds) - len(log_format.fixed)
        if len(fields) != expected:
            return f": {len(fields)} columns; expected {expected}"
        fields += [text.encode() for text in log_format.fixed]
    for column, (kind, value) in enumerate(zip(log_format.kinds, fields, strict=True)):
        reason = fault_of_field(kind, value)
        if reason and kind == "label":
            return f": label {reason}"
        if reason:
            return f", column {column + 1} ({log_format.names[column]}): {reason}"
    return None


def fault_of_field(kind: str, value: bytes) -> str | None:
    """Say what is wrong with one field, or None."""
    shown = "'" + value[:40].decode("ascii", "backslashreplace") + "'"
    if kind in ("skip", "string"):
        try:
            value.decode()
        except UnicodeDecodeError:
            return f"{shown} is not UTF-8"
        return None
    if kind == "label":
        return None if value in (b"0", b"1") else f"{shown}; expected 0 or 1"
    if not value and kind not in REQUIRED_KINDS:
        return None
    if not re.fullmatch(PATTERNS[kind].encode(), value):
        return f"{shown} is not {MEANINGS[kind]}"
    if not is_in_calendar(kind, value):
        return f"{shown} is not {MEANINGS[kind]}"
    largest = {"count": MAX_INT32, "number": MAX_FLOAT32}.get(kind)
    if largest is not None and abs(float(value)) > largest and (kind != "count" or int(value) > 0):
        return (
            f"{shown} is more than {largest:g}"
            if kind == "number"
            else (f"{shown} is more than {largest}")
        )
    return None
