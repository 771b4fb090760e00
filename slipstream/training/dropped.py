"""What of a drop rule outlives an epoch: what its policy remembers, and which inputs went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.tools.runtime import replaced_file
from slipstream.training.policies import Policy
from slipstream.training.progress import Progress, choices_of
from slipstream.training.sets import TrainingData

PIECE = 1 << 16
SAVE_DROPPED = "--save-dropped"
STATE, DROPPED = "state.", "dropped."  # how names of arrays begin


class Lasting:
    """Kept from epoch to epoch, and in checkpoints.

    Args:
        policy: whose state it is, where it has one.
        keeps_inputs: whether to keep which inputs each epoch dropped: 8 bytes for each.
    """

    def __init__(self, policy: Policy, keeps_inputs: bool = False) -> None:
        self.policy, self.keeps_inputs = policy, keeps_inputs
        self.dropped: dict[int, np.ndarray] = {}  # by epoch that ended, numbers as `Chunk.ids`

    def end_epoch(self, epoch: int, dropped: np.ndarray) -> None:
        """These inputs were not trained in that epoch."""
        if self.keeps_inputs:
            self.dropped[epoch] = dropped

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """For `restore`: plain JSON, and arrays; None: nothing lasts."""
        kinds, arrays = None, {}
        if self.policy.has_state:
            kinds, found = self.policy.state()
            arrays = {STATE + name: array for name, array in found.items()}
        elif not self.dropped:
            return None
        arrays |= {f"{DROPPED}{epoch}": inputs for epoch, inputs in self.dropped.items()}
        return {"state": kinds, "epochs": list(self.dropped)}, arrays

    def restore(
        self,
        values: Mapping[str, Any] | None,
        arrays: Mapping[str, np.ndarray],
        progress: Progress,
        num_train: int,
        device: torch.device,
    ) -> None:
        """Go on where `state` was taken, at that progress. `ValueError`: it does not fit."""
        epoch, has_chosen = progress.epoch, bool(choices_of(progress.drops))
        kinds, epochs = (None, []) if values is None else (values["state"], values["epochs"])
        expected = {f"{DROPPED}{number}" for number in epochs}
        if {name for name in arrays if not name.startswith(STATE)} != expected:
            raise ValueError(f"drops.epochs: {epochs}; its arrays are of others")
        if epochs != sorted(set(epochs)) or (epochs and epochs[-1] >= epoch):
            raise ValueError(f"drops.epochs: {epochs}, in epoch {epoch}")
        self.dropped = {number: np.array(arrays[f"{DROPPED}{number}"]) for number in epochs}
        for number, inputs in self.dropped.items():
            is_inside = not len(inputs) or 0 <= inputs.min() <= inputs.max() < num_train
            if not is_inside or len(np.unique(inputs)) < len(inputs):
                raise ValueError(f"drops.dropped.{number}: one twice, or of another data set")
        if (kinds is not None) != self.policy.has_state and (has_chosen or kinds is not None):
            where = "there" if kinds is not None else "here"
            raise ValueError(f"drops.state: {self.policy.name} has a state {where} alone")
        own = {name.removeprefix(STATE): a for name, a in arrays.items() if name.startswith(STATE)}
        if kinds is not None:
            self.policy.restore(kinds, own, device)
        elif own:
            raise ValueError("drops.state: arrays of none")


def save_dropped(
    path: str | Path, dropped: Mapping[int, np.ndarray], num_epochs: int, data: TrainingData
) -> None:
    """Write which inputs each epoch dropped; the file is whole or not there.

    `num_epochs` have ended, the last one may be in progress. Raises `OSError` (full disk).
    """
    num_hot = len(data.hot)
    with replaced_file(path) as file:
        file.write("epoch,input,set,row,label\n")
        for epoch, inputs in sorted(dropped.items()):
            ids = np.sort(inputs)
            for start in range(0, len(ids), PIECE):
                part = ids[start : start + PIECE]
                for name, of_set, first in (("hot", data.hot, 0), ("cold", data.cold, num_hot)):
                    rows = part[(part >= num_hot) == (name == "cold")] - first
                    labels = np.asarray(of_set.labels[rows]).astype(int).tolist()
                    file.writelines(
                        f"{epoch},{row + first},{name},{row},{label}\n"
                        for row, label in zip(rows.tolist(), labels, strict=True)
                    )
    print(f"dropped inputs: {path}")
    if unknown := [str(epoch) for epoch in range(num_epochs) if epoch not in dropped]:
        print(
            f"note: of epochs {', '.join(unknown)} it is not known what was dropped: the run was "
            f"without {SAVE_DROPPED} then"
        )
