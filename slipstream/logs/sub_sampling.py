"""Rows without a click that were left out of a log's training rows, and what it does to a model.

The manifest of a processed file says so under the key `sub_sampling`:

    {"rate": r, "held_out": "whole" | "thinned"}

Each training row without a click was left out with probability r (0 <= r < 1), and held-out rows
too where they are `thinned`. Odds of a click are then 1 / (1 - r) times too high, so a probability
p stands for p / (p + (1 - p) / (1 - r)) on whole rows: the logit plus ln(1 - r) (He et al.,
*Practical lessons from predicting clicks on ads at Facebook*, ADKDD 2014, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SUB_SAMPLING = "sub_sampling"  # the manifest's key


@dataclass(frozen=True)
class SubSampling:
    """How many rows without a click were left out: a share `rate`, of which rows."""

    rate: float
    held_out: str

    @property
    def logit_shift(self) -> float:
        """What is added to a logit to be right on rows that were not thinned; 0 or less."""
        return math.log1p(-self.rate)

    @property
    def held_out_shift(self) -> float:
        """What is added to a logit to be right on the held-out rows."""
        return self.logit_shift if self.held_out == "whole" else 0.0

    def describe(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)


def sub_sampling_of(manifest: Mapping[str, Any], source: str) -> SubSampling | None:
    """What a manifest describes; None: all rows are there. `ValueError` where it is not whole."""
    described = manifest.get(SUB_SAMPLING)
    if described is None:
        return None
    found: dict[str, Any] = described if isinstance(described, dict) else {}
    rate: Any = found.get("rate")
    held_out: Any = found.get("held_out")
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if is_number and 0 <= rate < 1 and held_out in ("whole", "thinned"):
        return SubSampling(float(rate), held_out)
    raise ValueError(
        f"{source}: its manifest's sub_sampling is {described!r}; expected a rate from 0 to below "
        "1, and held_out whole or thinned"
    )
