"""Raw log files to rows: text, plain or packed, in blocks of whole lines, or Parquet; read once.

Several blocks are parsed at once, and come out in order. Line ends may be LF or CRLF, the last one
may be missing; blank lines are left out and counted. A line with more or fewer fields than the
others is bad. Bad lines stop the reading, or are left out and counted up to a number.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs.containers import Unpacked
from slipstream.logs.faults import find_faults
from slipstream.logs.folders import folder_values, name_in
from slipstream.logs.formats import LogFormat
from slipstream.logs.parquet import parquet_blocks, typed_format
from slipstream.logs.parsing import BYTE_ORDER_MARK, parse_block, typed
from slipstream.logs.rows import BadBlock, Rows, no_rows, rows_of
from slipstream.tools.runtime import ordered

BLOCK_BYTES = 1 << 23  # of a file, read at once
MAX_LINE_BYTES = 1 << 16  # a valid line of Criteo has 500 at most


class RawFile:
    """One raw file. `size_and_time` tells whether a file is still the one that was read.

    Args:
        path: of the file.
        is_compared: with other files of the log, so what a container holds is hashed, too.
        root: the log's folder, below which folders `key=value` hold columns; None: none do.
    """

    def __init__(self, path: Path, is_compared: bool = False, root: Path | None = None) -> None:
        self.given = (path, is_compared, root)
        self.path, self._is_compared = path, is_compared
        stat = path.stat()
        self.size_and_time: dict[str, Any] = {
            "name": name_in(root, path),
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        self.folder_values = folder_values(self.size_and_time["name"])
        self.num_read = 0
        self._hash = hashlib.sha256()
        self._described: dict[str, Any] = {}
        self._content: Any = None  # hashes what a container holds

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of a file that has been read to its end."""
        if self._described:
            return self._described
        described = {**self.size_and_time, "sha256": self._hash.hexdigest()}
        if self._content is not None:
            described["content_sha256"] = self._content.hexdigest()
        return described

    def read(self, size: int = -1) -> bytes:
        """Read raw bytes; this method makes the object a file to `Unpacked`."""
        data = self._file.read(size)
        self._hash.update(data)
        self.num_read += len(data)
        return data

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Yield blocks of about `block_bytes`: whole lines, each with its newline.

        A byte order mark is left out. Raises `ValueError` for an empty file, for what `Unpacked`
        refuses, and for a line longer than any log has.
        """
        with open(self.path, "rb") as self._file:
            stream = Unpacked(self.path, self)
            rest, is_first, is_empty = b"", True, True
            while chunk := stream.read(max(block_bytes, len(BYTE_ORDER_MARK))):
                if is_first:
                    is_first, is_other = False, stream.kinds or chunk.startswith(BYTE_ORDER_MARK)
                    self._content = hashlib.sha256() if self._is_compared and is_other else None
                    chunk = chunk.removeprefix(BYTE_ORDER_MARK)
                is_empty = is_empty and not chunk
                if self._content is not None:
                    self._content.update(chunk)
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
                raise ValueError(f"{self.path} is empty; expected a click log")
            if rest:
                yield rest + b"\n"

    def restore(self, described: dict[str, Any]) -> None:
        """Take what `describe` said when the file was read before: it is not read again."""
        self._described, self.num_read = described, self.size_and_time["bytes"]

    def hash_whole(self) -> None:
        """Hash a file that is not read through `blocks`."""
        with open(self.path, "rb") as file:
            self._hash = hashlib.file_digest(file, "sha256")
        self.num_read = self.size_and_time["bytes"]


def is_same_file(source: dict[str, Any], raw: RawFile) -> bool:
    """Whether a file is the one that `source` describes; hashed only where its time differs."""
    now = raw.size_and_time
    if (source.get("name"), source.get("bytes")) != (now["name"], now["bytes"]):
        return False
    if source.get("mtime_ns") == now["mtime_ns"]:
        return True
    with open(raw.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.get("sha256")


@dataclass
class Tally:
    """What a log's lines came to, over all its files.

    Attributes:
        max_bad_lines: so many bad lines are left out; one more raises `ValueError`.
        num_bad_before: in earlier files.
        num_lines: read, headers left aside.
        dropped: rows left out, by reason.
        examples: the first bad lines.
        seen: what else there was to count.
    """

    max_bad_lines: int = 0
    num_bad_before: int = 0
    num_lines: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, num_rows: int) -> None:
        """Count rows left out."""
        if num_rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + num_rows

    def see(self, what: str, number: int) -> None:
        """Count something that leaves no row out."""
        self.seen[what] = self.seen.get(what, 0) + number

    def bad_line(self, fault: str) -> None:
        """Count a bad line, or raise."""
        if self.num_bad_before + self.dropped.get("bad line", 0) >= self.max_bad_lines:
            also = f" (--bad-lines skip:{self.max_bad_lines} has skipped as many already)"
            raise ValueError(fault + also * (self.max_bad_lines > 0))
        self.drop("bad line", 1)
        if len(self.examples) < 5:
            self.examples.append(fault)


class Parsed(NamedTuple):
    """A block's rows, and what was wrong with its lines: (index of the line, reason).

    Attributes:
        rows: of the lines that are neither blank nor bad.
        num_lines: of the block.
        blank: indices of blank lines.
        faults: indices of bad lines, and reasons.
        is_explained: false where the checks refuse a block whose lines all look good: then no line
            can be left out.
        made: what `then` made of the rows.
    """

    rows: Rows
    num_lines: int
    blank: list[int]
    faults: list[tuple[int, str]]
    is_explained: bool = True
    made: Any = None

    def has_row(self) -> np.ndarray:
        """Which lines (num_lines,) have a row."""
        has_row = np.ones(self.num_lines, bool)
        has_row[[*self.blank, *(index for index, _ in self.faults)]] = False
        return has_row


def parse_file(
    raw: RawFile, log_format: LogFormat, block_bytes: int, max_ind_range: int, tally: Tally
) -> Iterator[Rows]:
    """Yield the rows of a file, block by block; `ValueError` names a bad line.

    With `max_ind_range` > 0, hashes are taken modulo it.
    """
    for parsed in parsed_blocks(raw, log_format, block_bytes, max_ind_range, tally):
        yield parsed.rows


def parsed_blocks(
    raw: RawFile,
    log_format: LogFormat,
    block_bytes: int,
    max_ind_range: int,
    tally: Tally,
    then: Callable[[Rows], Any] | None = None,
) -> Iterator[Parsed]:
    """As `parse_file`, with what became of each line, and what `then` makes of the rows.

    It is called in the threads that parse.
    """
    log_format = log_format.with_folders(raw.folder_values)
    if log_format.separator is None:
        raw.hash_whole()
        log_format = typed_format(raw.path, log_format)
        blocks: Iterable[Any] = parquet_blocks(raw.path, log_format, tally.see)
        first_line, unit = 1, "row"
    else:
        blocks, log_format, first_line = text_blocks(raw, log_format, block_bytes)
        unit = "line"
    skip = tally.max_bad_lines > 0

    def parse(block: Any) -> Parsed:
        parsed = parse_checked(block, log_format, max_ind_range, skip)
        return parsed if then is None else parsed._replace(made=then(parsed.rows))

    for parsed in ordered(parse, blocks):
        if not parsed.is_explained:
            where = f"{raw.path}, {unit} {first_line}, or one soon after it,"
            raise ValueError(f"{where} is not in the log's format")
        for index, reason in parsed.faults:
            tally.bad_line(f"{raw.path}, {unit} {first_line + index}{reason}")
        tally.drop("blank line", len(parsed.blank))
        tally.num_lines += parsed.num_lines
        for what, number in parsed.rows.seen.items():
            tally.see(what, number)
        first_line += parsed.num_lines
        yield parsed


def text_blocks(
    raw: RawFile, log_format: LogFormat, block_bytes: int
) -> tuple[Iterator[bytes], LogFormat, int]:
    """A text file's blocks without its header, the format of its lines, the first one's number."""
    blocks = raw.blocks(block_bytes)
    if not log_format.header:
        return read_ahead(blocks), log_format, 1
    first = next(blocks)
    cut = first.index(b"\n") + 1
    try:
        log_format = log_format.with_header(first[:cut])
    except ValueError as error:
        raise ValueError(f"{raw.path}{error}") from None

    def rest() -> Iterator[bytes]:
        if len(first) > cut:
            yield first[cut:]
        yield from blocks

    return read_ahead(rest()), log_format, 2


def parse_checked(block: Any, log_format: LogFormat, max_ind_range: int, skip: bool) -> Parsed:
    """Parse a block (bytes, or a frame of strings); with `skip`, without its bad lines."""
    if not isinstance(block, bytes):
        return _parse_lines(block, [], block.height, log_format, max_ind_range, skip)
    num_lines, blank = block.count(b"\n"), []
    # A line of its own: at the start, or after a newline.
    if block.startswith((b"\n", b"\r\n")) or b"\n\n" in block or b"\n\r\n" in block:
        lines = block.split(b"\n")[:-1]
        blank = [index for index, line in enumerate(lines) if line in (b"", b"\r")]
    try:
        solid = re.sub(rb"(?m)^\r?\n", b"", block) if blank else block
        rows = parse_block(solid, log_format, max_ind_range)
        return Parsed(rows, num_lines, blank, [])
    except BadBlock:
        lines = block.split(b"\n")[:-1]
        parsed = _parse_lines(block, lines, num_lines, log_format, max_ind_range, skip)
        return parsed._replace(blank=blank)


def _parse_lines(
    block: Any, lines: list[Any], num_lines: int, log_format: LogFormat, modulus: int, skip: bool
) -> Parsed:
    """Parse what is left without the bad lines; without `skip`, find the first of them."""
    is_text = isinstance(block, bytes)
    if not is_text:
        try:
            return Parsed(rows_of(typed(block, log_format), log_format, modulus), num_lines, [], [])
        except BadBlock:
            lines = [[_as_bytes(value) for value in row] for row in block.rows()]
    found = find_faults(lines, log_format)
    faults = list(found) if skip else [fault for fault, _ in zip(found, "1", strict=False)]
    refused = Parsed(no_rows(log_format), num_lines, [], faults, bool(faults))
    if not faults or not skip:
        return refused
    bad = {index for index, _ in faults}
    good = [index for index in range(len(lines)) if index not in bad]
    try:
        if is_text:
            rest = b"".join(lines[i] + b"\n" for i in good if lines[i] not in (b"", b"\r"))
            rows = parse_block(rest, log_format, modulus)
        else:
            rows = rows_of(typed(block[good], log_format), log_format, modulus)
    except BadBlock:
        return refused._replace(is_explained=False)
    return Parsed(rows, num_lines, [], faults)


def _as_bytes(value: Any) -> Any:
    """A field of a Parquet row: bytes, or a list of them."""
    if isinstance(value, list):
        return [_as_bytes(element) for element in value]
    return b"" if value is None else value.encode()


def read_ahead(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield from `blocks` while a thread fetches the next: reading and hashing release the GIL."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = reader.submit(next, blocks, None)
            yield block
