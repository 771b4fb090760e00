"""Rows of a log as a trained model takes them: the ids of its own log, one row a line, in order.

A label, and a column that only orders rows or weighs them, may be missing. Lines that are blank or
bad have no row, but a place. A value that the model's log never had takes the row that rare values
share, or is absent.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slipstream.logs import taobao
from slipstream.logs.columnfile import check_separator
from slipstream.logs.containers import PARQUET, kind_of_file
from slipstream.logs.features import FeatureLayout
from slipstream.logs.formats import FORMATS, LogFormat, format_of
from slipstream.logs.parquet import frame_blocks, names_of, typed_names
from slipstream.logs.parsing import split_line
from slipstream.logs.rawfile import RawFile, Tally, parse_checked, parsed_blocks
from slipstream.logs.rows import ABSENT, Rows, folded
from slipstream.logs.spelling import DECIMAL_KINDS, Spelling
from slipstream.logs.transforms import Transforms
from slipstream.logs.vocabulary import Vocabulary

HEAD_BYTES = 1 << 16  # a line is shorter
LABELS = ("label", "behaviour")


class Encoded(NamedTuple):
    """Rows in the model's terms.

    Attributes:
        dense: (n, D) as they are stored in a processed file.
        ids: (n, C) int32; -1: absent.
        unseen: (C,) how many values of each column the model's log did not have.
    """

    dense: np.ndarray
    ids: np.ndarray
    unseen: np.ndarray


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The rows of several, at least one, in their order."""
    dense, ids, unseen = zip(*parts, strict=True)
    return Encoded(np.concatenate(dense), np.concatenate(ids), np.sum(unseen, axis=0))


@dataclass(frozen=True)
class Block:
    """Lines of a log.

    Attributes:
        has_row: (lines,) bool; blank and bad ones have none.
        encoded: the others.
        labels: (n,) 0 or 1; None: the log has none.
        weights: (n,) float32; None: it has none.
        groups: (n,) texts of the column that was asked for; None: none was.
    """

    has_row: np.ndarray
    encoded: Encoded
    labels: np.ndarray | None
    weights: np.ndarray | None
    groups: Any


