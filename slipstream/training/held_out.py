"""What a run says of its data before it starts: whether anything is held out, weights, thinning.

A log may hold nothing out: the run then trains to its end and keeps its model, but judges none. Of
one whose training rows were thinned (`slipstream.logs.sub_sampling`) and whose held-out rows are
whole, the outputs are corrected where they are judged: log loss and accuracy are those of the whole
log. AUC is the same with and without.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slipstream.tools import cli
from slipstream.tools.cli import Flag
from slipstream.training.sets import PreparedData

NEAR_ONE = 0.01  # of the mean weight: nearer, rates mean what they do without weights
CORRECTION = Flag(
    "--correct-sub-sampling",
    cli.boolean,
    True,
    "where rows without a click were left out of the training rows alone, evaluate outputs "
    "corrected for it: logit + ln(1 - rate); AUC stays as it is",
)


SAVE_PREDICTIONS = Flag(
    "--save-predictions",
    str,
    None,
    "write set (test, val), label and probability of each held-out input to this CSV file, in the "
    "data's order, by the weights that were tested; not given: none",
    "FILE",
)


def check_held_out(prepared: PreparedData, asked: dict[str, Any], inference_only: bool) -> None:
    """Raise `ValueError` for what needs held-out inputs where there are none.

    `asked` has the values of flags that do, by name; 0: not asked for.
    """
    if prepared.data.num_held_out:
        return
    names = [name for name, value in asked.items() if value]
    if inference_only:
        names = ["--inference-only"]
    if names:
        raise ValueError(
            f"{', '.join(names)}: nothing is held out of these data, so there is nothing to "
            "evaluate on; preprocess the log with held-out rows"
        )


def settle_correction(prepared: PreparedData, corrects: bool) -> PreparedData:
    """The data, to be evaluated with corrected outputs or not; says what holds."""
    shift, thinned = prepared.data.held_out_shift, prepared.sub_sampling
    if not shift or thinned is None or not prepared.data.num_held_out:
        return prepared
    said = f"{thinned.rate:g} of the training rows without a click were left out: "
    if corrects:
        print(f"{said}held-out outputs are corrected, logit {shift:+.4f}")
        return prepared
    print(f"{said}held-out outputs are not corrected, so probabilities are too high")
    data = dataclasses.replace(prepared.data, held_out_shift=0.0)
    return dataclasses.replace(prepared, data=data)


def say_weights(prepared: PreparedData) -> None:
    """Say the training inputs' mean weight where it is not 1: rates then mean something else."""
    if abs(prepared.mean_weight - 1) > NEAR_ONE:
        print(
            f"note: the training inputs weigh {prepared.mean_weight:.4g} on average; with weights "
            "of mean 1 the learning rates mean what they do without weights"
        )
