"""The figures made of runs' logs, and of a comparison's table.

Runs are told apart by what they are: method and drop policy, data, code, machine, and every flag
that can change a result or its time. Runs of one kind that differ in their seed alone are averaged;
nothing else is.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from bench.colours import COLOURS, colours_of
from bench.comparison_tables import standard_deviation
from bench.paper_style import banded
from bench.run_records import (
    Records,
    all_training_s,
    curve_of,
    finished_records,
    short_commit,
)
from slipstream.tools.runlog import OVERHEAD

Rows = list[dict[str, Any]]
Named = list[tuple[str, Records]]  # runs, by their folders
LEGEND_WIDTH, TICK_WIDTH = 95, 40  # characters
# Flags that say where things are, what is printed and what is kept; data are told by contents.
GENERATED = ("data_generation", "data_size", "arch_embedding_size")
UNTOLD = {
    *GENERATED,
    *("seed", "run_name", "runs_dir", "processed_data_file", "segregated_data_dir"),
    *("save_model", "load_model", "checkpoint_every", "keep", "print_freq", "test_freq"),
    *("save_onnx", "save_predictions", "save_dropped", "tensor_board_filename", "verbose"),
    *("val_freq", "drop_policy"),  # which the method's name says
}
# How far the ends of averaged runs may lie apart: how many inputs go can depend on the seed.
ENDS_APART = 0.02


def runs_by_kind(folder: Path) -> dict[str, list[Records]]:
    """The finished runs below a folder, by a label that tells their kinds apart.

    A comparison's are named by its methods and settings. Runs of one kind are in one list where
    they differ in their seed alone and were evaluated at the same steps; others get a number. Which
    runs are meant is printed. Raises `ValueError` where there are none.
    """
    finished, num_left_out = [], 0
    for log in sorted(folder.glob("*/log.jsonl")):
        records = finished_records(log.parent)
        if records is None:
            num_left_out += 1
        else:
            finished.append((log.parent.name, records))
    if num_left_out:
        plural = "s" * (num_left_out > 1)
        print(f"left out: {num_left_out} run{plural} that did not finish", file=sys.stderr)
    if not finished:
        raise ValueError(f"{folder} holds no finished runs; run bench.compare or a trainer first")
    by_kind: dict[str, Named] = {}
    is_comparison = (folder / "comparison.json").exists()
    for name, records in finished:
        kind = name.rpartition("-seed")[0] if is_comparison else ""
        kind = kind or json.dumps(_kind_of(records[0]), sort_keys=True)
        by_kind.setdefault(kind, []).append((name, records))
    told = [json.loads(kind) for kind in by_kind if kind.startswith("{")]
    labels = iter(_labels(told))
    found: dict[str, list[Records]] = {}
    for kind, named in by_kind.items():
        label = next(labels) if kind.startswith("{") else kind
        for alike in _averaged(named):
            number = 1
            while (unique := label + (f" #{number}" if number > 1 else "")) in found:
                number += 1
            found[unique] = [records for _, records in alike]
            print(f"{unique}: {', '.join(name for name, _ in alike)}")
    return found


def _kind_of(start: dict[str, Any]) -> dict[str, Any]:
    """What a run is, by its log's first line: the method, the data, and what else is told."""
    flags, machine = start.get("flags", {}), start.get("machine", {})
    manifest, method = start.get("data") or {}, start["method"]
    told = {f"--{name.replace('_', '-')}": flags[name] for name in flags.keys() - UNTOLD}
    told["commit"] = start.get("commit")
    told["on"] = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('cpu_cores')} cores"
    is_anew = start.get("resumed") or not start.get("loaded")
    for kind in ("network", "policy"):  # another text under the same name is another one
        told[f"{kind}'s file"] = ((start.get(kind) or {}).get("sha256") or "")[:8]
    told["begun"] = "anew" if is_anew else f"from {start['loaded']}"
    sizes = start.get("table_sizes", [])
    size = f"{start.get('num_train'):,} inputs, {len(sizes)} tables of {sum(sizes):,} rows"
    source = flags.get("processed_data_file") or flags.get("segregated_data_dir")
    contents = {"manifest of the log": manifest}
    if method != "baseline":
        told["hot rows"] = start.get("num_hot")
        contents = {"log": manifest.get("source"), "sets": manifest.get("files")}
    policy = flags.get("drop_policy")
    if method == "slipstream":
        method += f"-{Path(str(policy)).name}"
    identity = start.get("log_identity")
    data = {"size": size, "table sizes": sizes, "identity": identity, **contents}
    if flags.get("data_generation", "dataset") != "dataset":
        # The seed decides on them, too: of another one they are other data.
        source = f"{flags['data_generation']} data of seed {start.get('seed')}"
        data["generated"] = [source, *(flags[name] for name in GENERATED)]
    return {"method": method, "policy": policy, "data": data, "source": source, "told": told}


def _labels(kinds: list[dict[str, Any]]) -> list[str]:
    """A label each: the method, and what else the kinds differ in that have it."""

    def differ(part: str, name: str) -> bool:
        values = [kind[part][name] for kind in kinds if name in kind[part]]
        return any(value != values[0] for value in values)

    labels = []
    for kind in kinds:
        words = [kind["method"]]
        if differ("data", "size"):
            words.append(kind["data"]["size"])
        elif any(differ("data", name) for name in kind["data"] if name != "sets"):
            words.append("/".join(Path(str(kind["source"])).parts[-2:]))
        for name, value in kind["told"].items():
            # What is not given is told by what others say there.
            if differ("told", name) and value not in (None, "", []):
                words.append(f"{name} {_shown(name, value)}")
        labels.append(", ".join(words))
    return labels


