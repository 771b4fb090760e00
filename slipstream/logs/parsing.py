"""Raw log lines to numbers, checked to the last byte.

polars parses a block's columns; numpy and regular expressions check what polars would let pass
(spaces, `+5`, a 17th digit). A block that fails is read again in plain Python, which names its bad
lines, their columns and the reasons.
"""

from __future__ import annotations

import csv
from datetime import date
from typing import Any

import numpy as np

from slipstream.logs.formats import KEY_KINDS, Details, LogFormat
from slipstream.logs.rows import BadBlock, Rows, import_polars, label_column, no_rows, rows_of
from slipstream.logs.spelling import (
    FIRST_OF_1900,
    MONTHS,
    SPELLED_KINDS,
    USUAL,
    Spelling,
    pattern_of,
)

MAX_INT32 = 2**31 - 1
BRACKETED = r"(?s)^[ \t]*\[.*\][ \t]*$"  # a list as Python and JSON write it
MAX_FLOAT32 = float(np.finfo(np.float32).max)
# A number to order by has its microseconds kept below FINE_ORDER (seconds, that is), none above.
FINE_ORDER, MAX_ORDER = 4_000_000_000, 9_000_000_000_000_000_000
UNIT_SEPARATOR = b"\x1f"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ISO_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
ISO_TIME = (
    rf"{ISO_DATE}([T ]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.,][0-9]*)?)?"
    r" ?(Z|UTC|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?)?"
)
PATTERNS = {
    "label": "[01]",
    "weight": r"\+?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?",
    "count": "-?[0-9]{1,16}",
    "number": r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?",
    "hex": "[0-9a-fA-F]{1,8}",
    "hour": "[0-9]{8}",
    "day": rf"-?[0-9]{{1,18}}(\.0*)?|{ISO_TIME}",
    "id": "[0-9]{1,9}",
    "behaviour": "pv|buy|cart|fav",
    "time": "-?[0-9]{1,11}",
    "order": rf"[+-]?[0-9]{{1,19}}(\.[0-9]*)?|{ISO_TIME}",
}
LAX_PATTERNS = {
    **PATTERNS,
    "label": r"\+?[01](\.0*)?|true|True|TRUE|false|False|FALSE",
    "count": r"[+-]?[0-9]{1,16}(\.0{0,40})?",
    "number": "[+-]?" + PATTERNS["weight"].removeprefix(r"\+?"),
}
MEANINGS = {
    "weight": "a decimal number that is not negative",
    "count": "a whole number of 1 to 16 digits",
    "number": "a decimal number",
    "hex": "a hexadecimal value of 1 to 8 digits",
    "id": "a whole number of 1 to 9 digits",
    "behaviour": "pv, buy, cart or fav",
    "time": "a time in seconds since 1970",
    "hour": "a time as YYMMDDHH",
    "day": "a whole number or an ISO date",
    "order": "a number or an ISO date and time",
}
REQUIRED_KINDS = ("label", "weight", "behaviour", "id", *KEY_KINDS)  # never empty
# A log of these kinds alone holds no other byte than these, and its separator.
PLAIN_KINDS, PLAIN_BYTES = ("label", "count", "hex"), b"0123456789abcdefABCDEF-\n"


def parse_block(block: bytes, log_format: LogFormat, max_ind_range: int = -1) -> Rows:
    """Parse a block of whole lines, none of them blank.

    Raises `BadBlock` for a block with any fault, and `ValueError` where polars is not installed.
    """
    if not block:
        return no_rows(log_format)
    block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
    is_usual = all(detail.spelling == USUAL for _, detail in log_format.details)
    if not set(log_format.kinds) - {*PLAIN_KINDS} and not log_format.fixed and is_usual:
        try:
            return rows_of(read_frame(block, log_format, True), log_format, max_ind_range)
        except BadBlock:
            if not log_format.lax:
                raise
    return rows_of(read_frame(block, log_format), log_format, max_ind_range)


