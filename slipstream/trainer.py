"""The one training loop and the one evaluator; baseline, FAE and Slipstream differ in their
arguments.

    method      cold inputs     hot inputs      rows on the device    drop rule
    baseline    all             none            none (all on a CPU)   None
    FAE         some row cold   all rows hot    the hot ones          None
    Slipstream  as FAE          as FAE          the hot ones          DropRule

`slipstream.loader` cuts mini-batches and brings host rows, `slipstream.step` trains on one batch.
The loop itself waits for the device only where it prints, tests or takes a snapshot.

Shapes: B inputs, F sparse features, dim values a row, dense features (B, num_dense).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from slipstream.batching import EpochPlan, epoch_order
from slipstream.embedding import EVALUATION, EmbeddingTable
from slipstream.loader import Batch, Inputs, Loader
from slipstream.metrics import click_metrics
from slipstream.runlog import Clocks, RunLog
from slipstream.staleness import DropRule
from slipstream.step import TrainStep, autocast

MIN_LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class TrainingData:
    """The four sets of a run. Baseline: every training input is in `cold`."""

    hot: Inputs
    cold: Inputs
    test: Inputs
    val: Inputs

    @property
    def num_train(self) -> int:
        """Training inputs, hot and cold."""
        return len(self.hot) + len(self.cold)


@dataclass(frozen=True)
class LearningRate:
    """DLRM's schedule: linear warm-up, quadratic decay, then held; steps count from 0."""

    base: float
    num_warmup_steps: int = 0
    decay_start_step: int = 0
    num_decay_steps: int = 0

    def at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.num_warmup_steps:
            return self.base * (step + 1) / self.num_warmup_steps
        if self.num_decay_steps == 0 or step < self.decay_start_step:
            return self.base
        decayed = min(step - self.decay_start_step, self.num_decay_steps - 1)
        return max(self.base * (1 - decayed / self.num_decay_steps) ** 2, MIN_LEARNING_RATE)


@dataclass
class Progress:
    """Counts of a run so far."""

    step: int = 0
    samples: int = 0
    hot_samples: int = 0
    dropped: int = 0
    loss: float = math.nan  # mean training loss an input since the last report
    evaluations: list[dict[str, Any]] = field(default_factory=list)

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


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    table: EmbeddingTable,
    inputs: Inputs,
    batch_size: int,
    precision: str = "fp32",
) -> dict[str, float]:
    """AUC, log loss and accuracy of the model on `inputs`, in batches, without autograd.

    Raises `ValueError` when an output of the model is not finite.
    """
    logits = [torch.empty(0, device=table.device)]
    for start in range(0, len(inputs), batch_size):
        dense, slots, _ = inputs.batch(slice(start, start + batch_size))
        rows = table.lookup(table.enter(table.stage(slots, EVALUATION, after=table.lane.mark())))
        with autocast(table.device, precision):
            logits.append(model(dense.to(table.device), rows).float())
    outputs = torch.cat(logits).cpu().numpy()
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs are not finite; lower --learning-rate")
    return click_metrics(outputs, np.asarray(inputs.labels))


