"""The papers' figures of what happens in training: where a step's time goes, how far rows move."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import plain_dlrm
from bench.paper_runs import NAMES, Drawn, Plan
from bench.paper_style import INK, SOFT, bar_axes, new_figure, plain_log_ticks
from bench.training_figures import Training
from bench.turns import phases_of
from slipstream.tools.runlog import Clocks, NoLog
from slipstream.training.build import build_trainer

NUM_STEPS, NUM_WARM_UP = 40, 5
NUM_WINDOWS, NUM_ROWS = 24, 48
# What a step does, by what it is for; rows: lookups, gradients and updates.
PARTS = {"rows": "embedding rows", "network": "network", "inputs": "mini-batches"}
PART_COLOURS = {"rows": "#E69F00", "network": "#9AA3AE", "inputs": "#DFE3E8"}
OF_PHASE = {
    "gather": "rows",
    "row gradient": "rows",
    "row update": "rows",
    "staging": "rows",
    "write back": "rows",
    "forward": "network",
    "loss and backward": "network",
    "optimizer": "network",
    "loader": "inputs",
    "inputs to device": "inputs",
}


def _training(plan: Plan, *words: str) -> Training:
    flags = [*plan.flags, "--nepochs", "1", "--seed", str(plan.seeds[0]), *words]
    flags += ["--device", "cpu"]  # where all rows are at hand
    args = {"segregated_data_dir": str(plan.segregated()), "processed_data_file": str(plan.path)}
    return Training(argparse.Namespace(**args, flags=flags))


def embedding_share(plan: Plan) -> Drawn:
    """The share of a step that embedding rows take."""
    rows = plan.measured("embedding_share", lambda: measure_shares(plan))
    kinds = list(dict.fromkeys((row["method"], row["mini_batch"]) for row in rows))
    picture, [[axes]] = new_figure(1.1 + 0.5 * len(kinds))
    shares, totals = {}, {}
    for place, kind in enumerate(kinds):
        mine = [row for row in rows if (row["method"], row["mini_batch"]) == kind]
        totals[kind] = sum(row["ms"] for row in mine)
        start = 0.0
        for part, name in PARTS.items():
            share = sum(row["ms"] for row in mine if row["part"] == part) / totals[kind]
            axes.barh(place, 100 * share, left=start, color=PART_COLOURS[part], height=0.72)
            text = f"{share:.0%}" if share > 0.06 else ""
            axes.text(start + 50 * share, place, text, ha="center", va="center", color=INK)
            if not place:  # names stand above the first bar: at the right for what is last
                is_last = part == list(PARTS)[-1]
                at, align = (100, "right") if is_last else (start, "left")
                axes.text(at, -0.5, name, ha=align, va="bottom", color=SOFT)
            start += 100 * share
            shares[kind, part] = share
        axes.text(101.5, place, f"{totals[kind]:,.2f} ms", va="center", color=INK)
    bar_axes(axes, [f"{NAMES[method]}, {size:,}" for method, size in kinds])
    axes.set(xlim=(0, 100), xlabel="% of a step; its time at the right")
    axes.grid(False)
    axes.set_ylim(len(kinds) - 0.5, -0.9)
    told = [
        f"{shares[kind, 'rows']:.0%} of a step of {NAMES[kind[0]]} at mini-batch {kind[1]:,}"
        for kind in kinds
    ]
    said = (
        "On the CPU, by row-wise Adagrad and Adam: rows' lookups, gradients and updates take "
        f"{', '.join(told)}. Mini-batches: cutting them out of the log."
    )
    return Drawn(rows, said, picture)


def measure_shares(plan: Plan) -> list[dict[str, Any]]:
    """Milliseconds of each phase, of plain PyTorch and of the baseline, at two mini-batches."""
    sizes = [plan.batch_size, min(4 * plan.batch_size, plan.num_train // 4)]
    found = []
    methods = ["baseline"] if plan.why_no_plain() else ["plain", "baseline"]
    for method in methods:
        for size in dict.fromkeys(sizes):
            times = _plain_phases(plan, size) if method == "plain" else _our_phases(plan, size)
            found += [
                {"method": method, "mini_batch": size, "phase": phase, "part": OF_PHASE[phase]}
                | {"ms": ms}
                for phase, ms in times.items()
                if phase in OF_PHASE
            ]
    return found


def _our_phases(plan: Plan, size: int) -> dict[str, float]:
    training = _training(plan, "--mini-batch-size", str(size))
    trainer = build_trainer(
        *(training.settings(), training.prepared, "interleaved", training.model, training.table),
        *(None, NoLog(), Clocks()),
    )
    inputs = max(trainer.data.hot, trainer.data.cold, key=len)
    rng = np.random.default_rng(0)
    try:
        return phases_of(trainer, inputs.batch, lambda: rng.integers(0, len(inputs), size))
    finally:
        trainer.loader.close()


class _Given(nn.Module):
    """Stands for the lookups: gives the rows that were looked up before."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.given = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.given


