"""What a drop policy sees of the inputs that it scores: chunks of them, and of their rows.

Price: about 40 bytes an id column of each input of a chunk where all of it is looked at; `rows()`
at most `ROWS_BYTES`, and as much again where hardly any row occurs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from slipstream.training.batching import KIND_NAMES, EpochPlan
from slipstream.training.reach import Reach
from slipstream.training.sets import Inputs

CHUNK = 1 << 16  # inputs scored at once, at most
ROWS_BYTES = 1 << 28  # and of so many that their rows take no more


@dataclass(frozen=True)
class WindowRows:
    """What is known of the hot rows at the end of a window; one more entry stands for any other.

    Attributes:
        change: (num_hot + 1,) float32, largest change of a value; infinite: not known. Where
            choices are repeated, of the last window of the epoch in which a batch updated it.
        touched: (num_hot + 1,) bool, whether a batch updated it in the window.
        access_counts: (num_rows,) int64 by slot, over all training inputs; None: not counted.
    """

    change: Tensor
    touched: Tensor
    access_counts: np.ndarray | None = None


@dataclass(frozen=True)
class Moment:
    """When a choice is made.

    Attributes:
        epoch: from 0.
        step: mini-batches trained so far.
        rng: a generator for whatever is random; it depends on the seed, epoch and choice.
    """

    epoch: int
    step: int
    rng: np.random.Generator


@dataclass(frozen=True)
class OnDemand:
    """What is found out about a chunk's n inputs when it is asked for.

    Attributes:
        dense: their transformed dense features (n, num_dense).
        losses: the model's loss (n,) on each.
        read: see `Reach`.
    """

    dense: Callable[[], Tensor]
    losses: Callable[[], Tensor]
    read: Callable[[np.ndarray], dict[str, Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Some candidates, all hot or all cold; tensors are on the device that trains.

    Attributes:
        ids: (n,) int64, the training inputs' numbers, the same in every epoch and run on the same
            data: row i of `train_hot.npz` is i, and those of `train_cold.npz` come behind them all.
        num_inputs: training inputs, hot and cold; ids are below it.
        slots: (n, C) int64, -1: absent. Slots count rows by popularity.
        labels: (n,) int8.
        weights: (n,) float32, how much each counts in the training loss; None: all 1. D counts
            inputs, and no built-in policy looks at weights.
        is_hot: whether all rows of each are hot.
        moment: when the choice is made.
    """

    ids: Tensor
    num_inputs: int
    slots: Tensor
    labels: Tensor
    weights: Tensor | None
    is_hot: bool
    moment: Moment
    _rows: WindowRows
    _on_demand: OnDemand

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def epoch(self) -> int:
        """From 0."""
        return self.moment.epoch

    @property
    def step(self) -> int:
        """Mini-batches trained so far in the run."""
        return self.moment.step

    @property
    def rng(self) -> np.random.Generator:
        """A generator for whatever is random; it depends on the seed, epoch and choice."""
        return self.moment.rng

    @cached_property
    def dense(self) -> Tensor:
        """Dense features (n, num_dense) float32, as the network gets them."""
        return self._on_demand.dense().to(self.slots.device)

    @cached_property
    def present(self) -> Tensor | None:
        """Which elements are present (n, C) bool; None: all are."""
        present = self.slots >= 0
        return None if bool(present.all()) else present

    @cached_property
    def change(self) -> Tensor:
        """Largest change (n, C) of a value of each row in the window, see `WindowRows`.

        Infinite where it is not known: a cold row, one that no batch touched (unless those count as
        stale), an absent element.
        """
        return self._of_rows(self._rows.change)

    @cached_property
    def touched(self) -> Tensor:
        """Whether a batch updated each row (n, C) in the window; cold rows: False."""
        return self._of_rows(self._rows.touched)

    @cached_property
    def access_counts(self) -> Tensor:
        """How often the training inputs use each row (n, C) int64; absent elements: 0.

        Of a sample of the inputs, where --ip-sampling-rate segregated by one.
        """
        counts = self._rows.access_counts
        if counts is None:
            raise ValueError("accesses were not counted: the run reads no segregated folder")
        taken = torch.from_numpy(counts.take(self.slots.cpu().numpy()).astype(np.int64))
        return taken.to(self.slots.device).where(self.slots >= 0, 0)

    def losses(self) -> Tensor:
        """The model's loss (n,) on each now, not times its weight: a forward pass, no dropout."""
        return self._on_demand.losses()

    def rows(self) -> Tensor:
        """The embedding rows (n, C, dim) as they are now; absent elements: zeros. Read each time.

        Of several ranks, those of all.
        """
        return self._read("rows")

    def row_sums(self) -> Tensor:
        """Row-wise Adagrad's sums (n, C) of the rows, as `rows`. `ValueError`: there are none."""
        return self._read("row_sums")

    def _read(self, name: str) -> Tensor:
        slots = self.slots.cpu().numpy()
        distinct, places = np.unique(slots, return_inverse=True)
        found = self._on_demand.read(distinct.clip(0))  # an absent element's is not taken
        if name not in found:
            raise ValueError("the rows have no Adagrad sums: they are trained by --optimizer sgd")
        values = found[name].index_select(0, torch.from_numpy(places.reshape(-1)))
        values = values.view(*slots.shape, *values.shape[1:]).to(self.slots.device)
        if self.present is not None:
            values[~self.present] = 0
        return values

    def _of_rows(self, values: Tensor) -> Tensor:
        # The last entry is that of any other row, and index -1 finds it.
        slots = self.slots if self.is_hot else self.slots.clamp(max=len(values) - 1)
        if values.device.type != "cpu":
            return values[slots]
        return torch.from_numpy(values.numpy().take(slots.numpy()))


def chunks_of(
    reach: Reach, plan: EpochPlan, rows: WindowRows, candidates: np.ndarray, moment: Moment
) -> Iterator[Chunk]:
    """Candidates by their `Chunk.ids`, hot ones first, as chunks."""
    num_hot, device = plan.num_hot_inputs, rows.change.device
    is_hot = candidates < num_hot
    for hot in KIND_NAMES:
        inputs, first = (reach.hot, 0) if hot else (reach.cold, num_hot)
        of_kind = candidates[is_hot == hot]
        if not len(of_kind):
            continue
        num_columns = inputs.slots_of(of_kind[:1] - first).shape[1]
        size = min(CHUNK, max(1, ROWS_BYTES // (4 * num_columns * reach.dim)))
        for start in range(0, len(of_kind), size):
            ids = of_kind[start : start + size]
            part = ids - first
            own = inputs.weights_of(part)
            yield Chunk(
                ids=torch.from_numpy(ids.astype(np.int64)).to(device),
                num_inputs=plan.num_inputs,
                slots=inputs.slots_of(part).to(device),
                labels=torch.from_numpy(np.array(inputs.labels[part])).to(device),
                weights=None if own is None else torch.from_numpy(own).to(device),
                is_hot=hot,
                moment=moment,
                _rows=rows,
                _on_demand=OnDemand(
                    dense=partial(_dense_of, inputs, part),
                    losses=partial(reach.losses, inputs, part),
                    read=reach.read,
                ),
            )


def _dense_of(inputs: Inputs, chosen: np.ndarray) -> Tensor:
    return inputs.batch(chosen)[0]
