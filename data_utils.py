"""Turn raw Criteo click logs into one processed .npz file that the trainers map into memory.

    python data_utils.py --data-set kaggle --raw-data-file input/kaggle/train.txt

The log is streamed once, in blocks of whole lines, parsed by polars and checked to the last byte.
Price: 2 to 3 seconds per million rows on 2 cores; 157 bytes of disk per row, and as much again
while it runs; memory for the distinct categories (8 to 24 bytes each), not for the rows. A
category's id is its rank among the sorted distinct values of its column, empty first, so ids
depend on the log alone. A second run finds the file up to date and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.cli import Parser, add_seed_flag, positive_int, run_script, share
from slipstream.criteo import KAGGLE_DAYS, RawFile, Rows, equal_days, parse_file
from slipstream.encoding import ROW_BYTES, Encoder
from slipstream.npz import open_npz, pack_manifest, unpack_manifest, write_npz
from slipstream.runtime import check_free_disk, exclusive, peak_rss_bytes

VERSION = 1
GZIP_RATIO = 3.5  # a Criteo log's size over its .gz's, for the estimate alone
BLOCK_BYTES = 1 << 23  # as fast as 16 MB within the noise, 140 MB less memory; 4 MB is slower
SAMPLE_BYTES = 1 << 20


def find_raw_files(data_set: str, raw_data_file: str | Path, num_days: int) -> list[Path]:
    """The log's files in order; each plain or `.gz`. `FileNotFoundError` names a missing one."""
    raw = Path(raw_data_file)
    if data_set == "kaggle":
        names = [raw / "train.txt" if raw.is_dir() else raw]
        advice = "--raw-data-file takes Criteo Kaggle's train.txt, its .gz, or their folder"
    else:
        prefix = raw / "day" if raw.is_dir() else raw
        names = [prefix.with_name(f"{prefix.name}_{day}") for day in range(num_days)]
        advice = f"--num-days {num_days} reads day_0 to day_{num_days - 1}, each plain or .gz"
    paths = []
    for name in names:
        candidates = [name, name.with_name(name.name + ".gz")]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{name} does not exist, nor does its .gz; {advice}")
        paths.append(found[0])
    return paths


def default_processed_file(data_set: str, raw_data_file: str | Path) -> Path:
    """`<stem>_processed.npz` beside the raw file (in it, where the raw path is a folder)."""
    raw = Path(raw_data_file)
    if raw.is_dir():
        raw /= "train.txt" if data_set == "kaggle" else "day"
    return raw.with_name(raw.name.removesuffix(".gz").removesuffix(".txt") + "_processed.npz")


def preprocess(
    data_set: str,
    raw_data_file: str | Path,
    processed_data_file: str | Path | None = None,
    *,
    num_days: int = 24,
    max_ind_range: int = -1,
    data_sub_sample_rate: float = 0.0,
    seed: int = 123,
    block_bytes: int = BLOCK_BYTES,
) -> bool:
    """Build `processed_data_file` from a raw log; False when it was up to date already.

    Raises `ValueError` (bad options, a bad line, a corrupt file) and `OSError` (missing file, full
    disk); the output is then what it was before, and nothing else is left behind.
    """
    if data_set not in ("kaggle", "terabyte"):
        raise ValueError(f"--data-set: got {data_set!r}; expected kaggle or terabyte")
    if max_ind_range < 1 and max_ind_range != -1:
        raise ValueError(f"--max-ind-range: got {max_ind_range}; expected -1 (off) or at least 1")
    if data_set == "terabyte" and num_days < 2:
        raise ValueError(f"--num-days: got {num_days}; expected at least 2, the last is held out")
    if not 0 <= data_sub_sample_rate < 1:
        got = f"--data-sub-sample-rate: got {data_sub_sample_rate}"
        raise ValueError(f"{got}; expected at least 0 and less than 1")
    processed = Path(processed_data_file or default_processed_file(data_set, raw_data_file))
    if processed.suffix != ".npz" or processed.is_dir():
        raise ValueError(f"--processed-data-file: got {processed}; expected a file name in .npz")
    paths = find_raw_files(data_set, raw_data_file, num_days)
    # Options that the result does not depend on are left out, so that they never force a rebuild.
    options = {
        "max_ind_range": max_ind_range,
        "data_sub_sample_rate": data_sub_sample_rate,
        "seed": seed if data_sub_sample_rate else None,
        "num_days": num_days if data_set == "terabyte" else None,
    }
    manifest = {"version": VERSION, "data_set": data_set, "options": options}
    with exclusive(processed.parent):
        if is_up_to_date(processed, manifest, paths):
            print(f"{processed} is up to date")
            return False
        check_disk(paths, data_sub_sample_rate, processed.parent)
        # A planted model's figures hold for the whole log, ids as they are.
        notes = source_notes(raw_data_file, paths)
        if notes and max_ind_range == -1 and not data_sub_sample_rate:
            manifest["source_notes"] = notes
        spool = processed.with_name(processed.name + ".spool.partial")
        try:
            shutil.rmtree(spool, ignore_errors=True)
            spool.mkdir()
            build(processed, spool, paths, manifest, block_bytes)
        finally:
            shutil.rmtree(spool, ignore_errors=True)
        return True


