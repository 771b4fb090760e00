"""The figures that train: how far rows move, and T against D and alpha."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import slipstream_train
from bench.colours import COLOURS
from bench.run_figures import Rows
from slipstream.tools.device import tune_process
from slipstream.tools.runlog import Clocks, NoLog
from slipstream.training.build import build_model, build_trainer, network_of
from slipstream.training.chunks import Moment
from slipstream.training.cut import find_cut
from slipstream.training.drop_flags import settings_of as drop_settings_of
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.flags import Settings, settings_of
from slipstream.training.policies import find_policy
from slipstream.training.resume import settle_precision
from slipstream.training.sets import load_segregated
from slipstream.training.staleness import (
    num_stale_rows_needed,
    row_change,
)

NUM_SNAPSHOTS = 12
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Training:
    """A run of slipstream_train.py on the CPU, for figures of what happens in it."""

    def __init__(self, args: argparse.Namespace) -> None:
        flags = ["--segregated-data-dir", args.segregated_data_dir, "--device", "cpu", *args.flags]
        self.flags = slipstream_train.parse_args(flags)
        self.flags.print_freq = 0
        self.prepared = load_segregated(args.segregated_data_dir, args.processed_data_file)
        device = torch.device("cpu")
        settings = self.settings()
        tune_process(device, self.flags.num_threads, settings.machine.precision, False)
        spec = network_of(settings.model)
        self.model, self.table = build_model(settings, spec, self.prepared, device)
        batch_size = settings.training.mini_batch_size
        self.num_steps = self.prepared.data.num_train // batch_size

    def settings(self) -> Settings:
        """What the flags ask for now."""
        settings = settings_of(self.flags, self.prepared.data.num_train)
        return settle_precision(settings, torch.device("cpu"), None)

    def run(self, rule: DropRule | None = None, note: Callable[[Any], None] | None = None) -> None:
        """Train; `note` is called with the `Trainer` at each of its reports."""
        trainer = build_trainer(
            *(self.settings(), self.prepared, self.flags.schedule, self.model, self.table),
            *(rule, NoLog(), Clocks()),
            on_report=None if note is None else lambda progress: note(trainer),
        )
        trainer.run()


def change(args: argparse.Namespace, axes: Any) -> Rows:
    """Median largest change of a hot row between snapshots of a run that drops nothing."""
    training = Training(args)
    num_hot, table = training.prepared.num_hot, training.table
    training.flags.print_freq = max(1, training.flags.nepochs * training.num_steps // NUM_SNAPSHOTS)
    groups = _row_groups(training.prepared)
    found: Rows = []
    before = [table.leading_rows(num_hot)]

    def note(trainer: Any) -> None:
        trainer.loader.settle()
        progress, after = trainer.progress, table.leading_rows(num_hot)
        moved = row_change(before[0], after).numpy()
        before[0] = after
        for name, rows in groups.items():
            low, middle, high = np.quantile(moved[rows], [0.1, 0.5, 0.9]).tolist()
            found.append(
                {"group": name, "rows": len(rows), "step": progress.step}
                | {"samples": progress.samples, "p10": low, "median": middle, "p90": high}
            )

    training.run(note=note)
    for number, name in enumerate(groups):
        mine = [row for row in found if row["group"] == name]
        style = "-" if name.startswith("popularity") else "--"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            [row["samples"] / 1e3 for row in mine],
            [row["median"] for row in mine],
            style,
            color=colour,
            label=name,
        )
    axes.set(
        yscale="log",
        xlabel="inputs trained, thousands",
        ylabel=f"largest change of a row in {training.flags.print_freq} mini-batches, median",
    )
    return found


def _row_groups(prepared: Any) -> dict[str, np.ndarray]:
    """Hot slots by popularity, and by the size of their table."""
    num_hot = prepared.num_hot
    slots = np.arange(num_hot)
    edges = np.unique(np.geomspace(1, num_hot + 1, 5).astype(np.int64)) - 1
    groups = {
        f"popularity {first + 1:,} to {last:,}": slots[first:last]
        for first, last in zip(edges, edges[1:], strict=False)
    }
    size_of_row = np.repeat(prepared.table_sizes, prepared.table_sizes)
    sizes = np.empty(len(size_of_row), np.int64)
    sizes[np.array(prepared.slot_of_row)] = size_of_row
    for low, high in ((1, 100), (100, 10_000), (10_000, 1 << 31)):
        rows = slots[(sizes[:num_hot] >= low) & (sizes[:num_hot] < high)]
        if len(rows):
            groups[f"tables of {low:,} rows and more"] = rows
    return groups


class Quantiles(DropRule):
    """Drops nothing, and finds T for every drop percentage and alpha where a choice is due."""

    found: Rows = []

    def _choose(self, plan: Any, reach: Any, rows: Any) -> None:
        left = plan.remaining(True)
        num_features = reach.hot.slots_of(left[:1]).shape[1]
        self._choices += 1
        self.found = []
        for alpha in ALPHAS:
            k = num_stale_rows_needed(alpha, num_features)
            self.policy = find_policy("stale", alpha)
            moment = Moment(self._epoch, reach.step(), np.random.default_rng(0))
            critical = self._scores(plan, reach, rows, left, moment)
            for percent in range(5, 100, 5):
                threshold = find_cut(critical, percent / 100).value
                self.found.append(
                    {"alpha": alpha, "k": k, "drop_percentage": percent, "inputs": len(left)}
                    | {"threshold": threshold}
                )


def thresholds(args: argparse.Namespace, axes: Any) -> Rows:
    """T against the drop percentage D, a line an alpha; infinite where too few can be stale."""
    training = Training(args)
    flags = training.flags
    asked = drop_settings_of(
        flags, len(training.prepared.data.hot), training.settings().training.mini_batch_size
    )
    settings = DropSettings(start=asked.start, window=asked.window)
    rule = Quantiles(settings, training.prepared.num_hot, flags.seed, lambda record: None)
    training.run(rule)
    if not rule.found:
        raise ValueError("the run ended before the window did: take a larger log")
    for colour, alpha in zip(COLOURS, ALPHAS, strict=False):
        mine = [row for row in rule.found if row["alpha"] == alpha]
        axes.plot(
            [row["drop_percentage"] for row in mine],
            [row["threshold"] for row in mine],
            "o-",
            markersize=3,
            color=colour,
            label=f"alpha {alpha:g}: {mine[0]['k']} rows of an input",
        )
    axes.set(
        yscale="log",
        xlabel="D, % of the hot inputs left",
        ylabel="T, largest change of a row's values",
    )
    return rule.found
