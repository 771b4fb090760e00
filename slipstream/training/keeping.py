"""Keeping a run's model: checkpoints on the way, the best one, and none that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from slipstream.tools.runlog import Clocks, Log
from slipstream.training.checkpoint import Checkpoints, Parts
from slipstream.training.progress import Progress
from slipstream.training.saved import BEST, open_checkpoint
from slipstream.training.step import TrainStep


class Keeper:
    """Writes a run's checkpoints, and stops one whose numbers are not finite.

    Args:
        checkpoints: what writes them; None: the model is not kept.
        step: holds the loss.
        log, clocks: of the run.
        settle: brings all host rows home.
        progress, rate: of the run, and the learning rate of its last step.
        parts: all that a run which goes on needs.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints | None,
        step: TrainStep,
        log: Log,
        clocks: Clocks,
        settle: Callable[[], None],
        progress: Callable[[], Progress],
        rate: Callable[[], float],
        parts: Callable[[], Parts],
    ) -> None:
        self.checkpoints, self._step, self._log, self._clocks = checkpoints, step, log, clocks
        self._settle, self._progress, self._rate, self._parts = settle, progress, rate, parts

    def check_loss(self, loss_sum: float) -> None:
        """Raise `ValueError` for a sum of losses that is not finite."""
        if not math.isfinite(loss_sum):
            raise ValueError(self.explain(f"the training loss is {loss_sum}"))

    def explain(self, what: str) -> str:
        """The error line for `what`, with all that helps to find out why."""
        progress = self._progress()
        known = [f"loss {progress.loss:.4f}"] if math.isfinite(progress.loss) else []
        for name, records in (
            ("validation", progress.validations),
            ("test", progress.evaluations),
        ):
            if records:
                known.append(f"{name} AUC {records[-1]['auc']:.4f} at step {records[-1]['step']}")
        before = f"; before: {', '.join(known)}" if known else ""
        path = self.checkpoints.last_path if self.checkpoints is not None else None
        return (
            f"{what} at step {progress.step}, learning rate {self._rate():g}{before}; "
            + (f"the last checkpoint is {path}; " if path else "")
            + "lower --learning-rate, or check the data for values out of range"
        )

    def save(self, is_last: bool = False) -> None:
        """Write a checkpoint; unless it is the last, a full disk does not end the run."""
        checkpoints, step = self.checkpoints, self._progress().step
        if checkpoints is None or step == checkpoints.last_step:
            return
        self.check_loss(self._step.peek_loss_sum())
        with self._clocks.count("paused"):
            self._settle()
            start, parts = time.perf_counter(), self._parts()
            try:
                path = checkpoints.save(step, parts)
            except ValueError as error:
                raise ValueError(self.explain(str(error))) from error
            except OSError as error:
                if is_last:
                    raise
                tqdm.write(
                    f"step {step}: no checkpoint: {error}; training goes on, the last one is"
                    f" {checkpoints.last_path}"
                )
                self._log.write("checkpoint", step=step, error=str(error))
                return
        seconds = time.perf_counter() - start
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        self._log.write("checkpoint", step=step, path=path, bytes=num_bytes, seconds=seconds)
        tqdm.write(f"step {step}: wrote {path} ({num_bytes / 1e6:,.1f} MB, {seconds:.2f} s)")

    def best_kept(self, known: dict[str, Any] | None) -> dict[str, Any] | None:
        """The validation of the folder's `best`, for a run that goes on there; elsewhere: none.

        A crash may leave one that is newer than the checkpoint it is gone on from.
        """
        if self.checkpoints is None:
            return known
        if self.checkpoints.last_path is None:
            return None  # it lies in the other folder
        try:
            saved = open_checkpoint(self.checkpoints.folder / BEST)
        except (OSError, ValueError):
            return known
        return saved.values["trainer"]["progress"]["best"] or known

    def load_best(self) -> bool:
        """Take the weights of the best validation; False where there are none."""
        best, checkpoints = self._progress().best, self.checkpoints
        if checkpoints is None or best is None:
            return False
        checkpoints.load_best(self._step.model.network)
        tqdm.write(f"the weights of step {best['step']}, the best on validation, are tested")
        return True

    def save_best(self) -> None:
        """Write the checkpoint `best`. Raises `OSError` (full disk)."""
        assert self.checkpoints is not None
        self.checkpoints.save_best(self._progress().step, self._parts())
