"""What a raw file is, by its first bytes, and the text in it: plain or packed, UTF-8 or UTF-16.

gzip, bzip2, xz, and a zip or tar that holds one file are unpacked while they are read, also one
within another. Of what is not read here (an Excel workbook, an HTML page, ...) it is said what it
is, and what to do. File names play no part: a `.csv` may be gzip.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from slipstream.logs.folders import is_by_product

HEAD_BYTES = 512  # of which a tar's name is at 257
PIECE_BYTES = 1 << 20
SMALL_BYTES = 1 << 24  # a tar's first file of so many is read ahead, to see whether another follows
MAX_DEPTH = 4
TEXT, PARQUET = "text", "Parquet"
PACKED = (".gz", ".bz2", ".xz", ".zip", ".tar", ".tgz")
# Kind, and how its first bytes match.
MAGIC = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zip": rb"PK(\x03\x04|\x05\x06)",
    "tar": rb".{257}ustar",
    PARQUET: rb"PAR1[\0-\x1f]",
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
}
AS_CSV = "save it as CSV or Parquet"
# What is not read here, and what to do.
OTHERS = {
    "Zstandard": (rb"\x28\xb5\x2f\xfd", "unpack it with zstd -d"),
    "a 7-Zip archive": (rb"7z\xbc\xaf\x27\x1c", "unpack it with 7z x"),
    "a RAR archive": (rb"Rar!\x1a\x07", "unpack it with unrar x"),
    "an HTML page": (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html)",
        "a failed download, or one that needs a login; fetch the log again",
    ),
    "a git-lfs pointer, not the file itself": (rb"version https://git-lfs", "run git lfs pull"),
    "an old Excel workbook": (rb"\xd0\xcf\x11\xe0", AS_CSV),
    "a Python pickle": (rb"\x80[\x02-\x05]", AS_CSV),
    "an Arrow (Feather) file": (rb"ARROW1\0\0", AS_CSV),
    "an HDF5 file": (rb"\x89HDF\r\n", AS_CSV),
    "a NumPy file": (rb"\x93NUMPY", AS_CSV),
    "an SQLite database": (rb"SQLite format 3\0", AS_CSV),
}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


def kind_of(head: bytes) -> str:
    """What starts with these bytes: a key of `MAGIC` or `OTHERS`, or text."""
    for kind, pattern in (*MAGIC.items(), *((kind, known[0]) for kind, known in OTHERS.items())):
        if re.match(pattern, head, re.DOTALL):
            return kind
    return TEXT


def kind_of_file(path: Path) -> str:
    """What a file is."""
    with open(path, "rb") as file:
        return kind_of(file.read(HEAD_BYTES))


def without_packing(name: str) -> str:
    """A file's name without the ends that containers put there."""
    while name.lower().endswith(PACKED):
        name = name[: name.rindex(".")]
    return name


