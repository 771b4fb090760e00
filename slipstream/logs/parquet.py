"""Parquet files as frames of texts and lists of texts, in which the checks of text logs hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.logs.folders import polars_path
from slipstream.logs.formats import CATEGORY_KINDS, LogFormat
from slipstream.logs.parsing import with_fixed
from slipstream.logs.rows import import_polars

PARQUET_ROWS = 1 << 16


def parquet_blocks(
    path: Path, log_format: LogFormat, see: Callable[[str, int], None]
) -> Iterator[Any]:
    """A file's rows, as `frame_blocks` has them."""
    with _scanned(path) as table:
        yield from frame_blocks(path, table, log_format, see)


def frame_blocks(
    source: Path | str, table: Any, log_format: LogFormat, see: Callable[[str, int], None]
) -> Iterator[Any]:
    """A lazy frame's rows as frames of texts, columns `0`, `1`, ... as the format has them.

    A category that is a whole float is the integer: programs store a column of integers as floats
    once one is missing. `see` is told of how many there were. Raises `ValueError`, naming `source`,
    for a column that is not there, or of a type that its kind does not have.
    """
    pl = import_polars()
    types, in_file = _types_of(source, table, log_format), log_format.in_file
    # By position: `pl.col` would take a name such as ^a.*$ for a pattern.
    places = [list(types).index(name) for name in in_file.names]
    columns = list(zip(places, in_file.kinds, in_file.names, strict=True))
    for start in range(0, _num_rows(table), PARQUET_ROWS):
        block = table.slice(start, PARQUET_ROWS)
        frame = block.select(
            pl.nth(place).alias(str(column)) for column, (place, *_) in enumerate(columns)
        ).collect()
        texts = []
        for (_, kind, name), values in zip(columns, frame, strict=True):
            if kind in CATEGORY_KINDS and _inner(types[name]).is_float():
                see(f"whole floats of {name}, taken as integers", _num_whole(values))
            texts.append(_texts(values, kind))
        yield with_fixed(pl.DataFrame(texts), log_format)


def typed_format(path: Path, log_format: LogFormat) -> LogFormat:
    """The format of a file, in which columns that are no texts have the usual spelling."""
    with _scanned(path) as table:
        return log_format.unspelled(typed_names(table.collect_schema()))


def typed_names(types: Mapping[str, Any]) -> list[str]:
    """The columns that hold numbers, times and the like, which no spelling is of."""
    pl = import_polars()
    return [
        name for name, dtype in types.items() if dtype not in (pl.String, pl.Categorical, pl.Enum)
    ]


@contextmanager
def _scanned(path: Path) -> Iterator[Any]:
    """A file as polars' lazy frame; `ValueError` where it cannot be read."""
    pl = import_polars()
    try:
        yield pl.scan_parquet(polars_path(path), glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{path} is corrupt, or not Parquet ({error})") from error


def num_rows_of(path: Path) -> int:
    """The rows that a file's footer names; `ValueError` where it cannot be read."""
    with _scanned(path) as table:
        return _num_rows(table)


def names_of(path: Path) -> list[str]:
    """The names of a file's columns; `ValueError` where it cannot be read."""
    with _scanned(path) as table:
        return list(table.collect_schema())


def _num_rows(table: Any) -> int:
    return table.select(import_polars().len()).collect().item()


def _inner(dtype: Any) -> Any:
    """The type of a list's elements, or of values that are no lists."""
    pl = import_polars()
    return dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else dtype


def _num_whole(values: Any) -> int:
    values = values.explode() if values.dtype.is_nested() else values
    return int((values == values.floor()).sum())


def _texts(values: Any, kind: str) -> Any:
    """A column as texts, empty ones null; of kind list as lists of texts."""
    pl = import_polars()
    dtype = values.dtype
    if isinstance(dtype, pl.Array):
        values, dtype = values.arr.to_list(), pl.List(dtype.inner)
    if isinstance(dtype, pl.List):
        return values.list.eval(_as_text(pl.element(), dtype.inner, kind))
    texts = values.to_frame().select(_as_text(pl.nth(0), dtype, kind)).to_series()
    return texts.replace("", None)


def _as_text(values: Any, dtype: Any, kind: str) -> Any:
    pl = import_polars()
    if dtype == pl.Boolean:
        values = values.cast(pl.Int8)
    if dtype.is_float() and kind in (*CATEGORY_KINDS, "day", "order"):
        values = values.fill_nan(None) if kind in CATEGORY_KINDS else values
        # Of texts that no integer fits the float's own is taken.
        whole = pl.when(values == values.floor()).then(values).cast(pl.Int64, strict=False)
        return whole.cast(pl.String).fill_null(values.cast(pl.String))
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        values = values.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    return values.cast(pl.String)


def check_types(files: Sequence[tuple[Path, Mapping[str, str]]], log_format: LogFormat) -> None:
    """Raise `ValueError` where the parts of a log have a category in types that do not compare.

    `files`: paths, and the columns that the names of their folders hold.
    """
    pl = import_polars()
    first: dict[str, tuple[Path, Any]] = {}
    for path, folders in files:
        of_file = log_format.with_folders(folders)
        in_file = of_file.in_file
        categories = [in_file.names[column] for column in in_file.columns(*CATEGORY_KINDS)]
        with _scanned(path) as table:
            types = _types_of(path, table, of_file)
        for name in categories:
            if types[name] == pl.Null:  # of a part without rows, or without values
                continue
            before, other = first.setdefault(name, (path, types[name]))
            if _family(other) != _family(types[name]):
                raise ValueError(
                    f"column {name!r} is {_shown(other)} in {before}, and {_shown(types[name])} in "
                    f"{path}: the same value would be two; write both alike"
                )


def _types_of(path: Path | str, table: Any, log_format: LogFormat) -> dict[str, Any]:
    """The types of a file's columns; `ValueError` for one that its kind may not have."""
    pl = import_polars()
    types = dict(table.collect_schema())
    try:
        log_format.check_folders(list(types))
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None
    in_file = log_format.in_file
    for name, kind in zip(in_file.names, in_file.kinds, strict=True):
        if name not in types:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(types)[:200]}")
        dtype = types[name]
        is_list = isinstance(dtype, (pl.List, pl.Array))
        if is_list and kind in ("string", "hex"):
            raise ValueError(
                f"{path}: column {name!r} holds lists; say in the column file how many values it "
                'has at most, as "values": 6'
            )
        wrong = is_list and kind != "list"
        inner = _inner(dtype)
        wrong |= inner.is_nested() or inner in (pl.Binary, pl.Object, pl.Time, pl.Duration)
        wrong |= inner.is_temporal() and kind not in ("day", "order", "string", "list", "group")
        if wrong:
            raise ValueError(f"{path}: column {name!r} is {_shown(dtype)}, which no {kind} is")
    return types


def _family(dtype: Any) -> str:
    pl = import_polars()
    dtype = _inner(dtype)
    if dtype.is_numeric() or dtype == pl.Boolean:
        return "number"
    return "time" if dtype.is_temporal() else "text"


def _shown(dtype: Any) -> str:
    return str(dtype).lower()
