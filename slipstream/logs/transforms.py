"""What a dense value becomes when a mini-batch is cut, column by column.

The manifest of a processed file says so under the key `transforms`, one entry a column of `X_int`:

    {"kind": "log"}                                ln(x + 1), negative x as 0: of counts
    {"kind": "signed_log"}                         sign(x) ln(|x| + 1)
    {"kind": "standardize", "mean": m, "std": s}   (x - m) / s
    {"kind": "none"}                               x

A file without that key takes the logarithm of all. A model is good for the transforms that it was
trained with: its checkpoint keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

TRANSFORMS = "transforms"  # the manifest's key
KINDS = ("log", "signed_log", "standardize", "none")


@dataclass(frozen=True)
class Transform:
    """Of one dense column; `mean` and `std` are of `standardize` alone."""

    kind: str = "log"
    mean: float = 0.0
    std: float = 1.0

    def describe(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        if self.kind == "standardize":
            return {"kind": self.kind, "mean": self.mean, "std": self.std}
        return {"kind": self.kind}


@dataclass(frozen=True)
class Transforms:
    """Of all dense columns, in order."""

    columns: tuple[Transform, ...]

    @cached_property
    def _places(self) -> dict[str, np.ndarray]:
        """The columns of each kind; kinds that do not occur are left out."""
        kinds = np.array([column.kind for column in self.columns], dtype=object)
        found = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
        return {kind: places for kind, places in found.items() if len(places)}

    @cached_property
    def _scales(self) -> np.ndarray:
        """Mean and standard deviation (2, num_dense) float64."""
        return np.array([[c.mean for c in self.columns], [c.std for c in self.columns]], np.float64)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """New float32 (B, num_dense) of values (B, num_dense) as they are stored."""
        dense = values.astype(np.float32)
        if len(self._places.get("log", ())) == len(self.columns):
            np.log1p(np.maximum(dense, 0, out=dense), out=dense)
            return dense
        for kind, places in self._places.items():
            if kind == "log":
                dense[:, places] = np.log1p(np.maximum(dense[:, places], 0))
            elif kind == "signed_log":
                part = dense[:, places]
                dense[:, places] = np.copysign(np.log1p(np.abs(part)), part)
            elif kind == "standardize":
                # In float64: a difference of large values, as of times, would lose its digits.
                mean, std = self._scales[:, places]
                dense[:, places] = (values[:, places].astype(np.float64) - mean) / std
        return dense

    def describe(self) -> list[dict[str, Any]]:
        """As it stands in a manifest."""
        return [column.describe() for column in self.columns]


def log_of_all(num_dense: int) -> Transforms:
    """Of a file that says nothing."""
    return Transforms((Transform(),) * num_dense)


def transforms_of(manifest: Mapping[str, Any], num_dense: int, source: str) -> Transforms:
    """The transforms that a manifest describes; `ValueError` where it does not fit the columns."""
    described = manifest.get(TRANSFORMS)
    if described is None:
        return log_of_all(num_dense)
    if not isinstance(described, list) or len(described) != num_dense:
        found = len(described) if isinstance(described, list) else repr(described)
        raise ValueError(
            f"{source}: its manifest's transforms are {found}; expected a list of one for each of "
            f"{num_dense} dense columns"
        )
    return Transforms(
        tuple(_transform_of(one, f"{source}: dense {i + 1}") for i, one in enumerate(described))
    )


def _transform_of(described: Any, place: str) -> Transform:
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind == "standardize":
        mean, std = described.get("mean"), described.get("std")
        is_number = all(type(value) in (int, float) for value in (mean, std))
        if is_number and math.isfinite(mean) and 0 < std < math.inf:
            return Transform(kind, float(mean), float(std))
    elif kind in KINDS:
        return Transform(kind)
    raise ValueError(
        f"{place}: its manifest's transform is {described!r}; expected a kind of "
        f"{', '.join(KINDS)}, and of standardize a finite mean and a std above 0"
    )
