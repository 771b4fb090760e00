"""Bad lines, found in plain Python: which they are, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from slipstream.logs.formats import LogFormat
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

SAY_VALUES = (
    'say in the column file how many it has at most, as "values": 6, or that it is one: "values": 1'
)


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
            return f": {len(fields)} columns; expected {log_format.num_in_file}"
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
    if not re.fullmatch(patterns[kind].encode(), value):
        if kind == "label":
            return f"{shown}; expected 0 or 1{'; other words must be converted' * log_format.lax}"
        hint = _hint_at_dense(kind, value) if is_dense and log_format.lax else ""
        return f"{shown} is not {MEANINGS[kind]}{hint}"
    if not is_in_calendar(kind, value):
        return f"{shown} is not {MEANINGS[kind]}"
    return _fault_of_size(kind, value, shown, detail.transform != "log")


def _hint_at_dense(kind: str, value: bytes) -> str:
    """How the column file may say what such a value is."""
    if kind == "count" and re.fullmatch(LAX_PATTERNS["number"].encode(), value):
        return '; other numbers need "type": "number"'
    return '; where it stands for an empty one, name it in "nulls"' if value.isalpha() else ""


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