class Reader:
    """Reads new logs as the model's own was read.

    Args:
        vocabulary: of the model, with how its log was read.
        layout: of its id columns.
        transforms: of its dense columns, for values that are empty.

    Raises `ValueError` where these do not fit together.
    """

    def __init__(
        self, vocabulary: Vocabulary, layout: FeatureLayout, transforms: Transforms
    ) -> None:
        described = vocabulary.described
        self.vocabulary, self.layout, self.transforms = vocabulary, layout, transforms
        self.data_set: str = described["data_set"]
        self.modulus: int = described["max_ind_range"]
        if self.data_set == "custom":
            self.log_format = format_of(described["columns"] or {})
        elif self.data_set == "taobao":
            self.log_format = taobao.FORMAT
        elif self.data_set in FORMATS:
            self.log_format = FORMATS[self.data_set]
        else:
            raise ValueError(f"its log is of data set {self.data_set!r}, which is not known")
        self.history = taobao.history_of(layout)
        self.schema = self.log_format.schema
        if self.data_set == "taobao":
            self.schema = taobao.schema_of(self.history)
        self._check()
        self._moduli = (0,) * len(vocabulary.tables)
        if self.modulus > 0 and self.log_format.lax:
            self._moduli = self.log_format.text_moduli(self.modulus)
        names = self.schema.table_names
        self._integers = self.log_format.of_tables(vocabulary.number_tables(names))
        kinds = zip(self.log_format.names, self.log_format.kinds, strict=True)
        self._judging = {n for n, k in kinds if k in ("label", "weight")}
        self._means = np.array([column.mean for column in transforms.columns], np.float32)

    def _check(self) -> None:
        schema, layout = self.schema, self.layout
        wanted = (len(schema.dense_names), len(schema.table_names), schema.num_columns)
        found = (len(self.transforms.columns), len(self.vocabulary.tables), layout.num_columns)
        same = (schema.layout.table_of_column == layout.table_of_column).all()
        if wanted != found or not same:
            raise ValueError(f"its log has {wanted} columns, and the model takes {found}")

    @property
    def column_names(self) -> list[str]:
        """Of each id column its feature's."""
        return [f.name for f in self.layout.features for _ in f.columns]

    def has_header(self, path: Path) -> bool:
        """Whether a file names its columns."""
        log_format = _as_stored(path, self.log_format)
        return log_format.separator is None or log_format.header

    def written_otherwise(self, separator: str, decimal: str, paths: Sequence[Path]) -> Reader:
        """A reader of files with another separator, or another decimal character in texts, than the
        model's own log; empty: the same. Raises `ValueError` where they cannot have it.
        """
        if not separator and not decimal:
            return self
        if self.data_set != "custom":
            flag = "--separator" if separator else "--decimal"
            raise ValueError(f"{flag}: the model's log is {self.data_set}'s, which has its own")
        log_format = _with_decimal(self.log_format, decimal) if decimal else self.log_format
        if separator:
            if found := [path for path in paths if kind_of_file(path) == PARQUET]:
                raise ValueError(f"--separator: {found[0]} is Parquet, which has none")
            log_format = _as_stored(paths[0], log_format)
            quote = log_format.quote or separator == ","
            log_format = replace(log_format, separator=separator, quote=quote)
        if log_format.separator and not log_format.quote:
            check_separator(log_format.separator, log_format.details)
        reader = copy.copy(self)
        reader.log_format = log_format
        return reader

    def encode(self, rows: Rows) -> Encoded:
        """Parsed rows in the model's terms."""
        codes, tables = rows.codes, self.vocabulary.tables
        ids = np.empty(codes.shape, np.int32)
        unseen = np.zeros(codes.shape[1], np.int64)
        for column, table in enumerate(self.layout.table_of_column.tolist()):
            of_column = np.ascontiguousarray(codes[:, column])
            is_absent = of_column == ABSENT
            if modulus := self._moduli[table]:
                of_column = folded(of_column, modulus)
            found = tables[table].ids_of(of_column)
            found[is_absent] = -1
            is_unseen = (found < 0) & ~is_absent
            unseen[column] = int(is_unseen.sum())
            rare_id = tables[table].rare_id
            if rare_id is not None:
                found[is_unseen] = rare_id
            ids[:, column] = found
        dense = rows.dense
        if dense.dtype.kind == "f" and np.isnan(dense).any():  # empty, of a standardized column
            dense = np.where(np.isnan(dense), self._means, dense)
        return Encoded(dense, ids, unseen)

    def blocks(
        self, raw: RawFile, tally: Tally, block_bytes: int, group: str = ""
    ) -> Iterator[Block]:
        """Yield the lines of a file. `group`: a column whose texts are kept.

        Raises `ValueError` for a bad line, where `tally` takes no more, and for a column that is
        not there.
        """
        if self.data_set == "taobao":
            yield from self._candidates(raw, tally, block_bytes, group)
            return
        log_format = _as_stored(raw.path, self.log_format)
        is_parquet = log_format.separator is None
        fields = names_of(raw.path) if is_parquet else _first_fields(raw.path, log_format)
        fields = [*fields, *(name for name in raw.folder_values if name in log_format.names)]
        log_format, has_labels = for_scoring(str(raw.path), log_format, fields, group)
        log_format = replace(log_format, integers=self._integers)
        parsed_of = parsed_blocks(raw, log_format, block_bytes, self.modulus, tally, self.encode)
        for parsed in parsed_of:
            rows = parsed.rows
            labels, weights = (rows.labels, rows.weights) if has_labels else (None, None)
            yield Block(parsed.has_row(), parsed.made, labels, weights, rows.groups)

    def of_frame(self, frame: Any) -> Encoded:
        """The rows of a polars frame whose columns are named as the log's.

        (Where lines have no names, as Criteo's: or others, in the order of a line.) Raises
        `ValueError` for a column that is not there, and for a value that is none of its kind.
        """
        is_taobao, history = self.data_set == "taobao", taobao.History(self.history)
        modulus = -1 if is_taobao else self.modulus  # the history's, of Taobao
        fields, known = list(frame.columns), self.log_format
        log_format = replace(known, separator=None, header=False, quote=False)
        names = list(known.names)
        if not (known.header or known.separator is None or set(fields) & set(names)):
            if len(fields) == len(names) - 1:
                names.remove(
                    next(n for n, k in zip(names, known.kinds, strict=True) if k in LABELS)
                )
            if len(fields) == len(names):
                fields, frame = names, frame.rename(dict(zip(frame.columns, names, strict=True)))
        # Labels and weights decide nothing here, and may be empty.
        fields = [name for name in fields if name not in self._judging]
        if not is_taobao:
            log_format, _ = for_scoring("the frame", log_format, fields, "")
            frame = frame.select(fields)
        log_format = log_format.unspelled(typed_names(frame.schema))
        log_format = replace(log_format, integers=self._integers)
        dense = np.empty((0, len(self.schema.dense_names)), self.schema.dense_type)
        codes = np.empty((0, self.schema.num_columns), np.uint64)
        found, first = [self.encode(Rows(np.empty(0, np.int8), dense, codes))], 1
        for block in frame_blocks("the frame", frame.lazy(), log_format, lambda *_: None):
            parsed = parse_checked(block, log_format, modulus, skip=False)
            for index, reason in parsed.faults[:1]:
                raise ValueError(f"the frame, row {first + index}{reason}")
            rows = history.candidates(parsed.rows, self.modulus) if is_taobao else parsed.rows
            found.append(self.encode(rows))
            first += parsed.num_lines
        return joined(found)

    def _candidates(
        self, raw: RawFile, tally: Tally, block_bytes: int, group: str
    ) -> Iterator[Block]:
        """Taobao's lines: each a candidate, the clicks before it in the file its user's history."""
        if group:
            raise ValueError("--by: Taobao's lines say what was clicked, not what was not")
        history = taobao.History(self.history)
        for parsed in parsed_blocks(raw, self.log_format, block_bytes, -1, tally):
            rows = history.candidates(parsed.rows, self.modulus)
            yield Block(parsed.has_row(), self.encode(rows), None, None, None)


