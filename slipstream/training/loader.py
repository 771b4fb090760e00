"""Mini-batches for the training loop: cut, staged and put on the device, ahead of it on host
threads.

With `overlap` one thread works through, in this order for each cold batch k: stage the rows of k +
1, write the rows of k back. So the rows of k + 1 travel while the device trains k and the hot
batches after it; what k changes of them after they were gathered is handed on by the device
(`EmbeddingTable.enter`). Another thread cuts batches ahead, two of a kind, so that neither waits
for the other, and finds which host rows they need: the first one waits for the device, and is what
bounds a stream of cold ones. A batch that the drop rule replaces meanwhile is cut again.

Inputs that are on the device are cut there by the calling thread, many in one go: each mini-batch
is a part of them.

Without `overlap` everything happens in the calling thread, in the order of the batches. Both give
the same weights bit for bit on a CPU.

Of several ranks each cuts its part of a batch. The calling thread asks the others for the rows of
the next cold batch when it has given this one's gradients back; they travel behind the hot ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from slipstream.tools.ranks import Ranks
from slipstream.training.batching import EpochPlan, PlannedBatch
from slipstream.training.embedding import EmbeddingTable, Prepared, StagedBatch
from slipstream.training.sets import Inputs, num_cut_together
from slipstream.training.sharded import ShardedTable

NUM_AHEAD = 2  # mini-batches of a kind that are cut ahead
T = TypeVar("T")
Table = EmbeddingTable | ShardedTable


@dataclass(frozen=True)
class Batch:
    """A mini-batch on the device.

    Attributes:
        planned: its inputs.
        dense: (B, num_dense) float32.
        labels: (B,) float32.
        weights: (B,) float32 loss weights, those of the inputs times the plan's; None: all 1.
        weight_sum: all of them added up, those of other ranks, too.
        slots: (B, C) int64, where they were cut.
        staged: its rows.
    """

    planned: PlannedBatch
    dense: Tensor
    labels: Tensor
    weights: Tensor | None
    weight_sum: float
    slots: Tensor
    staged: StagedBatch

    @property
    def num_inputs(self) -> int:
        """Inputs of the batch, over all ranks; B of them are this one's."""
        return len(self.planned.inputs)


@dataclass(frozen=True)
class _Cut:
    """A batch, or this rank's part of it, that a host thread has prepared; staged where that may be
    done ahead.
    """

    planned: PlannedBatch
    dense: Tensor
    labels: Tensor
    weights: Tensor | None
    weight_sum: float
    slots: Tensor
    prepared: Prepared | None = None
    staged: StagedBatch | None = None


@dataclass(frozen=True)
class _Together:
    """Inputs of a kind that were cut in one go: those of `[start, stop)` since it was replaced for
    the `num_replaced`-th time.
    """

    num_replaced: int
    start: int
    stop: int
    arrays: tuple[Tensor, Tensor, Tensor]


