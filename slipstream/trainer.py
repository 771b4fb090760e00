"""The one training loop and the one evaluator; baseline, FAE and Slipstream differ in their
arguments.

    method      cold inputs     hot inputs      rows on the device    drop rule
    baseline    all             none            none (all on a CPU)   None
    FAE         some row cold   all rows hot    the hot ones          None
    Slipstream  as FAE          as FAE          the hot ones          DropRule

A step: stage the batch's host rows, look all rows up, forward, backward to the MLPs and to the
looked-up rows, update both, copy staged rows home. The table takes no part in autograd: its
gradient is that of the rows a batch looked up.

Shapes: B inputs, F sparse features, dim values a row, dense features (B, num_dense).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as nn_functional
from torch import Tensor, nn
from tqdm import tqdm

from slipstream.batching import EpochPlan, PlannedBatch, epoch_order
from slipstream.embedding import EmbeddingTable
from slipstream.metrics import click_metrics
from slipstream.runlog import Clocks, RunLog
from slipstream.staleness import DropRule, HotInputs

MIN_LEARNING_RATE = 1e-7


class Inputs(HotInputs, Protocol):
    """A set of inputs that mini-batches are cut from."""

    day_offsets: np.ndarray  # (days + 1,) int64

    def __len__(self) -> int: ...

    def batch(self, inputs: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Dense (B, num_dense) float32, slots (B, F) int64 and labels (B,) float32, on the host."""


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


@torch.no_grad()
def evaluate(
    model: nn.Module, table: EmbeddingTable, inputs: Inputs, batch_size: int
) -> dict[str, float]:
    """AUC, log loss and accuracy of the model on `inputs`, in batches, without autograd.

    Raises `ValueError` when an output of the model is not finite.
    """
    logits = [np.empty(0, np.float32)]
    for start in range(0, len(inputs), batch_size):
        dense, slots, _ = inputs.batch(slice(start, start + batch_size))
        rows = table.lookup(table.stage(slots))
        logits.append(model(dense.to(table.device), rows).float().cpu().numpy())
    outputs = np.concatenate(logits)
    if not np.isfinite(outputs).all():
        raise ValueError("the model's outputs are not finite; lower --learning-rate")
    return click_metrics(outputs, np.asarray(inputs.labels))


