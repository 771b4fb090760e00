"""Uncompressed .npz files: written in a stream, aligned, atomically; opened as memory maps.

A stored zip member is a plain .npy file at an offset, so each array can be mapped in place: opening
a 7 GB file reads a few kilobytes; `check_sums` reads it all. `np.load` opens the same files. Every
file is untrusted: nothing is ever pickled or unpickled, and sizes are checked before they are used.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slipstream.tools.mapped import advise
from slipstream.tools.places import regular_file, room_for
from slipstream.tools.runtime import available_memory_bytes, num_threads
from slipstream.tools.schema import AGAIN, check_fields, conform, decode_json

BUILD_FIRST = "check the path, or build the file first"
ALIGNMENT = 64  # bytes; a cache line, and what the .npy format pads its own header to
LOCAL_HEADER_BYTES = 30
ZIP64_EXTRA_BYTES = 20
CHECK_BYTES = 1 << 22
MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*\.npy")
MAX_RATIO = 200  # uncompressed bytes for one of a compressed member of more than BOMB_BYTES
BOMB_BYTES = 1 << 26
# numpy reads headers with `ast`, which fails at random in Python 3.11 when threads use it at once
# (SystemError: AST constructor recursion depth mismatch).
HEADER_LOCK = threading.Lock()
ZIP64_SIZE = 0xFFFFFFFF  # in a field of 32 bits: see the zip64 one


@dataclass(frozen=True)
class Spec:
    """Shape and type of a member that `NpzWriter` is to write."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the data alone."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzWriter:
    """Writes an uncompressed .npz whose shapes are known, its members in any order or interleaved.

    Data go to `<path>.partial`, each array at a multiple of 64 bytes; `finish` completes, syncs and
    renames it, so `path` is either the old file or the whole new one. `progress` makes what was
    written durable and returns what a later process needs to go on from there.

    Args:
        path: the file to write.
        specs: the members in the order of the file.
        progress: of an earlier writer of the same file and specs; None starts anew.
    """

    def __init__(
        self, path: str | Path, specs: Mapping[str, Spec], progress: dict[str, Any] | None = None
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._members = _layout(specs)
        is_new = progress is None
        place = room_for(self.partial) if is_new else regular_file(self.partial)
        self._file = open(place, "wb" if is_new else "r+b")
        for name, member in self._members.items():
            if progress is not None:
                member.num_written, member.crc = progress[name]
                self._check_written(name, member)
            else:
                self._write_at(member.start, member.array_header)

    def _check_written(self, name: str, member: _Member) -> None:
        """Raise `ValueError` unless what was written is there; one pass."""
        size, crc = len(member.array_header) + member.num_written, 0
        for start in range(0, size, CHECK_BYTES):
            wanted = (min(CHECK_BYTES, size - start), member.start + start)
            crc = zlib.crc32(os.pread(self._file.fileno(), *wanted), crc)
        if crc != member.crc or member.num_written > member.spec.num_bytes:
            raise ValueError(f"{self.partial}: {name}: not what was written; {AGAIN}")

    def append(self, name: str, chunk: np.ndarray) -> None:
        """Write the next values of a member: an array of its type, cut along the first axis.

        Members may be appended to by several threads, each by one. Raises `OSError` (full disk).
        """
        member = self._members[name]
        data = np.ascontiguousarray(chunk, member.spec.dtype).reshape(-1).view(np.uint8).data
        if member.num_written + len(data) > member.spec.num_bytes:
            raise ValueError(f"{name}: got more values than its shape {member.spec.shape}")
        self._write_at(member.start + len(member.array_header) + member.num_written, data)
        member.crc = zlib.crc32(data, member.crc)
        member.num_written += len(data)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            num_written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[num_written:], offset + num_written

    def progress(self) -> dict[str, Any]:
        """Sync what was written; the result is plain JSON, for the constructor."""
        os.fsync(self._file.fileno())
        return {name: [part.num_written, part.crc] for name, part in self._members.items()}

    def finish(self) -> None:
        """Write the directory and put the file in its place. `ValueError`: a member is short."""
        for name, member in self._members.items():
            if member.num_written != member.spec.num_bytes:
                raise ValueError(
                    f"{name}: got {member.num_written} bytes; expected shape {member.spec.shape}"
                )
            self._write_at(member.header_offset, member.local_header())
        end = max((member.end for member in self._members.values()), default=0)
        directory = b"".join(member.directory_entry() for member in self._members.values())
        self._write_at(end, directory + _end_of_zip(len(self._members), len(directory), end))
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)

    def close(self) -> None:
        """Close the file; it stays as `<path>.partial` unless finished."""
        self._file.close()

    def discard(self) -> None:
        """Close the file and delete it, unless finished."""
        self._file.close()
        self.partial.unlink(missing_ok=True)