def _plain_phases(plan: Plan, size: int) -> dict[str, float]:
    """Median milliseconds of plain PyTorch's phases, lookups and their gradients apart."""
    times: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times.setdefault(phase, []).append(time.perf_counter() - start)

    train = plan.log.splits()[0].rows(0, min(plan.num_train, size * (NUM_STEPS + NUM_WARM_UP)))
    dataset = plain_dlrm.ClickDataset(train)
    sizes = plan.log.table_sizes.tolist()
    model = plain_dlrm.PlainDLRM(plan.bottom(), plan.model.arch_mlp_top, sizes, plan.seeds[0])
    recipe = plan.recipe
    rate, adam = recipe.learning_rate, recipe.dense_learning_rate or recipe.learning_rate
    training = plain_dlrm.PlainTraining(model, rate, size, adam_rate=adam)
    lookups, [of_rows, of_network] = model.rows, training.optimizers
    stream = iter(plain_dlrm.batches(dataset, size, 0, 0, False))
    while True:
        with timed("loader"):
            batch = next(stream, None)
        if batch is None or len(batch[2]) < size:
            break
        dense, ids, labels = batch
        with timed("gather"):
            rows = lookups(ids)
        given = rows.detach().requires_grad_()
        model.rows = _Given(given)
        with timed("forward"):
            logits = model(dense, ids)
        with timed("loss and backward"):
            for optimizer in training.optimizers:
                optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            loss.backward()
        with timed("row gradient"):
            rows.backward(given.grad)
        with timed("row update"):
            of_rows.step()
        with timed("optimizer"):
            of_network.step()
    skip = min(NUM_WARM_UP, len(times["gather"]) - 1)
    return {phase: 1e3 * float(np.median(values[skip:])) for phase, values in times.items()}


def change(plan: Plan) -> Drawn:
    """How far single rows move in each part of an epoch, by popularity."""
    kept = plan.measured("change", lambda: measure_change(plan))
    if not kept:
        return Drawn([], "No row is hot: give --hot-emb-gpu-mem more.")
    ranks = sorted({row["popularity"] for row in kept})
    ends = sorted({row["samples"] for row in kept})
    moved = np.full((len(ranks), len(ends)), np.nan)
    for row in kept:
        if row["change"] > 0:
            moved[ranks.index(row["popularity"]), ends.index(row["samples"])] = row["change"]
    picture, [[axes]] = new_figure(4.2)
    from matplotlib.colors import LogNorm

    known = moved[np.isfinite(moved)]
    low, high = np.quantile(known, [0.02, 0.98]) if len(known) else (0.1, 1.0)
    shares = 100 * np.array([0, *ends]) / ends[-1]
    edges = np.sqrt(np.array(ranks) * np.array([*ranks[1:], ranks[-1] * 1.1]))
    edges = np.concatenate([[0.8], edges])
    axes.set_facecolor("#E3E6EA")
    norm = LogNorm(low, high)
    mesh = axes.pcolormesh(shares, edges, np.ma.masked_invalid(moved), norm=norm, cmap="viridis")
    plain_log_ticks(axes, [10.0**p for p in range(7) if 10.0**p <= ranks[-1]], "y")
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="% of the epoch's inputs trained", ylabel="row, by popularity")
    axes.axvline(25, color="white", linewidth=1.5, linestyle=(0, (3, 3)))
    bar = picture.colorbar(mesh, ax=axes, pad=0.02, extend="both")
    bar.set_label("largest change of a value in a window", color=SOFT)
    bar.outline.set_visible(False)
    title, said = "grey: no mini-batch of the window touched the row", _said_of(moved, len(ends))
    if plan.recipe.lr_decay_share:
        falls = 100 * (1 - plan.recipe.lr_decay_share)
        axes.axvline(falls, color="white", linewidth=1.5, linestyle=(0, (1, 2)))
        title += "; dotted: from here the rates fall"
        said += f" From {falls:.0f} % on the learning rates fall to 0."
    axes.set_title(title)
    return Drawn(kept, said, picture)


def _said_of(moved: np.ndarray, num_windows: int) -> str:
    """How far rows move after a quarter of the epoch, and at its end, beside its beginning."""
    quarter = max(1, num_windows // 4)
    parts = {
        "the second quarter": moved[:, quarter : 2 * quarter],
        "the last": moved[:, -quarter:],
    }
    first = moved[:, :quarter]
    told = []
    for name, part in parts.items():
        known = np.isfinite(first).any(1) & np.isfinite(part).any(1)
        ratio = np.nanmedian(part[known], axis=1) / np.nanmedian(first[known], axis=1)
        if len(ratio):
            told.append(f"{np.median(ratio):.2f} times in {name}")
    return (
        f"FAE; a window is 1/{num_windows} of the epoch. Beside its first quarter, the median "
        f"row moves as far {', '.join(told)}."
    )


def measure_change(plan: Plan) -> list[dict[str, Any]]:
    """Largest change of rows in each window of FAE's epoch: a line a row and window."""
    training = _training(plan)
    num_hot, table = training.prepared.num_hot, training.table
    if not num_hot:
        return []
    slots = np.unique(np.geomspace(1, num_hot, NUM_ROWS).astype(np.int64)) - 1
    chosen = torch.from_numpy(slots)
    training.flags.print_freq = max(1, training.num_steps // NUM_WINDOWS)
    before = [table.leading_rows(num_hot)[chosen]]
    found: list[dict[str, Any]] = []

    def note(trainer: Any) -> None:
        trainer.loader.settle()
        after = table.leading_rows(num_hot)[chosen]
        moved = (after - before[0]).abs().amax(1).tolist()
        before[0] = after
        found.extend(
            {"popularity": slot + 1, "samples": trainer.progress.samples, "change": value}
            for slot, value in zip(slots.tolist(), moved, strict=True)
        )

    training.run(note=note)
    return found
