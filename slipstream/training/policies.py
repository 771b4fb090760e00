"""Drop policies: which inputs go first. Built-in ones, and those of a reader's own file.

A policy is a function `score(chunk) -> (n,)` of floating-point numbers, a tensor or an array: the
candidates with the lowest scores are dropped, as many as D says, ties at random by the seed; one
scored +inf never is, and -inf goes first. Its `pool`, an attribute of the function or a name beside
it in its file, says what it chooses among: the inputs left of the `hot` ones (where it says
nothing), of the `cold` ones, or of `all`. It sees at most `CHUNK` candidates at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.plugins import Plugin, find_plugin
from slipstream.training.staleness import critical_thresholds

CHUNK = 1 << 16  # candidates scored at once
POOLS = ("hot", "all", "cold")


@dataclass(frozen=True)
class WindowRows:
    """What is known of the hot rows at the end of a window; one more entry stands for any other.

    Attributes:
        change: (num_hot + 1,) float32, largest change of a value; infinite: not known. Where
            choices are repeated, of the last window of the epoch in which a batch updated it.
        touched: (num_hot + 1,) bool, whether a batch updated it in the window.
        access_counts: (num_rows,) int64 by slot, over all training inputs; None: not counted.
    """

    change: Tensor
    touched: Tensor
    access_counts: np.ndarray | None = None


@dataclass(frozen=True)
class Chunk:
    """Some candidates, all hot or all cold; tensors are on the device that trains.

    Attributes:
        slots: (n, C) int64, -1: absent. Slots count rows by popularity.
        labels: (n,) int8.
        is_hot: whether all rows of each are hot.
        rng: a generator for whatever is random; it depends on the seed, epoch and choice.
        weights: (n,) float32, how much each counts in the training loss; None: all 1. D counts
            inputs, and no built-in policy looks at weights.
    """

    slots: Tensor
    labels: Tensor
    is_hot: bool
    rng: np.random.Generator
    _rows: WindowRows
    _losses: Callable[[], Tensor]
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.slots)

    @cached_property
    def present(self) -> Tensor | None:
        """Which elements are present (n, C) bool; None: all are."""
        present = self.slots >= 0
        return None if bool(present.all()) else present

    @cached_property
    def change(self) -> Tensor:
        """Largest change (n, C) of a value of each row in the window, see `WindowRows`.

        Infinite where it is not known: a cold row, one that no batch touched (unless those count as
        stale), an absent element.
        """
        return self._of_rows(self._rows.change)

    @cached_property
    def touched(self) -> Tensor:
        """Whether a batch updated each row (n, C) in the window; cold rows: False."""
        return self._of_rows(self._rows.touched)

    @cached_property
    def access_counts(self) -> Tensor:
        """How often the training inputs use each row (n, C) int64; absent elements: 0.

        Of a sample of the inputs, where --ip-sampling-rate segregated by one.
        """
        counts = self._rows.access_counts
        if counts is None:
            raise ValueError("accesses were not counted: the run reads no segregated folder")
        taken = torch.from_numpy(counts.take(self.slots.cpu().numpy()).astype(np.int64))
        return taken.to(self.slots.device).where(self.slots >= 0, 0)

    def losses(self) -> Tensor:
        """The model's loss (n,) on each now, not times its weight: a forward pass, no dropout."""
        return self._losses()

    def _of_rows(self, values: Tensor) -> Tensor:
        # The last entry is that of any other row, and index -1 finds it.
        slots = self.slots if self.is_hot else self.slots.clamp(max=len(values) - 1)
        if values.device.type != "cpu":
            return values[slots]
        return torch.from_numpy(values.numpy().take(slots.numpy()))


Score = Callable[[Chunk], Any]


def stale(chunk: Chunk, alpha: float = 1.0) -> Tensor:
    """Slipstream's: the critical threshold, below which T makes an input stale."""
    return critical_thresholds(chunk.change, chunk.present, alpha)


def random(chunk: Chunk) -> np.ndarray:
    """The control: whichever of the hot inputs."""
    return chunk.rng.random(len(chunk), np.float32)


def uniform(chunk: Chunk) -> np.ndarray:
    """The control: whichever of all inputs."""
    return chunk.rng.random(len(chunk), np.float32)


def cold(chunk: Chunk) -> np.ndarray:
    """The control: whichever of the cold inputs."""
    return chunk.rng.random(len(chunk), np.float32)


uniform.pool, cold.pool = "all", "cold"  # type: ignore[attr-defined]
BUILT_IN: dict[str, Score | None] = {
    "stale": stale,
    "random": random,
    "uniform": uniform,
    "cold": cold,
    "none": None,
}


@dataclass(frozen=True)
class Policy:
    """A policy that `--drop-policy` names.

    Attributes:
        plugin: the function, its name, and the text of its file.
        pool: one of `POOLS`.
        score: what ranks candidates; None: nothing is dropped.
    """

    plugin: Plugin
    pool: str
    score: Score | None

    @property
    def name(self) -> str:
        """`stale`, or `file.py:function`."""
        return self.plugin.name

    def scores(self, chunk: Chunk) -> np.ndarray:
        """Scores (n,) of a chunk, float32 or float64; `ValueError` for anything else, and NaN."""
        assert self.score is not None
        with self.plugin.running():
            scores = self.score(chunk)
            if isinstance(scores, Tensor):
                scores = scores.detach().cpu()
                is_half = scores.dtype in (torch.bfloat16, torch.float16)
                scores = (scores.float() if is_half else scores).numpy()
            scores = np.asarray(scores)
        flag = f"{self.plugin.flag} {self.plugin.path or self.name}"
        if scores.shape != (len(chunk),) or scores.dtype.kind != "f":
            raise ValueError(
                f"{flag} returned {scores.dtype} of shape {scores.shape}; expected floating-point "
                f"numbers of shape ({len(chunk)},)"
            )
        if np.isnan(scores).any():
            raise ValueError(f"{flag} returned NaN; expected numbers, +inf for what is to stay")
        return scores


def find_policy(name: str, alpha: float = 1.0) -> Policy:
    """The policy that `--drop-policy` names; alpha is `stale`'s. `ValueError`: there is none."""
    plugin = find_plugin(name, BUILT_IN, "--drop-policy")
    score = plugin.found
    if score is None:
        return Policy(plugin, "hot", None)
    if not callable(score):
        raise ValueError(f"--drop-policy {name} is no function")
    pool = getattr(score, "pool", getattr(plugin.module, "pool", "hot"))
    if pool not in POOLS:
        raise ValueError(f"--drop-policy {name}: its pool is {pool!r}; expected one of {POOLS}")
    return Policy(plugin, pool, partial(stale, alpha=alpha) if score is stale else score)


def check_schedule(policy: Policy, schedule: str) -> None:
    """Raise `ValueError` where nothing is left to choose among when the choice is made."""
    if policy.pool == "cold" and schedule == "phased":
        raise ValueError(
            f"--drop-policy {policy.name} chooses among cold inputs, which --schedule phased has "
            "trained by then; give --schedule interleaved"
        )
