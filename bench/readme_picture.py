"""The README's picture: AUC against time, and under it where hot and cold rows are.

    python -m bench.readme_picture
    python -m bench.readme_picture --runs-dir runs/time_to_auc

The curves are of runs of `bench.time_to_auc`: mean AUC and median seconds of training over seeds
(evaluations not counted), as in its table. With `--runs-dir`, its folder, they are
tabulated into `--csv` first; without, that table is drawn as it is. The drawing below shows no
measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/readme_picture.py`

from bench.colours import METHOD_COLOURS  # noqa: E402
from bench.paper_style import DPI, INK, SOFT, new_figure, style  # noqa: E402
from bench.run_figures import aligned_points  # noqa: E402
from bench.run_records import all_training_s, finished_records, save_table  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.runtime import read_json  # noqa: E402

TABLE = REPOSITORY / "bench/results/readme_curves_synthetic_1m_epyc_2core.csv"
PICTURE = REPOSITORY / "bench/figures/readme.png"
HOT, COLD, STAGED = "#E69F00", "#9CCFEF", "#DCEEFA"  # of no method that the curves show
SMALL = 9  # points; at 880 pixels the smallest text is 10 pixels high


class Line(NamedTuple):
    """A curve: what it is called, its colour, where its name stands beside its end (points)."""

    name: str
    colour: str
    place: tuple[float, float]
    drawn: str = "-"


# By the methods of `bench.time_to_auc`; ours are alike but for the last word: bf16, --min-count 4.
LINES = {
    "plain": Line("plain PyTorch, Meta's recipe", METHOD_COLOURS["plain"], (0, 13)),
    "plain-tuned": Line("plain PyTorch, our recipe", METHOD_COLOURS["plain"], (10, 8), "--"),
    "min-count": Line("baseline", METHOD_COLOURS["baseline"], (44, 24)),
    "fae": Line("FAE", METHOD_COLOURS["fae"], (40, 9)),
    "slipstream": Line("Slipstream", METHOD_COLOURS["slipstream"], (48, 39)),
}


def tabulate(folder: Path) -> list[dict[str, Any]]:
    """A row an evaluation and method; `ValueError` where a method has no finished run."""
    about = read_json(folder / "comparison.json")
    told = {"machine": about["machine"].get("gpu") or about["machine"]["cpu"]}
    told |= {"cores": about["machine"]["cpu_cores"], "commit": about["commit"]}
    rows: list[dict[str, Any]] = []
    for method in LINES:
        found = (finished_records(log.parent) for log in folder.glob(f"{method}-seed*/log.jsonl"))
        logs = [records for records in found if records is not None]
        if not logs:
            raise ValueError(f"{folder} holds no finished run of {method}: run bench.time_to_auc")
        for records_of_seeds in aligned_points(logs):
            point = {"method": method, "n": len(logs)}
            for name in ("samples", "auc"):
                point[name] = float(np.mean([record[name] for record in records_of_seeds]))
            seconds = [all_training_s(record) for record in records_of_seeds]
            rows.append({**point, "training_s": float(np.median(seconds)), **told})
    return rows


def draw_curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Test AUC against seconds of training, a line a method, named at its end."""
    leader = {"arrowstyle": "-", "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)}
    for method, line in LINES.items():
        mine = [row for row in rows if row["method"] == method]
        x, y = ([row[name] for row in mine] for name in ("training_s", "auc"))
        axes.plot(x, y, line.drawn, color=line.colour)
        axes.plot(x[-1], y[-1], "o", color=line.colour)
        axes.annotate(
            f"{line.name}: {y[-1]:.4f}, {x[-1]:.1f} s",
            (x[-1], y[-1]),
            line.place,
            textcoords="offset points",
            color=line.colour,
            ha="right" if line.place[0] == 0 else "left",
            va="center",
            arrowprops=leader | {"color": line.colour} if line.place[0] > 10 else None,
        )
    first = rows[0]
    axes.set_title(
        f"test AUC, an epoch of {max(row['samples'] for row in rows):,.0f} synthetic inputs, "
        f"{min(row['n'] for row in rows)} seeds, {first['machine']}, {first['cores']} cores"
    )
    top = max(row["auc"] for row in rows)
    axes.set_ylim(top - 0.05, top + 0.018)
    axes.set_xlim(0, 1.02 * max(row["training_s"] for row in rows))
    axes.set_xlabel("seconds of training")


def box(axes: Any, x: float, y: float, width: float, height: float, **more: Any) -> None:
    """A rectangle; edges and faces as `more` says."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0.8, **more}))


def write(axes: Any, x: float, y: float, text: str, **more: Any) -> None:
    """Small text, its left end at x unless `more` says."""
    axes.text(x, y, text, **{"fontsize": SMALL, "color": INK, "va": "center", **more})


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **more: Any) -> None:
    """An arrow between two points."""
    shape = {"arrowstyle": "-|>", "color": SOFT, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**shape, **more})


def cells(axes: Any, x: float, y: float, columns: int, rows: int, colour: str) -> None:
    """Embedding rows: a block of small cells, its lower left corner at (x, y)."""
    for column in range(columns):
        for row in range(rows):
            box(axes, x + 1.6 * column, y + 1.6 * row, 1.6, 1.6, facecolor=colour, edgecolor="w")


def draw_places(axes: Any) -> None:
    """Where rows are: host memory at the left, the device's at the right."""
    frame = {"facecolor": "none", "edgecolor": SOFT}
    box(axes, 0, 23, 29, 22, **frame)
    write(axes, 1.5, 43, "host memory", weight="bold")
    cells(axes, 1.5, 30.4, 16, 6, COLD)
    write(axes, 1.5, 28.4, "cold rows: most rows,")
    write(axes, 1.5, 25.8, "few accesses")
    box(axes, 46, 23, 54, 22, **frame)
    write(axes, 47.5, 43, "GPU memory", weight="bold")
    cells(axes, 47.5, 30.4, 7, 6, STAGED)
    write(axes, 47.5, 28.4, "staging area")
    cells(axes, 62.5, 30.4, 10, 6, HOT)
    write(axes, 62.5, 28.4, "hot rows: few rows,")
    write(axes, 62.5, 25.8, "most accesses")
    box(axes, 86, 30.4, 12, 9.6, facecolor="white", edgecolor=INK)
    write(axes, 92, 35.2, "network", ha="center")
    arrow(axes, (79.2, 35.2), (85.4, 35.2), arrowstyle="<|-|>")
    arrow(axes, (29.4, 37), (46.9, 37), color="#2F7FB5")
    arrow(axes, (46.9, 33), (29.4, 33), color="#2F7FB5")
    write(axes, 37.5, 41.6, "rows of a", ha="center")
    write(axes, 37.5, 39.2, "cold batch", ha="center")
    write(axes, 37.5, 30.8, "back after", ha="center")
    write(axes, 37.5, 28.4, "its step", ha="center")


# An epoch's mini-batches: hot, cold, or hot with a stale part that is dropped.
EPOCH = "hhchhchhchhchh" + "dcddcddcddcd"
START, WINDOW_END, PITCH = 8, 14, 3.85


def draw_epoch(axes: Any) -> None:
    """An epoch's mini-batches in time; the snapshot, and what is dropped after its window."""
    y, height, width = 8.4, 5.6, 3.0
    for number, kind in enumerate(EPOCH):
        x = PITCH * number
        if kind == "d":
            box(axes, x, y, width, height, facecolor="w", edgecolor=SOFT, linestyle=(0, (2, 2)))
        share = 0.55 if kind == "d" else 1.0
        box(axes, x, y, width, share * height, facecolor=COLD if kind == "c" else HOT)
    arrow(axes, (0, 6.6), (PITCH * len(EPOCH), 6.6), linewidth=0.8)
    starts, ends = (PITCH * at - 0.4 for at in (START, WINDOW_END))
    for x in (starts, ends):
        axes.plot([x, x], [6.6, 17.2], color=INK, linewidth=1)
    arrow(axes, (starts, 16.4), (ends, 16.4), arrowstyle="<|-|>", color=INK, linewidth=0.8)
    write(axes, (starts + ends) / 2, 18.6, "window", ha="center")
    write(axes, starts - 0.8, 18.6, "snapshot of hot rows", ha="right")
    write(axes, ends + 0.8, 18.6, "rows that hardly changed are stale;")
    write(axes, ends + 0.8, 16.2, "hot inputs of stale rows are dropped")
    box(axes, 0, 1.4, 1.8, 2.6, facecolor=HOT)
    write(axes, 2.6, 2.7, "hot batch: its rows are all hot")
    box(axes, 36, 1.4, 1.8, 2.6, facecolor=COLD)
    write(axes, 38.6, 2.7, "cold batch: some are not")
    box(axes, 67, 1.4, 1.8, 2.6, facecolor="w", edgecolor=SOFT, linestyle=(0, (2, 2)))
    write(axes, 69.6, 2.7, "dropped for this epoch")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both panels, as PNG."""
    with style():
        from matplotlib import pyplot

        figure, [[above], [below]] = new_figure(6.2, 2, 1, height_ratios=(0.85, 1.1))
        below.set(xlim=(-0.5, 100.5), ylim=(0, 46))
        below.axis("off")
        draw_places(below)
        draw_epoch(below)
        draw_curves(above, rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)
    print(f"wrote {path}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs-dir", default=None, help="tabulate these runs of bench.time_to_auc")
    parser.add_argument("--csv", default=str(TABLE), help="the curves")
    parser.add_argument("--output", default=str(PICTURE), help="draw the picture here, as PNG")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Draw; returns where the picture is."""
    import pandas

    args = parse_args(argv)
    if args.runs_dir:
        save_table(tabulate(Path(args.runs_dir)), args.csv)
    draw(pandas.read_csv(args.csv).to_dict("records"), Path(args.output))
    return Path(args.output)


if __name__ == "__main__":
    cli.run_script(main)
