"""The papers' figures of runs: quality against time, speed-up, overhead, order, mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.colours import METHOD_COLOURS
from bench.paper_runs import METHODS, NAMES, PLAIN, Drawn, Job, Plan, mean_sd
from bench.paper_style import (
    INK,
    Label,
    banded,
    bar_axes,
    label_bars,
    label_lines,
    new_figure,
    plain_log_ticks,
    whiskered,
)
from bench.run_figures import aligned_points
from bench.run_records import Records, all_training_s
from slipstream.tools.runlog import OVERHEAD

ORDERS = ("interleaved", "phased")
DROPPING = ("slipstream", "random")
BANDS = "Bands: standard deviation over seeds. "


def main_jobs(plan: Plan) -> list[Job]:
    """Every method as it usually runs."""
    plain = [] if plan.why_no_plain() else [Job(PLAIN)]
    return [*plain, *(Job(method) for method in METHODS)]


def schedule_jobs(plan: Plan) -> list[Job]:
    """FAE and Slipstream, mixed and in phases."""
    usual = plan.parsed().schedule
    return [
        Job(method) if order == usual else Job(method, order, ("--schedule", order))
        for method in ("fae", "slipstream")
        for order in ORDERS
    ]


def mini_batch_jobs(plan: Plan) -> list[Job]:
    """Methods at half, twice and four times the usual mini-batch."""
    sizes = [plan.batch_size // 2, plan.batch_size, 2 * plan.batch_size, 4 * plan.batch_size]
    return [
        Job(method, f"batch{size}", ("--mini-batch-size", str(size)))
        if size != plan.batch_size
        else Job(method)
        for method in ("baseline", "fae", "slipstream")
        for size in sizes
        if 1 <= size <= plan.num_train // 10
    ]


def mean_curve(logs: Sequence[Records]) -> list[dict[str, float]]:
    """The evaluations of a kind's runs, mean over seeds."""
    found = []
    for row in aligned_points(list(logs)):
        point = {"training_s": float(np.mean([all_training_s(record) for record in row]))}
        for name in ("samples", "auc", "accuracy"):
            point[name], point[f"{name}_sd"] = mean_sd([record[name] for record in row])
        found.append(point)
    return found


def curves(plan: Plan) -> Drawn:
    """Test AUC and accuracy against time, by method."""
    jobs = main_jobs(plan)
    rows = [
        {"method": job.method, "n": len(logs), **point}
        for job in jobs
        for logs in [plan.records(job)]
        for point in mean_curve(logs)
    ]
    picture, axes_of = new_figure(5.4, 2, 1, sharex=True)
    for [axes], (value, name) in zip(
        axes_of, (("auc", "test AUC"), ("accuracy", "test accuracy")), strict=True
    ):
        _lines(axes, rows, jobs, "training_s", value)
        axes.set_ylabel(name)
        axes.set_xlim(left=0)
    axes_of[1][0].set_xlabel("seconds of training, the choice of inputs included")
    for [axes], value in zip(axes_of, ("auc", "accuracy"), strict=True):
        late = [
            row[value] + side * np.nan_to_num(row[f"{value}_sd"])
            for row in rows
            if row["samples"] >= 0.15 * rows[-1]["samples"]
            for side in (-1, 1)
        ]
        room = 0.08 * (max(late) - min(late)) + 1e-9
        axes.set_ylim(min(late) - room, max(late) + room)
        label_lines(axes, _end_labels(rows, jobs, "training_s", value))
    ends = {job.method: [row for row in rows if row["method"] == job.method][-1] for job in jobs}
    told = ", ".join(f"{NAMES[name]} {end['auc']:.4f}" for name, end in ends.items())
    said = f"Final test AUC: {told}. {BANDS * (len(plan.seeds) > 1)}{plan.noise(jobs)}"
    return Drawn(rows, said, picture, jobs=jobs)


def _lines(axes: Any, rows: list[dict[str, Any]], jobs: Sequence[Job], x: str, y: str) -> None:
    for job in jobs:
        mine = [row for row in rows if row["method"] == job.method]
        columns = ([row[key] for row in mine] for key in (x, y, f"{y}_sd"))
        banded(axes, *columns, METHOD_COLOURS[job.method])


def _end_labels(rows: list[dict[str, Any]], jobs: Sequence[Job], x: str, y: str) -> list[Label]:
    ends = [[row for row in rows if row["method"] == job.method][-1] for job in jobs]
    return [
        Label(NAMES[job.method], METHOD_COLOURS[job.method], end[x], end[y])
        for job, end in zip(jobs, ends, strict=True)
    ]


