"""What a comparison comes to: differences over paired seeds, and the tables that tell them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.methods import Kind
from bench.run_records import Records, all_training_s, curve_of
from slipstream.tools.runlog import OVERHEAD

MARGIN = 0.0005  # of AUC: a run is there when it comes so near the first method's final one
METRICS = {
    "auc": "test AUC",
    "log_loss": "test log loss, nats",
    "normalized_entropy": "log loss over that of the test set's click rate",
    "samples": "inputs trained",
    "dropped_share": "of the inputs, dropped",
    "training_s": "seconds of training, the choice of inputs included",
    "overhead_s": "seconds of snapshots, thresholds and classification",
    "samples_to_target": f"inputs until the AUC is the first method's final one minus {MARGIN}",
    "training_s_to_target": "seconds of training until then",
    # NaN where its rates fall at its end: it has not had that yet where it would be stopped.
    "auc_first_at_samples": "AUC of the first method stopped after as many inputs",
    "auc_first_at_time": "AUC of the first method stopped after as much training time",
}
RANDOM = "slipstream-random"
SAME_SHARE = 0.1  # of the larger one: shares dropped that are so near are as many inputs
Table = dict[Kind, dict[str, dict[str, Any]]]  # rows by method and setting, then metric


def decays(first: Records) -> bool:
    """Whether a run's learning rates fall at its end."""
    training = first[0].get("training", {})
    return bool(training.get("lr_decay_share") or training.get("lr_num_decay_steps"))


def metrics_of(records: Records, first: Records) -> dict[str, float]:
    """A run's `METRICS`; `first` is that of the first method with the same seed."""
    summary, evaluations = records[-1], curve_of(records)
    reached = [r for r in evaluations if r["auc"] >= first[-1]["auc"] - MARGIN]
    found = {name: summary[name] for name in ("auc", "log_loss", "samples", "dropped_share")}
    found["normalized_entropy"] = evaluations[-1]["normalized_entropy"]
    found["training_s"] = all_training_s(summary)
    found["overhead_s"] = sum(summary.get(name, 0.0) for name in OVERHEAD)
    found["samples_to_target"] = reached[0]["samples"] if reached else math.nan
    found["training_s_to_target"] = all_training_s(reached[0]) if reached else math.nan
    found["auc_first_at_samples"] = found["auc_first_at_time"] = math.nan
    if not decays(first):
        curve = curve_of(first)
        aucs = [record["auc"] for record in curve]
        samples = [record["samples"] for record in curve]
        times = [all_training_s(record) for record in curve]
        found["auc_first_at_samples"] = float(np.interp(summary["samples"], samples, aucs))
        found["auc_first_at_time"] = float(np.interp(found["training_s"], times, aucs))
    return {name: math.nan if found[name] is None else float(found[name]) for name in METRICS}


def standard_deviation(values: np.ndarray) -> float:
    """The sample's standard deviation; NaN for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def half_interval(differences: np.ndarray) -> float:
    """Half the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    from scipy.stats import t  # comes with scikit-learn; a second to import

    num_values = len(differences)
    return float(t.ppf(0.975, num_values - 1)) * standard_deviation(differences) / num_values**0.5


def paired(values: np.ndarray, others: np.ndarray, prefix: str = "") -> dict[str, Any]:
    """The difference over paired seeds: the same seed starts from the same weights everywhere."""
    mean, half = float((values - others).mean()), half_interval(values - others)
    # NaN, as with one seed, is no tie.
    found = {"difference": mean, "interval": half, "tie": bool(abs(mean) <= half)}
    return {prefix + name: value for name, value in found.items()}


def tabulate(results: Mapping[Kind, Sequence[Mapping[str, float]]]) -> Records:
    """Tidy rows: one a method, setting and metric, with mean, spread and the difference to the
    first method; of policies also that to dropping at random in the same setting (`random_...`).
    """
    rows = []
    values = {
        kind: {metric: np.array([run[metric] for run in runs], float) for metric in METRICS}
        for kind, runs in results.items()
    }
    first = next(iter(values.values()))
    for (method, setting), by_metric in values.items():
        control = values.get((RANDOM, setting)) if is_policy(method) else None
        if control is not None:  # one that drops as many
            shares = (float(one["dropped_share"].mean()) for one in (by_metric, control))
            control = control if drop_as_many(*shares) else None
        for metric, own in by_metric.items():
            row: dict[str, Any] = {"method": method, "setting": setting, "metric": metric}
            row |= {"n": int(np.isfinite(own).sum()), "mean": float(own.mean())}
            row |= {"sd": standard_deviation(own), **paired(own, first[metric])}
            if control is not None:
                row |= paired(own, control[metric], "random_")
            rows.append(row)
    return rows


def drop_as_many(mine: float, others: float) -> bool:
    """Whether two shares dropped are near enough for one to be the other's control."""
    return abs(mine - others) <= SAME_SHARE * max(mine, others)


def is_policy(method: str) -> bool:
    """Whether dropping at random is a method's control."""
    return method.startswith("slipstream-") and method not in (RANDOM, "slipstream-none")


def by_run(rows: Records) -> Table:
    """A table's rows by method and setting, then by metric."""
    found: Table = {}
    for row in rows:
        found.setdefault((row["method"], row["setting"]), {})[row["metric"]] = row
    return found


