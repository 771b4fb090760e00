"""How far a run has come: counts, results, and the lines that say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.tools.runlog import Log

PRINT_FREQ, MOST_LINES = 100, 5


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

    def share_left(
        self, num_left: int, num_train: int, num_epochs: int, max_steps: int, batch_size: int
    ) -> float:
        """Inputs still to train over those of a run that drops none, of `num_epochs` of
        `num_train`, or of `max_steps` if there are fewer (0: no bound). `num_left`: of the epoch.
        """
        total = num_epochs * num_train
        left = (num_epochs - self.epoch - 1) * num_train + num_left
        if max_steps:
            total = min(total, max_steps * batch_size)
            left = min(left, (max_steps - self.step) * batch_size)
        return left / total

    def report(self, learning_rate: float, training_s: float) -> dict[str, Any]:
        """The record of a report, kept in `losses`."""
        record = {"epoch": self.epoch, **self.shares(), "loss": self.loss}
        record |= {"learning_rate": learning_rate, "training_s": training_s}
        self.losses.append(record)
        return record


def said_of(record: dict[str, Any]) -> str:
    """A report's line for people."""
    step, samples, seconds = (record[name] for name in ("step", "samples", "training_s"))
    return (
        f"step {step}: loss {record['loss']:.4f}; {samples:,} inputs trained, "
        f"{samples / max(seconds, 1e-9):,.0f} a second"
    )


def take_progress(progress: Progress, values: Mapping[str, Any]) -> None:
    """Put what a checkpoint says into `progress`, which others hold, too, and its `drops`."""
    taken = {**values, "drops": progress.drops}
    taken["loss"] = math.nan if values["loss"] is None else values["loss"]
    progress.drops.extend(values["drops"])
    vars(progress).update(vars(Progress(**taken)))


def choices_of(drops: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of records of drops those of choices that were made; the others say why there was none."""
    return [record for record in drops if "reason" not in record]


def is_of(records: list[dict[str, Any]], step: int) -> bool:
    """Whether the last record is of that step."""
    return bool(records) and records[-1]["step"] == step


def shown(loss: float | None) -> str:
    """A loss for people."""
    return "-" if loss is None else f"{loss:.4f}"


def due(step: int, every: int) -> bool:
    """Whether something that comes every so many steps comes now; 0: never."""
    return every > 0 and step % every == 0


def report_freqs(print_freq: int | None, num_steps: int) -> tuple[int, int]:
    """Steps between reports in the log, and on the screen, for an epoch of so many steps.

    None: the screen gets `MOST_LINES` of an epoch at most.
    """
    if print_freq is not None:
        return print_freq, print_freq
    return PRINT_FREQ, PRINT_FREQ * max(1, -(-num_steps // (MOST_LINES * PRINT_FREQ)))


def drop_report(log: Log, progress: Progress) -> Callable[[dict[str, Any]], None]:
    """A `DropRule` report that keeps each choice in `progress`, with the step and the samples
    before it, logs it and says it in one line.
    """

    def report(record: dict[str, Any]) -> None:
        record = {**record, "step": progress.step, "samples": progress.samples}
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
    short = ""
    if record["why"] is not None:
        short = f"; {record['achieved']:,} chosen, target {record['target']:,}: {record['why']}"
    pool = {"all": " inputs; ", "cold": " cold inputs; "}.get(record["pool"], " of ")
    before = record["dropped_before"]
    tqdm.write(
        f"{epoch}: dropped {record['dropped']:,}{pool}{record['hot_remaining']:,} hot inputs left "
        + (f"to train or dropped before ({before:,})" if before else "to train")
        + f" ({how}){short}"
    )
