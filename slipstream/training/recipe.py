"""What a run's mini-batch, rates and decay are, unless they are given: by its training inputs.

One rule for all three methods, chosen by validation AUC on six logs (`python -m bench.recipe_grid`;
the table is in bench/README.md):

- the mini-batch grows as the training inputs to the power 2/3: 64 for 15 k, 1024 for 1 M;
- Adam's rate grows as the square root of the mini-batch up to 1024, and no further: a larger one
  makes up for fewer steps until it becomes unstable;
- row-wise Adagrad's as the cube root up to there. Most rows are rare: they take as many steps in
  small mini-batches as in large ones, and want no smaller ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slipstream.training.optimizers import usual_optimizer

REFERENCE = 1024  # the mini-batch of these rates, and of so many training inputs
REFERENCE_INPUTS, POWER = 1_000_000, 2 / 3
MINI_BATCHES = 32, 4096  # at least and at most
ROWS_RATE, ADAM_RATE = 0.1, 0.002
# Below in proportion to it: DLRM's 0.1 at 128, and a little more. A larger rate diverges.
SGD_RATE = 1.0
DECAY_SHARE = 0.3
FEW_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        mini_batch_size: inputs.
        optimizer, learning_rate: of the rows.
        dense_optimizer, dense_learning_rate: of the network.
        lr_decay_share: of the run, at its end, over which both rates fall to 0.
    """

    mini_batch_size: int
    optimizer: str
    learning_rate: float
    dense_optimizer: str
    dense_learning_rate: float
    lr_decay_share: float


def decide(
    num_train: int,
    optimizer: str | None = None,
    dense_optimizer: str | None = None,
    mini_batch_size: int | None = None,
    learning_rate: float | None = None,
    dense_learning_rate: float | None = None,
    lr_decay_share: float | None = None,
) -> Recipe:
    """The recipe for as many training inputs; what is given stays as it is.

    A rate that is not given follows from the mini-batch; the network's, unless by Adam, is the
    rows'. A rate without an optimizer means what it means in DLRM: SGD for all, and no decay.
    """
    if optimizer is None:
        is_dlrm = learning_rate is not None and dense_optimizer is None
        optimizer = "sgd" if is_dlrm else "rwsadagrad"
        if is_dlrm and lr_decay_share is None:
            lr_decay_share = 0.0
    size = mini_batch_size or mini_batch_for(num_train)
    dense_optimizer = dense_optimizer or usual_optimizer(optimizer)
    share = min(size / REFERENCE, 1)
    usual = SGD_RATE * share if optimizer == "sgd" else ROWS_RATE * share ** (1 / 3)
    rate = learning_rate or _rounded(usual)
    dense_rate = _rounded(ADAM_RATE * math.sqrt(share)) if dense_optimizer == "adam" else rate
    return Recipe(
        size,
        optimizer,
        rate,
        dense_optimizer,
        dense_learning_rate or dense_rate,
        DECAY_SHARE if lr_decay_share is None else lr_decay_share,
    )


def _rounded(rate: float) -> float:
    """To three digits, as it is printed."""
    return float(f"{rate:.3g}")


def mini_batch_for(num_train: int) -> int:
    """The power of two nearest to what the training inputs ask for, between `MINI_BATCHES`."""
    least, most = MINI_BATCHES
    wanted = REFERENCE * (max(num_train, 1) / REFERENCE_INPUTS) ** POWER
    return min(max(2 ** round(math.log2(wanted)), least), most)


def describe(recipe: Recipe, num_train: int, num_steps: int) -> str:
    """For people: how a run of so many mini-batches trains, and whether they are few."""
    share = recipe.lr_decay_share
    line = (
        f"training on {num_train:,} inputs, in mini-batches of {recipe.mini_batch_size:,}\n"
        f"learning rates: rows {recipe.learning_rate:g} ({recipe.optimizer}), "
        f"network {recipe.dense_learning_rate:g} ({recipe.dense_optimizer})"
    )
    if share:
        line += f", to 0 over the last {share:.0%} of inputs"
    if num_steps < FEW_STEPS:
        line += (
            f"\nnote: few mini-batches to learn from ({num_steps:,}); a smaller --mini-batch-size "
            "makes more of them"
        )
    return line
