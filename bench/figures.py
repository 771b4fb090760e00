"""Figures from logs and data: each one command, its numbers as CSV beside its PNG.

    python -m bench.figures skew       --processed-data-file F --segregated-data-dir D
    python -m bench.figures budget     --processed-data-file F --segregated-data-dir D
    python -m bench.figures change     --processed-data-file F --segregated-data-dir D
    python -m bench.figures thresholds --processed-data-file F --segregated-data-dir D
    python -m bench.figures curves     --runs-dir runs/compare
    python -m bench.figures times      --runs-dir runs/compare
    python -m bench.figures speed      --runs-dir runs/compare
    python -m bench.figures policies   --table bench/results/policies.csv
    python -m bench.figures drop       --table bench/results/drop.csv

skew: share of a table's accesses that its most popular rows take. budget: memory for hot rows
against hot accesses and hot inputs. change: how far hot rows still move while FAE trains, by
popularity and by table size, which is what Slipstream rests on. thresholds: T against the drop
percentage D, by alpha. curves, times: test AUC against inputs and against training time, of a
comparison's runs. speed: their training time, by what took it. policies: AUC that each policy of a
comparison's table loses. drop: AUC lost against the inputs not trained, by policy; settings named
alike but for a number, as hard20 and hard40, are a line.

`change` and `thresholds` train, with flags of slipstream_train.py.

`--quick` makes a small synthetic log, and its comparison, first: under a minute, to see that it
works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/figures.py`

from bench import compare  # noqa: E402
from bench.small_log import MODEL_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import open_npz  # noqa: E402
from slipstream.training.dropping import DropRule, DropSettings  # noqa: E402
from slipstream.training.staleness import (  # noqa: E402
    critical_thresholds,
    num_stale_rows_needed,
    row_change,
    threshold_for_drop,
)

# Okabe and Ito's, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NUM_POINTS = 60
NUM_TABLES = 6
NUM_SNAPSHOTS = 12
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
QUICK_ROWS, QUICK_BUDGET = 20_000, 200_000

Rows = list[dict[str, Any]]


def skew(args: argparse.Namespace, axes: Any) -> Rows:
    """The most popular share of rows against the share of accesses they take."""
    ranked = open_npz(Path(args.segregated_data_dir) / "embedding_rows.npz")
    accesses = ranked["access_counts"][ranked["slot_of_row"]]
    ends = np.cumsum(ranked["counts"])
    tables = {
        f"table {number + 1}: {size:,} rows": accesses[ends[number] - size : ends[number]]
        for number, size in enumerate(ranked["counts"])
    }
    largest = sorted(tables, key=lambda name: -len(tables[name]))[:NUM_TABLES]
    found = []
    for colour, name in zip(COLOURS[::-1], ["all tables", *largest], strict=False):
        counts = np.sort(accesses if name == "all tables" else tables[name])[::-1]
        rows = np.unique(np.geomspace(1, len(counts), NUM_POINTS).astype(np.int64))
        shares = np.cumsum(counts)[rows - 1] / max(counts.sum(), 1)
        axes.plot(100 * rows / len(counts), 100 * shares, color=colour, label=name)
        found += [
            {"table": name, "rows_share": n / len(counts), "accesses_share": float(share)}
            for n, share in zip(rows.tolist(), shares, strict=True)
        ]
    axes.set(xscale="log", xlabel="most popular rows, % of the table", ylabel="% of its accesses")
    return found


def budget(args: argparse.Namespace, axes: Any) -> Rows:
    """Memory for hot rows against the accesses and the inputs that are hot."""
    from slipstream.logs.processed import load_processed
    from slipstream.training.popularity import count_hot_inputs

    ranked = open_npz(Path(args.segregated_data_dir) / "embedding_rows.npz")
    train = load_processed(args.processed_data_file).splits()[0]
    slot_of_row, accesses = np.array(ranked["slot_of_row"]), ranked["access_counts"]
    bounds = np.unique(np.geomspace(10, len(accesses), NUM_POINTS).astype(np.int64))[::-1]
    inputs, _ = count_hot_inputs(train, slot_of_row, bounds.tolist())
    taken = np.cumsum(accesses)[bounds - 1] / max(int(accesses.sum()), 1)
    megabytes = bounds * args.row_bytes / 1e6
    axes.plot(megabytes, 100 * taken, color=COLOURS[0], label="accesses to hot rows")
    axes.plot(megabytes, 100 * inputs / len(train), color=COLOURS[1], label="hot inputs")
    axes.set(xscale="log", xlabel=f"MB of hot rows ({args.row_bytes} bytes each)", ylabel="%")
    return [
        {"hot_rows": int(n), "megabytes": float(mb), "accesses_share": float(a), "inputs_share": b}
        for n, mb, a, b in zip(bounds, megabytes, taken, inputs / len(train), strict=True)
    ]


class Training:
    """A run of slipstream_train.py on the CPU, for figures of what happens in it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        import slipstream_train
        from slipstream.tools.device import tune_process
        from slipstream.training import flags as training_flags
        from slipstream.training.build import build_model, network_of
        from slipstream.training.sets import load_segregated

        flags = ["--segregated-data-dir", args.segregated_data_dir, "--device", "cpu", *args.flags]
        self.flags = slipstream_train.parse_args(flags)
        self.flags.print_freq = 0
        self.prepared = load_segregated(args.segregated_data_dir, args.processed_data_file)
        device = torch.device("cpu")
        tune_process(device, self.flags.num_threads, self.flags.precision, False)
        settings = training_flags.settings_of(self.flags)
        spec = network_of(settings.model)
        self.model, self.table = build_model(settings, spec, self.prepared, device)
        self.num_steps = self.prepared.data.num_train // self.flags.mini_batch_size

    def run(self, rule: DropRule | None = None, note: Callable[[Any], None] | None = None) -> None:
        """Train; `note` is called with the `Trainer` at each of its reports."""
        from slipstream.tools.runlog import Clocks, NoLog
        from slipstream.training.build import build_trainer
        from slipstream.training.flags import settings_of

        trainer = build_trainer(
            *(settings_of(self.flags), self.prepared, self.flags.schedule, self.model, self.table),
            *(rule, NoLog(), Clocks()),
            on_report=None if note is None else lambda progress: note(trainer),
        )
        trainer.run()


