"""What a run's mini-batch, rates and decay are, unless they are given: by its training inputs.

One rule for all three methods, chosen by validation AUC on six logs (`python -m bench.recipe_grid`;
the table is in bench/README.md):

- the mini-batch grows as the square root of the training inputs: 128 for 7 k, 1024 for 1 M;
- with row-wise Adagrad and Adam both rates grow as the square root of the mini-batch up to 1024,
  and no further. A larger rate makes up for fewer steps until Adam's becomes unstable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slipstream.training.optimizers import usual_optimizer

MINI_BATCH_OF_ROOT = 1.3  # times the root of the training inputs
MINI_BATCHES = 32, 4096  # at least and at most
REFERENCE = 1024  # the mini-batch of these rates
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
    share = size / REFERENCE
    root = math.sqrt(min(share, 1))
    usual = SGD_RATE * min(share, 1) if optimizer == "sgd" else ROWS_RATE * root
    rate = learning_rate or _rounded(usual)
    dense_rate = _rounded(ADAM_RATE * root) if dense_optimizer == "adam" else rate
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
    """The power of two nearest to so many times the root, between `MINI_BATCHES`."""
    least, most = MINI_BATCHES
    wanted = MINI_BATCH_OF_ROOT * math.sqrt(max(num_train, 1))
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
