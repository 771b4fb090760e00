"""A user's column file: which of a log's columns is what; README.md has an example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slipstream.logs import transforms
from slipstream.logs.formats import KAGGLE_DAYS, Details, LogFormat, Split, split_of
from slipstream.logs.spelling import DECIMAL_KINDS, USUAL, Spelling
from slipstream.tools.places import regular_file
from slipstream.tools.schema import check_nesting, decode_json

SEPARATORS = {"csv": ",", "tsv": "\t", "tab": "\t"}
CUSTOM_KEYS = (
    "label, dense, categorical, day, order, weight, separator, decimal, header, quote, columns,"
    " days, nulls, split"
)
Column = tuple[Any, str, Details]  # its name, kind and details
MAX_BYTES, MAX_ITEMS = 1 << 24, 1 << 20  # of a column file, and values in it
MAX_VALUES = 4096  # of a list: each is an id column of every row


def read_column_file(path: str | Path) -> LogFormat:
    """The format that a JSON or YAML column file describes; README.md has an example.

    Raises `ValueError` with what is wrong in it, and `FileNotFoundError`.
    """
    path = regular_file(path, "--columns takes a JSON or YAML file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: {size:,} bytes; expected a column file, at most {MAX_BYTES:,}")
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    try:
        is_yaml = path.suffix in (".yaml", ".yml")
        described = _load_yaml(text) if is_yaml else decode_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path}: expected an object with keys {CUSTOM_KEYS}")
    try:
        return _format_of(described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("pip install pyyaml, or write the column file as JSON") from error
    try:
        found = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(str(error)) from error
    check_nesting(found, MAX_ITEMS)  # an alias may stand for what holds it
    return found


def _format_of(described: dict[str, Any]) -> LogFormat:
    unknown = set(described) - set(CUSTOM_KEYS.split(", "))
    if unknown:
        raise ValueError(f"unknown key {min(map(str, unknown))!r}; expected {CUSTOM_KEYS}")
    if "day" in described and "order" in described:
        raise ValueError("got both day and order; expected one of them, or none")
    columns: list[Column] = [_spelled(described.get("label"), "label", "positive, negative")]
    columns += [_dense(column) for column in _list_of(described, "dense")]
    columns += [_categorical(column) for column in _list_of(described, "categorical")]
    columns += [
        _spelled(described[key], key, "format") for key in ("day", "order") if key in described
    ]
    columns += [(described["weight"], "weight", Details())] if "weight" in described else []
    decimal = Spelling(decimal=described.get("decimal", "."))
    columns = [
        (name, kind, replace(detail, spelling=decimal) if kind in DECIMAL_KINDS else detail)
        for name, kind, detail in columns
    ]
    kind_of: dict[str, str] = {}
    for name, kind, _ in columns:
        if not isinstance(name, str) or not name:
            raise ValueError(f"got {name!r} for a column of kind {kind}; expected its name")
        if name in kind_of:
            raise ValueError(f"column {name!r} is named twice, as {kind_of[name]} and as {kind}")
        kind_of[name] = kind
    if not {"hex", "string", "list"} & set(kind_of.values()):
        raise ValueError("categorical is empty; expected at least one column")
    details = {name: detail for name, _, detail in columns if detail != Details()}
    for name, detail in details.items():
        _check_table(name, detail, kind_of, details)
    return _with_layout(described, kind_of, tuple(details.items()))


def _check_table(
    name: str, detail: Details, kind_of: dict[str, str], details: dict[str, Details]
) -> None:
    """Raise `ValueError` unless the table that a column shares is there, and of the same kind."""
    if detail.table is None:
        return
    usual = Details()
    kinds = {
        column: details.get(column, usual).kind_of_values(kind) for column, kind in kind_of.items()
    }
    other = details.get(detail.table, usual)
    if kinds.get(detail.table) not in ("string", "hex") or other.table is not None:
        raise ValueError(
            f"{name}: table is {detail.table!r}; expected a categorical column with its own table"
        )
    if kinds[name] != kinds[detail.table]:
        raise ValueError(f"{name} is {kinds[name]}, and {detail.table} is {kinds[detail.table]}")


def _with_layout(
    described: dict[str, Any], kind_of: dict[str, str], details: tuple[tuple[str, Details], ...]
) -> LogFormat:
    separator = separator_of(described.get("separator", ","))
    header, quote = described.get("header", True), described.get("quote", separator == ",")
    if not isinstance(header, bool) or not isinstance(quote, bool):
        raise ValueError("header and quote are true or false")
    num_days = described.get("days", KAGGLE_DAYS)
    if not isinstance(num_days, int) or num_days < 2:
        raise ValueError(f"days is {num_days!r}; expected a whole number, at least 2")
    names = list(kind_of)
    if not quote:
        check_separator(separator, details)
    if separator != "parquet" and not header:
        names = [str(name) for name in _list_of(described, "columns")]
        missing = [name for name in kind_of if names.count(name) != 1]
        if missing:
            raise ValueError(
                f"columns does not name {missing[0]!r} once; without a header, list all columns in "
                "order"
            )
    return LogFormat(
        tuple(kind_of.get(name, "skip") for name in names),
        tuple(names),
        None if separator == "parquet" else separator,
        header and separator != "parquet",
        quote and separator != "parquet",
        num_days,
        order=tuple(kind_of),
        lax=True,
        nulls=_nulls_of(described),
        details=details,
        split=_split_of(described),
    )


def separator_of(separator: Any) -> str:
    """What parts columns: one character, or `parquet`. Raises `ValueError` for anything else."""
    separator = SEPARATORS.get(str(separator), separator)
    is_byte = isinstance(separator, str) and len(separator) == 1 and separator.isascii()
    if separator != "parquet" and (not is_byte or separator in '"\r\n' or separator.isalnum()):
        raise ValueError(f"separator is {separator!r}; expected one character, or parquet")
    return separator


def check_separator(separator: str, details: Iterable[tuple[str, Details]]) -> None:
    """Raise `ValueError` where it stands in the fields, too, which are not quoted."""
    for name, detail in details:
        if detail.values > 1 and detail.separator == separator:
            raise ValueError(f"{name}: separator is {separator!r}, as between columns")
        if detail.spelling.decimal == separator:
            raise ValueError(
                f"{name}: decimal is {separator!r}, as between columns; expected another separator,"
                ' or "quote": true'
            )


def _list_of(described: dict[str, Any], key: str) -> list[Any]:
    values = described.get(key, [])
    if not isinstance(values, list):
        raise ValueError(f"{key} is {values!r}; expected a list of columns")
    return values


def _nulls_of(described: dict[str, Any]) -> tuple[str, ...]:
    nulls = _list_of(described, "nulls")
    if not all(isinstance(marker, str) and marker for marker in nulls):
        raise ValueError(f'nulls is {nulls!r}; expected texts, as ["NULL", "NaN"]')
    return tuple(nulls)


def _split_of(described: dict[str, Any]) -> Split:
    try:
        return split_of(str(described.get("split", "last-day")).replace("last day", "last-day"))
    except ValueError as error:
        raise ValueError(f"split: {error}") from None


def _keys_of(column: dict[str, Any], allowed: str) -> None:
    if unknown := set(column) - set(allowed.split(", ")):
        raise ValueError(
            f"column {column} has {min(map(str, unknown))!r}; expected some of {allowed}"
        )


def _one_of(column: dict[str, Any], key: str, choices: Sequence[str]) -> str:
    value = column.get(key, choices[0])
    if value not in choices:
        raise ValueError(f"column {column}: {key} is {value!r}; expected {' or '.join(choices)}")
    return value


def _spelled(column: Any, kind: str, keys: str) -> Column:
    """A column is its name, or an object that also says how its fields are spelled."""
    if not isinstance(column, dict):
        return column, kind, Details()
    _keys_of(column, f"name, {keys}")
    given = {key: column[key] for key in keys.split(", ") if key in column}
    lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    try:
        spelling = Spelling(**{**given, **lists})
        if given and spelling == USUAL:
            raise ValueError(f"{min(given)} is {given[min(given)]!r}; expected it to say something")
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None
    return column.get("name"), kind, Details(spelling=spelling)


def _dense(column: Any) -> Column:
    """A column is its name, or an object; of choices the first is the usual one."""
    if not isinstance(column, dict):
        return column, "count", Details()
    _keys_of(column, "name, type, transform")
    kind = _one_of(column, "type", ("count", "number"))
    return (
        column.get("name"),
        kind,
        Details(transform=_one_of(column, "transform", transforms.KINDS)),
    )


def _categorical(column: Any) -> Column:
    if not isinstance(column, dict):
        return column, "string", Details()
    _keys_of(column, "name, type, values, separator, pool, table")
    name, kind = column.get("name"), _one_of(column, "type", ("string", "hex"))
    table = column.get("table", name)
    if "table" in column and not isinstance(table, str):
        raise ValueError(f"{name}: table is {table!r}; expected a column's name")
    table = None if table == name else table
    values = column.get("values", 0)
    if type(values) is not int or not 0 <= values <= MAX_VALUES or ("values" in column) > values:
        raise ValueError(f"{name}: values is {values!r}; expected 1 to {MAX_VALUES}")
    if values < 2 and not {"pool", "separator"} & set(column):
        return name, kind, Details(values=values, table=table)
    if not values:
        raise ValueError(f"{name} has a pool or separator; expected values, the most it may have")
    separator = column.get("separator", "|")
    if not isinstance(separator, str) or len(separator) != 1 or not separator.isascii():
        raise ValueError(f"{name}: separator is {separator!r}; expected one character")
    pool = _one_of(column, "pool", ("sum", "mean", "sequence"))
    return name, "list", Details("log", values, separator, pool, table, kind)
