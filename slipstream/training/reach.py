"""What a drop rule may ask of the training it follows, and of the ranks that train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from slipstream.training.batching import EpochPlan
from slipstream.training.evaluation import LogitsOf, losses_of
from slipstream.training.loader import Loader
from slipstream.training.sets import Inputs, TrainingData


class Choosers(Protocol):
    """What a choice needs of the ranks; they are a `Team` (`slipstream.training.team`)."""

    def choose(self, rule: Any, plan: EpochPlan, act: Callable[[], None]) -> None:
        """Have `act` replace inputs of the plan by the rule's choice, for all ranks."""

    def join(self, touched: Tensor) -> None:
        """Set a flag where any rank has, (n,) bool."""

    def joined(self, touched: Tensor) -> Tensor:
        """As `join`, of a copy."""

    @property
    def logits(self) -> LogitsOf:
        """Inputs' logits, from within a choice."""


@dataclass(frozen=True)
class Reach:
    """What a drop rule may ask of the training it follows.

    Attributes:
        hot, cold: the training inputs.
        leading_rows: n -> a copy of the weights of slots [0, n), on the device.
        losses: training inputs -> the model's loss (n,) on each of the given ones.
        read: slots (n,) -> copies of their `rows` (n, dim) and `row_sums` (n,), where kept, on the
            host.
        dim: values of a row.
        count: a clock's name -> the context that counts time there.
        team: the ranks that train; one decides for all, and `losses` and `read` are its, from
            within the choice.
        step: mini-batches trained so far.
        access_counts: (num_rows,) int64 by slot; None: not counted.
    """

    hot: Inputs
    cold: Inputs
    leading_rows: Callable[[int], Tensor]
    losses: Callable[[Inputs, np.ndarray], Tensor]
    read: Callable[[np.ndarray], dict[str, Tensor]]
    dim: int
    count: Callable[[str], AbstractContextManager[None]]
    team: Choosers
    step: Callable[[], int]
    access_counts: np.ndarray | None = None


def reach_of(
    data: TrainingData,
    loader: Loader,
    batch_size: int,
    count: Callable[[str], AbstractContextManager[None]],
    team: Choosers,
    step: Callable[[], int],
) -> Reach:
    """A training run's; losses are computed in batches of `batch_size`."""
    table = loader.table

    def leading_rows(num_rows: int) -> Tensor:
        loader.settle()
        return table.leading_rows(num_rows)

    def losses(inputs: Inputs, chosen: np.ndarray) -> Tensor:
        loader.settle()
        return losses_of(team.logits, inputs, chosen, batch_size)

    def read(slots: np.ndarray) -> dict[str, Tensor]:
        loader.settle()
        return table.read(slots)

    asked = (leading_rows, losses, read, table.dim, count, team, step)
    return Reach(data.hot, data.cold, *asked, data.access_counts)
