"""One table for all embedding rows: every row has one home, every batch one path.

Rows are numbered by *slot*, most popular first. Slots `[0, num_resident)` live on the device, the
rest in host memory. The device array is followed by a staging area: the host rows that a batch
needs (each once) are copied into it before the step and copied back after it. Lookup and update
then work on one contiguous array with one index tensor, whatever the batch. No row ever has two
homes, so there is nothing to synchronise between phases, and on the CPU training gives the same
weights bit for bit for any `num_resident`.

Price: a batch of B inputs with F features stages at most B * F rows, so the staging area takes
B * F * dim * 4 bytes on the device (27 MB for B = 16384, F = 26, dim = 16).

Shapes: B inputs, F sparse features (one row each), dim values a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ADAGRAD_EPS = 1e-10
OPTIMIZERS = ("sgd", "rwsadagrad")


def bytes_per_row(dim: int, optimizer: str) -> int:
    """Memory of one row in bytes: fp32 weights, and one fp32 sum for row-wise Adagrad."""
    return 4 * dim + (4 if optimizer == "rwsadagrad" else 0)


def initial_rows(table_sizes: list[int], dim: int, slot_of_row: Tensor | None, seed: int) -> Tensor:
    """Initial weights (num_rows, dim), in slot order: U(-sqrt(1/n), sqrt(1/n)) for a table of n
    rows.

    Values are drawn table by table in id order, so a row starts the same whatever its slot.
    `slot_of_row` (num_rows,) maps table offset + id to slot; None numbers slots by table, then id.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(sum(table_sizes), dim)
    start = 0
    for size in table_sizes:
        bound = size**-0.5
        if slot_of_row is None:
            weight[start : start + size].uniform_(-bound, bound, generator=generator)
        else:
            rows = torch.empty(size, dim).uniform_(-bound, bound, generator=generator)
            weight[slot_of_row[start : start + size].long()] = rows
        start += size
    return weight


@dataclass(frozen=True)
class StagedBatch:
    """A batch's places in the device array, and which host rows lie in the staging area."""

    index: Tensor  # (B, F) int64 on the device
    host_rows: (
        Tensor | None
    )  # (U,) int64 on the host: distinct slots minus num_resident; None: none


