"""Going on with a model on a later log, whose file keeps the model's ids and has new ones.

(`data_utils.py --extend`.) A row that the model has keeps its weights, and its optimizer's sum. A
new one starts as ever or, in a table whose rare values shared a row, from that: as the value it
may have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slipstream.logs.vocabulary import VOCABULARY
from slipstream.training.rows import Shard, initial_rows
from slipstream.training.saved import Saved, row_chunks
from slipstream.training.sets import PreparedData
from slipstream.training.vocabulary_file import kept_vocabulary


def is_extended(saved: Saved, manifest: Mapping[str, Any]) -> bool:
    """Whether data are of a later file than a checkpoint's, in which its values keep their ids."""
    described = manifest.get(VOCABULARY)
    if described is None or saved.vocabulary is None:
        return False
    return saved.vocabulary["checksum"] in described["lineage"]


def grown_rows(
    saved: Saved,
    prepared: PreparedData,
    dim: int,
    seed: int,
    with_sums: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows in slot order, and Adagrad's sums where asked for, as `Saved.load_rows` returns them.

    Raises `ValueError` where a table has fewer rows than the model.
    """
    sizes, slots = prepared.table_sizes, prepared.slot_of_row
    known = kept_vocabulary(saved).tables
    null_row, num_rows = prepared.has_absent, int(sizes.sum())
    shard = shard or Shard(num_rows, num_rows)
    optimizer = "rwsadagrad" if with_sums else "sgd"
    rows = initial_rows(sizes.tolist(), dim, slots, seed, null_row, shard, optimizer)
    sums = torch.zeros(len(rows)) if with_sums else None
    with saved.reading():
        old_rows, old_sums = saved.arrays["rows"], saved.arrays.get("row_sums")
        if len(known) != len(sizes) or any(map(int.__gt__, map(len, known), sizes.tolist())):
            raise ValueError("its tables are not among those of the data")
        if old_rows.shape != (sum(map(len, known)), dim) or (with_sums and old_sums is None):
            raise ValueError(f"rows has shape {old_rows.shape}; {dim} values a row here")
        start = old_start = 0
        for table, size in zip(known, sizes.tolist(), strict=True):
            for part in row_chunks((len(table), dim)):
                old = slice(old_start + part.start, old_start + part.stop)
                into = _slots(slots, start + part.start, start + part.stop)
                shard.put(rows, into, torch.from_numpy(np.array(old_rows[old])))
                if sums is not None and old_sums is not None:
                    shard.put(sums, into, torch.from_numpy(np.array(old_sums[old])))
            if table.rare_id is not None:
                rare = torch.from_numpy(np.array(old_rows[old_start + table.rare_id]))
                added = _slots(slots, start + len(table), start + size)
                shard.put(rows, added, rare.expand(size - len(table), -1))
            start, old_start = start + size, old_start + len(table)
    print(f"new rows: {num_rows - old_start:,} of {num_rows:,}")
    return rows, sums


def _slots(slots: np.ndarray | None, start: int, stop: int) -> np.ndarray | slice:
    """Of the rows from `start` to `stop`, in order of table and id."""
    return slice(start, stop) if slots is None else slots[start:stop]
