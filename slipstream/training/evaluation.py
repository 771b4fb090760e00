"""Evaluating a model: on the test set for what is reported, on the validation set for what is
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from slipstream.model.networks import ClickModel
from slipstream.tools.metrics import (
    calibration,
    click_metrics,
    mean_calibration,
    probabilities,
)
from slipstream.tools.output import stage_bar
from slipstream.tools.plugins import PluginError
from slipstream.tools.runlog import Clocks, Log
from slipstream.tools.runtime import StopRequest
from slipstream.training.embedding import EVALUATION
from slipstream.training.loader import Table
from slipstream.training.progress import Progress, is_of
from slipstream.training.sets import Inputs, TrainingData

MIN_LEARNED, STUCK_AUC = 100_000, 0.005  # samples after which an AUC so near 0.5 is a warning


@dataclass(frozen=True)
class Ends:
    """What ends a run before its last epoch, by its validations; 0: not that.

    Attributes:
        auc, accuracy: a value that one reaches.
        patience: so many in a row without a new best AUC; the best weights are tested then.
    """

    auc: float = 0.0
    accuracy: float = 0.0
    patience: int = 0

    def reason(self, progress: Progress) -> str | None:
        """Why the run is at its end after its last validation; None: it is not."""
        if not progress.validations:
            return None
        last, best = progress.validations[-1], progress.best
        for name, threshold in (("auc", self.auc), ("accuracy", self.accuracy)):
            if threshold and last[name] >= threshold:
                return f"{name} {last[name]:.4f} >= {threshold:g}"
        if not self.patience or best is None:
            return None
        since = [record for record in progress.validations if record["step"] > best["step"]]
        if len(since) < self.patience:
            return None
        return f"AUC was best at step {best['step']}, {best['auc']:.4f}; {len(since)} since then"


class Interrupted(Exception):
    """A signal came during an evaluation."""


# Some inputs -> their logits and labels (B,), on the device.
LogitsOf = Callable[[Inputs, np.ndarray | slice], tuple[Tensor, Tensor]]


def logits_of(
    model: ClickModel, table: Table, inputs: Inputs, chosen: np.ndarray | slice
) -> tuple[Tensor, Tensor]:
    """Logits and labels (B,) of some inputs, on the device, without autograd or dropout."""
    with model.evaluating():
        dense, slots, labels = inputs.batch(chosen)
        staged = table.enter(table.stage(slots, EVALUATION, after=table.lane.mark()))
        if not len(labels):  # a rank's part may be none
            none = torch.empty(0, dtype=model.dtype, device=table.device)
            return none, labels.to(table.device)
        rows, present = table.lookup(staged), table.present(staged)
        return model(dense.to(table.device), rows, present), labels.to(table.device)


def losses_of(logits_of: LogitsOf, inputs: Inputs, chosen: np.ndarray, batch_size: int) -> Tensor:
    """The model's loss (n,) on each of the chosen inputs, whatever their weights."""
    found = []
    for start in range(0, len(chosen), batch_size):
        logits, labels = logits_of(inputs, chosen[start : start + batch_size])
        labels = labels.to(logits.dtype)
        found.append(binary_cross_entropy_with_logits(logits, labels, reduction="none"))
    return torch.cat(found)


def outputs_of(
    logits_of: LogitsOf, inputs: Inputs, batch_size: int, stop: StopRequest | None = None
) -> np.ndarray:
    """The model's logits (n,) on all `inputs`, in batches, without autograd.

    Raises `ValueError` when one is not finite, `Interrupted` between two batches when `stop` has
    noted a signal.
    """
    logits = []
    for start in stage_bar(range(0, len(inputs), batch_size), "evaluating", unit=" batches"):
        if stop is not None and stop.signal:
            raise Interrupted
        logits.append(logits_of(inputs, slice(start, start + batch_size))[0])
    outputs = torch.cat(logits).cpu().numpy() if logits else np.empty(0, np.float32)
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs are not finite; lower --learning-rate")
    return outputs


def evaluate(
    logits_of: LogitsOf,
    inputs: Inputs,
    batch_size: int,
    stop: StopRequest | None = None,
    logit_shift: float = 0.0,
    with_calibration: bool = False,
) -> dict[str, Any]:
    """AUC, log loss and accuracy of the model on `inputs`, by their weights.

    `logit_shift` is added to its outputs, see `slipstream.logs.sub_sampling`. `with_calibration`
    adds what `mean_calibration` says and the `reliability` table (a sort of the inputs, as the AUC
    takes). Raises as `outputs_of` does, and `ValueError` for weights that no input may have.
    """
    outputs = outputs_of(logits_of, inputs, batch_size, stop)
    if logit_shift:
        outputs = outputs.astype(np.float64) + logit_shift
    weights = inputs.weights_of(slice(0, len(inputs)))
    labels = np.asarray(inputs.labels)
    metrics: dict[str, Any] = click_metrics(outputs, labels, weights)
    if with_calibration:
        predicted = probabilities(outputs)
        metrics |= mean_calibration(predicted, labels, weights)
        metrics["reliability"] = calibration(predicted, labels, weights)
    return metrics