class Trainer:
    """Trains a model and a table on `data`; call `run` once.

    Args:
        model: maps dense features (B, num_dense) and rows (B, F, dim) to logits (B,).
        table: the embedding rows; the model's device is `table.device`.
        optimizer: of the model's own parameters; the table updates its rows itself.
        drop_rule: Slipstream's; None trains every input.
        log, clocks: of the run; evaluations and drops are written as they happen.
        batch_size, test_batch_size: inputs a mini-batch in training and evaluation.
        schedule, randomize: see `slipstream.batching`.
        test_freq: steps between evaluations on the test set; 0: at the end only.
        print_freq: steps between progress reports; 0: none.
        max_steps: stop after as many steps; 0: train all epochs.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        table: EmbeddingTable,
        optimizer: torch.optim.Optimizer,
        learning_rate: LearningRate,
        data: TrainingData,
        drop_rule: DropRule | None,
        log: RunLog,
        clocks: Clocks,
        batch_size: int,
        test_batch_size: int,
        num_epochs: int,
        schedule: str,
        randomize: str,
        seed: int,
        test_freq: int = 0,
        print_freq: int = 0,
        max_steps: int = 0,
    ) -> None:
        self.model, self.table, self.optimizer = model, table, optimizer
        self.learning_rate, self.data, self.drop_rule = learning_rate, data, drop_rule
        self.log, self.clocks = log, clocks
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.num_epochs, self.schedule, self.randomize, self.seed = (
            num_epochs,
            schedule,
            randomize,
            seed,
        )
        self.test_freq, self.print_freq, self.max_steps = test_freq, print_freq, max_steps
        self.progress = Progress()
        self._loss_sum = torch.zeros((), device=table.device)
        self._loss_weight = 0.0

    def run(self) -> Progress:
        """Train all epochs, then evaluate on test and validation.

        Raises `ValueError` when the loss stops being finite (seen at each report and at the end).
        """
        for epoch in range(self.num_epochs):
            if not self._run_epoch(epoch):
                break
        self._take_loss()
        final = self._evaluation(final=True)
        final["val"] = self._timed_evaluate(self.data.val)
        self.log.write("evaluation", **final)
        return self.progress

    def _run_epoch(self, epoch: int) -> bool:
        """Train one epoch; False when `max_steps` ends the run."""
        with self.clocks.count("training"):
            orders = [
                epoch_order(inputs.day_offsets, self.randomize, self.seed, epoch)
                for inputs in (self.data.hot, self.data.cold)
            ]
            plan = EpochPlan(orders[0], orders[1], self.batch_size, self.schedule)
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
            batch = plan.next_batch()
            if batch is None:
                return False
            self._train_step(batch)
            bar.update(len(batch.inputs))
            step = self.progress.step
            if _due(step, self.print_freq) or _due(step, self.test_freq):
                return True
        return False

    def _follow_drop_rule(self, plan: EpochPlan, bar: tqdm) -> None:
        assert self.drop_rule is not None
        before = self.drop_rule.num_dropped
        self.drop_rule.before_batch(plan, self.data.hot, self.table, self.clocks.count)
        newly_dropped = self.drop_rule.num_dropped - before
        self.progress.dropped += newly_dropped
        bar.update(newly_dropped)

    def _train_step(self, planned: PlannedBatch) -> None:
        inputs = self.data.hot if planned.hot else self.data.cold
        device = self.table.device
        dense, slots, labels = inputs.batch(planned.inputs)
        if self.drop_rule is not None:
            self.drop_rule.touch(slots)
        staged = self.table.stage(slots)
        rows = self.table.lookup(staged).requires_grad_()
        logits = self.model(dense.to(device, non_blocking=True), rows)
        labels = labels.to(device, non_blocking=True)
        weights = None
        if planned.weights is not None:
            weights = torch.from_numpy(planned.weights).to(device, non_blocking=True)
        # Over the full batch size, not this batch's: each input counts alike. With a mean, a last
        # batch of 55 inputs steps as far as one of 1024 and costs up to 0.05 of AUC.
        loss_sum = nn_functional.binary_cross_entropy_with_logits(
            logits, labels, weight=weights, reduction="sum"
        )
        loss = loss_sum / self.batch_size
        learning_rate = self.learning_rate.at(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        assert rows.grad is not None
        self.table.update(staged, rows.grad, learning_rate)
        self.table.write_back(staged)
        self._loss_sum += loss_sum.detach()
        weight = len(planned.inputs) if planned.weights is None else float(planned.weights.sum())
        self._loss_weight += weight
        self.progress.step += 1
        self.progress.samples += len(planned.inputs)
        self.progress.hot_samples += len(planned.inputs) if planned.hot else 0

    def _report(self, epoch: int, bar: tqdm) -> None:
        step = self.progress.step
        self._take_loss()
        if _due(step, self.test_freq):
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
        """Mean loss since the last call; no hot batch waits for the device elsewhere."""
        if self._loss_weight == 0:
            return
        self.progress.loss = float(self._loss_sum) / self._loss_weight
        self._loss_sum.zero_()
        self._loss_weight = 0.0
        if not math.isfinite(self.progress.loss):
            raise ValueError(
                f"the training loss is {self.progress.loss} at step {self.progress.step}; "
                "lower --learning-rate, or check the data for values out of range"
            )

    def _timed_evaluate(self, inputs: Inputs) -> dict[str, float]:
        with self.clocks.count("paused"):
            return evaluate(self.model, self.table, inputs, self.test_batch_size)

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