class Loader:
    """Gives the batches of an epoch's plan one by one; call `done` with each after its step.

    Args:
        hot, cold: the training inputs.
        table: the embedding rows.
        overlap: prepare batches ahead on host threads.
        hot_rows_resident: no hot input needs a host row, so the rows of the next cold batch may be
            staged before the hot batches in between have been trained.
        window: inputs of each kind to announce ahead, where they do not fit into memory; 0: none.
        ranks: with each of which a batch is shared, and its rows are exchanged; None: no other.
    """

    def __init__(
        self,
        hot: Inputs,
        cold: Inputs,
        table: Table,
        overlap: bool,
        hot_rows_resident: bool,
        window: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.window = window
        self._inputs = {True: hot, False: cold}
        self.table, self.hot_rows_resident, self._ranks = table, hot_rows_resident, ranks
        on_cuda = ranks is not None and table.device.type == "cuda"
        self._device = torch.cuda.current_device() if on_cuda else None
        # Rows of other ranks are asked for by the main thread.
        self._worker = ThreadPoolExecutor(1, "loader") if overlap and ranks is None else None
        self._cutter = ThreadPoolExecutor(1, "cutter", self._begin_thread) if overlap else None
        self._cuts: dict[bool, deque[tuple[tuple[int, int], Future[_Cut]]]] = {}  # by key
        self._ahead: Future[_Cut] | None = None  # the next cold batch, being staged
        self._together: dict[bool, _Together] = {}
        self._last_task: Future[Any] | None = None
        self._failure: BaseException | None = None
        self._plan: EpochPlan | None = None
        self._num_staged = 0
        self._current: StagedBatch | None = None  # staged and not yet given to write_back
        self._asked: _Cut | None = None  # a cold batch whose rows other ranks are sending

    def _begin_thread(self) -> None:
        """A thread begins on device 0, where its page-locked memory would take room for nothing."""
        if self._device is not None:
            torch.cuda.set_device(self._device)

    def start(self, plan: EpochPlan) -> None:
        """Begin an epoch, or go on with one."""
        self._plan = plan
        self._ahead = self._asked = None
        self._cuts, self._together = {True: deque(), False: deque()}, {}
        # An epoch that is gone on with has inputs behind it.
        self._announced = {
            hot: (plan.num_replaced(hot), plan.num_taken(hot)) for hot in (False, True)
        }
        for hot in (False, True):
            self._cut_ahead(hot)

    def next(self) -> Batch | None:
        """The next batch, current from now on; None at the end of the epoch."""
        assert self._plan is not None
        planned = self._plan.next_batch()
        if planned is None:
            return None
        if self.window:
            self._announce(self._plan, planned.hot)
        cut = self._take(planned)
        staged = cut.staged
        if staged is None and self._needs_no_host_row(cut):
            staged = self.table.stage(cut.slots, resident=True)  # nothing to wait for
        elif staged is None:
            # Where one was staged ahead for nothing: nobody else uses that area.
            area = self._num_staged % 2
            staged = self._in_turn(lambda: self._stage(cut, area))
        device = self.table.device
        staged = self.table.enter(staged)
        if staged.host_rows is not None:
            self._current = staged
        self._cut_ahead(planned.hot)
        weights = cut.weights
        return Batch(
            planned,
            cut.dense.to(device, non_blocking=True),
            cut.labels.to(device, non_blocking=True),
            None if weights is None else weights.to(device, non_blocking=True),
            cut.weight_sum,
            cut.slots,
            staged,
        )

    def _announce(self, plan: EpochPlan, hot: bool) -> None:
        """Let the kernel read the inputs of the next window while this one is trained."""
        replaced, announced = self._announced[hot]
        if replaced != plan.num_replaced(hot):
            replaced, announced = plan.num_replaced(hot), 0
        if plan.num_taken(hot) + self.window > announced:
            self._inputs[hot].will_need(plan.coming(hot, announced, self.window))
            announced += self.window
        self._announced[hot] = (replaced, announced)

    def done(self, batch: Batch) -> None:
        """The batch's step has been given to the device: write its rows back when it is through."""
        if self._ranks is not None and not batch.planned.hot and self.hot_rows_resident:
            self._ask_ahead()
        if batch.staged.host_rows is None:
            return
        mark = self.table.lane.mark()
        if self._worker is None:
            self.table.write_back(batch.staged, mark)
        else:
            self._submit(lambda: self._write_back(batch.staged, mark))
        self._current = None

    def _ask_ahead(self) -> None:
        """Ask the other ranks for the rows of the next cold batch: no hot one changes them."""
        assert self._plan is not None
        self._asked = None
        if (planned := self._plan.peek(False)) is not None:
            cut = self._take(planned)
            self._asked = replace(cut, staged=self.table.stage(cut.slots))

    def _write_back(self, staged: StagedBatch, mark: Any) -> None:
        try:
            self.table.write_back(staged, mark)
        except BaseException as error:
            self._failure = error  # nobody waits for this task's result
            raise

    def settle(self) -> None:
        """Wait until all host rows are home; needed before anything else reads them."""
        if self._last_task is not None:
            wait([self._last_task])
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the host threads after their last tasks."""
        for thread in (self._worker, self._cutter):
            if thread is not None:
                thread.shutdown()

    def _needs_no_host_row(self, cut: _Cut) -> bool:
        all_resident = self.table.num_resident == self.table.num_rows
        return all_resident or (cut.planned.hot and self.hot_rows_resident)

    def _take(self, planned: PlannedBatch) -> _Cut:
        if self._asked is not None and not planned.hot:
            asked, self._asked = self._asked, None
            if asked.planned.key == planned.key:
                return asked
        if self._ahead is not None and not planned.hot:
            cut, self._ahead = self._ahead.result(), None
            if cut.planned.key == planned.key:
                return cut
        cuts = self._cuts[planned.hot]
        while cuts:
            key, future = cuts.popleft()
            if key == planned.key:
                return future.result()
        return self._cut(planned)

    def _cut_ahead(self, hot: bool) -> None:
        """Let the host threads prepare the next batches of a kind."""
        assert self._plan is not None
        if self._cutter is None or self._inputs[hot].device.type != "cpu":
            return
        coming = [self._plan.peek(hot, number) for number in range(NUM_AHEAD)]
        cuts = self._cuts[hot]
        if cuts and (coming[0] is None or cuts[0][0] != coming[0].key):
            cuts.clear()  # replaced
        for planned in coming[len(cuts) :]:
            if planned is not None:
                cuts.append((planned.key, self._cutter.submit(self._cut_and_prepare, planned)))
        if not cuts or hot or not self.hot_rows_resident or self._worker is None:
            return
        cut = cuts.popleft()[1]
        self._num_staged += 1
        area, before, after = self._num_staged % 2, self._current, self.table.lane.mark()

        def stage() -> _Cut:
            ready = cut.result()
            return replace(ready, staged=self._stage(ready, area, before, after))

        self._ahead = self._submit(stage)

    def _stage(
        self, cut: _Cut, area: int, before: StagedBatch | None = None, after: Any = None
    ) -> StagedBatch:
        if isinstance(self.table, ShardedTable):
            return self.table.stage(cut.slots)
        return self.table.stage(cut.slots, area, before, after, prepared=cut.prepared)

    def _cut_and_prepare(self, planned: PlannedBatch) -> _Cut:
        """In the cutter's thread alone."""
        cut = self._cut(planned)
        if isinstance(self.table, ShardedTable) or self._needs_no_host_row(cut):
            return cut
        return replace(cut, prepared=self.table.prepare(cut.slots))

    def _cut(self, planned: PlannedBatch) -> _Cut:
        inputs, number = self._inputs[planned.hot], len(planned.inputs)
        mine = slice(number) if self._ranks is None else self._ranks.part(number)
        if inputs.device.type == "cpu" or self._ranks is not None:
            dense, slots, labels = inputs.batch(planned.inputs[mine])
        else:
            dense, slots, labels = self._cut_together(planned)
        # Of host memory, wherever the inputs are: their sum is asked for without waiting.
        found = planned.weights
        if (own := inputs.weights_of(planned.inputs)) is not None:
            found = own if found is None else own * found
        weight_sum = float(number) if found is None else float(found.sum())
        weights = None if found is None else torch.from_numpy(found[mine])
        if self.table.device.type == "cuda":
            # Page-locked, so that their copies need not wait for the device.
            weights = None if weights is None else weights.pin_memory()
            if dense.device.type == "cpu":
                dense, labels = dense.pin_memory(), labels.pin_memory()
        return _Cut(planned, dense, labels, weights, weight_sum, slots)

    def _cut_together(self, planned: PlannedBatch) -> tuple[Tensor, ...]:
        assert self._plan is not None
        num_replaced, start = planned.key
        stop, found = start + len(planned.inputs), self._together.get(planned.hot)
        if found is None or found.num_replaced != num_replaced or stop > found.stop:
            count = num_cut_together(self._plan.batch_size)
            coming = self._plan.coming(planned.hot, start, count)
            arrays = self._inputs[planned.hot].batch(coming)
            found = _Together(num_replaced, start, start + len(coming), arrays)
            self._together[planned.hot] = found
        part = slice(start - found.start, stop - found.start)
        return tuple(array[part] for array in found.arrays)

    def _in_turn(self, task: Callable[[], T]) -> T:
        """Run a task behind all staging and writing back that was asked for before."""
        return task() if self._worker is None else self._submit(task).result()

    def _submit(self, task: Callable[[], T]) -> Future[T]:
        assert self._worker is not None
        if self._failure is not None:
            raise self._failure
        self._last_task = future = self._worker.submit(task)
        return future