class EmbeddingTable:
    """All embedding rows, split by slot between the device and the host (module docstring).

    Args:
        weight: (num_rows, dim) float32 on the host, in slot order. Used in place where possible.
        num_resident: rows kept on the device, from 0 to num_rows.
        max_batch_rows: the most rows a batch looks up, B * F; bounds the staging area.
        device: where lookups and updates run.
        optimizer: `sgd` or `rwsadagrad` (one sum per row of the mean squared gradient).
    """

    def __init__(
        self,
        weight: Tensor,
        num_resident: int,
        max_batch_rows: int,
        device: torch.device,
        optimizer: str = "sgd",
    ) -> None:
        num_rows, dim = weight.shape
        if not 0 <= num_resident <= num_rows:
            raise ValueError(f"got {num_resident} resident rows; expected 0 to {num_rows}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"got optimizer {optimizer!r}; expected one of {OPTIMIZERS}")
        self.num_rows, self.dim, self.num_resident = num_rows, dim, num_resident
        self.device = device
        self.staging_rows = min(max_batch_rows, num_rows - num_resident)
        # Arrays that move together: weights, and the optimizer's sums where it has any.
        whole = [weight]
        if optimizer == "rwsadagrad":
            whole.append(torch.zeros(num_rows))
        self._device_arrays = [self._device_part(array) for array in whole]
        # Pageable: a batch's rows pass through a temporary anyway, and pinning would copy the
        # table.
        self._host_arrays = [array[num_resident:] for array in whole]

    def _device_part(self, array: Tensor) -> Tensor:
        if self.num_resident == self.num_rows and array.device == self.device:
            return array
        part = torch.empty(
            self.num_resident + self.staging_rows, *array.shape[1:], device=self.device
        )
        part[: self.num_resident].copy_(array[: self.num_resident])
        return part

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory held: resident rows, optimizer sums and staging area."""
        return sum(array.numel() * array.element_size() for array in self._device_arrays)

    def stage(self, slots: Tensor) -> StagedBatch:
        """Bring a batch's host rows into the staging area.

        Takes slots (B, F) int64 on the host. A batch without host rows touches no host row memory.
        Raises `ValueError` when the batch needs more distinct host rows than the staging area
        holds.
        """
        if self.num_resident == self.num_rows:
            return StagedBatch(slots.to(self.device, non_blocking=True), None)
        on_host = slots >= self.num_resident
        if not bool(on_host.any()):
            return StagedBatch(slots.to(self.device, non_blocking=True), None)
        distinct, place = torch.unique(slots[on_host], return_inverse=True)
        if len(distinct) > self.staging_rows:
            raise ValueError(
                f"a batch needs {len(distinct)} host rows; the staging area holds "
                f"{self.staging_rows}"
            )
        host_rows = distinct - self.num_resident
        index = slots.clone()
        index[on_host] = place + self.num_resident
        for on_device, array in zip(self._device_arrays, self._host_arrays, strict=True):
            staging = on_device[self.num_resident : self.num_resident + len(host_rows)]
            staging.copy_(array.index_select(0, host_rows))
        return StagedBatch(index.to(self.device, non_blocking=True), host_rows)

    def write_back(self, staged: StagedBatch) -> None:
        """Copy a trained batch's staged rows home; evaluation, which only reads, does not."""
        if staged.host_rows is None:
            return
        for on_device, array in zip(self._device_arrays, self._host_arrays, strict=True):
            staging = on_device[self.num_resident : self.num_resident + len(staged.host_rows)]
            array[staged.host_rows] = staging.to(array.device)

    def lookup(self, staged: StagedBatch) -> Tensor:
        """The batch's rows (B, F, dim), outside autograd: their gradient goes to `update`."""
        index = staged.index
        return (
            self._device_arrays[0].index_select(0, index.reshape(-1)).view(*index.shape, self.dim)
        )

    @torch.no_grad()
    def update(self, staged: StagedBatch, gradient: Tensor, learning_rate: float) -> None:
        """Step the batch's rows; a row looked up several times takes the sum of its gradients.

        `gradient` is (B, F, dim) and is overwritten. SGD: w -= lr * g. Row-wise Adagrad:
        s += mean(g^2); w -= lr * g / (sqrt(s) + 1e-10), as in DLRM's RWSAdagrad.
        """
        weight = self._device_arrays[0]
        index = staged.index.reshape(-1)
        gradient = gradient.view(-1, self.dim)
        if len(self._device_arrays) > 1:
            sums = self._device_arrays[1]
            rows, place = torch.unique(index, return_inverse=True)
            gradient = gradient.new_zeros(len(rows), self.dim).index_add_(0, place, gradient)
            total = sums.index_select(0, rows).add_(gradient.pow(2).mean(1))
            sums[rows] = total
            gradient = gradient.div_(total.sqrt_().add_(ADAGRAD_EPS).unsqueeze(1))
            index = rows
        # Scaling first: index_add_ with alpha is six times slower on a CPU.
        weight.index_add_(0, index, gradient.mul_(-learning_rate))

    def leading_rows(self, num_rows: int) -> Tensor:
        """A copy of the weights of slots [0, num_rows), on the device."""
        resident = min(num_rows, self.num_resident)
        rows = torch.empty(num_rows, self.dim, device=self.device)
        rows[:resident].copy_(self._device_arrays[0][:resident])
        rows[resident:].copy_(self._host_arrays[0][: num_rows - resident])
        return rows

    def state(self) -> dict[str, Tensor]:
        """All rows in slot order on the host: `rows` (num_rows, dim), and `row_sums` where kept."""
        parts = [
            torch.cat([on_device[: self.num_resident].cpu(), array])
            for on_device, array in zip(self._device_arrays, self._host_arrays, strict=True)
        ]
        return dict(zip(("rows", "row_sums"), parts, strict=False))
