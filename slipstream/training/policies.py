"""Drop policies: which inputs go first. Built-in ones, and those of a reader's own file.

A policy is a function `score(chunk) -> (n,)` of numbers, a tensor or an array: the candidates with
the lowest scores are dropped, as many as D says, ties at random by the seed; one scored +inf never
is, and -inf goes first. Its `pool`, an attribute of the function or a name beside it in its file,
says what it chooses among: the inputs left of the `hot` ones (where it says nothing), of the `cold`
ones, or of `all`. What it sees of them: `slipstream.training.chunks`.

It may be a class, too: one object of it is made and called. What `state_dict()` of it returns, a
name -> a tensor or an array, is saved in checkpoints, and given to `load_state_dict` of the object
of a run that goes on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.plugins import Plugin, find_plugin
from slipstream.training.chunks import Chunk
from slipstream.training.described import STATE_TYPES
from slipstream.training.saved import saved_name
from slipstream.training.staleness import critical_thresholds

POOLS = ("hot", "all", "cold")
ARRAY, TENSOR, ON_DEVICE = "array", "tensor", "tensor on the device"  # kinds of a state's values
MAX_WHOLE = 1 << 53  # float64 holds all whole numbers up to it

Score = Callable[..., Any]  # a chunk -> numbers (n,)


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
        plugin: the function or class, its name, and the text of its file.
        pool: one of `POOLS`.
        score: what ranks candidates; None: nothing is dropped.
        options: of --drop-policy-args; a class was made with them, a function is called with them.
    """

    plugin: Plugin
    pool: str
    score: Score | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`stale`, or `file.py:function`."""
        return self.plugin.name

    @property
    def is_own(self) -> bool:
        """Whether it is of a reader's file."""
        return self.plugin.path is not None

    @property
    def has_state(self) -> bool:
        """Whether it says what it remembers."""
        return self.is_own and hasattr(self.score, "state_dict")

    def scores(self, chunk: Chunk) -> np.ndarray:
        """Scores (n,) of a chunk, float32 or float64; `ValueError` for anything else, and NaN.

        Whole numbers and booleans become float64.
        """
        assert self.score is not None
        options = {} if inspect.isclass(self.plugin.found) else self.options
        with self.plugin.running():
            scores = self.score(chunk, **options)
            if isinstance(scores, Tensor):
                scores = scores.detach().cpu()
                is_half = scores.dtype in (torch.bfloat16, torch.float16)
                scores = (scores.float() if is_half else scores).numpy()
            scores = np.asarray(scores)
        if scores.shape != (len(chunk),) or scores.dtype.kind not in "fiub":
            raise ValueError(
                f"{self._said} returned {scores.dtype} of shape {scores.shape}; expected numbers "
                f"of shape ({len(chunk)},)"
            )
        if scores.dtype.kind in "iu" and len(scores):
            low, high = int(scores.min()), int(scores.max())
            if max(-low, high) > MAX_WHOLE:
                raise ValueError(
                    f"{self._said} returned whole numbers from {low} to {high}; expected none "
                    "beyond 2^53, or floating-point ones"
                )
        if scores.dtype.kind != "f":
            scores = scores.astype(np.float64)
        if np.isnan(scores).any():
            raise ValueError(
                f"{self._said} returned NaN; expected numbers, +inf for what is to stay"
            )
        return scores

    @property
    def _asked(self) -> str:
        path = self.plugin.path
        return self.name if path is None else f"{path}:{self.name.rpartition(':')[2]}"

    @property
    def _said(self) -> str:
        return f"{self.plugin.flag} {self._asked}"

    def anew(self) -> Policy:
        """Another policy of the same file, which is run again, with the same options."""
        return find_policy(self._asked, options=self.options)

    def state(self) -> tuple[list[list[str]], dict[str, np.ndarray]]:
        """What it remembers, for `restore`: names and kinds of its values, and these by
        `saved_name`. `ValueError`: values that cannot be saved.
        """
        kinds: list[list[str]] = []
        arrays: dict[str, np.ndarray] = {}
        with self.plugin.running():
            found = dict(self.score.state_dict())  # type: ignore[union-attr]
        for name, value in found.items():
            what = f"{self._said}: state_dict() has {name!r}"
            if not isinstance(name, str) or not name:
                raise ValueError(f"{what} for a name; expected a text")
            if not isinstance(value, (Tensor, np.ndarray)):
                raise ValueError(f"{what} of {type(value).__name__}; expected a tensor or an array")
            kind = ARRAY
            if isinstance(value, Tensor):
                kind = TENSOR if value.device.type == "cpu" else ON_DEVICE
                if value.dtype == torch.bfloat16 or value.layout != torch.strided:
                    raise ValueError(f"{what} of {value.dtype}, {value.layout}; cannot be saved")
                value = value.detach().cpu().numpy()
            if value.dtype.str not in STATE_TYPES:
                raise ValueError(f"{what} of {value.dtype.str}; expected numbers")
            if saved_name(name) in arrays:
                raise ValueError(f"{what}: two would be saved under one name; rename one")
            kinds.append([name, kind])
            arrays[saved_name(name)] = np.array(value)
        return kinds, arrays

    def restore(
        self,
        kinds: Sequence[Sequence[str]],
        arrays: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        """Remember what `state` gave. `ValueError` where it does not say the same thereafter."""
        if {saved_name(name) for name, _ in kinds} != arrays.keys() or len(kinds) != len(arrays):
            raise ValueError("the names of the policy's state are not those of its arrays")
        values: dict[str, Tensor | np.ndarray] = {}
        for name, kind in kinds:
            value = np.array(arrays[saved_name(name)])
            values[name] = value if kind == ARRAY else torch.from_numpy(value)
            if kind == ON_DEVICE:
                values[name] = values[name].to(device)  # type: ignore[union-attr]
        with self.plugin.running():
            self.score.load_state_dict(values)  # type: ignore[union-attr]
        _, taken = self.state()
        for name, array in arrays.items():
            if name not in taken or not _is_same(taken[name], array):
                raise ValueError(f"{self._said}: load_state_dict() did not take up {name}")
        if len(taken) > len(arrays):
            raise ValueError(f"{self._said}: state_dict() has more than was saved")


def _is_same(first: np.ndarray, second: np.ndarray) -> bool:
    is_alike = first.dtype == second.dtype and first.shape == second.shape
    return is_alike and first.tobytes() == second.tobytes()


def find_policy(name: str, alpha: float = 1.0, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy that `--drop-policy` names; alpha is `stale`'s. `ValueError`: there is none.

    A file is run anew each time, and of a class an object is made: a policy that remembers nothing.
    """
    plugin = find_plugin(name, BUILT_IN, "--drop-policy")
    score, options = plugin.found, options or {}
    if plugin.path is None:
        pool = getattr(score, "pool", "hot")
        return Policy(plugin, pool, score, {"alpha": alpha} if score is stale else {})
    if inspect.isclass(score):
        with plugin.running():
            score = score(**options)
    if not callable(score):
        raise ValueError(f"--drop-policy {name} is no function, nor a class with __call__")
    if hasattr(score, "state_dict") != hasattr(score, "load_state_dict"):
        raise ValueError(
            f"--drop-policy {name} has one of state_dict and load_state_dict; expected both, for a "
            "policy whose state is saved, or none"
        )
    pool = getattr(score, "pool", getattr(plugin.module, "pool", "hot"))
    if pool not in POOLS:
        raise ValueError(f"--drop-policy {name}: its pool is {pool!r}; expected one of {POOLS}")
    return Policy(plugin, pool, score, options)


def check_schedule(policy: Policy, schedule: str) -> None:
    """Raise `ValueError` where nothing is left to choose among when the choice is made."""
    if policy.pool == "cold" and schedule == "phased":
        raise ValueError(
            f"--drop-policy {policy.name} chooses among cold inputs, which --schedule phased has "
            "trained by then; give --schedule interleaved"
        )
