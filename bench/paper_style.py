"""How the papers' figures look: size, type, labels beside lines in place of legends.

A figure is `WIDTH` inches wide and its text `POINTS` points: on a page 880 pixels wide, as a
README is, that is 11 points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WIDTH, DPI, POINTS = 8.0, 160, 10
# Beside PNG, for print: what a file says of the program that wrote it and when would differ.
METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
ALSO = ("pdf", "svg")
INK, SOFT, RULE = "#1b1f24", "#59636e", "#dfe3e8"
STYLE = {
    "font.size": POINTS,
    "axes.titlesize": POINTS,
    "axes.labelsize": POINTS,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlecolor": SOFT,
    "grid.color": RULE,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text that can be searched; publishers refuse matplotlib's usual fonts
    "svg.hashsalt": "figure",
}


class Label(NamedTuple):
    """What is written beside a line, and the point of the line that it belongs to."""

    text: str
    colour: str
    x: float
    y: float


@contextmanager
def style() -> Iterator[None]:
    """All that is drawn within looks as above."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns); within `style`."""
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **more)


def save_picture(picture: Any, path: Path, also: Sequence[str] = ()) -> None:
    """Write a figure as PNG at `path`, and beside it in the formats of `also`, of `ALSO`."""
    for kind in ("png", *also):
        picture.savefig(path.with_suffix(f".{kind}"), dpi=DPI, metadata=METADATA[kind])


def label_lines(axes: Any, labels: Sequence[Label], side: str = "right") -> None:
    """Write labels in a column beside the axes, each level with its point as near as they fit.

    After all is drawn: they are placed by the axes' limits.
    """
    labels = [label for label in labels if label.y == label.y]  # NaN has no place
    if not labels:
        return
    axes.figure.draw_without_rendering()
    height = axes.bbox.height
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((label.x, label.y))[1]) for label in labels]
    lines = [1 + label.text.count("\n") for label in labels]
    gap = 1.3 * POINTS / 72 * axes.figure.dpi / height
    order = sorted(range(len(labels)), key=lambda at: wanted[at])
    places = spread([wanted[at] for at in order], [gap * lines[at] for at in order])
    x, align = (1.03, "left") if side == "right" else (-0.03, "right")
    for at, place in zip(order, places, strict=True):
        label = labels[at]
        axes.annotate(
            label.text,
            (label.x, label.y),
            (x, place),
            textcoords="axes fraction",
            color=label.colour,
            fontsize=POINTS,
            ha=align,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def whiskered(axes: Any, x: Any, y: Any, half: Any, colour: str) -> None:
    """A line of points with whiskers, `half` up and `half` down; NaN, as of one seed: none."""
    axes.errorbar(x, y, yerr=half, fmt="o-", color=colour, elinewidth=1, capsize=2)


def banded(
    axes: Any, x: Any, y: Any, half: Any, colour: str, style: str = "-", alpha: float = 0.13
) -> Any:
    """A line, which is returned, and a band `half` up and `half` down; NaN, of one seed: none."""
    [line] = axes.plot(x, y, style, color=colour)
    y, half = np.array(y, float), np.array(half, float)
    if np.isfinite(half).any():
        axes.fill_between(x, y - half, y + half, color=colour, alpha=alpha, linewidth=0)
    return line


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Places near the `wanted` ones, ascending, that keep so much room between them, within 0..1
    where they fit.
    """
    places: list[float] = []
    for number, place in enumerate(wanted):
        if places:
            place = max(place, places[-1] + (sizes[number - 1] + sizes[number]) / 2)
        places.append(place)
    limit = 1.0
    for number in reversed(range(len(places))):
        if places[number] <= limit:
            break
        places[number] = limit
        if number:
            limit -= (sizes[number - 1] + sizes[number]) / 2
    return places


def label_bars(axes: Any, texts: Sequence[str], places: Sequence[float], ends: Any) -> None:
    """Write a text behind the end of each horizontal bar, and make room for it."""
    most = max(list(ends), default=1.0) or 1.0
    longest = max(map(len, texts), default=0)
    axes.set_xlim(0, most * (1 + min(1.4, 0.0145 * longest)))
    for text, place, end in zip(texts, places, ends, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the grid's lines
        axes.text(end + 0.012 * most, place, text, va="center", color=INK, bbox=box)


def bar_axes(axes: Any, names: Sequence[str]) -> None:
    """Horizontal bars from the top down, named at the left; lines along them say nothing."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")


def plain_log_ticks(axes: Any, values: Sequence[float], axis: str = "x", unit: str = "") -> None:
    """A logarithmic axis with these values alone, written out."""
    getattr(axes, f"set_{axis}scale")("log")
    texts = [f"{value:,g}{unit}" for value in values]
    getattr(axes, f"set_{axis}ticks")(list(values), texts)
    getattr(axes, f"set_{axis}ticks")([], minor=True)
