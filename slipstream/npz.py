"""Uncompressed .npz files: written in a stream, aligned, atomically; opened as memory maps.

A stored zip member is a plain .npy file at an offset, so each array can be mapped in place: opening
a 7 GB file reads a few kilobytes. `np.load` opens the same files. Nothing is ever pickled or
unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ALIGNMENT = 64  # bytes; a cache line, and what the .npy format pads its own header to
LOCAL_HEADER_BYTES = 30
ZIP64_EXTRA_BYTES = 20  # what zipfile itself appends to the extra field of a zip64 member
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class ArrayStream:
    """An array that is written chunk by chunk, so that it never has to be in memory whole.

    `chunks` yields arrays that, concatenated along the first axis, have `shape` and `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Iterable[np.ndarray]


def write_npz(path: str | Path, members: Mapping[str, np.ndarray | ArrayStream]) -> None:
    """Write `members` to `path` uncompressed, each array's data at a multiple of 64 bytes.

    The file is written beside `path` as `<name>.partial`, synced and renamed, so `path` is either
    the old file or the whole new one. Raises `OSError` (full disk, no permission) and `ValueError`
    (a stream that does not add up to its shape); nothing is left behind in either case.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, array in members.items():
                    _write_member(archive, file, name, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_member(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, array: np.ndarray | ArrayStream
) -> None:
    if isinstance(array, np.ndarray):
        array = ArrayStream(array.shape, array.dtype, (array,))
    # A fixed time stamp: the same arrays give the same bytes.
    info = zipfile.ZipInfo(name + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
    fixed = LOCAL_HEADER_BYTES + len(info.filename.encode()) + ZIP64_EXTRA_BYTES + 4
    padding = -(file.tell() + fixed) % ALIGNMENT
    info.extra = struct.pack("<HH", 0x5853, padding) + bytes(padding)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "fortran_order": False,
            "shape": array.shape,
        },
    )
    num_written = 0
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(header.getvalue())
        for chunk in array.chunks:
            chunk = np.ascontiguousarray(chunk, dtype=array.dtype)
            num_written += chunk.size
            if chunk.size:
                member.write(chunk.reshape(-1).view(np.uint8).data)
    if num_written != int(np.prod(array.shape)):
        raise ValueError(f"{name}: got {num_written} values; expected shape {array.shape}")


def open_npz(path: str | Path, required: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Open an .npz file: stored arrays as read-only memory maps, compressed ones in memory.

    Raises `ValueError` when the file is not an npz, is truncated, holds objects, or lacks one of
    the `required` keys, and `FileNotFoundError` when it is missing. Each message says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path, or build the file first")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if info.compress_type == zipfile.ZIP_STORED:
                    arrays[name] = _map_member(path, file, info)
                else:
                    with archive.open(info) as member:
                        arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, struct.error) as error:
        raise ValueError(
            f"{path} is truncated, corrupt or not an .npz file ({error}); delete it and rebuild it"
        ) from error
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ValueError(
            f"{path} has keys {', '.join(arrays) or 'none'}; expected also {', '.join(missing)}"
        )
    return arrays


def _map_member(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    """Map one stored member; every size is checked against the file before it is used."""
    file.seek(info.header_offset)
    local = file.read(LOCAL_HEADER_BYTES)
    if len(local) < LOCAL_HEADER_BYTES or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename}: no zip header where the directory says")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    start = info.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length
    file.seek(start)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename}: holds Python objects, which are never loaded")
    offset = file.tell()
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if offset - start + num_bytes != info.file_size or offset + num_bytes > os.path.getsize(path):
        raise ValueError(f"{info.filename}: its size does not match its header")
    if num_bytes == 0:
        return np.empty(shape, dtype)
    # A plain ndarray over the map: slicing np.memmap objects costs several microseconds each.
    return np.asarray(np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C"))


def fingerprint(path: str | Path) -> str:
    """Identify the arrays of an .npz by name, CRC and size, from its directory alone (no data
    read).

    The manifest is left out: it records circumstances (times), not content.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path, or build the file first")
    try:
        with zipfile.ZipFile(path) as archive:
            rows = [
                (info.filename, info.CRC, info.file_size)
                for info in archive.infolist()
                if info.filename != "manifest.npy"
            ]
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is truncated, corrupt or not an .npz file; delete it and rebuild it"
        ) from error
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


def pack_manifest(manifest: Mapping[str, Any]) -> np.ndarray:
    """Encode a manifest as JSON bytes in a uint8 array, the form kept under the key `manifest`."""
    return np.frombuffer(json.dumps(manifest, sort_keys=True).encode(), np.uint8)


def unpack_manifest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Decode the manifest of an opened .npz; `{}` where it has none or an unreadable one."""
    if "manifest" not in arrays:
        return {}
    try:
        manifest = json.loads(arrays["manifest"].tobytes())
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) else {}
