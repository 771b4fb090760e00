"""Each data set's raw files: where they come from, what they are called, about how many rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slipstream.logs.formats import LogFormat
from slipstream.logs.rawfile import RawFile
from slipstream.logs.rows import import_polars

SAMPLE_BYTES = 1 << 20
GZIP_RATIO = 3.5  # a log's size over its .gz's, for the estimate alone


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
        "Taobao: https://tianchi.aliyun.com/dataset/649, archive UserBehavior.csv.zip, unpacked to"
        " UserBehavior.csv",
    ),
    "custom": DataSet((), "your own log: --columns says what its columns are"),
}


def find_raw_files(data_set: str, raw_data_file: str | Path, num_days: int) -> list[Path]:
    """The log's files in order; each plain or `.gz`. `FileNotFoundError` names a missing one.

    A folder stands for the data set's usual file in it; of a custom log, for all its files by name,
    numbers in names by their value (`log_9` before `log_10`), but for what `is_by_product` knows.
    """
    raw = Path(raw_data_file)
    if data_set == "custom" and raw.is_dir():
        # An interrupted run leaves a .npz.partial there.
        ours = (".npz", ".npz.partial")
        found = [p for p in raw.iterdir() if p.is_file() and not p.name.endswith(ours)]
        files = sorted((p for p in found if not is_by_product(p.name)), key=_natural)
        if not files:
            raise FileNotFoundError(f"{raw} holds no files; expected a log")
        if others := sorted(p.name for p in found if is_by_product(p.name)):
            print(f"left out, as no part of a log: {', '.join(others)}")
        return files
    names = DATA_SETS[data_set].names
    if data_set == "terabyte":
        prefix = raw / names[0] if raw.is_dir() else raw
        wanted = [[prefix.with_name(f"{prefix.name}_{day}")] for day in range(num_days)]
        advice = f"--num-days {num_days} reads day_0 to day_{num_days - 1}, each plain or .gz. "
    else:
        wanted = [[raw / name for name in names] if raw.is_dir() else [raw]]
        advice = "--raw-data-file takes the file, plain or .gz, or its folder. "
    paths = []
    for choices in wanted:
        candidates = [name.with_name(name.name + end) for name in choices for end in ("", ".gz")]
        found = [path for path in candidates if path.is_file()]
        if not found:
            page = DATA_SETS[data_set].page
            raise FileNotFoundError(
                f"{choices[0]} does not exist, nor does its .gz; {advice}Get it from {page}"
            )
        paths.append(found[0])
    return paths


def is_by_product(name: str) -> bool:
    """Whether a file is what Spark, a Mac or a download leaves beside the parts of a log."""
    return name.startswith((".", "_")) or name.endswith((".crc", "~"))


def _natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """A key by which numbers in names are in order of their value."""
    words = re.split(r"(\d+)", path.name)
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words], path.name


def default_processed_file(data_set: str, raw_data_file: str | Path) -> Path:
    """`<stem>_processed.npz` beside the raw file (in it, where the raw path is a folder)."""
    raw = Path(raw_data_file)
    if raw.is_dir():
        raw /= (*DATA_SETS[data_set].names, "log")[0]
    name = raw.name.removesuffix(".gz")
    for suffix in (".txt", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(suffix)
    return raw.with_name(name + "_processed.npz")


def estimate_rows(paths: Sequence[Path], log_format: LogFormat) -> tuple[int, float]:
    """Lines of all files, and the share of positive labels, from the first one's first lines.

    (Of Parquet: the rows that its footers name, and 1.)
    """
    if log_format.separator is None:
        pl = import_polars()
        num_rows = 0
        for path in paths:
            try:
                num_rows += pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
                raise ValueError(f"{path} is corrupt, or not Parquet") from error
        return num_rows, 1.0
    sample = next(RawFile(paths[0]).blocks(SAMPLE_BYTES))
    num_lines = sample.count(b"\n")
    num_positive = num_lines
    if log_format.kinds[0] == "label":
        num_positive = sample.count(b"\n1") + sample.startswith(b"1")
    sizes = (path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in paths)
    return round(sum(sizes) * num_lines / len(sample)), num_positive / num_lines
