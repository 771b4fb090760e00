"""Write a synthetic click log in the Criteo Kaggle format, from a model whose AUC is known.

For machines without the real log: ids follow power laws like Kaggle's, clicks come from a planted
model (slipstream/logs/synthetic.py), so the best AUC is known, printed and kept in `<output>.json`.
It shows that the programs work and how fast they are; it says nothing about clicks of real people.

    python bench/synthetic_log.py --rows 1000000

With --days N it writes N logs of so many rows, day_0.txt to day_<N-1>.txt for --output day.txt:
from day to day values go and others come (--turnover), and effects move (--rotation).

About 4 s and 0.25 GB of disk for a million rows on 2 cores; 0.3 GB of memory, and 0.04 GB for each
further million (the AUC). The same options give the same bytes; a finished log is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/synthetic_log.py`

from slipstream.logs.drift import Drift  # noqa: E402
from slipstream.logs.synthetic import (  # noqa: E402
    KAGGLE_TABLE_SIZES,
    PlantedClicks,
    category_hashes,
    concatenate_clicks,
    planted_blocks,
)
from slipstream.tools import cli, runtime  # noqa: E402
from slipstream.tools.locks import exclusive  # noqa: E402
from slipstream.tools.output import say_current, stage_bar  # noqa: E402
from slipstream.tools.places import room_for  # noqa: E402

VERSION = 1  # of what the same options write
NUM_DENSE = 13
NUM_DAYS = 7
BYTES_PER_ROW = 280
BLOCKS_PER_CHUNK = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--rows", type=cli.positive_int, default=1_000_000, help="rows to write")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("input/synthetic/train.txt"),
        help="path of the log; its description goes to <output>.json",
    )
    parser.add_argument(
        "--positive-rate",
        type=cli.positive_share,
        default=0.25,
        help="expected share of clicked rows, below 1",
    )
    parser.add_argument(
        "--days", type=cli.nonnegative_int, default=0, help="logs to write, a day each; 0: one log"
    )
    parser.add_argument(
        "--turnover",
        type=cli.share,
        default=0.05,
        help="with --days: share of the values of large tables that others take the place of a day",
    )
    parser.add_argument(
        "--rotation",
        type=cli.share,
        default=0.1,
        help="with --days: how far effects move a day; at 1 nothing of them is left",
    )
    cli.add_flag(parser, cli.SEED)
    args = parser.parse_args(argv)
    if args.positive_rate >= 1:
        parser.error("argument --positive-rate: got 1; expected less than 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write the log, unless one of the same options is there already."""
    args = parse_args(argv)
    if not args.days:
        write_and_say(args, args.output, None)
    for day in range(args.days):
        output = args.output.with_name(f"{args.output.stem}_{day}{args.output.suffix}")
        write_and_say(args, output, Drift(day, args.turnover, args.rotation))


def write_and_say(args: argparse.Namespace, output: Path, drift: Drift | None) -> None:
    """Write one log."""
    with exclusive(output.absolute().parent):
        sidecar = write_log(output, args.rows, args.seed, args.positive_rate, drift=drift)
    if sidecar is None:
        say_current(output)
        return
    print(
        f"wrote {output} in {sidecar['seconds']:.1f} s: {sidecar['positives']:.2%} of the rows"
        f" positive; limit of a test AUC: {_text(sidecar['planted_auc_test'])}"
    )


def _text(auc: float | None) -> str:
    return "none (one class only)" if auc is None else f"{auc:.4f}"


