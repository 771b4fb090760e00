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
comparison's runs, or of any: `--runs-dir runs` holds the wrappers' (what they differ in is written
at a line; seeds alone are averaged). speed: their training time, by what took it. policies: AUC
that each policy of a comparison's table loses. drop: AUC lost against the inputs not trained, by
policy; settings named alike but for a number, as hard20 and hard40, are a line.

`change` and `thresholds` train, with flags of slipstream_train.py. `--also pdf`: and for print.

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
from bench.colours import COLOURS  # noqa: E402
from bench.paper_style import ALSO, new_figure, save_picture, style  # noqa: E402
from bench.run_figures import Rows, curves, drop, policies, speed  # noqa: E402
from bench.small_log import MODEL_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import open_npz  # noqa: E402

NUM_POINTS = 60
NUM_TABLES = 6
QUICK_ROWS, QUICK_BUDGET = 20_000, 200_000
LONG_LABEL, MEDIUM_LABEL = 40, 24  # characters: of longer ones one, two go beside each other


def accesses_by_share(folder: str | Path) -> Rows:
    """Share of the accesses that the most popular rows of a segregated folder take: of all tables
    and of the largest ones.
    """
    ranked = open_npz(Path(folder) / "embedding_rows.npz")
    accesses = ranked["access_counts"][ranked["slot_of_row"]]
    ends = np.cumsum(ranked["counts"])
    tables = {
        f"table {number + 1}: {size:,} rows": accesses[ends[number] - size : ends[number]]
        for number, size in enumerate(ranked["counts"])
    }
    largest = sorted(tables, key=lambda name: -len(tables[name]))[:NUM_TABLES]
    found = []
    for name in ["all tables", *largest]:
        counts = np.sort(accesses if name == "all tables" else tables[name])[::-1]
        rows = np.unique(np.geomspace(1, len(counts), NUM_POINTS).astype(np.int64))
        shares = np.cumsum(counts)[rows - 1] / max(counts.sum(), 1)
        found += [
            {"table": name, "rows_share": n / len(counts), "accesses_share": float(share)}
            for n, share in zip(rows.tolist(), shares, strict=True)
        ]
    return found


def skew(args: argparse.Namespace, axes: Any) -> Rows:
    """The most popular share of rows against the share of accesses they take."""
    found = accesses_by_share(args.segregated_data_dir)
    names = dict.fromkeys(row["table"] for row in found)
    for colour, name in zip(COLOURS[::-1], names, strict=False):
        mine = [row for row in found if row["table"] == name]
        shares = ([100 * row[key] for row in mine] for key in ("rows_share", "accesses_share"))
        axes.plot(*shares, color=colour, label=name)
    axes.set(xscale="log", xlabel="most popular rows, % of the table", ylabel="% of its accesses")
    return found


def hot_by_memory(processed: str | Path, folder: str | Path, row_bytes: int) -> Rows:
    """Accesses and inputs that are hot in so much memory for hot rows, of `row_bytes` each."""
    from slipstream.logs.processed import load_processed
    from slipstream.training.popularity import count_hot_inputs

    ranked = open_npz(Path(folder) / "embedding_rows.npz")
    train = load_processed(processed).splits()[0]
    slot_of_row, accesses = np.array(ranked["slot_of_row"]), ranked["access_counts"]
    bounds = np.unique(np.geomspace(10, len(accesses), NUM_POINTS).astype(np.int64))[::-1]
    inputs, *_ = count_hot_inputs(train, slot_of_row, bounds.tolist())
    taken = np.cumsum(accesses)[bounds - 1] / max(int(accesses.sum()), 1)
    found = zip(bounds.tolist(), taken.tolist(), (inputs / len(train)).tolist(), strict=True)
    return [
        {"hot_rows": n, "megabytes": n * row_bytes / 1e6, "accesses_share": a, "inputs_share": b}
        for n, a, b in found
    ]


def budget(args: argparse.Namespace, axes: Any) -> Rows:
    """Memory for hot rows against the accesses and the inputs that are hot."""
    found = hot_by_memory(args.processed_data_file, args.segregated_data_dir, args.row_bytes)
    megabytes = [row["megabytes"] for row in found]
    lines = {"accesses_share": "accesses to hot rows", "inputs_share": "hot inputs"}
    for colour, (key, label) in zip(COLOURS, lines.items(), strict=False):
        axes.plot(megabytes, [100 * row[key] for row in found], color=colour, label=label)
    axes.set(xscale="log", xlabel=f"MB of hot rows ({args.row_bytes} bytes each)", ylabel="%")
    return found


def _training_figure(name: str) -> Callable[[argparse.Namespace, Any], Rows]:
    def draw(args: argparse.Namespace, axes: Any) -> Rows:
        from bench import training_figures  # imports torch

        return getattr(training_figures, name)(args, axes)

    return draw


FIGURES: dict[str, Callable[[argparse.Namespace, Any], Rows]] = {
    "skew": skew,
    "budget": budget,
    "change": _training_figure("change"),
    "thresholds": _training_figure("thresholds"),
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
    parser.add_argument("--runs-dir", default=None, help="a folder of runs")
    parser.add_argument("--table", default=None, help="a comparison's --csv")
    parser.add_argument(
        "--row-bytes", type=cli.positive_int, default=64, help="budget: bytes of an embedding row"
    )
    parser.add_argument("--output-dir", default="bench/figures", help="folder of CSV and PNG")
    parser.add_argument("--also", nargs="+", choices=ALSO, default=[], help="formats beside PNG")
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
    import pandas
    from matplotlib import pyplot

    with contextlib.ExitStack() as stack:
        if args.quick:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="figure-"))
            make_quick(args, Path(folder))
        stack.enter_context(style())
        figure, [[axes]] = new_figure(5.2)
        rows = FIGURES[args.name](args, axes)
        labels = axes.get_legend_handles_labels()[1]
        longest = max(map(len, labels), default=0)
        columns = 1 if longest > LONG_LABEL else 2 if longest > MEDIUM_LABEL else 3
        # Of short labels three rows have room as it is.
        num_lines = sum(1 + label.count("\n") for label in labels)
        more_lines = num_lines if columns == 1 else max(-(-num_lines // columns) - 3, 0)
        figure.set_figheight(5.2 + 0.2 * more_lines)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
        path = Path(args.output_dir) / f"{args.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(figure, path, args.also)
        pyplot.close(figure)
    pandas.DataFrame(rows).to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    print(f"wrote {path} and {path.with_suffix('.csv')}")
    return path


if __name__ == "__main__":
    cli.run_script(main)
