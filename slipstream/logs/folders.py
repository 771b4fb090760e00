"""Folders of a log's files: plain ones, and Hive's, whose names `day=2024-03-01` hold a column."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from urllib.parse import unquote

from slipstream.tools.places import regular_file

REPORT_END = ".npz.columns.txt"  # of a processed file's report
EMPTY = "__HIVE_DEFAULT_PARTITION__"
# What preprocessing leaves in a folder; an interrupted run, a .partial or .work, too.
OURS = (".npz", ".npz.partial", ".npz.work", REPORT_END, REPORT_END + ".partial")
# Folders that say which of a table's files count.
TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


def is_by_product(name: str) -> bool:
    """Whether a file is what Spark, a Mac or a download leaves beside the parts of a log."""
    return name.startswith((".", "_")) or name.endswith((".crc", "~"))


def log_files(folder: Path, columns: str | Path | None = None) -> list[Path]:
    """The files of the log in a folder, or in its sub-folders `key=value`, in natural order.

    Numbers in names go by their value (`log_9` before `log_10`). By-products and the column file
    are left out, and said. Raises `ValueError` for other sub-folders, or such of other keys, and
    for pipes, and `FileNotFoundError` where there is no file.
    """
    found: list[Path] = []
    left_out: list[str] = []
    described = Path(columns) if columns is not None and Path(columns).exists() else None
    _search(folder, folder, described, found, left_out)
    if not found:
        raise FileNotFoundError(f"{folder} holds no files; expected a log")
    found.sort(key=lambda path: _natural(name_in(folder, path)))
    names = [name_in(folder, path) for path in found]
    keys = {name: tuple(folder_values(name)) for name in names}
    for name in names:
        if keys[name] != keys[names[0]] or len(keys[name]) != name.count("/"):
            raise ValueError(
                f"{folder} is no log: the folders of {names[0]} and of {name} differ in their keys;"
                " expected the same keys, each once, for all files"
            )
    if left_out:
        print(f"left out, as no part of a log: {', '.join(sorted(left_out))}")
    return found


def _search(
    root: Path, folder: Path, columns: Path | None, found: list[Path], left_out: list[str]
) -> None:
    for path in folder.iterdir():
        name = name_in(root, path)
        if path.name.endswith(OURS):
            continue
        if path.name in TABLES:
            raise ValueError(
                f"{root} is a {TABLES[path.name]} table, of whose files not all hold rows of today;"
                " export it as plain Parquet"
            )
        if is_by_product(path.name):
            left_out.append(name)
        elif path.is_file():
            if columns is not None and _is_copy(path, columns):
                left_out.append(name)
            else:
                found.append(path)
        elif path.is_dir() and "=" in path.name:
            _search(root, path, columns, found, left_out)
        elif path.is_dir() and any(path.glob("*.npz")):
            left_out.append(name)  # a segregated log, which lies beside the processed one
        elif path.is_dir():
            raise ValueError(
                f"{root} holds the folder {name}; expected files, or else folders named key=value,"
                " as day=2024-03-01"
            )
        else:  # a pipe, or a link that leads nowhere: its rows would be missed
            regular_file(path, "delete it, or put the file there")


def _is_copy(path: Path, columns: Path) -> bool:
    """Whether a file is the column file, or one of the same text."""
    is_same = path.stat().st_size == columns.stat().st_size
    return path.samefile(columns) or (is_same and path.read_bytes() == columns.read_bytes())


def root_of(path: Path, given: Sequence[str | Path]) -> Path | None:
    """The folder that was given and holds a file; None: the file itself was."""
    folders = (Path(root) for root in given if Path(root).is_dir())
    return next((folder for folder in folders if folder in path.parents), None)


def name_in(root: Path | None, path: Path) -> str:
    """A file's name: its path below the log's folder, by which two `part-0` are told apart."""
    return path.name if root is None else path.relative_to(root).as_posix()


def folder_values(name: str) -> dict[str, str]:
    """The columns that the folders in a file's name hold, as text; empty: a missing value."""
    values = {}
    for folder in PurePath(name).parts[:-1]:
        key, _, value = folder.partition("=")
        try:
            text = unquote(value, errors="strict")
            text.encode()
            values[unquote(key, errors="strict")] = "" if text == EMPTY else text
        except UnicodeError as error:
            raise ValueError(f"the folder {folder!r} is not UTF-8 ({error}); rename it") from error
    return values


def polars_path(path: Path) -> str:
    """A path as polars takes it: of its bytes in UTF-8, whatever the locale makes of them."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its name is not UTF-8, which Parquet files need") from error


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key by which numbers in names are in order of their value."""
    words = re.split(r"(\d+)", name)
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words], name
