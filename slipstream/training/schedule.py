"""The learning rate over a run."""

from __future__ import annotations

from dataclasses import dataclass

MIN_LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class LearningRate:
    """DLRM's schedule: linear warm-up, quadratic decay, then held; steps count from 0.

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
        if step < self.num_warmup_steps:
            return self.base * (step + 1) / self.num_warmup_steps
        if self.num_decay_steps == 0 or step < self.decay_start_step:
            return self.base
        decayed = min(step - self.decay_start_step, self.num_decay_steps - 1)
        return max(self.base * (1 - decayed / self.num_decay_steps) ** 2, MIN_LEARNING_RATE)
