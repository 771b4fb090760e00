"""One table for all embedding rows: every row has one home, every batch one path.

Rows are numbered by *slot*, most popular first. Slots `[0, num_resident)` live on the device, the
rest in host memory. The device array is followed by staging areas: the host rows that a batch needs
(each once) are copied into one of them before the step and copied back after it. Lookup and update
then work on one contiguous array with one index tensor, whatever the batch. No row ever has two
homes, so there is nothing to synchronise between phases, and on the CPU training gives the same
weights bit for bit for any `num_resident`.

Two areas serve training in turn, so that a host thread can stage a batch while the one before it is
still being trained. A row that both need reaches the second area from the first one, on the device,
after the first batch's update (`enter`); what the host thread gathered for it is overwritten. So
stage(k + 1) may run before write_back(k), but never before write_back(k - 1). A third area serves
evaluation, which may come between the two.

Where an element of an input may be absent (slot -1), the device array ends in one more row, the
*null row* of zeros: outside all budgets, looked up for it, and never changed, as its gradient is
exactly 0 (`slipstream.model.features.Pooling`).

Memory, for B inputs a training batch and E an evaluation batch of C columns, at most:
device: (num_resident + 2 B C + E C) * (bytes_per_row + 4), the 4 to find distinct ones; host:
the other rows, 16 bytes each to find distinct ones, and with CUDA page-locked memory for 3 B C +
E C rows. The rows themselves stay pageable: the CPU gathers them, so page-locking would copy the
table for nothing. (B = 2048, E = 16384, C = 26, dim = 16, row-wise Adagrad: 38 MB of areas.)

Shapes: B inputs, C id columns (one row each), dim values a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.training.rows import check_optimizer, distinct, step_rows, sum_by_row

EVALUATION = 2  # the area of batches that are only read; 0 and 1 are for training


class CopyLane:
    """Copies beside the device's main stream. On a CPU there is one order, and nothing to wait for.

    A *mark* is a point in the work given to the device; `None` on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        # PyTorch gives streams out again after 32 of a priority. Those that graphs are captured on
        # have none, so this one never gets its copies into a graph.
        is_cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if is_cuda else None

    def mark(self) -> Any:
        """The end of the work given so far to the calling thread's current stream."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    @contextmanager
    def copies(self, after: Any) -> Iterator[None]:
        """Queue the body's copies on the lane, behind the mark `after`."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def hold(self, mark: Any) -> None:
        """Let the main stream wait for `mark`; the calling thread goes on."""
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)


@dataclass(frozen=True)
class Loan:
    """Rows that a batch has from other ranks, see `slipstream.training.sharded`.

    Attributes:
        asked: (n,) places of the rows that this rank lends, those of rank 0's part first.
        lent, borrowed: how many go to, and come from, each rank.
        numbers: (sum(borrowed),) of the borrowed rows, in the order in which they lie.
    """

    asked: Tensor
    lent: list[int]
    borrowed: list[int]
    numbers: Tensor


@dataclass(frozen=True)
class Prepared:
    """What staging a batch needs to know of its slots, and not of any weights.

    Attributes:
        index: (B, C) int64, its slots, to be changed; page-locked for CUDA.
        on_host: (n,) places in `index` of the elements that need a host row.
        host_rows: (U,) distinct ones: slots minus num_resident.
        numbers: (n,) which of these each needs.
    """

    index: Tensor
    on_host: np.ndarray
    host_rows: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class StagedBatch:
    """A batch's places in the device array, and which host rows lie in a staging area.

    Attributes:
        index: (B, C) int64.
        area: where its host rows lie.
        host_rows: (U,) distinct slots minus num_resident, on the host; None: no host row.
        shared: two (S,) arrays: places in the device array of rows of the batch before, and of the
            same rows in this batch; None where no row is shared.
        arrived: mark behind which the rows are in the area.
        loan: the rows are of other ranks; None: of this process.
    """

    index: Tensor
    area: int = 0
    host_rows: np.ndarray | None = None
    shared: tuple[Tensor, Tensor] | None = None
    arrived: Any = None
    loan: Loan | None = None