def change(args: argparse.Namespace, axes: Any) -> Rows:
    """Median largest change of a hot row between snapshots of a run that drops nothing."""
    training = Training(args)
    num_hot, table = training.prepared.num_hot, training.table
    training.flags.print_freq = max(1, training.flags.nepochs * training.num_steps // NUM_SNAPSHOTS)
    groups = _row_groups(training.prepared)
    found: Rows = []
    before = [table.leading_rows(num_hot)]

    def note(trainer: Any) -> None:
        trainer.loader.settle()
        progress, after = trainer.progress, table.leading_rows(num_hot)
        moved = row_change(before[0], after).numpy()
        before[0] = after
        for name, rows in groups.items():
            low, middle, high = np.quantile(moved[rows], [0.1, 0.5, 0.9]).tolist()
            found.append(
                {"group": name, "rows": len(rows), "step": progress.step}
                | {"samples": progress.samples, "p10": low, "median": middle, "p90": high}
            )

    training.run(note=note)
    for number, name in enumerate(groups):
        mine = [row for row in found if row["group"] == name]
        style = "-" if name.startswith("popularity") else "--"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            [row["samples"] / 1e3 for row in mine],
            [row["median"] for row in mine],
            style,
            color=colour,
            label=name,
        )
    axes.set(
        yscale="log",
        xlabel="inputs trained, thousands",
        ylabel=f"largest change of a row in {training.flags.print_freq} mini-batches, median",
    )
    return found


def _row_groups(prepared: Any) -> dict[str, np.ndarray]:
    """Hot slots by popularity, and by the size of their table."""
    num_hot = prepared.num_hot
    slots = np.arange(num_hot)
    edges = np.unique(np.geomspace(1, num_hot + 1, 5).astype(np.int64)) - 1
    groups = {
        f"popularity {first + 1:,} to {last:,}": slots[first:last]
        for first, last in zip(edges, edges[1:], strict=False)
    }
    size_of_row = np.repeat(prepared.table_sizes, prepared.table_sizes)
    sizes = np.empty(len(size_of_row), np.int64)
    sizes[np.array(prepared.slot_of_row)] = size_of_row
    for low, high in ((1, 100), (100, 10_000), (10_000, 1 << 31)):
        rows = slots[(sizes[:num_hot] >= low) & (sizes[:num_hot] < high)]
        if len(rows):
            groups[f"tables of {low:,} rows and more"] = rows
    return groups


