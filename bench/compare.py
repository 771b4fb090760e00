"""Train by several methods, seeds and settings, one process at a time, and tabulate what it cost.

    python -m bench.compare --processed-data-file input/synthetic/train_processed.npz \
        --segregated-data-dir input/synthetic/hot_cold \
        --settings 'd30=--drop-percentage 30' 'd60=--drop-percentage 60'

Reads each run's `log.jsonl` only. A run that finished is not repeated, so an interrupted comparison
goes on; `--runs-dir` holds one comparison, and runs on other data, with other flags or of another
commit there are refused. Differences are to the first method, over paired seeds (same seed, same
initial weights); one inside its 95 % confidence interval (Student's t) is called a tie. Beside each
method stands the first one *stopped earlier*: its AUC, on its own curve, after as many samples, and
after as much training time. About a minute a run on 1 M synthetic rows and 2 cores; `--smoke` makes
a small log of its own, and takes a minute in all.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/compare.py`

import slipstream_train  # noqa: E402
from bench.methods import (  # noqa: E402
    DEFAULT_METHODS,
    METHODS,
    OWN_POLICY,
    check_flags,
    command_of,
    flags_in,
    folder_of,
    kinds_of,
    method_of,
    script_of,
    texts_of,
)
from bench.run_records import (  # noqa: E402
    Records,
    all_training_s,
    claim_runs,
    curve_of,
    run_once,
    save_table,
)
from bench.small_log import MODEL_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import fingerprint, open_npz  # noqa: E402
from slipstream.tools.runlog import OVERHEAD  # noqa: E402
from slipstream.tools.runtime import git_commit  # noqa: E402
from slipstream.training.flags import recipe_of  # noqa: E402

MARGIN = 0.0005  # of AUC: a run is there when it comes so near the first method's final one
METRICS = {
    "auc": "test AUC",
    "log_loss": "test log loss, nats",
    "normalized_entropy": "log loss over that of the test set's click rate",
    "samples": "inputs trained",
    "dropped_share": "of the inputs, dropped",
    "training_s": "seconds of training, the choice of inputs included",
    "overhead_s": "seconds of snapshots, thresholds and classification",
    "samples_to_target": f"inputs until the AUC is the first method's final one minus {MARGIN}",
    "training_s_to_target": "seconds of training until then",
    "auc_first_at_samples": "AUC of the first method stopped after as many inputs",
    "auc_first_at_time": "AUC of the first method stopped after as much training time",
}
SMOKE_ROWS, SMOKE_BUDGET = 20_000, 200_000  # bytes of hot rows

Run = tuple[str, str, int]  # method, setting, seed


def run_name(run: Run) -> str:
    """The folder of a run."""
    method, setting, seed = run
    words = [folder_of(method), setting, f"seed{seed}"]
    return "-".join(word for word in words if word)


def train(run: Run, args: argparse.Namespace, flags: list[str]) -> Records:
    """Run one training, unless it has finished before; its log's records."""
    method, setting, seed = run
    folder = Path(args.runs_dir) / run_name(run)
    script, words = command_of((method, setting), args, flags)
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *words, "--seed", str(seed)]
    command += ["--print-freq", "0", "--test-freq", str(args.test_freq)]
    return run_once(folder, command)


def claim(args: argparse.Namespace, flags: list[str]) -> None:
    """Note in `--runs-dir` what is compared there; `ValueError` where finished runs were others."""
    folder = Path(args.runs_dir)
    compared: dict[str, Any] = {
        "processed": fingerprint(args.processed_data_file),
        "segregated": fingerprint(Path(args.segregated_data_dir) / "embedding_rows.npz"),
        "flags": flags,
        "test_freq": args.test_freq,
        "commit": git_commit(),
        "settings": args.settings,
        "own files": texts_of(
            [*flags, *(word for text in args.settings.values() for word in shlex.split(text))]
        ),
    }
    for method in args.methods:  # by folder: another file's runs would lie in the same one
        for text in texts_of(script_of(method)[1]).values():
            compared["own files"][folder_of(method)] = text
    # A later call may bring more of these.
    claim_runs(folder, compared, ("settings", "own files"))


