"""The papers' figures of sensitivity: what one setting at a time does to AUC, drops and T."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.colours import METHOD_COLOURS
from bench.comparison_tables import drop_as_many, half_interval
from bench.paper_runs import NAMES, Drawn, Job, Plan, mean_sd
from bench.paper_style import (
    SOFT,
    Label,
    banded,
    label_lines,
    new_figure,
    plain_log_ticks,
    whiskered,
)


@dataclass(frozen=True)
class Sweep:
    """One setting and its values.

    Attributes:
        values: those shown.
        usual: the plan -> the value of the usual runs.
        job: a method and a value -> the run.
        label: of the axis.
        is_log: whether the axis is logarithmic.
        with_fae: whether FAE's runs, too, depend on it.
        with_random: whether those of dropping at random do; else its usual run is the control.
        unit: behind a value.
    """

    values: tuple[float, ...]
    usual: Callable[[Plan], float | None]
    job: Callable[[str, float], Job]
    label: str
    is_log: bool = False
    with_fae: bool = False
    with_random: bool = True
    unit: str = ""

    def jobs(self, plan: Plan, method: str) -> list[Job]:
        """The runs, a value each; the usual value's are the usual runs."""
        if not {"fae": self.with_fae, "random": self.with_random}.get(method, True):
            return [Job(method)] * len(self.values)
        usual = self.usual(plan)
        return [Job(method) if value == usual else self.job(method, value) for value in self.values]

    def all_jobs(self, plan: Plan) -> list[Job]:
        """Slipstream's, FAE's, and those that drop as many at random."""
        methods = ("slipstream", "fae", "random")
        return list(dict.fromkeys(job for method in methods for job in self.jobs(plan, method)))


def _of_flag(flag: str) -> tuple[Callable[[Plan], float | None], Callable[[str, float], Job]]:
    """What the usual runs have of a flag, and the runs with another value."""
    name = flag.removeprefix("--").replace("-", "_")

    def usual(plan: Plan) -> float | None:
        given = getattr(plan.parsed(), name)
        if not isinstance(given, tuple):
            return float(given)
        share, batches = given  # --snapshot-start in mini-batches is no share
        return None if batches else float(share)

    return usual, lambda method, value: Job(method, f"{name}{value:g}", (flag, f"{value:g}"))


SWEEPS = {
    "alpha": Sweep(
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        *_of_flag("--alpha"),
        "alpha: share of an input's rows that must be stale",
        with_random=False,
    ),
    "snapshot_start": Sweep(
        (0.1, 0.25, 0.4, 0.6, 0.8),
        *_of_flag("--snapshot-start"),
        "snapshot: share of the hot inputs trained before",
    ),
    "snapshot_window": Sweep(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
        *_of_flag("--snapshot-window"),
        "window: share of the hot inputs from snapshot to choice",
        is_log=True,
    ),
    "sample_rate": Sweep(
        (0.001, 0.01, 0.1, 1.0),
        *_of_flag("--sample-rate"),
        "share of the hot inputs left from which T is found",
        is_log=True,
        with_random=False,
    ),
    "hot_budget": Sweep(
        (0.25, 0.5, 1.0, 2.0, 4.0),
        lambda plan: 1.0,
        lambda method, value: Job(method, f"budget{value:g}", budget_share=value),
        "hot memory, of that of the other figures",
        is_log=True,
        with_fae=True,
        unit="x",
    ),
    "min_count": Sweep(
        (1, 2, 4, 10, 20),
        lambda plan: 1.0,
        lambda method, value: Job(method, f"min_count{value:g}", min_count=int(value)),
        "--min-count: values seen fewer times share a row",
        is_log=True,
        with_fae=True,
    ),
}


