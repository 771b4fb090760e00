"""The figures made of runs' logs, and of a comparison's table.

Runs are told apart by what they are: method and drop policy, data, code, machine, and every flag
that can change a result or its time. Runs of one kind that differ in their seed alone are averaged;
nothing else is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench import compare

Rows = list[dict[str, Any]]
# Okabe and Ito's, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Flags that say where things are, what is printed and what is kept. Data are told apart by size.
UNTOLD = {
    *("seed", "run_name", "runs_dir", "processed_data_file", "segregated_data_dir"),
    *("save_model", "load_model", "checkpoint_every", "keep", "print_freq", "test_freq"),
    *("val_freq", "data_generation", "data_size", "arch_embedding_size"),
}


def runs_by_kind(folder: Path) -> dict[str, list[compare.Records]]:
    """The finished runs below a folder, by a label that tells their kinds apart.

    A comparison's are named by its methods and settings. Raises `ValueError` where there are none.
    """
    finished, num_left_out = [], 0
    for log in sorted(folder.glob("*/log.jsonl")):
        records = compare.finished_records(log.parent)
        if records is None:
            num_left_out += 1
        else:
            finished.append((log.parent.name, records))
    if num_left_out:
        print(f"left out: {num_left_out} runs that did not finish", file=sys.stderr)
    if not finished:
        raise ValueError(f"{folder} holds no finished runs; run bench.compare or a trainer first")
    kinds: dict[str, list[compare.Records]] = {}
    if (folder / "comparison.json").exists():
        for name, records in finished:
            kinds.setdefault(name.rpartition("-seed")[0] or name, []).append(records)
        return kinds
    by_kind: dict[str, list[compare.Records]] = {}
    for _, records in finished:
        by_kind.setdefault(json.dumps(_kind_of(records[0]), sort_keys=True), []).append(records)
    found = [(json.loads(text), records) for text, records in by_kind.items()]
    for kind, label in zip(found, _labels([kind for kind, _ in found]), strict=True):
        for number, alike in enumerate(_averaged(kind[1])):
            kinds[label + (f" #{number + 1}" if number else "")] = alike
    return kinds


def _kind_of(start: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run is, by its log's first line: the method, and what may differ within one."""
    flags, machine = start.get("flags", {}), start.get("machine", {})
    method = start["method"]
    if method == "slipstream":
        method += f"-{flags.get('drop_policy')}"
    told = {name: value for name, value in flags.items() if name not in UNTOLD | {"drop_policy"}}
    sizes = start.get("table_sizes", [])
    data = f"{start.get('num_train'):,} inputs, {len(sizes)} tables of {sum(sizes):,} rows"
    where = {"cpu": machine.get("gpu") or machine.get("cpu"), "commit": start.get("commit")}
    return {"method": {"": method}, "data": {"": data}, "flags": told, "where": where}


def _labels(kinds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """A label each: the method, and of the rest what the kinds of the same method differ in."""
    labels = []
    for kind in kinds:
        method = kind["method"][""]
        words = [method]
        if len({other["data"][""] for other in kinds}) > 1:
            words.append(kind["data"][""])
        peers = [other for other in kinds if other["method"] == kind["method"]]
        for part, prefix in (("flags", "--"), ("where", "")):
            for name, value in kind[part].items():
                values = {json.dumps(peer[part].get(name)) for peer in peers}
                if len(values) > 1:
                    text = str(value)[:12] if name == "commit" else str(value)
                    words.append(f"{prefix}{name.replace('_', '-')} {text}")
        labels.append(", ".join(words))
    return labels


def _averaged(alike: list[compare.Records]) -> list[list[compare.Records]]:
    """Runs of one kind as lines: a line has each seed once, evaluated after the same inputs."""
    lines: list[tuple[set[int], list[int], list[compare.Records]]] = []
    for records in alike:
        seed, points = records[0]["seed"], [r["samples"] for r in compare.curve_of(records)]
        for seeds, samples, line in lines:
            if seed not in seeds and _is_near(samples, points):
                seeds.add(seed)
                line.append(records)
                break
        else:
            lines.append(({seed}, points, [records]))
    return [line for _, _, line in lines]


def _is_near(first: list[int], second: list[int]) -> bool:
    """Whether two runs were evaluated at the same places, but for how many were dropped."""
    return len(first) == len(second) and bool(np.allclose(first, second, rtol=0.02))


def _seeds(logs: list[Any]) -> str:
    return f"{len(logs)} seed{'s' * (len(logs) != 1)}"


def curves(args: argparse.Namespace, axes: Any) -> Rows:
    """Test AUC along training, mean over seeds, against inputs trained or training time."""
    found: Rows = []
    against_time = args.name == "times"
    for number, (name, logs) in enumerate(runs_by_kind(Path(args.runs_dir)).items()):
        points = [compare.curve_of(records) for records in logs]
        for row in zip(*points, strict=False):
            aucs = [record["auc"] for record in row]
            seconds = [compare.all_training_s(record) for record in row]
            found.append(
                {"run": name, "n": len(row), "samples": row[0]["samples"]}
                | {"training_s": float(np.mean(seconds)), "auc": float(np.mean(aucs))}
                | {"auc_sd": compare.standard_deviation(np.array(aucs))}
            )
        mine = [row for row in found if row["run"] == name]
        axes.plot(
            [row["training_s"] if against_time else row["samples"] / 1e3 for row in mine],
            [row["auc"] for row in mine],
            ("-", "--", ":")[number // len(COLOURS) % 3] + ("o" if len(mine) == 1 else ""),
            color=COLOURS[number % len(COLOURS)],
            label=f"{name} ({_seeds(logs)})",
        )
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
    parts = ("training_s", *compare.OVERHEAD)
    for name, logs in runs_by_kind(Path(args.runs_dir)).items():
        seconds = {
            part: float(np.mean([records[-1].get(part, 0.0) for records in logs])) for part in parts
        }
        samples = float(np.mean([records[-1]["samples"] for records in logs]))
        whole_s = np.array([compare.all_training_s(records[-1]) for records in logs])
        sd = float(np.nan_to_num(compare.standard_deviation(whole_s)))  # of one seed: no whisker
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
        axes.annotate(f"  {whole.max() / end:.2f}x", (right, place), va="center", fontsize=8)
    axes.set_yticks(places, [row["run"] for row in found])
    axes.set_xlim(0, 1.12 * (whole + spread).max())
    axes.set(xlabel=f"seconds of training, mean of {_seeds(logs)}")
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


def drop(args: argparse.Namespace, axes: Any) -> Rows:
    """AUC against the share of inputs not trained: a line a method and kind of setting."""
    found = _differences(args)
    lines: dict[str, Rows] = {}
    for row in sorted(found, key=lambda row: row["dropped_share"]):
        if row["method"].startswith("slipstream"):
            kind = row["setting"].rstrip("0123456789")
            lines.setdefault(f"{row['method']} {kind}".strip(), []).append(row)
    for number, (name, rows) in enumerate(sorted(lines.items())):
        axes.errorbar(
            # Beside each other: at equal shares their intervals would cover one another.
            [100 * row["dropped_share"] + 0.2 * number for row in rows],
            [1e3 * row["difference"] for row in rows],
            yerr=[1e3 * row["interval"] for row in rows],
            fmt=("o-", "s--", "^:")[number // len(COLOURS) % 3],
            color=COLOURS[number % len(COLOURS)],
            capsize=2,
            label=name,
        )
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