@dataclass
class _Member:
    """A stored zip64 member of known size (PKWARE's APPNOTE, 4.3 and 4.5.3)."""

    name: bytes
    spec: Spec
    header_offset: int
    array_header: bytes
    crc: int
    num_written: int = 0

    @property
    def size(self) -> int:
        """Bytes of the .npy inside."""
        return len(self.array_header) + self.spec.num_bytes

    @property
    def start(self) -> int:
        """Where the .npy starts; its padding makes the data start on a multiple of 64."""
        unpadded = self.header_offset + LOCAL_HEADER_BYTES + len(self.name) + ZIP64_EXTRA_BYTES + 4
        return unpadded + -unpadded % ALIGNMENT

    @property
    def end(self) -> int:
        """Where the next member may start."""
        return self.start + self.size

    def _fields(self, extra_length: int) -> bytes:
        # Version 4.5, no flags, stored, 1980-01-01: the same arrays give the same bytes.
        sizes = (ZIP64_SIZE, ZIP64_SIZE, len(self.name), extra_length)
        return struct.pack("<HHHHHLLLHH", 45, 0, 0, 0, 0x21, self.crc, *sizes)

    def local_header(self) -> bytes:
        """The header before the data."""
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        before = self.header_offset + LOCAL_HEADER_BYTES + len(self.name) + len(extra) + 4
        extra += struct.pack("<HH", 0x5853, self.start - before) + bytes(self.start - before)
        return b"PK\x03\x04" + self._fields(len(extra)) + self.name + extra

    def directory_entry(self) -> bytes:
        """The entry in the directory at the file's end."""
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.header_offset)
        made_by_unix = struct.pack("<H", 3 << 8 | 45)
        rest = struct.pack("<HHHLL", 0, 0, 0, 0o600 << 16, ZIP64_SIZE)
        fields = self._fields(len(extra)) + rest
        return b"PK\x01\x02" + made_by_unix + fields + self.name + extra


def _layout(specs: Mapping[str, Spec]) -> dict[str, _Member]:
    members, offset = {}, 0
    for name, spec in specs.items():
        header = io.BytesIO()
        described = {"fortran_order": False, "shape": spec.shape}
        described["descr"] = np.lib.format.dtype_to_descr(spec.dtype)
        np.lib.format.write_array_header_1_0(header, described)
        data = header.getvalue()
        member = _Member(f"{name}.npy".encode(), spec, offset, data, zlib.crc32(data))
        members[name], offset = member, member.end
    return members


def _end_of_zip(num_members: int, directory_bytes: int, directory_offset: int) -> bytes:
    numbers = (num_members, num_members, directory_bytes, directory_offset)
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, directory_offset + directory_bytes, 1)
    short = (min(num_members, 0xFFFF),) * 2 + (ZIP64_SIZE, ZIP64_SIZE, 0)
    return end64 + locator + struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, *short)


@dataclass(frozen=True)
class ArrayStream:
    """An array that is written chunk by chunk, so that it never has to be in memory whole.

    `chunks` yields arrays that, concatenated along the first axis, have `shape` and `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Iterable[np.ndarray]


def write_npz(path: str | Path, members: Mapping[str, np.ndarray | ArrayStream]) -> None:
    """Write `members` to `path`, uncompressed and atomically.

    Raises `OSError` (full disk, no permission) and `ValueError` (a stream that does not add up to
    its shape); nothing is left behind in either case.
    """
    writer = NpzWriter(path, {name: Spec(data.shape, data.dtype) for name, data in members.items()})
    try:
        for name, data in members.items():
            for chunk in data.chunks if isinstance(data, ArrayStream) else (data,):
                writer.append(name, chunk)
        writer.finish()
    finally:
        writer.discard()


def open_npz(
    path: str | Path, required: Sequence[str] = (), others: bool = True
) -> dict[str, np.ndarray]:
    """Open an .npz file: stored arrays as read-only memory maps, compressed ones in memory.

    With `others` false, only the `required` arrays, and a manifest, are opened. Contents of maps
    are not read, and so not checked: see `check_sums`.

    Raises `ValueError` when the file is not an npz, is truncated, holds objects, expands to more
    than the free memory, or lacks one of the `required` keys, and `FileNotFoundError` when it is
    missing. Each message says what to do.
    """
    path = regular_file(path, BUILD_FIRST)
    arrays: dict[str, np.ndarray] = {}
    with _opened(path) as archive, open(path, "rb") as file:
        for info in _members_of(archive):
            name = info.filename.removesuffix(".npy")
            if not others and name not in (*required, "manifest"):
                continue
            if info.compress_type == zipfile.ZIP_STORED:
                arrays[name] = _map_member(path, file, info)
            else:
                arrays[name] = _read_member(archive, info)
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ValueError(
            f"{path} has keys {', '.join(arrays) or 'none'}; expected also {', '.join(missing)}"
        )
    return arrays


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what zipfile raises for bytes that are none becomes one `ValueError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place beyond any file's end
            raise
        raise ValueError(_unreadable(path, error)) from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        struct.error,
        OverflowError,
        NotImplementedError,  # another compression, as RuntimeError: encrypted
        RuntimeError,
    ) as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: BaseException) -> str:
    return f"{path} is truncated, corrupt or not an .npz file ({error}); delete it and rebuild it"


def _members_of(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    seen: set[str] = set()
    for info in (members := archive.infolist()):
        name = info.filename
        if not MEMBER_NAME.fullmatch(name) or name in seen:
            raise ValueError(f"it has a member named {name[:80]!r}; expected arrays, each once")
        if info.comment:  # a changed length of it hides the members behind
            raise ValueError(f"{name}: has a comment")
        seen.add(name)
    return members


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Read a compressed member, unless it would expand beyond reason."""
    num_bytes = info.file_size
    is_bomb = num_bytes > BOMB_BYTES and num_bytes > MAX_RATIO * info.compress_size
    if is_bomb or num_bytes > available_memory_bytes():
        raise ValueError(
            f"{info.filename}: {info.compress_size:,} bytes would expand to {num_bytes:,}"
        )
    with archive.open(info) as member:
        data = member.read(num_bytes + 1)
    # numpy allocates what the header says before it reads: it must say what there is.
    file = io.BytesIO(data)
    shape, fortran_order, dtype = _read_header(file, info.filename)
    _check_size(info, shape, dtype, file.tell())
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    values = np.frombuffer(data, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")


def _read_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        formats = np.lib.format
        is_first = formats.read_magic(file) == (1, 0)
        read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
        with HEADER_LOCK:
            shape, fortran_order, dtype = read(file)
    except Exception as error:  # numpy lets errors of Python's own parser through
        raise ValueError(f"{name}: no array header") from error
    if dtype.hasobject:
        raise ValueError(f"{name}: holds Python objects, which are never loaded")
    return shape, fortran_order, dtype


def _check_size(
    info: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype, header_bytes: int
) -> None:
    if min(shape, default=0) < 0 or not dtype.itemsize:
        raise ValueError(f"{info.filename}: holds no values")
    if header_bytes + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename}: its size does not match its header")


