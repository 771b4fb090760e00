"""Where dropping inputs earns its place: AUC against what a run costs, beside training less.

    python -m bench.front --runs-dir runs/methods_2m --csv bench/results/front_2m.csv \
        --output bench/figures/front_2m.png

Reads a folder of `bench.compare` whose runs are of three kinds: FAE's whole epoch (`fae`), shorter
ones of it (settings whose names begin with `less`, as `less80=--num-batches 670`), and Slipstream's
by any policies and settings. A hot input costs 1 and a cold one c, as `--costs` say: 1 on a CPU,
where all rows are in one memory; more where cold rows come from a host's. A run's cost is that of
the inputs it trained, as a share of FAE's whole epoch.

For each of Slipstream's kinds: its AUC less that of *training less* at the same cost, which is the
AUC between FAE's runs next to that cost, seed by seed; with its 95 % interval (Student's t), a tie
where that holds 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/front.py`

from bench.colours import colours_of  # noqa: E402
from bench.comparison_tables import half_interval  # noqa: E402
from bench.paper_style import DPI, new_figure, style  # noqa: E402
from bench.run_records import Records, finished_records, save_table  # noqa: E402
from slipstream.tools import cli  # noqa: E402

WHOLE, SHORTER = "fae", "fae-less"
Runs = dict[str, dict[str, Records]]  # by kind, then seed


def runs_of(folder: Path) -> Runs:
    """The finished runs of a comparison; `ValueError` where FAE's whole epoch is not among them."""
    found: Runs = {}
    for log in sorted(folder.glob("*-seed*/log.jsonl")):
        kind, _, seed = log.parent.name.rpartition("-seed")
        if (records := finished_records(log.parent)) is not None:
            lacking = [n for n in ("auc", "samples", "hot_share") if records[-1].get(n) is None]
            if lacking:
                raise ValueError(
                    f"{log}: its summary has no {lacking[0]}: there is nothing to compare"
                )
            found.setdefault(kind, {})[seed] = records
    if WHOLE not in found or not any(kind.startswith(SHORTER) for kind in found):
        raise ValueError(
            f"{folder} holds no whole epoch of fae, or none of its shorter ones (settings less...)"
        )
    return found


def cost_of(records: Records, cold_cost: float) -> float:
    """What a run's inputs cost, in hot inputs."""
    summary = records[-1]
    hot = summary["samples"] * summary["hot_share"]
    return float(hot + cold_cost * (summary["samples"] - hot))


def at_cost(points: list[tuple[float, float]], cost: float) -> float:
    """The AUC between the points (cost, AUC) next to a cost; NaN outside of them."""
    costs, aucs = zip(*sorted(points), strict=True)
    if not costs[0] <= cost <= costs[-1] * (1 + 1e-9):
        return float("nan")
    return float(np.interp(cost, costs, aucs))


def tabulate(runs: Runs, cold_cost: float) -> list[dict[str, Any]]:
    """A line a kind: its share of the cost, its AUC, and that less training less."""
    shorter = {seed: [log] for seed, log in runs[WHOLE].items()}
    for kind, logs in runs.items():
        if kind.startswith(SHORTER):
            for seed, log in logs.items():
                shorter.setdefault(seed, []).append(log)
    lines = []
    for kind, logs in runs.items():
        costs, aucs, differences = [], [], []
        for seed in sorted(logs.keys() & runs[WHOLE].keys()):
            whole = cost_of(runs[WHOLE][seed], cold_cost)
            points = [(cost_of(log, cold_cost) / whole, log[-1]["auc"]) for log in shorter[seed]]
            costs.append(cost_of(logs[seed], cold_cost) / whole)
            aucs.append(logs[seed][-1]["auc"])
            differences.append(aucs[-1] - at_cost(points, costs[-1]))
        line: dict[str, Any] = {"cold_cost": cold_cost, "kind": kind, "n": len(aucs)}
        line |= {"cost": np.mean(costs), "auc": np.mean(aucs)}
        if not kind.startswith(WHOLE):
            line |= {"less_shorter": np.mean(differences)}
            line["interval"] = half_interval(np.array(differences))
            if np.isfinite(line["interval"]):  # else nothing is known
                line["tie"] = bool(abs(line["less_shorter"]) <= line["interval"])
        lines.append(line)
    return sorted(lines, key=lambda line: (family_of(line["kind"]) or line["kind"], -line["cost"]))


