"""What a network gets to see of an input, and how embedding rows become it.

Shapes: B inputs, C id columns (one row each), F vectors, dim values a row, L elements a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slipstream.logs.features import FeatureLayout, plain_layout

Sequences = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features:
    """What a network is made for.

    Attributes:
        num_dense: values of `dense` (B, num_dense).
        names: of the F vectors (B, F, dim), in their order.
        dim: values of a vector.
        sequences: name -> L, of the features that arrive as rows (B, L, dim) with a mask (B, L).
        tables: name -> number of the table whose rows they are, of all; some may share one.
    """

    num_dense: int
    names: tuple[str, ...]
    dim: int
    sequences: dict[str, int] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)


def features_of(layout: FeatureLayout, num_dense: int, dim: int) -> Features:
    """What a network sees of a log with these features."""
    return Features(
        num_dense,
        tuple(feature.name for feature in layout.features if feature.pooling != "sequence"),
        dim,
        {
            feature.name: len(feature.columns)
            for feature in layout.features
            if feature.pooling == "sequence"
        },
        {feature.name: feature.table for feature in layout.features},
    )


def plain_features(num_dense: int, num_features: int, dim: int) -> Features:
    """One column a feature, as in Criteo."""
    return features_of(plain_layout(num_features), num_dense, dim)


class Pooling:
    """Rows (B, C, dim) of a batch to vectors (B, F, dim) and sequences.

    A row of an absent element is replaced by zeros, and so is its gradient: exactly, whatever the
    network does with it.
    """

    def __init__(self, layout: FeatureLayout) -> None:
        self.layout = layout

    def __call__(self, rows: Tensor, present: Tensor | None) -> tuple[Tensor, Sequences]:
        """`present` (B, C) bool, None: every element is."""
        if self.layout.is_plain:
            return rows, {}
        if present is not None:
            rows = rows.masked_fill(~present.unsqueeze(2), 0.0)
        vectors, sequences = [], {}
        for feature in self.layout.features:
            columns = slice(feature.columns[0], feature.columns[-1] + 1)
            part = rows[:, columns]
            if feature.pooling == "sequence":
                assert present is not None
                sequences[feature.name] = (part, present[:, columns])
            elif feature.pooling == "none":
                vectors.append(part[:, 0])
            else:
                pooled = part.sum(1)
                if feature.pooling == "mean":
                    assert present is not None
                    number = present[:, columns].sum(1, keepdim=True)
                    pooled = pooled / number.clamp(min=1)
                vectors.append(pooled)
        if not vectors:
            return rows.new_empty(rows.shape[0], 0, rows.shape[2]), sequences
        return torch.stack(vectors, dim=1), sequences
