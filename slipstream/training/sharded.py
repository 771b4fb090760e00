"""The table of a run of several ranks: hot rows copied to each, the others dealt out.

    slots [0, num_resident)   a copy on every rank's device; *owner* slot % W
    the others                in the host memory of their owner alone, (slot - num_resident) % W

**Hot rows.** Each rank adds its gradients up by row and sends them to the rows' owners. An owner
adds them up in the order of the ranks, steps once, with the optimizer's sums that it alone has, and
all take over its *new rows*. So the copies are equal by construction, also on CUDA, whose atomic
additions would let copies that step by themselves drift apart. Where a rank's part touches nearly
all hot rows, the gradients of all travel, without slots: the same sums in the same order, so the
same bits.

**Other rows.** A batch that needs some asks their owners, gets them into the staging area behind
the copies (lookup and backward are those of `slipstream.training.embedding`), and gives the
gradients, added up by row, back. An owner steps as above. What it hands out is up to date, for
batches come one after the other, everywhere in the same order.

Bytes that a rank receives in a step, of W, for u distinct hot and c distinct other rows of its part
of the batch, U hot ones of the whole one, values of s bytes and f = (W - 1) / W: u f s (dim + 1) +
U f s (dim + 1) and c f (8 + 2 s dim).

Memory of a rank: its copies twice over on a CPU (as they are read, and in place), 1/W of the other
rows, 4 bytes each to find distinct ones, and the staging areas for its part of a batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.ranks import Ranks
from slipstream.training.agreement import INTEGERS, Pairs, check_step, packed, unpacked
from slipstream.training.embedding import EVALUATION, CopyLane, Loan, StagedBatch
from slipstream.training.rows import Shard, check_optimizer, step_rows, sum_by_row

COLD, HOT = "cold_rows", "hot_rows"  # kinds of exchange


class ShardedTable:
    """All embedding rows of the ranks, as `EmbeddingTable` has them for one process.

    Where a method exchanges rows (`stage` of a batch that may need others' rows, `update`,
    `leading_rows` beyond the copies), every rank must call it. `read` and `write` are rank 0's.

    Args:
        weight: (shard.num_kept, dim) on the host; with `null_row` a row of zeros follows.
        shard: which rows those are.
        ranks: to exchange rows with.
        max_batch_rows: the most rows that this rank's part of a training batch looks up.
        device, optimizer: see `EmbeddingTable`.
        max_evaluation_rows: as `max_batch_rows`, of an evaluation batch.
        sums: (shard.num_kept,) Adagrad's to start from; None: zeros.
        null_row: elements may be absent.
    """

    def __init__(
        self,
        weight: Tensor,
        shard: Shard,
        ranks: Ranks,
        max_batch_rows: int,
        device: torch.device,
        optimizer: str,
        max_evaluation_rows: int,
        sums: Tensor | None = None,
        null_row: bool = False,
    ) -> None:
        self.num_rows, self.num_resident = shard.num_rows, shard.num_resident
        self.dim = weight.shape[1]
        check_optimizer(optimizer)
        self.device, self.optimizer, self.lane = device, optimizer, CopyLane(device)
        self._shard, self._ranks = shard, ranks
        resident, own = slice(0, shard.num_resident), slice(shard.num_resident, shard.num_kept)
        num_others = self.num_rows - self.num_resident
        self._area_rows = [min(n, num_others) for n in (max_batch_rows, max_evaluation_rows)]
        self._area_start = [self.num_resident, self.num_resident + self._area_rows[0]]
        num_places = self.num_resident + sum(self._area_rows) + null_row
        self._null_place = num_places - 1 if null_row else None
        self._weight = weight
        if num_others or device != weight.device:
            self._weight = weight.new_zeros((num_places, self.dim), device=device)
            self._weight[: self.num_resident].copy_(weight[resident])
        self._home = weight[own]
        self._sums = self._home_sums = None
        if optimizer == "rwsadagrad":
            given = weight.new_zeros(shard.num_kept) if sums is None else sums
            self._sums = given[resident].to(device, copy=True)  # those it owns are kept up
            self._home_sums = given[own]
        on_cpu = device.type == "cpu"
        self._row_place = np.zeros(len(self._weight), np.int32) if on_cpu else None
        self._home_place = np.zeros(len(self._home), np.int32)
        ranks.handlers |= {"read rows": self._answer_read, "write rows": self._answer_write}
        # Of all gradients sent to, and received from, each rank: they must be the same.
        self._sent_sums = torch.zeros(ranks.size, dtype=torch.int64, device=device)
        self._received_sums = self._sent_sums.clone()
        self.audits = False  # whether steps are done again by every rank, and compared

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held: copies, optimizer sums and staging areas."""
        arrays = [self._weight] if self._sums is None else [self._weight, self._sums]
        return sum(array.nbytes for array in arrays)

    @property
    def copies(self) -> Tensor:
        """Weights of the hot rows, (num_resident, dim): the same on every rank."""
        return self._weight[: self.num_resident]

    def messages(self) -> tuple[Tensor, Tensor]:
        """Of all gradients that were sent to each rank, and received from it: (W,) int64."""
        return self._sent_sums, self._received_sums

    def stage(
        self,
        slots: Tensor,
        area: int = 0,
        before: StagedBatch | None = None,
        after: Any = None,
        resident: bool = False,
    ) -> StagedBatch:
        """Ask for the rows of this rank's part (B, C), which `enter` puts into a staging area.

        No rank may step them meanwhile. `resident`: no rank's part needs any, which is not asked
        about then.
        """
        raw = slots
        if self._null_place is not None:
            slots = slots.where(slots >= 0, self._null_place)
        if resident or self.num_resident == self.num_rows or slots.device.type != "cpu":
            return StagedBatch(slots)
        start = self._area_start[area == EVALUATION]
        places = raw.numpy()
        is_other = places >= self.num_resident
        behind = places[is_other].astype(np.int64) - self.num_resident
        size, most = self._ranks.size, -(-(self.num_rows - self.num_resident) // self._ranks.size)
        # By owner, and each row once.
        keys, place = np.unique(behind % size * most + behind // size, return_inverse=True)
        counts = torch.from_numpy(np.bincount(keys // most, minlength=size))
        wanted = self._ranks.gather(counts)  # (who, of whom)
        index = slots.numpy().copy()
        index[is_other] = place.reshape(-1) + start
        staged = StagedBatch(torch.from_numpy(index))
        if not bool(wanted.any()):
            return staged
        lent, borrowed = wanted[:, self._ranks.rank].tolist(), counts.tolist()
        asked = self._ranks.exchange(torch.from_numpy(keys % most), borrowed, lent, COLD)
        rows = self._home.index_select(0, asked).to(self.device)
        wait = self._ranks.start_exchange(rows, lent, borrowed, COLD)

        def arrive() -> None:
            found = wait()
            self._weight[start : start + len(found)] = found

        numbers = torch.from_numpy(keys % most * size + keys // most)
        return replace(staged, loan=Loan(asked, lent, borrowed, numbers), arrived=arrive)

    def enter(self, staged: StagedBatch) -> StagedBatch:
        """Make a staged batch the current one: its index on the device, its rows there."""
        if staged.arrived is not None:
            staged.arrived()
        if staged.index.device == self.device:
            return staged
        return replace(staged, index=staged.index.to(self.device, non_blocking=True))

    def write_back(self, staged: StagedBatch, after: Any = None) -> None:
        """Nothing: gradients were given back in `update`."""

    def lookup(self, staged: StagedBatch) -> Tensor:
        """The batch's rows (B, C, dim), outside autograd: their gradient goes to `update`."""
        index = staged.index
        return self._weight.index_select(0, index.reshape(-1)).view(*index.shape, self.dim)

    def present(self, staged: StagedBatch) -> Tensor | None:
        """Which of the batch's elements are present (B, C) bool; None: all are."""
        return None if self._null_place is None else staged.index != self._null_place

    @torch.no_grad()
    def update(self, staged: StagedBatch, gradient: Tensor, learning_rate: float | Tensor) -> None:
        """Step the rows of all ranks' parts, each once, by the sum of its gradients.

        `gradient` is (B, C, dim) of this rank's part.
        """
        index, gradient = self._sum_by_row(staged.index.reshape(-1), gradient.view(-1, self.dim))
        is_hot = index < self.num_resident
        self._update_hot(index[is_hot], gradient[is_hot], learning_rate)
        if staged.loan is not None:
            self._give_back(staged.loan, index, gradient, learning_rate)

    def _sum_by_row(self, index: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if self._row_place is not None:
            return sum_by_row(index, gradient, self._row_place)
        rows, numbers = torch.unique(index, return_inverse=True)
        sums = gradient.new_zeros((len(rows), self.dim))
        return rows, sums.index_add_(0, numbers, gradient)

    def _update_hot(self, slots: Tensor, gradient: Tensor, learning_rate: float | Tensor) -> None:
        ranks, rank = self._ranks, self._ranks.rank
        owner = slots % ranks.size
        counts = ranks.gather(torch.bincount(owner, minlength=ranks.size).cpu())  # (from, to)
        if not bool(counts.any()):
            return
        # Of as many rows the slots alone are more than the zeros of the others.
        if int(counts.sum(1).max()) * (self.dim + 1) > self.num_resident * self.dim:
            self._update_all_hot(slots, gradient, learning_rate)
            return
        order = torch.argsort(owner, stable=True)
        given = packed(slots[order], gradient.index_select(0, order))
        taken = self._send(given, counts[rank].tolist(), counts[:, rank].tolist(), HOT)
        own, sums = self._sum_by_row(*unpacked(taken))
        self._step_hot(own, sums, learning_rate, (slots, gradient))
        parts = ranks.gather_rows(packed(own, self._weight.index_select(0, own)), HOT)
        for other, part in enumerate(parts):
            if other != rank:
                self._weight.index_copy_(0, *unpacked(part))

    def _update_all_hot(self, slots: Tensor, gradient: Tensor, rate: float | Tensor) -> None:
        """As `_update_hot`, with the gradients of all hot rows, most of them 0, by owner."""
        ranks, size = self._ranks, self._ranks.size
        most = -(-self.num_resident // size)
        whole = gradient.new_zeros((most * size, self.dim)).index_copy_(0, slots, gradient)
        by_owner = whole.view(most, size, self.dim).transpose(0, 1).reshape(-1, self.dim)
        taken = self._send(by_owner, [most] * size, [most] * size, HOT)
        sums, *others = taken.view(size, most, self.dim).unbind(0)
        for other in others:
            sums += other
        own = torch.arange(ranks.rank, self.num_resident, size, device=self.device)
        self._step_hot(own, sums[: len(own)], rate, (slots, gradient))
        rows = gradient.new_zeros((most, self.dim))
        rows[: len(own)] = self._weight.index_select(0, own)
        found = ranks.gather(rows, HOT).transpose(0, 1).reshape(-1, self.dim)
        self._weight[: self.num_resident] = found[: self.num_resident]

    def _give_back(
        self, loan: Loan, index: Tensor, gradient: Tensor, learning_rate: float | Tensor
    ) -> None:
        """Send the gradients of borrowed rows to their owners, which step them."""
        place, number = index - self._area_start[0], sum(loan.borrowed)
        is_borrowed = (place >= 0) & (place < number)
        given = gradient.new_zeros((number, self.dim))
        given.index_copy_(0, place[is_borrowed], gradient[is_borrowed])
        taken = self._send(given, loan.borrowed, loan.lent, COLD).cpu()
        own, sums = sum_by_row(loan.asked, taken, self._home_place)
        arrays, numbers = (self._home, self._home_sums), own * self._ranks.size + self._ranks.rank
        self._step(arrays, own, sums, float(learning_rate), (loan.numbers, given), numbers)

    def _step_hot(self, own: Tensor, sums: Tensor, rate: float | Tensor, given: Pairs) -> None:
        self._step((self._weight, self._sums), own, sums, rate, given, own)

    def _step(
        self,
        arrays: tuple[Tensor, Tensor | None],
        own: Tensor,
        sums: Tensor,
        rate: float | Tensor,
        given: Pairs,
        numbers: Tensor,
    ) -> None:
        """Step `own` rows of `arrays`, which all ranks know by `numbers`.

        `given`: numbers and gradients that this rank had for any rows of the kind.
        """
        if not self.audits:
            step_rows(self.optimizer, *arrays, own, sums, rate)
            return
        before = [array.index_select(0, own) for array in arrays if array is not None]
        step_rows(self.optimizer, *arrays, own, sums, rate)
        after = arrays[0].index_select(0, own)
        check_step(self._ranks, self.optimizer, given, numbers, before, after, rate)

    def _send(self, values: Tensor, sent: list[int], received: list[int], kind: str) -> Tensor:
        """Exchange gradients, and add up what was sent and received."""
        self._sent_sums += _sums_of(values, sent)
        found = self._ranks.exchange(values, sent, received, kind)
        self._received_sums += _sums_of(found, received)
        return found

    def leading_rows(self, num_rows: int) -> Tensor:
        """A copy of the weights of slots [0, num_rows), on the device."""
        if num_rows <= self.num_resident:
            return self._weight[:num_rows].clone()
        rows = self._own_values(np.arange(num_rows))[0]
        self._ranks.start_sum(rows, COLD)()
        return rows.view(self._weight.dtype).to(self.device)

    def read(self, slots: np.ndarray | slice) -> dict[str, Tensor]:
        """Copies on the host of n slots' rows: `rows` (n, dim), and `row_sums` (n,) where kept.

        From within `Ranks.led`.
        """
        if isinstance(slots, slice):
            slots = np.arange(*slots.indices(self.num_rows))
        found: dict[str, Tensor] = self._ranks.ask("read rows", {"slots": slots})
        return found

    def _answer_read(self, slots: np.ndarray) -> dict[str, Tensor]:
        found = {}
        for name, values in zip(("rows", "row_sums"), self._own_values(slots), strict=False):
            self._ranks.add_up_integers(values, "checkpoint")
            found[name] = values.view(self._weight.dtype)
        return found

    def _own_values(self, slots: np.ndarray) -> list[Tensor]:
        """Weights (n, dim), and sums (n,) where kept, of the rows that this rank owns, and zeros;
        as integers, which are added up to the same bits.
        """
        places = self._shard.places(slots)
        is_hot = slots < self.num_resident
        is_own = np.where(is_hot, slots % self._ranks.size == self._ranks.rank, places >= 0)
        found = []
        for copies, home in ((self._weight, self._home), (self._sums, self._home_sums)):
            if copies is None or home is None:
                continue
            values = home.new_zeros((len(slots), *home.shape[1:]))
            hot, other = (torch.from_numpy(np.flatnonzero(is_own & on)) for on in (is_hot, ~is_hot))
            places_of = torch.from_numpy(places)
            values[hot] = copies.index_select(0, places_of[hot].to(self.device)).cpu()
            values[other] = home.index_select(0, places_of[other] - self.num_resident)
            found.append(values.view(INTEGERS[values.dtype]))
        return found

    def write(self, slots: np.ndarray, rows: Tensor) -> None:
        """Set n slots' weights to `rows` (n, dim), on the host, from within `Ranks.led`."""
        self._ranks.ask("write rows", {"slots": slots, "rows": rows.numpy()})

    def _answer_write(self, slots: np.ndarray, rows: np.ndarray) -> None:
        places, values = self._shard.places(slots), torch.from_numpy(rows)
        hot = torch.from_numpy(np.flatnonzero(slots < self.num_resident))
        other = torch.from_numpy(np.flatnonzero(places >= self.num_resident))
        places_of = torch.from_numpy(places)
        self._weight.index_copy_(0, places_of[hot].to(self.device), values[hot].to(self.device))
        self._home.index_copy_(0, places_of[other] - self.num_resident, values[other])


def _sums_of(values: Tensor, counts: list[int]) -> Tensor:
    """Of each rank's part of `values`, all bits, as integers, added up: (W,) int64."""
    parts = values.view(INTEGERS[values.dtype]).split(counts)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts])
