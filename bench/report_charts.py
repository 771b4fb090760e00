"""Charts of a report, as SVG and HTML that a page's own style colours.

A run has one colour everywhere, which its page's theme decides: `--c` of its class. The eighth run
has the first one's colour, and dashes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float]
NUM_COLOURS = 7  # as report.css has
DASHES = ("", "7 4", "2 3")
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 470, 12, 206  # of the plot
MAX_POINTS, MAX_MARKERS = 400, 60
WARM_UP = 0.1  # of the x axis: what lies there alone does not widen the y axis


class Line(NamedTuple):
    """A run's points in a chart."""

    name: str
    place: int
    points: Sequence[Point]


def colour(place: int) -> str:
    """The class that gives a run its colour."""
    return f"run{place % NUM_COLOURS}"


def swatch(place: int) -> str:
    """A run's line, for a legend."""
    return (
        f'<svg class="swatch {colour(place)}" viewBox="0 0 28 10" aria-hidden="true">'
        f'<path class="line" d="M1 5H27"{_dash(place)}/></svg>'
    )


def line_chart(title: str, lines: Sequence[Line], x_label: str, diagonal: bool = False) -> str:
    """A line a run; with `diagonal` both axes are alike, and y = x is drawn.

    y is fitted to what comes after the first tenth of x: a curve may begin outside.
    """
    lines = [line for line in lines if line.points]
    x_low, x_high = _padded([x for line in lines for x, _ in line.points], from_zero=True)
    late = [y for line in lines for x, y in line.points if x >= WARM_UP * x_high]
    if diagonal:
        late = [value for line in lines for point in line.points for value in point]
        x_low, x_high = _padded(late, from_zero=True)
    y_low, y_high = (x_low, x_high) if diagonal else _padded(late)

    def at(point: Point) -> Point:
        x, y = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return LEFT + x * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP)

    parts = []
    for tick, text in _ticks(y_low, y_high):
        y = at((x_low, tick))[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in _ticks(x_low, x_high):
        x = at((tick, y_low))[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 20}" text-anchor="middle">{text}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    if diagonal:
        parts.append(f'<path class="diagonal" d="M{LEFT} {BOTTOM}L{RIGHT} {TOP}"/>')
    # A nested svg clips what lies outside of the plot.
    size = f'width="{RIGHT - LEFT + 10}" height="{BOTTOM - TOP + 10}"'
    box = f"{LEFT - 5} {TOP - 5} {RIGHT - LEFT + 10} {BOTTOM - TOP + 10}"
    parts.append(f'<svg x="{LEFT - 5}" y="{TOP - 5}" {size} viewBox="{box}">')
    parts += [_drawn(line, [at(point) for point in _thinned(line.points)]) for line in lines]
    parts.append("</svg>")
    label = html.escape(f"{title}, against {x_label}")
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg class="chart" role="img" '
        f'aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></figure>'
    )


def _drawn(line: Line, places: Sequence[Point]) -> str:
    name = html.escape(line.name)
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<g class="{colour(line.place)}"><title>{name}</title>']
    parts.append(f'<path class="line" d="M{path}"{_dash(line.place)}/>')
    values = _thinned(line.points)
    shown = range(len(places)) if len(places) <= MAX_MARKERS else [len(places) - 1]
    for index in shown:
        (x, y), (value_x, value_y) = places[index], values[index]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{name}: {value_y:.4g} at '
            f"{value_x:,.4g}</title></circle>"
        )
    return "".join([*parts, "</g>"])


def _dash(place: int) -> str:
    dash = DASHES[place // NUM_COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(number * step)] for number in range(MAX_POINTS)]


def _padded(values: Sequence[float], from_zero: bool = False) -> Point:
    """Ends of an axis that holds the values, never equal."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero and low >= 0:
        return 0.0, high * 1.03 or 1.0
    margin = max(0.06 * (high - low), 1e-4 * abs(high), 1e-4 * abs(low)) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round values from `low` to `high`, about five, with their texts."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    unit, suffix = 1.0, ""
    for unit_of, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if high >= 2 * unit_of:
            unit, suffix = unit_of, letter
            break
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [place * step for place in range(first, last + 1)]
    return [(x, f"{x / unit:.{decimals}f}{suffix if x else ''}") for x in values]


def bars(rows: Sequence[tuple[str, int, Sequence[float]]], parts: Sequence[str], unit: str) -> str:
    """A bar a run (name, place, a value a part), of `parts` in shades of its colour."""
    longest = max((sum(values) for _, _, values in rows), default=0.0)
    longest = longest if longest > 0 else 1.0
    legend = "".join(
        f'<span><i class="part part{number}"></i>{html.escape(part)}</span>'
        for number, part in enumerate(parts)
    )
    drawn = []
    for name, place, values in rows:
        pieces = "".join(
            f'<i class="part part{number}" style="width:{100 * value / longest:.3f}%" '
            f'title="{html.escape(part)}: {value:,.4g}{unit}"></i>'
            for number, (part, value) in enumerate(zip(parts, values, strict=True))
            if value > 0
        )
        whole = f"{sum(values):,.4g}" if sum(values) < 1000 else f"{sum(values):,.0f}"
        drawn.append(
            f'<div class="bar {colour(place)}"><span>{html.escape(name)}: {whole}{unit}</span>'
            f"<div>{pieces}</div></div>"
        )
    return f'<div class="bars"><p class="legend">{legend}</p>{"".join(drawn)}</div>'