def difference_of(row: Mapping[str, Any], prefix: str = "") -> str:
    """A difference with its interval and verdict; empty where there is none."""
    mean = row.get(f"{prefix}difference", math.nan)
    if math.isnan(mean):
        return ""
    verdict = " (tie)" if row[f"{prefix}tie"] else ""
    return f"{mean:+.4f} ± {row[f'{prefix}interval']:.4f}{verdict}"


def print_table(rows: Records, limit: float | None) -> None:
    """For people: a line a method and setting, then what policies have over chance."""
    width = max(20, *(len(row["method"]) + 1 for row in rows))
    table = by_run(rows)
    has_stopped = any(row["metric"] == "auc_first_at_samples" and row["n"] for row in rows)
    print(
        f"{'method':<{width}}setting   n   AUC     sd      difference (95 %)        NE      "
        f"{'first stopped  ' * has_stopped}  samples  dropped  training s  s to target"
    )
    for number, ((method, setting), metrics) in enumerate(table.items()):
        auc, target = metrics["auc"], metrics["training_s_to_target"]
        mean = {name: row["mean"] for name, row in metrics.items()}
        all_there = target["n"] == auc["n"]
        there = f"{target['mean']:.1f}" if all_there else f"{target['n']} of {auc['n']}"
        stopped = f"{mean['auc_first_at_samples']:>13.4f}  " * has_stopped
        print(
            f"{method:<{width}}{setting:<8}{auc['n']:>3}  {auc['mean']:.4f}  {auc['sd']:.4f}  "
            f"{difference_of(auc) if number else '(the first)':<23}  "
            f"{mean['normalized_entropy']:.4f}  {stopped}{mean['samples']:>9,.0f}  "
            f"{mean['dropped_share']:>7.1%}  {mean['training_s']:>10.1f}  {there:>11}"
        )
    if over_chance := [(*kind, row["auc"]) for kind, row in table.items() if vs_random(row)]:
        print("\npolicies less slipstream-random, which drops as many, in its setting, AUC (95 %):")
        for method, setting, auc in over_chance:
            print(f"{method:<{width}}{setting:<8}     {difference_of(auc, 'random_')}")
    for method, setting in table:
        if (
            is_policy(method)
            and (RANDOM, setting) in table
            and not vs_random(table[method, setting])
        ):
            mine, others = (
                table[name, setting]["dropped_share"]["mean"] for name in (method, RANDOM)
            )
            print(
                f"{method} {setting}".rstrip()
                + f" drops {mine:.1%} where {RANDOM} drops {others:.1%}: no control of it"
            )
    print("\n" + legend(has_stopped))
    if limit is not None:
        print(f"planted model's limit: {limit:.4f}")


def vs_random(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A kind's AUC less that of its random control; empty: it has none."""
    return difference_of(metrics["auc"], "random_")


def legend(has_stopped: bool) -> str:
    """What the columns mean."""
    lines = [
        "difference: to the first method, over paired seeds; a tie: 0 is in its interval, so one "
        "smaller than the ± could not be seen",
        "s to target: seconds until the AUC is the first method's final one less "
        f"{MARGIN:g}; `1 of 3`: so many seeds got there",
    ]
    if has_stopped:
        lines.append("first stopped: AUC of the first method after as many samples")
    return "\n".join(lines)


def markdown(rows: Records) -> str:
    """The table of a README."""
    table = by_run(rows)
    has_random = any(map(vs_random, table.values()))
    lines = [
        f"| method | test AUC, mean ± sd of {rows[0]['n']} seeds | difference (95 %) "
        + "| less random drop (95 %) " * has_random
        + "| log loss | inputs trained | training s |",
        "|---|---|---|---|---|---|" + "---|" * has_random,
    ]
    for (method, name), metrics in table.items():
        auc = metrics["auc"]
        difference = difference_of(auc) if len(lines) > 2 else ""
        mean = {metric: row["mean"] for metric, row in metrics.items()}
        lines.append(
            f"| {method} {name}".rstrip()
            + f" | {auc['mean']:.4f} ± {auc['sd']:.4f} | {difference} "
            + f"| {vs_random(metrics)} " * has_random
            + f"| {mean['log_loss']:.4f} | {mean['samples']:,.0f} | {mean['training_s']:.1f} |"
        )
    return "\n".join(lines)


def not_dropped(logs: Mapping[Kind, Sequence[Records]]) -> list[str]:
    """A line a kind of run and reason why an epoch of it dropped nothing."""
    lines = []
    for (method, setting), runs in logs.items():
        reasons: dict[str, set[tuple[int, int]]] = {}
        num_epochs = 0
        for run, records in enumerate(runs):
            # Not the summary's: a run that ends before the choice says so in its log alone.
            drops = [record for record in records if record["kind"] == "drop"]
            num_epochs += len({drop["epoch"] for drop in drops})
            dropped = {drop["epoch"] for drop in drops if drop["dropped"]}
            for drop in drops:
                why = drop.get("reason") or drop.get("why")
                if why and drop["epoch"] not in dropped:
                    reasons.setdefault(why, set()).add((run, drop["epoch"]))
        lines += [
            f"{method} {setting}".rstrip()
            + f": nothing dropped in {len(epochs)} of {num_epochs} epochs of its runs; {why}"
            for why, epochs in reasons.items()
        ]
    return lines
