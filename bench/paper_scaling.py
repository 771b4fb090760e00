"""Scaling over processes, of the CSV files that `python -m bench.scaling --out FILE.csv` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.colours import OTHER_COLOURS
from bench.paper_runs import Drawn
from bench.paper_style import SOFT, Label, label_lines, new_figure, plain_log_ticks

NEEDED = {"kind", "scheme", "scaling", "processes", "speedup"}
NOT_RUN = (
    "Not run: no CSV of bench.scaling in {folder}. Run python -m bench.scaling "
    "--segregated-data-dir DIR --out {folder}/scaling.csv, then this page again."
)
LOOKS = {"weak": OTHER_COLOURS[0], "strong": OTHER_COLOURS[1]}


def read_lines(folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The lines of our scheme of all such files, and the files; others are passed over.

    `ValueError`: one that is named scaling*.csv and is no such table.
    """
    import pandas

    lines: list[dict[str, Any]] = []
    files = []
    for path in sorted(folder.glob("*.csv")):
        try:
            table = pandas.read_csv(path)
        except ValueError as error:  # pandas' own errors are such
            if path.name.startswith("scaling"):
                raise ValueError(f"{path} is no CSV: {error}") from error
            continue
        if NEEDED - set(table.columns):
            if path.name.startswith("scaling"):
                lacking = ", ".join(sorted(NEEDED - set(table.columns)))
                raise ValueError(f"{path} has no column {lacking}: is it of bench.scaling --out?")
            continue
        ours = table[table.scheme == "ours"].to_dict("records")
        lines += [{"file": path.name, **{str(k): v for k, v in line.items()}} for line in ours]
        files.append(path)
    return lines, files


def scaling(folder: Path) -> Drawn:
    """Speed-up against processes, measured, and expected of as many GPUs."""
    lines, files = read_lines(folder) if folder.is_dir() else ([], [])
    if not lines:
        return Drawn([], NOT_RUN.format(folder=folder))
    picture, [[axes]] = new_figure(3.8)
    labels = []
    most = max(line["processes"] for line in lines)
    axes.plot([1, most], [1, most], color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
    labels.append(Label("W times", SOFT, most, most))
    for file in files:
        for kind, style in (("measured", "o-"), ("expected", ".--")):
            for name, colour in LOOKS.items():
                mine = [
                    line
                    for line in lines
                    if (line["file"], line["kind"], line["scaling"]) == (file.name, kind, name)
                ]
                if not mine:
                    continue
                mine.sort(key=lambda line: line["processes"])
                x, y = ([line[key] for line in mine] for key in ("processes", "speedup"))
                axes.plot(x, y, style, color=colour)
                text = f"{name}, {kind}" + (f"\n{file.stem}" if len(files) > 1 else "")
                labels.append(Label(text, colour, x[-1], y[-1]))
    plain_log_ticks(axes, sorted({line["processes"] for line in lines}))
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set(xlabel="processes, W", ylabel="speed-up over one process")
    label_lines(axes, labels)
    measured = [line for line in lines if line["kind"] == "measured"]
    told = [
        f"{line['scaling']} at W = {line['processes']:g}: {line['speedup']:.2f}x"
        for line in measured
        if line["processes"] > 1
    ]
    said = f"Measured: {', '.join(told) or 'nothing'}. " + (
        "Expected is the model of bench.scaling, for GPUs; none has confirmed it."
        if len(measured) < len(lines)
        else ""
    )
    return Drawn(lines, said, picture)
