"""How far a run has come: counts, results, and the lines that say so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.tools.runlog import Log


@dataclass
class Progress:
    """Counts and results of a run so far, those of the runs that it goes on from included.

    `evaluations` are on the test set, `validations` on the validation set; `drops` the drop rule's
    choices; `losses` the training loss at each report; `best` the validation with the highest AUC.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    hot_samples: int = 0
    dropped: int = 0
    loss: float = math.nan  # mean training loss an input since the last report
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    drops: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    reached: str | None = None  # the threshold that ended the run

    def shares(self) -> dict[str, Any]:
        """Samples and shares as log fields."""
        seen = self.samples + self.dropped
        return {
            "step": self.step,
            "samples": self.samples,
            "hot_share": self.hot_samples / max(self.samples, 1),
            "dropped": self.dropped,
            "dropped_share": self.dropped / max(seen, 1),
        }


def check_progress(progress: Progress) -> None:
    """Raise `ValueError` for values that no run leaves."""
    counts = (progress.step, progress.samples, progress.hot_samples, progress.dropped)
    if not all(isinstance(count, int) and count >= 0 for count in (*counts, progress.epoch)):
        raise ValueError(f"its counts are {counts}, its epoch {progress.epoch}")
    records = [*progress.evaluations, *progress.validations]
    records += [] if progress.best is None else [progress.best]
    numbers = ("step", "auc", "log_loss", "accuracy")
    if not all(isinstance(record[name], (int, float)) for record in records for name in numbers):
        raise ValueError("its evaluations are not whole")
    if not all(isinstance(record, dict) for record in (*progress.drops, *progress.losses)):
        raise ValueError("its drops or losses are not whole")


def is_of(records: list[dict[str, Any]], step: int) -> bool:
    """Whether the last record is of that step."""
    return bool(records) and records[-1]["step"] == step


def shown(loss: float | None) -> str:
    """A loss for people."""
    return "-" if loss is None else f"{loss:.4f}"


def due(step: int, every: int) -> bool:
    """Whether something that comes every so many steps comes now; 0: never."""
    return every > 0 and step % every == 0


def drop_report(log: Log, progress: Progress) -> Callable[[dict[str, Any]], None]:
    """A `DropRule` report that keeps each choice in `progress`, logs it and says it in one line."""

    def report(record: dict[str, Any]) -> None:
        record = {**record, "step": progress.step}
        progress.drops.append(record)
        log_drop(log, record)

    return report


def log_drop(log: Log, record: dict[str, Any]) -> None:
    """Log a choice of inputs, or that there was none, and say it in one line."""
    log.write("drop", **record)
    epoch = f"epoch {record['epoch'] + 1}"
    if "reason" in record:
        tqdm.write(f"{epoch}: nothing dropped; {record['reason']}")
        return
    how = record["policy"]
    if record["alpha"] is not None:
        bounds = ", ".join(f"{value:.3g}" for value in np.atleast_1d(record["threshold"]))
        how += f", alpha {record['alpha']:g}, T {bounds}"
    short, target = "", record["target"]
    if target is not None and record["chosen"] < target:
        short = f"; only {record['chosen']:,} could be chosen, target {target:,}"
        if record["alpha"] is not None:
            short += ": a longer --snapshot-window touches more rows"
    pool = {"all": "inputs", "cold": "cold inputs"}.get(record["pool"], "hot inputs")
    before = record["dropped_before"]
    tqdm.write(
        f"{epoch}: dropped {record['dropped']:,} {pool}; {record['hot_remaining']:,} hot ones were "
        "left" + (f" or dropped before ({before:,})" if before else "") + f" ({how}){short}"
    )