def build(
    processed: Path, spool: Path, paths: Sequence[Path], manifest: dict[str, Any], block_bytes: int
) -> None:
    """Stream the raw files through an encoder and write the result, `manifest` completed in it."""
    started = time.perf_counter()
    encoder = Encoder(spool)
    try:
        sources, day_ends, num_dropped = encode_files(
            encoder, paths, manifest["options"], block_bytes
        )
        num_rows = encoder.num_rows
        if num_rows == 0:
            raise ValueError("--data-sub-sample-rate left no rows; expected at least one")
        days = np.array([0, *day_ends], np.int64)
        if manifest["data_set"] == "kaggle":
            if num_rows < KAGGLE_DAYS:
                raise ValueError(
                    f"got {num_rows} rows; expected at least {KAGGLE_DAYS} rows, one a day"
                )
            days = equal_days(num_rows)
        streams, counts = encoder.finish()
        numbers = {
            "num_rows": num_rows,
            "num_positive": encoder.num_positive,
            "rows_dropped": num_dropped,
            "seconds": round(time.perf_counter() - started, 3),
        }
        members = {"counts": counts, "days": days}
        members["manifest"] = pack_manifest({**manifest, "sources": sources, **numbers})
        write_npz(processed, {**streams, **members})
    finally:
        encoder.close()
    print_summary(processed, numbers, counts, time.perf_counter() - started)


