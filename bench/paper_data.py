"""The papers' figures of the data: what they are, how skewed, and how few inputs show it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.colours import OTHER_COLOURS
from bench.figures import accesses_by_share, hot_by_memory
from bench.paper_runs import Drawn, Plan
from bench.paper_style import SOFT, Label, label_lines, new_figure, plain_log_ticks
from slipstream.model.networks import build_network
from slipstream.tools.npz import open_npz
from slipstream.training.build import features_seen, network_of
from slipstream.training.flags import settings_of
from slipstream.training.popularity import count_accesses, count_hot_inputs, rank_rows
from slipstream.training.sets import load_segregated

RATES = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # percent of the inputs that are profiled
PAPER_RATE = 5.0
NUM_LARGEST = 3  # tables shown beside all
# Criteo Kaggle as the papers train it.
KAGGLE = {
    "log": "Criteo Kaggle, the papers' settings",
    "inputs": "45,840,617",
    "embedding tables": "26",
    "embedding rows": "33.76 M",
    "values of a row": "16",
    "all rows": "2.16 GB (weights)",
    "hot memory": "268 MB",
    "bottom MLP": "13-512-256-64-16",
    "top MLP": "512-256-1",
    "mini-batch": "1,024",
}


def data(plan: Plan) -> Drawn:
    """The data set and the model."""
    folder = plan.segregated()
    prepared = load_segregated(folder, plan.path)
    train, test, val = plan.log.splits()
    settings = settings_of(plan.parsed(), plan.num_train)
    features = features_seen(prepared, plan.model.arch_sparse_feature_size)
    network = build_network(network_of(settings.model), features, 0)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    num_rows, counts = int(plan.log.table_sizes.sum()), prepared.data.access_counts
    assert counts is not None
    accesses = float(counts[: prepared.num_hot].sum() / max(counts.sum(), 1))
    hot_inputs = len(prepared.data.hot) / len(train)
    facts: dict[str, tuple[float, str]] = {
        "inputs": (len(plan.log.inputs), f"{len(plan.log.inputs):,}"),
        "of them training, test, validation": (
            len(train),
            f"{len(train):,}, {len(test):,}, {len(val):,}",
        ),
        "clicks among training inputs": _percent(float(np.mean(train.labels))),
        "dense features": (train.num_dense, f"{train.num_dense}"),
        "embedding tables": (len(plan.log.table_sizes), f"{len(plan.log.table_sizes)}"),
        "embedding rows": (num_rows, f"{num_rows:,}"),
        "values of a row": (features.dim, f"{features.dim}"),
        "bytes of a row, its optimizer's included": (plan.row_bytes, f"{plan.row_bytes}"),
        "all rows": _megabytes(num_rows * plan.row_bytes),
        "hot memory": _megabytes(plan.budget),
        "hot rows": (prepared.num_hot, f"{prepared.num_hot:,}"),
        "hot rows, of all": _percent(prepared.num_hot / num_rows),
        "accesses to hot rows": _percent(accesses),
        "inputs that touch hot rows alone": _percent(hot_inputs),
        "network's parameters": (num_parameters, f"{num_parameters:,}"),
    }
    texts = {name: text for name, (_, text) in facts.items()}
    if plan.model.model == "dlrm":
        texts["bottom MLP"] = "-".join(map(str, plan.bottom()))
        texts["top MLP"] = "-".join(map(str, plan.model.arch_mlp_top))
    texts["mini-batch"] = f"{plan.batch_size:,}"
    table = [[name, text, KAGGLE.get(name, "–")] for name, text in texts.items()]
    said = (
        f"{accesses:.0%} of the accesses go to the {prepared.num_hot:,} hot rows, "
        f"{prepared.num_hot / num_rows:.1%} of all; {hot_inputs:.0%} of the inputs touch no other."
    )
    rows = [{"what": name, "value": value} for name, (value, _) in facts.items()]
    return Drawn(rows, said, table=(["", plan.path.name, KAGGLE["log"]], table))


def _percent(share: float) -> tuple[float, str]:
    return share, f"{100 * share:.1f} %"


def _megabytes(num_bytes: float) -> tuple[float, str]:
    return num_bytes, f"{num_bytes / 1e6:,.3g} MB"


def skew(plan: Plan) -> Drawn:
    """Share of the accesses that the most popular rows take."""
    rows = accesses_by_share(plan.segregated())
    names = list(dict.fromkeys(row["table"] for row in rows))[: 1 + NUM_LARGEST]
    rows = [row for row in rows if row["table"] in names]
    picture, [[axes]] = new_figure(3.7)
    labels = []
    for colour, name in zip(OTHER_COLOURS, names, strict=False):
        mine = [row for row in rows if row["table"] == name]
        x = [100 * row["rows_share"] for row in mine]
        y = [100 * row["accesses_share"] for row in mine]
        axes.plot(x, y, color=colour, linewidth=2.6 if name == names[0] else 1.6)
        # At the left the lines are apart; at the right all are at 100 %.
        text = name.replace(": ", ",\n")
        labels.append(Label(text, colour, x[0], y[0]))
    low = min(100 * row["rows_share"] for row in rows)
    ticks = [10.0**power for power in range(-6, 3) if 10.0**power >= low]
    plain_log_ticks(axes, ticks, unit=" %")
    axes.set(ylim=(0, 102), ylabel="% of the accesses", xlabel="most popular rows, % of the table")
    label_lines(axes, labels, "left")
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    head = _share_at([row for row in rows if row["table"] == names[0]], 0.01)
    said = f"The most popular 1 % of all rows take {head:.0%} of the accesses."
    return Drawn(rows, said, picture)


def _share_at(rows: list[dict[str, Any]], share: float) -> float:
    """The share of accesses of the most popular `share` of rows."""
    known = [row["rows_share"] for row in rows], [row["accesses_share"] for row in rows]
    return float(np.interp(share, *known))


def budget(plan: Plan) -> Drawn:
    """Memory for hot rows against hot accesses and hot inputs."""
    rows = hot_by_memory(plan.path, plan.segregated(), plan.row_bytes)
    picture, [[axes]] = new_figure(3.3)
    labels = []
    x = [row["megabytes"] for row in rows]
    for key, text, colour in (
        ("accesses_share", "accesses\nto hot rows", OTHER_COLOURS[0]),
        ("inputs_share", "hot inputs", OTHER_COLOURS[1]),
    ):
        y = [100 * row[key] for row in rows]
        axes.plot(x, y, color=colour)
        at = min(range(len(x)), key=lambda i: abs(y[i] - 45))
        labels.append(Label(text, colour, x[at], y[at]))
    for label in labels:
        above = label is labels[0]
        axes.annotate(
            label.text,
            (label.x, label.y),
            (-5, 5) if above else (6, -6),
            textcoords="offset points",
            color=label.colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
            ha="right" if above else "left",
            va="bottom" if above else "top",
        )
    mark(axes, plan.budget / 1e6, "these\nruns")
    low, high = min(x), max(x)
    ticks = [10.0**power for power in range(-6, 7) if low <= 10.0**power <= high]
    plain_log_ticks(axes, ticks, unit=" MB")
    axes.set(ylim=(0, 102), ylabel="%", xlabel="memory for hot rows")
    taken = [row for row in rows if row["accesses_share"] >= 0.75][-1]
    said = (
        f"75 % of the accesses fit into {taken['megabytes']:.3g} MB "
        f"({taken['hot_rows'] / rows[0]['hot_rows']:.1%} of the rows); then "
        f"{taken['inputs_share']:.0%} of the inputs are hot."
    )
    return Drawn(rows, said, picture)


def mark(axes: Any, x: float, text: str) -> None:
    """A thin line up from a value of x, named at its top."""
    axes.axvline(x, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)), zorder=0.5)
    axes.annotate(
        text,
        (x, 1),
        (-4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="top",
        color=SOFT,
    )


def profiling(plan: Plan) -> Drawn:
    """Hot rows found from a share of the inputs, beside those found from all."""
    rows = plan.measured("profiling", lambda: measure_profiling(plan))
    picture, [[axes]] = new_figure(3.3)
    labels = []
    x = [row["percent"] for row in rows]
    for key, text, colour in (
        ("accesses_kept", "accesses that\nthe hot rows take", OTHER_COLOURS[0]),
        ("inputs_kept", "hot inputs", OTHER_COLOURS[1]),
        ("agreement", "hot rows that\nare the same", OTHER_COLOURS[3]),
    ):
        y = [100 * row[key] for row in rows]
        axes.plot(x, y, "o-", color=colour)
        labels.append(Label(text, colour, x[0], y[0]))
    mark(axes, PAPER_RATE, "papers")
    plain_log_ticks(axes, [0.1, 1, 5, 20, 100], unit=" %")
    axes.set(xlabel="of the training inputs profiled", ylabel="% of profiling all")
    axes.set_ylim(0, max(103, *(105 * row["inputs_kept"] for row in rows)))
    label_lines(axes, labels, "left")
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    paper = next(row for row in rows if row["percent"] == PAPER_RATE)
    said = (
        f"From {PAPER_RATE:g} % of the inputs ({paper['inputs']:,}), {paper['agreement']:.0%} of "
        f"the {paper['hot_rows']:,} hot rows are those found from all; they take "
        f"{paper['accesses_kept']:.1%} of the accesses that those take, and make "
        f"{paper['inputs_kept']:.1%} as many inputs hot."
    )
    return Drawn(rows, said, picture)


def measure_profiling(plan: Plan) -> list[dict[str, Any]]:
    """A row a rate: how the hot rows found from so many inputs compare with those of all."""
    train, num_rows = plan.log.splits()[0], int(plan.log.table_sizes.sum())
    counts = count_accesses(train, num_rows)
    num_hot = int(open_npz(plan.segregated() / "embedding_rows.npz")["num_hot"])
    found: list[dict[str, Any]] = []
    whole: dict[str, float] = {}
    for rate in (100.0, *RATES[::-1]):
        sampled = count_accesses(train, num_rows, rate, plan.seeds[0]) if rate < 100 else counts
        slots = rank_rows(sampled).slot_of_row
        is_hot = slots < num_hot
        inputs, *_ = count_hot_inputs(train, slots, [num_hot])
        now = {"accesses": float(counts[is_hot].sum()), "inputs": float(inputs[0])}
        if not whole:
            whole, truth = now, is_hot
        row = {"percent": rate, "inputs": round(len(train) * rate / 100), "hot_rows": num_hot}
        row["agreement"] = float((is_hot & truth).sum() / max(num_hot, 1))
        row |= {f"{key}_kept": now[key] / max(whole[key], 1.0) for key in whole}
        found.insert(0, row)
    return found
