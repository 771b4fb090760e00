"""Slipstream: find hot inputs whose embedding rows have stopped changing, and drop them (arXiv
2404.04270).

Once the hot rows have trained for a while, keep a copy of them (*snapshot*); a little later, each
row's *change* is the largest absolute difference of its values. A row is stale below a threshold T.
An input is stale when at least k = ceil(alpha * F) of its F rows are, which is when its *critical
threshold*, the k-th smallest change among its rows, is below T. So T for a target drop percentage D
is a quantile of the critical thresholds: one exact vectorised pass where the original bisects over
[0, 0.1] and may miss.

Price: one copy of the hot rows while the window is open and a second at its end, one gather of F
values per remaining hot input, and at the choice `CHOICE_BYTES` of memory for each of these.

Differences from the original: a row that no batch touched in the window is not taken for stale (it
changed by 0 because nobody used it), ties at T are broken at random so that the achieved drop is
the target, and the choice can be repeated within an epoch and in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from slipstream.training.batching import EpochPlan

# At random, as many as `stale` would: of the hot inputs, of all, of the cold ones.
RANDOM_POLICIES = ("random", "uniform", "cold")
POLICIES = ("stale", *RANDOM_POLICIES, "none")
CHUNK = 1 << 16  # inputs, or rows, handled at once
CHOICE_BYTES = 53  # measured: candidates, groups, critical thresholds, random orders, weights


class HotInputs(Protocol):
    """What the drop rule reads of the hot training inputs."""

    labels: np.ndarray  # (n,) int8

    def slots_of(self, inputs: np.ndarray) -> Tensor:
        """Slots (len(inputs), F) int64 of the given inputs."""


@dataclass(frozen=True)
class Reach:
    """What a drop rule may ask of the training it follows.

    Attributes:
        hot, cold: the training inputs.
        leading_rows: n -> a copy of the weights of slots [0, n), on the device.
        count: a clock's name -> the context that counts time there.
    """

    hot: HotInputs
    cold: HotInputs
    leading_rows: Callable[[int], Tensor]
    count: Callable[[str], AbstractContextManager[None]]


def row_change(before: Tensor, after: Tensor) -> Tensor:
    """change[row] = max_d |after - before|: (n, dim), (n, dim) -> (n,)."""
    change = torch.empty(len(before), device=before.device)
    for start in range(0, len(before), CHUNK):
        part = slice(start, start + CHUNK)
        change[part] = (after[part] - before[part]).abs().amax(1)
    return change


def num_stale_rows_needed(alpha: float, num_features: int) -> int:
    """The k = ceil(alpha * F) of the paper; robust to alpha given in decimals (0.7 * 10 = 7)."""
    return max(1, math.ceil(round(alpha * num_features, 9)))


def critical_thresholds(change: Tensor, hot: HotInputs, inputs: np.ndarray, k: int) -> np.ndarray:
    """The k-th smallest change among each input's rows: float32 (len(inputs),).

    `change` (num_hot,) is indexed by slot. An input is stale at T iff its value is below T.
    """
    critical = torch.empty(len(inputs), device=change.device)
    for start in range(0, len(inputs), CHUNK):
        part = slice(start, start + CHUNK)
        critical[part] = _kth_smallest(change, hot.slots_of(inputs[part]), k)
    return critical.cpu().numpy()


def _kth_smallest(change: Tensor, slots: Tensor, k: int) -> Tensor:
    if change.device.type != "cpu":
        changes = change[slots.to(change.device)]
        # CUDA's kthvalue is no deterministic operation.
        return changes.amax(1) if k == slots.shape[1] else changes.sort(1).values[:, k - 1]
    # numpy, on one core: several times faster than torch's kthvalue, and a process that takes the
    # other core would hold up each of torch's small operations.
    taken = change.numpy().take(slots.numpy())
    return torch.from_numpy(
        taken.max(1) if k == slots.shape[1] else np.partition(taken, k - 1, 1)[:, k - 1]
    )


@dataclass(frozen=True)
class Threshold:
    """Inputs below `value` are stale, and of those exactly at it a share of `tie_share`."""

    value: float
    tie_share: float = 0.0


def threshold_for_drop(critical: np.ndarray, drop_fraction: float) -> Threshold:
    """T whose drop is `drop_fraction` of `critical` (a sample of critical thresholds), exact with
    ties.

    Inputs that no finite T makes stale (infinite critical threshold) are never dropped, so the
    achieved share may be lower.
    """
    target = round(drop_fraction * len(critical))
    if target == 0:
        return Threshold(0.0)  # no change is below it
    value = np.partition(critical, target - 1)[target - 1]
    if math.isinf(value):
        return Threshold(math.inf)
    below = int(np.count_nonzero(critical < value))
    ties = int(np.count_nonzero(critical == value))
    return Threshold(float(value), (target - below) / ties)


def stale_mask(critical: np.ndarray, threshold: Threshold, rng: np.random.Generator) -> np.ndarray:
    """Which inputs are stale: all below T, and the threshold's share of ties, chosen at random."""
    stale = critical < np.float64(threshold.value)
    if threshold.tie_share > 0:
        ties = np.flatnonzero(critical == np.float64(threshold.value))
        chosen = rng.permutation(len(ties))[: round(threshold.tie_share * len(ties))]
        stale[ties[chosen]] = True
    return stale


