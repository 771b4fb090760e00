"""Criteo's raw click logs: blocks of lines read from a file, parsed and checked to the last byte.

A line has 40 tab-separated fields: the label (0 or 1), 13 counts (`-?[0-9]{1,16}`, or nothing) and
26 categories (1 to 8 hexadecimal digits, or nothing). polars parses a block's columns in its own
threads; numpy checks beforehand what polars would let pass (spaces, `+5`, a 17th digit). A block
that fails is read again in plain Python, which names the first bad line, its column and the reason.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_DENSE = 13
NUM_TABLES = 26
NUM_FIELDS = 1 + NUM_DENSE + NUM_TABLES
KAGGLE_DAYS = 7
MAX_INT32 = 2**31 - 1
MAX_LINE_BYTES = 1 << 16  # no valid line has more than 500
LINE_PATTERN = np.frombuffer(b"\t" * (NUM_FIELDS - 1) + b"\n", np.uint8)
ALLOWED_BYTES = b"0123456789abcdefABCDEF-\t\n"
LABEL, *FIELD_NAMES = (f"column {column}" for column in range(1, NUM_FIELDS + 1))
DENSE_NAMES, TABLE_NAMES = FIELD_NAMES[:NUM_DENSE], FIELD_NAMES[NUM_DENSE:]


def equal_days(num_rows: int, num_days: int = KAGGLE_DAYS) -> np.ndarray:
    """Row offsets (num_days + 1,) int64 of equal contiguous days, the first ones a row longer."""
    lengths = np.full(num_days, num_rows // num_days, np.int64)
    lengths[: num_rows % num_days] += 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


class RawFile:
    """One raw file, plain or gzip, read once in blocks of lines, hashed and counted on the way."""

    def __init__(self, path: Path) -> None:
        stat = path.stat()
        self.path = path
        self.num_bytes, self.mtime_ns = stat.st_size, stat.st_mtime_ns
        self.num_read = 0
        self._hash = hashlib.sha256()

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of a file that has been read to its end."""
        sha256 = self._hash.hexdigest()
        numbers = {"bytes": self.num_bytes, "mtime_ns": self.mtime_ns}
        return {"name": self.path.name, **numbers, "sha256": sha256}

    def read(self, size: int = -1) -> bytes:
        """Read raw bytes; this method makes the object a file to `gzip`."""
        data = self._file.read(size)
        self._hash.update(data)
        self.num_read += len(data)
        return data

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Yield blocks of about `block_bytes`: whole lines, each with its newline.

        Raises `ValueError` for an empty file, a .gz that is truncated or not gzip, and a line
        longer than any log has.
        """
        with open(self.path, "rb") as self._file:
            stream: Any = self
            if self.path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=stream, mode="rb")
            rest, is_empty = b"", True
            while chunk := self._read_text(stream, block_bytes):
                is_empty = False
                cut = chunk.rfind(b"\n") + 1
                if cut:
                    yield b"".join((rest, memoryview(chunk)[:cut]))
                    rest = chunk[cut:]
                else:
                    rest += chunk
                if len(rest) > max(block_bytes, MAX_LINE_BYTES):
                    raise ValueError(
                        f"{self.path} has a line of over {len(rest):,} bytes; is it a log?"
                    )
            if is_empty:
                raise ValueError(f"{self.path} is empty; expected a Criteo log")
            if rest:
                yield rest + b"\n"

    def _read_text(self, stream: Any, size: int) -> bytes:
        try:
            return stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path} is truncated, corrupt or not gzip ({error}); fetch it again"
            ) from error


def read_ahead(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield from `blocks` while a thread fetches the next: reading and hashing release the GIL."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = reader.submit(next, blocks, None)
            yield block


class BadBlock(Exception):
    """A block holds a line that is not Criteo's; `find_fault` says which, and why."""


class Rows(NamedTuple):
    """The rows of a parsed block.

    Attributes:
        labels: (rows,) int8, 0 or 1.
        dense: (rows, 13) int32; missing and negative ones are 0.
        codes: (rows, 26) uint64, 0 for an empty category, else its hash + 1: at most 2^32.
    """

    labels: np.ndarray
    dense: np.ndarray
    codes: np.ndarray


def parse_block(block: bytes, max_ind_range: int = -1) -> Rows:
    """Parse a block of whole lines; with `max_ind_range` > 0, hashes are taken modulo it.

    Raises `BadBlock` for a block with any fault, and `ValueError` where polars is not installed.
    """
    pl = import_polars()
    frame = read_frame(block.replace(b"\r\n", b"\n") if b"\r" in block else block)
    codes = pl.col(TABLE_NAMES).cast(pl.UInt64)
    if max_ind_range > 0:  # an empty one counts as hash 0
        codes = codes.fill_null(0) % min(max_ind_range, 2**32) + 1
    else:
        codes = (codes + 1).fill_null(0)
    dense = pl.col(DENSE_NAMES).fill_null(0).clip(0).cast(pl.Int32)
    return Rows(
        frame[LABEL].cast(pl.Int8).to_numpy(),
        frame.select(dense).to_numpy(order="c"),
        frame.select(codes).to_numpy(),
    )


