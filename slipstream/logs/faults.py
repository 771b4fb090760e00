"""Bad lines, found in plain Python: which they are, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from slipstream.logs.formats import LogFormat, separator_hint
from slipstream.logs.parsing import (
    BRACKETED,
    LAX_PATTERNS,
    MAX_FLOAT32,
    MAX_INT32,
    MAX_ORDER,
    MEANINGS,
    PATTERNS,
    REQUIRED_KINDS,
    is_date,
    split_line,
)
from slipstream.logs.rows import SEVERAL_VALUES, BadBlock, calendar
from slipstream.logs.spelling import DECIMAL_KINDS, SPELLED_KINDS, Spelling

SAY_VALUES = (
    'say in the column file how many it has at most, as "values": 6, or that it is one: "values": 1'
)

SAY_DECIMAL = 'say so: "decimal" in the column file, or --decimal of predict.py'
THOUSANDS = re.compile(rb"[+-]?[0-9]{1,3}([., '][0-9]{3})+([.,][0-9]*)?")


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
        if len(fields) != log_format.num_in_file:
            is_whole = len(fields) == 1 and log_format.lax
            hint = separator_hint(fields[0].decode("utf-8", "replace")) if is_whole else ""
            return f": {len(fields)} columns; expected {log_format.num_in_file}{hint}"
        fields += [text.encode() for text in log_format.fixed]
    for column, (kind, value) in enumerate(zip(log_format.kinds, fields, strict=True)):
        reason = fault_of_field(kind, value, log_format, column)
        if reason and kind == "label":
            return f": label {reason}"
        if reason:
            return f", column {column + 1} ({log_format.names[column]}): {reason}"
    return None


def fault_of_field(kind: str, value: Any, log_format: LogFormat, column: int) -> str | None:
    """Say what is wrong with one field, or None."""
    detail = log_format.detail(column)
    if kind == "list":
        return _fault_of_list(value, log_format, column)
    shown = _shown(value)
    if kind in ("skip", "group", "string"):
        try:
            value.decode()
        except UnicodeDecodeError:
            return f"{shown} is not UTF-8"
        is_one = kind != "string" or not log_format.lax or detail.values
        if not is_one and re.search(SEVERAL_VALUES, value.decode()):
            return f"{shown} looks like several values; {SAY_VALUES}"
        return None
    if not value and kind not in REQUIRED_KINDS:
        return None
    is_dense = kind in ("count", "number")
    if is_dense and value.decode("utf-8", "replace") in log_format.nulls:
        return None
    patterns = LAX_PATTERNS if log_format.lax else PATTERNS
    usual = detail.spelling.usual(value) if kind in SPELLED_KINDS else value
    if usual is None or not re.fullmatch(patterns[kind].encode(), usual):
        hint = _hint(kind, value, usual, log_format, detail.spelling) if log_format.lax else ""
        return f"{shown}{_expected(kind, detail.spelling)}{hint}"
    if not is_in_calendar(kind, usual):
        return f"{shown}{_expected(kind, detail.spelling)}"
    return _fault_of_size(kind, usual, shown, detail.transform != "log")


def _expected(kind: str, spelling: Spelling) -> str:
    if kind == "label":
        words = [repr(word) for word in (*spelling.positive, *spelling.negative)] or ["0", "1"]
        return f"; expected {', '.join(words[:-1])[:200]} or {words[-1][:40]}"
    if spelling.format:
        return f" is not a date of the format {spelling.format!r}"
    comma = " with a decimal comma" if spelling.decimal == "," else ""
    return f" is not {MEANINGS[kind]}{comma}"


def _hint(
    kind: str, value: bytes, usual: bytes | None, log_format: LogFormat, spelling: Spelling
) -> str:
    """How the column file may say what such a value is; `usual`: as `Spelling` has it."""
    number = LAX_PATTERNS["number"].encode()
    if b'"' in value and not log_format.quote:
        return '; where fields are quoted, say "quote": true in the column file'
    if spelling.format or spelling.positive or not value:
        return ""
    if kind == "label":
        return '; for words say "positive" and "negative" in the column file'
    if kind in ("day", "order") and re.search(rb"[0-9]", value):
        return '; for others say "format" in the column file'
    if kind not in DECIMAL_KINDS:
        return ""
    if kind == "count" and usual is not None and re.fullmatch(number, usual):
        return '; other numbers need "type": "number"'
    if spelling.decimal == "." and re.fullmatch(number, value.replace(b",", b".")):
        return f"; where commas are decimal, {SAY_DECIMAL}"
    if spelling.decimal == "," and re.fullmatch(number, value):
        return f"; where points are decimal, {SAY_DECIMAL}"
    if THOUSANDS.fullmatch(value):
        return "; separators of thousands are not taken"
    is_null = kind != "weight" and value.isalpha()
    return '; where it stands for an empty one, name it in "nulls"' if is_null else ""


def _fault_of_list(value: Any, log_format: LogFormat, column: int) -> str | None:
    detail = log_format.detail(column)
    if isinstance(value, bytes):
        if re.search(BRACKETED.encode(), value):
            return f"{_shown(value)} is a list in brackets; expected its values alone, as a|b"
        value = value.split(detail.separator.encode())
    found = (fault_of_field(detail.element, one, log_format, column) for one in value)
    return next((reason for reason in found if reason), None)


def _shown(value: bytes) -> str:
    return "'" + value[:40].decode("ascii", "backslashreplace") + "'"


def _fault_of_size(kind: str, value: bytes, shown: str, is_signed: bool) -> str | None:
    limits = {"count": MAX_INT32, "number": MAX_FLOAT32, "weight": MAX_FLOAT32, "order": MAX_ORDER}
    limit = limits.get(kind)
    if limit is None or value[4:5] == b"-":
        return None
    size = float(value) if kind in ("number", "weight") else int(value.partition(b".")[0])
    if abs(size) <= limit or (kind == "count" and size < 0 and not is_signed):
        return None
    return f"{shown} is more than {limit:{'' if isinstance(limit, int) else 'g'}}"


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