def family_of(kind: str) -> str | None:
    """What is one line in the figure: training less, or a policy with the settings d10, d20, ..."""
    name, _, setting = kind.rpartition("-")
    if kind == WHOLE or kind.startswith(SHORTER):
        return WHOLE
    return name if setting[:1] == "d" and setting[1:].isdecimal() else None


def print_table(lines: list[dict[str, Any]]) -> None:
    """For people."""
    width = max(len(line["kind"]) for line in lines) + 2
    print(f"\na cold input costs {lines[0]['cold_cost']:g} hot ones")
    print(f"{'':<{width}}  n   cost     AUC     less training less at that cost")
    for line in lines:
        said = f"{line['kind']:<{width}}{line['n']:>3}  {line['cost']:.3f}  {line['auc']:.4f}"
        if "less_shorter" in line and np.isfinite(line["less_shorter"]):
            said += f"  {line['less_shorter']:+.4f} ± {line['interval']:.4f}"
            said += " (tie)" if line.get("tie") else ""
        print(said)


def draw(tables: Mapping[float, list[dict[str, Any]]], path: Path) -> None:
    """A panel a cost, two beside each other, of what `family_of` knows."""
    from matplotlib import pyplot

    num_rows = (len(tables) + 1) // 2
    with style():
        figure, panels = new_figure(0.6 + 2.9 * num_rows, num_rows, 2, sharey=True)
        for axes, (cold_cost, lines) in zip(panels.flat, tables.items(), strict=False):
            found = {family for line in lines if (family := family_of(line["kind"]))}
            families = sorted(found, key=lambda name: (name != WHOLE, name))
            for family, colour in zip(families, colours_of(families), strict=True):
                points = [line for line in lines if family_of(line["kind"]) == family]
                label = family.removeprefix("slipstream-")
                axes.plot(
                    [point["cost"] for point in points],
                    [point["auc"] for point in points],
                    color=colour,
                    linewidth=2.6 if family == WHOLE else 1.6,
                    marker="o",
                    label="training less (FAE)" if family == WHOLE else label,
                )
            axes.set_title(f"a cold input costs {cold_cost:g}x a hot one")
            axes.set_xlabel("cost, share of FAE's epoch")
        for axes in panels.flat[len(tables) :]:
            axes.set_visible(False)
        for [axes, *_] in panels:
            axes.set_ylabel("test AUC")
        handles, labels = panels[0][0].get_legend_handles_labels()
        look = {"frameon": False, "labelcolor": "linecolor", "ncols": len(labels)}
        figure.legend(handles, labels, loc="outside upper center", **look)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)
    print(f"wrote {path}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs-dir", required=True, help="folder of a comparison")
    parser.add_argument(
        "--costs",
        nargs="+",
        type=cli.positive_float,
        default=[1.0, 2.0, 4.0, 10.0],
        help="of a cold input, in hot ones",
    )
    parser.add_argument("--csv", default=None, help="write the tables here")
    parser.add_argument("--output", default=None, help="draw the figure here, as PNG")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Tabulate; returns all lines."""
    args = parse_args(argv)
    runs = runs_of(Path(args.runs_dir))
    tables = {cost: tabulate(runs, cost) for cost in dict.fromkeys(args.costs)}
    for lines in tables.values():
        print_table(lines)
    if args.output:
        draw(tables, Path(args.output))
    found = [line for lines in tables.values() for line in lines]
    if args.csv:
        save_table(found, args.csv)
    return found


if __name__ == "__main__":
    cli.run_script(main)