class EmbeddingTable:
    """All embedding rows, split by slot between the device and the host (module docstring).

    Args:
        weight: (num_rows, dim) float32 on the host, in slot order; with `null_row` a row of zeros
            follows. Used in place where possible.
        num_resident: rows kept on the device, from 0 to num_rows.
        max_batch_rows: the most rows a training batch looks up, B * C; bounds a staging area.
        device: where lookups and updates run.
        optimizer: `sgd` or `rwsadagrad` (one sum per row of the mean squared gradient).
        max_evaluation_rows: the most rows an evaluation batch looks up; 0: as in training.
        sums: (num_rows,) float32, Adagrad's sums to start from, as long as `weight`; None: zeros.
        null_row: elements may be absent.
    """

    def __init__(
        self,
        weight: Tensor,
        num_resident: int,
        max_batch_rows: int,
        device: torch.device,
        optimizer: str = "sgd",
        max_evaluation_rows: int = 0,
        sums: Tensor | None = None,
        null_row: bool = False,
    ) -> None:
        num_rows, dim = len(weight) - null_row, weight.shape[1]
        if not 0 <= num_resident <= num_rows:
            raise ValueError(f"got {num_resident} resident rows; expected 0 to {num_rows}")
        check_optimizer(optimizer)
        self.num_rows, self.dim, self.num_resident = num_rows, dim, num_resident
        self.device, self.lane = device, CopyLane(device)
        self.optimizer = optimizer
        num_host = num_rows - num_resident
        self._area_rows = [
            min(rows, num_host)
            for rows in (max_batch_rows, max_batch_rows, max_evaluation_rows or max_batch_rows)
        ]
        self._area_start = [num_resident + sum(self._area_rows[:area]) for area in range(3)]
        # Where a host row lies in each area. Checked before use, so never cleared.
        self._place = [np.zeros(num_host, np.int32) for _ in range(3)]
        self._prepared_place = np.zeros(num_host, np.int32)  # of `prepare`, as it is another thread
        # Arrays that move together: weights, and the optimizer's sums where it has any.
        whole = [weight]
        if optimizer == "rwsadagrad":
            whole.append(torch.zeros(len(weight)) if sums is None else sums)
        self._device_arrays = [self._device_part(array, null_row) for array in whole]
        # To add up the gradients of equal rows.
        num_places = len(self._device_arrays[0])
        self._row_place: np.ndarray | Tensor | None = None
        if device.type == "cpu":
            self._row_place = np.zeros(num_places, np.int32)
        elif not torch.are_deterministic_algorithms_enabled():
            self._row_place = torch.zeros(num_places, dtype=torch.int32, device=device)
        self._null_place = len(self._device_arrays[0]) - 1 if null_row else None
        # Of an array that lives on another device nothing is kept here: a view would keep it all.
        self._host_arrays = [
            array[num_resident:num_rows] if num_host else array.new_empty((0, *array.shape[1:]))
            for array in whole
        ]
        self._arrived: list[Any] = [None] * 3
        # Page-locked, so that copies need not wait: one for each training area and evaluation,
        # and one for the way home. A CPU needs none.
        self._bounce: list[list[Tensor]] = []
        if device.type != "cpu":
            self._bounce = [
                [
                    torch.empty(rows, *array.shape[1:], pin_memory=device.type == "cuda")
                    for rows in (*self._area_rows, self._area_rows[0])
                ]
                for array in whole
            ]

    def _device_part(self, array: Tensor, null_row: bool) -> Tensor:
        if self.num_resident == self.num_rows and array.device == self.device:
            return array
        num_places = self.num_resident + sum(self._area_rows)
        part = torch.empty(num_places + null_row, *array.shape[1:], device=self.device)
        part[: self.num_resident].copy_(array[: self.num_resident])
        part[num_places:] = 0
        return part

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held: resident rows, optimizer sums and staging areas."""
        return sum(array.nbytes for array in self._device_arrays)

    def prepare(self, slots: Tensor) -> Prepared | None:
        """The part of `stage` that reads no weights, for one thread beside it; None: no host row.

        Takes what `stage` takes, and should be given to it.
        """
        return self._prepare(slots, self._prepared_place)

    def _prepare(self, slots: Tensor, place: np.ndarray) -> Prepared | None:
        # Of the slots as they are: the null row's place is also some host row's slot.
        flat = slots.numpy().reshape(-1)
        on_host = np.flatnonzero(flat >= self.num_resident)
        if not len(on_host):
            return None
        host_rows, numbers = distinct(flat.take(on_host) - self.num_resident, place)
        index = torch.empty_like(slots, pin_memory=self.device.type == "cuda")
        np.copyto(index.numpy(), self._with_null(slots).numpy())
        return Prepared(index, on_host, host_rows, numbers)

    def stage(
        self,
        slots: Tensor,
        area: int = 0,
        before: StagedBatch | None = None,
        after: Any = None,
        resident: bool = False,
        prepared: Prepared | None = None,
    ) -> StagedBatch:
        """Bring a batch's host rows into a staging area; a host thread may do so ahead of `enter`.

        Takes slots (B, C) int64 on the host; on a device only those of resident rows. `before` is
        the batch before it, where that one has not been written back yet. The area is written
        behind the mark `after`. A batch without host rows, which `resident` says of one, touches no
        host memory. Raises `ValueError` when the batch needs more distinct host rows than the area
        holds.
        """
        if slots.device.type != "cpu":
            return StagedBatch(self._with_null(slots))
        place = self._place[area]
        if prepared is not None:
            place[prepared.host_rows] = np.arange(len(prepared.host_rows), dtype=np.int32)
        elif not resident and self.num_resident < self.num_rows:
            prepared = self._prepare(slots, place)
        if prepared is None:
            return StagedBatch(self._locked(self._with_null(slots)))
        index, host_rows = prepared.index, prepared.host_rows
        if len(host_rows) > self._area_rows[area]:
            raise ValueError(
                f"a batch needs {len(host_rows)} host rows; the staging area holds "
                f"{self._area_rows[area]}"
            )
        index.numpy().reshape(-1)[prepared.on_host] = prepared.numbers + self._area_start[area]
        shared = self._shared(before, host_rows, area)
        selected = torch.from_numpy(host_rows)
        if self._arrived[area] is not None:
            self._arrived[area].synchronize()  # its page-locked memory is about to be overwritten
        with self.lane.copies(after):
            for number, on_device in enumerate(self._device_arrays):
                home, staging = self._host_arrays[number], self._staged(on_device, area, host_rows)
                if self._bounce:
                    bounce = self._bounce[number][area][: len(host_rows)]
                    torch.index_select(home, 0, selected, out=bounce)
                    staging.copy_(bounce, non_blocking=True)
                else:
                    torch.index_select(home, 0, selected, out=staging)
            self._arrived[area] = arrived = self.lane.mark()
        return StagedBatch(index, area, host_rows, shared, arrived)

    def _with_null(self, slots: Tensor) -> Tensor:
        """The null row's place for absent elements."""
        if self._null_place is None:
            return slots
        if slots.device.type != "cpu":
            return slots.where(slots >= 0, self._null_place)
        # numpy: a thread beside the training loop must not start a pool of its own.
        places = slots.numpy()
        return torch.from_numpy(np.where(places >= 0, places, self._null_place))

    def _locked(self, values: Tensor) -> Tensor:
        """Page-locked for CUDA: copies of 64 kB and more from other memory wait for the device."""
        return values.pin_memory() if self.device.type == "cuda" else values

    def _staged(self, on_device: Tensor, area: int, host_rows: np.ndarray) -> Tensor:
        start = self._area_start[area]
        return on_device[start : start + len(host_rows)]

    def _shared(
        self, before: StagedBatch | None, host_rows: np.ndarray, area: int
    ) -> tuple[Tensor, Tensor] | None:
        if before is None or before.host_rows is None:
            return None
        old = self._place[before.area][host_rows]
        known = np.flatnonzero(old < len(before.host_rows))
        known = known[before.host_rows[old[known]] == host_rows[known]]
        if not len(known):
            return None
        source = old[known].astype(np.int64) + self._area_start[before.area]
        target = known + self._area_start[area]
        return self._locked(torch.from_numpy(source)), self._locked(torch.from_numpy(target))

    def enter(self, staged: StagedBatch) -> StagedBatch:
        """Make a staged batch the current one: its index on the device, its rows up to date."""
        self.lane.hold(staged.arrived)
        if staged.shared is not None:
            source, target = (place.to(self.device, non_blocking=True) for place in staged.shared)
            for on_device in self._device_arrays:
                on_device.index_copy_(0, target, on_device.index_select(0, source))
        if staged.index.device == self.device:
            return staged
        return replace(staged, index=staged.index.to(self.device, non_blocking=True))

    def write_back(self, staged: StagedBatch, after: Any = None) -> None:
        """Copy a trained batch's staged rows home, once the device is past the mark `after`.

        Evaluation, which only reads, does not.
        """
        if staged.host_rows is None:
            return
        rows = torch.from_numpy(staged.host_rows)
        area = (staged.area, staged.host_rows)
        found = [self._staged(array, *area) for array in self._device_arrays]
        if self._bounce:
            twins = [bounce[-1][: len(rows)] for bounce in self._bounce]
            with self.lane.copies(after):
                for twin, staging in zip(twins, found, strict=True):
                    twin.copy_(staging, non_blocking=True)
                arrived = self.lane.mark()
            if arrived is not None:
                arrived.synchronize()
            found = twins
        for home, values in zip(self._host_arrays, found, strict=True):
            home.index_copy_(0, rows, values)

    def lookup(self, staged: StagedBatch) -> Tensor:
        """The batch's rows (B, C, dim), outside autograd: their gradient goes to `update`."""
        index = staged.index
        return (
            self._device_arrays[0].index_select(0, index.reshape(-1)).view(*index.shape, self.dim)
        )

    def present(self, staged: StagedBatch) -> Tensor | None:
        """Which of the batch's elements are present (B, C) bool; None: all are."""
        return None if self._null_place is None else staged.index != self._null_place

    @torch.no_grad()
    def update(self, staged: StagedBatch, gradient: Tensor, learning_rate: float | Tensor) -> None:
        """Step the batch's rows; a row looked up several times takes one, by its gradients' sum.

        Of many small steps those below half a unit in a weight's last place would be lost. Adding
        up takes SGD 0 to 4 % of a step of Kaggle's model on a CPU, up to 8 % of a small one's.

        `gradient` is (B, C, dim) and may be overwritten; the formulas: `step_rows`.
        """
        index, gradient = sum_by_row(
            staged.index.reshape(-1), gradient.view(-1, self.dim), self._row_place
        )
        sums = self._device_arrays[1] if len(self._device_arrays) > 1 else None
        arrays = (self._device_arrays[0], sums)
        step_rows(self.optimizer, *arrays, index, gradient, learning_rate)

    def row_sums(self, staged: StagedBatch) -> Tensor | None:
        """A copy of what `set_row_sums` takes, of the batch's rows (B * C,); None: none is kept."""
        if len(self._device_arrays) == 1:
            return None
        return self._device_arrays[1].index_select(0, staged.index.reshape(-1))

    def set_row_sums(self, staged: StagedBatch, sums: Tensor | None) -> None:
        """Put back what `row_sums` took."""
        if sums is not None:
            self._device_arrays[1].index_copy_(0, staged.index.reshape(-1), sums)

    def leading_rows(self, num_rows: int) -> Tensor:
        """A copy of the weights of slots [0, num_rows), on the device."""
        resident = min(num_rows, self.num_resident)
        rows = torch.empty(num_rows, self.dim, device=self.device)
        rows[:resident].copy_(self._device_arrays[0][:resident])
        rows[resident:].copy_(self._host_arrays[0][: num_rows - resident])
        return rows

    def read(self, slots: np.ndarray | slice) -> dict[str, Tensor]:
        """Copies on the host of n slots' rows: `rows` (n, dim), and `row_sums` (n,) where kept.

        Host rows must have been written back.
        """
        if isinstance(slots, slice):
            slots = np.arange(*slots.indices(self.num_rows))
        numbers = torch.from_numpy(slots.astype(np.int64))
        resident = numbers < self.num_resident
        found = {}
        for name, on_device, host in zip(
            ("rows", "row_sums"), self._device_arrays, self._host_arrays, strict=False
        ):
            values = torch.empty(len(numbers), *host.shape[1:])
            chosen = numbers[resident].to(self.device)
            values[resident] = on_device.index_select(0, chosen).cpu()
            values[~resident] = host.index_select(0, numbers[~resident] - self.num_resident)
            found[name] = values
        return found

    def write(self, slots: np.ndarray, rows: Tensor) -> None:
        """Set n slots' weights to `rows` (n, dim), on the host; the opposite of `read`."""
        numbers = torch.from_numpy(slots.astype(np.int64))
        resident = numbers < self.num_resident
        chosen = numbers[resident].to(self.device)
        self._device_arrays[0].index_copy_(0, chosen, rows[resident].to(self.device))
        self._host_arrays[0].index_copy_(0, numbers[~resident] - self.num_resident, rows[~resident])
