"""How fast, and in how much memory, raw logs are preprocessed and segregated.

    python -m bench.preprocessing --rows 4000000

Makes synthetic Kaggle-format logs of the given rows, a quarter of them, and that quarter as .gz,
then runs the two scripts on each in turn, `--repeats` times, each in a process of its own. Prints
medians and writes one JSON file with the hardware in its name.

Speed of preprocessing is that of the whole command, Python's start included; of segregation also
that of the work alone (its folder's times.json), for importing PyTorch takes as long as a million
rows. Memory is the process's peak. 4,000,000 rows take about 2 minutes and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python bench/preprocessing.py`

from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import open_npz  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit, write_json  # noqa: E402

VALUE_BYTES = 16  # slipstream.logs.encoding's price of a distinct value
MOST_VALUE_BYTES = 36  # twice that where runs or parts are merged, and 4 to rank it
KAGGLE = {"rows": 45_840_617, "distinct": 33_762_577}
TERABYTE = {"rows": 4_373_472_329, "distinct": 882_774_549}
ROW_BYTES = 157


def measured(*command: Any) -> tuple[float, int]:
    """Run a script in a process of its own: seconds, and its peak memory in bytes.

    The peak starts at the size of this process, which is small: nothing here imports PyTorch.
    """
    start = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    with open(os.devnull, "w", encoding="utf-8") as silent:
        process = subprocess.Popen(words, stdout=silent, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(words)} ended with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def make_logs(folder: Path, num_rows: int) -> dict[str, Path]:
    """The logs, by what they are called in the result; made where they are not there yet."""
    logs = {}
    for name, rows in (("quarter", num_rows // 4), ("all", num_rows)):
        logs[name] = folder / name / "train.txt"
        logs[name].parent.mkdir(parents=True, exist_ok=True)
        measured("bench/synthetic_log.py", "--rows", rows, "--output", logs[name])
    logs["quarter, gz"] = folder / "quarter_gz" / "train.txt.gz"
    logs["quarter, gz"].parent.mkdir(exist_ok=True)
    with open(logs["quarter"], "rb") as source, gzip.open(logs["quarter, gz"], "wb", 6) as packed:
        shutil.copyfileobj(source, packed, 1 << 24)
    return logs


def run_once(log: Path, num_rows: int) -> dict[str, float]:
    """Preprocess and segregate a log from nothing."""
    processed, hot_cold = log.parent / "train_processed.npz", log.parent / "hot_cold"
    processed.unlink(missing_ok=True)
    shutil.rmtree(hot_cold, ignore_errors=True)
    seconds, peak = measured(
        "data_utils.py", "--raw-data-file", log, "--processed-data-file", processed
    )
    found = {"preprocessing_rows_per_s": num_rows / seconds, "preprocessing_peak_bytes": peak}
    found["distinct"] = int(open_npz(processed)["counts"].sum())
    seconds, peak = measured(
        "input_segregation.py",
        *("--processed-data-file", processed, "--segregated-data-dir", hot_cold),
        *("--hot-emb-gpu-mem", 4194304),
    )
    alone = json.loads((hot_cold / "times.json").read_bytes())["seconds"]
    found["segregation_command_rows_per_s"] = num_rows / seconds
    found["segregation_rows_per_s"] = num_rows / alone
    found["segregation_peak_bytes"] = peak
    return found


def extrapolation(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Hours and memory for the full data sets, from the largest log's figures.

    Rests on: a cost a row that does not grow (the two sizes show how far that holds); Criteo's
    published counts of rows and distinct values; memory that grows by the distinct values of one
    part of 8 M rows (36 bytes each; a part holds at most 4 times its share of the log's values),
    not by the rows. Not in it: a disk slower than this one.
    """
    speeds = medians["all"]
    quarter = medians["quarter"]
    base = quarter["preprocessing_peak_bytes"] - MOST_VALUE_BYTES * quarter["distinct"]
    lines = []
    for name, data_set in (("Criteo Kaggle", KAGGLE), ("Criteo Terabyte", TERABYTE)):
        rows, distinct = data_set["rows"], data_set["distinct"]
        in_a_part = min(distinct, distinct / rows * (1 << 23) * 4)
        lines.append(
            {
                "data set": name,
                "rows": rows,
                "preprocessing_hours": rows / speeds["preprocessing_rows_per_s"] / 3600,
                "segregation_hours": rows / speeds["segregation_rows_per_s"] / 3600,
                "preprocessing_peak_bytes": base + MOST_VALUE_BYTES * in_a_part,
                "disk_bytes": rows * ROW_BYTES,
            }
        )
    return lines


