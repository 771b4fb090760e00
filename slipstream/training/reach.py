"""What a drop rule may ask of the training it follows, and of the ranks that train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from slipstream.training.batching import EpochPlan
from slipstream.training.sets import Inputs


class Team(Protocol):
    """What a choice needs of the ranks, see `slipstream.training.team`."""

    def choose(self, rule: Any, plan: EpochPlan, act: Callable[[], None]) -> None:
        """Have `act` replace inputs of the plan by the rule's choice, for all ranks."""

    def join(self, touched: Tensor) -> None:
        """Set a flag where any rank has, (n,) bool."""

    def joined(self, touched: Tensor) -> Tensor:
        """As `join`, of a copy."""


@dataclass(frozen=True)
class Reach:
    """What a drop rule may ask of the training it follows.

    Attributes:
        hot, cold: the training inputs.
        leading_rows: n -> a copy of the weights of slots [0, n), on the device.
        losses: training inputs -> the model's loss (n,) on each of the given ones.
        count: a clock's name -> the context that counts time there.
        team: the ranks that train; one decides for all.
        access_counts: (num_rows,) int64 by slot; None: not counted.
    """

    hot: Inputs
    cold: Inputs
    leading_rows: Callable[[int], Tensor]
    losses: Callable[[Inputs, np.ndarray], Tensor]
    count: Callable[[str], AbstractContextManager[None]]
    team: Team
    access_counts: np.ndarray | None = None
