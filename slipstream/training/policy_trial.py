"""Trying a drop policy before training: it would be called for the first time hours later.

It scores the first inputs of each kind that it chooses among, with made-up labels, losses and rows.
What it says of its state must be possible to save, and to go on from. Each time its file is run
anew, and what it remembers of the trial is gone with that (not what modules that it imports keep);
the run's random numbers stay where they are. No rank needs another for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slipstream.tools.device import seeded
from slipstream.tools.streams import stream, torch_seed
from slipstream.training.batching import KIND_NAMES
from slipstream.training.chunks import Chunk, Moment, OnDemand, WindowRows
from slipstream.training.flags import Settings
from slipstream.training.policies import Policy
from slipstream.training.sets import PreparedData

NUM_TRIED = 256  # inputs of a kind


def try_policy(
    policy: Policy | None, prepared: PreparedData, settings: Settings, device: torch.device
) -> None:
    """Try another policy of the same file and options, on `device`.

    None is tried that is built in, or of a run that only evaluates. Raises `ValueError` with what
    does not fit.
    """
    if policy is None or not policy.is_own or settings.run.inference_only:
        return
    seed, data = settings.training.seed, prepared.data
    with seeded(torch_seed(seed, "policy"), device):
        tried = policy.anew()
        if tried.has_state:  # which a checkpoint before the first choice holds
            policy.anew().restore(*tried.state(), device)
        for hot, name in KIND_NAMES.items():
            if tried.pool in ("all", name) and len(data.hot if hot else data.cold):
                moment = Moment(0, 0, stream(seed, "policy"))
                tried.scores(_chunk(prepared, hot, moment, settings, device))
        if tried.has_state:
            policy.anew().restore(*tried.state(), device)


def _chunk(
    prepared: PreparedData, hot: bool, moment: Moment, settings: Settings, device: torch.device
) -> Chunk:
    """Of the first inputs of a kind: what a policy may look at, with plausible numbers."""
    data, num_hot = prepared.data, prepared.num_hot
    inputs, first = (data.hot, 0) if hot else (data.cold, len(data.hot))
    chosen = np.arange(min(NUM_TRIED, len(inputs)))
    dense, slots, _ = inputs.batch(chosen)
    own = inputs.weights_of(chosen)
    change = torch.rand(num_hot + 1, device=device) + 0.01
    change[-1] = torch.inf  # of any cold row
    touched = torch.ones(num_hot + 1, dtype=torch.bool, device=device)
    touched[-1] = False
    with_sums = settings.training.optimizer == "rwsadagrad"

    def read(slots: np.ndarray) -> dict[str, Tensor]:
        rows = torch.randn(len(slots), settings.model.arch_sparse_feature_size)
        return {"rows": rows, **({"row_sums": torch.rand(len(slots))} if with_sums else {})}

    return Chunk(
        ids=torch.from_numpy(chosen + first).to(device),
        num_inputs=data.num_train,
        slots=slots.to(device),
        labels=(torch.arange(len(chosen)) % 2).to(device, torch.int8),
        weights=None if own is None else torch.from_numpy(own).to(device),
        is_hot=hot,
        moment=moment,
        _rows=WindowRows(change, touched, data.access_counts),
        _on_demand=OnDemand(
            dense=lambda: dense,
            losses=lambda: torch.rand(len(chosen), device=device) + 0.01,
            read=read,
        ),
    )