def print_tables(result: dict[str, Any]) -> None:
    """Print what was measured and what follows for the full data sets."""
    print(
        f"{'log':<12} {'rows':>10} {'preprocessing':>21} {'peak':>8}"
        f" {'segregation (command)':>30} {'peak':>8} {'distinct':>11}"
    )
    for name, line in result["medians"].items():
        print(
            f"{name:<12} {result['rows'][name]:>10,}"
            f" {line['preprocessing_rows_per_s'] / 1e3:>14,.0f} k rows/s"
            f" {line['preprocessing_peak_bytes'] / 1e6:>5,.0f} MB"
            f" {line['segregation_rows_per_s'] / 1e6:>12.2f}"
            f" ({line['segregation_command_rows_per_s'] / 1e6:.2f}) M rows/s"
            f" {line['segregation_peak_bytes'] / 1e6:>5,.0f} MB {line['distinct']:>11,.0f}"
        )
    growth = result["growth"]
    print(
        f"peak of preprocessing grew by {growth['peak_bytes'] / 1e6:,.0f} MB from a quarter to all"
        f" rows; {growth['distinct']:,.0f} more distinct values take"
        f" {growth['least_bytes'] / 1e6:,.0f} to {growth['most_bytes'] / 1e6:,.0f} MB"
    )
    for line in result["extrapolation"]:
        print(
            f"{line['data set']}: {line['rows']:,} rows would take"
            f" {line['preprocessing_hours'] * 60:,.1f} minutes to preprocess,"
            f" {line['segregation_hours'] * 60:,.1f} to segregate,"
            f" {line['preprocessing_peak_bytes'] / 1e9:.1f} GB of memory and"
            f" {line['disk_bytes'] / 1e9:,.0f} GB of disk, as much again segregated"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--rows", type=cli.positive_int, default=4_000_000, help="rows of the larger log"
    )
    parser.add_argument(
        "--repeats", type=cli.positive_int, default=3, help="runs of each; medians are taken"
    )
    parser.add_argument(
        "--work-dir", default="input/preprocessing", help="folder for the logs; they stay there"
    )
    parser.add_argument(
        "--output-dir", default="bench/results", help="folder of the JSON file; '': none is written"
    )
    args = parser.parse_args(argv)
    if args.rows < 28:
        parser.error(f"--rows {args.rows}: expected at least 28")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write; returns the result."""
    args = parse_args(argv)
    logs = make_logs(ROOT / args.work_dir, args.rows)
    rows = {name: args.rows if name == "all" else args.rows // 4 for name in logs}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in logs}
    for repeat in range(args.repeats):
        for name, log in logs.items():
            runs[name].append(run_once(log, rows[name]))
            print(f"run {repeat + 1} of {args.repeats}: {name}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in of_log) for key in of_log[0]}
        for name, of_log in runs.items()
    }
    more = medians["all"]["distinct"] - medians["quarter"]["distinct"]
    peaks = [medians[name]["preprocessing_peak_bytes"] for name in ("quarter", "all")]
    from bench.throughput import hardware_name  # imports PyTorch: not before the last run

    machine = describe_machine()
    result = {
        "commit": git_commit(),
        "machine": machine,
        "rows": rows,
        "runs": runs,
        "medians": medians,
        "growth": {
            "peak_bytes": peaks[1] - peaks[0],
            "distinct": more,
            "least_bytes": VALUE_BYTES * more,
            "most_bytes": MOST_VALUE_BYTES * more,
        },
        "extrapolation": extrapolation(medians),
    }
    print_tables(result)
    if args.output_dir:
        path = ROOT / args.output_dir / f"preprocessing_{hardware_name(machine)}.json"
        write_json(path, result)
        print(f"wrote {path}")
    return result


if __name__ == "__main__":
    cli.run_script(main)