def click_rate(inputs: Inputs) -> float | None:
    """The weighted share of inputs with a click; None where there are none."""
    if not len(inputs):
        return None
    return float(np.average(inputs.labels > 0, weights=inputs.weights_of(slice(0, len(inputs)))))


class Judge:
    """Evaluates a run's model on the way and at its end, and has the best one kept.

    Args:
        logits_of: the run's model.
        data: of the run.
        batch_size: inputs a mini-batch.
        val_freq: steps between validations; 0: at the end only, when there is nothing to choose.
        ends: when the run has reached its end.
        log, clocks, stop: of the run.
        settle: brings all host rows home.
        explain: a reason -> the error line for a model that is not finite.
        keep_best: saves the model as the best so far; None: the models are not kept.
        rate: the learning rate of the last step, for a warning.
    """

    def __init__(
        self,
        *,
        logits_of: LogitsOf,
        data: TrainingData,
        batch_size: int,
        val_freq: int,
        ends: Ends,
        log: Log,
        clocks: Clocks,
        stop: StopRequest,
        settle: Callable[[], None],
        explain: Callable[[str], str],
        keep_best: Callable[[], Any] | None,
        rate: Callable[[], float],
    ) -> None:
        self.logits_of, self.data, self.batch_size = logits_of, data, batch_size
        self.val_freq, self.ends = val_freq, ends
        self.log, self.clocks, self._stop = log, clocks, stop
        self._settle, self._explain, self._rate = settle, explain, rate
        self._save_best = keep_best

    def test(
        self, progress: Progress, final: bool = False, is_best: bool = False
    ) -> dict[str, Any]:
        """Evaluate on the test set: at the end, with its calibration, and for a curve.

        `is_best`: the weights are those of the best validation.
        """
        record = {**self._record(progress, self.data.test, final), "final": final}
        if final and progress.validations:
            last = progress.validations[-1]
            if is_best and progress.best is not None:
                last = progress.best
                record["weights_of_step"] = last["step"]
            record["val"] = {name: last[name] for name in ("auc", "log_loss", "accuracy")}
        progress.evaluations.append(record)
        self.log.write("evaluation", **record)
        self._warn_if_stuck(progress, "test", record["auc"])
        return record

    def validate(self, progress: Progress) -> dict[str, Any]:
        """Evaluate on the validation set: keep the best model, and end at a threshold."""
        if is_of(progress.validations, progress.step):
            return progress.validations[-1]
        record = self._record(progress, self.data.val)
        progress.validations.append(record)
        self.log.write("validation", **record)
        if self.val_freq or math.isnan(record["auc"]):
            self._warn_if_stuck(progress, "validation", record["auc"])
        best = math.nan if progress.best is None else progress.best["auc"]
        if math.isnan(best) or record["auc"] > best:
            self._keep_best(progress, record)
        if progress.reached is None and (reason := self.ends.reason(progress)):
            progress.reached = reason
            tqdm.write(f"step {progress.step}: validation {reason}")
        return record

    def _record(self, progress: Progress, inputs: Inputs, final: bool = False) -> dict[str, Any]:
        with self.clocks.count("paused"):
            self._settle()
            shift, size = self.data.held_out_shift, self.batch_size
            try:
                metrics = evaluate(self.logits_of, inputs, size, self._stop, shift, final)
            except PluginError:
                raise  # no learning rate would help
            except ValueError as error:
                raise ValueError(self._explain(str(error).partition(";")[0])) from error
        loss = progress.loss if math.isfinite(progress.loss) else None
        shares, seconds = progress.shares(), self.clocks.seconds()
        return {"epoch": progress.epoch, **shares, "loss": loss, **metrics, **seconds}

    def _keep_best(self, progress: Progress, record: dict[str, Any]) -> None:
        before, progress.best = progress.best, record
        if self._save_best is None or not self.val_freq:
            return  # `best` would be but the last
        with self.clocks.count("paused"):
            try:
                self._save_best()
            except OSError as error:
                progress.best = before
                tqdm.write(f"step {progress.step}: the best model is not saved: {error}")

    def _warn_if_stuck(self, progress: Progress, name: str, auc: float) -> None:
        """Say what is likely when an AUC is not defined, or a model does not learn."""
        if math.isnan(auc):
            tqdm.write(
                f"step {progress.step}: no {name} AUC: the inputs held out for it are none or of "
                "one class alone"
            )
            return
        if progress.samples < MIN_LEARNED or not abs(auc - 0.5) <= STUCK_AUC:
            return
        tqdm.write(
            f"step {progress.step}: the {name} AUC is {auc:.4f}: nothing is learned. Likely "
            f"causes: a learning rate ({self._rate():g}) far too small"
            " or so large that all outputs are equal; labels of other inputs; random data"
        )