def import_polars() -> Any:
    """The polars module: it is imported here alone, for trainers do without it."""
    try:
        import polars
    except ImportError as error:
        raise ValueError("polars is needed to read raw logs: pip install polars") from error
    return polars


def read_frame(block: bytes) -> Any:
    """A block as a polars frame of 40 columns: Int64, and UInt32 for the categories' hashes.

    Empty fields are null, and nothing else is. Raises `BadBlock` for any fault.
    """
    pl = import_polars()
    num_empty = check_layout(block)
    integers = dict.fromkeys([LABEL, *DENSE_NAMES], pl.Int64)
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            separator="\t",
            quote_char=None,
            schema={**integers, **dict.fromkeys(TABLE_NAMES, pl.String)},
        )
    except pl.exceptions.PolarsError as error:
        raise BadBlock(str(error)) from error
    hashes = pl.col(TABLE_NAMES).str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    frame = frame.with_columns(hashes)
    largest = frame.select(pl.max_horizontal(pl.col(DENSE_NAMES).max())).item() or 0
    is_complete = frame.null_count().row(0) == tuple(num_empty)  # else polars read less than all
    if not is_complete or largest > MAX_INT32 or not frame[LABEL].is_between(0, 1).all():
        raise BadBlock
    return frame


def check_layout(block: bytes) -> list[int]:
    """Raise `BadBlock` unless a block is lines of 40 fields of allowed bytes and lengths.

    Returns the number of empty fields in each column.
    """
    if block.translate(None, ALLOWED_BYTES):
        raise BadBlock
    text = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(text <= ord("\n"))
    if len(ends) % NUM_FIELDS or (text[ends].reshape(-1, NUM_FIELDS) != LINE_PATTERN).any():
        raise BadBlock
    lengths = np.diff(ends, prepend=-1) - 1
    starts = (ends - lengths).reshape(-1, NUM_FIELDS)[:, 1 : 1 + NUM_DENSE]
    lengths = lengths.reshape(-1, NUM_FIELDS)
    labels, integers, categories = np.split(lengths, [1, 1 + NUM_DENSE], axis=1)
    is_long = integers > 16
    num_digits = integers[is_long] - (text[starts[is_long]] == ord("-"))
    if (labels != 1).any() or (num_digits > 16).any() or (categories > 8).any():
        raise BadBlock
    return (lengths == 0).sum(axis=0).tolist()


def parse_file(raw: RawFile, block_bytes: int, max_ind_range: int) -> Iterator[Rows]:
    """Yield the rows of a file, block by block; `ValueError` names the first bad line."""
    num_lines = 0
    for block in read_ahead(raw.blocks(block_bytes)):
        try:
            rows = parse_block(block, max_ind_range)
        except BadBlock as error:
            unexplained = (0, f" or one soon after it is not in Criteo's format {error}".rstrip())
            index, reason = find_fault(block) or unexplained
            raise ValueError(f"{raw.path}, line {num_lines + index + 1}{reason}") from None
        yield rows
        num_lines += block.count(b"\n")


def find_fault(block: bytes) -> tuple[int, str] | None:
    """Find a block's first bad line, in plain Python: its index and what is wrong with it."""
    for index, line in enumerate(block.split(b"\n")[:-1]):
        fields = line.removesuffix(b"\r").split(b"\t")
        if len(fields) != NUM_FIELDS:
            return index, f": {len(fields)} columns; expected {NUM_FIELDS}"
        for column, field in enumerate(fields):
            reason = fault_of(column, field)
            if reason:
                return index, reason
    return None


def fault_of(column: int, field: bytes) -> str | None:
    """Say what is wrong with one field, or None."""
    shown = "'" + field[:40].decode("ascii", "backslashreplace") + "'"
    if column == 0:
        return None if field in (b"0", b"1") else f": label {shown}; expected 0 or 1"
    if not field:
        return None
    if column > NUM_DENSE:
        where = f", column {column + 1} (category {column - NUM_DENSE}): {shown}"
        is_hex = re.fullmatch(rb"[0-9a-fA-F]{1,8}", field)
        return None if is_hex else f"{where} is not a hexadecimal value of 1 to 8 digits"
    where = f", column {column + 1} (integer {column}): {shown}"
    if not re.fullmatch(rb"-?[0-9]{1,16}", field):
        return f"{where} is not a whole number of 1 to 16 digits"
    return f"{where} is more than {MAX_INT32}" if int(field) > MAX_INT32 else None