def speed_up(plan: Plan) -> Drawn:
    """Training time of an epoch beside the baseline's: medians over seeds, and all between."""
    jobs = main_jobs(plan)
    rows = []
    for job in jobs:
        ends = [records[-1] for records in plan.records(job)]
        seconds = [all_training_s(end) for end in ends]
        samples, auc = (float(np.mean([end[name] for end in ends])) for name in ("samples", "auc"))
        rows.append(
            {"method": job.method, "n": len(ends), "training_s": float(np.median(seconds))}
            | {"fastest_s": min(seconds), "slowest_s": max(seconds)}
            | {"samples": samples, "auc": auc}
        )
    medians = {row["method"]: row["training_s"] for row in rows}
    # Of seconds in the label, of this axis, and of the sentence: one median each, or they disagree.
    for row in rows:
        row["speed_up"] = medians["baseline"] / row["training_s"]
    picture, [[axes]] = new_figure(0.7 + 0.5 * len(rows))
    widths = np.array([row["speed_up"] for row in rows])
    colours = [METHOD_COLOURS[row["method"]] for row in rows]
    axes.barh(range(len(rows)), widths, color=colours, height=0.7)
    bar_axes(axes, [NAMES[row["method"]] for row in rows])
    slow, fast = (
        medians["baseline"] / np.array([row[f"{end}_s"] for row in rows])
        for end in ("slowest", "fastest")
    )
    if len(plan.seeds) > 1:
        half = (widths - slow, fast - widths)
        axes.errorbar(widths, range(len(rows)), xerr=half, fmt="none", ecolor=INK, capsize=3)
    whole = max(row["samples"] for row in rows)
    texts = [
        f"{row['speed_up']:.2f}x: {row['training_s']:,.3g} s, {row['samples'] / whole:.0%} of the "
        f"inputs, AUC {row['auc']:.4f}"
        for row in rows
    ]
    label_bars(axes, texts, range(len(rows)), fast)
    axes.set(xlabel="times the baseline's speed, by the median of seconds over seeds")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.05 * max(fast)])
    where = plan.machine.get("gpu") or "this CPU, where all rows are in one memory"
    said = (
        f"On {where}: Slipstream {medians['fae'] / medians['slipstream']:.2f}x over FAE, dropping "
        f"as many at random {medians['fae'] / medians['random']:.2f}x; FAE "
        f"{medians['baseline'] / medians['fae']:.2f}x over our baseline. "
    )
    said += "Medians of seconds; whiskers: fastest and slowest seed." if len(plan.seeds) > 1 else ""
    return Drawn(rows, said, picture, jobs=jobs)


def overhead(plan: Plan) -> Drawn:
    """What choosing inputs takes, as a share of training."""
    jobs = [Job(method) for method in DROPPING]
    rows = []
    for job in jobs:
        ends = [records[-1] for records in plan.records(job)]
        for name in (*OVERHEAD, "segregation_s"):
            seconds = float(np.mean([end.get(name) or 0.0 for end in ends]))
            share = seconds / float(np.mean([all_training_s(end) for end in ends]))
            rows.append(
                {"method": job.method, "what": name.removesuffix("_s"), "n": len(ends)}
                | {"seconds": seconds, "share": share}
            )
    chosen = [row for row in rows if row["what"] != "segregation"]
    picture, [[axes]] = new_figure(0.8 + 0.36 * len(chosen))
    whats = list(dict.fromkeys(row["what"] for row in chosen))
    height = 0.36
    places = [
        whats.index(row["what"]) + (DROPPING.index(row["method"]) - 0.5) * (height + 0.02)
        for row in chosen
    ]
    ends = [100 * row["share"] for row in chosen]
    colours = [METHOD_COLOURS[row["method"]] for row in chosen]
    axes.barh(places, ends, height, color=colours)
    bar_axes(axes, whats)
    texts = [
        f"{end:.2f} %, {1e3 * row['seconds']:,.3g} ms, {NAMES[row['method']]}"
        for end, row in zip(ends, chosen, strict=True)
    ]
    label_bars(axes, texts, places, ends)
    axes.set(xlabel="% of training, the choice included")
    whole = {m: sum(r["share"] for r in chosen if r["method"] == m) for m in DROPPING}
    segregation = next(row for row in rows if row["what"] == "segregation")
    said = (
        f"Choosing takes {whole['slipstream']:.2%} of Slipstream's training, "
        f"{whole['random']:.2%} at random. Segregation, once before all epochs, took "
        f"{segregation['seconds']:.3g} s, {segregation['share']:.0%} of these runs' training."
    )
    return Drawn(rows, said, picture, jobs=jobs)