def metrics_of(records: Records, first: Records) -> dict[str, float]:
    """A run's `METRICS`; `first` is that of the first method with the same seed."""
    summary, evaluations = records[-1], curve_of(records)
    reached = [r for r in evaluations if r["auc"] >= first[-1]["auc"] - MARGIN]
    found = {name: summary[name] for name in ("auc", "log_loss", "samples", "dropped_share")}
    found["normalized_entropy"] = evaluations[-1]["normalized_entropy"]
    found["training_s"] = all_training_s(summary)
    found["overhead_s"] = sum(summary.get(name, 0.0) for name in OVERHEAD)
    found["samples_to_target"] = reached[0]["samples"] if reached else math.nan
    found["training_s_to_target"] = all_training_s(reached[0]) if reached else math.nan
    curve = curve_of(first)
    aucs = [record["auc"] for record in curve]
    samples = [record["samples"] for record in curve]
    times = [all_training_s(record) for record in curve]
    found["auc_first_at_samples"] = float(np.interp(summary["samples"], samples, aucs))
    found["auc_first_at_time"] = float(np.interp(found["training_s"], times, aucs))
    return {name: math.nan if found[name] is None else float(found[name]) for name in METRICS}


def standard_deviation(values: np.ndarray) -> float:
    """The sample's standard deviation; NaN for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def half_interval(differences: np.ndarray) -> float:
    """Half the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    from scipy.stats import t  # comes with scikit-learn; a second to import

    num_values = len(differences)
    return float(t.ppf(0.975, num_values - 1)) * standard_deviation(differences) / num_values**0.5