def check_sums(path: str | Path) -> None:
    """Compare the contents of stored members with their checksums: 6 GB/s a core (CRC-32).

    Compressed ones were compared when they were read. Raises `ValueError` for a file whose bytes
    are not those that were written.
    """
    path = Path(path)

    def check(info: zipfile.ZipInfo) -> None:
        with open(path, "rb") as file:
            start = _start_of(file, info)
        if not info.file_size:
            return
        data = np.asarray(np.memmap(path, np.uint8, "r", start, info.file_size))
        crc = 0
        for first in range(0, len(data), CHECK_BYTES):
            chunk = data[first : first + CHECK_BYTES]
            crc = zlib.crc32(chunk.data, crc)
            advise(chunk, mmap.MADV_DONTNEED)
        if crc != info.CRC:
            raise ValueError(f"{info.filename}: its checksum differs")

    with _opened(path) as archive, ThreadPoolExecutor(num_threads()) as pool:
        members = _members_of(archive)
        stored = [info for info in members if info.compress_type == zipfile.ZIP_STORED]
        list(pool.map(check, stored))


def _start_of(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes start."""
    file.seek(info.header_offset)
    local = file.read(LOCAL_HEADER_BYTES)
    if len(local) < LOCAL_HEADER_BYTES or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename}: no zip header where the directory says")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    if file.read(name_length) != info.filename.encode():  # else it would pass for a missing one
        raise ValueError(f"{info.filename}: its header has another name")
    start = info.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{info.filename}: is cut off")
    return start


def _map_member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    """Map one stored member; every size is checked against the file before it is used."""
    start = _start_of(file, info)
    file.seek(start)
    shape, fortran_order, dtype = _read_header(file, info.filename)
    offset = file.tell()
    _check_size(info, shape, dtype, offset - start)
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    # A plain ndarray over the map: slicing np.memmap objects costs several microseconds each.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C"))


def fingerprint(path: str | Path) -> str:
    """Identify the arrays of an .npz by name, CRC and size, from its directory alone.

    The manifest is left out: it records circumstances (times), not content. So are a vocabulary's
    `codes`: they say what the rows are called, and have a checksum of their own.
    """
    with _opened(regular_file(path, BUILD_FIRST)) as archive:
        rows = [
            (info.filename, info.CRC, info.file_size)
            for info in archive.infolist()
            if info.filename not in ("manifest.npy", "codes.npy")
        ]
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def pack_manifest(manifest: Mapping[str, Any]) -> np.ndarray:
    """Encode a manifest as JSON bytes in a uint8 array, the form kept under the key `manifest`."""
    return np.frombuffer(json.dumps(manifest, sort_keys=True).encode(), np.uint8)


def unpack_manifest(
    arrays: Mapping[str, np.ndarray], source: str | Path = "the file"
) -> dict[str, Any]:
    """Decode the manifest of an opened .npz; `{}` where it has none.

    `ValueError`: it is no JSON object; `source` is the file, for that.
    """
    if "manifest" not in arrays:
        return {}
    check_fields(source, arrays, {"manifest": ("uint8", 1)})
    try:
        manifest = decode_json(arrays["manifest"].tobytes())
    except ValueError as error:
        raise ValueError(f"{source}: manifest: {error}; {AGAIN}") from error
    return conform(manifest, dict[str, Any], f"{source}: manifest")