class Unpacked:
    """A raw file's text as a stream of bytes in UTF-8.

    Its end is reached once the raw file's end is, so all of it is read and its checksums compared.

    Args:
        path: of the file; a zip is opened by it.
        raw: the file, read from its start on.

    Raises `ValueError` for what is not text, or not one text, and what is damaged.
    """

    def __init__(self, path: Path, raw: Any) -> None:
        self.path, self.kinds = path, list[str]()
        self._layers = [_Pushed(raw)]
        with self._told():
            while (kind := kind_of(head := self._layers[-1].peek(HEAD_BYTES))) != TEXT:
                self.kinds.append(kind)
                self._check_kind()
                self._layers.append(_Pushed(self._opened(kind)))
            if not self.kinds and path.name.lower().endswith(PACKED) and b"\0" in head:
                raise EOFError("its first bytes are of nothing that is known")

    def _check_kind(self) -> None:
        """Refuse what is not read here."""
        *outer, kind = self.kinds
        what = f"{self.path} is {' in '.join(reversed(self.kinds))}"
        if kind in OTHERS:
            raise ValueError(f"{what}: {OTHERS[kind][1]}")
        if kind == PARQUET:
            advice = "unpack it" if outer else "this data set's log is text (custom reads Parquet)"
            raise ValueError(f"{what}; {advice}")
        if len(outer) >= MAX_DEPTH or (kind == "zip" and outer):
            raise ValueError(f"{what}; unpack it")

    def _opened(self, kind: str) -> Any:
        stream: Any = self._layers[-1]
        if kind == "gzip":
            return gzip.GzipFile(fileobj=stream, mode="rb")
        if kind == "bzip2":
            return bz2.BZ2File(stream)
        if kind == "xz":
            return lzma.LZMAFile(stream)
        if kind == "zip":
            return _OneOfZip(self.path, stream)
        if kind == "tar":
            return _OneOfTar(self.path, stream)
        return _Recoded(stream, kind)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none: the end."""
        with self._told():
            data = self._layers[-1].read(size)
            if not data and size:
                for layer in reversed(self._layers):
                    while layer.read(PIECE_BYTES):
                        pass
        return data

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say of which file an error of a container is."""
        try:
            yield
        except (*DAMAGE, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk: gzip's and bz2's errors have no number
            kind = ", ".join(self.kinds) or self.path.suffix.lower().removeprefix(".")
            kind = "gzip" if kind == "gz" else kind
            raise ValueError(
                f"{self.path} is truncated, corrupt or not {kind} ({error}); fetch it again"
            ) from error


class _Pushed:
    """A stream whose first bytes can be looked at before they are read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._head = stream, b""

    def peek(self, size: int) -> bytes:
        while len(self._head) < size and (more := self._stream.read(size - len(self._head))):
            self._head += more
        return self._head

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._stream.read(size - len(head)) if len(head) < size else head


class _Recoded:
    """Text of another encoding in UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()

    def read(self, size: int) -> bytes:
        while True:  # half a character gives none
            data = self._stream.read(size)
            text = self._decoder.decode(data, final=not data)
            if text or not data:
                return text.encode()


class _OneOfZip:
    """The file in a zip, of which `raw` is read as far as the zip was: it is hashed and counted."""

    def __init__(self, path: Path, raw: Any) -> None:
        self._raw, self._num_read = raw, 0
        self._file = open(path, "rb")  # of its own, for a zip is read from its end
        archive = zipfile.ZipFile(self._file)
        infos = archive.infolist()
        if any(info.filename.startswith("xl/") for info in infos):
            raise ValueError(f"{path} is an Excel workbook; {AS_CSV}")
        infos = [info for info in infos if not info.is_dir() and _is_log(info.filename)]
        names = [info.filename for info in infos]
        if len(names) != 1:
            raise _not_one(path, "zip", names, "unzip")
        if infos[0].flag_bits & 1:
            raise ValueError(f"{path} is an encrypted zip; unpack it with unzip")
        try:
            self._member = archive.open(infos[0])
        except NotImplementedError as error:
            raise ValueError(f"{path}: {error} here; unpack it with unzip or 7z x") from error

    def read(self, size: int) -> bytes:
        data = self._member.read(size)
        position = self._file.tell()
        if data and position > self._num_read:
            self._raw.read(position - self._num_read)
            self._num_read = position
        return data


class _OneOfTar:
    """The file in a tar that is read as a stream."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._archive = path, tarfile.open(fileobj=stream, mode="r|")
        first = self._next()
        if first is None:
            raise _not_one(path, "tar", [], "tar -xf")
        self._first, self._is_alone = first.name, False
        member = self._archive.extractfile(first)
        assert member is not None  # it is a regular file
        is_small = first.size <= SMALL_BYTES
        self._member: Any = io.BytesIO(member.read()) if is_small else member
        if is_small:
            self._check_alone()

    def _next(self) -> tarfile.TarInfo | None:
        members = iter(self._archive.next, None)
        return next((m for m in members if m.isfile() and _is_log(m.name)), None)

    def _check_alone(self) -> None:
        if not self._is_alone and (second := self._next()) is not None:
            raise _not_one(self._path, "tar", [self._first, second.name, "..."], "tar -xf")
        self._is_alone = True

    def read(self, size: int) -> bytes:
        data = self._member.read(size)
        if not data:
            self._check_alone()
        return data


def _is_log(name: str) -> bool:
    return not any(map(is_by_product, PurePosixPath(name).parts))


def _not_one(path: Path, kind: str, names: list[str], command: str) -> ValueError:
    held = f"more than one file ({', '.join(names[:5])})" if names else "no file"
    return ValueError(
        f"{path} is a {kind} that holds {held}; unpack it with {command}, and name the log itself"
    )