def tabulate(results: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> Records:
    """Tidy rows: one a method, setting and metric, with mean, spread, and the difference's."""
    rows = []
    first = next(iter(results.values()))
    for (method, setting), runs in results.items():
        for metric in METRICS:
            values = np.array([run[metric] for run in runs], float)
            # Seeds are paired: the same seed starts from the same weights in every method.
            difference = values - np.array([run[metric] for run in first], float)
            row: dict[str, Any] = {"method": method, "setting": setting, "metric": metric}
            row |= {"n": int(np.isfinite(values).sum()), "mean": float(values.mean())}
            row |= {"sd": standard_deviation(values), "difference": float(difference.mean())}
            row["interval"] = half_interval(difference)
            # NaN, as with one seed, is no tie.
            row["tie"] = bool(abs(row["difference"]) <= row["interval"])
            rows.append(row)
    return rows


def by_run(rows: Records) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """A table's rows by method and setting, then by metric."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["setting"]), {})[row["metric"]] = row
    return found


def print_table(rows: Records, limit: float | None) -> None:
    """For people: a line a method and setting."""
    width = max(20, *(len(row["method"]) + 1 for row in rows))
    print(
        f"{'method':<{width}}setting   n   AUC     sd      difference (95 %)        NE      "
        "first stopped    samples  training s  s to target"
    )
    for (method, setting), metrics in by_run(rows).items():
        auc = metrics["auc"]
        verdict = " (tie)" if auc["tie"] and method != rows[0]["method"] else ""
        mean = {name: row["mean"] for name, row in metrics.items()}
        print(
            f"{method:<{width}}{setting:<8}{auc['n']:>3}  {auc['mean']:.4f}  {auc['sd']:.4f}  "
            f"{auc['difference']:+.4f} ± {auc['interval']:.4f}{verdict:<6}  "
            f"{mean['normalized_entropy']:.4f}  "
            f"{mean['auc_first_at_samples']:>13.4f}  {mean['samples']:>10,.0f}  "
            f"{mean['training_s']:>10.1f}  {mean['training_s_to_target']:>11.1f}"
        )
    print(
        "difference: to the first method; a tie: inside its interval, these seeds do not tell\n"
        "first stopped: AUC of the first method after as many samples"
    )
    if limit is not None:
        print(f"planted model's limit: {limit:.4f}")


def markdown(rows: Records) -> str:
    """The table of a README."""
    lines = [
        f"| method | test AUC, mean ± sd of {rows[0]['n']} seeds | difference (95 %) | log loss "
        "| inputs trained | training s |",
        "|---|---|---|---|---|---|",
    ]
    for (method, name), metrics in by_run(rows).items():
        auc = metrics["auc"]
        difference = ""
        if len(lines) > 2:
            difference = f"{auc['difference']:+.4f} ± {auc['interval']:.4f}"
            difference += " (tie)" if auc["tie"] else ""
        mean = {metric: row["mean"] for metric, row in metrics.items()}
        lines.append(
            f"| {method} {name}".rstrip()
            + f" | {auc['mean']:.4f} ± {auc['sd']:.4f} | {difference} | {mean['log_loss']:.4f} "
            f"| {mean['samples']:,.0f} | {mean['training_s']:.1f} |"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to every trainer."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", default=None, help="a processed .npz")
    parser.add_argument("--segregated-data-dir", default=None, help="the folder made from it")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_of,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"methods to compare, of {', '.join(METHODS)}, or {OWN_POLICY}; differences are to the"
        " first",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=FLAGS",
        help="flags, in one word each: each method is run with each of them, or with those of its"
        " flags that it has; what is left out is said. Not given: with the defaults",
    )
    parser.add_argument("--num-seeds", type=cli.positive_int, default=3, help="seeds a method")
    parser.add_argument(
        "--points", type=cli.positive_int, default=20, help="evaluations an epoch, for curves"
    )
    parser.add_argument("--runs-dir", default="runs/compare", help="folder of this comparison")
    parser.add_argument("--csv", default=None, help="write the table here; not given: print only")
    parser.add_argument("--markdown", action="store_true", help="print a README's table, too")
    parser.add_argument(
        "--smoke", action="store_true", help="a small synthetic log and model, to see that it works"
    )
    args, flags = parser.parse_known_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    args.settings = dict(args.settings)
    has_data = args.processed_data_file is not None and args.segregated_data_dir is not None
    if len({folder_of(method) for method in args.methods}) < len(args.methods):
        parser.error("--methods: two policies of one's own have the same name; rename a file")
    if args.smoke == has_data:
        parser.error("give --processed-data-file and --segregated-data-dir, or --smoke")
    return args, flags


def setting(text: str) -> tuple[str, str]:
    """Parse `NAME=FLAGS`."""
    name, equals, flags = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a name and flags, as 'd60=--drop-percentage 60'"
        )
    flags_in(flags)
    return name, flags


def test_freq(processed: str, flags: list[str], num_points: int) -> int:
    """Mini-batches between evaluations; a bad flag of a trainer, or a log without held-out rows, is
    refused here.
    """
    trainer = slipstream_train.parse_args(["--segregated-data-dir", "-", *flags])
    days = open_npz(processed, ("days",))["days"]
    num_train = int(days[-2])
    if days[-1] == num_train:
        raise ValueError(f"{processed} holds nothing out: there is no AUC to compare")
    batch_size = recipe_of(trainer, num_train).mini_batch_size
    return max(1, num_train // batch_size // num_points)


def main(argv: list[str] | None = None) -> Records:
    """Compare; returns the table's rows."""
    args, flags = parse_args(argv)
    with contextlib.ExitStack() as stack:
        if args.smoke:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-")))
            paths = make_small_log(folder, SMOKE_ROWS, SMOKE_BUDGET)
            args.processed_data_file, args.segregated_data_dir = map(str, paths)
            args.runs_dir, flags = str(folder / "runs"), [*MODEL_FLAGS, *flags]
        kinds, left_out = kinds_of(args)
        check_flags(kinds, args, flags)
        args.test_freq = test_freq(args.processed_data_file, flags, args.points)
        claim(args, flags)
        runs = [(*kind, seed) for seed in range(1, args.num_seeds + 1) for kind in kinds]
        records = {run: train(run, args, flags) for run in tqdm(runs, desc="runs", disable=None)}
    results: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for (method, name, seed), log in records.items():
        results[method, name].append(metrics_of(log, records[(*kinds[0], seed)]))
    rows = tabulate(results)
    print_table(rows, next(iter(records.values()))[-1].get("planted_auc"))
    print("".join(f"{line}\n" for line in left_out), end="")
    if args.markdown:
        print(markdown(rows) + "".join(f"\n\n{line}" for line in left_out))
    if args.csv:
        save_table(rows, args.csv)
    return rows


if __name__ == "__main__":
    cli.run_script(main)