def read_frame(block: bytes, log_format: LogFormat, is_plain: bool = False) -> Any:
    """A block as a frame of typed columns `0`, `1`, ...: see `typed`.

    `is_plain`: of a log of `PLAIN_KINDS` alone, in the strict spelling, which is read faster.
    """
    pl = import_polars()
    separator, kinds = log_format.separator or "", log_format.in_file.kinds
    if b"\r" in block:
        raise BadBlock
    if log_format.quote and (b'"' in block or UNIT_SEPARATOR in block):
        block, separator = _without_quotes(block, log_format), UNIT_SEPARATOR.decode()
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
    return frame.with_columns(
        pl.lit(text or None, pl.String).alias(str(column))
        for column, text in enumerate(log_format.fixed, log_format.num_in_file)
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
    num_fields = log_format.num_in_file
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

    Labels, counts and keys become Int64, numbers and weights Float64, hashes UInt32, lists of text
    lists. In a plain frame, whose bytes are checked, labels and counts are Int64 already.
    """
    pl = import_polars()
    patterns = LAX_PATTERNS if log_format.lax else PATTERNS
    if log_format.nulls and not is_plain:
        dense = pl.col([str(c) for c in log_format.columns("count", "number")])
        is_null = dense.is_in(list(log_format.nulls))
        frame = frame.with_columns(pl.when(is_null).then(None).otherwise(dense).name.keep())
    frame = frame if is_plain else _in_usual_spelling(frame, log_format)
    columns = []
    for column, kind in enumerate(log_format.kinds):
        if kind == "skip":
            continue
        values = pl.col(str(column))
        if not is_plain:
            _check_texts(frame[str(column)], kind, patterns)
        if kind == "list":
            values = _list_of(frame[str(column)], log_format.detail(column))
        elif not is_plain or kind == "hex":
            values = _as_type(values, kind).alias(str(column))
        columns.append(values)
    converted = frame.select(columns)
    if converted.null_count().row(0) != frame.null_count().row(0):
        raise BadBlock
    _check_ranges(converted, log_format)
    if is_plain and not label_column(converted, log_format).is_between(0, 1).all():
        raise BadBlock
    return converted


def _in_usual_spelling(frame: Any, log_format: LogFormat) -> Any:
    """A frame of strings, with those of columns that have a spelling in the usual one.

    `BadBlock` for one that is not in its own.
    """
    spelled = []
    for column, kind in enumerate(log_format.kinds):
        spelling = log_format.detail(column).spelling
        if kind in SPELLED_KINDS and spelling != USUAL:
            spelled.append(_usual_texts(frame[str(column)], spelling).alias(str(column)))
    found = frame.with_columns(spelled)
    if spelled and found.null_count().row(0) != frame.null_count().row(0):
        raise BadBlock
    return found


def _usual_texts(values: Any, spelling: Spelling) -> Any:
    """A series of texts in the usual spelling, null where they are not in their own."""
    pl = import_polars()
    if spelling.positive:
        words = dict.fromkeys(spelling.positive, "1") | dict.fromkeys(spelling.negative, "0")
        return values.replace_strict(words, default=None, return_dtype=pl.String)
    if spelling.decimal == ",":
        pointed = pl.nth(0).str.replace_all(",", ".", literal=True)
        has_point = pl.nth(0).str.contains(".", literal=True)
        return values.to_frame().select(pl.when(~has_point).then(pointed)).to_series()
    pattern = pattern_of(spelling.format)
    found = values.str.extract_groups(f"^(?:{pattern})$").struct.unnest()
    usual = {"H": "00", "M": "00", "S": "00", "f": "0", "z": ""}
    missing = [pl.lit(text).alias(name) for name, text in usual.items() if name not in found]
    found = found.with_columns(missing)
    if "y" in found:
        is_past = pl.col("y").cast(pl.Int64) >= FIRST_OF_1900
        century = pl.when(is_past).then(pl.lit("19")).otherwise(pl.lit("20"))
        found = found.with_columns(Y=century + pl.col("y"))
    for name in {"b", "B"} & set(found.columns):
        numbers = {month[:3].lower(): str(at) for at, month in enumerate(MONTHS, 1)}
        month = pl.col(name).str.slice(0, 3).str.to_lowercase()
        found = found.with_columns(m=month.replace_strict(numbers, default=None))
    if "I" in found:
        is_late = pl.col("p").str.to_lowercase() == "pm"
        hour = pl.col("I").cast(pl.Int64) % 12 + 12 * is_late.cast(pl.Int64)
        found = found.with_columns(H=hour.cast(pl.String))
    two = (pl.col(name).str.zfill(2) for name in "mdHMS")
    return found.select(pl.format("{}-{}-{}T{}:{}:{}.{}{}", "Y", *two, "f", "z")).to_series()


def _check_texts(values: Any, kind: str, patterns: dict[str, str]) -> None:
    """Raise `BadBlock` unless all texts match their kind's pattern, and dates are in a calendar."""
    if kind not in patterns:
        return
    if not values.str.contains(f"^(?:{patterns[kind]})$").all():
        raise BadBlock
    if kind in ("day", "order"):
        dates = values.filter(values.str.contains("^....-")).str.slice(0, 10)
        if not all(map(is_date, dates.unique())):
            raise BadBlock


def _check_ranges(frame: Any, log_format: LogFormat) -> None:
    """Raise `BadBlock` for an empty field that may not be, or a number that no array can hold."""
    pl = import_polars()
    required = [str(c) for c in log_format.columns(*REQUIRED_KINDS)]
    if any(frame.select(required).null_count().row(0)):
        raise BadBlock
    counts = log_format.columns("count")
    # Where negative ones become 0, any number will do.
    signed = [str(c) for c in counts if log_format.detail(c).transform != "log"]
    floats = [str(c) for c in log_format.columns("number", "weight")]
    orders = [str(c) for c in log_format.columns("order")]
    bounds = (
        (pl.col([str(c) for c in counts]).max(), counts, MAX_INT32),
        (-pl.col(signed).min(), signed, MAX_INT32),
        (pl.col(floats).abs().max(), floats, MAX_FLOAT32),
        (pl.col(orders).abs().max(), orders, MAX_ORDER),
    )
    for largest, columns, limit in bounds:
        if columns and not all((value or 0) <= limit for value in frame.select(largest).row(0)):
            raise BadBlock


def _list_of(values: Any, detail: Details) -> Any:
    """A series of texts, or of a Parquet file's lists, as lists of texts.

    `BadBlock` for what is no hash, or a list in brackets: they would be part of its values.
    """
    pl = import_polars()
    if values.dtype == pl.String:
        if values.str.contains(BRACKETED).any():
            raise BadBlock
        values = values.str.split(detail.separator)
    if detail.element == "hex":
        elements = values.explode().drop_nulls()
        if not elements.str.contains(f"^(?:{PATTERNS['hex']})?$").all():
            raise BadBlock
    return values


def _as_type(values: Any, kind: str) -> Any:
    """An expression of texts that match their pattern, as one of the kind's type."""
    pl = import_polars()
    if kind == "hex":
        return values.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    if kind in ("string", "list", "group"):
        return values
    if kind == "behaviour":
        return (values == "pv").cast(pl.Int64)
    if kind in ("day", "order"):
        number = _order_number(values) if kind == "order" else _whole(values)
        return (
            pl.when(values.str.contains(f"^{ISO_DATE}")).then(_utc(values, kind)).otherwise(number)
        )
    if kind in ("number", "weight"):
        return values.str.strip_prefix("+").cast(pl.Float64, strict=False)
    if kind == "label":
        is_true, is_false = values.str.contains("^[tT]"), values.str.contains("^[fF]")
        return pl.when(is_true).then(1).when(is_false).then(0).otherwise(_whole(values))
    return _whole(values)


def _whole(values: Any) -> Any:
    pl = import_polars()
    return values.str.strip_prefix("+").str.replace(r"\..*$", "").cast(pl.Int64, strict=False)


def _order_number(values: Any) -> Any:
    """Numbers as Int64 that are in the same order: see `FINE_ORDER`."""
    pl = import_polars()
    size = _whole(values).abs()
    digits = values.str.extract(r"\.([0-9]{1,6})").str.pad_end(6, "0").cast(pl.Int64, strict=False)
    fine = size * 1_000_000 + digits.fill_null(0)
    placed = pl.when(size < FINE_ORDER).then(fine).otherwise(size + FINE_ORDER * (1_000_000 - 1))
    return pl.when(values.str.starts_with("-")).then(-placed).otherwise(placed)


def _utc(values: Any, kind: str) -> Any:
    """ISO times as microseconds (of kind day: days) since 1970, in UTC where none says else."""
    pl = import_polars()
    time = values.str.slice(10)

    def number(pattern: str) -> Any:
        return time.str.extract(pattern).cast(pl.Int64, strict=False).fill_null(0)

    days = values.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)
    minutes = days.cast(pl.Int32).cast(pl.Int64) * 1440 + number("^.([0-9]{2})") * 60
    minutes += number("^...:([0-9]{2})")
    offset = number("[+-]([0-9]{2})") * 60 + number("[+-][0-9]{2}:?([0-9]{2})$")
    minutes -= pl.when(time.str.contains("-", literal=True)).then(-offset).otherwise(offset)
    if kind == "day":
        return minutes // 1440
    micros = time.str.extract("[.,]([0-9]{1,6})").str.pad_end(6, "0").cast(pl.Int64, strict=False)
    seconds = minutes * 60 + number("^...:..:([0-9]{2})")
    return seconds * 1_000_000 + micros.fill_null(0)


def is_date(text: str) -> bool:
    """Whether a calendar has an ISO date."""
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False