def _shown(name: str, value: Any) -> str:
    if name == "commit":
        return short_commit(value)
    if isinstance(value, list):
        if all(isinstance(item, int) for item in value):
            return "-".join(map(str, value))
        return " ".join("=".join(map(str, item)) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _averaged(named: Named) -> list[Named]:
    """Runs of one kind as lines: a line has each seed once, evaluated at the same steps."""
    lines: list[Named] = []
    for name, records in named:
        for line in lines:
            seeds = [other[0].get("seed") for _, other in line]
            if records[0].get("seed") not in seeds and _is_aligned(line[0][1], records):
                line.append((name, records))
                break
        else:
            lines.append([(name, records)])
    return lines


def _is_aligned(first: Records, second: Records) -> bool:
    """Whether two runs were evaluated at the same steps, up to where one of them ended."""
    steps = [[r["step"] for r in curve_of(records)] for records in (first, second)]
    if not all(steps):
        return not any(steps)
    ends = [own[-1] for own in steps]
    first_way, second_way = ([step for step in own[:-1] if step < min(ends)] for own in steps)
    return first_way == second_way and max(ends) - min(ends) <= ENDS_APART * max(ends)


def aligned_points(logs: list[Records]) -> list[tuple[dict[str, Any], ...]]:
    """Evaluations of aligned runs, side by side: on the way, and last where each ended."""
    found = [curve_of(records) for records in logs]
    on_way = min(map(len, found)) - 1
    if on_way < 0:
        return []
    return list(zip(*([*curve[:on_way], curve[-1]] for curve in found), strict=True))


def _wrapped(name: str, num_seeds: int, width: int) -> str:
    seeds = f"({num_seeds} seed{'s' * (num_seeds != 1)})"
    return textwrap.fill(f"{name} {seeds}", width, break_on_hyphens=False)


def curves(args: argparse.Namespace, axes: Any) -> Rows:
    """Test AUC along training, against inputs trained or training time: mean over seeds, and a band
    of their standard deviation.
    """
    found: Rows = []
    against_time = args.name == "times"
    kinds = runs_by_kind(Path(args.runs_dir))
    colours = colours_of(list(kinds))
    for number, (name, logs) in enumerate(kinds.items()):
        for row in aligned_points(logs):
            aucs = [record["auc"] for record in row]
            seconds = [all_training_s(record) for record in row]
            found.append(
                {"run": name, "n": len(row), "samples": round(np.mean([r["samples"] for r in row]))}
                | {"training_s": float(np.mean(seconds)), "auc": float(np.mean(aucs))}
                | {"auc_sd": standard_deviation(np.array(aucs))}
            )
        mine = [row for row in found if row["run"] == name]
        line = banded(
            axes,
            [row["training_s"] if against_time else row["samples"] / 1e3 for row in mine],
            [row["auc"] for row in mine],
            [row["auc_sd"] for row in mine],
            colours[number],
            ("-", "--", ":")[number // len(COLOURS) % 3] + ("o" if len(mine) == 1 else ""),
            alpha=min(0.13, 0.4 / len(kinds)),  # of many, one over the other, lines stay visible
        )
        line.set_label(_wrapped(name, len(logs), LEGEND_WIDTH))
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
    parts = ("training_s", *OVERHEAD)
    for name, logs in runs_by_kind(Path(args.runs_dir)).items():
        seconds = {
            part: float(np.mean([records[-1].get(part, 0.0) for records in logs])) for part in parts
        }
        samples = float(np.mean([records[-1]["samples"] for records in logs]))
        whole_s = np.array([all_training_s(records[-1]) for records in logs])
        sd = float(np.nan_to_num(standard_deviation(whole_s)))  # of one seed: no whisker
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
        axes.annotate(f"  {whole.max() / end:.2f}x", (right, place), va="center")
    names = [_wrapped(row["run"], row["n"], TICK_WIDTH) for row in found]
    axes.set_yticks(places, names)
    num_lines = len(names) * max(name.count("\n") + 1 for name in names)
    axes.figure.set_figheight(max(axes.figure.get_figheight(), 1.5 + 0.2 * num_lines))
    axes.set_xlim(0, 1.12 * (whole + spread).max())
    axes.set(xlabel="seconds of training, mean over seeds")
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
    if _has_stopped(found):
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


def _has_stopped(found: Rows) -> bool:
    """Whether the table has it: not where rates fall at a run's end."""
    return all(np.isfinite(row["stopped_difference"]) for row in found)


def drop(args: argparse.Namespace, axes: Any) -> Rows:
    """AUC against the share of inputs not trained: a line a method and kind of setting."""
    found = _differences(args)
    lines: dict[str, Rows] = {}
    for row in sorted(found, key=lambda row: row["dropped_share"]):
        if row["method"].startswith("slipstream"):
            kind = row["setting"].rstrip("0123456789")
            lines.setdefault(f"{row['method']} {kind}".strip(), []).append(row)
    methods = sorted({name.partition(" ")[0] for name in lines})
    colours = dict(zip(methods, colours_of(methods), strict=True))
    settings = sorted({name.partition(" ")[2] for name in lines})
    for number, (name, rows) in enumerate(sorted(lines.items())):
        method, _, kind = name.partition(" ")
        axes.errorbar(
            # Beside each other: at equal shares their intervals would cover one another.
            [100 * row["dropped_share"] + 0.2 * number for row in rows],
            [1e3 * row["difference"] for row in rows],
            yerr=[1e3 * row["interval"] for row in rows],
            fmt=("o-", "s--", "^:")[settings.index(kind) % 3],
            color=colours[method],
            elinewidth=1,
            capsize=2,
            label=name,
        )
    if _has_stopped(found):
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
