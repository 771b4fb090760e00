"""Slipstream: find inputs whose embedding rows have stopped changing (arXiv 2404.04270).

Once the hot rows have trained for a while, keep a copy of them (*snapshot*); a little later, each
row's *change* is the largest absolute difference of its values. A row is stale below a threshold T.
An input is stale when at least k = ceil(alpha * F) of its F present rows are, which is when its
*critical threshold*, the k-th smallest change among them, is below T. So T for a target drop
percentage D is a quantile of the critical thresholds: one exact vectorised pass where the original
bisects over [0, 0.1] and may miss (`slipstream.training.cut`, which serves every policy).

Price: a gather of C values per remaining input.

Differences from the original: a row that no batch touched in the window is not taken for stale (it
changed by 0 because nobody used it), and ties at T are broken at random so that the achieved drop
is the target.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # rows handled at once
HALF_OCTAVE = 22  # bits of a float32 behind its exponent and the first of its mantissa


def row_change(before: Tensor, after: Tensor) -> Tensor:
    """change[row] = max_d |after - before|: (n, dim), (n, dim) -> (n,)."""
    change = torch.empty(len(before), dtype=torch.float32, device=before.device)
    for start in range(0, len(before), CHUNK):
        part = slice(start, start + CHUNK)
        change[part] = (after[part] - before[part]).abs().amax(1)
    return change


def change_histogram(change: Tensor, touched: Tensor) -> list[list[float]]:
    """How far the touched rows moved: [upper limit, rows] of half octaves (1 to 1.5 to 2 times a
    power of 2), of those that hold any; as a log's line has them.

    `change` (n,) float32, not negative; `touched` (n,).
    """
    counts = np.zeros((1 << 31 - HALF_OCTAVE) + 1, np.int64)
    for start in range(0, len(change), CHUNK):
        part = slice(start, start + CHUNK)
        # A float's first bits are its exponent: several times as fast as a logarithm.
        above = (change[part].view(torch.int32) >> HALF_OCTAVE).where(touched[part], -1) + 1
        counts += np.bincount(above.cpu().numpy(), minlength=len(counts))
    numbers = counts[1:]
    held = np.flatnonzero(numbers)
    limits = ((held + 1) << HALF_OCTAVE).astype(np.int32).view(np.float32)
    return [list(pair) for pair in zip(limits.tolist(), numbers[held].tolist(), strict=True)]


def num_stale_rows_needed(alpha: float, num_features: int) -> int:
    """The k = ceil(alpha * F) of the paper; robust to alpha given in decimals (0.7 * 10 = 7)."""
    return max(1, math.ceil(round(alpha * num_features, 9)))


def critical_thresholds(change: Tensor, present: Tensor | None, alpha: float) -> Tensor:
    """The k-th smallest change among each input's present rows: float32 (n,).

    `change` (n, C), infinite for absent elements; `present` (n, C) bool, None: all are. An input is
    stale at T iff its value is below T; one without present rows is never shown to be.
    """
    num_columns = change.shape[1]
    if present is None:
        return _kth_smallest(change, num_stale_rows_needed(alpha, num_columns))
    needed = [num_stale_rows_needed(alpha, num) for num in range(num_columns + 1)]
    number = present.sum(1)
    k = torch.tensor(needed).to(change.device)[number]
    kth = change.sort(1).values.gather(1, k.unsqueeze(1) - 1).squeeze(1)
    return kth.where(number > 0, math.inf)


def _kth_smallest(change: Tensor, k: int) -> Tensor:
    is_all = k == change.shape[1]
    if change.device.type != "cpu":
        # CUDA's kthvalue is no deterministic operation.
        return change.amax(1) if is_all else change.sort(1).values[:, k - 1]
    # numpy, on one core: several times faster than torch's kthvalue, and a process that takes the
    # other core would hold up each of torch's small operations.
    values = change.numpy()
    return torch.from_numpy(values.max(1) if is_all else np.partition(values, k - 1, 1)[:, k - 1])
