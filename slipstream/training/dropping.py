"""Dropping inputs while an epoch runs: when, how many, and in whose place (Slipstream, arXiv
2404.04270).

After a share of the epoch's hot inputs the hot rows are copied (*snapshot*); a *window* later a
policy (`slipstream.training.policies`) scores the inputs left, those with the lowest scores are
dropped from the rest of the epoch, and it goes on. The original's choice, and the default, is by
staleness (`slipstream.training.staleness`).

Price: the window's (`slipstream.training.window`), the policy's scores (for `stale` a gather of C
values per remaining hot input), and at the choice `CHOICE_BYTES` of memory for each input that it
is among.

Difference from the original: the choice can be repeated within an epoch, and is in every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.streams import stream
from slipstream.training.batching import EpochPlan
from slipstream.training.chunks import Moment, WindowRows, chunks_of
from slipstream.training.cut import Cut, chosen_mask, find_cut
from slipstream.training.dropped import Lasting
from slipstream.training.policies import Policy, find_policy
from slipstream.training.reach import Choosers, Reach
from slipstream.training.window import Window

CHOICE_BYTES = 53  # measured: candidates, groups, critical thresholds, random orders, weights


@dataclass(frozen=True)
class DropSettings:
    """What to drop and when; shares are fractions from 0 to 1.

    Attributes:
        policy: the name of what scores inputs, see `slipstream.training.policies`.
        drop_fraction: D, of the hot inputs that remain when the choice is made; that many go, of
            whichever pool.
        of_all: and at most so many, as a share of all the epoch's inputs.
        alpha: of `stale`: share of an input's rows that must be stale.
        threshold: of `stale`: T by hand; None finds it from D.
        sample_rate: of `stale`: share of the remaining hot inputs from which T is estimated; of at
            least so many that one of them is dropped.
        start, window: where the first snapshot is taken and how much later it is compared, in
            shares of the epoch's hot inputs trained.
        recalibrate_every: shares of the hot inputs from a choice to the next snapshot; 0: one
            choice an epoch. D is then of the hot inputs left at the first choice: each later one
            drops as many, of those then left and those dropped before, which may come back. A row
            that no batch touched in the newest window keeps its last known change, so inputs do not
            come back for want of being looked at. Not with `keep_rate`: inputs trained with weight
            1 / keep_rate already stand for dropped ones, which must not come back.
        keep_rate: share of the stale inputs trained all the same, with loss weight 1 / keep_rate.
        stratify: take the quantile per label, so that the share of positives does not shift.
        negatives_only: choose among inputs without a click; D stays a share of all.
        count_untouched_as_stale: the original's reading of a row no batch touched.
        min_steps: of an epoch, below which nothing is dropped; 0: always drop.
        options: of a policy of a reader's own.
    """

    policy: str = "stale"
    drop_fraction: float = 0.3
    of_all: float = 1.0
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
    min_steps: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class DropRule:
    """Follows the hot stream of each epoch: snapshot, compare, drop; again where recalibrating.

    Args:
        settings: see `DropSettings`.
        num_hot: hot rows; slots below it are hot.
        seed: of samples, ties and kept inputs.
        report: called with a dict of figures at each choice.
        policy: what scores inputs; None: as `settings` name it.
        keeps_inputs: see `Lasting`.
    """

    def __init__(
        self,
        settings: DropSettings,
        num_hot: int,
        seed: int,
        report: Callable[[dict[str, Any]], None],
        policy: Policy | None = None,
        keeps_inputs: bool = False,
    ) -> None:
        if settings.keep_rate and settings.recalibrate_every:
            raise ValueError("got a keep rate and recalibration; expected one of them")
        self.settings, self.num_hot, self.seed, self._report = settings, num_hot, seed, report
        self.policy = policy or find_policy(settings.policy, settings.alpha, settings.options)
        self.lasting = Lasting(self.policy, keeps_inputs)
        again = settings.recalibrate_every > 0
        self.window = Window(num_hot, settings.count_untouched_as_stale, again)
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Forget the last epoch's choice: every input has its chance again."""
        self._epoch, self._choices = epoch, 0
        self._dropped = np.empty(0, np.int64)  # so far in this epoch, by `Chunk.ids`
        self._targets: list[int] = []  # inputs to drop, by group, from the first choice on
        self.window.forget()
        self._active = self.policy.score is not None and self.num_hot > 0
        self._next_start = self.settings.start if self._active else math.inf

    def end_epoch(self, plan: EpochPlan) -> None:
        """Report an epoch without a choice, and keep what outlives it."""
        self.lasting.end_epoch(self._epoch, self._dropped)
        if (record := self.without_choice(plan, is_whole=True)) is not None:
            self._report(record)

    def without_choice(self, plan: EpochPlan, is_whole: bool) -> dict[str, Any] | None:
        """The record of an epoch, or of the part that the run ends in, where nothing was chosen."""
        if self.policy.score is None or self._choices:
            return None
        reason = (
            "the hot inputs ended before the window did: take a smaller --mini-batch-size, "
            "--snapshot-start or --snapshot-window"
        )
        if not (self._active and plan.num_hot_inputs):
            reason = "no input is hot: segregate with a larger --hot-emb-gpu-mem"
        elif self._is_short(plan):
            reason = (
                f"an epoch of {plan.num_batches_at_first:,} mini-batches is short, each of them "
                f"counts: below {self.settings.min_steps:,} nothing is dropped (--drop-min-steps)"
            )
        elif not is_whole:
            reason = "the run ended before --snapshot-start and --snapshot-window were through"
        policy = self.policy.name
        return {"epoch": self._epoch, "policy": policy, "dropped": 0, "reason": reason}

    def _is_short(self, plan: EpochPlan) -> bool:
        return plan.num_batches_at_first < self.settings.min_steps

    @property
    def num_dropped(self) -> int:
        """Inputs dropped so far in this epoch, less those that came back."""
        return len(self._dropped)

    @property
    def dropped(self) -> np.ndarray:
        """Inputs dropped so far in this epoch, less those that came back, by `Chunk.ids`."""
        return self._dropped

    def state(self, team: Choosers | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Where the epoch's choices stand, for `restore`: plain JSON, and arrays.

        Of a `team`, rank 0, for a checkpoint: with what all have touched.
        """
        values = {
            "choices": self._choices,
            "targets": self._targets,
            "next_start": self._next_start if math.isfinite(self._next_start) else None,
        }
        of_window, arrays = self.window.state()
        if team is not None and self.window.touched is not None:
            arrays["touched"] = team.joined(self.window.touched).cpu().numpy()
        return values | of_window, {"pool": self._dropped, **arrays}

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
        self._dropped = np.array(arrays["pool"])
        if self._dropped.ndim != 1 or self._dropped.dtype.kind != "i":
            raise ValueError("its dropped inputs are not numbers of inputs")
        self.window.restore(values, arrays, dim, device)

    def touch(self, slots: Tensor, weights: Tensor | None = None) -> None:
        """Note the rows (B, C) that a batch updated, while a window is open.

        Places in the device array serve as slots as well, where all hot rows are resident.
        """
        self.window.touch(slots, weights)

    def before_batch(self, plan: EpochPlan, reach: Reach) -> None:
        """Take the snapshot or make the choice if the hot stream has come that far."""
        trained, window = plan.num_trained[True], self.window
        if self._is_short(plan):
            return
        if not window.is_open:
            if plan.next_is_hot and trained >= self._next_start * plan.num_hot_inputs:
                with reach.count("snapshot"):
                    window.begin(trained, reach.leading_rows(self.num_hot))
        elif trained - window.opened_at >= max(self.settings.window * plan.num_hot_inputs, 1) and (
            len(plan.remaining(True))
        ):
            with reach.count("snapshot"):
                assert window.touched is not None
                reach.team.join(window.touched)
                rows = window.close(reach.leading_rows(self.num_hot), reach.access_counts)
            reach.team.choose(self, plan, lambda: self._choose(plan, reach, rows))
            every = self.settings.recalibrate_every
            self._next_start = trained / plan.num_hot_inputs + every if every else math.inf

    def _choose(self, plan: EpochPlan, reach: Reach, rows: WindowRows) -> None:
        settings, count, pool = self.settings, reach.count, self.policy.pool
        place = (self._epoch, self._choices)
        rng, for_policy = (stream(self.seed, what, *place) for what in ("choice", "policy"))
        moment = Moment(self._epoch, reach.step(), for_policy)
        hot = self._candidates(plan, True)
        kinds = {"hot": (True,), "cold": (False,), "all": (True, False)}[pool]
        candidates = np.concatenate([self._candidates(plan, kind) for kind in kinds])
        groups = self._groups(self._labels(plan, reach, candidates))
        if not self._targets:
            of = [hot] if settings.negatives_only else self._groups(reach.hot.labels[hot])
            bound = settings.of_all * plan.num_inputs / max(len(hot), 1)
            fraction = min(settings.drop_fraction, bound)
            self._targets = [round(fraction * len(group)) for group in of]

        def scores_of(inputs: np.ndarray) -> np.ndarray:
            return self._scores(plan, reach, rows, inputs, moment)

        chosen = np.zeros(len(candidates), bool)
        cuts = []
        for group, target in zip(groups, self._targets, strict=True):
            inputs, fraction = candidates[group], _fraction(target, len(group))
            with count("threshold"):
                cut, known = self._find_cut(scores_of, inputs, fraction, rng)
            with count("classification"):
                known = scores_of(inputs) if known is None and len(inputs) else known
                if known is not None:
                    chosen[group] = chosen_mask(known, cut, rng)
            cuts.append(cut.value)
        num_dropped_before = len(self._dropped)
        with count("classification"):
            dropped, weights = self._keep_some(chosen, groups, rng)
            self._replace(plan, candidates, dropped, weights, rng)
        self._choices += 1
        is_stale = self.policy.name == "stale"
        thresholds = [max(cut, 0.0) for cut in cuts]  # of changes: T 0 drops nothing
        goal = self._goal(groups, cuts, int(chosen.sum()), len(hot))
        self._report(
            {
                "epoch": self._epoch,
                "policy": self.policy.name,
                "pool": pool,
                "alpha": settings.alpha if is_stale else None,
                "threshold": (thresholds if len(thresholds) > 1 else thresholds[0])
                if is_stale
                else None,
                **goal,
                "candidates": len(candidates),
                "hot_remaining": len(hot),
                "hot_inputs": plan.num_hot_inputs,
                "dropped": int(dropped.sum()),
                "dropped_before": num_dropped_before,
                "kept_reweighted": int(chosen.sum() - dropped.sum()),
                "rows_touched_share": self.window.share_touched,
                "row_change": self.window.histogram,
            }
        )

    def _candidates(self, plan: EpochPlan, hot: bool) -> np.ndarray:
        """Inputs of a kind that are left or were dropped before.

        A cold input's number is its own plus that of the hot inputs.
        """
        num_hot = plan.num_hot_inputs
        of_kind = (self._dropped < num_hot) == hot
        left = plan.remaining(hot)
        return np.concatenate([left if hot else left + np.int64(num_hot), self._dropped[of_kind]])

    def _labels(self, plan: EpochPlan, reach: Reach, candidates: np.ndarray) -> np.ndarray:
        num_hot = plan.num_hot_inputs
        is_hot = candidates < num_hot
        hot = reach.hot.labels[candidates[is_hot]]
        return np.concatenate([hot, reach.cold.labels[candidates[~is_hot] - num_hot]])

    def _scores(
        self,
        plan: EpochPlan,
        reach: Reach,
        rows: WindowRows,
        candidates: np.ndarray,
        moment: Moment,
    ) -> np.ndarray:
        """The policy's scores of candidates, hot ones first, chunk by chunk."""
        chunks = chunks_of(reach, plan, rows, candidates, moment)
        found = [self.policy.scores(chunk) for chunk in chunks]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def _groups(self, labels: np.ndarray) -> list[np.ndarray]:
        """Places of the inputs to choose among, by the groups whose shares are kept."""
        if self.settings.negatives_only:
            return [np.flatnonzero(labels <= 0)]
        if not self.settings.stratify:
            return [np.arange(len(labels))]
        return [np.flatnonzero(labels > 0), np.flatnonzero(labels <= 0)]

    def _find_cut(
        self,
        scores_of: Callable[[np.ndarray], np.ndarray],
        inputs: np.ndarray,
        drop_fraction: float,
        rng: np.random.Generator,
    ) -> tuple[Cut, np.ndarray | None]:
        """The cut, and the scores of all `inputs` where finding it took them all."""
        settings = self.settings
        is_stale = self.policy.name == "stale"
        if is_stale and settings.threshold is not None:
            return Cut(settings.threshold), None
        size = self._sample_size(len(inputs), drop_fraction)
        if size < len(inputs):
            sample = rng.choice(inputs, size, replace=False)
            found = find_cut(scores_of(sample), drop_fraction)
            if found.value < math.inf:
                return found, None
        # Of a sample that cannot drop its share, it would be infinite: all that can go would.
        scores = scores_of(inputs)
        return find_cut(scores, drop_fraction), scores

    def _sample_size(self, num_inputs: int, drop_fraction: float) -> int:
        """From how many of so many inputs T is found."""
        rate = self.settings.sample_rate
        if rate >= 1 or self.policy.name != "stale" or not drop_fraction:
            return num_inputs
        least = math.floor(0.5 / drop_fraction) + 1  # as many that one of them is to go
        return min(num_inputs, max(least, round(rate * num_inputs)))

    def _goal(
        self, groups: list[np.ndarray], cuts: list[float], achieved: int, num_hot: int
    ) -> dict[str, Any]:
        """Inputs to choose and chosen (`target`, `achieved`), and `why` where these differ."""
        settings, why = self.settings, None
        if settings.threshold is not None:
            return {"target": None, "achieved": achieved, "why": None}
        target = sum(self._targets)
        sizes = [len(group) for group in groups]
        most = sum(map(min, sizes, self._targets))
        samples = map(self._sample_size, sizes, map(_fraction, self._targets, sizes))
        num_sampled = sum(samples)
        if not target and settings.drop_fraction and settings.of_all:
            why = f"the share asked for, of {num_hot:,} hot inputs, is less than one input"
        elif achieved == target:
            pass
        elif most < target:
            why = f"only {most:,} of them are left"
        elif num_sampled < sum(sizes) and max(cuts) < math.inf:
            why = f"T was found from a sample of {num_sampled:,} (--sample-rate)"
        elif self.policy.name == "stale":
            why = "a longer --snapshot-window touches more rows"
        else:
            why = "the policy's scores keep the others"
        return {"target": target, "achieved": achieved, "why": why}

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
        if len(self._dropped):
            was_dropped = np.isin(candidates, self._dropped)
        self._dropped = candidates[dropped]
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


def _fraction(target: int, num_inputs: int) -> float:
    return min(target / max(num_inputs, 1), 1.0)