def rows_of(plan: Plan, sweep: Sweep) -> list[dict[str, Any]]:
    """A row a value: AUC beside the controls', the drop, T, and what is hot, mean over seeds."""
    methods = ("slipstream", "fae", "random")
    jobs = zip(*(sweep.jobs(plan, method) for method in methods), strict=True)
    rows = []
    for value, kinds in zip(sweep.values, jobs, strict=True):
        logs, *controls = (plan.records(job) for job in kinds)
        ends, starts = [log[-1] for log in logs], [log[0] for log in logs]
        drops = [drop for end in ends for drop in end["drops"] if "achieved" in drop]
        row: dict[str, Any] = {"value": value, "n": len(logs)}
        row["auc"], row["auc_sd"] = mean_sd([end["auc"] for end in ends])
        own, fae, chance = (np.array([log[-1]["auc"] for log in of]) for of in (logs, *controls))
        row["fae_auc"], row["random_auc"] = float(fae.mean()), float(chance.mean())
        # The same seed starts from the same weights.
        for name, difference in (
            ("less_fae", own - fae),
            ("less_random", own - chance),
            ("random_less_fae", chance - fae),
        ):
            row[name] = float(difference.mean())
            row[f"{name}_interval"] = half_interval(difference)
        thresholds = [threshold_of(drop) for drop in drops]
        row["threshold"] = float(np.mean(thresholds)) if drops else math.nan
        shares = [d["achieved"] / max(d["hot_remaining"], 1) for d in drops]
        row["dropped_of_left"] = float(np.mean(shares)) if drops else 0.0
        for name, runs in (("dropped_of_all", logs), ("random_dropped_of_all", controls[1])):
            row[name] = float(np.mean([log[-1]["dropped_share"] for log in runs]))
        hot = [start["num_hot_inputs"] / start["num_train"] for start in starts]
        row |= {"hot_inputs": float(np.mean(hot)), "hot_rows": starts[0]["num_hot"]}
        row["rows"] = sum(starts[0]["table_sizes"])
        rows.append(row)
    return rows


def threshold_of(drop: dict[str, Any]) -> float:
    """A choice's T, the largest where labels have one each; infinite, null in the log, where too
    few inputs could be stale.
    """
    value = drop["threshold"]
    values = value if isinstance(value, list) else [value]
    return max(math.inf if one is None else float(one) for one in values)


def sweep_figure(name: str) -> Callable[[Plan], Drawn]:
    """The figure of one of `SWEEPS`."""

    def draw(plan: Plan) -> Drawn:
        sweep = SWEEPS[name]
        if why := plan.why_not(sweep.all_jobs(plan)):
            return Drawn([], f"Not made: {why}.")
        rows = rows_of(plan, sweep)
        picture, [panels] = new_figure(3.1, 1, 3)
        colour = METHOD_COLOURS["slipstream"]
        x = [row["value"] for row in rows]
        titles = ("test AUC less FAE's, 1/1000", "hot inputs dropped, %", "threshold T")
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
            if sweep.is_log:
                plain_log_ticks(axes, x, unit=sweep.unit)
            else:
                axes.set_xticks(x, [f"{value:g}" for value in x])
        auc, dropped, threshold = panels
        _auc_lines(auc, rows, x, sweep)
        _dropped_lines(dropped, rows, x)
        finite = [row["threshold"] if math.isfinite(row["threshold"]) else np.nan for row in rows]
        threshold.plot(x, finite, "o-", color=colour)
        threshold.set_ylim(0, 1.15 * max([v for v in finite if v == v], default=1.0))
        picture.supxlabel(sweep.label, color=SOFT, fontsize=10)
        return Drawn(rows, _said(plan, rows, sweep), picture, jobs=sweep.all_jobs(plan))

    draw.__doc__ = f"Slipstream by {name.replace('_', ' ')}."
    return draw


