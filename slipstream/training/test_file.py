"""Test and validation on the rows of another processed file, which shares the data's values.

One of them extends the other (`data_utils.py --extend`), perhaps over files between: an id that
both have is of the same value. A value that the data do not have takes the row that rare values
share, or is absent, as in `predict.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.inputs import CHECK_ROWS, ClickInputs
from slipstream.logs.processed import ClickLog, load_processed
from slipstream.logs.sub_sampling import sub_sampling_of
from slipstream.logs.vocabulary import RARE, VOCABULARY, lineage_of
from slipstream.tools.cli import Flag
from slipstream.tools.npz import open_npz
from slipstream.training.sets import PreparedData

TEST_DATA_FILE = Flag(
    "--test-data-file",
    str,
    None,
    "test on the first half, and validate on the second, of all rows of this processed file, which "
    "extends that of the data, or is extended by it (data_utils.py --extend); not given: on what "
    "the data hold out",
    "FILE",
)


def tested_on(prepared: PreparedData, path: str | Path | None) -> PreparedData:
    """The data, with the rows of a processed file held out in place of their own.

    Takes 4 bytes of memory an id of the file. Raises `ValueError` where neither extends the other,
    or the files do not fit, and `FileNotFoundError`.
    """
    if path is None:
        return prepared
    log = load_processed(path, verify=True)
    _check_lineage(prepared.manifest, log.manifest, path)
    transforms, layout = prepared.transforms, prepared.layout
    if log.layout != layout or log.inputs.transforms != transforms:
        raise ValueError(f"--test-data-file: {path} has other features or transforms than the data")
    slots, num_absent = _slots_of(prepared, log.inputs)
    if num_absent:
        share = num_absent / slots.size
        print(f"{path}: {num_absent:,} values ({share:.2%} of its) that the data do not have")
    num_rows, has_absent = len(log.inputs), layout.has_absent or bool((slots < 0).any())
    arrays = (log.inputs.dense, slots, log.inputs.labels, np.array([0, num_rows]))
    inputs = ClickInputs(*arrays, None, None, has_absent, transforms, log.inputs.weights)
    half = num_rows // 2
    test, val = inputs.rows(0, half), inputs.rows(half, num_rows)
    data = replace(prepared.data, test=test, val=val, held_out_shift=_shift(prepared, log, path))
    return replace(prepared, data=data, has_absent=has_absent)


def _shift(prepared: PreparedData, log: ClickLog, path: str | Path) -> float:
    """What makes logits right on the file's rows, which all count: training ones may be thinned."""
    here, there = prepared.sub_sampling, sub_sampling_of(log.manifest, str(path))
    if there is not None and there.rate:
        raise ValueError(
            f"--test-data-file: rows without a click were left out of {path}; make it without "
            "--data-sub-sample-rate"
        )
    return 0.0 if here is None else here.logit_shift


def _check_lineage(here: dict[str, Any], there: dict[str, Any], path: str | Path) -> None:
    described = [manifest.get(VOCABULARY) for manifest in (here, there)]
    if all(one is not None for one in described):
        lineages = [lineage_of(one) for one in described if one is not None]
        if lineages[0][-1] in lineages[1] or lineages[1][-1] in lineages[0]:
            return
    raise ValueError(
        f"--test-data-file: {path} neither extends the file of the data nor is extended by it "
        "(data_utils.py --extend), so its ids are of other values"
    )


def _slots_of(prepared: PreparedData, inputs: ClickInputs) -> tuple[np.ndarray, int]:
    """The data's slots (n, C) int32 of a file's ids; how many ids the data do not have."""
    layout, sizes = prepared.layout, prepared.table_sizes
    table_of, first = layout.table_of_column, np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rare_ids = _rare_ids(prepared)
    slots = np.empty(inputs.categories.shape, np.int32)
    num_unknown = 0
    for start in range(0, len(inputs), CHECK_ROWS):
        part = slice(start, start + CHECK_ROWS)
        ids = np.array(inputs.categories[part], np.int64)
        is_unknown = ids >= sizes[table_of]
        num_unknown += int(is_unknown.sum())
        ids = np.where(is_unknown, rare_ids[table_of], ids)
        rows = np.where(ids >= 0, ids + first[table_of], -1)
        if prepared.slot_of_row is not None:
            rows = np.where(rows >= 0, prepared.slot_of_row[rows], -1)
        slots[part] = rows
    return slots, num_unknown


def _rare_ids(prepared: PreparedData) -> np.ndarray:
    """Of each table the id that rare values share, (T,); -1: none."""
    sizes = prepared.table_sizes
    source = Path(prepared.files.get("processed", ""))
    if not source.is_file():
        raise FileNotFoundError(
            f"--test-data-file needs the data's processed file, not in {source}"
        )
    codes = open_npz(source, ("codes",), others=False)["codes"]
    found = np.full(len(sizes), -1, np.int64)
    ends = np.cumsum(sizes)
    for row in np.flatnonzero(codes == RARE):
        table = int(np.searchsorted(ends, row, side="right"))
        found[table] = row - (ends[table] - sizes[table])
    return found
