"""The one training loop; baseline, FAE and Slipstream differ in its arguments.

    method      cold inputs     hot inputs      rows on the device    drop rule
    baseline    all             none            none (all on a CPU)   None
    FAE         some row cold   all rows hot    the hot ones          None
    Slipstream  as FAE          as FAE          the hot ones          DropRule

`loader` cuts mini-batches and brings host rows, `step` trains on one batch, `evaluation` judges.
The loop itself waits for the device only where it prints, evaluates, takes a snapshot or writes a
checkpoint, and every 1000 steps to see that the loss is finite.

Shapes: B inputs, F sparse features, dim values a row, dense features (B, num_dense).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.tools.device import restore_random
from slipstream.tools.ranks import Ranks
from slipstream.tools.runlog import Clocks, Log
from slipstream.tools.runtime import StopRequest
from slipstream.training.batching import EpochPlan, epoch_order, order_check
from slipstream.training.checkpoint import Checkpoints, Parts
from slipstream.training.dropping import DropRule
from slipstream.training.evaluation import Ends, Interrupted, Judge
from slipstream.training.keeping import Keeper
from slipstream.training.loader import Batch, Loader
from slipstream.training.place import check_epochs, check_place, restore_rule
from slipstream.training.progress import (
    Progress,
    due,
    is_of,
    log_drop,
    said_of,
    shown,
    take_progress,
)
from slipstream.training.reach import reach_of
from slipstream.training.saved import Saved
from slipstream.training.schedule import LearningRate
from slipstream.training.sets import TrainingData
from slipstream.training.step import TrainStep
from slipstream.training.team import team_of

MAX_UNCHECKED = 1000  # steps after which the loss is looked at, whatever is printed
NO_INPUTS = np.empty(0, np.int64)


class Trainer:
    """Trains `step`'s model and table on `data`; call `run` once, after `restore` where it goes on.

    Args:
        overlap, hot_rows_resident: see `slipstream.training.loader`.
        drop_rule: Slipstream's; None trains every input.
        log, clocks: of the run; evaluations and drops are written as they happen.
        test_batch_size: inputs a mini-batch in evaluation.
        schedule, randomize, window: see `slipstream.training.batching`.
        test_freq, val_freq: steps between evaluations on the test and on the validation set; 0: at
            the end only.
        print_freq, said_freq: steps between progress reports, and those on the screen; 0: none.
        max_steps: stop after as many steps; 0: train all epochs.
        ends: when a validation ends the run; None: none does.
        checkpoints: writes them; None: the model is not kept.
        stop: asked after each step, and in evaluations, whether to end.
        on_report: called at each report, after the device has been waited for, in its place.
        ranks: that train parts of each batch; None: this process trains it whole.
    """

    _order_check: list[int] | None = None  # of the epoch in progress

    def __init__(
        self,
        *,
        step: TrainStep,
        learning_rate: LearningRate,
        data: TrainingData,
        overlap: bool,
        hot_rows_resident: bool,
        drop_rule: DropRule | None,
        log: Log,
        clocks: Clocks,
        test_batch_size: int,
        num_epochs: int,
        schedule: str,
        randomize: str,
        seed: int,
        window: int = 0,
        test_freq: int = 0,
        val_freq: int = 0,
        print_freq: int = 0,
        said_freq: int = 0,
        max_steps: int = 0,
        ends: Ends | None = None,
        checkpoints: Checkpoints | None = None,
        stop: StopRequest | None = None,
        on_report: Callable[[Progress], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.step, self.table, self.window = step, step.table, window
        rows = (step.table, overlap, hot_rows_resident)
        self.loader = Loader(data.hot, data.cold, *rows, window, ranks)
        self.learning_rate, self.data, self.drop_rule = learning_rate, data, drop_rule
        self.log, self.clocks = log, clocks
        self.num_epochs, self.seed, self.max_steps = num_epochs, seed, max_steps
        self.schedule, self.randomize = schedule, randomize
        self.test_freq, self.val_freq, self.print_freq = test_freq, val_freq, print_freq
        self.said_freq, self.checkpoints, stop = said_freq, checkpoints, stop or StopRequest()
        self._on_report, self.progress = on_report, Progress()
        of_run = (step, stop, checkpoints, data, lambda: self.progress, drop_rule, clocks)
        self.team = team_of(ranks, *of_run)
        self._rate = learning_rate.base  # of the last step
        self.keeper = Keeper(
            checkpoints=checkpoints,
            step=step,
            log=log,
            clocks=clocks,
            settle=self.loader.settle,
            progress=lambda: self.progress,
            rate=lambda: self._rate,
            parts=self._parts,
        )
        self.judge = self._make_judge(test_batch_size, ends or Ends(), stop)
        asked = (test_batch_size, clocks.count, self.team, lambda: self.progress.step)
        self._reach = reach_of(data, self.loader, *asked)
        self._loss_weight = 0.0
        self._settled_step = 0  # reports and evaluations of this step are done
        self.save_failure: OSError | None = None
        self.after_step: Callable[[], None] | None = None  # called once a mini-batch
        self._plan: EpochPlan | None = None  # of the epoch in progress
        self._saved: Saved | None = None  # its plan is to be gone on with

    def _make_judge(self, batch_size: int, ends: Ends, stop: StopRequest) -> Judge:
        return Judge(
            logits_of=self.team.logits,
            data=self.data,
            batch_size=batch_size,
            val_freq=self.val_freq,
            ends=ends,
            log=self.log,
            clocks=self.clocks,
            stop=stop,
            settle=self.loader.settle,
            explain=self.keeper.explain,
            keep_best=self.keeper.save_best if self.checkpoints is not None else None,
            rate=lambda: self._rate,
        )

    def restore(self, saved: Saved) -> None:
        """Go on where a checkpoint was taken, its model and rows being loaded already.

        The next steps are those of a run that was never interrupted. Raises `ValueError` when it
        does not fit.
        """
        values, _ = saved.part("trainer")
        with saved.reading():
            take_progress(self.progress, values["progress"])
            is_between = saved.values.get("plan") is None
            check_epochs(self.progress, self.data.num_train, is_between)
            self.progress.best = self.keeper.best_kept(self.progress.best)
            self._settled_step = int(values["settled_step"])
            self._loss_weight = float(values["loss_weight"])
            self.window = self.loader.window = int(values["window"])
            self.clocks.add(values["clocks"])
            self.step.restore(*saved.part("step"))
            restore_random(saved.part("random")[1], self.table.device, self.team.rank)
            if self.progress.reached:  # what ends a run may be another now
                self.progress.reached = self.judge.ends.reason(self.progress)
        self.team.led(lambda: None)  # of the best model rank 0 alone knows
        self._saved = saved

    def run(self) -> Progress:
        """Train all epochs, then evaluate on validation and test, where anything is held out.

        Where `stop` noted a signal, it returns after a last checkpoint, without evaluating. Raises
        `ValueError` when the loss stops being finite, and `OSError` when that checkpoint cannot be
        written; the one at the end of training is in `save_failure` then.
        """
        try:
            try:
                while self.progress.epoch < self.num_epochs and not self._ends():
                    self._run_epoch()
            finally:
                self.loader.close()
            self.team.check(self._plan, self._order_check or [], self.progress.step)
            if not self.team.signal:
                self.team.led(self._finish)
            if not self.team.signal:
                self._say_if_undecided()
        except Interrupted:
            pass
        if self.team.signal:
            self.team.led(lambda: self.keeper.save(is_last=True))
        return self.progress

    def evaluate_only(self) -> Progress:
        """Evaluate on validation and test, without training."""
        self.loader.close()

        def judge() -> None:
            self.judge.validate(self.progress)
            self.judge.test(self.progress, final=True)

        with contextlib.suppress(Interrupted):
            self.team.led(judge)
        return self.progress

    def _ends(self) -> bool:
        enough = self.max_steps > 0 and self.progress.step >= self.max_steps
        return enough or self.progress.reached is not None or self.team.signal is not None

    @property
    def dropped(self) -> dict[int, np.ndarray]:
        """The inputs that each epoch dropped, of those that are known, by `Chunk.ids`."""
        if (rule := self.drop_rule) is None:
            return {}
        here = {} if self._plan is None else {self.progress.epoch: rule.dropped}
        if self._saved is not None and self._saved.values.get("plan") is not None:
            here = {self.progress.epoch: self._saved.part("rule")[1]["pool"]}  # not gone on with
        return {**rule.lasting.dropped, **here}

    def _finish(self) -> None:
        self._take_loss()
        # Before the evaluations, which may take long: they can be repeated.
        try:
            self.keeper.save(is_last=True)
        except OSError as error:
            self.save_failure = error
            tqdm.write(f"step {self.progress.step}: the model is not saved: {error}")
        if not self.data.num_held_out:
            return
        self.judge.validate(self.progress)
        is_best = bool(self.judge.ends.patience) and self.keeper.load_best()
        if is_best:
            self.team.spread_network()
        self.judge.test(self.progress, final=True, is_best=is_best)

    def _say_if_undecided(self) -> None:
        """Say so where the run ends inside an epoch, before the drop rule's choice.

        Not a part of the progress: a run that goes on comes to it.
        """
        if self.drop_rule is not None and self._plan is not None:
            record = self.drop_rule.without_choice(self._plan, is_whole=False)
            if record is not None:
                log_drop(self.log, record)

    def _run_epoch(self) -> None:
        """Train one epoch, from where it stands to its end or the run's."""
        epoch = self.progress.epoch
        with self.clocks.count("training"):
            plan = self._begin_epoch(epoch)
            self.loader.start(plan)
        num_behind = sum(plan.num_trained.values())
        num_behind += self.drop_rule.num_dropped if self.drop_rule is not None else 0
        with tqdm(
            total=self.data.num_train,
            initial=num_behind,
            desc=f"epoch {epoch + 1}/{self.num_epochs}",
            unit=" inputs",
            unit_scale=True,
            disable=None,
        ) as bar:
            while True:
                self._settle_step(bar)
                if self._ends():
                    return
                with self.clocks.count("training"):
                    more = self._run_until_due(plan, bar)
                if not more:
                    break
        if self.drop_rule is not None:
            self.drop_rule.end_epoch(plan)
        self.progress.epoch, self._plan = epoch + 1, None

    def _begin_epoch(self, epoch: int) -> EpochPlan:
        orders = [
            epoch_order(inputs.day_offsets, self.randomize, self.seed, epoch, self.window)
            for inputs in (self.data.hot, self.data.cold)
        ]
        self._order_check = order_check(orders)
        self._plan = plan = EpochPlan(orders[0], orders[1], self.step.batch_size, self.schedule)
        saved, self._saved = self._saved, None
        position = saved.part("plan") if saved is not None else (None, {})
        if self.drop_rule is not None:
            self.drop_rule.begin_epoch(epoch)
        if saved is None or position[0] is None:
            return plan
        with saved.reading():
            if saved.part("trainer")[0]["order_check"] != self._order_check:
                raise ValueError(
                    "its epoch has another order: another version of Slipstream or NumPy wrote it; "
                    "its weights alone load with another --seed and --save-model"
                )
            plan.restore(*position)
            rule = saved.part("rule")
            check_place(plan, self.progress, self.data.num_train, rule[1].get("pool", NO_INPUTS))
            if self.drop_rule is not None:
                restore_rule(self.drop_rule, rule, plan, self.progress, self.table)
        return plan

    def _run_until_due(self, plan: EpochPlan, bar: tqdm) -> bool:
        """Train until `_settle_step` has something to do (True), or the epoch ends (False)."""
        while True:
            if self.drop_rule is not None:
                self._follow_drop_rule(plan, bar)
            batch = self.loader.next()
            if batch is None:
                return False
            self._train_step(batch)
            bar.update(batch.num_inputs)
            if self._is_due():
                return True

    def _is_due(self) -> bool:
        step = self.progress.step
        freqs = (self.print_freq, self.test_freq, self.val_freq, self.max_steps, MAX_UNCHECKED)
        if self.team.signal is not None or any(due(step, freq) for freq in freqs):
            return True
        return self.team.is_checkpoint_due(step)

    def _follow_drop_rule(self, plan: EpochPlan, bar: tqdm) -> None:
        assert self.drop_rule is not None
        before = self.drop_rule.num_dropped
        self.drop_rule.before_batch(plan, self._reach)
        newly_dropped = self.drop_rule.num_dropped - before
        self.progress.dropped += newly_dropped
        bar.update(newly_dropped)

    def _train_step(self, batch: Batch) -> None:
        assert self._plan is not None
        run = (self.data.num_train, self.num_epochs, self.max_steps, self.step.batch_size)
        left = self.progress.share_left(self._plan.num_left + batch.num_inputs, *run)
        self._rate = self.learning_rate.at(self.progress.step, left)
        number = self.progress.step + 1
        self.team.before_step(number, due(number, self.print_freq) or due(number, MAX_UNCHECKED))
        arguments = (batch.dense, batch.staged, batch.labels, batch.weights, self._rate)
        self.step(*arguments, batch.num_inputs)
        if self.drop_rule is not None:
            # The index is on the device; the slots would have to be brought there.
            slots = batch.staged.index if self.loader.hot_rows_resident else batch.slots
            self.drop_rule.touch(slots, batch.weights)
        self.loader.done(batch)
        self.team.after_step()
        num_inputs = batch.num_inputs
        self._loss_weight += batch.weight_sum
        self.progress.step += 1
        self.progress.samples += num_inputs
        self.progress.hot_samples += num_inputs if batch.planned.hot else 0
        if self.after_step is not None:
            self.after_step()

    def _settle_step(self, bar: tqdm) -> None:
        """What is due after a step, once: checkpoint, report, evaluations, in this order.

        A checkpoint comes before the rest, which a run that goes on from it then does.
        """
        step = self.progress.step
        if step == self._settled_step:
            return
        if self._on_report is not None:
            if due(step, self.print_freq):
                self._take_loss()
                self._on_report(self.progress)
            self._settled_step = step
            return
        self.team.check(self._plan, self._order_check or [], step)
        self.team.led(lambda: self._settle(step, bar))
        if self.team.rank:
            self._settled_step = step

    def _settle(self, step: int, bar: tqdm) -> None:
        self.keeper.check_loss(self.step.peek_loss_sum())
        if self.team.is_checkpoint_due(step):
            self.keeper.save()
        if self.team.signal:
            return
        is_tested = due(step, self.test_freq) and not is_of(self.progress.evaluations, step)
        is_validated = due(step, self.val_freq) and not is_of(self.progress.validations, step)
        if is_tested or is_validated or due(step, self.print_freq):
            self._take_loss()
        for name, is_due, take in (
            ("validation", is_validated, self.judge.validate),
            ("test", is_tested, self.judge.test),
        ):
            if is_due:
                record = take(self.progress)
                tqdm.write(
                    f"step {step}: loss {shown(record['loss'])}, {name} AUC {record['auc']:.4f}, "
                    f"log loss {record['log_loss']:.4f}, accuracy {record['accuracy']:.4f}"
                )
        if due(step, self.print_freq):
            self._report(bar, is_said=is_tested or is_validated)
        self._settled_step = step

    def _report(self, bar: tqdm, is_said: bool) -> None:
        """Log the training loss, and say it unless an evaluation has."""
        seconds = self.clocks.seconds()["training_s"]
        record = self.progress.report(self._rate, seconds)
        self.log.write("training", **record)
        if not bar.disable:
            bar.set_postfix(loss=f"{self.progress.loss:.4f}")
        elif not is_said and due(self.progress.step, self.said_freq):
            tqdm.write(said_of(record))

    def _take_loss(self) -> None:
        """Mean loss since the last call."""
        if self._loss_weight == 0:
            return
        loss_sum = self.step.take_loss_sum()
        self.keeper.check_loss(loss_sum)
        self.progress.loss = loss_sum / self._loss_weight
        self._loss_weight = 0.0

    def _parts(self) -> Parts:
        """All that `restore` needs."""
        progress = dataclasses.asdict(self.progress)
        if math.isnan(progress["loss"]):
            progress["loss"] = None
        values: dict[str, Any] = {
            "progress": progress,
            "settled_step": self._settled_step,
            "loss_weight": self._loss_weight,
            "window": self.window,
            "clocks": self.clocks.seconds(),
        }
        parts: dict[str, tuple[Mapping[str, Any], Mapping[str, np.ndarray]]] = {
            "trainer": (values, {}),
            "step": self.step.state(),
            "random": ({}, self.team.random_states()),
        }
        if self.drop_rule is not None and (lasting := self.drop_rule.lasting.state()) is not None:
            parts["drops"] = lasting
        if self._plan is not None:
            values["order_check"] = self._order_check
            parts["plan"] = self._plan.state()
            if self.drop_rule is not None:
                parts["rule"] = self.drop_rule.state(self.team)
        elif self._saved is not None and "plan" in self._saved.values:
            # The epoch has not been gone on with yet: its place is handed on.
            values["order_check"] = self._saved.values["trainer"]["order_check"]
            parts |= {name: self._saved.part(name) for name in ("plan", "rule")}
        return parts
