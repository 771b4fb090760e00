"""A run's log as curves of TensorBoard, written beside it from the same records.

A run that goes on begins its log with the records up to there (`slipstream.tools.runlog`), so its
curves are written anew from step 0, and TensorBoard leaves out those of the run before: they are
one, without gaps or points that a crash left over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.tools.runlog import Log

# A record's fields, and the curves that they are; {} is the set that was evaluated.
EVALUATED = {
    "auc": "auc/{}",
    "log_loss": "log loss/{}",
}
SHARES = {"hot_share": "share/hot", "dropped_share": "share/dropped"}
TRAINED = {
    "loss": "loss/training",
    "learning_rate": "learning rate/rows",
    "dense_learning_rate": "learning rate/network",
    "samples_per_s": "samples a second",
}
CHOSEN = {"threshold": "choice/threshold", "dropped": "choice/dropped"}
SETS = {"evaluation": "test", "validation": "validation"}


class Curves:
    """A log that hands its records on to another, and draws them.

    Args:
        log: the other one.
        writer: TensorBoard's.
        rate_ratio: the network's learning rate over the rows'.
    """

    def __init__(self, log: Log, writer: Any, rate_ratio: float) -> None:
        self._log, self._writer, self._rate_ratio = log, writer, rate_ratio
        self._samples, self._seconds, self._step = 0, 0.0, 0

    def write(self, kind: str, **fields: Any) -> None:
        """Take one record."""
        self._log.write(kind, **fields)
        self._step = step = fields.get("step", self._step)
        if kind in SETS:
            self._draw(EVALUATED, fields, step, SETS[kind])
        elif kind == "training":
            self._draw(TRAINED | SHARES, {**fields, **self._rates(fields)}, step)
        elif kind == "summary":
            self._draw(SHARES, fields, step)
        elif kind == "drop":
            self._draw(CHOSEN, fields, step)
            self._draw_change(fields.get("row_change"), step)
        self._writer.flush()

    def _rates(self, fields: dict[str, Any]) -> dict[str, float]:
        samples, seconds = fields["samples"], fields["training_s"]
        passed = max(seconds - self._seconds, 1e-9)
        found = {"samples_per_s": (samples - self._samples) / passed}
        self._samples, self._seconds = samples, seconds
        return {**found, "dense_learning_rate": fields["learning_rate"] * self._rate_ratio}

    def _draw(self, names: dict[str, str], fields: dict[str, Any], step: int, of: str = "") -> None:
        for field, name in names.items():
            value = fields.get(field)
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name.format(of), value, step)

    def _draw_change(self, bins: list[list[float]] | None, step: int) -> None:
        """How far the rows that were touched in the window moved, by half octaves."""
        if not bins:
            return
        limits: list[float] = []
        counts: list[float] = []
        for limit, count in bins:
            # 1 to 1.5, or 1.5 to 2 times a power of 2; between two that are apart is an empty one.
            lower = limit * (0.75 if math.frexp(limit)[0] == 0.5 else 2 / 3)
            if not limits or lower > limits[-1] * 1.01:
                limits.append(lower)
                counts.append(0)
            limits.append(limit)
            counts.append(count)
        total = sum(limit * count for limit, count in bins)
        squares = sum(limit * limit * count for limit, count in bins)
        self._writer.add_histogram_raw(
            "row change",
            min=limits[0],
            max=limits[-1],
            num=sum(counts),
            sum=total,
            sum_squares=squares,
            bucket_limits=limits,
            bucket_counts=counts,
            global_step=step,
        )


@contextmanager
def drawn(log: Log, folder: str | None, goes_on: bool, rate_ratio: float) -> Iterator[Log]:
    """`log`, and where there is a folder its curves in it.

    Raises `ValueError` for a folder with the curves of another run, unless this one `goes_on`.
    """
    if not folder:
        yield log
        return
    if not goes_on and any(Path(folder).glob("events.out.tfevents.*")):
        raise ValueError(
            f"--tensor-board-filename {folder} has the curves of another run; choose another folder"
        )
    # A second to import: only when it is asked for.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=0) as writer:
        yield Curves(log, writer, rate_ratio)