class Quantiles(DropRule):
    """Drops nothing, and finds T for every drop percentage and alpha where a choice is due."""

    found: Rows = []

    def _choose(self, plan: Any, reach: Any, change: Any) -> None:
        left = plan.remaining(True)
        num_features = reach.hot.slots_of(left[:1]).shape[1]
        self._choices += 1
        self.found = []
        for alpha in ALPHAS:
            k = num_stale_rows_needed(alpha, num_features)
            critical = critical_thresholds(change, reach.hot, left, k)
            for percent in range(5, 100, 5):
                threshold = threshold_for_drop(critical, percent / 100)
                self.found.append(
                    {"alpha": alpha, "k": k, "drop_percentage": percent, "inputs": len(left)}
                    | {"threshold": threshold.value}
                )


def thresholds(args: argparse.Namespace, axes: Any) -> Rows:
    """T against the drop percentage D, a line an alpha; infinite where too few can be stale."""
    training = Training(args)
    flags = training.flags
    settings = DropSettings(start=flags.snapshot_start, window=flags.snapshot_window)
    rule = Quantiles(settings, training.prepared.num_hot, flags.seed, lambda record: None)
    training.run(rule)
    if not rule.found:
        raise ValueError("the run ended before the window did: take a larger log")
    for colour, alpha in zip(COLOURS, ALPHAS, strict=False):
        mine = [row for row in rule.found if row["alpha"] == alpha]
        axes.plot(
            [row["drop_percentage"] for row in mine],
            [row["threshold"] for row in mine],
            "o-",
            markersize=3,
            color=colour,
            label=f"alpha {alpha:g}: {mine[0]['k']} rows of an input",
        )
    axes.set(
        yscale="log",
        xlabel="D, % of the hot inputs left",
        ylabel="T, largest change of a row's values",
    )
    return rule.found


def _finished_runs(args: argparse.Namespace) -> dict[str, list[Any]]:
    """The records of each method's, and setting's, finished runs."""
    runs: dict[str, list[Any]] = {}
    for log in sorted(Path(args.runs_dir).glob("*/log.jsonl")):
        records = compare.finished_records(log.parent)
        if records is not None:
            runs.setdefault(log.parent.name.rpartition("-seed")[0], []).append(records)
    if not runs:
        raise ValueError(f"{args.runs_dir} holds no finished runs; run bench.compare first")
    return runs


def _seeds(logs: list[Any]) -> str:
    return f"{len(logs)} seed{'s' * (len(logs) != 1)}"


