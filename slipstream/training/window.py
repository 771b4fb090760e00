"""The window between a snapshot of the hot rows and its comparison: what they changed by.

Price: one copy of the hot rows while it is open, a second at its end, 1 byte a row for what batches
touched, and, where choices are repeated within an epoch, 4 for its last known change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.training.chunks import WindowRows
from slipstream.training.staleness import change_histogram, row_change


class Window:
    """Begins with a copy of the hot rows, notes what is touched, and closes with each row's change.

    Args:
        num_hot: hot rows; slots below it are hot.
        count_untouched_as_stale: the original's reading of a row no batch touched: it changed by 0.
        keeps_changes: a row that no batch touched has the change of the last window of the epoch in
            which one did. Else, and before, its change is not known: infinite.
    """

    def __init__(self, num_hot: int, count_untouched_as_stale: bool, keeps_changes: bool) -> None:
        self.num_hot, self.count_untouched_as_stale = num_hot, count_untouched_as_stale
        self.keeps_changes = keeps_changes
        self.forget()

    def forget(self) -> None:
        """Begin an epoch."""
        self.opened_at = 0  # hot inputs trained by then
        self.share_touched = 0.0  # of the hot rows, in the last window
        self.histogram: list[list[float]] = []  # of what touched ones changed by
        self._before: Tensor | None = None
        self.touched: Tensor | None = None  # (num_hot + 1,) bool, since it opened
        self._known: Tensor | None = None  # (num_hot + 1,) last known changes

    @property
    def is_open(self) -> bool:
        """Whether a snapshot waits for its comparison."""
        return self._before is not None

    def begin(self, at: int, rows: Tensor) -> None:
        """Take the snapshot `rows` (num_hot, dim) after so many hot inputs."""
        self.opened_at, self._before = at, rows
        self.touched = torch.zeros(self.num_hot + 1, dtype=torch.bool, device=rows.device)

    def touch(self, slots: Tensor, weights: Tensor | None = None) -> None:
        """Note the rows (B, C) that a batch updated; inputs of weight 0, of (B,), update none."""
        if self.touched is None:
            return
        if weights is not None:
            slots = slots.where(weights.to(slots.device)[:, None] > 0, -1)
        rows = slots.flatten().clamp(max=self.num_hot).to(self.touched.device)
        rows = rows.where(rows >= 0, self.num_hot)  # absent
        self.touched.index_fill_(0, rows, True)

    def close(self, rows: Tensor, access_counts: np.ndarray | None) -> WindowRows:
        """What the window showed of the hot rows, which now are `rows`."""
        assert self._before is not None and self.touched is not None
        touched, self.touched = self.touched, None
        change = torch.full(
            (self.num_hot + 1,), math.inf, dtype=torch.float32, device=touched.device
        )
        change[:-1] = row_change(self._before, rows)
        self._before = None
        if not bool(torch.isfinite(change[:-1]).all()):
            raise ValueError("the hot rows are not finite; lower --learning-rate")
        touched[-1] = False  # of any other row
        self.share_touched = float(touched[:-1].float().mean())
        self.histogram = change_histogram(change[:-1], touched[:-1])
        if not self.count_untouched_as_stale:
            known = math.inf if self._known is None else self._known
            change = change.where(touched, known)
            self._known = change if self.keeps_changes else None
        return WindowRows(change, touched, access_counts)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Where it stands, for `restore`: plain JSON, and arrays."""
        values: dict[str, Any] = {}
        arrays = {}
        if self._known is not None:
            arrays["change"] = self._known.cpu().numpy()
        if self._before is not None and self.touched is not None:
            values["snapshot_at"] = self.opened_at
            arrays["before"] = self._before.cpu().numpy()
            arrays["touched"] = self.touched.cpu().numpy()
        return values, arrays

    def restore(
        self,
        values: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        dim: int,
        device: torch.device,
    ) -> None:
        """Go on where `state` was taken. `ValueError`: arrays of other shapes."""
        self.forget()
        if "change" in arrays:
            change = arrays["change"]
            if change.shape != (self.num_hot + 1,) or not (change >= 0).all():
                raise ValueError("its last known changes of the hot rows are none")
            self._known = torch.from_numpy(change.astype(np.float32)).to(device)
        if "before" not in arrays:
            return
        before, touched = arrays["before"], arrays["touched"]
        if before.shape != (self.num_hot, dim) or touched.shape != (self.num_hot + 1,):
            raise ValueError(f"its snapshot has shape {before.shape}; {self.num_hot} rows are hot")
        self.opened_at = int(values["snapshot_at"])
        self._before = torch.from_numpy(before.astype(np.float32)).to(device)
        self.touched = torch.from_numpy(touched.astype(bool)).to(device)
