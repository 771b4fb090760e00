"""Embedding rows as numbers: their memory, initial weights and update, and which process has which.

Rows are numbered by *slot*, most popular first (`slipstream.training.embedding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.streams import torch_seed

ADAGRAD_EPS = 1e-10
# Added to a table's rows where Adagrad trains them: see `initial_rows`, and bench/README.md.
SMALL_TABLE = 8
DRAWN_ROWS = 1 << 16  # initial weights are drawn so many rows at a time


def bytes_per_row(dim: int, optimizer: str) -> int:
    """Memory of one row in bytes: fp32 weights, and one fp32 sum for row-wise Adagrad."""
    return 4 * dim + (4 if optimizer == "rwsadagrad" else 0)


@dataclass(frozen=True)
class Shard:
    """The rows that one of `size` ranks keeps: a copy of `[0, num_resident)`, and its share of the
    others, which are dealt out in turn.

    They are numbered in one array: copies first, then what the rank has alone.
    """

    num_rows: int
    num_resident: int
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        """Raise `ValueError` for copies of more rows than there are."""
        if not 0 <= self.num_resident <= self.num_rows:
            raise ValueError(
                f"--num-resident {self.num_resident}: expected 0 to {self.num_rows} rows"
            )

    @property
    def num_own(self) -> int:
        """Rows that this rank alone has."""
        return len(range(self.rank, self.num_rows - self.num_resident, self.size))

    @property
    def num_kept(self) -> int:
        """Rows that this rank keeps."""
        return self.num_resident + self.num_own

    def places(self, slots: np.ndarray) -> np.ndarray:
        """Where rows (n,) lie in the rank's array, int64; -1: on another rank."""
        slots = slots.astype(np.int64)
        if self.size == 1:
            return slots
        behind = slots - self.num_resident
        places = np.where(behind % self.size == self.rank, behind // self.size, -1)
        return np.where(behind < 0, slots, np.where(places < 0, -1, places + self.num_resident))

    def put(self, array: Tensor, slots: np.ndarray | slice, values: Tensor) -> None:
        """Write values (n, ...) of rows into the rank's `array`; other ranks' are left out."""
        if self.size == 1:
            array[slots if isinstance(slots, slice) else torch.from_numpy(self.places(slots))] = (
                values
            )
            return
        if isinstance(slots, slice):
            slots = np.arange(slots.start, slots.stop)
        places = torch.from_numpy(self.places(slots))
        array[places[places >= 0]] = values[places >= 0]


def initial_rows(
    table_sizes: list[int],
    dim: int,
    slot_of_row: np.ndarray | Tensor | None,
    seed: int,
    null_row: bool = False,
    shard: Shard | None = None,
    optimizer: str = "sgd",
) -> Tensor:
    """Initial weights (num_rows, dim), in slot order: uniform, for SGD as DLRM's up to sqrt(1 / n)
    either way for a table of n rows, for row-wise Adagrad up to sqrt(1 / (n + 8)).

    The former is, of a few rows, noise that a small log cannot unlearn.

    Values are drawn table by table in id order, so a row starts the same whatever its slot, and
    whichever rank has it. `slot_of_row` (num_rows,) maps table offset + id to slot; None numbers
    slots by table, then id. Of a `shard` its rows alone, in its numbering. With `null_row` a row of
    zeros follows.
    """
    generator = torch.Generator().manual_seed(torch_seed(seed, "rows"))
    shard = shard or Shard(sum(table_sizes), sum(table_sizes))
    weight = torch.empty(shard.num_kept + null_row, dim)
    weight[shard.num_kept :] = 0
    start, margin = 0, SMALL_TABLE if optimizer == "rwsadagrad" else 0
    for size in table_sizes:
        bound, end = (size + margin) ** -0.5, start + size
        for first in range(start, end, DRAWN_ROWS):
            part = slice(first, min(first + DRAWN_ROWS, end))
            rows = torch.empty(part.stop - first, dim)
            rows.uniform_(-bound, bound, generator=generator)
            shard.put(weight, part if slot_of_row is None else np.asarray(slot_of_row[part]), rows)
        start = end
    return weight


def distinct(rows: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and where each of `rows` is among them; several times a sort's speed.

    `place`, an int32 for every row there is, holds whatever and is left with that of each row.
    """
    order = np.arange(len(rows), dtype=np.int32)
    place[rows] = order
    found = rows[place[rows] == order]  # of equal rows one is left
    place[found] = order[: len(found)]
    return found, place[rows]


def sum_by_row(
    index: Tensor, gradient: Tensor, place: np.ndarray | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add up the gradients (n, dim) of equal rows; returns rows and sums.

    With `place`, see `distinct`, by it: distinct rows on a CPU. On a device, where it is a tensor,
    n rows again, of which any one of equal ones has their sum and the others 0, as to shorten them
    would have the device waited for. Without `place` likewise, by sorting: several times slower on
    a device, and in the order in which they come, the same bits in each run.
    """
    if isinstance(place, np.ndarray):
        found, numbers = distinct(index.numpy(), place)
        sums = gradient.new_zeros((len(found), gradient.shape[1]))
        # An index of 32 bits is six times slower.
        sums.index_add_(0, torch.from_numpy(numbers).long(), gradient)
        return torch.from_numpy(found), sums
    if place is not None:
        place[index] = torch.arange(len(index), dtype=torch.int32, device=index.device)
        return index, torch.zeros_like(gradient).index_add_(0, place[index].long(), gradient)
    # A device sorts by so many bits at a time: half the bits, half the time.
    ordered, order = torch.sort(index.int(), stable=True)
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1  # (n,) which distinct row
    rows = torch.zeros_like(index).scatter_(0, group, ordered.long())
    sums = torch.zeros_like(gradient).index_add_(0, group, gradient.index_select(0, order))
    return rows, sums


def step_rows(
    optimizer: str,
    weight: Tensor,
    sums: Tensor | None,
    index: Tensor,
    gradient: Tensor,
    learning_rate: float | Tensor,
) -> None:
    """Step rows `index` (n,) of `weight` in place; `gradient` (n, dim) is overwritten.

    Of equal rows one alone may have a gradient other than 0. Raises `ValueError` for an optimizer
    that is not there, or that needs sums and has none.

    sgd: w -= lr * g. rwsadagrad: s += mean(g^2); w -= lr * g / (sqrt(s) + 1e-10), as in DLRM's
    RWSAdagrad.
    """
    check_optimizer(optimizer)
    direction = DIRECTIONS[optimizer](sums, index, gradient)
    # Scaling first: index_add_ with alpha is six times slower on a CPU.
    weight.index_add_(0, index, direction.mul_(-learning_rate))


def _sgd(sums: Tensor | None, index: Tensor, gradient: Tensor) -> Tensor:
    return gradient


def _rwsadagrad(sums: Tensor | None, index: Tensor, gradient: Tensor) -> Tensor:
    if sums is None:
        raise ValueError("rwsadagrad keeps a sum of each row; got none")
    sums.index_add_(0, index, gradient.pow(2).mean(1))
    step = sums.index_select(0, index).sqrt_().add_(ADAGRAD_EPS)
    return gradient.div_(step.unsqueeze(1))


# What a row goes along, by optimizer: an optimizer without a function here is none.
DIRECTIONS: dict[str, Callable[[Tensor | None, Tensor, Tensor], Tensor]] = {
    "sgd": _sgd,
    "rwsadagrad": _rwsadagrad,
}
OPTIMIZERS = tuple(DIRECTIONS)


def check_optimizer(optimizer: str) -> None:
    """Raise `ValueError` for an optimizer that nothing implements."""
    if optimizer not in DIRECTIONS:
        raise ValueError(f"got optimizer {optimizer!r}; expected one of {tuple(DIRECTIONS)}")