def _dropped_lines(axes: Any, rows: list[dict[str, Any]], x: list[float]) -> None:
    """Shares of the inputs dropped; behind Slipstream's, of all, the random control's."""
    colour = METHOD_COLOURS["slipstream"]
    left, of_all, chance = (
        [100 * row[name] for row in rows]
        for name in ("dropped_of_left", "dropped_of_all", "random_dropped_of_all")
    )
    axes.plot(x, chance, "-", color=METHOD_COLOURS["random"], linewidth=4, alpha=0.4)
    axes.plot(x, left, "o-", color=colour)
    axes.plot(x, of_all, "o:", color=colour, markersize=3.5)
    axes.set_ylim(0, 1.25 * max([*left, *of_all, *chance, 1.0]))
    for text, y in (("of the hot ones left", left), ("of all inputs", of_all)):
        y = y[len(y) // 3 :]  # above what is below the text
        axes.annotate(
            text,
            (x[-1], max(y)),
            (2, 6),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="bottom",
        )


def _auc_lines(axes: Any, rows: list[dict[str, Any]], x: list[float], sweep: Sweep) -> None:
    """Slipstream and its random control less FAE, which is the line at 0, with what 95 % of paired
    seeds leave open.
    """
    ends, labels = [0.0], [Label(NAMES["fae"], METHOD_COLOURS["fae"], x[-1], 0.0)]
    axes.axhline(0, color=METHOD_COLOURS["fae"])
    for method, name in (("random", "random_less_fae"), ("slipstream", "less_fae")):
        y = 1e3 * np.array([row[name] for row in rows])
        half = 1e3 * np.array([row[f"{name}_interval"] for row in rows])
        ends += [*(y - np.nan_to_num(half)), *(y + np.nan_to_num(half))]
        colour = METHOD_COLOURS[method]
        labels.append(Label(NAMES[method], colour, x[-1], y[-1]))
        if method == "random" and not (sweep.with_random or sweep.with_fae):
            banded(axes, x, y, half, colour)  # one kind of run for all values
            continue
        # Beside each other: at equal values their whiskers would cover one another.
        aside = 0.012 * (method == "random")
        at, span = np.array(x), (x[-1] / x[0] if sweep.is_log else x[-1] - x[0])
        at = at * span**aside if sweep.is_log else at + aside * span
        whiskered(axes, at, y, half, colour)
    room = max(ends) - min(ends) or 1.0
    axes.set_ylim(min(ends) - 0.08 * room, max(ends) + 0.08 * room)
    label_lines(axes, labels)


def _said(plan: Plan, rows: list[dict[str, Any]], sweep: Sweep) -> str:
    def told(name: str) -> str:
        ends = [end(rows, key=lambda row: row[name]) for end in (min, max)]
        return " to ".join(f"{row[name]:+.4f} at {row['value']:g}{sweep.unit}" for row in ends)

    said = f"Slipstream less FAE, test AUC: {told('less_fae')}; less its control, which drops at "
    said += f"random: {told('less_random')}"
    if len(plan.seeds) > 1:
        usual = sweep.usual(plan)
        other = [row for row in rows if row["value"] != usual]  # that one is in all such figures
        surely = sum(abs(row["less_random"]) > row["less_random_interval"] for row in other)
        said += f", {surely} of {len(other)} beside the usual setting outside their interval"
    said += ". Green behind the dots: inputs that the control drops. "
    unlike = []
    for row in rows:
        mine, others = row["dropped_of_all"], row["random_dropped_of_all"]
        if not drop_as_many(mine, others):
            unlike.append(f"{row['value']:g}{sweep.unit} {mine:.1%} for {others:.1%}")
    if unlike:
        said += f"Where it drops another share the two do not compare: {', '.join(unlike)}. "
    if sweep.with_fae:
        hot = ", ".join(
            f"{r['value']:g}{sweep.unit} {r['hot_inputs']:.0%} and {r['fae_auc']:.4f}" for r in rows
        )
        said += f"Inputs hot, and FAE's AUC: {hot}. "
    if any(row["threshold"] == math.inf for row in rows):
        said += "T is infinite where too few inputs could be stale, and not drawn. "
    return said + (
        "Whiskers: 95 % of paired seeds."
        if len(plan.seeds) > 1
        else plan.noise(sweep.all_jobs(plan))
    )
