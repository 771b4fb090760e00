"""The figure of `bench.scaling`: memory, volume and efficiency against the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.run_figures import COLOURS
from bench.scaling_model import SCHEMES, Links

Lines = Sequence[dict[str, Any]]
COLOUR_OF = dict(zip(SCHEMES, COLOURS, strict=False))
SIZE, DPI = (8.8, 7.6), 100  # inches: 880 pixels across
ROOM = 1.25  # above the highest point, for a note
LABEL_APART = 0.075  # of a panel's height: from one label to the next


def draw(lines: Lines, measured: Lines, links: Links, title: str, path: Path) -> None:
    """Four panels, a colour a scheme; `measured` volumes, of runs, are dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "axes.titlesize": 10.5}):
        figure, panels = pyplot.subplots(2, 2, figsize=SIZE, layout="constrained")
        weak = [line for line in lines if line["scaling"] == "weak"]
        strong = [line for line in lines if line["scaling"] == "strong"]
        part = weak[0]["inputs_a_rank"]
        _panel(panels[0][0], weak, "memory_mb", "memory a rank, MB (rows, sums, staging)")
        _panel(panels[0][1], weak, "received_mb", f"received a rank and step, MB ({part:,} a rank)")
        dots = [line for line in measured if line["scaling"] == "weak" and line["processes"] > 1]
        if dots:
            ranks = [line["processes"] for line in dots]
            values = [line["received_mb"] for line in dots]
            ours = {"color": COLOUR_OF["ours"]}
            panels[0][1].plot(ranks, values, "o", markersize=8, markerfacecolor="none", **ours)
            panels[0][1].annotate(
                "measured here",
                (ranks[-1], values[-1]),
                xytext=(9, -4),
                textcoords="offset points",
                va="top",
                **ours,
            )
            low, high = panels[0][1].get_ylim()
            panels[0][1].set_ylim(low * (low / high) ** 0.06, high)  # room for the words
        _panel(panels[1][0], weak, "efficiency", f"efficiency, {part:,} inputs a GPU", 100)
        _panel(panels[1][1], strong, "speedup", f"speed-up, {part:,} inputs a step in all")
        for axes in panels[1]:
            _mark_machine(axes, links.gpus_per_machine, max(line["processes"] for line in lines))
        panels[1][0].set_yticks(range(0, 101, 20))
        panels[1][0].set_ylabel("% of W single GPUs")
        panels[1][1].set_ylabel("times one GPU")
        assumed = (
            f"expected, of {links.nvlink:g} GB/s in a machine of {links.gpus_per_machine} GPUs, "
            f"{links.nic:g} GB/s between machines, {links.latency_us:g} us a collective"
        )
        figure.suptitle(f"{title}\n{assumed}", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)
    print(f"figure: {path}")


def _panel(axes: Any, lines: Lines, name: str, title: str, factor: float = 1) -> None:
    """A line a scheme, named at its right end; a logarithmic scale for megabytes."""
    is_megabytes = name.endswith("_mb")
    ends = {}
    for scheme in SCHEMES:
        own = [line for line in lines if line["scheme"] == scheme]
        if is_megabytes:  # one rank alone receives nothing: no place on the scale
            own = [line for line in own if line[name] > 0]
        if not own:
            continue
        ranks, values = [line["processes"] for line in own], [factor * line[name] for line in own]
        axes.plot(ranks, values, color=COLOUR_OF[scheme], linewidth=2, marker=".")
        ends[scheme] = (ranks[-1], values[-1])
    axes.set_xscale("log", base=2)
    if is_megabytes:
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(_plain)
    else:
        axes.set_ylim(0, ROOM * axes.dataLim.y1)
    shown = sorted({line["processes"] for line in lines})
    axes.set_xticks(shown, [f"{number}" for number in shown])
    axes.minorticks_off()
    axes.set_title(title, loc="left")
    axes.set_xlabel("processes W, a GPU each")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, ends)


def _plain(value: float, _: Any) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _name_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Write each line's name right of its end, moved apart where they would overlap."""
    to_axes = axes.transAxes.inverted()
    heights = {
        scheme: float(to_axes.transform(axes.transData.transform(point))[1])
        for scheme, point in ends.items()
    }
    for scheme, height in apart(heights, LABEL_APART).items():
        axes.annotate(
            scheme.replace("-", "\n", 1),
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            color=COLOUR_OF[scheme],
            linespacing=1.0,
            annotation_clip=False,
        )


def apart(heights: dict[str, float], least: float) -> dict[str, float]:
    """The heights, each at least two lines from the one below it, as little moved as that takes."""
    order = sorted(heights, key=lambda name: heights[name])
    found = np.array([heights[name] for name in order])
    for _ in range(100):
        gaps = 2 * least - np.diff(found)
        if not (gaps > 1e-9).any():
            break
        for place in np.flatnonzero(gaps > 0):
            found[place] -= gaps[place] / 2
            found[place + 1] += gaps[place] / 2
    return dict(zip(order, found.tolist(), strict=True))


def _mark_machine(axes: Any, gpus: int, most: int) -> None:
    """A vertical line where a second machine begins."""
    if gpus < most:
        axes.axvline(gpus * 2**0.5, color="#777777", linewidth=1, linestyle=":")
        axes.annotate(
            "several machines",
            (gpus * 2**0.5, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            color="#555555",
        )
