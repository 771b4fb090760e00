"""A trained model as `<folder>/model.npz`: rows by table and id, and the MLPs. No pickle.

Rows are stored in row order, not slot order, so a model loads whatever the hot budget or the
method.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slipstream.embedding import EmbeddingTable
from slipstream.npz import ArrayStream, open_npz, pack_manifest, write_npz

VERSION = 1
CHUNK = 1 << 20  # rows reordered at once, beside the one copy that `state` makes


def model_file(folder: str | Path, to_write: bool) -> Path:
    """The file of a model folder; `ValueError` when it is to be written and exists."""
    path = Path(folder) / "model.npz"
    if to_write and path.exists():
        raise ValueError(f"{path} exists; choose another --save-model or delete the folder")
    return path


def save_model(
    folder: str | Path,
    model: nn.Module,
    table: EmbeddingTable,
    table_sizes: np.ndarray,
    slot_of_row: np.ndarray | None,
) -> Path:
    """Write weights atomically; `slot_of_row` (num_rows,) as the table was numbered, None: in
    order.
    """
    path = model_file(folder, to_write=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    by_slot = table.state()["rows"].numpy()

    def rows() -> Iterator[np.ndarray]:
        for start in range(0, table.num_rows, CHUNK):
            part = slice(start, start + CHUNK)
            yield by_slot[part] if slot_of_row is None else by_slot[slot_of_row[part]]

    members: dict[str, np.ndarray | ArrayStream] = {
        "rows": ArrayStream((table.num_rows, table.dim), np.dtype(np.float32), rows()),
        "table_sizes": np.asarray(table_sizes, np.int64),
        "manifest": pack_manifest({"version": VERSION}),
    }
    for name, value in model.state_dict().items():
        members[f"mlp.{name}"] = value.cpu().numpy()
    write_npz(path, members)
    return path


def load_model(
    folder: str | Path,
    model: nn.Module,
    table_sizes: np.ndarray,
    dim: int,
    slot_of_row: np.ndarray | None,
) -> Tensor:
    """Load the MLPs into `model` and return the rows (num_rows, dim) in slot order.

    Raises `ValueError` naming what differs when the file was saved for other tables or another
    model.
    """
    path = model_file(folder, to_write=False)
    arrays = open_npz(path, ("rows", "table_sizes"))
    if not np.array_equal(arrays["table_sizes"], table_sizes):
        raise ValueError(f"{path} was saved for tables of other sizes than this data set's")
    expected = (int(np.sum(table_sizes)), dim)
    if arrays["rows"].shape != expected:
        raise ValueError(f"{path} has rows of shape {arrays['rows'].shape}; expected {expected}")
    state = {}
    for name, value in model.state_dict().items():
        stored = arrays.get(f"mlp.{name}")
        if stored is None or stored.shape != tuple(value.shape):
            raise ValueError(
                f"{path} has {name} of shape {None if stored is None else stored.shape}; expected "
                f"{tuple(value.shape)}: other --arch flags"
            )
        state[name] = torch.from_numpy(stored.copy())
    model.load_state_dict(state)
    rows = np.empty(expected, np.float32)
    rows[slice(None) if slot_of_row is None else slot_of_row] = arrays["rows"]
    return torch.from_numpy(rows)
