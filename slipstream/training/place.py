"""Whether the place of a run in its epoch, as a checkpoint has it, is one that a run can be at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slipstream.training.batching import KIND_NAMES, EpochPlan
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.loader import Table
from slipstream.training.progress import Progress, choices_of

Part = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]


def check_epochs(progress: Progress, num_train: int, is_between: bool) -> None:
    """Raise `ValueError` unless a run has seen each input of the epochs before.

    `is_between`: of no other; else `check_place` counts those.
    """
    seen_of_this = progress.samples + progress.dropped - progress.epoch * num_train
    if is_between or not 0 <= seen_of_this <= num_train:
        _check_seen(progress, num_train, 0)


def _check_seen(progress: Progress, num_train: int, num_in_epoch: int) -> None:
    seen, expected = progress.samples + progress.dropped, progress.epoch * num_train + num_in_epoch
    if seen != expected:
        raise ValueError(
            f"progress: {progress.samples} samples and {progress.dropped} dropped ones are not the "
            f"{expected} of epoch {progress.epoch} and its place there"
        )


def check_place(plan: EpochPlan, progress: Progress, num_train: int, dropped: np.ndarray) -> None:
    """Raise `ValueError` unless each input of the epoch is trained, left or dropped.

    `plan` is as restored; `dropped`: those so far, by `Chunk.ids`.
    """
    num_hot, num_inputs = plan.num_hot_inputs, plan.num_inputs
    if dropped.ndim != 1 or dropped.dtype != np.int64:
        raise ValueError("rule.pool: not numbers of inputs")
    if len(dropped) and not 0 <= dropped.min() <= dropped.max() < num_inputs:
        raise ValueError("rule.pool: inputs that are none of this data set's")
    is_gone = np.zeros(num_inputs, bool)
    is_gone[dropped] = True
    if int(is_gone.sum()) < len(dropped):
        raise ValueError("rule.pool: an input twice")
    for hot, name in KIND_NAMES.items():
        left = plan.remaining(hot)
        if plan.num_replaced(hot):
            places = left if hot else left + np.int64(num_hot)
            if is_gone[places].any():
                raise ValueError(f"rule.pool: {name} inputs that are still to be trained")
        num_dropped = int((dropped < num_hot).sum()) if hot else int((dropped >= num_hot).sum())
        num = plan.num_trained[hot] + len(left) + num_dropped
        if num != (num_hot if hot else num_inputs - num_hot):
            raise ValueError(
                f"plan: {plan.num_trained[hot]} {name} inputs trained, {len(left)} left and "
                f"{num_dropped} dropped are not all"
            )
    _check_seen(progress, num_train, sum(plan.num_trained.values()) + len(dropped))


def restore_rule(
    rule: DropRule, part: Part, plan: EpochPlan, progress: Progress, table: Table
) -> None:
    """Have a rule go on where `part` of a checkpoint was taken. `ValueError`: see `check_rule`."""
    epoch = progress.epoch
    drops = [record for record in progress.drops if record["epoch"] == epoch]
    check_rule(part, rule.settings, rule.state()[0]["next_start"], plan, drops)
    rule.restore(epoch, *part, table.dim, table.device)


def check_rule(
    part: Part, settings: DropSettings, first_start: float | None, plan: EpochPlan, drops: list[Any]
) -> None:
    """Raise `ValueError` for values of a drop rule that it cannot come to at this place.

    `first_start`: where it would take the epoch's first snapshot, as a share of the hot inputs;
    None: nowhere. `drops`: records of the epoch's choices.
    """
    values, arrays = part
    choices, targets, start = values["choices"], values["targets"], values["next_start"]
    num_hot, trained = plan.num_hot_inputs, plan.num_trained[True]
    again = settings.recalibrate_every
    num_groups = 2 if settings.stratify and not settings.negatives_only else 1
    if choices != len(choices_of(drops)):
        raise ValueError(f"rule.choices: {choices}; the records of the epoch are others")
    if len(targets) != (num_groups if choices else 0) or sum(targets) > plan.num_inputs:
        raise ValueError(f"rule.targets: {targets} after {choices} choices")
    if any(plan.num_replaced(hot) > choices for hot in KIND_NAMES):
        raise ValueError(f"plan.num_replaced: more than {choices} choices")
    if len(arrays["pool"]) and not choices:
        raise ValueError("rule.pool: inputs dropped without a choice")
    if choices and start is not None:
        at = (start - again) * num_hot  # where the last choice was
        is_right = again > 0 and abs(at - round(at)) < 1e-3 and 0 <= round(at) <= trained
    else:
        is_right = start == (None if choices and not again else first_start)
    if not is_right:
        raise ValueError(f"rule.next_start: {start} after {choices} choices")
    if not ("snapshot_at" in values) == ("before" in arrays) == ("touched" in arrays):
        raise ValueError("rule: a part of its snapshot is missing")
    if "snapshot_at" in values:
        _check_snapshot(values["snapshot_at"], math.inf if start is None else start, plan)


def _check_snapshot(taken_at: int, start: float, plan: EpochPlan) -> None:
    """It is taken before the first hot batch that begins at, or after, `start`."""
    trained, first = plan.num_trained[True], start * plan.num_hot_inputs
    is_between = len(plan.remaining(True)) > 0 and (trained - taken_at) % plan.batch_size
    if not first <= taken_at <= min(trained, first + plan.batch_size) or is_between:
        raise ValueError(f"rule.snapshot_at: {taken_at}, at {trained} hot inputs trained")