def curves(args: argparse.Namespace, axes: Any) -> Rows:
    """Test AUC along training, mean over seeds, against inputs trained or training time."""
    found: Rows = []
    against_time = args.name == "times"
    for number, (name, logs) in enumerate(_finished_runs(args).items()):
        points = [compare.curve_of(records) for records in logs]
        for row in zip(*points, strict=False):
            aucs = [record["auc"] for record in row]
            seconds = [compare.all_training_s(record) for record in row]
            found.append(
                {"run": name, "n": len(row), "samples": row[0]["samples"]}
                | {"training_s": float(np.mean(seconds)), "auc": float(np.mean(aucs))}
                | {"auc_sd": compare.standard_deviation(np.array(aucs))}
            )
        mine = [row for row in found if row["run"] == name]
        axes.plot(
            [row["training_s"] if against_time else row["samples"] / 1e3 for row in mine],
            [row["auc"] for row in mine],
            ("-", "--", ":")[number // len(COLOURS) % 3],
            color=COLOURS[number % len(COLOURS)],
            label=f"{name} ({_seeds(logs)})",
        )
    axes.set(
        xlabel="seconds of training, choosing included"
        if against_time
        else "inputs trained, thousands",
        ylabel="test AUC",
    )
    return found


def speed(args: argparse.Namespace, axes: Any) -> Rows:
    """Training time of a comparison's runs, by what took it; the speed over the slowest is written.

    Whiskers: standard deviation over seeds.
    """
    found: Rows = []
    parts = ("training_s", *compare.OVERHEAD)
    for name, logs in _finished_runs(args).items():
        seconds = {
            part: float(np.mean([records[-1].get(part, 0.0) for records in logs])) for part in parts
        }
        samples = float(np.mean([records[-1]["samples"] for records in logs]))
        whole_s = np.array([compare.all_training_s(records[-1]) for records in logs])
        sd = float(np.nan_to_num(compare.standard_deviation(whole_s)))  # of one seed: no whisker
        found.append({"run": name, "n": len(logs), "samples": samples, **seconds, "sd": sd})
    places, whole = np.arange(len(found)), np.zeros(len(found))
    for colour, part in zip(COLOURS, parts, strict=False):
        widths = np.array([row[part] for row in found])
        label = part.removesuffix("_s") + (" and staging" if part == "training_s" else "")
        axes.barh(places, widths, left=whole, color=colour, label=label)
        whole = whole + widths
    spread = np.array([row["sd"] for row in found])
    axes.errorbar(whole, places, xerr=spread, fmt="none", ecolor="black", capsize=3)
    for place, end, right in zip(places, whole, whole + spread, strict=True):
        axes.annotate(f"  {whole.max() / end:.2f}x", (right, place), va="center", fontsize=8)
    axes.set_yticks(places, [row["run"] for row in found])
    axes.set_xlim(0, 1.12 * (whole + spread).max())
    axes.set(xlabel=f"seconds of training, mean of {_seeds(logs)}")
    return found


def policies(args: argparse.Namespace, axes: Any) -> Rows:
    """What each policy and setting costs in AUC, beside what stopping earlier would."""
    found = _differences(args)
    places = np.arange(len(found))
    axes.errorbar(
        [1e3 * row["difference"] for row in found],
        places,
        xerr=[1e3 * row["interval"] for row in found],
        fmt="o",
        color=COLOURS[0],
        label="AUC less the first method's, 95 % of paired seeds",
    )
    axes.plot(
        [1e3 * row["stopped_difference"] for row in found],
        places,
        "|",
        color=COLOURS[1],
        markersize=14,
        label="the first method stopped after as many inputs",
    )
    names = [
        f"{row['method']} {row['setting']}".rstrip() + f", {row['samples'] / 1e3:,.0f} k"
        for row in found
    ]
    axes.set_yticks(places, names)
    axes.axvline(0, color="#999999", linewidth=0.8)
    # Linear to ten thousandths: a policy that ruins the model must not hide the others.
    axes.set_xscale("symlog", linthresh=10, linscale=4)
    right = 0.5 + max(1e3 * (row["difference"] + row["interval"]) for row in found)
    ticks = (-100, *range(-10, 11, 2), 100)
    left = axes.get_xlim()[0]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(left, right if np.isfinite(right) else None)  # one seed has no interval
    axes.set(xlabel="difference of test AUC, thousandths")
    return found


def _differences(args: argparse.Namespace) -> Rows:
    """A row a method and setting of a comparison's table: its AUC less the first method's."""
    import pandas

    table = pandas.read_csv(args.table, dtype={"setting": str})
    table["setting"] = table["setting"].fillna("")
    found: Rows = []
    for (method, setting), rows in table.groupby(["method", "setting"]):
        metric = rows.set_index("metric")
        auc, stopped = metric.loc["auc"], metric.loc["auc_first_at_samples"]
        found.append(
            {"method": method, "setting": setting, "n": int(auc["n"])}
            | {name: float(metric.loc[name, "mean"]) for name in ("samples", "dropped_share")}
            | {"difference": float(auc["difference"]), "interval": float(auc["interval"])}
            | {"stopped_difference": float(stopped["mean"] - auc["mean"] + auc["difference"])}
        )
    found.sort(key=lambda row: (row["setting"], row["difference"]))
    return found


def drop(args: argparse.Namespace, axes: Any) -> Rows:
    """AUC against the share of inputs not trained: a line a method and kind of setting."""
    found = _differences(args)
    lines: dict[str, Rows] = {}
    for row in sorted(found, key=lambda row: row["dropped_share"]):
        if row["method"].startswith("slipstream"):
            kind = row["setting"].rstrip("0123456789")
            lines.setdefault(f"{row['method']} {kind}".strip(), []).append(row)
    for number, (name, rows) in enumerate(sorted(lines.items())):
        axes.errorbar(
            # Beside each other: at equal shares their intervals would cover one another.
            [100 * row["dropped_share"] + 0.2 * number for row in rows],
            [1e3 * row["difference"] for row in rows],
            yerr=[1e3 * row["interval"] for row in rows],
            fmt=("o-", "s--", "^:")[number // len(COLOURS) % 3],
            color=COLOURS[number % len(COLOURS)],
            capsize=2,
            label=name,
        )
    stopped = sorted({(row["dropped_share"], row["stopped_difference"]) for row in found})
    shares, differences = zip(*stopped, strict=True)
    axes.plot(
        [100 * share for share in shares],
        [1e3 * difference for difference in differences],
        color="#999999",
        label="the first method stopped earlier",
    )
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(
        xlabel="inputs not trained, % of all",
        ylabel="test AUC less the first method's,\nthousandths, 95 % of paired seeds",
    )
    return found


FIGURES: dict[str, Callable[[argparse.Namespace, Any], Rows]] = {
    "skew": skew,
    "budget": budget,
    "change": change,
    "thresholds": thresholds,
    "curves": curves,
    "times": curves,
    "speed": speed,
    "policies": policies,
    "drop": drop,
}
NEEDS = {
    "skew": ("segregated_data_dir",),
    "budget": ("processed_data_file", "segregated_data_dir"),
    "change": ("processed_data_file", "segregated_data_dir"),
    "thresholds": ("processed_data_file", "segregated_data_dir"),
    "curves": ("runs_dir",),
    "times": ("runs_dir",),
    "speed": ("runs_dir",),
    "policies": ("table",),
    "drop": ("table",),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left are flags of slipstream_train.py."""
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=FIGURES, help="the figure")
    parser.add_argument("--processed-data-file", default=None, help="a processed .npz")
    parser.add_argument("--segregated-data-dir", default=None, help="the folder made from it")
    parser.add_argument("--runs-dir", default=None, help="a comparison's --runs-dir")
    parser.add_argument("--table", default=None, help="a comparison's --csv")
    parser.add_argument(
        "--row-bytes", type=cli.positive_int, default=64, help="budget: bytes of an embedding row"
    )
    parser.add_argument("--output-dir", default="bench/figures", help="folder of CSV and PNG")
    parser.add_argument("--quick", action="store_true", help="on a small synthetic log")
    args, args.flags = parser.parse_known_args(argv)
    missing = [name for name in NEEDS[args.name] if getattr(args, name) is None]
    if missing and not args.quick:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        parser.error(f"{args.name} needs {flags}, or --quick")
    return args


def make_quick(args: argparse.Namespace, folder: Path) -> None:
    """The small log, and the comparison where the figure is of one."""
    if set(NEEDS[args.name]) <= {"runs_dir", "table"}:
        args.runs_dir, args.table = str(folder / "runs"), str(folder / "table.csv")
        processed, hot_cold = make_small_log(folder, QUICK_ROWS, QUICK_BUDGET)
        flags = ["--processed-data-file", processed, "--segregated-data-dir", hot_cold]
        flags += ["--runs-dir", args.runs_dir, "--csv", args.table, "--num-seeds", "1"]
        flags += ["--methods", "fae", "slipstream-random", *MODEL_FLAGS]
        compare.main([str(flag) for flag in flags])
        return
    paths = make_small_log(folder, QUICK_ROWS, QUICK_BUDGET)
    args.processed_data_file, args.segregated_data_dir = map(str, paths)
    args.flags = [*MODEL_FLAGS, *args.flags]


def main(argv: list[str] | None = None) -> Path:
    """Make a figure; returns its PNG's path."""
    args = parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    import pandas
    from matplotlib import pyplot

    with contextlib.ExitStack() as stack:
        if args.quick:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="figure-"))
            make_quick(args, Path(folder))
        figure, axes = pyplot.subplots(figsize=(7.5, 5.2), layout="constrained")
        rows = FIGURES[args.name](args, axes)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    path = Path(args.output_dir) / f"{args.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    pandas.DataFrame(rows).to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    print(f"wrote {path} and {path.with_suffix('.csv')}")
    return path


if __name__ == "__main__":
    cli.run_script(main)
