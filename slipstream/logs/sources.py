"""Each data set's raw files: where they come from, what they are called, about how many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slipstream.logs.containers import PARQUET, kind_of_file, without_packing
from slipstream.logs.folders import log_files
from slipstream.logs.formats import LogFormat
from slipstream.logs.parquet import num_rows_of
from slipstream.logs.rawfile import RawFile
from slipstream.tools.places import kind_of_place, regular_file

SAMPLE_BYTES = 1 << 22
# What may stand behind the name of a data set's file, by preference.
ENDS = ("", ".gz", ".GZ", ".bz2", ".xz", ".zip", ".ZIP", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class DataSet:
    """A data set: the names its raw file may have in a folder, the first one usual; its page."""

    names: tuple[str, ...]
    page: str


DATA_SETS = {
    "kaggle": DataSet(
        ("train.txt",),
        "Criteo Kaggle: https://ailab.criteo.com/ressources/, archive dac.tar.gz, file train.txt",
    ),
    "terabyte": DataSet(
        ("day",),
        "Criteo Terabyte: https://ailab.criteo.com/download-criteo-1tb-click-logs-dataset/, files"
        " day_0.gz to day_23.gz",
    ),
    "avazu": DataSet(
        ("train.csv", "train"),
        "Avazu: https://www.kaggle.com/c/avazu-ctr-prediction/data, file train.gz or train.csv",
    ),
    "taobao": DataSet(
        ("UserBehavior.csv",),
        "Taobao: https://tianchi.aliyun.com/dataset/649, archive UserBehavior.csv.zip",
    ),
    "custom": DataSet((), "your own log: --columns says what its columns are"),
}


def find_raw_files(
    data_set: str,
    raw_data_file: str | Path,
    num_days: int,
    columns: str | Path | None = None,
) -> list[Path]:
    """The log's files in order, plain or packed. `FileNotFoundError` names a missing one.

    `ValueError`: it is a pipe or a device, of which nothing can be read twice.

    A folder stands for the data set's usual file in it; of a custom log, for all its files, as
    `log_files` has them: `columns`, its column file, is none of them.
    """
    raw = Path(raw_data_file)
    if data_set == "custom" and raw.is_dir():
        return log_files(raw, columns)
    names = DATA_SETS[data_set].names
    if data_set == "terabyte":
        prefix = raw / names[0] if raw.is_dir() else raw
        wanted = [[prefix.with_name(f"{prefix.name}_{day}")] for day in range(num_days)]
        advice = f"--num-days {num_days} reads day_0 to day_{num_days - 1}, each plain or packed. "
    else:
        wanted = [[raw / name for name in names] if raw.is_dir() else [raw]]
        advice = "--raw-data-file takes the file, plain or packed, or its folder. "
    paths = []
    for choices in wanted:
        candidates = [name.with_name(name.name + end) for name in choices for end in ENDS]
        there = (path for path in candidates if kind_of_place(path) not in (None, "a folder"))
        found = [path for path in candidates if path.is_file()] or [*map(regular_file, there)]
        if not found:
            page = DATA_SETS[data_set].page
            raise FileNotFoundError(
                f"{choices[0]} does not exist, nor does its .gz or .zip; {advice}Get it from {page}"
            )
        paths.append(found[0])
    return paths


def as_found(log_format: LogFormat, paths: Sequence[Path]) -> LogFormat:
    """The format of a column file, of Parquet where the files are, whatever its separator.

    Raises `ValueError` where some are Parquet and others are not, or none is and all should be.
    """
    kinds = {path: kind_of_file(path) for path in paths}
    first, kind = next(iter(kinds.items()))
    other = next((path for path in paths if (kinds[path] == PARQUET) != (kind == PARQUET)), None)
    if other is not None:
        raise ValueError(
            f"{first} is {kind}, and {other} is {kinds[other]}; expected all of one kind"
        )
    if kind != PARQUET and log_format.separator is None:
        if not first.stat().st_size:
            raise ValueError(f"{first} is empty; expected Parquet")
        raise ValueError(
            f"{first} is {kind}, not Parquet; where that is right, set separator in the column file"
            " to the log's, such as a comma"
        )
    if kind != PARQUET or log_format.separator is None:
        return log_format
    used = [column for column, kind in enumerate(log_format.kinds) if kind != "skip"]
    return replace(
        log_format,
        kinds=tuple(log_format.kinds[column] for column in used),
        names=tuple(log_format.names[column] for column in used),
        separator=None,
        header=False,
        quote=False,
    )


def default_processed_file(data_set: str, raw_data_file: str | Path) -> Path:
    """`<stem>_processed.npz` beside the raw file (in it, where the raw path is a folder)."""
    raw = Path(raw_data_file)
    if raw.is_dir():
        raw /= (*DATA_SETS[data_set].names, "log")[0]
    name = without_packing(raw.name)
    for suffix in (".txt", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(suffix)
    return raw.with_name(name + "_processed.npz")


def estimate_rows(paths: Sequence[Path], log_format: LogFormat) -> tuple[int, float]:
    """Lines of all files, and the share of positive labels, from the first one's first lines.

    (Of Parquet: the rows that its footers name, and 1.)
    """
    if log_format.separator is None:
        return sum(map(num_rows_of, paths)), 1.0
    # Of each kind, the first file's start says how much text there is in a byte.
    lines_per_byte: dict[str, float] = {}
    num_lines, positive_share = 0.0, 1.0
    for path in paths:
        kind = kind_of_file(path)
        if kind not in lines_per_byte:
            raw = RawFile(path)
            sample = next(raw.blocks(SAMPLE_BYTES))
            lines_per_byte[kind] = sample.count(b"\n") / raw.num_read
            is_first = path == paths[0] and log_format.kinds[0] == "label"
            if is_first and not log_format.detail(0).spelling.positive:
                num_positive = sample.count(b"\n1") + sample.startswith(b"1")
                positive_share = num_positive / sample.count(b"\n")
        num_lines += path.stat().st_size * lines_per_byte[kind]
    return round(num_lines), positive_share