@dataclass(frozen=True)
class DropSettings:
    """What to drop and when; shares are fractions from 0 to 1.

    Attributes:
        policy: what is dropped first.
            `stale`: the paper's, inputs whose rows changed least between the snapshots;
            `random`, `uniform`, `cold`: the controls, as many as `stale` would, at random, of the
            hot inputs left, of all inputs left, of the cold ones;
            `none`.
        drop_fraction: D, of the hot inputs that remain when the choice is made.
        alpha: share of an input's rows that must be stale.
        threshold: T by hand; None finds it from D.
        sample_rate: share of the remaining hot inputs from which T is estimated.
        start, window: where the first snapshot is taken and how much later it is compared, in
            shares of the epoch's hot inputs trained.
        recalibrate_every: shares of the hot inputs from a choice to the next snapshot; 0: one
            choice an epoch. Each later choice drops as many inputs as the first, of those then left
            and those dropped before. Not with `keep_rate`: inputs trained with weight 1 / keep_rate
            already stand for dropped ones, which must not come back.
        keep_rate: share of the stale inputs trained all the same, with loss weight 1 / keep_rate.
        stratify: take the quantile per label, so that the share of positives does not shift.
        negatives_only: choose among inputs without a click; D stays a share of all.
        count_untouched_as_stale: the original's reading of a row no batch touched.
    """

    policy: str = "stale"
    drop_fraction: float = 0.3
    alpha: float = 1.0
    threshold: float | None = None
    sample_rate: float = 1.0
    start: float = 0.25
    window: float = 0.05
    recalibrate_every: float = 0.0
    keep_rate: float = 0.0
    stratify: bool = False
    negatives_only: bool = False
    count_untouched_as_stale: bool = False