def encode_files(
    encoder: Encoder, paths: Sequence[Path], options: dict[str, Any], block_bytes: int
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Encode every file; what the manifest keeps of each, the rows after each, the rows dropped."""
    sources, day_ends, num_dropped = [], [], 0
    num_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for day, path in enumerate(paths):
            keep = make_keep(options["data_sub_sample_rate"], options["seed"], day)
            raw, num_shown = RawFile(path), 0
            for rows in parse_file(raw, block_bytes, options["max_ind_range"]):
                kept = keep(rows)
                encoder.add(kept)
                num_dropped += len(rows.labels) - len(kept.labels)
                bar.update(raw.num_read - num_shown)
                num_shown = raw.num_read
            sources.append(raw.describe())
            day_ends.append(encoder.num_rows)
    return sources, day_ends, num_dropped


def make_keep(rate: float, seed: int, day: int) -> Callable[[Rows], Rows]:
    """A function rows -> rows to keep: it drops each negative row with probability `rate`.

    It takes one draw per row, in order, so the choice does not depend on how rows are blocked.
    """
    if not rate:
        return lambda rows: rows
    rng = np.random.default_rng([seed, day])

    def keep(rows: Rows) -> Rows:
        kept = (rng.random(len(rows.labels)) >= rate) | (rows.labels == 1)
        return Rows(rows.labels[kept], rows.dense[kept], rows.codes[kept])

    return keep


def is_up_to_date(processed: Path, manifest: dict[str, Any], paths: Sequence[Path]) -> bool:
    """Whether `processed` is whole and was built from the same files with the same options."""
    if not processed.exists():
        return False
    try:
        built = unpack_manifest(open_npz(processed))
    except (ValueError, OSError) as error:
        print(f"{error}: rebuilding")
        return False
    if not built:
        raise ValueError(
            f"{processed} was not made by data_utils.py and is not replaced; choose another "
            "--processed-data-file (the trainers read it as it is)"
        )
    if any(built.get(key) != value for key, value in manifest.items()):
        print(f"{processed} was built with other options: rebuilding")
        return False
    sources = built.get("sources", [])
    if len(sources) == len(paths) and all(map(is_same_file, sources, paths)):
        return True
    print(f"{processed} was built from another log: rebuilding")
    return False


def is_same_file(source: dict[str, Any], path: Path) -> bool:
    """Whether `path` is what the manifest says; it is hashed only where its time differs."""
    stat = path.stat()
    if (source["name"], source["bytes"]) != (path.name, stat.st_size):
        return False
    if source["mtime_ns"] == stat.st_mtime_ns:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source["sha256"]


def source_notes(raw_data_file: str | Path, paths: Sequence[Path]) -> dict[str, Any] | None:
    """The JSON object in `<raw file>.json`, where the log's maker left one."""
    for path in (Path(raw_data_file), *paths):
        try:
            notes = json.loads(path.with_name(path.name + ".json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(notes, dict):
            return notes
    return None


def check_disk(paths: Sequence[Path], data_sub_sample_rate: float, folder: Path) -> None:
    """Estimate the rows from the log's first lines and raise `OSError` when they do not fit."""
    sample = next(RawFile(paths[0]).blocks(SAMPLE_BYTES))
    num_lines = sample.count(b"\n")
    num_positive = sample.count(b"\n1\t") + sample.startswith(b"1\t")
    kept = 1 - data_sub_sample_rate * (1 - num_positive / num_lines)
    sizes = (path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in paths)
    num_rows = round(sum(sizes) * num_lines / len(sample) * kept)
    needed_bytes = 2 * ROW_BYTES * num_rows
    print(
        f"{paths[0]}: about {num_rows:,} rows to write, which take {needed_bytes / 1e9:,.2f} GB of"
        f" disk while it runs, {needed_bytes / 2e9:,.2f} GB afterwards"
    )
    check_free_disk(folder, needed_bytes, "preprocessing")


def print_summary(
    processed: Path, numbers: dict[str, Any], counts: np.ndarray, seconds: float
) -> None:
    """Print what was built and what it took."""
    num_rows, num_dropped = numbers["num_rows"], numbers["rows_dropped"]
    print(
        f"read {num_rows + num_dropped:,} rows in {seconds:,.1f} s:"
        f" {(num_rows + num_dropped) / seconds:,.0f} rows/s, peak RSS"
        f" {peak_rss_bytes() / 1e6:,.0f} MB"
    )
    if num_dropped:
        print(f"dropped {num_dropped:,} negative rows by sub-sampling")
    print(
        f"wrote {processed}: {num_rows:,} rows, {numbers['num_positive'] / num_rows:.2%} positive\n"
        f"{len(counts)} tables, {counts.sum():,} embedding rows: {'-'.join(map(str, counts))}"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data-set",
        choices=("kaggle", "terabyte"),
        default="kaggle",
        help="which Criteo log: one file of 7 days (kaggle), or one file per day (terabyte)",
    )
    files.add_argument(
        "--raw-data-file",
        required=True,
        default=argparse.SUPPRESS,
        help="the log, plain or .gz: kaggle's train.txt, terabyte's prefix .../day (for .../day_0,"
        " .../day_1, ...), or the folder that holds them",
    )
    files.add_argument(
        "--num-days",
        type=positive_int,
        default=24,
        help="files read, from day_0; terabyte only",
    )
    files.add_argument(
        "--processed-data-file",
        default=argparse.SUPPRESS,
        help="the .npz to write (default: <stem>_processed.npz beside the raw file)",
    )
    rows = parser.add_argument_group("rows and tables")
    rows.add_argument(
        "--max-ind-range",
        type=int,
        default=-1,
        help="take hashes modulo this number, so that no table has more rows; -1 = off",
    )
    rows.add_argument(
        "--data-sub-sample-rate",
        type=share,
        default=0.0,
        help="share of the negative rows to drop, from 0 (off) to less than 1",
    )
    add_seed_flag(rows)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess the log that the command line names."""
    preprocess(**vars(parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