def write_log(
    output: Path,
    rows: int,
    seed: int,
    positive_rate: float = 0.25,
    blocks_per_chunk: int = BLOCKS_PER_CHUNK,
    drift: Drift | None = None,
) -> dict[str, Any] | None:
    """Write the log and its sidecar; return the sidecar with `seconds`, or None when up to date.

    The log is written beside `output` and renamed; its sidecar is invalidated before and completed
    last, so a log with a complete one is whole. Raises `OSError` when the disk is too small, and
    `ValueError` without polars and for an `output` that is another's file.
    """
    started = time.perf_counter()
    options = {
        "version": VERSION,
        "synthetic": True,
        "rows": rows,
        "seed": seed,
        "positive_rate": positive_rate,
    }
    if drift is not None:
        options["drift"] = drift._asdict()
    sidecar_path = output.with_name(output.name + ".json")
    if _is_up_to_date(output, sidecar_path, options):
        return None
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; expected the path of a file")
    if output.exists() and not _is_synthetic(sidecar_path):
        raise ValueError(
            f"{output} is no synthetic log of ours, so it is not replaced; choose another --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    runtime.check_free_disk(output.parent, rows * BYTES_PER_ROW, f"a log of {rows} rows")
    blocks = planted_blocks(rows, KAGGLE_TABLE_SIZES, seed, NUM_DENSE, positive_rate, drift)
    partial = room_for(output.with_name(output.name + ".partial"))
    room_for(sidecar_path)
    y = np.empty(rows, np.int8)
    probability = np.empty(rows, np.float32)
    try:
        with open(partial, "wb") as file:
            _write_rows(file, blocks, blocks_per_chunk, y, probability)
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        sidecar_path.write_text('{"synthetic": true, "unfinished": true}\n', encoding="utf-8")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    test = rows_of_test_part(rows)
    aucs = {
        "planted_auc": _auc(y, probability),
        "planted_auc_test": _auc(y[test], probability[test]),
    }
    described = options | {"bytes": num_bytes, **aucs, "positives": float(y.mean())}
    sidecar_partial = room_for(sidecar_path.with_name(sidecar_path.name + ".partial"))
    sidecar_partial.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    os.replace(sidecar_partial, sidecar_path)
    return described | {"seconds": time.perf_counter() - started}


def _is_synthetic(sidecar_path: Path) -> bool:
    """Whether a log's sidecar says that this script wrote it."""
    try:
        return runtime.read_json(sidecar_path).get("synthetic") is True
    except (OSError, ValueError):
        return False


def _is_up_to_date(output: Path, sidecar_path: Path, options: dict[str, Any]) -> bool:
    try:
        sidecar = runtime.read_json(sidecar_path)
        num_bytes = output.stat().st_size
    except (OSError, ValueError):
        return False
    return (options | {"bytes": num_bytes}).items() <= sidecar.items()


def _write_rows(
    file: BinaryIO,
    blocks: Iterator[PlantedClicks],
    blocks_per_chunk: int,
    y: np.ndarray,
    probability: np.ndarray,
) -> None:
    """Write every block, a few at a time, and keep labels and probabilities."""
    to_frame = LogFrames()
    start = 0
    with stage_bar(total=len(y), unit=" rows", unit_scale=True, desc="writing") as bar:
        while chunk := list(islice(blocks, blocks_per_chunk)):
            clicks = concatenate_clicks(chunk)
            frame = to_frame(clicks)
            frame.write_csv(file, separator="\t", include_header=False, null_value="")
            y[start : start + len(clicks)] = clicks.y
            probability[start : start + len(clicks)] = clicks.probability
            start += len(clicks)
            bar.update(len(clicks))


class LogFrames:
    """Rows to polars frames whose columns are the log's: label, ints, categories in hex."""

    def __init__(self) -> None:
        try:
            import polars
        except ImportError as error:
            raise ValueError(
                "writing a log needs polars, which this python lacks; pip install polars"
            ) from error
        self.polars = polars
        # A category's text is two look-ups: four times faster than formatting it.
        self.four_digits = polars.Series([f"{number:04x}" for number in range(1 << 16)])

    def __call__(self, clicks: PlantedClicks) -> Any:
        """Lay out one chunk."""
        pl = self.polars
        columns = {"label": pl.Series(clicks.y)}
        present = {}
        for i in range(clicks.X_int.shape[1]):
            columns[f"I{i + 1}"] = pl.Series(np.ascontiguousarray(clicks.X_int[:, i]))
            present[f"I{i + 1}"] = pl.Series(~clicks.int_missing[:, i])
        for c in range(clicks.X_cat.shape[1]):
            columns[f"C{c + 1}"] = pl.Series(category_hashes(c, clicks.X_cat[:, c]))
            present[f"C{c + 1}"] = pl.Series(~clicks.cat_missing[:, c])
        digits = pl.lit(self.four_digits)
        fields = [pl.col("label")]
        for name, is_present in present.items():
            value = pl.col(name)
            if name.startswith("C"):
                value = pl.concat_str(
                    [digits.gather(value // (1 << 16)), digits.gather(value % (1 << 16))]
                )
            fields.append(pl.when(pl.lit(is_present)).then(value).alias(name))
        return pl.DataFrame(columns).select(fields)


def rows_of_test_part(rows: int) -> slice:
    """Which rows preprocessing keeps for the test: the last of seven equal parts, first half."""
    last = rows // NUM_DAYS  # the first rows % 7 parts are one longer, so the last never is
    return slice(rows - last, rows - last + last // 2)


def _auc(y: np.ndarray, probability: np.ndarray) -> float | None:
    """ROC AUC, or None where only one class occurs (tiny logs)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, probability)) if 0 < y.sum() < len(y) else None


if __name__ == "__main__":
    cli.run_script(main)