class Trainer:
    """Trains `step`'s model and table on `data`; call `run` once.

    Args:
        overlap, hot_rows_resident: see `slipstream.loader`.
        drop_rule: Slipstream's; None trains every input.
        log, clocks: of the run; evaluations and drops are written as they happen.
        test_batch_size: inputs a mini-batch in evaluation.
        schedule, randomize, window: see `slipstream.batching`.
        test_freq: steps between evaluations on the test set; 0: at the end only.
        print_freq: steps between progress reports; 0: none.
        max_steps: stop after as many steps; 0: train all epochs.
        on_report: called at each report, after the device has been waited for, in its place.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        learning_rate: LearningRate,
        data: TrainingData,
        overlap: bool,
        hot_rows_resident: bool,
        drop_rule: DropRule | None,
        log: RunLog,
        clocks: Clocks,
        test_batch_size: int,
        num_epochs: int,
        schedule: str,
        randomize: str,
        seed: int,
        window: int = 0,
        test_freq: int = 0,
        print_freq: int = 0,
        max_steps: int = 0,
        on_report: Callable[[Progress], None] | None = None,
    ) -> None:
        self.step, self.table = step, step.table
        self.window = window
        self.loader = Loader(data.hot, data.cold, step.table, overlap, hot_rows_resident, window)
        self.learning_rate, self.data, self.drop_rule = learning_rate, data, drop_rule
        self.log, self.clocks = log, clocks
        self.test_batch_size = test_batch_size
        self.num_epochs, self.schedule, self.randomize, self.seed = (
            num_epochs,
            schedule,
            randomize,
            seed,
        )
        self.test_freq, self.print_freq, self.max_steps = test_freq, print_freq, max_steps
        self._on_report = on_report
        self.progress = Progress()
        self._loss_weight = 0.0

    def run(self) -> Progress:
        """Train all epochs, then evaluate on test and validation.

        Raises `ValueError` when the loss stops being finite (seen at each report and at the end).
        """
        try:
            for epoch in range(self.num_epochs):
                if not self._run_epoch(epoch):
                    break
        finally:
            self.loader.close()
        self._take_loss()
        final = self._evaluation(final=True)
        final["val"] = self._timed_evaluate(self.data.val)
        self.log.write("evaluation", **final)
        return self.progress

    def _run_epoch(self, epoch: int) -> bool:
        """Train one epoch; False when `max_steps` ends the run."""
        with self.clocks.count("training"):
            orders = [
                epoch_order(inputs.day_offsets, self.randomize, self.seed, epoch, self.window)
                for inputs in (self.data.hot, self.data.cold)
            ]
            plan = EpochPlan(orders[0], orders[1], self.step.batch_size, self.schedule)
            self.loader.start(plan)
        if self.drop_rule is not None:
            self.drop_rule.begin_epoch(epoch)
        description = f"epoch {epoch + 1}/{self.num_epochs}"
        with tqdm(
            total=self.data.num_train,
            desc=description,
            unit=" inputs",
            unit_scale=True,
            disable=None,
        ) as bar:
            while True:
                with self.clocks.count("training"):
                    more = self._run_until_report(plan, bar)
                if not more:
                    if self.drop_rule is not None and plan.is_finished:
                        self.drop_rule.end_epoch(plan)
                    return self.max_steps == 0 or self.progress.step < self.max_steps
                self._report(epoch, bar)

    def _run_until_report(self, plan: EpochPlan, bar: tqdm) -> bool:
        """Train until a report or an evaluation is due (True), or the epoch or run ends (False)."""
        while self.max_steps == 0 or self.progress.step < self.max_steps:
            if self.drop_rule is not None:
                self._follow_drop_rule(plan, bar)
            batch = self.loader.next()
            if batch is None:
                return False
            self._train_step(batch)
            bar.update(len(batch.labels))
            step = self.progress.step
            if _due(step, self.print_freq) or _due(step, self.test_freq):
                return True
        return False

    def _follow_drop_rule(self, plan: EpochPlan, bar: tqdm) -> None:
        assert self.drop_rule is not None
        before = self.drop_rule.num_dropped
        self.drop_rule.before_batch(plan, self.data.hot, self._leading_rows, self.clocks.count)
        newly_dropped = self.drop_rule.num_dropped - before
        self.progress.dropped += newly_dropped
        bar.update(newly_dropped)

    def _leading_rows(self, num_rows: int) -> Tensor:
        self.loader.settle()
        return self.table.leading_rows(num_rows)

    def _train_step(self, batch: Batch) -> None:
        if self.drop_rule is not None:
            # The index is on the device; the slots would have to be brought there.
            self.drop_rule.touch(
                batch.staged.index if self.loader.hot_rows_resident else batch.slots
            )
        rate = self.learning_rate.at(self.progress.step)
        self.step(batch.dense, batch.staged, batch.labels, batch.weights, rate)
        self.loader.done(batch)
        num_inputs, weights = len(batch.labels), batch.planned.weights
        self._loss_weight += num_inputs if weights is None else float(weights.sum())
        self.progress.step += 1
        self.progress.samples += num_inputs
        self.progress.hot_samples += num_inputs if batch.planned.hot else 0

    def _report(self, epoch: int, bar: tqdm) -> None:
        step = self.progress.step
        self._take_loss()
        if self._on_report is not None:
            self._on_report(self.progress)
        elif _due(step, self.test_freq):
            record = self._evaluation(final=False)
            self.log.write("evaluation", epoch=epoch, **record)
            tqdm.write(
                f"step {step}: loss {record['loss']:.4f}, test AUC {record['auc']:.4f}, "
                f"log loss {record['log_loss']:.4f}, accuracy {record['accuracy']:.4f}"
            )
        elif bar.disable:
            seconds = self.clocks.seconds()["training_s"]
            tqdm.write(
                f"step {step}: loss {self.progress.loss:.4f}, {self.progress.samples:,} samples, "
                f"{self.progress.samples / max(seconds, 1e-9):,.0f} samples/s"
            )
        else:
            bar.set_postfix(loss=f"{self.progress.loss:.4f}")

    def _take_loss(self) -> None:
        """Mean loss since the last call."""
        if self._loss_weight == 0:
            return
        self.progress.loss = self.step.take_loss_sum() / self._loss_weight
        self._loss_weight = 0.0
        if not math.isfinite(self.progress.loss):
            raise ValueError(
                f"the training loss is {self.progress.loss} at step {self.progress.step}; "
                "lower --learning-rate, or check the data for values out of range"
            )

    def _timed_evaluate(self, inputs: Inputs) -> dict[str, float]:
        with self.clocks.count("paused"):
            self.loader.settle()
            model, precision = self.step.model, self.step.precision
            return evaluate(model, self.table, inputs, self.test_batch_size, precision)

    def _evaluation(self, final: bool) -> dict[str, Any]:
        record = {
            **self.progress.shares(),
            "loss": self.progress.loss,
            **self._timed_evaluate(self.data.test),
            **self.clocks.seconds(),
            "final": final,
        }
        self.progress.evaluations.append(record)
        return record


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def drop_report(log: RunLog, records: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """A `DropRule` report that keeps each choice in `records`, logs it and says it in one line."""

    def report(record: dict[str, Any]) -> None:
        records.append(record)
        log.write("drop", **record)
        if "reason" in record:
            tqdm.write(f"epoch {record['epoch'] + 1}: nothing dropped; {record['reason']}")
            return
        short = ""
        if record["target_share"] and math.inf in np.atleast_1d(record["threshold"]):
            short = (
                f"; only {record['stale_share']:.1%} could be shown stale, target "
                f"{record['target_share']:.1%}: a longer --snapshot-window touches more rows"
            )
        tqdm.write(
            f"epoch {record['epoch'] + 1}: dropped {record['dropped']:,} of "
            f"{record['hot_remaining']:,} remaining hot inputs ({record['policy']}, "
            f"alpha {record['alpha']:g}, T {record['threshold']}){short}"
        )

    return report
