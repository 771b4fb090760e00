"""The learning rate over a run."""

from __future__ import annotations

from dataclasses import dataclass

MIN_LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class LearningRate:
    """DLRM's `LRPolicyScheduler`, step for step: linear warm-up, quadratic decay, then held.

    DLRM counts mini-batches from 1, t, where `at` counts from 0. With W warm-up steps and D of
    decay from S on: base t / W below W; where D is 0, base from W on. Else base ((D - (t - S)) /
    D)^2 from S to below S + D, at least 1e-7, and before and after it the last rate of warm-up, so
    base (W - 1) / W, and of decay. Where W is 0 or 1 DLRM stops if S comes later: base until then.

    `decay_share`: the share of the run's inputs at its end over which the rate falls to 0, linearly
    in the inputs left to train. So it reaches 0 however many inputs are dropped.
    """

    base: float
    num_warmup_steps: int = 0
    decay_start_step: int = 0
    num_decay_steps: int = 0
    decay_share: float = 0.0

    def at(self, step: int, share_left: float = 1.0) -> float:
        """The learning rate of a step, before which `share_left` of all inputs are to train."""
        if share_left < self.decay_share:
            return max(self.at(step) * share_left / self.decay_share, MIN_LEARNING_RATE)
        number = step + 1
        if number < self.num_warmup_steps:
            return self.base * number / self.num_warmup_steps
        if self.num_decay_steps == 0:
            return self.base
        decayed = min(number - self.decay_start_step, self.num_decay_steps - 1)
        if decayed < 0:
            last = self.num_warmup_steps - 1
            return self.base * last / self.num_warmup_steps if last > 0 else self.base
        return max(self.base * (1 - decayed / self.num_decay_steps) ** 2, MIN_LEARNING_RATE)