def schedule(plan: Plan) -> Drawn:
    """Hot and cold mini-batches mixed, and all cold ones first."""
    jobs = schedule_jobs(plan)
    rows, labels = [], []
    picture, [[axes]] = new_figure(3.6)
    for number, job in enumerate(jobs):
        order = ORDERS[number % len(ORDERS)]
        logs = plan.records(job)
        points = mean_curve(logs)
        rows += [
            {"method": job.method, "schedule": order, "n": len(logs), **point} for point in points
        ]
        colour = METHOD_COLOURS[job.method]
        x, y = ([point[key] for point in points] for key in ("samples", "auc"))
        half = [point["auc_sd"] for point in points]
        banded(axes, np.array(x) / 1e3, y, half, colour, "--" if order == "phased" else "-")
        labels.append(Label(f"{NAMES[job.method]}, {order}", colour, x[-1] / 1e3, y[-1]))
    axes.set(xlabel="thousand inputs trained", ylabel="test AUC")
    axes.set_xlim(left=0)
    label_lines(axes, labels)
    final = {(row["method"], row["schedule"]): row["auc"] for row in rows}
    told = [
        f"{NAMES[method]} {final[method, 'interleaved']:.4f} interleaved, "
        f"{final[method, 'phased']:.4f} phased"
        for method in ("fae", "slipstream")
    ]
    said = f"Final test AUC: {'; '.join(told)}. "
    said += BANDS * (len(plan.seeds) > 1) + plan.noise(jobs)
    return Drawn(rows, said, picture, jobs=jobs)


def mini_batch(plan: Plan) -> Drawn:
    """Speed and AUC against the mini-batch."""
    jobs, rows = mini_batch_jobs(plan), []
    for job in jobs:
        logs = plan.records(job)
        size = logs[0][0]["training"]["mini_batch_size"]
        rates = [log[-1]["samples"] / all_training_s(log[-1]) for log in logs]
        row = {"method": job.method, "mini_batch": size, "n": len(logs)}
        row["samples_per_s"], row["rate_sd"] = mean_sd(rates)
        row["auc"], row["auc_sd"] = mean_sd([log[-1]["auc"] for log in logs])
        rows.append(row)
    picture, [[left, right]] = new_figure(3.4, 1, 2, width_ratios=(1, 1))
    labels: list[Label] = []
    methods = list(dict.fromkeys(job.method for job in jobs))
    panels = ((left, "samples_per_s", "rate_sd", 1e-3), (right, "auc", "auc_sd", 1.0))
    for axes, key, spread, factor in panels:
        for number, method in enumerate(methods):
            mine = [row for row in rows if row["method"] == method]
            mine.sort(key=lambda row: row["mini_batch"])
            # Beside each other: at equal mini-batches their whiskers would cover one another.
            x = [row["mini_batch"] * (0.96 + 0.04 * number) for row in mine]
            y, half = ([factor * row[name] for row in mine] for name in (key, spread))
            whiskered(axes, x, y, half, METHOD_COLOURS[method])
            if key == "auc":
                labels.append(Label(NAMES[method], METHOD_COLOURS[method], x[-1], y[-1]))
        plain_log_ticks(axes, sorted({row["mini_batch"] for row in rows}))
        axes.set_xlabel("mini-batch")
    left.set_ylim(bottom=0)
    left.set_title("thousand inputs trained a second")
    right.set_title("final test AUC")
    label_lines(right, labels)
    sizes = [row["mini_batch"] for row in rows]
    ends = {row["mini_batch"]: row for row in rows if row["method"] == "fae"}
    small, large = ends[min(sizes)], ends[max(sizes)]
    said = (
        f"FAE at mini-batch {max(sizes):,} trains {large['samples_per_s']:,.0f} inputs a second, "
        f"{large['samples_per_s'] / small['samples_per_s']:.1f} times as many as at "
        f"{min(sizes):,}; final test AUC {large['auc']:.4f} and {small['auc']:.4f}. "
    )
    is_spread = len(plan.seeds) > 1
    said += "Whiskers: standard deviation over seeds." if is_spread else plan.noise(jobs)
    return Drawn(rows, said, picture, jobs=jobs)