class DropRule:
    """Follows the hot stream of each epoch: snapshot, compare, drop; again where recalibrating.

    Args:
        settings: see `DropSettings`.
        num_hot: hot rows; slots below it are hot.
        seed: of samples, ties and kept inputs.
        report: called with a dict of figures at each choice.
    """

    def __init__(
        self,
        settings: DropSettings,
        num_hot: int,
        seed: int,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        if settings.keep_rate and settings.recalibrate_every:
            raise ValueError("got a keep rate and recalibration; expected one of them")
        self.settings, self.num_hot, self.seed, self._report = settings, num_hot, seed, report
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Forget the last epoch's choice: every input has its chance again."""
        self._epoch, self._choices = epoch, 0
        self._pool = np.empty(0, np.int64)  # dropped so far in this epoch
        self._targets: list[int] = []  # inputs to drop, by group, from the first choice on
        self._before: Tensor | None = None
        self._touched: Tensor | None = None
        self._active = self.settings.policy != "none" and self.num_hot > 0
        self._next_start = self.settings.start if self._active else math.inf

    def end_epoch(self, plan: EpochPlan) -> None:
        """Report an epoch whose hot inputs ran out before anything could be chosen."""
        if self._active and self._choices == 0 and plan.num_hot_inputs:
            self._report(
                {
                    "epoch": self._epoch,
                    "policy": self.settings.policy,
                    "dropped": 0,
                    "reason": "the hot inputs ended before the window did: take a smaller "
                    "--mini-batch-size, --snapshot-start or --snapshot-window",
                }
            )

    @property
    def num_dropped(self) -> int:
        """Hot inputs dropped so far in this epoch, less those that came back."""
        return len(self._pool)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Where the epoch's choices stand, for `restore`: plain JSON, and arrays."""
        values = {
            "choices": self._choices,
            "targets": self._targets,
            "next_start": self._next_start if math.isfinite(self._next_start) else None,
        }
        arrays = {"pool": self._pool}
        if self._before is not None and self._touched is not None:
            values["snapshot_at"] = self._snapshot_at
            arrays["before"] = self._before.cpu().numpy()
            arrays["touched"] = self._touched.cpu().numpy()
        return values, arrays

    def restore(
        self,
        epoch: int,
        values: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        dim: int,
        device: torch.device,
    ) -> None:
        """Go on where `state` was taken. `ValueError`: arrays of other shapes."""
        self.begin_epoch(epoch)
        self._choices, self._targets = int(values["choices"]), [int(n) for n in values["targets"]]
        next_start = values["next_start"]
        self._next_start = math.inf if next_start is None else float(next_start)
        self._pool = np.array(arrays["pool"])
        if self._pool.ndim != 1 or self._pool.dtype.kind != "i":
            raise ValueError("its dropped inputs are not numbers of inputs")
        if "before" not in arrays:
            return
        before, touched = arrays["before"], arrays["touched"]
        if before.shape != (self.num_hot, dim) or touched.shape != (self.num_hot + 1,):
            raise ValueError(f"its snapshot has shape {before.shape}; {self.num_hot} rows are hot")
        self._snapshot_at = int(values["snapshot_at"])
        self._before = torch.from_numpy(before.astype(np.float32)).to(device)
        self._touched = torch.from_numpy(touched.astype(bool)).to(device)

    def touch(self, slots: Tensor) -> None:
        """Note the rows (B, F) that a batch updated, while a window is open.

        Places in the device array serve as slots as well, where all hot rows are resident.
        """
        if self._touched is None:
            return
        rows = slots.flatten().clamp(max=self.num_hot).to(self._touched.device)
        self._touched.index_fill_(0, rows, True)

    def before_batch(self, plan: EpochPlan, reach: Reach) -> None:
        """Take the snapshot or make the choice if the hot stream has come that far."""
        trained = plan.num_trained[True]
        if self._before is None:
            if plan.next_is_hot and trained >= self._next_start * plan.num_hot_inputs:
                with reach.count("snapshot"):
                    self._snapshot_at = trained
                    self._before = before = reach.leading_rows(self.num_hot)
                    self._touched = torch.zeros(
                        self.num_hot + 1, dtype=torch.bool, device=before.device
                    )
        elif trained - self._snapshot_at >= max(self.settings.window * plan.num_hot_inputs, 1) and (
            len(plan.remaining(True))
        ):
            with reach.count("snapshot"):
                change = self._row_change(reach.leading_rows(self.num_hot))
            self._choose(plan, reach, change)
            every = self.settings.recalibrate_every
            self._next_start = trained / plan.num_hot_inputs + every if every else math.inf

    def _row_change(self, after: Tensor) -> Tensor:
        """The change of each hot row (num_hot,) in the window, which closes."""
        assert self._before is not None and self._touched is not None
        change = row_change(self._before, after)
        if not bool(torch.isfinite(change).all()):
            raise ValueError("the hot rows are not finite; lower --learning-rate")
        touched = self._touched[: self.num_hot]
        self._share_touched = float(touched.float().mean())
        if not self.settings.count_untouched_as_stale:
            change[~touched] = math.inf
        self._before = self._touched = None
        return change

    def _choose(self, plan: EpochPlan, reach: Reach, change: Tensor) -> None:
        settings, hot, count = self.settings, reach.hot, reach.count
        rng = np.random.default_rng([self.seed, self._epoch, self._choices])
        pool_hot = self._pool[self._pool < plan.num_hot_inputs]
        candidates = np.concatenate([plan.remaining(True), pool_hot])
        groups = self._groups(hot.labels[candidates])
        if not self._targets:
            of = [candidates] if settings.negatives_only else groups
            self._targets = [round(settings.drop_fraction * len(group)) for group in of]

        def scores_of(inputs: np.ndarray) -> np.ndarray:
            k = num_stale_rows_needed(settings.alpha, hot.slots_of(inputs[:1]).shape[1])
            return critical_thresholds(change, hot, inputs, k)

        stale = np.zeros(len(candidates), bool)
        thresholds = []
        for group, target in zip(groups, self._targets, strict=True):
            inputs, fraction = candidates[group], min(target / max(len(group), 1), 1.0)
            with count("threshold"):
                threshold, known = self._find_threshold(scores_of, inputs, fraction, rng)
            with count("classification"):
                known = scores_of(inputs) if known is None and len(inputs) else known
                if known is not None:
                    stale[group] = stale_mask(known, threshold, rng)
            thresholds.append(threshold.value)
        num_dropped_before = len(self._pool)
        with count("classification"):
            dropped, kept = self._drop(plan, reach, candidates, groups, stale, rng)
        targets = self._targets if settings.threshold is None else None
        self._choices += 1
        self._report(
            {
                "epoch": self._epoch,
                "policy": settings.policy,
                "alpha": settings.alpha,
                "threshold": thresholds[0] if len(thresholds) == 1 else thresholds,
                "target_share": sum(targets) / max(len(candidates), 1) if targets else None,
                "stale_share": float(stale.mean()) if len(stale) else 0.0,
                "hot_remaining": len(candidates),
                "hot_inputs": plan.num_hot_inputs,
                "dropped": dropped,
                "dropped_before": num_dropped_before,
                "kept_reweighted": kept,
                "rows_touched_share": self._share_touched,
            }
        )

    def _groups(self, labels: np.ndarray) -> list[np.ndarray]:
        """Places of the inputs to choose among, by the groups whose shares are kept."""
        if self.settings.negatives_only:
            return [np.flatnonzero(labels <= 0)]
        if not self.settings.stratify:
            return [np.arange(len(labels))]
        return [np.flatnonzero(labels > 0), np.flatnonzero(labels <= 0)]

    def _drop(
        self,
        plan: EpochPlan,
        reach: Reach,
        candidates: np.ndarray,
        groups: list[np.ndarray],
        stale: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[int, int]:
        """Drop the stale candidates, or a control's; how many, and how many of them were kept.

        Here a cold input's number is its own plus that of the hot inputs.
        """
        policy, num_hot, chosen = self.settings.policy, plan.num_hot_inputs, stale
        if policy in RANDOM_POLICIES:
            numbers = [int(stale[group].sum()) for group in groups]
            if policy != "random":
                pool_cold = self._pool[self._pool >= num_hot]
                cold = np.concatenate([plan.remaining(False) + np.int64(num_hot), pool_cold])
                labels = reach.cold.labels[cold - num_hot]
                if policy == "uniform":
                    labels = np.concatenate([reach.hot.labels[candidates], labels])
                    cold = np.concatenate([candidates, cold])
                candidates, groups = cold, self._groups(labels)
            chosen = np.zeros(len(candidates), bool)
            for group, number in zip(groups, numbers, strict=True):
                chosen[rng.permutation(group)[:number]] = True
        dropped, weights = self._keep_some(chosen, groups, rng)
        self._replace(plan, candidates, dropped, weights, rng)
        return int(dropped.sum()), int(chosen.sum() - dropped.sum())

    def _find_threshold(
        self,
        scores_of: Callable[[np.ndarray], np.ndarray],
        inputs: np.ndarray,
        drop_fraction: float,
        rng: np.random.Generator,
    ) -> tuple[Threshold, np.ndarray | None]:
        """T, and the scores of all `inputs` where finding it took them all."""
        settings = self.settings
        if settings.threshold is not None:
            return Threshold(settings.threshold), None
        if settings.sample_rate >= 1:
            scores = scores_of(inputs)
            return threshold_for_drop(scores, drop_fraction), scores
        size = min(len(inputs), max(1, round(settings.sample_rate * len(inputs))))
        sample = rng.choice(inputs, size, replace=False)
        return threshold_for_drop(scores_of(sample), drop_fraction), None

    def _keep_some(
        self, chosen: np.ndarray, groups: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Which of the chosen go all the same, and the loss weights of all."""
        if not self.settings.keep_rate:
            return chosen, None
        dropped = chosen.copy()
        weights = np.ones(len(chosen), np.float32)
        for group in groups:
            places = rng.permutation(group[chosen[group]])
            kept = places[: max(1, round(self.settings.keep_rate * len(places)))]
            dropped[kept] = False
            # The achieved rate, not the asked one: the weights of a group add up to its inputs.
            weights[kept] = len(places) / max(len(kept), 1)
        return dropped, weights

    def _replace(
        self,
        plan: EpochPlan,
        candidates: np.ndarray,
        dropped: np.ndarray,
        weights: np.ndarray | None,
        rng: np.random.Generator,
    ) -> None:
        was_dropped = np.zeros(len(candidates), bool)
        if len(self._pool):
            was_dropped = np.isin(candidates, self._pool)
        self._pool = candidates[dropped]
        is_hot = candidates < plan.num_hot_inputs
        for hot in (True, False):
            places = np.flatnonzero(is_hot == hot)
            none_returns = dropped[places[was_dropped[places]]].all()
            none_goes = weights is None and none_returns and not dropped[places].any()
            if not len(places) or none_goes:
                continue  # nothing changes, not even the order: exactly FAE
            kept = places[~dropped[places]]
            if not none_returns:
                kept = rng.permutation(kept)  # inputs that come back are mixed in, not last
            inputs = candidates[kept] - (0 if hot else plan.num_hot_inputs)
            plan.replace(hot, inputs, None if weights is None else weights[kept])
