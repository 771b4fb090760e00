"""Train by several methods and seeds, one process at a time, and tabulate mean and spread.

Reads each run's `log.jsonl` only. A run that finished is not repeated, so an interrupted comparison
continues; `--runs-dir` holds one comparison, and another one there is refused. Delete it after a
change of the code. Differences are to the first method, over paired seeds (same seed, same initial
weights); one inside its 95 % confidence interval is called a tie.

    python -m bench.compare --processed-data-file input/synthetic/train_processed.npz \
        --segregated-data-dir input/synthetic/hot_cold

About a minute a run on 1 M synthetic rows and 2 cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/compare.py`

from slipstream import cli  # noqa: E402
from slipstream.npz import fingerprint  # noqa: E402

METHODS = {
    "baseline": ("dlrm_s_pytorch.py", ()),
    "baseline-bf16": ("dlrm_s_pytorch.py", ("--precision", "bf16")),
    "fae": ("fae_train.py", ()),
    "slipstream-none": ("slipstream_train.py", ("--drop-policy", "none")),
    "slipstream-stale": ("slipstream_train.py", ("--drop-policy", "stale")),
    "slipstream-random": ("slipstream_train.py", ("--drop-policy", "random")),
}
DEFAULT_METHODS = [name for name in METHODS if name != "baseline-bf16"]
FIGURES = ("auc", "log_loss", "samples", "training_s", "program_s")


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary record of a finished run; None for one that did not finish or does not exist."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except OSError:
        return None
    last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
    return last if last.get("kind") == "summary" else None


def train(method: str, seed: int, args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Run one training, unless it has finished before; its summary."""
    name = f"{method}-seed{seed}"
    folder = Path(args.runs_dir) / name
    if (summary := finished_summary(folder)) is not None:
        return summary
    shutil.rmtree(folder, ignore_errors=True)
    script, own_flags = METHODS[method]
    # What the comparison decides comes last: it wins over the user's flags.
    command = [sys.executable, str(REPOSITORY / script), *flags]
    if method.startswith("slipstream"):
        command += shlex.split(args.drop_flags)
    command += [*own_flags, "--processed-data-file", args.processed_data_file]
    if script != "dlrm_s_pytorch.py":
        command += ["--segregated-data-dir", args.segregated_data_dir]
    command += ["--runs-dir", args.runs_dir, "--run-name", name, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--print-freq", "0"], capture_output=True, text=True, check=False
    )
    summary = finished_summary(folder)
    if done.returncode or summary is None:
        raise ValueError(f"{name} failed: {done.stderr.strip() or 'no summary in its log'}")
    return summary


def claim(args: argparse.Namespace, flags: list[str]) -> None:
    """Note in `--runs-dir` what is compared there; `ValueError` when it holds something else."""
    path = Path(args.runs_dir) / "comparison.json"
    compared = {
        "processed": fingerprint(args.processed_data_file),
        "segregated": fingerprint(Path(args.segregated_data_dir) / "embedding_rows.npz"),
        "flags": flags,
        "drop_flags": args.drop_flags,
    }
    if path.exists() and json.loads(path.read_text()) != compared:
        raise ValueError(
            f"{args.runs_dir} holds runs on other data or with other flags; choose another "
            "--runs-dir, or delete it"
        )
    if not path.exists() and list(path.parent.glob("*/log.jsonl")):
        raise ValueError(f"{args.runs_dir} holds other runs; choose another --runs-dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(compared, indent=1))


def standard_deviation(values: np.ndarray) -> float:
    """The sample's standard deviation; NaN for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def half_interval(differences: np.ndarray) -> float:
    """Half the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    from scipy.stats import t  # comes with scikit-learn; a second to import

    num_values = len(differences)
    return float(t.ppf(0.975, num_values - 1)) * standard_deviation(differences) / num_values**0.5


def tabulate(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a method: mean, standard deviation and n of each figure, and whether AUC ties."""
    rows = []
    first = next(iter(results.values()))
    for method, summaries in results.items():
        row: dict[str, Any] = {"method": method, "n": len(summaries)}
        for figure in FIGURES:
            values = np.array([summary[figure] for summary in summaries], float)
            row[figure] = values.mean()
            row[f"{figure}_sd"] = standard_deviation(values)
        # Seeds are paired: the same seed starts from the same weights in every method.
        difference = np.array(
            [a["auc"] - b["auc"] for a, b in zip(summaries, first, strict=True)], float
        )
        row["auc_difference"] = difference.mean()
        row["auc_difference_sd"] = standard_deviation(difference)
        row["auc_interval"] = interval = half_interval(difference)
        row["tie"] = bool(abs(difference.mean()) <= interval)  # NaN, one seed: no tie
        rows.append(row)
    return rows


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to every trainer."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", required=True, help="a processed .npz")
    parser.add_argument("--segregated-data-dir", required=True, help="the folder made from it")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=DEFAULT_METHODS,
        help="methods to compare; differences are to the first",
    )
    parser.add_argument(
        "--drop-flags",
        default="",
        help="flags of slipstream_train.py alone, in one word: '--drop-percentage 20 --alpha 0.8'",
    )
    parser.add_argument("--num-seeds", type=cli.positive_int, default=3, help="seeds a method")
    parser.add_argument("--runs-dir", default="runs/compare", help="folder of this comparison")
    parser.add_argument("--csv", default=None, help="write the table here; not given: print only")
    args, flags = parser.parse_known_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    return args, flags


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare; returns the table."""
    args, flags = parse_args(argv)
    claim(args, flags)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    runs = [(seed, method) for seed in range(1, args.num_seeds + 1) for method in args.methods]
    for seed, method in tqdm(runs, desc="runs", disable=None):
        results[method].append(train(method, seed, args, flags))
    rows = tabulate(results)
    limit = results[args.methods[0]][0].get("planted_auc")
    print("method              n   AUC     sd      difference      samples   training s")
    for row in rows:
        verdict = " (tie)" if row["tie"] and row["method"] != args.methods[0] else ""
        print(
            f"{row['method']:<18}{row['n']:>3}  {row['auc']:.4f}  {row['auc_sd']:.4f}  "
            f"{row['auc_difference']:+.4f}{verdict:<6}  {row['samples']:>10,.0f}  "
            f"{row['training_s']:>8.1f}"
        )
    if limit is not None:
        print(f"planted model's limit: {limit:.4f}")
    if args.csv:
        import pandas

        path = Path(args.csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
        print(f"table: {path}")
    return rows


if __name__ == "__main__":
    cli.run_script(main)