def _with_decimal(log_format: LogFormat, decimal: str) -> LogFormat:
    details = dict(log_format.details)
    for column in log_format.columns(*DECIMAL_KINDS):
        spelling = Spelling(decimal=decimal)
        details[log_format.names[column]] = replace(log_format.detail(column), spelling=spelling)
    return replace(log_format, details=tuple(details.items()))


def _as_stored(path: Path, log_format: LogFormat) -> LogFormat:
    if kind_of_file(path) == PARQUET:
        return replace(log_format, separator=None, header=False, quote=False)
    if log_format.separator is None:
        return replace(log_format, separator=",", header=True, quote=True)
    return log_format


def for_scoring(
    source: str, log_format: LogFormat, fields: Sequence[str], group: str
) -> tuple[LogFormat, bool]:
    """How to read rows that are scored, and whether they have labels.

    `fields`: the names of the columns that there are, or, where lines are not below a header, the
    first line's fields; `source`: for errors.
    """
    kind_of = dict(zip(log_format.names, log_format.kinds, strict=True))
    (label,) = (name for name, kind in kind_of.items() if kind in LABELS)
    order = log_format.order or log_format.names
    is_parquet = log_format.separator is None
    if is_parquet or log_format.header:
        has_label = label in fields
        weights = [name for name, kind in kind_of.items() if kind == "weight"]
        kind_of |= dict.fromkeys((name for name in weights if name not in fields), "skip")
        if group in fields:
            kind_of.setdefault(group, "skip")
    else:
        has_label = len(fields) != len(kind_of) - 1
        others = [
            name for name, kind in kind_of.items() if kind in ("weight", "day", "order", "skip")
        ]
        if not has_label and others:
            raise ValueError(
                f"{source} has {len(fields)} columns; expected {len(kind_of)}: without a header it"
                f" cannot be told whether {label!r} or {others[0]!r} is missing; give it a header"
            )
    kind_of |= {name: "skip" for name, kind in kind_of.items() if kind in ("day", "order")}
    if group:
        if kind_of.get(group, "list") == "list":
            raise ValueError(f"{source} has no column {group!r} of single values to group by")
        kind_of |= {group: "group"} if kind_of[group] == "skip" else {}
    names = [name for name, kind in kind_of.items() if kind != "skip" or not is_parquet]
    log_format = replace(
        log_format,
        names=tuple(names),
        kinds=tuple(kind_of[name] for name in names),
        order=(*order, *(name for name in names if name not in order)),
        group=group,
    )
    if has_label:
        return log_format, True
    no_click = (*log_format.detail(log_format.names.index(label)).spelling.negative, "0")[0]
    return log_format.with_folders({label: no_click}), False


def _first_fields(path: Path, log_format: LogFormat) -> list[str]:
    """The names in a text file's header, or the fields of a line near its start.

    That one has as many as most have, all or one less.
    """
    lines = next(RawFile(path).blocks(HEAD_BYTES)).split(b"\n")
    if log_format.header:
        return _texts_of(lines[0], log_format)
    found = [_texts_of(line, log_format) for line in lines[:-1] if line not in (b"", b"\r")]
    numbers = Counter(map(len, found))
    num = len(log_format.names)
    usual = max((num, num - 1), key=lambda one: numbers[one])  # any line may be bad
    return next((one for one in found if len(one) == usual), [])


def _texts_of(line: bytes, log_format: LogFormat) -> list[str]:
    try:
        fields = split_line(line.removesuffix(b"\r"), log_format)
    except ValueError:
        return []
    return [field.decode("utf-8", "backslashreplace").strip() for field in fields]
